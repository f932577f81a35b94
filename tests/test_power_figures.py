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


def test_each_panel_has_a_curve_for_each_table_and_its_exponent():
    figure = power_curves(rows(a=-1, b=0), "width", "rms", "width", "RMS", panel="tensor", base=2)
    assert [axes.get_title() for axes in figure.axes] == ["up", "down"]
    for axes in figure.axes:
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert labels == ["a: width^-1.00 ± 0.00", "b: width^+0.00 ± 0.00"]
    tops = [max(line.get_ydata().max() for line in axes.lines) for axes in figure.axes]
    assert tops == [3, 1.5]
    with pytest.raises(ValueError, match="has no rows"):
        power_curves(pd.DataFrame(), "width", "rms", "width", "RMS")
