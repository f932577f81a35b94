"""The tables, against the paper's written out by hand, and the three functions that put them to work."""

import copy
import json
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minimoe import (
    PARAMETRIZATIONS,
    Config,
    MiniMoE,
    Parametrization,
    Rule,
    fan_in,
    initialise,
    param_groups,
    parameter,
    shift,
    width,
)
from minimoe.parametrization import named_roles

# arXiv 2508.09752, table of parametrizations, at 4 times the base width: (init std / base std, multiplier, Adam LR).
# The init std is the root of the tabled variance: 1/fan_in is 1/4, so half the std.
PAPER_AT_4X = {
    "sp": {
        "embedding": (1, 1, 1),
        "unembedding": (1 / 2, 1, 1),
        "attention": (1 / 2, 1, 1),
        "experts_up": (1 / 2, 1, 1),
        "experts_down": (1 / 2, 1, 1),
        "router": (1 / 2, 1, 1),
    },
    "simplep": {
        "embedding": (1, 1, 1),
        "unembedding": (1, 1 / 4, 1),
        "attention": (1 / 2, 1, 1 / 4),
        "experts_up": (1 / 2, 1, 1 / 4),
        "experts_down": (1 / 2, 1, 1 / 4),
        "router": (1 / 2, 1, 1),
    },
    "mup": {
        "embedding": (1, 1, 1),
        "unembedding": (1, 1 / 4, 1),
        "attention": (1 / 2, 1, 1 / 4),
        "experts_up": (1 / 2, 1, 1 / 4),
        "experts_down": (1 / 2, 1, 1 / 4),
        "router": (1, 1 / 4, 1),
    },
}
BASE_STD = {  # at width 32, expert hidden size 64: 1 / sqrt(fan_in) for matrices, 1 for tokens, 0.5 for positions
    "tokens": 1.0,
    "positions": 0.5,
    "unembedding": 32**-0.5,
    "q": 32**-0.5,
    "k": 32**-0.5,
    "v": 32**-0.5,
    "o": 32**-0.5,
    "router": 32**-0.5,
    "up": 32**-0.5,
    "down": 64**-0.5,
}


@pytest.mark.parametrize("name", PAPER_AT_4X)
def test_every_tensor_at_four_times_the_base_width_is_as_the_paper_tables_it(name):
    model = MiniMoE(Config(parametrization=name, width=128, depth=1))
    lrs = {id(p): group["lr"] for group in model.param_groups(lr=0.01) for p in group["params"]}
    buffers = dict(model.named_buffers())
    seen = set()
    for path, param in model.named_parameters():
        leaf = path.rpartition(".")[2]
        std, multiplier, lr = PAPER_AT_4X[name][param.role.name]
        expected = BASE_STD[leaf] * std
        assert param.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * param.numel())), path  # 5 sigma
        assert buffers[f"{path}_multiplier"].item() == multiplier, path
        assert lrs[id(param)] == pytest.approx(0.01 * lr, rel=1e-12), path
        seen.add(param.role.name)
    assert seen == set(PAPER_AT_4X[name])


def test_at_the_base_shape_all_parametrizations_are_one_run_bit_for_bit():
    tokens = torch.randint(96, (4, 33), generator=torch.Generator().manual_seed(1))
    after = []
    for name in PARAMETRIZATIONS:
        model = MiniMoE(Config(parametrization=name, width=32))
        optimizer = torch.optim.AdamW(model.param_groups(lr=0.01, weight_decay=0.1))
        losses = []
        for _ in range(3):
            out = model(tokens[:, :-1])
            loss = nn.functional.cross_entropy(out.logits.flatten(0, 1), tokens[:, 1:].flatten()) + out.balance_loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        after.append([*losses, *model.state_dict().values()])
    for other in after[1:]:
        assert all(torch.equal(a, b) for a, b in zip(after[0], other, strict=True))


def test_away_from_the_base_shape_they_differ():
    models = [MiniMoE(Config(parametrization=name, width=64)) for name in PARAMETRIZATIONS]
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    outputs = [model(tokens).logits for model in models]
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(models[1].blocks[0].moe.router, models[2].blocks[0].moe.router)


@given(
    powers=st.dictionaries(st.sampled_from(["fan_in", "width", "depth"]), st.integers(-3, 3)),
    coefficient=st.floats(0.1, 10),
    ratios=st.fixed_dictionaries({name: st.floats(0.25, 8) for name in ("fan_in", "width", "depth")}),
)
def test_monomials_are_arithmetic(powers, coefficient, ratios):
    from minimoe.parametrization import ratio

    cell, expected = coefficient * ratio("width") ** 0, coefficient
    for name, power in powers.items():
        cell = cell * ratio(name) ** power
        expected *= ratios[name] ** power
    assert cell(ratios) == pytest.approx(expected)
    assert (1 / cell)(ratios) == pytest.approx(1 / expected)
    assert (cell * cell)(ratios) == pytest.approx((cell**2)(ratios))


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (1 / fan_in, "1/fan_in"),
        (fan_in, "fan_in"),
        (2 / fan_in**0.5, "2/fan_in^0.5"),
        (1 / (fan_in * width), "1/(fan_in*width)"),
        (width / fan_in, "width/fan_in"),
        (fan_in / fan_in, "1"),
    ],
)
def test_monomials_print_as_they_are_written(cell, text):
    assert str(cell) == text


def test_editing_one_cell_is_one_expression_that_names_itself():
    table = PARAMETRIZATIONS["simplep"]
    edited = table.replace("router", lr=1 / fan_in)
    assert edited.name == "simplep[router.lr=1/fan_in]"
    assert edited["router"] == Rule(init_var=1 / fan_in, lr=1 / fan_in)
    assert all(edited[role] == table[role] for role in table.roles if role != "router")
    twice = edited.replace("router", multiplier=1 / width)
    assert twice.name == "simplep[router.lr=1/fan_in,router.multiplier=1/width]"
    assert twice.replace("router", lr=2).name == "simplep[router.lr=2,router.multiplier=1/width]"
    assert table.replace("router", lr=1 / 3).name != table.replace("router", lr=0.333333).name
    assert MiniMoE(Config(parametrization=edited, width=64)).config.parametrization == edited


def test_the_printed_table_joins_the_experts_columns_where_they_agree():
    table = PARAMETRIZATIONS["mup"]
    assert str(table).splitlines()[1].split() == ["embedding", "unembedding", "attention", "experts", "router"]
    assert "1/fan_in" in str(table)
    split = str(table.replace("experts_down", lr=1))
    assert "experts_up" in split
    assert "experts_down" in split


def test_tables_travel_by_value():
    edited = PARAMETRIZATIONS["mup"].replace("router", lr=3 * width**-0.5)
    assert pickle.loads(pickle.dumps(edited)) == edited
    assert Parametrization.from_dict(json.loads(json.dumps(edited.to_dict()))) == edited


def test_bad_tables_are_refused():
    table = PARAMETRIZATIONS["mup"]
    with pytest.raises(KeyError, match="no role 'routers'; it has embedding"):
        table.replace("routers", lr=1)
    with pytest.raises(TypeError, match="learning_rate"):
        table.replace("router", learning_rate=1)
    with pytest.raises(TypeError, match="a cell is a number or a monomial"):
        Rule(lr="1/fan_in")
    with pytest.raises(ValueError, match="finite and not negative"):
        Rule(lr=-1)
    with pytest.raises(TypeError, match="needs a Rule"):
        Parametrization("mine", {"router": 1})
    with pytest.raises(ValueError, match="unknown parametrization 'mupp'; known: sp, simplep, mup"):
        Config(parametrization="mupp")
    with pytest.raises(ValueError, match="two different tables are called 'mup'"):
        Config(parametrization=table.replace("router", name="mup", lr=1 / fan_in))


class ForeignMLP(nn.Module):
    """A user's own model, with roles and a table of their own."""

    def __init__(self, n, base, hidden_role="hidden"):
        super().__init__()
        self.first = parameter("input", (8, n), base_shape=(8, base))
        self.hidden = parameter(hidden_role, (n, n), base_shape=(base, base), ratios={"width": n / base})
        self.inner = nn.Module()
        self.inner.last = parameter("output", (n, 3), base_shape=(base, 3))
        self.bias = parameter("input", (n,), base_std=0.0)


MINE = Parametrization(
    "mine",
    {
        "input": Rule(),
        "hidden": Rule(init_var=1 / fan_in, lr=1 / width),
        "output": Rule(multiplier=1 / fan_in, eps=1 / fan_in, weight_decay=fan_in),
    },
)


def test_the_rules_work_on_a_foreign_module():
    module = initialise(ForeignMLP(256, 64), MINE, seed=3)
    assert module.first.std().item() == pytest.approx(8**-0.5, rel=0.1)
    assert module.hidden.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert module.inner.last.std().item() == pytest.approx(64**-0.5, rel=0.15)
    assert module.bias.abs().max() == 0
    assert module.inner.last_multiplier == 0.25
    assert module.hidden_multiplier.shape == ()
    groups = {group["role"]: group for group in param_groups(module, MINE, lr=0.1, weight_decay=0.01)}
    assert len(groups) == 3
    assert len(groups["input"]["params"]) == 2
    assert groups["hidden"]["lr"] == pytest.approx(0.025)
    assert groups["output"]["lr"] == pytest.approx(0.1)
    assert groups["output"]["eps"] == pytest.approx(0.25e-8)
    assert groups["output"]["weight_decay"] == pytest.approx(0.04)
    torch.optim.AdamW(groups.values())


def test_the_same_seed_draws_the_same_numbers():
    one, two, other = (initialise(ForeignMLP(64, 64), MINE, seed) for seed in (1, 1, 2))
    assert torch.equal(one.hidden, two.hidden)
    assert not torch.equal(one.hidden, other.hidden)


def test_a_parameter_without_a_role_is_an_error_everywhere():
    module = ForeignMLP(64, 64)
    module.extra = nn.Linear(2, 2)
    for use in (
        lambda: initialise(module, MINE),
        lambda: param_groups(module, MINE, 0.1),
        lambda: list(named_roles(module)),
    ):
        with pytest.raises(TypeError, match=r"'extra.weight' of ForeignMLP has no role"):
            use()


def test_a_role_or_ratio_that_is_missing_is_an_error():
    with pytest.raises(KeyError, match="no role 'hiddden'"):
        initialise(ForeignMLP(64, 64, hidden_role="hiddden"), MINE)
    with pytest.raises(KeyError, match="needs the ratio 'width'; this parameter knows"):
        param_groups(ForeignMLP(64, 64), MINE.replace("output", lr=1 / width), 0.1)
    with pytest.raises(ValueError, match="has no fan_in; give its base_std"):
        parameter("input", (8,))
    with pytest.raises(ValueError, match="differ in their number of axes"):
        parameter("input", (8, 8), base_shape=(8,))
    with pytest.raises(ValueError, match="sizes must be positive"):
        parameter("input", (8, 0))


@pytest.mark.parametrize("lr", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_lr_is_refused(lr):
    with pytest.raises(ValueError, match="lr must be positive and finite"):
        param_groups(ForeignMLP(64, 64), MINE, lr)


@given(width=st.sampled_from([32, 64, 96]), swiglu=st.booleans(), experts=st.integers(1, 5), name=st.sampled_from([*PAPER_AT_4X]))
def test_param_groups_cover_each_parameter_once(width, swiglu, experts, name):
    activation = "swiglu" if swiglu else "relu"
    config = Config(name, width, depth=1, n_experts=experts, top_k=1, activation=activation, context=8, vocab_size=7)
    model = MiniMoE(config)
    grouped = [id(p) for group in model.param_groups(lr=0.1) for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters()))
    assert all({"role", "lr", "eps", "weight_decay"} <= set(group) for group in model.param_groups(lr=0.1))


def test_roles_survive_copies():
    model = MiniMoE(Config(width=32, depth=1))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [p.role for _, p in named_roles(copied)] == [p.role for _, p in named_roles(model)]
        assert len(copied.param_groups(0.1)) == len(model.param_groups(0.1))


def trained_in_double(table, steps=20):
    """Logits after some AdamW steps in float64, weight decay on, clipping off."""
    config = Config(table, width=64, depth=1, n_experts=4, context=8, vocab_size=20, z_weight=0.01)
    model = MiniMoE(config).double()
    initialise(model, table, seed=0)  # again, in double: a cast would keep float32's rounding
    optimizer = torch.optim.AdamW(model.param_groups(lr=2**-6, eps=1e-3, weight_decay=0.1), betas=(0.9, 0.95))
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(20, (4, 9), generator=draw)
        out = model(batch[:, :-1])
        loss = nn.functional.cross_entropy(out.logits.flatten(0, 1), batch[:, 1:].flatten()) + 0.01 * out.balance_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model(batch[:, :-1]).logits.detach()


@pytest.mark.parametrize("role", PARAMETRIZATIONS["mup"].roles)
@pytest.mark.parametrize("t", [3.0, 1 / fan_in**0.5, width])
def test_abc_symmetry_leaves_training_unchanged(role, t):
    table = PARAMETRIZATIONS["mup"]
    shifted = shift(table, role, t)
    if t == 3.0 or role != "embedding" or t == width:  # an embedding's fan_in never grows
        assert shifted != table
    expected = trained_in_double("mup")
    torch.testing.assert_close(trained_in_double(shifted), expected, rtol=0, atol=1e-9)
    half = table.replace(role, lr=table[role].lr / 2)  # and what training can tell, it does tell
    assert (trained_in_double(half) - expected).abs().max() > 1e-6


@pytest.mark.parametrize("cell", ["eps", "weight_decay"])
def test_abc_symmetry_needs_epsilon_and_weight_decay(cell):
    shifted = shift("mup", "router", 3.0)
    without = shifted.replace("router", **{cell: 1})
    assert (trained_in_double(without) - trained_in_double("mup")).abs().max() > 1e-6


def test_shift_is_undone_by_its_inverse():
    table = PARAMETRIZATIONS["mup"]
    there = shift(table, "router", fan_in, name="there")
    assert there["router"].multiplier == Rule(multiplier=1).multiplier  # SP's multiplier, in another notation
    assert shift(there, "router", 1 / fan_in, name="mup") == table
    with pytest.raises(ValueError, match="t must not be 0"):
        shift("mup", "router", 0)
    with pytest.raises(KeyError, match="no role 'gate'"):
        shift("mup", "gate", 2)
