"""The law of exponents, by hand, and that nobody else writes it or lists a model's names."""

import ast
from pathlib import Path

import pytest

from minimoe import PARAMETRIZATIONS, Config, predicted_exponents, width
from minimoe.probe import sites
from minimoe.theory import Growth, as_wanted, kinds, law, predictions, wanted

MUP = PARAMETRIZATIONS["mup"]
PACKAGE = Path(__file__).parent.parent / "minimoe"


def test_the_law_by_hand():
    assert law(multiplier=0, std=-0.5, lr=-1, fan_in=1) == Growth(init=0, update=0)  # a hidden weight under muP
    assert law(multiplier=-1, std=0, lr=0, fan_in=1) == Growth(init=-0.5, update=0)  # an output weight
    assert as_wanted("output", Growth(-0.5, 0))
    assert not as_wanted("hidden", Growth(-0.5, 0))
    assert not as_wanted("output", Growth(0, 1))
    assert wanted("output", "init")[1] == 0


def test_kinds_of_our_model():
    found = kinds(Config())
    assert found["tokens"] == found["positions"] == "input"
    assert found["unembedding"] == found["blocks.1.moe.router"] == "output"
    assert {kind for name, kind in found.items() if "attention" in name or name.endswith(("up", "down"))} == {"hidden"}


@pytest.mark.parametrize("room", ["theory", "coordinates", "verdicts", "coordinate_figures"])
def test_no_room_after_the_probe_lists_names_of_the_model(room):
    """What is read of a site is in its frame: a text equal to a site's name would be a list of them."""
    names = {site.name for site in sites(Config(depth=1))}
    names -= {"router", "o"}  # a role, too, whose row router_rules draws; a marker
    tree = ast.parse((PACKAGE / f"{room}.py").read_text())
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not names & texts


def test_predictions_are_the_exponents_as_a_frame():
    config = Config("simplep")
    frame = predictions(config)
    known = frame.dropna().set_index(["tensor", "quantity"]).predicted.to_dict()
    assert known == {key: value for key, value in predicted_exponents(config).items() if key[1] in ("init", "update")}
    assert frame.tensor.drop_duplicates().tolist() == [site.name for site in sites(Config(depth=1))]


def test_predictions_of_the_built_in_tables_by_hand():
    def predicted(table, **fields):
        return predicted_exponents(Config(table, **fields))

    hidden = ("q", "k", "v", "o", "up", "down")
    for table, update, router, logits in (
        ("sp", 1, (0, 1), (0, 1)),
        ("simplep", 0, (0, 1), (-0.5, 0)),
        ("mup", 0, (-0.5, 0), (-0.5, 0)),
    ):
        found = predicted(table)
        assert {found[tensor, "init"] for tensor in hidden} == {0}
        assert {found[tensor, "update"] for tensor in hidden} == {update}
        assert (found["router", "init"], found["router", "update"]) == router
        assert (found["logits", "init"], found["logits", "update"]) == logits
        assert (found["embedding", "init"], found["embedding", "update"]) == (0, 0)
        assert found["scores", "init"] == found["residual", "init"] == 0
        assert found.get(("moe", "init")) == (None if table == "mup" else 0)  # raw gates that flatten: no power law yet
        assert predicted(table, renormalize=True)["moe", "init"] == 0
    grown = MUP.replace("experts_up", init_var=1)  # the hidden values grow, and the down projection inherits that
    assert predicted(grown)["down", "init"] == predicted(grown)["down", "update"] == 0.5
    assert predicted(grown, activation="swiglu")["down", "init"] == 1  # a product of two
    by_width = MUP.replace("embedding", lr=1 / width)
    assert predicted(by_width)["embedding", "update"] == -1


def test_other_axes_have_no_theory_yet():
    with pytest.raises(ValueError, match="axis='depth': must be one of width, granularity"):
        predicted_exponents(Config(), "depth")
