"""Pictures that set tables or models beside one another, drawn from the shipped data."""

import pandas as pd
import pytest

from minimoe import overlay_curves, shipped, three_terms, verdict_map


@pytest.fixture
def terms():
    values = pd.read_csv(shipped("regimes_values.csv"))
    return values[(values.tensor == "moe") & (values.layer == 0)]


def test_three_terms_show_the_slopes_of_the_check(terms):
    figure = three_terms(terms, [["mup II", "mup III"], ["mssp II", "mssp III"]], "width")
    assert [axes.get_title() for axes in figure.axes] == ["mup II", "mup III", "mssp II", "mssp III"]
    judged = (
        pd.read_csv(shipped("regimes.csv")).query("layer == 0 and tensor == 'moe'").set_index(["parametrization", "quantity"])
    )
    for axes in figure.axes:
        said = [float(text.get_text().split()[-1]) for text in axes.get_legend().get_texts()]
        of_check = [judged.measured[axes.get_title(), quantity] for quantity in ("init", "update", "propagated")]
        assert said == pytest.approx(of_check, abs=0.03)  # of means over the seeds, and of all points
    with pytest.raises(ValueError, match="grid='mup IV': the values have no rows of this table"):
        three_terms(terms, [["mup IV"]])


def test_a_verdict_map_colours_what_is_condemned():
    judged = pd.read_csv(shipped("regimes.csv"))
    judged = judged[judged.layer.isin([0, -1])]
    columns = ["mup II", "mssp II", "mup III"]
    axes = verdict_map(judged, columns).axes[0]
    said = [text.get_text() for text in axes.texts if text.get_text() != "·"]
    assert [text.rsplit(" ", 1)[0] for text in said] == ["allocation", "init", "init"]
    assert len(axes.patches) == 3
    assert [label.get_text() for label in axes.get_xticklabels()] == columns
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names.index("up") < names.index("down") < names.index("moe") < names.index("logits")  # as the forward pass has them
    with pytest.raises(ValueError, match="columns='sp': there are no rows of this table"):
        verdict_map(judged, ["sp"])


def test_an_overlay_shows_the_gaps_to_the_reference():
    frame = pd.DataFrame(
        [
            {"variant": name, "seed": seed, "step": step, "loss": 3.0 - step / 100 + seed + gap}
            for name, gap in (("dense", 0.0), ("near", 0.01), ("far", 0.5))
            for seed in (0, 1)
            for step in range(20)
        ]
    )
    figure = overlay_curves(frame, {"good": ["near"], "bad": ["far"]})
    assert [axes.get_title() for axes in figure.axes] == ["good", "bad"]
    for axes, gap in zip(figure.axes, (0.01, 0.5), strict=True):
        assert axes.lines[0].get_ydata() == pytest.approx([gap] * 20)
    with pytest.raises(ValueError, match="panels='x': the frame has no rows of this variant"):
        overlay_curves(frame, {"good": ["x"]})
