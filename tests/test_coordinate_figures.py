"""Pictures of coordinate checks: what is drawn is what the frame says."""

import pytest

from minimoe import coordinate_check, coordinate_curves, exponents
from minimoe.coordinate_figures import in_forward_order
from minimoe.coordinates import LOSS
from minimoe.theory import Growth

TINY = {"widths": (32, 64), "steps": 2, "seeds": (0,), "n_jobs": 1, "context": 16, "n_experts": 4}


def test_figure_shows_every_tensor_and_colours_what_is_broken(corpus):
    frame = coordinate_check(["mup", "sp"], corpus=corpus, **TINY)
    table = exponents(frame)
    figure = coordinate_curves(frame)
    for part, name in zip(figure.subfigs, ("mup", "sp"), strict=True):
        assert name in part.get_suptitle()
        titles = {axes.get_title().split("\n")[0].split(",")[0]: axes for axes in part.axes}
        assert list(titles) == in_forward_order(table[table.tensor != LOSS])
        own = table[table.parametrization == name]
        for tensor, axes in titles.items():
            shown = own[(own.tensor == tensor) & own.quantity.isin(Growth._fields)]
            broken = shown.verdict.isin(("explodes", "shrinks")).any()
            assert (axes.title.get_color() == "#c1121f") == broken
            assert axes.get_ylim() == part.axes[0].get_ylim()  # flat is seen to be flat
    coordinate_curves(frame[frame.parametrization == "sp"], layer=1)
    with pytest.raises(ValueError, match="layer=7"):
        coordinate_curves(frame, layer=7)
