"""Reports from frames made by hand, where the answer is known."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimoe import at_best_lr, beside, drift_chart, drift_words, lr_curves, summary, transfer_report
from minimoe.figures import styles
from minimoe.transfer import optimum, seed_optima, sentence


def frame(curves, name="mup", seeds=(0,)):
    """curves: width -> {log2 lr: loss}."""
    return pd.DataFrame(
        [
            {"parametrization": name, "width": width, "lr": 2.0**octave, "seed": seed, "val_loss": loss}
            for width, curve in curves.items()
            for octave, loss in curve.items()
            for seed in seeds
        ]
    )


def parabola(centre, floor, octaves=range(-10, -2)):
    return {o: floor + 0.1 * (o - centre) ** 2 for o in octaves}


@given(centre=st.floats(-8.9, -4.1), step=st.sampled_from([0.5, 1.0]))
def test_the_vertex_of_a_parabola_is_found_exactly(centre, step):
    octaves = np.arange(-10, -2, step)
    found = optimum(2.0**octaves, 2 + 0.3 * (octaves - centre) ** 2)
    assert math.log2(found["best_lr"]) == pytest.approx(centre, abs=1e-6)
    assert not found["on_edge"]


def test_the_vertex_on_an_uneven_grid():
    octaves = np.array([-9.0, -7.0, -6.5, -4.0])
    found = optimum(2.0**octaves, (octaves + 6.7) ** 2)
    assert math.log2(found["best_lr"]) == pytest.approx(-6.7)


COLUMNS = [
    *("parametrization", "width", "grid_lr", "best_lr", "best_loss", "on_edge", "drift_octaves", "seeds"),
    *("octave", "octave_error", "drift", "drift_error", "per_doubling", "per_doubling_error", "regret", "regret_error"),
    "seeds_with_optimum",
]


def test_the_report_has_a_row_for_each_size_and_the_summary_one_for_each_parametrization():
    report = transfer_report(frame({32: parabola(-6, 2.4), 64: parabola(-7, 2.5), 128: parabola(-8, 2.3)}))
    assert list(report.columns) == COLUMNS
    assert report.width.tolist() == [32, 64, 128]
    assert report.best_lr.tolist() == pytest.approx([2**-6, 2**-7, 2**-8])
    assert report.drift_octaves.tolist() == pytest.approx([0, -1, -2])
    assert report.regret.tolist() == pytest.approx([0, 0.1, 0.4])
    assert report.best_loss.tolist() == pytest.approx([2.4, 2.5, 2.3])
    assert not report.on_edge.any()
    (row,) = summary(report).to_dict("records")
    assert row["width"] == 128
    assert row["drift_octaves"] == pytest.approx(-2)
    assert row["regret"] == pytest.approx(0.4)
    assert row["larger_is_worse"] == 1
    assert not row["on_edge"]
    assert "from width 32 to 128 the best LR moves by -2.00 octaves" in sentence(report)


@pytest.mark.parametrize(
    ("floors", "worse"), [((2.4, 2.3, 2.2), 0), ((2.2, 2.3, 2.4), 2), ((2.4, 2.4, 2.5), 1), ((2.4, math.inf, 2.3), 1)]
)
def test_pairs_in_which_the_larger_is_worse_are_counted(floors, worse):
    curves = {width: parabola(-6, floor) for width, floor in zip((32, 64, 128), floors, strict=True)}
    assert summary(transfer_report(frame(curves))).larger_is_worse[0] == worse


def test_sizes_ascend_and_parametrizations_keep_their_order():
    sp = frame({128: parabola(-6, 2), 32: parabola(-7, 2)}, "sp")
    rows = pd.concat([sp, frame({64: parabola(-6, 2, range(-12, -2))}, "mup")])[::-1]
    rows = rows.sort_values("parametrization", ascending=False, kind="stable")  # LRs and sizes fall
    report = transfer_report(rows)
    assert list(zip(report.parametrization, report.width, strict=True)) == [("sp", 32), ("sp", 128), ("mup", 64)]
    assert report.drift_octaves.tolist() == pytest.approx([0, 1, 0])  # each compared with its own smallest
    assert summary(report).parametrization.tolist() == ["sp", "mup"]


def test_regret_takes_the_small_models_grid_point_not_its_vertex():
    report = transfer_report(frame({32: parabola(-6.4, 2.4), 64: parabola(-7, 2.3)}))
    assert report.regret[1] == pytest.approx(0.1)  # grid best at -6; (-6 + 7)^2 * 0.1
    assert math.log2(report.best_lr[0]) == pytest.approx(-6.4)


def test_a_minimum_on_the_edge_is_not_an_optimum():
    report = transfer_report(frame({32: parabola(-6, 2.4), 64: parabola(-12, 2.3)}))
    assert report.on_edge.tolist() == [False, True]
    assert summary(report).on_edge[0]
    assert report.best_lr[1] == 2**-10
    assert "a bound only: the minimum at width 64 lies on the grid's edge" in sentence(report)
    assert summary(transfer_report(frame({32: parabola(-12, 2.4), 64: parabola(-6, 2.3)}))).on_edge[0], "of any size"


def test_a_minimum_beside_a_diverged_run_is_the_grid_point():
    curve = parabola(-6, 2.4) | {-5: math.inf, -4: math.inf, -3: math.inf}
    row = transfer_report(frame({32: curve, 64: parabola(-6, 2.3)})).iloc[0]
    assert row.on_edge
    assert row.best_lr == 2**-6


def test_regret_is_infinite_where_the_transferred_lr_diverges():
    large = parabola(-8, 2.3) | {-6: math.inf, -5: math.inf, -4: math.inf, -3: math.inf}
    assert transfer_report(frame({32: parabola(-6, 2.4), 64: large}, seeds=(0, 1))).regret[1] == math.inf


def test_regret_is_unknown_where_the_transferred_lr_was_not_tried():
    rows = frame({32: parabola(-6, 2.4), 64: parabola(-8, 2.3, range(-10, -6))}, seeds=(0, 1))
    report = transfer_report(rows)
    assert report[["regret", "regret_error"]].iloc[1].isna().all()
    assert report.drift_octaves[1] == pytest.approx(-2)


def test_all_diverged_is_reported_and_not_a_crash():
    dead = dict.fromkeys(range(-10, -2), math.inf)
    for curves, place in (({32: parabola(-6, 2.4), 64: dead}, 1), ({32: dead, 64: parabola(-6, 2.4)}, 0)):
        report = transfer_report(frame(curves))
        assert math.isnan(report.best_lr[place])
        assert math.isnan(report.regret[1])
        assert report.on_edge[place]
        assert summary(report).on_edge[0]


def test_losses_are_averaged_over_seeds_and_parametrizations_kept_apart():
    low, high = frame({32: parabola(-6, 2.4), 64: parabola(-6, 2.2)}), frame({32: parabola(-6, 2.6), 64: parabola(-6, 2.4)})
    high["seed"] = 1
    other = frame({32: parabola(-6, 2.4), 64: parabola(-9, 2.2)}, name="sp")
    report = transfer_report(pd.concat([low, high, other])).set_index(["parametrization", "width"])
    assert report.best_loss["mup", 32] == pytest.approx(2.5)
    assert set(report.seeds["mup"]) == {2}
    assert set(report.seeds["sp"]) == {1}
    assert report.drift_octaves["sp", 64] == pytest.approx(-3)


def test_rows_without_a_seed_are_seeds():
    rows = frame({32: parabola(-6, 2.4), 64: parabola(-6.5, 2.2)}, seeds=(0, 1))
    pd.testing.assert_frame_equal(transfer_report(rows.drop(columns="seed")), transfer_report(rows))


def test_the_summary_has_the_fewest_seeds():
    rows = frame({32: parabola(-6, 2.4), 64: parabola(-6, 2.2)}, seeds=(0, 1, 2))
    report = transfer_report(rows[(rows.width == 32) | (rows.seed < 2) | (rows.lr != 2**-10)])
    assert report.seeds.tolist() == [3, 2]
    assert report.seeds_with_optimum.tolist() == [3, 3]
    assert summary(report)[["seeds", "seeds_with_optimum"]].values.tolist() == [[2, 3]]


@pytest.mark.parametrize("by", ["n_experts", "granularity", "depth", "batch_size", "steps", "base_width", "z_weight"])
def test_any_column_of_numbers_is_an_axis(by):
    values = (0.5, 2.0) if by == "z_weight" else (2, 8)
    rows = frame(dict(zip(values, (parabola(-6, 2.4), parabola(-6.5, 2.3)), strict=True)), seeds=(0, 1))
    rows = rows.rename(columns={"width": by}).assign(width=64)
    report = transfer_report(rows, by)
    assert report[by].tolist() == list(values)
    assert report.drift_octaves[1] == pytest.approx(-0.5)
    assert summary(report).per_doubling[0] == pytest.approx(-0.25)
    label = by.replace("_", " ")
    assert lr_curves(rows, by).legends[0].get_title().get_text() == label
    assert [axes.get_title() for axes in lr_curves(rows, by, swapped=True).axes] == [f"{label} {value:g}" for value in values]
    (axes,) = drift_chart(summary(report), by).axes
    assert axes.get_xlabel() == f"octaves of the best LR per doubling of {label}"


def test_a_size_of_zero_has_no_doublings():
    rows = frame({0.0: parabola(-6, 2.4), 0.01: parabola(-6.5, 2.3)}).rename(columns={"width": "z_weight"})
    row = summary(transfer_report(rows, "z_weight")).iloc[0]
    assert row.drift == pytest.approx(-0.5)
    assert math.isnan(row.per_doubling)


@pytest.mark.parametrize("by", ["width", "n_experts"])
def test_sizes_that_grow_together_are_one_axis(by):
    rows = frame({32: parabola(-6, 2.4), 64: parabola(-6.5, 2.3), 128: parabola(-7, 2.2)})
    rows = rows.assign(n_experts=rows.width // 8, top_k=rows.width // 32)
    report = transfer_report(rows, by)
    assert report[by].tolist() == sorted(set(rows[by]))
    assert report.drift_octaves.tolist() == pytest.approx([0, -0.5, -1])
    assert summary(report).per_doubling[0] == pytest.approx(-0.5)
    with pytest.raises(ValueError, match="differ in n_experts: select one"):
        transfer_report(rows.assign(depth=2), "depth")


def test_rows_that_differ_in_something_else_are_not_averaged():
    one, two = frame({32: parabola(-6, 2.4), 64: parabola(-6, 2.2)}), frame({32: parabola(-6, 2.0), 64: parabola(-6, 1.8)})
    one["steps"], two["steps"] = 100, 200
    with pytest.raises(ValueError, match="the rows of 'mup' at width 32 differ in steps: select one"):
        transfer_report(pd.concat([one, two]))
    wide = pd.concat([one, two[two.width == 64].assign(steps=100)])  # the same points twice are one seed
    assert transfer_report(wide).seeds[0] == 1
    both = one.assign(n_experts=one.width // 4, top_k=one.width // 16)  # k / E fixed: two fields move together
    assert transfer_report(both, by="n_experts").drift_octaves[1] == pytest.approx(0)


HALVES = np.arange(-9, -3, 0.5)


def seeded(centres, floor=2.0):
    """centres: width -> the seeds' optima, in octaves; curves are parabolas."""
    return pd.concat(
        frame({width: parabola(centre, floor, HALVES)}, seeds=(seed,))
        for width, seeds in centres.items()
        for seed, centre in enumerate(seeds)
    )


def test_the_rows_at_the_best_lr_are_one_per_seed():
    rows = seeded({32: (-6.4, -6.0, -5.6), 64: (-7, -7, -7)})
    found = at_best_lr(rows)
    assert found.groupby("width").lr.unique().map(list).to_dict() == {32: [2.0**-6], 64: [2.0**-7]}
    assert found.seed.tolist() == [0, 1, 2, 0, 1, 2]
    assert found.val_loss.tolist() == pytest.approx([2 + 0.1 * 0.4**2, 2, 2 + 0.1 * 0.4**2, 2, 2, 2])
    dead = rows.assign(val_loss=rows.val_loss.where(rows.width == 32, math.inf))
    assert set(at_best_lr(dead).width) == {32}
    assert len(at_best_lr(pd.concat([rows, rows]))) == 6  # the same run twice is one


def test_beside_a_reference_that_diverged_there_is_no_gain():
    alive, dead = seeded({32: (-6, -6)}), seeded({32: (-6, -6)}).assign(parametrization="dead", val_loss=math.inf)
    found = beside(pd.concat([alive, dead]).assign(steps=200), "dead").set_index("parametrization")
    assert math.isnan(found.gain["mup"])
    assert found.best_loss["mup"] == pytest.approx(2)


def test_each_seed_has_its_own_optimum_and_the_drift_its_error():
    rows = seeded({32: (-6.1, -6.0, -5.9), 64: (-6.3, -6.1, -6.2), 128: (-6.5, -6.3, -6.4)})
    optima = seed_optima(rows).set_index(["width", "seed"]).best_octave
    assert optima[32].tolist() == pytest.approx([-6.1, -6.0, -5.9])
    assert optima[128].tolist() == pytest.approx([-6.5, -6.3, -6.4])
    report = transfer_report(rows)
    assert (report.octave[0], report.octave_error[0]) == pytest.approx((-6.0, 0.1 / math.sqrt(3)))
    halfway = np.array([-0.2, -0.1, -0.3])
    assert (report.drift[1], report.drift_error[1]) == pytest.approx((halfway.mean(), halfway.std(ddof=1) / math.sqrt(3)))
    assert (report.per_doubling[1], report.per_doubling_error[1]) == pytest.approx((report.drift[1], report.drift_error[1]))
    assert report.per_doubling.isna().tolist() == [True, False, False]
    row = summary(report).iloc[0]
    drifts = np.array([-0.4, -0.3, -0.5])  # seed by seed
    assert (row.drift, row.drift_error) == pytest.approx((drifts.mean(), drifts.std(ddof=1) / math.sqrt(3)))
    assert (row.per_doubling, row.per_doubling_error) == pytest.approx((drifts.mean() / 2, row.drift_error / 2))
    assert row.seeds_with_optimum == 3


def test_seeds_share_the_mean_curves_curvature():
    """One noisy seed, whose own parabola has no minimum; and an LR that one seed lacks, which does not count."""
    rows = seeded({32: (-6.2, -6.0, -5.8)})
    octaves = np.log2(rows.lr)
    rows["val_loss"] -= np.where(rows.seed == 0, 0.15, 0) * (octaves + 6) ** 2  # curvatures -0.05, 0.1, 0.1: 0.05 in the mean
    rows = rows[~(np.isclose(octaves, -6.5) & (rows.seed == 2))]
    optima = seed_optima(rows).best_octave
    assert optima[2] - optima[1] == pytest.approx(0.2 * 0.1 / 0.05)
    near = rows[(np.abs(np.log2(rows.lr) + 6) <= 1) & ~np.isclose(rows.lr, 2.0**-6.5)]
    curvature, slope, _ = np.polyfit(np.log2(near.lr), near.val_loss, 2)
    assert optima.mean() == pytest.approx(-slope / (2 * curvature))


def test_the_regret_has_an_error_too():
    report = transfer_report(seeded({32: (-6.0, -6.0), 64: (-7.0, -7.5)}))
    at = {seed: 0.1 * ((-6 - centre) ** 2 - (-7.5 - centre) ** 2) for seed, centre in enumerate((-7.0, -7.5))}
    if report.grid_lr[1] == 2.0**-7.0:
        at = {seed: 0.1 * ((-6 - centre) ** 2 - (-7 - centre) ** 2) for seed, centre in enumerate((-7.0, -7.5))}
    assert report.regret[1] == pytest.approx(np.mean(list(at.values())))
    assert report.regret_error[1] == pytest.approx(np.std(list(at.values()), ddof=1) / math.sqrt(2))


def test_an_optimum_on_the_edge_or_beside_a_diverged_run_has_no_place():
    rows = seeded({32: (-6.0, -6.0), 64: (-12.0, -12.0)})
    assert seed_optima(rows).best_octave.isna().tolist() == [False, False, True, True]
    row = summary(transfer_report(rows)).iloc[0]
    assert math.isnan(row.drift)
    assert row.seeds_with_optimum == 0
    rows = frame({32: {-7: 2.2, -6: 2.1, -5.5: 2.15, -5: math.inf}}, seeds=(0, 1))
    assert seed_optima(rows).best_octave.isna().all()
    assert seed_optima(frame({32: {-7: 2.0, -6: 2.0, -5: 2.0}})).best_octave.isna().all()  # flat


def test_one_seed_has_a_drift_without_an_error():
    row = summary(transfer_report(seeded({32: (-6.0,), 64: (-7.0,)}))).iloc[0]
    assert row.drift == pytest.approx(-1.0)
    assert math.isnan(row.drift_error)
    assert drift_words(row.drift, row.drift_error) == "-1.00 (one seed)"
    report = transfer_report(seeded({32: (-6.0, -6.2)}))
    assert report.octave[0] == pytest.approx(-6.1)
    alone = summary(report).iloc[0]
    assert math.isnan(alone.drift)
    assert math.isnan(alone.per_doubling)


def test_a_drift_within_two_errors_was_not_seen():
    assert drift_words(-0.5, 0.2) == "-0.50 ± 0.20"
    assert drift_words(-0.3, 0.2) == "none seen, |drift| < 0.70"
    assert drift_words(math.nan, 0.2) == "no optimum"


def test_swapped_panels_are_values_and_curves_are_tables():
    rows = pd.concat([frame({32: parabola(-6, 2), 64: parabola(-7, 2)}, name) for name in ("mup", "sp", "simplep")])
    figure = lr_curves(rows, swapped=True)
    assert [axes.get_title() for axes in figure.axes] == ["width 32", "width 64"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["mup", "sp", "simplep"]
    colors = [
        {line.get_label(): line.get_color() for line in axes.lines if line.get_label() in ("mup", "sp")} for axes in figure.axes
    ]
    assert colors[0] == colors[1]
    assert colors[0]["mup"] != colors[0]["sp"]


def test_many_panels_go_into_rows():
    rows = pd.concat([frame({32: parabola(-6, 2)}, f"arm {i}") for i in range(7)])
    shown = [axes for axes in lr_curves(rows).axes if axes.axison]
    assert len(shown) == 7
    assert len({round(axes.get_position().y0, 3) for axes in shown}) == 2
    assert [axes.get_xlabel() for axes in shown] == [""] * 3 + ["learning rate"] * 4


def test_sentences_without_an_optimum_or_a_comparison():
    dead = frame({32: parabola(-6, 2.4), 64: dict.fromkeys(range(-10, -2), math.inf)})
    assert sentence(transfer_report(dead)) == "mup: every run at width 64 diverged, so there is no optimum to compare."
    assert "one width only (32)" in sentence(transfer_report(frame({32: parabola(-6, 2.4)})))


def test_every_value_has_a_look_of_its_own_and_powers_of_two_keep_theirs():
    for values in ([32, 48, 64, 96, 128], [6, 8], [0, 1, 2, 3, 4, 5]):
        looks = [tuple(look.values()) for look in styles(values).values()]
        assert len(set(looks)) == len(values)
    assert styles([32, 48, 64])[64] == styles([64, 128])[64]


def test_the_legend_knows_every_curve():
    sp, mup = frame({32: parabola(-6, 2.4)}, name="sp"), frame({32: parabola(-6, 2.4), 64: parabola(-6, 2.3)})
    (legend,) = lr_curves(pd.concat([sp, mup])).legends
    assert [text.get_text() for text in legend.get_texts()] == ["32", "64"]


def test_bad_frames_are_refused():
    good = frame({32: parabola(-6, 2.4)})
    with pytest.raises(ValueError, match="lacks the columns depth"):
        transfer_report(good, by="depth")
    with pytest.raises(ValueError, match="by='parametrization': must be a numeric axis"):
        transfer_report(good, by="parametrization")
    with pytest.raises(ValueError, match="has no rows"):
        transfer_report(good[:0])


def test_the_figure_has_a_panel_a_curve_and_a_star_for_each():
    sp = frame({32: parabola(-6, 2.4), 64: parabola(-7, 2.3)}, name="sp", seeds=(0, 1))
    mup = frame({32: parabola(-6, 2.4), 64: parabola(-6, 2.3) | {-3: math.inf}})
    figure = lr_curves(pd.concat([sp, mup]))
    panels = figure.axes
    assert [axes.get_title().splitlines() for axes in panels] == [
        ["sp", "drift -1.00 ± 0.00 octaves"],  # two seeds
        ["mup", "the best LR drifts by +0.00 octaves"],
    ]
    assert panels[0].get_ylim() == panels[1].get_ylim()
    assert panels[0].get_xlabel() == "learning rate"
    assert "validation loss" in panels[0].get_ylabel()
    for axes in panels:
        stars = [line for line in axes.lines if line.get_marker() == "*"]
        assert len(stars) == 2
    colours = [[line.get_color() for line in axes.lines if line.get_label() == "64"] for axes in panels]
    assert colours[0] == colours[1]
    crosses = [line.get_xdata().tolist() for line in panels[1].lines if line.get_marker() == "x"]
    assert crosses == [[2**-10], [2**-10, 2**-3]]  # above the picture; and diverged


def test_arms_beside_a_reference_seed_by_seed():
    """Optima at -6 and -6.5 for the reference, half an octave lower, and a quarter and three quarters."""
    rows = []
    for name, centres in {"dense": (-6, -6.5), "close": (-6.5, -7.0), "spread": (-6.25, -7.25)}.items():
        for seed, centre in enumerate(centres):
            rows.append(frame({64: parabola(centre, 1.7 if name == "spread" else 2.0)}, name, (seed,)))
    found = beside(pd.concat(rows, ignore_index=True).assign(steps=200), "dense").set_index("parametrization")
    assert list(found.index) == ["dense", "close", "spread"]
    assert found.moved.tolist() == pytest.approx([0, -0.5, -0.5])
    assert found.moved_error.tolist() == pytest.approx([0, 0, 0.25])
    reference = found.grid_lr["dense"]
    assert math.log2(reference) == -6
    assert found.grid_lr["close"] == 2.0**-7
    losses = [0.1 * (-6 - centre) ** 2 - 0.1 * (-7 - centre) ** 2 for centre in (-6.5, -7.0)]
    assert found.regret["close"] == pytest.approx(np.mean(losses))
    assert (found.regret["dense"], found.octave["dense"]) == (0, pytest.approx(-6.25))
    own = round(math.log2(found.grid_lr["spread"]))
    gains = [0.3 + 0.1 * (-6 - a) ** 2 - 0.1 * (own - b) ** 2 for a, b in zip((-6, -6.5), (-6.25, -7.25), strict=True)]
    assert (found.gain["dense"], found.gain["spread"]) == (0, pytest.approx(np.mean(gains)))
    assert found.gain_error["spread"] == pytest.approx(np.std(gains, ddof=1) / 2**0.5)


def test_what_cannot_be_set_beside_one_another():
    rows = frame({64: parabola(-6, 2.0)}, "dense").assign(steps=200)
    with pytest.raises(ValueError, match="reference='sparse': must be one of dense"):
        beside(rows, "sparse")
    with pytest.raises(ValueError, match=r"steps=\[100, 200\]: must be one number"):
        beside(pd.concat([rows, rows.assign(steps=100)], ignore_index=True), "dense")
