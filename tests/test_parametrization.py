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
    batch,
    fan_in,
    initialise,
    param_groups,
    parameter,
    shift,
    width,
)
from minimoe.roles import named_roles

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
        row = PARAMETRIZATIONS[name].row(param.role.name)
        std, multiplier, lr = PAPER_AT_4X[name][row]
        expected = BASE_STD[leaf] * std
        assert param.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * param.numel())), path  # 5 sigma
        assert buffers[f"{path}_multiplier"].item() == multiplier, path
        assert lrs[id(param)] == pytest.approx(0.01 * lr, rel=1e-12), path
        seen.add(row)
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
    with pytest.raises(ValueError, match="sizes in a shape must be positive"):
        parameter("input", (8, 0))


@pytest.mark.parametrize("lr", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_lr_is_refused(lr):
    with pytest.raises(ValueError, match=r"lr=.*: must be positive and finite"):
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


def test_a_finer_role_takes_its_familys_row_until_it_has_its_own():
    table = PARAMETRIZATIONS["mup"]
    assert table["attention_out"] == table["attention"]
    assert table.row("attention_out") == "attention"
    assert table.row("shared_down") == "experts_down"
    assert table["gain"] == table["bias"] == table["embedding"]
    own = table.replace("attention_out", lr=2)
    assert own.name == "mup[attention_out.lr=2]"
    assert own.row("attention_out") == "attention_out"
    assert own["attention_out"] == Rule(init_var=1 / fan_in, lr=2)
    assert own["attention"] == table["attention"]
    lrs = {group["role"]: group["lr"] for group in MiniMoE(Config(own, width=64)).param_groups(0.1)}
    assert lrs["attention_out"] == pytest.approx(0.2)
    assert lrs["attention"] == pytest.approx(0.05)
    columns = str(own).splitlines()[1].split()
    assert columns == ["embedding", "unembedding", "attention", "attention_out", "experts", "router"]
    assert str(table.replace("attention_out", "again", lr=1 / fan_in)).splitlines()[1:] == str(table).splitlines()[1:]


def test_two_spellings_of_a_table_are_one():
    table = PARAMETRIZATIONS["mup"]
    finely = Parametrization("mup", dict(table.rules) | {"attention_out": table["attention"]})
    assert finely.same_rules(table)
    assert Config(finely).parametrization is finely  # no borrowed name
    assert not table.same_rules(PARAMETRIZATIONS["sp"])


def test_edits_are_data_and_a_name_with_brackets_is_a_name():
    odd = PARAMETRIZATIONS["mup"].replace("router", "a[b]", lr=2)
    assert odd.replace("router", lr=3).name == "a[b][router.lr=3]"
    assert odd.replace("router", lr=3).replace("router", lr=4).name == "a[b][router.lr=4]"
    read = Parametrization.from_dict(odd.replace("router", lr=3).to_dict())
    assert read.replace("router", eps=2).name == "a[b][router.lr=3][router.eps=2]"


def test_a_further_cell_is_printed_where_it_is_not_1():
    assert "one_minus_beta" not in str(PARAMETRIZATIONS["mup"])
    assert str(PARAMETRIZATIONS["mup"].replace("router", one_minus_beta=width)).splitlines()[-1].split()[-1] == "width"


def test_an_older_table_reads_with_ones_in_the_cells_that_it_lacks():
    data = PARAMETRIZATIONS["mup"].to_dict()
    for cells in data["rules"].values():
        del cells["one_minus_beta"]
    assert Parametrization.from_dict(data) == PARAMETRIZATIONS["mup"]


class Layouts(nn.Module):
    """Parameters of other layouts than (fan_in, fan_out)."""

    def __init__(self, n, base):
        super().__init__()
        self.gain = parameter("gain", (n,), base_shape=(base,), base_std=0.0, start=1.0)
        self.bias = parameter("bias", (n,), base_shape=(base,), base_std=0.0)
        self.heads = parameter("attention_out", (n // 8, 8, n), base_shape=(base // 8, 8, base), fan_in_axes=(0, 1))
        self.turned = parameter("attention", (3, n), base_shape=(3, base), fan_in_axes=(-1,))  # (fan_out, fan_in)


def test_a_role_knows_its_axes_and_how_it_starts():
    module = initialise(Layouts(256, 64), "mup")
    assert torch.equal(module.gain, torch.ones(256))
    assert torch.equal(module.bias, torch.zeros(256))
    assert module.heads.role.ratios["fan_in"] == module.turned.role.ratios["fan_in"] == 4
    assert module.heads.std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert module.turned.std().item() == pytest.approx(256**-0.5, rel=0.1)
    lrs = {group["role"]: group["lr"] for group in param_groups(module, "mup", lr=1)}
    assert lrs == {"gain": 1, "bias": 1, "attention_out": 0.25, "attention": 0.25}
    with pytest.raises(ValueError, match=r"fan_in_axes=\(2,\), but a parameter of shape \(4, 4\) has 2 axes"):
        parameter("attention", (4, 4), fan_in_axes=(2,))


def test_a_row_can_move_adams_betas():
    module, table = Layouts(64, 64), PARAMETRIZATIONS["mup"].replace("bias", one_minus_beta=2)
    groups = {group["role"]: group for group in param_groups(module, table, lr=1, betas=(0.9, 0.95))}
    assert groups["bias"]["betas"] == pytest.approx((0.8, 0.9))
    assert groups["gain"]["betas"] == (0.9, 0.95)
    with pytest.raises(ValueError, match=r"bias: its row changes Adam's betas: give those of the base"):
        param_groups(module, table, lr=1)
    with pytest.raises(ValueError, match=r"makes a beta of -0\.8"):
        param_groups(module, table, lr=1, betas=(0.1, 0.95))


def test_a_cell_of_the_training_needs_its_ratio():
    module, table = Layouts(64, 64), PARAMETRIZATIONS["mup"].replace("bias", lr=batch**-0.5)
    with pytest.raises(KeyError, match="needs the ratio 'batch'"):
        param_groups(module, table, lr=1)
    groups = {group["role"]: group for group in param_groups(module, table, lr=1, training={"batch": 4, "duration": 1})}
    assert groups["bias"]["lr"] == 0.5
