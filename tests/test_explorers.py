"""The explorers without a kernel or a browser: set a control, read the numbers and the picture."""

import base64
import math
import re

import pandas as pd
import pytest
from ipywidgets import HTML, Widget
from traitlets import TraitError

from minimoe import PARAMETRIZATIONS, coordinate_check, fan_in, losses_at, regrets, sweep, width
from minimoe import explorer as explorer_module
from minimoe.arms import ARMS, labelled
from minimoe.explorers import CoordinateExplorer, TableExplorer
from minimoe.live import LiveSweep
from minimoe.lr_explorer import LRExplorer
from minimoe.parametrization import as_monomial

PNG = b"\x89PNG"
LRS = [2.0**octave for octave in (-8, -7, -6, -5, -4)]


@pytest.fixture(scope="module")
def swept(corpus):
    return sweep((32, 64), ("sp", "mup"), LRS, (0, 1), 6, corpus, n_jobs=1, progress=False, context=16)


@pytest.fixture(scope="module")
def checked(corpus):
    return coordinate_check(("sp", "mup"), (32, 64), 2, (0, 1), corpus=corpus, n_jobs=1, context=16)


def picture_changed(explorer, control, value):
    """control: a widget, or the name of a trait."""
    before = bytes(explorer.image.value)
    if isinstance(control, str):
        setattr(explorer, control, value)
    else:
        control.value = value
    assert bytes(explorer.image.value).startswith(PNG)
    return bytes(explorer.image.value) != before


def test_my_lr_moves_the_line_and_the_regrets(swept):
    explorer = LRExplorer(swept)
    for exponent in (-8.0, -6.25, -4.0):
        assert picture_changed(explorer, "my_lr", exponent)
        expected = regrets(swept, 2.0**exponent).set_index(["parametrization", "width"]).regret
        shown = explorer.regrets()
        for name in ("sp", "mup"):
            for n in (32, 64):
                assert shown.loc[name, n] == expected[name, n]
                assert f"{expected[name, n]:.3f}" in explorer.text.value


def test_regret_at_a_grid_point_is_that_points_loss_less_the_best(swept):
    one = swept[(swept.parametrization == "sp") & (swept.width == 64)].groupby("lr").val_loss.mean()
    found = regrets(swept, 2.0**-5).set_index(["parametrization", "width"])
    assert found.regret["sp", 64] == pytest.approx(one[2.0**-5] - one.min())
    between = regrets(swept, 2.0**-5.5).set_index(["parametrization", "width"]).regret["sp", 64]
    assert between == pytest.approx((one[2.0**-5] + one[2.0**-6]) / 2 - one.min())
    outside = regrets(swept, 2.0**-3)
    assert not outside.inside.any()
    assert outside.regret.isna().all()
    with pytest.raises(ValueError, match="must be positive"):
        regrets(swept, 0)


def test_panels_can_be_widths_and_curves_tables(swept):
    explorer = LRExplorer(swept)
    assert [axes.get_title().split("\n")[0] for axes in explorer.figure.axes] == ["sp", "mup"]
    assert picture_changed(explorer, "swapped", True)
    assert [axes.get_title() for axes in explorer.figure.axes] == ["width 32", "width 64"]


@pytest.mark.parametrize(
    ("by", "label", "fields"),
    [("n_experts", "experts", {"n_experts": (4, 8)}), ("granularity", "granularities", {"granularity": (1, 2)})],
)
def test_expert_count_granularity_and_arms_are_axes(by, label, fields, corpus):
    arms = {name: ARMS[name] for name in ("authors", "down by fan_in")}
    parts = [
        sweep((32,), (arm.table,), LRS, (0,), 4, corpus, n_jobs=1, progress=False, context=16, base_granularity=1,
              base_width=16, **{by: size}, **arm.fields)
        for arm in arms.values()
        for size in fields[by]
    ]  # fmt: skip
    explorer = LRExplorer(labelled(pd.concat(parts, ignore_index=True), arms), by, names="arms")
    assert (explorer.data["names"], explorer.data["plural"]) == ("arms", label)
    assert explorer.data["tables"] == ["authors", "down by fan_in"]
    assert explorer.data["values"] == list(fields[by])
    assert list(explorer.regrets().columns) == list(fields[by])
    assert picture_changed(explorer, "tables", ["authors"])
    assert f"at {by}" in explorer.text.value


def test_batch_size_steps_and_sizes_on_a_path_are_axes(corpus):
    def trained(**axes):
        return sweep(axes.pop("width", (32,)), ("sp",), LRS, (0,), corpus=corpus, n_jobs=1, progress=False, context=16, **axes)

    batches = LRExplorer(trained(steps=4, batch_size=(2, 4)), "batch_size")
    assert (batches.data["plural"], batches.data["values"]) == ("batch size", [2, 4])
    assert picture_changed(batches, "values", [2])
    assert "at batch_size" in batches.text.value
    grown = LRExplorer(trained(width=None, steps=4, path={"width": (32, 64), "n_experts": (4, 8)}), "n_experts")
    assert grown.figure.legends[0].get_title().get_text() == "n experts"
    assert list(grown.regrets().columns) == [4, 8]


def test_runs_of_different_lengths_are_compared_at_a_step_or_at_their_ends(corpus):
    rows = sweep((32,), ("sp",), LRS, (0,), (3, 6), corpus, n_jobs=1, progress=False, context=16)
    explorer = LRExplorer(rows, "steps")
    assert explorer.data["steps"] == [1, 2, 3, "the end"]
    assert explorer.step == "the end"
    expected = regrets(rows, 2.0**-6, "steps").set_index("steps").regret
    assert explorer.regrets().loc["sp"].to_dict() == expected.to_dict()
    assert picture_changed(explorer, "step", 3)
    assert explorer.chosen().val_loss.tolist() == losses_at(rows, 3).val_loss.tolist()


def test_choices_choose_rows(swept):
    explorer = LRExplorer(swept)
    assert picture_changed(explorer, "tables", ["mup"])
    assert picture_changed(explorer, "values", [64])
    assert picture_changed(explorer, "seeds", [1])
    rows = explorer.chosen()
    assert set(zip(rows.parametrization, rows.width, rows.seed, strict=True)) == {("mup", 64, 1)}
    assert picture_changed(explorer, "minima", False)
    explorer.values = []
    assert "choose at least one of widths" in explorer.text.value
    explorer.values = [32]
    assert "regret" in explorer.text.value


def test_the_step_moves_the_curves(swept):
    explorer = LRExplorer(swept)
    assert explorer.data["steps"][-1] == 6
    assert picture_changed(explorer, "step", 2)
    row = swept.iloc[3]
    losses = {record["step"]: record["val_loss"] for record in row.history}
    assert losses_at(swept, 2).iloc[3].val_loss == losses[2]
    assert losses_at(swept, 6).val_loss.tolist() == pytest.approx(swept.val_loss.tolist())
    with pytest.raises(ValueError, match="step=7: the records are at 1, 2, 3, 4, 5, 6"):
        losses_at(swept, 7)


def test_a_run_that_diverged_is_infinite_ever_after(swept):
    frame = swept.head(2).copy()
    frame["diverged"] = [True, False]
    frame["history"] = [frame.history.iloc[0][:2], frame.history.iloc[1]]
    assert losses_at(frame, 5).val_loss.tolist() == [math.inf, swept.history.iloc[1][4]["val_loss"]]


def test_live_sweep_trains_shows_progress_and_joins_the_explorer(swept, corpus):
    explorer = LRExplorer(swept)
    live = LiveSweep(explorer, corpus)
    live.steps.value = 20
    before = bytes(explorer.image.value)
    live.start.click()
    live.wait(120)
    assert re.fullmatch(r"done: 6 of 6 runs; lowest loss \d\.\d\d at LR 2\^-\d \(drawn dashed .*\)", live.status.value)
    assert live.bar.value == 6
    assert len(explorer.live_rows) == 6
    assert bytes(explorer.image.value) != before
    assert "another corpus" not in explorer.text.value
    assert not live.start.disabled
    assert live.stop.disabled


def test_another_corpus_is_said(swept, corpus):
    explorer = LRExplorer(swept)
    explorer.add_live(swept.head(3).assign(corpus_digest="other"))
    assert "on another corpus than the shipped ones" in explorer.text.value


def test_stop_ends_after_the_run_that_is_going_on(swept, corpus):
    live = LiveSweep(LRExplorer(swept), corpus)
    live.steps.value = 200
    live.start.click()
    live.stop.click()
    live.wait(120)
    assert live.status.value.startswith("stopped: ")
    assert live.bar.value < 6


def test_what_goes_wrong_in_the_thread_is_shown(swept):
    live = LiveSweep(LRExplorer(swept), corpus="no such corpus")
    live.start.click()
    live.wait(60)
    assert "no corpus" in live.status.value
    assert not live.start.disabled


def test_table_explorer_predicts_at_once_and_measures_on_demand(corpus):
    small = {"widths": (32, 64), "steps": 1, "seeds": (0,), "corpus": corpus}
    explorer = TableExplorer("mup", small, context=16)
    explorer.role.value, explorer.cell.value = "router", "multiplier"
    assert explorer.value.value == PARAMETRIZATIONS["mup"]["router"].multiplier  # the cell as it is
    assert explorer.table == PARAMETRIZATIONS["mup"]
    assert explorer.predicted()["router", "update"] == 0
    assert picture_changed(explorer, explorer.value, as_monomial(1))
    assert explorer.predicted()["router", "update"] == 1
    assert "mup[router.multiplier=1]" in explorer.text.value
    before = bytes(explorer.image.value)
    explorer.check.click()
    assert "router.multiplier is too large by width^+" in explorer.text.value
    assert bytes(explorer.image.value) != before
    explorer.value.value = 1 / fan_in  # back to muP itself
    assert explorer.table == PARAMETRIZATIONS["mup"]
    assert explorer.measured is None
    explorer.role.value, explorer.cell.value = "embedding", "lr"
    explorer.value.value = 1 / width  # an embedding's fan_in never grows
    assert explorer.predicted()["embedding", "update"] == -1
    explorer.base.value = PARAMETRIZATIONS["sp"]
    assert explorer.table == PARAMETRIZATIONS["sp"]
    assert explorer.value.value == as_monomial(1)


def test_table_explorer_knows_the_model_that_it_measures(corpus):
    edited = PARAMETRIZATIONS["mup"].replace("experts_up", init_var=1)
    explorer = TableExplorer(edited, activation="swiglu")
    assert explorer.predicted()["down", "update"] == 1  # a product of two grown values
    assert explorer.base.value == edited
    bad = TableExplorer("mup", {"widths": (32,), "corpus": corpus})
    bad.check.click()
    assert "needs at least two" in bad.text.value


def test_a_second_live_sweep_replaces_the_curve_and_what_is_not_shown_is_not_counted(swept):
    explorer = LRExplorer(swept)
    one = swept[(swept.parametrization == "sp") & (swept.width == 64) & (swept.seed == 0)]
    explorer.add_live(one)
    explorer.add_live(one.assign(steps=20))
    assert "Dashed: 5 live rows of 20 steps" in explorer.text.value
    explorer.values = [32]
    assert "Dashed" not in explorer.text.value


def test_runs_of_different_lengths_have_no_common_picture(swept):
    frame = swept.head(2).copy()
    frame["history"] = [swept.history.iloc[0][:2], swept.history.iloc[1][3:]]
    with pytest.raises(ValueError, match="no recorded step in common"):
        LRExplorer(frame)


def test_a_dense_check_can_be_explored(corpus):
    check = coordinate_check("mup", (32, 64), 1, (0,), corpus=corpus, n_jobs=1, context=16, n_experts=1, top_k=1)
    assert CoordinateExplorer(check).tensor.value == "embedding"


def test_coordinate_explorer_shows_one_tensor(checked):
    explorer = CoordinateExplorer(checked)
    for control, value in ((explorer.tensor, "logits"), (explorer.name, "mup"), (explorer.step, 1), (explorer.tensor, "moe")):
        assert picture_changed(explorer, control, value)
    assert set(explorer.slopes().tensor) == {"moe"}
    assert set(explorer.slopes().quantity) == {"init", "update", "propagated", "change"}
    explorer.tensor.value = "embedding"
    assert "zero" in explorer.text.value  # its propagated part
    assert "allocation" in explorer.text.value
    explorer.tensor.value = "loss"
    assert set(explorer.slopes().quantity) == {"allocation", "fall"}


class Handle:
    """A display that remembers what it shows."""

    def __init__(self, bundle):
        self.bundle = bundle

    def update(self, bundle, raw):
        assert raw
        self.bundle = bundle


def test_displayed_are_the_controls_and_below_them_outputs_that_follow(checked, monkeypatch):
    shown = []
    monkeypatch.setattr(explorer_module, "display", lambda bundle, **_how: shown.append(Handle(bundle)) or shown[-1])
    explorer = CoordinateExplorer(checked)
    explorer._ipython_display_()
    controls, picture, words = shown
    assert set(controls.bundle) == {"application/vnd.jupyter.widget-view+json", "text/plain"}
    assert controls.bundle["text/plain"] == "CoordinateExplorer: run this cell to use its controls"
    assert set(picture.bundle) == {"image/png", "text/plain"}
    assert set(words.bundle) == {"text/html", "text/plain"}
    before = picture.bundle["image/png"], words.bundle["text/html"]
    explorer.tensor.value = "up"
    after = picture.bundle["image/png"], words.bundle["text/html"]
    assert base64.b64decode(after[0]) == explorer.image.value
    assert after[0] != before[0]
    assert before[1] != after[1] == explorer_module.TO_DO_FOR_ERROR + explorer.text.value
    explorer._ipython_display_()  # a second time: both pictures follow
    explorer.tensor.value = "down"
    assert (
        shown[1].bundle
        == shown[4].bundle
        == {"image/png": base64.b64encode(explorer.image.value).decode()} | {"text/plain": explorer.image.words}
    )


def test_a_live_sweep_has_its_controls_and_below_them_its_status(swept, corpus, monkeypatch):
    shown = []
    monkeypatch.setattr(explorer_module, "display", lambda bundle, **_how: shown.append(Handle(bundle)) or shown[-1])
    live = LiveSweep(LRExplorer(swept), corpus)
    live._ipython_display_()
    controls, status = shown
    assert controls.bundle["text/plain"] == "LiveSweep: run this cell to use its controls"
    live.status.value = "stopped"
    assert status.bundle["text/html"].endswith("</style>\nstopped")


def test_the_picture_keeps_its_losses(swept):
    explorer = LRExplorer(swept)
    first = explorer.figure.axes[0].get_ylim()
    explorer.tables, explorer.step = ["mup"], 1
    assert explorer.figure.axes[0].get_ylim() == first
    explorer.add_live(swept.assign(val_loss=swept.val_loss + 5))
    assert explorer.figure.axes[0].get_ylim() == first


def test_live_rows_are_sent_as_the_page_reads_them(swept):
    explorer = LRExplorer(swept)
    explorer.add_live(swept.head(4).assign(val_loss=[2.5, 2.7, math.inf, 2.5]))
    assert explorer.live == [["sp", 32, -8.0, pytest.approx(2.6)], ["sp", 32, -7.0, None]], "two seeds each"


def test_choices_that_do_not_exist_are_refused(swept):
    explorer = LRExplorer(swept)
    with pytest.raises(TraitError, match=r"tables: 'mu' is not one of sp, mup"):
        explorer.tables = ["mu"]
    with pytest.raises(TraitError, match=r"values: 48 is not one of 32, 64"):
        explorer.values = [48]
    with pytest.raises(TraitError, match=r"step: 7 is not one of 1, 2, 3, 4, 5, 6"):
        explorer.step = 7
    explorer.tables = ["mup", "sp"]
    assert explorer.tables == ["sp", "mup"], "in the order of the data"


def test_every_control_has_a_label(swept, checked, corpus):
    for widget in (LiveSweep(LRExplorer(swept), corpus), TableExplorer(), CoordinateExplorer(checked)):
        controls = [w for w in vars(widget).values() if isinstance(w, Widget) and hasattr(w, "description") and w.keys]
        controls = [w for w in controls if not isinstance(w, HTML)]
        assert len(controls) >= 3
        for control in controls:
            assert control.description
            assert control.tooltip


@pytest.mark.parametrize("error", [OSError("no space left"), RuntimeError("a worker died"), MemoryError()])
def test_a_measurement_that_fails_says_so_and_does_not_stand_at_measuring(error, monkeypatch):
    def fails(*_arguments, **_fields):
        raise error

    monkeypatch.setattr("minimoe.explorers.coordinate_check", fails)
    explorer = TableExplorer("mup")
    explorer.check.click()
    assert (str(error) or "MemoryError") in explorer.text.value
    assert "measuring" not in explorer.text.value
