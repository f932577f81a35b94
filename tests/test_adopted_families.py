"""Eight published families of MoE models, tiny and random, under the check: right tables pass, wrong cells are named."""

import pandas as pd
import pytest
import torch
from torch import nn

from architectures import FAMILIES, build
from minimoe import AS_IT_IS, PARAMETRIZATIONS, adopt, check_module, diagnosis, exponents, fan_in, suspects
from minimoe.parametrization import width
from minimoe.training import TextData, windows
from minimoe.verdicts import BROKEN

WIDTHS, LR, MUP = (32, 64, 128, 256), 2.0**-15, PARAMETRIZATIONS["mup"]
WRONG = {  # a table with one wrong cell
    "router.lr": MUP.replace("router", lr=fan_in),
    "router.init_var": MUP.replace("router", init_var=fan_in**2),
    "experts_up.lr": MUP.replace("experts_up", lr=1),
    "experts_up.init_var": MUP.replace("experts_up", init_var=1),
    "experts_down.lr": MUP.replace("experts_down", lr=1),
    "experts_down.init_var": MUP.replace("experts_down", init_var=1),
    "attention.lr": MUP.replace("attention", lr=1),
    "attention_out.lr": MUP.replace("attention_out", lr=1),
    "embedding.lr": MUP.replace("embedding", lr=width),
    "unembedding.lr": MUP.replace("unembedding", lr=fan_in),
    "unembedding.init_var": MUP.replace("unembedding", init_var=fan_in),
}


@pytest.fixture(scope="module")
def text(pydocs):
    """Three batches and a probe of the corpus."""
    data = TextData(pydocs, torch.device("cpu"))
    batches = [windows(data.train, starts, 63)[0] for starts in data.order([0], 3, 16, 63)]
    return batches, data.validation(1, 8, 63)[0]


def checked(plan, table, text, **how):
    batches, probe = text
    return exponents(plan.check(table, WIDTHS, batches=batches, probe=probe, lr=LR, **how))


def plan_of(name, text):
    return adopt(lambda width: build(name, width), 64, 32, text[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_under_mup_every_init_update_and_allocation_is_flat(name, text):
    plan = plan_of(name, text)
    table = checked(plan, "mup", text)  # three seeds
    assert set(table[table.verdict.isin(BROKEN)].tensor) == set()
    judged = table[table.quantity.isin(("init", "update", "allocation")) & (table.tensor != "loss")]
    vectors = {own.tensor for own in plan.parameters if own.role in ("gain", "bias")}
    assert set(judged[~judged.verdict.isin(("holds", "zero"))].tensor) <= vectors  # what softmax hardly sees is noise: "unclear"
    updates = judged[(judged.quantity == "update") & judged.predicted.notna()]
    assert updates.agrees.all()
    assert {"router", "experts_up", "experts_down"} <= {own.role for own in plan.parameters}
    assert diagnosis(table)["mup"] == "every init, update and allocation keeps muP's desiderata."


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_the_librarys_own_init_and_lr_are_condemned_at_every_hidden_weight(name, text):
    plan = plan_of(name, text)
    table = checked(plan, AS_IT_IS, text, seeds=(0,))
    updates = table[table.quantity == "update"].set_index(["layer", "tensor"])
    hidden = {own.name for own in plan.parameters if own.kind == "hidden"}
    for (layer, tensor), row in updates.iterrows():
        if tensor.replace("*", str(layer)) in hidden:
            assert row.verdict == "explodes"
            assert row.measured > 0.7


@pytest.mark.parametrize("cell", WRONG)
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_a_broken_cell_is_named_first(name, cell, text):
    plan = plan_of(name, text)
    named = suspects(checked(plan, WRONG[cell], text, seeds=(0,))).iloc[0]
    right, wrong = plan.factors(MUP), plan.factors(WRONG[cell])
    changed = {own.tensor for own in plan.parameters if right[own.name] != wrong[own.name]}
    assert named.role in changed
    assert named.cell == cell.split(".")[1]


def by_class(module, ratio, base_lr):
    """A rule by layer class: what is an nn.Linear is scaled like a hidden matrix, and nothing else is; the readout's input over
    the ratio."""
    readout = module.get_output_embeddings()
    linear = {id(part.weight) for part in module.modules() if isinstance(part, nn.Linear) and part is not readout}
    with torch.no_grad():
        for param in module.parameters():
            if id(param) in linear:
                param.mul_(ratio**-0.5)
    readout.register_forward_pre_hook(lambda part, inputs: (inputs[0] / ratio,))
    return [
        {"params": [param for param in module.parameters() if (id(param) in linear) == is_linear], "lr": lr}
        for is_linear, lr in ((True, base_lr / ratio), (False, base_lr))
    ]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_rule_by_layer_class_is_condemned_at_the_experts_and_the_router(name, text):
    """Experts and routers of these models are no nn.Linear."""
    batches, probe = text

    def made(width):
        module = build(name, width)
        return module, by_class(module, width / 32, LR)

    def loss(module, batch):
        scores = module(input_ids=batch[:, :-1], use_cache=False).logits
        return nn.functional.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten())

    plan = plan_of(name, text)
    kinds = {own.name: "router" if own.role == "router" else own.kind for own in plan.parameters}
    table = exponents(check_module(made, WIDTHS, loss, batches, probe, seeds=(0,), kinds=kinds))
    updates = table[(table.quantity == "update") & (table.layer == 1)].set_index("tensor").measured
    roles = {own.tensor: own.role for own in plan.parameters}
    slopes = pd.Series({roles[tensor]: slope for tensor, slope in updates.items() if tensor in roles})
    assert slopes["experts_up"] > 0.6
    assert slopes["experts_down"] > 1.0  # its own excess, and its input's
    assert slopes["router"] > 0.6
    assert abs(slopes["attention_out"]) < 0.3
    assert roles[suspects(table).role.iloc[0]] in ("experts_up", "experts_down")
