"""Pictures: what is drawn is what the frame says. (LR curves are in test_transfer, coordinate curves in test_coordinates.)"""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from minimoe import (
    ROUTER_RULES,
    Config,
    allocation_map,
    coordinate_check,
    coordinate_curves,
    drift_chart,
    exponents,
    exponents_chart,
    learning_shares,
    lr_curves,
    optima_curves,
    predicted_exponents,
    predictions,
    router_rules,
    summary,
    sweep,
    tensor_curves,
    transfer_report,
)
from minimoe.figures import ALERT, PALETTE, styles

LRS = [2.0**octave for octave in (-8, -6, -4)]
PAIR = [ROUTER_RULES["mup"], ROUTER_RULES["early router"]]


@pytest.fixture(scope="module")
def checked(corpus):
    return coordinate_check(PAIR, (32, 64), 2, (0, 1), corpus=corpus, n_jobs=1, context=16)


@pytest.fixture(scope="module")
def swept(corpus):
    return sweep((32, 64), PAIR, LRS, (0,), 3, corpus, n_jobs=1, progress=False, context=16)


def test_my_lr_is_a_line_in_every_panel_and_live_curves_are_dashed(swept):
    figure = lr_curves(swept, my_lr=2**-5, live=swept[swept.width == 64])
    for axes in figure.axes:
        assert any(np.allclose(line.get_xdata(), 2**-5) for line in axes.lines)
        assert sum(line.get_linestyle() == "--" for line in axes.lines) == 1
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words == ["32", "64", "live", "my LR"]
    stars = sum(line.get_marker() == "*" for axes in lr_curves(swept).axes for line in axes.lines)
    assert stars == 4
    assert not any(line.get_marker() == "*" for axes in lr_curves(swept, minima=False).axes for line in axes.lines)


def test_a_sketch_is_drawn_over_every_panel(swept):
    figure = lr_curves(swept, sketch={64: {-4: 2.5, -8: 2.7, -6: 2.4}})
    for axes in figure.axes:
        (drawn,) = [line for line in axes.get_lines() if line.get_linestyle() == ":" and len(line.get_xdata()) == 3]
        assert list(drawn.get_xdata()) == [2.0**-8, 2.0**-6, 2.0**-4]
        assert list(drawn.get_ydata()) == [2.7, 2.4, 2.5]
        assert drawn.get_color() == styles([64])[64]["color"]
    assert "your sketch" in [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize(
    ("sketch", "swapped", "message"),
    [
        ({48: {-4: 2.5, -6: 2.4}}, False, "the sketch is of width 48; the frame has 32, 64"),
        ({64: {-4: 2.5}}, False, "needs two or more points"),
        ({64: ...}, False, "needs two or more points"),  # a blank
        ({64: {-4: 2.5, -6: 2.4}}, True, "swapped=False"),
    ],
)
def test_sketches_that_cannot_be_drawn(swept, sketch, swapped, message):
    with pytest.raises(ValueError, match=message):
        lr_curves(swept, sketch=sketch, swapped=swapped)


def test_stars_lie_on_their_curves(swept):
    for axes in lr_curves(swept).axes:
        curves = [line for line in axes.get_lines() if len(line.get_xdata()) > 2]
        stars = [line for line in axes.get_lines() if line.get_marker() == "*"]
        assert stars
        for star in stars:
            heights = [np.interp(np.log2(star.get_xdata()[0]), np.log2(c.get_xdata()), c.get_ydata()) for c in curves]
            assert min(abs(height - star.get_ydata()[0]) for height in heights) < 1e-9


def test_every_colour_can_be_seen_on_white():
    for colour in PALETTE:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert 1.05 / (luminance + 0.05) >= 3, colour


def test_drift_chart_has_a_row_for_each_table_and_hollow_points_without_an_error():
    report = pd.DataFrame(
        {"parametrization": ["a", "b", "c"], "per_doubling": [-0.5, 0.1, np.nan], "per_doubling_error": [0.1, np.nan, np.nan]}
    )
    (axes,) = drift_chart(report, "n_experts", {"none": 0.0, "paper": -0.25}).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    points = {line.get_xdata()[0]: line.get_markerfacecolor() for line in axes.lines if line.get_marker() == "o"}
    assert points == {-0.5: "#333333", 0.1: "white"}
    bars = sorted(tuple(line.get_xdata()) for line in axes.lines if list(line.get_ydata()) == [0, 0])
    assert bars[0] == pytest.approx((-0.7, -0.3))  # two errors
    assert [text.get_text() for text in axes.texts] == ["no optimum on the grid"]
    assert axes.get_xlabel() == "octaves of the best LR per doubling of n experts"
    with pytest.raises(ValueError, match="no rows"):
        drift_chart(report.head(0), "width")


def test_exponents_chart_draws_predictions_and_measurements_where_they_are(checked):
    table = exponents(checked[checked.parametrization == "early router"])
    predicted = predicted_exponents(Config(ROUTER_RULES["early router"]))
    init, update, allocation = exponents_chart(predictions(Config(ROUTER_RULES["early router"])), table).axes
    diamonds = [line.get_xdata()[0] for line in update.lines if line.get_marker() == "D"]
    assert sorted(diamonds) == sorted(e for (_, quantity), e in predicted.items() if quantity == "update")
    row = table[(table.tensor == "router") & (table.quantity == "update")].iloc[0]
    dots = [line for line in update.lines if line.get_marker() == "o" and line.get_xdata()[0] == row.measured]
    assert to_rgb(dots[0].get_color()) == to_rgb(ALERT)
    assert init.get_xlabel() == "exponent of the init in the width"
    assert allocation.get_xlabel() == "exponent of the allocation in the width"


def test_tensor_curves_show_each_quantity(checked):
    rows = checked[checked.parametrization == "mup"]
    figure = tensor_curves(rows, "router", layer=1, step=1)
    assert [axes.get_title().split("\n")[0] for axes in figure.axes] == ["init", "update", "allocation", "propagated", "change"]
    own = rows[(rows.tensor == "router") & (rows.layer == 1) & (rows.step == 1) & (rows.quantity == "update")]
    assert np.allclose(np.sort(figure.axes[1].lines[0].get_ydata()), np.sort(own.value))
    assert "exactly zero" in [text.get_text() for axes in tensor_curves(rows, "embedding").axes for text in axes.texts]
    with pytest.raises(ValueError, match="the tensor 'router' of layer -1"):
        tensor_curves(rows, "router")
    with pytest.raises(ValueError, match="needs one parametrization"):
        tensor_curves(checked, "router", layer=1)


def test_router_rules_put_checks_above_curves(checked, swept):
    figure = router_rules(checked, swept)
    assert len(figure.axes) == 4
    above, below = figure.axes[:2], figure.axes[2:]
    assert [axes.get_title().split("\n")[0] for axes in above] == ["mup", "early router"]
    assert to_rgb(above[1].title.get_color()) == to_rgb(ALERT)
    assert all(axes.get_xlabel() == "learning rate" for axes in below)
    with pytest.raises(ValueError, match="the check lacks early router"):
        router_rules(checked[checked.parametrization == "mup"], swept)


ODD = {"mup": "a$b", "early router": r"$\frac{$"}  # half a formula, and one that is none


@pytest.mark.parametrize(
    "picture", ["lr_curves", "swapped", "drift", "optima", "router", "coordinates", "tensor", "map", "shares"]
)
def test_a_name_with_a_dollar_sign_is_shown_as_it_is(picture, swept, checked):
    swept, checked = (f.assign(parametrization=f.parametrization.map(lambda name: ODD.get(name, name))) for f in (swept, checked))
    name = checked.parametrization.iloc[-1]
    figure = {
        "lr_curves": lambda: lr_curves(swept),
        "swapped": lambda: lr_curves(swept, swapped=True),
        "drift": lambda: drift_chart(summary(transfer_report(swept)), "width", {"$x{$": 0.5}),
        "optima": lambda: optima_curves(transfer_report(swept).assign(octave=-6.0, octave_error=0.1), "width", {"$x{$": -0.5}),
        "router": lambda: router_rules(checked, swept),
        "coordinates": lambda: coordinate_curves(checked),
        "tensor": lambda: tensor_curves(checked[checked.parametrization == name], "router", 0),
        "map": lambda: allocation_map(checked),
        "shares": lambda: learning_shares(books_called(name)),
    }[picture]()
    figure.draw_without_rendering()
    words = [text.get_text().replace(r"\$", "$") for text in figure.findobj(Text)]
    assert picture == "tensor" or any(name in text for text in words)


def books_called(name):
    rows = [(name, 32, seed, step, 0.01, role, 0.1, 0.2) for seed in (0, 1) for step in (1, 2) for role in ("router", "$y{$")]
    return pd.DataFrame(rows, columns=["parametrization", "width", "seed", "step", "lr", "role", "allocation", "fall"])


def test_laws_begin_at_the_mean_of_the_curves_or_at_one_of_them():
    cells = [("a", 32, -6.0), ("a", 64, -6.5), ("b", 32, -5.0), ("b", 64, -5.0)]
    report = pd.DataFrame(cells, columns=["parametrization", "width", "octave"]).assign(octave_error=0.1)
    for laws_from, begin in ((None, -5.5), ("b", -5.0)):
        figure = optima_curves(report, "width", {"law": -0.5}, laws_from=laws_from)
        (law,) = [line for line in figure.axes[0].lines if str(line.get_label()).startswith("law")]
        assert list(law.get_ydata()) == pytest.approx([begin, begin - 0.5])
    with pytest.raises(ValueError, match="laws_from='c': has no optimum at width 32"):
        optima_curves(report, "width", {"law": -0.5}, laws_from="c")
