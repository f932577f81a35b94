"""The law of exponents, by hand, and that nobody else writes it or lists a model's names."""

import ast
from pathlib import Path

import pytest

from minimoe import PARAMETRIZATIONS, Config, fan_in, predicted_exponents, width
from minimoe.parametrization import depth
from minimoe.probe import sites
from minimoe.theory import Growth, as_wanted, exponents_between, kinds, law, predictions, wanted

MUP = PARAMETRIZATIONS["mup"]
PACKAGE = Path(__file__).parent.parent / "minimoe"


def test_the_law_by_hand():
    hidden = law(multiplier=0, std=-0.5, lr=-1, fan_in=1, outputs=1, signal=-1)  # under muP
    assert hidden == Growth(init=0, update=0, allocation=0)
    output = law(multiplier=-1, std=0, lr=0, fan_in=1, signal=0)
    assert output == Growth(init=-0.5, update=0, allocation=0)
    assert as_wanted("hidden", hidden)
    assert not as_wanted("hidden", hidden._replace(allocation=0.5))
    assert as_wanted("output", output._replace(allocation=-0.5))  # a router at init
    assert not as_wanted("output", output._replace(allocation=0.5))
    assert as_wanted("hidden", hidden._replace(allocation=-0.5), head=-1)  # behind a head that starts small
    assert not as_wanted("hidden", hidden._replace(allocation=-0.5), head=0)
    assert as_wanted("output", Growth(-0.5, 0))
    assert not as_wanted("hidden", Growth(-0.5, 0))
    assert not as_wanted("output", Growth(0, 1))
    assert wanted("output", "init")[1] == 0


def test_kinds_of_our_model():
    found = kinds(Config())
    assert found["tokens"] == found["positions"] == "input"
    assert found["unembedding"] == found["blocks.1.moe.router"] == "output"
    assert {kind for name, kind in found.items() if "attention" in name or name.endswith(("up", "down"))} == {"hidden"}


@pytest.mark.parametrize("room", ["theory", "coordinates", "verdicts", "diagnoses", "coordinate_figures"])
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
    assert known == predicted_exponents(config)
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
        assert predicted(table, gates="renormalized")["moe", "init"] == 0
    grown = MUP.replace("experts_up", init_var=1)  # the hidden values grow, and the down projection inherits that
    assert predicted(grown)["down", "init"] == predicted(grown)["down", "update"] == 0.5
    assert predicted(grown, activation="swiglu")["down", "init"] == 1  # a product of two
    by_width = MUP.replace("embedding", lr=1 / width)
    assert predicted(by_width)["embedding", "update"] == -1


BIG_HEAD = MUP.replace("unembedding", "big head", init_var=fan_in)
LAW = {  # of the reference: input, hidden, output, router at init, router once experts have learned
    "mup": (0, 0, 0, -0.5, 0),
    "simplep": (0, 0, 0, 0.5, 1),
    "sp": (0.5, 1.5, 1, 1, 2),
    "big head": (0.5, 0.5, 0, 0, 0.5),
}


@pytest.mark.parametrize("name", LAW)
def test_allocations_by_hand(name):
    table = BIG_HEAD if name == "big head" else name
    found, learned = (predicted_exponents(Config(table), learned=learned) for learned in (False, True))
    wanted_of_input, of_hidden, of_output, at_init, once_learned = LAW[name]
    assert found["embedding", "allocation"] == wanted_of_input
    assert {found[tensor, "allocation"] for tensor in ("q", "k", "v", "o", "up", "down")} == {of_hidden}
    assert found["logits", "allocation"] == of_output
    assert found["router", "allocation"] == at_init
    if name != "sp":  # whose experts' updates grow by themselves, faster than the law for constant ones
        assert learned["router", "allocation"] == once_learned
    assert learned["v", "allocation"] == found["v", "allocation"]


def test_the_gradient_passes_through_initial_weights():
    """A down projection that starts too small hides the up projection from the loss."""
    small = MUP.replace("experts_down", init_var=1 / fan_in**2)
    found = predicted_exponents(Config(small))
    assert (found["up", "allocation"], found["down", "allocation"]) == (-0.5, 0)
    small = MUP.replace("attention_out", init_var=1 / fan_in**2)
    found = predicted_exponents(Config(small))
    assert {found[tensor, "allocation"] for tensor in "qkv"} == {-0.5}
    assert found["o", "allocation"] == 0


def test_over_the_depth_by_hand():
    """muP with a branch multiplier of L^-alpha: one half needs a smaller LR too, and one does not (CompleteP)."""

    def scaled(alpha, lr=0.0, router=0.0):
        table = MUP
        for role in ("attention_out", "experts_down"):
            table = table.replace(role, multiplier=1 / depth**alpha)
        for role in ("attention", "attention_out", "experts_up", "experts_down"):
            table = table.replace(role, lr=1 / fan_in / depth**lr)
        return predicted_exponents(Config(table.replace("router", lr=1 / depth**router), base_depth=2), "depth")

    without = scaled(0)
    assert without["residual", "init"] == 0.5  # independent branches add up
    assert ("v", "allocation") not in without
    half, right, one = scaled(0.5, 0.5), scaled(0.5, 0.5, 0.5), scaled(1)
    assert half["residual", "init"] == one["residual", "init"] == 0
    inside = ("q", "k", "v", "o", "up", "down")
    for found in (half, right, one):  # of one layer: L of them make a constant
        assert {found[tensor, "allocation"] for tensor in inside} == {-1}
        assert found["embedding", "allocation"] == found["logits", "allocation"] == 0
    assert (half["router", "allocation"], right["router", "allocation"], one["router", "allocation"]) == (-0.5, -1, -1)


def test_over_granularity_the_outer_weights_learn_as_before_and_the_inner_ones_less():
    by_width = {"base_width": 16, "base_granularity": 1}
    found = predicted_exponents(Config("simplep", **by_width), "granularity")
    assert (found["moe", "init"], found["up", "allocation"], found["down", "allocation"]) == (-0.5, -0.5, 0)
    assert ("router", "allocation") not in found


def test_sizes_that_grow_together_follow_one_law():
    one = MUP.replace("attention_out", multiplier=1 / depth).replace("experts_down", multiplier=1 / depth)
    small = Config(one, width=64, depth=2, base_depth=2)
    large = Config(one, width=256, depth=8, base_depth=2)
    found = exponents_between(small, large, "width")
    assert found["v", "allocation"] == -1
    assert found["router", "init"] == -0.5
    quarter = exponents_between(small, Config(one, width=64 * 16, depth=4, base_depth=2), "width")
    assert quarter["v", "allocation"] == -0.25  # the depth goes like the width's fourth root
    assert exponents_between(small, Config(one, width=128, n_experts=16, base_depth=2), "width") == {}
    balanced = Config(one, width=256, depth=8, base_depth=2, balance_weight=1.0)
    assert exponents_between(small, balanced, "width") == found


def test_other_axes_have_no_theory():
    with pytest.raises(ValueError, match="axis='top_k': must be one of width, depth, granularity, expert_ratio, n_experts"):
        predicted_exponents(Config(), "top_k")
