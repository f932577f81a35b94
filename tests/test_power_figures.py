"""Pictures of powers of a size."""

import math

import pandas as pd
import pytest

from minimoe import power, power_curves


def rows(**exponents):
    """Tables whose value is exactly 3 * width^exponent, for two tensors; the second has half of it."""
    return pd.DataFrame(
        [
            {"parametrization": name, "width": width, "seed": seed, "tensor": tensor, "rms": share * 3 * width**exponent}
            for name, exponent in exponents.items()
            for tensor, share in (("up", 1), ("down", 0.5))
            for width in (16, 32, 128)
            for seed in (0, 1)
        ]
    )


def test_a_power_is_found_with_its_error():
    own = rows(a=-0.75).query("tensor == 'up'")
    assert power(own, "width", "rms") == pytest.approx((-0.75, 0))
    mean, error = power(own[own.seed == 0], "width", "rms")
    assert mean == pytest.approx(-0.75)
    assert math.isnan(error)
    steeper = own.assign(rms=own.rms * own.width ** (0.2 * own.seed))
    assert power(steeper, "width", "rms") == pytest.approx((-0.65, 0.1))


def test_what_is_not_finite_or_not_positive_is_left_out():
    own = rows(a=-0.5).query("tensor == 'up'")
    broken = pd.concat([own, own.iloc[:2].assign(width=64, rms=[math.inf, 0.0])])
    assert power(broken, "width", "rms") == pytest.approx((-0.5, 0))


def test_one_size_has_no_exponent():
    own = rows(a=-0.5).query("tensor == 'up'")
    assert all(math.isnan(number) for number in power(own[own.width == 16], "width", "rms"))
    assert all(math.isnan(number) for number in power(own.assign(rms=math.inf), "width", "rms"))
    short = own[(own.seed == 0) | (own.width == 16)]  # the second seed has one size, and does not count
    assert power(short, "width", "rms")[0] == pytest.approx(-0.5)


def test_each_panel_has_a_curve_for_each_table_and_its_exponent():
    figure = power_curves(rows(a=-1, b=0), "width", "rms", "width", "RMS", panel="tensor", base=2)
    assert [axes.get_title() for axes in figure.axes] == ["up", "down"]
    for axes in figure.axes:
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert labels == ["a: width^-1.00 ± 0.00", "b: width^+0.00 ± 0.00"]
    tops = [max(line.get_ydata().max() for line in axes.lines) for axes in figure.axes]
    assert tops == [3, 1.5]
    assert {axes.get_xscale() for axes in figure.axes} == {axes.get_yscale() for axes in figure.axes} == {"log"}
    figure.draw_without_rendering()
    assert "$2^{0}$" in [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    with pytest.raises(ValueError, match="has no rows"):
        power_curves(rows(a=-1).iloc[:0], "width", "rms", "width", "RMS")
    with pytest.raises(ValueError, match=r"frame=\['rms'\]: these columns are missing"):
        power_curves(rows(a=-1).drop(columns="rms"), "width", "rms", "width", "RMS")


def test_a_table_that_a_panel_lacks_is_not_in_its_legend():
    both = rows(a=-1, b=0)
    figure = power_curves(both[(both.tensor == "up") | (both.parametrization == "a")], "width", "rms", "width", "RMS", "tensor")
    assert [len(axes.get_legend().get_texts()) for axes in figure.axes] == [2, 1]


def test_bars_are_one_standard_error():
    own = rows(a=-1).query("tensor == 'up'")
    axes = power_curves(own.assign(rms=own.rms * (1 + 0.1 * own.seed)), "width", "rms", "width", "RMS").axes[0]
    (bars,) = axes.containers[0].lines[2]
    low, high = bars.get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(3 / 16 * 0.1 / 2)  # two values 0.1 apart: half of that
