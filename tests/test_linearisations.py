"""The distance of a block from its linearisation: by hand, its powers of the depth, and its picture."""

import math

import pandas as pd
import pytest
import torch
from torch import nn

from minimoe import PARAMETRIZATIONS, Parametrization, Rule, linearisation, linearisation_curves, power
from minimoe.linearisations import distance


class Bilinear(nn.Module):
    """h W1 W2: quadratic in its weights, so that all but one term is known."""

    def __init__(self):
        super().__init__()
        self.one, self.two = (nn.Parameter(torch.randn(4, 4, dtype=torch.float64)) for _ in range(2))

    def forward(self, h):
        return h @ self.one @ self.two


def test_the_rest_of_a_bilinear_block_is_the_product_of_its_steps():
    block, h = Bilinear(), torch.randn(5, 4, dtype=torch.float64)
    before = {name: weight.detach().clone() for name, weight in block.named_parameters()}
    steps = {name: 0.1 * torch.randn_like(weight) for name, weight in before.items()}
    with torch.no_grad():
        for name, weight in block.named_parameters():
            weight += steps[name]
    rest = h @ steps["one"] @ steps["two"]
    linear = h @ steps["one"] @ before["two"] + h @ before["one"] @ steps["two"]
    torch.testing.assert_close(distance(block, before, h), rest.norm() / linear.norm())


def test_its_powers_of_the_depth_have_the_published_order():
    """0 under CompleteP and -1/2 under depth-mup, as theory says; without a rule it grows."""
    frame = linearisation(depths=(2, 8, 32), seeds=(0, 1), width=16)
    slopes = {name: power(own, "depth", "distance")[0] for name, own in frame.groupby("parametrization")}
    assert slopes["completep"] == pytest.approx(0, abs=0.1)
    assert slopes["depth-mup"] == pytest.approx(-0.5, abs=0.1)
    assert slopes["mup"] > 0.1
    at_base = frame[frame.depth == 2].groupby("seed").distance
    assert (at_base.max() == at_base.min()).all()  # at the base depth all tables are one network


def test_a_network_that_overflows_has_no_distance():
    loud = Parametrization("loud", dict(PARAMETRIZATIONS["mup"].rules) | {"residual": Rule(multiplier=1e40)})
    frame = linearisation([loud], depths=(2, 16), seeds=(0,), width=16)
    assert math.isnan(frame.distance.iloc[-1])


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"depths": ()}, "depths"),
        ({"depths": (0, 2)}, "depths"),
        ({"width": 0}, "width"),
        ({"seeds": ()}, "seeds"),
        ({"lr": 0}, "lr"),
    ],
)
def test_bad_input_is_refused(bad, said):
    with pytest.raises(ValueError, match=said):
        linearisation(**{"tables": ["mup"]} | bad)


def test_the_picture_has_a_curve_and_a_slope_for_each_table():
    rows = [
        (name, depth, seed, 0.1 * depth**power) for name, power in (("a", 0), ("b", -0.5)) for depth in (2, 8) for seed in (0, 1)
    ]
    figure = linearisation_curves(pd.DataFrame(rows, columns=["parametrization", "depth", "seed", "distance"]))
    (axes,) = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a: depth^+0.00 ± 0.00", "b: depth^-0.50 ± 0.00"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("number of residual blocks", "distance from the linearisation")
    with pytest.raises(ValueError, match="has no rows"):
        linearisation_curves(pd.DataFrame())
