"""Tables for the depth, the number and the size of the experts: each cell by hand, each as muP plus edits, and what is predicted
and measured over each of the four axes."""

import pytest
import torch
from torch.nn import functional as F

from minimoe import (
    PARAMETRIZATIONS,
    Config,
    MiniMoE,
    coordinate_check,
    depth,
    diagnosis,
    expert_width,
    exponents,
    fan_in,
    suspects,
    width,
)
from minimoe.identity import tensor_numbers
from minimoe.roles import initialise, param_groups
from minimoe.tables import READINGS
from minimoe.theory import exponents_between, kinds, predicted_exponents

# Width x 4, depth x 8, experts and active experts x 2, expert hidden size over width x 16: so an expert's hidden size x 64.
GROWN = {"width": 128, "depth": 8, "n_experts": 8, "top_k": 2, "expert_ratio": 16}
BASES = {"base_width": 32, "base_depth": 1, "base_n_experts": 4, "base_top_k": 1, "base_expert_ratio": 1}
GROWN_BY = {**GROWN, **BASES, "gates": "sigmoid", "gains": True}

# (init std over that at the base, multiplier, LR, eps, weight decay) at these sizes, from the papers' tables.
COMPLETEP = {  # arXiv 2505.01618, Table 1 and its code, alpha = 1: branches / 8; hidden LR / 4; eps / (4 * 8) everywhere
    "tokens": (1, 1, 1, 1 / 32, 1),
    "unembedding": (1, 1 / 4, 1, 1 / 32, 1),
    "attention.q": (1 / 2, 1, 1 / 4, 1 / 32, 4),
    "attention.o": (1 / 2, 1 / 8, 1 / 4, 1 / 32, 4),
    "moe.router": (1, 1 / 4, 1, 1 / 32, 1),
    "moe.up": (1 / 2, 1, 1 / 4, 1 / 32, 4),
    "moe.down": (1 / 8, 1 / 8, 1 / 64, 1 / 32, 64),
    "attention_norm.gain": (0, 1, 1, 1 / 32, 1),
    "norm.gain": (0, 1, 1, 1 / 32, 1),
}
SLOWER, EPS = 8**-0.5, 1 / (4 * 8**0.5)
DEPTH_MUP = {  # alpha = 1/2: branches, and every LR inside a block, by the root of 8
    "tokens": (1, 1, 1, EPS, 1),
    "unembedding": (1, 1 / 4, 1, EPS, 1),
    "attention.q": (1 / 2, 1, SLOWER / 4, EPS, 4),
    "attention.o": (1 / 2, 8**-0.5, SLOWER / 4, EPS, 4),
    "moe.router": (1, 1 / 4, SLOWER, EPS, 1),
    "moe.up": (1 / 2, 1, SLOWER / 4, EPS, 4),
    "moe.down": (1 / 8, 8**-0.5, SLOWER / 64, EPS, 64),
    "attention_norm.gain": (0, 1, SLOWER, EPS, 1),
    "norm.gain": (0, 1, 1, EPS, 1),
}
DMFT = {  # arXiv 2601.20205, Table 2: r_n 4, r_L 8, r_alpha 16, r_M 64, two active experts for one
    "tokens": (1, 1, 1, 1 / 4, 1),
    "unembedding": (1, 1 / 4, 1, 1 / 4, 1),
    "attention.q": (1 / 2, 1, 1 / 4, 1 / 32, 1),
    "attention.o": (1 / 2, 1 / 8, 1 / 4, 1 / 32, 1),
    "moe.router": (1 / 4, 1, 1 / 4, 1 / 32, 1),
    "moe.up": (1 / 2, 1, 1 / 4, 1 / 512, 1),
    "moe.down": (1 / 32, 1 / 16, 1 / 64, 4 / 64**2 / 8, 1),
    "attention_norm.gain": (0, 1, 1, 1, 1),
    "norm.gain": (0, 1, 1, 1, 1),
}


@pytest.mark.parametrize(("name", "cells"), [("completep", COMPLETEP), ("depth-mup", DEPTH_MUP), ("dmft", DMFT)])
def test_every_tensor_is_as_the_paper_tables_it(name, cells):
    config = Config(name, **GROWN_BY)
    found, at_base = tensor_numbers(config), tensor_numbers(config.base)
    for leaf, wanted in cells.items():
        path = leaf if leaf in found else f"blocks.7.{leaf}"
        own, base = found[path], at_base[path.replace("7", "0")]
        std = own.std / base.std if base.std else 0
        assert (std, own.multiplier, own.lr, own.eps, own.weight_decay) == pytest.approx(wanted), path
        assert own.one_minus_beta == 1


def effective(config):
    """What Adam can tell apart of each tensor: start, step, eps and decay of multiplier times weight."""
    return {
        path: (n.std * n.multiplier, n.lr * n.multiplier, n.eps / n.multiplier, n.weight_decay * n.lr)
        for path, n in tensor_numbers(config).items()
    }


def as_mup(name):
    """The table as muP plus edits: no row without a weight, and muP's own notation of the router."""
    table, slower, alpha = PARAMETRIZATIONS["mup"], 1, {"completep": 1, "depth-mup": 0.5, "dmft": 1}[name]
    if name == "depth-mup":
        slower = 1 / depth**0.5
    eps, decay = 1 / (width * depth**alpha), fan_in if name != "dmft" else 1
    hidden = {"lr": slower / fan_in, "eps": eps, "weight_decay": decay}
    table = table.replace("attention", "edited", **hidden).replace("attention_out", "edited", multiplier=1 / depth**alpha)
    table = table.replace("experts_up", "edited", **hidden)
    table = table.replace("experts_down", "edited", multiplier=1 / depth**alpha, **hidden)
    table = table.replace("router", "edited", lr=slower, eps=eps)
    table = table.replace("embedding", "edited", eps=eps).replace("unembedding", "edited", eps=eps)
    return table


@pytest.mark.parametrize("name", ["completep", "depth-mup"])
def test_the_tables_for_depth_are_mup_with_edits(name):
    fields = {"width": 64, "depth": 4, "base_depth": 1, "top_k": 1, "base_n_experts": 4, "base_top_k": 1}
    ours, edited = (effective(Config(table, **fields)) for table in (name, as_mup(name)))
    for path, numbers in ours.items():
        assert numbers == pytest.approx(edited[path], rel=1e-12), path


def test_dmft_is_mup_with_edits_in_another_notation():
    """Its router is muP's, shifted by fan_in; its down projection has 1/alpha as a std or as a multiplier."""
    fields = {"width": 64, "depth": 4, "expert_ratio": 8, "base_depth": 1, "base_expert_ratio": 2}
    table = as_mup("dmft").replace("embedding", eps=1 / width).replace("unembedding", eps=1 / width)
    alpha = expert_width / width
    down = {"init_var": 1 / fan_in, "multiplier": 1 / (alpha**0.5 * depth), "lr": alpha**0.5 / fan_in}
    table = table.replace("experts_down", **down, eps=width / (expert_width**2 * depth) / alpha**0.5)
    table = table.replace("experts_up", eps=1 / (expert_width * depth)).replace("router", eps=1 / (width**2 * depth))
    ours, edited = (effective(Config(table, **fields)) for table in ("dmft", table))
    for path, numbers in ours.items():
        assert numbers[:3] == pytest.approx(edited[path][:3], rel=1e-12), path  # the paper's weight decay is 0


@pytest.mark.parametrize("name", ["completep", "depth-mup", "dmft"])
def test_a_shifted_row_is_the_same_training(name):
    """Every row in another notation, by a monomial of its own: 20 steps of AdamW with weight decay in float64."""
    table, shifted = PARAMETRIZATIONS[name], PARAMETRIZATIONS[name]
    for role, t in (("experts_down", expert_width / width), ("router", fan_in), ("attention", 1 / depth), ("unembedding", 3)):
        shifted = shifted.shift(role, t)
    fields = {"width": 64, "depth": 2, "expert_ratio": 4, "base_depth": 1, "base_expert_ratio": 1, "context": 16}
    batch, losses = torch.randint(96, (4, 17), generator=torch.Generator().manual_seed(0)), []
    for rules in (table, shifted):
        model = initialise(MiniMoE(Config(rules, **fields)).double(), rules)
        optimizer = torch.optim.AdamW(param_groups(model, rules, lr=2**-6, eps=1e-8, weight_decay=0.1))
        for _ in range(20):
            loss = F.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_where_sources_disagree_both_readings_are_there():
    late = READINGS["depth-mup, router without depth"]
    assert (str(late["router"].lr), str(PARAMETRIZATIONS["depth-mup"]["router"].lr)) == ("1", "1/depth^0.5")
    complete = READINGS["complete(d)p"]
    config = {"width": 64, "depth": 4, "base_depth": 1}
    paper, code = (effective(Config(table, **config)) for table in (complete, "completep"))
    for path in paper:  # all agree in step and decay; the router starts otherwise; and eps differs
        same = [one == pytest.approx(other) for one, other in zip(paper[path], code[path], strict=True)]
        router, outside = path.endswith("router"), path in ("tokens", "positions", "unembedding")
        assert same == [not router, True, not outside and not router, True], path
    assert READINGS["dmft, fan_in init"]["experts_down"].init_var == 1 / fan_in
    assert {str(READINGS["dmft, one eps"][role].eps) for role in ("embedding", "experts_down", "router")} == {"1/(depth*width)"}


def predicted(table, axis, **fields):
    return predicted_exponents(Config(table, base_depth=2, base_n_experts=8, base_top_k=2, base_expert_ratio=2, **fields), axis)


def test_over_the_depth_the_tables_keep_every_sum_but_one_reading():
    """Of one of L layers; the sum over them is constant where each is like 1/L."""
    for table in ("completep", "depth-mup", "dmft"):
        found = predicted(table, "depth")
        assert {found[tensor, "allocation"] for tensor in ("q", "k", "v", "o", "router", "up", "down")} == {-1}
        assert found["embedding", "allocation"] == found["logits", "allocation"] == 0
    late = predicted(READINGS["depth-mup, router without depth"], "depth")
    assert late["router", "allocation"] == -0.5  # its sum grows like the root of the depth


def test_over_the_experts_at_a_fixed_share():
    for table, gates in (("mup", "softmax"), ("mup", "renormalized"), ("dmft", "sigmoid")):
        found = predicted(table, "n_experts", gates=gates)
        assert found["moe", "init"] == -0.5  # as many independent outputs as active experts, each with a gate of 1 over them
        assert {found[tensor, "allocation"] for tensor in ("up", "down", "v", "embedding", "logits")} == {0}
        assert ("router", "allocation") not in found
    undivided = predicted("mup", "n_experts", gates="sigmoid")  # nothing divides the sum
    assert undivided["moe", "init"] == 0.5
    assert undivided["residual", "init"] == 0.5
    assert ("up", "allocation") not in undivided  # the stream grows, and the first layers' gradients differ from the last's
    divided_twice = predicted("dmft", "n_experts")
    assert {divided_twice[tensor, "allocation"] for tensor in ("up", "down")} == {-1}


def test_of_another_share_nothing_is_predicted():
    one = Config("mup", n_experts=8, top_k=2)
    assert exponents_between(one, Config("mup", n_experts=16, top_k=2), "n_experts") == {}
    assert exponents_between(one, Config("mup", n_experts=16, top_k=4), "n_experts")


def test_over_the_size_of_the_experts():
    """The down projection is an output weight there: with fan_in init, the gradient behind the up projection grows."""
    for table, down, up in (("mup", 0, 0.5), ("completep", 0, 0.5), ("dmft", -0.5, 0), (READINGS["dmft, fan_in init"], 0, 0.5)):
        found = predicted(table, "expert_ratio")
        assert (found["down", "init"], found["down", "update"], found["down", "allocation"]) == (down, 0, 0)
        assert found["up", "allocation"] == up
    assert predicted("sp", "expert_ratio")["down", "update"] == 1
    kind_of = kinds(Config(), "expert_ratio")
    assert {kind_of[f"blocks.0.moe.{name}"] for name in ("up", "down", "router")} == {"input", "output", "fixed"}


CHECK = {"steps": 3, "seeds": (0, 1), "n_jobs": 2}
SIZES = {"widths": 32, "expert_ratio": (1, 4, 16)}


def test_the_check_names_the_down_projections_init(pydocs):
    """Over the size of the experts: muP's fan_in init is too large by the ratio; dmft's is right."""
    found = exponents(coordinate_check(("mup", READINGS["dmft, fan_in init"]), corpus=pydocs, **SIZES, **CHECK))
    named = suspects(found).groupby("parametrization").first()
    for name in ("mup", "dmft, fan_in init"):
        assert (named.role[name], named.cell[name]) == ("experts_down", "init_var")
        assert named.power[name] == pytest.approx(1, abs=0.1)
    right = exponents(coordinate_check("dmft", corpus=pydocs, gates="sigmoid", **SIZES, **CHECK))
    assert diagnosis(right, "expert_ratio") == {"dmft": "every init, update and allocation keeps muP's desiderata."}
    for table in (found, right):
        inside = table[(table.tensor.isin(["up", "down"])) & table.predicted.notna()]
        assert inside.agrees.all()


def test_the_check_names_the_router_without_a_depth_factor(pydocs):
    tables = ("completep", "depth-mup", READINGS["depth-mup, router without depth"])
    found = exponents(coordinate_check(tables, corpus=pydocs, widths=32, depth=(2, 4, 8, 16), **CHECK))
    named = suspects(found)
    assert named.parametrization.tolist() == ["depth-mup, router without depth"]
    assert (named.role[0], named.cell[0]) == ("router", "lr")
    assert named.power[0] == pytest.approx(0.5, abs=0.15)


def test_the_check_sees_an_undivided_sum(pydocs):
    """Over the number of experts at a fixed share: sigmoid gates need a division by the active experts."""
    path = {"n_experts": (4, 8, 16), "top_k": (1, 2, 4)}
    sizes = {"widths": 32, "path": path, "gates": "sigmoid", "balance_weight": 0.0}
    found = exponents(coordinate_check(("mup", "dmft"), corpus=pydocs, **sizes, **CHECK))
    broken = found[found.verdict == "explodes"]
    assert set(broken.parametrization) == {"mup"}
    assert set(broken.tensor) >= {"up", "down"}
    assert set(found[~found.verdict.isin(["unjudged", "zero"])].quantity) == {"allocation"}
    inside = found[(found.tensor.isin(["up", "down", "moe"])) & found.predicted.notna()]
    assert inside.agrees.mean() > 0.9
