"""Pictures of the LRs of single roles."""

import math

import pandas as pd
import pytest

from minimoe import RELATIVE_RATES, TrainOptions, factor_curves, gain_chart, relative_rates, schedule_curves
from minimoe.arms import embedding_times


def test_schedules_end_where_the_factors_say():
    tables = ["mup", *(relative_rates("mup", RELATIVE_RATES["moe"], end, end) for end in ("own", "base"))]
    figure = schedule_curves(tables, steps=100, options=TrainOptions(final_lr=0.2))
    assert [axes.get_title() for axes in figure.axes] == ["mup", "own", "base"]
    ends = [{line.get_label(): line.get_ydata()[-1] for line in axes.lines if len(line.get_xdata()) > 1} for axes in figure.axes]
    assert set(ends[0].values()) == {0.2}
    assert ends[1]["experts"] == pytest.approx(0.2 * 0.3 * 1.125)
    assert ends[2]["experts"] == pytest.approx(0.2 * 1.125)
    with pytest.raises(ValueError, match="must be one table or more"):
        schedule_curves([])


def gains(**found):
    return pd.DataFrame([{"parametrization": name, "gain": gain, "gain_error": 0.01} for name, gain in found.items()])


def test_gains_are_points_on_the_side_of_their_sign():
    figure = gain_chart({"400 steps": gains(base=0.0, up=0.1, down=-0.2), "800 steps": gains(base=0.0, up=0.05)}, "base")
    points = [(float(line.get_xdata()[0]), round(float(line.get_ydata()[0]))) for line in figure.axes[0].lines[:-1]]
    assert {(0.1, 0), (-0.2, 1), (0.05, 0)} <= set(points)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["up", "down"]
    later = gain_chart({"400 steps": gains(base=0.0, up=0.1), "800 steps": gains(base=0.0, down=-0.2)}, "base")
    assert [label.get_text() for label in later.axes[0].get_yticklabels()] == ["up", "down"]
    with pytest.raises(ValueError, match="has no arm but 'base'"):
        gain_chart({"400 steps": gains(base=0.0)}, "base")
    with pytest.raises(ValueError, match=r"found\['400 steps'\]=\['gain_error'\]: these columns are missing"):
        gain_chart({"400 steps": gains(base=0.0, up=0.1).drop(columns="gain_error")}, "base")
    with pytest.raises(ValueError, match="reference='sp': '400 steps' has no such row"):
        gain_chart({"400 steps": gains(base=0.0)}, "sp")
    with pytest.raises(ValueError, match="must be name -> frame"):
        gain_chart({}, "sp")


def test_a_u_has_its_star_at_the_lowest_mean():
    rows = pd.DataFrame(
        [
            {"factor": 2.0**octave, "seed": seed, "role": role, "width": 32, "val_loss": (octave - best) ** 2 + seed}
            for octave in range(-3, 4)
            for seed in (0, 1)
            for role, best in (("router", 1), ("embedding", 2))
        ]
    )
    figure = factor_curves(rows, panel="role", curve="width")
    stars = [line.get_xdata()[0] for axes in figure.axes for line in axes.lines if line.get_marker() == "*"]
    assert stars == [1, 2]
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["1/8", "1/4", "1/2", "1", "2", "4", "8"]
    (bars,) = figure.axes[0].containers[0].lines[2]
    low, high = bars.get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(0.5)  # two seeds 1 apart: one standard error
    diverged = factor_curves(rows.assign(val_loss=rows.val_loss.where(rows.factor < 4, math.inf)), "role", "width")
    stars = [line.get_xdata()[0] for axes in diverged.axes for line in axes.lines if line.get_marker() == "*"]
    assert stars == [1, 1]
    with pytest.raises(ValueError, match=r"rows=\['factor'\]: these columns are missing"):
        factor_curves(rows.drop(columns="factor"), "role", "width")
    with pytest.raises(ValueError, match="has no rows"):
        factor_curves(rows.iloc[:0], "role", "width")
    with pytest.raises(ValueError, match=r"rows=0\.0: a factor must be above 0"):
        factor_curves(rows.assign(factor=0.0), "role", "width")


def test_thick_bars_are_one_standard_error_and_thin_ones_two():
    lines = gain_chart({"400 steps": gains(base=0.0, up=0.1)}, "base").axes[0].lines[:2]
    assert [line.get_xdata() for line in lines] == [pytest.approx([0.09, 0.11]), pytest.approx([0.08, 0.12])]
    assert lines[0].get_linewidth() > lines[1].get_linewidth()


def test_no_curve_of_a_schedule_is_cut():
    axes = schedule_curves([embedding_times("mup", 64)], ("embedding",), 100).axes[0]
    low, high = axes.get_ylim()
    assert low < 6.4 < 64 < high
    warm = axes.lines[0].get_ydata()
    assert warm.argmax() == 9  # the warm-up is a tenth of the steps
    assert warm[0] < warm[5] < warm[9] == 64
    with pytest.raises(ValueError, match="tables='mup': must be one table or more"):
        schedule_curves("mup")


def test_a_factor_that_one_curve_lacks_is_no_error():
    rows = pd.DataFrame(
        {"factor": [1, 2, 4], "seed": 0, "role": ["a", "a", "b"], "width": [32, 64, 32], "val_loss": [1.0, 2.0, 3.0]}
    )
    figure = factor_curves(rows, "role", "width")
    assert [len(axes.containers) for axes in figure.axes] == [2, 1]
