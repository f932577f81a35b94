"""The explorer's page in a real browser, from a file and without a network: what it computes, shows and hears."""

import itertools
import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest

from browser import NEEDS_CHROMIUM, watched
from minimoe import read_sweep, regrets, transfer_report
from minimoe.lr_explorer import END, explorer_data
from minimoe.pages import course_datasets, digests, explorer_fragment, explorer_page
from minimoe.transfer import losses_at, mean_losses, optima, seed_optima

ROOT = Path(__file__).parent.parent
SWEEPS = ROOT / "data" / "sweeps"
pytestmark = NEEDS_CHROMIUM

# Every optimum, regret, best LR of a seed and drift of one data set: a row for each step, subset of seeds, table and size
EVERYTHING = """([data, subsets, lrs]) => {
  const rows = [];
  for (const step of data.steps.keys()) for (const seeds of subsets) for (const t of data.tables.keys()) {
    const values = [...data.values.keys()].filter(v => page.curve(data, t, v, step, seeds).length);
    const moved = page.drift(data, t, values, step, seeds);
    for (const v of values) {
      const curve = page.curve(data, t, v, step, seeds), best = page.optimum(curve);
      const own = page.bestOctave(data, t, v, step, seeds);
      const regrets = lrs.map(x => page.regret(curve, x));
      rows.push([step, seeds, t, v, best.x, best.loss, best.edge, regrets, own.value, own.error, moved.value, moved.error]);
    }
  }
  return JSON.stringify(rows, (_, x) => (Number.isNaN(x) ? null : x));
}"""


@pytest.fixture(scope="module")
def datasets():
    return course_datasets(SWEEPS)


@pytest.fixture(scope="module")
def address(datasets, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "explorer.html"
    path.write_text(explorer_page(datasets, "Drag your learning rate"), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def page(browser, address):
    """The page, fresh; the test fails if the page complained of anything."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, offline=True, has_touch=True)
    page = context.new_page()
    complaints = watched(page)
    page.goto(address)
    page.wait_for_selector(".minimoe-lr svg .star")
    yield page
    assert not complaints
    context.close()


def choose(page, name):
    page.get_by_label("grow the").select_option(name)


def frame_of(data):
    """The rows of a data set, as a sweep's frame: what Python computes from."""
    rows = [
        {
            "parametrization": data["tables"][t],
            "size": data["values"][v],
            "seed": data["seeds"][s],
            "lr": 2.0**x,
            "losses": losses,
        }
        for t, v, s, x, losses in data["runs"]
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("name", ["width", "number of experts", "granularity", "depth"])
def test_the_page_computes_what_python_computes(browser, datasets, name, tmp_path):
    """Every step, every subset of the seeds, every table and size."""
    data, lrs = datasets[name], [-8.0, -6.25, -5.1, -4.5, -2.0]
    subsets = [list(own) for n in (1, 2, 3) for own in itertools.combinations(range(len(data["seeds"])), n)]
    module = (ROOT / "minimoe" / "lr_explorer.js").read_text(encoding="utf-8")
    exports = re.findall(r"^export function (\w+)", module, flags=re.MULTILINE)
    (tmp_path / "x.html").write_text(f"<script type=module>{module}\nwindow.page = {{ {', '.join(exports)} }};</script>")
    tab = browser.new_page()
    tab.goto((tmp_path / "x.html").as_uri())
    tab.wait_for_function("window.page")
    rows = json.loads(tab.evaluate(EVERYTHING, [data, subsets, lrs]))
    tab.close()
    everything = frame_of(data)
    compared = 0
    for (step, seeds), own in itertools.groupby(rows, key=lambda row: row[:2]):
        frame = everything[everything.seed.isin([data["seeds"][s] for s in seeds])]
        frame = frame.assign(val_loss=[math.inf if losses[step] is None else losses[step] / 1e6 for losses in frame.losses])
        best = optima(mean_losses(frame, "size"), "size").set_index(["parametrization", "size"])
        report = transfer_report(frame, "size").set_index(["parametrization", "size"])
        costs = [regrets(frame, 2.0**x, "size").set_index(["parametrization", "size"]).regret for x in lrs]
        for _, _, t, v, x, loss, edge, cost, octave, error, _, _ in (own := list(own)):
            key = data["tables"][t], data["values"][v]
            assert edge == best.on_edge[key]
            assert x == pytest.approx(math.log2(best.best_lr[key]), abs=1e-4)
            assert loss == pytest.approx(best.best_loss[key], abs=1e-6)
            for mine, theirs in zip(cost, costs, strict=True):
                assert number(mine) == pytest.approx(theirs[key], abs=1e-6, nan_ok=True)
            assert number(octave) == pytest.approx(report.octave[key], abs=1e-4, nan_ok=True)
            assert number(error) == pytest.approx(report.octave_error[key], abs=1e-4, nan_ok=True)
            compared += 1
        for t, last in {row[2]: row for row in own}.items():  # the last size of each table
            key = data["tables"][t], data["values"][last[3]]
            assert number(last[10]) == pytest.approx(report.drift[key], abs=1e-4, nan_ok=True)
            assert number(last[11]) == pytest.approx(report.drift_error[key], abs=1e-4, nan_ok=True)
    assert compared == len(rows) >= 7 * 10 * len(data["tables"])


def number(value):
    return math.nan if value is None else value


def stars(page):
    """(table, size) -> (log2 LR by the star's attribute, the same by its place on the axis)."""
    return {
        (row["panel"], row["v"]): (row["x"], row["seen"])
        for row in page.evaluate("""() => [...document.querySelectorAll(".minimoe-lr .star")].map(star => {
            const svg = star.closest("svg"), texts = [...svg.querySelectorAll("text.middle")];
            const ticks = texts.filter(t => t.querySelector("tspan"));
            const x = t => +t.getAttribute("x"), power = t => +t.querySelector("tspan").textContent.replace("−", "-");
            const [a, b] = [ticks[0], ticks.at(-1)], at = star.transform.baseVal[0].matrix.e;
            const seen = power(a) + (at - x(a)) / (x(b) - x(a)) * (power(b) - power(a));
            return { panel: svg.querySelector(".title").textContent, v: +star.dataset.value, x: +star.dataset.x, seen };
        })""")
    }


def shown_regrets(page):
    """table -> the cells of its row."""
    rows = page.locator(".minimoe-lr table tr").all()[1:]
    return {row.locator("th").text_content(): row.locator("td").all_text_contents() for row in rows}


def slider(page, name):
    return page.get_by_label(name, exact=True)


@pytest.fixture(scope="module")
def frame():
    return read_sweep(SWEEPS / "transfer.jsonl")


def test_the_step_slider_moves_stars_and_regrets(page, frame, datasets):
    slider(page, "after step").focus()
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    step = datasets["width"]["steps"][-5]
    assert page.locator(".minimoe-lr output").first.text_content() == str(step)
    then = losses_at(frame, step)
    report = transfer_report(then).set_index(["parametrization", "width"])
    found = stars(page)
    assert len(found) == 12
    for (table, place), (x, seen) in found.items():
        expected = math.log2(report.best_lr[table, (32, 64, 128, 256)[place]])
        assert x == pytest.approx(expected, abs=1e-4)
        assert seen == pytest.approx(expected, abs=0.02), "where the star stands on the axis"
    cost = regrets(then, 2.0 ** datasets["width"]["start"]["my_lr"]).set_index(["parametrization", "width"]).regret
    for table, cells in shown_regrets(page).items():
        assert cells == [f"{cost[table, n]:.3f}" for n in (32, 64, 128, 256)]


def mine(page):
    return {float(x) for x in page.evaluate("[...document.querySelectorAll('.minimoe-lr .mine')].map(line => line.dataset.x)")}


def spot(page, panel, fraction):
    """A place within a panel, from the left to the right of its axis."""
    box = page.locator(".minimoe-lr .panels svg").nth(panel).bounding_box()
    return box["x"] + 56 + fraction * (box["width"] - 66), box["y"] + box["height"] / 2


def test_my_lr_is_dragged_on_the_figure(page, frame):
    page.mouse.move(*spot(page, 1, 0.5))
    page.mouse.down()
    page.mouse.move(*spot(page, 1, 0.3), steps=5)
    (at,) = mine(page)
    page.mouse.up()
    assert at < -7
    cost = regrets(frame, 2.0**at).set_index(["parametrization", "width"]).regret
    assert shown_regrets(page)["mup"] == [f"{cost['mup', n]:.3f}" for n in (32, 64, 128, 256)]
    assert f"My LR is 2^{at:g}".replace("-", "−") in page.locator(".status").text_content()
    page.touchscreen.tap(*spot(page, 2, 0.8))
    assert mine(page) != {at}


def test_arrow_keys_move_my_lr(page, datasets):
    slider(page, "my LR").focus()
    page.keyboard.press("ArrowRight")
    assert mine(page) == {datasets["width"]["start"]["my_lr"] + 0.25}


def test_training_goes_on_and_pauses(page):
    page.get_by_role("button", name="Train").click()
    page.get_by_role("button", name="Pause").click()
    assert page.locator(".minimoe-lr output").first.text_content() != "200"
    assert page.get_by_role("button", name="Train").is_visible()


def test_predict_then_reveal(page, frame):
    page.get_by_role("button", name="Predict first").click()
    assert {place for _, place in stars(page)} == {0}, "the smallest width alone"
    page.mouse.click(*spot(page, 0, 0.75))
    guesses = page.evaluate("[...document.querySelectorAll('.minimoe-lr .mine')].map(line => +line.dataset.x)")
    assert guesses[0] != guesses[1] == guesses[2]
    page.get_by_role("button", name="Reveal").click()
    assert len(stars(page)) == 12
    best = transfer_report(frame).set_index(["parametrization", "width"]).best_lr["sp", 256]
    off = guesses[0] - math.log2(best)
    cost = regrets(frame, 2.0 ** guesses[0]).set_index(["parametrization", "width"]).regret["sp", 256]
    words = page.locator(".minimoe-lr .side li").first.text_content()
    assert words == f"sp: {abs(off):.2f} octaves too {'high' if off > 0 else 'low'}, costs {cost:.3f} nats"


def test_other_axes_and_choices(page, datasets):
    for name in list(datasets)[1:]:
        choose(page, name)
        titles = page.locator(".minimoe-lr svg .title").all_text_contents()
        assert titles == datasets[name]["start"]["tables"]
    choose(page, "granularity")
    page.get_by_label("a panel for each granularity").check()
    assert page.locator(".minimoe-lr svg .title").all_text_contents() == [f"granularity {g}" for g in (1, 2, 4, 8, 16)]
    for name in datasets["granularity"]["start"]["tables"]:
        page.get_by_label(name, exact=True).uncheck()
    assert page.get_by_text("choose at least one of arms").is_visible()
    page.get_by_label("authors", exact=True).check()
    assert len(stars(page)) == 5


def test_one_seed_has_no_error(page):
    for seed in ("0", "1"):
        page.locator("fieldset").filter(has_text="seeds").get_by_label(seed).uncheck()
    assert page.locator(".minimoe-lr .error").count() == 0
    assert "(one seed)" in page.locator(".minimoe-lr svg .drift").first.text_content()


@pytest.mark.parametrize(("width", "height"), [(360, 740), (1280, 800)])
def test_it_fits_the_screen(page, width, height):
    page.set_viewport_size({"width": width, "height": height})
    page.wait_for_timeout(100)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [box.bounding_box() for box in page.locator(".minimoe-lr .panels svg").all()]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)
    if width == 1280:
        assert page.evaluate("document.documentElement.scrollHeight") <= height, "all on a projector's screen"


def test_every_control_and_picture_has_a_name(page):
    for role in ("checkbox", "slider", "button", "combobox", "img"):
        for found in page.get_by_role(role).all():
            name = found.get_attribute("aria-label") or found.text_content() or found.evaluate("e => e.labels?.[0]?.textContent")
            assert name.strip(), role
    assert "lowest" in page.get_by_role("img").first.get_attribute("aria-label")


def test_two_fragments_on_one_page_and_names_that_try_to_break_out(browser, frame, tmp_path):
    evil = "</script><img src=x onerror=alert(1)>"
    rows = frame[frame.parametrization == "sp"]
    data = {"a": explorer_data(rows.assign(parametrization=evil))}
    other = {"b": explorer_data(rows[rows.seed == 0])}
    path = tmp_path / "two.html"
    path.write_text(f"<meta charset=utf-8>{explorer_fragment(data)}{explorer_fragment(other, {'my_lr': -7.0})}")
    tab = browser.new_page()
    complaints = watched(tab)
    tab.goto(path.as_uri())
    tab.wait_for_selector(".minimoe-lr svg .star")
    assert tab.locator(".minimoe-lr").count() == 2
    assert tab.locator(".minimoe-lr svg .title").first.text_content() == evil
    assert tab.locator("img[src=x]").count() == 0
    assert mine(tab) == {-6.0, -7.0}
    assert not complaints
    tab.close()


def test_data_of_runs_that_diverged_and_of_other_lengths(frame):
    rows = frame[(frame.parametrization == "sp") & (frame.width == 32)].head(2).copy()
    rows["diverged"] = [True, False]
    rows["history"] = [rows.history.iloc[0][:1], rows.history.iloc[1]]
    data = explorer_data(rows)
    assert data["runs"][0][4][1:] == [None] * 9
    assert None not in data["runs"][1][4]
    assert explorer_data(rows.tail(1), "steps")["steps"][-1] == END


def test_data_that_cannot_be_shown(frame):
    with pytest.raises(ValueError, match="frame='no rows': must have runs"):
        explorer_data(frame.head(0))
    with pytest.raises(ValueError, match="no recorded step in common"):
        explorer_data(frame.head(1).assign(history=[[]]))
    with pytest.raises(ValueError, match="datasets is empty"):
        explorer_fragment({})


def test_the_policy_names_the_pages_own_script_and_style(datasets):
    text = explorer_page(datasets, "<x>")
    assert "<title>&lt;x&gt;</title>" in text
    (policy,) = re.findall(r'Security-Policy" content="([^"]*)"', text)
    assert set(digests(text, "script") + digests(text, "style")) <= set(policy.replace(";", "").split())
    assert "unsafe" not in policy
    assert len(text) < 400_000


def test_seed_optima_of_the_page_are_used(frame):
    """The parity above is of real numbers: most seeds of the width sweep have an optimum of their own."""
    assert seed_optima(frame).best_octave.notna().mean() > 0.9
