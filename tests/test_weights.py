"""The sizes of weights, and the balance of updates and weight decay."""

import pytest
import torch
from torch import nn

from minimoe import PARAMETRIZATIONS, Config, MiniMoE, TrainOptions, fan_in, train, weight_sizes
from minimoe.arms import DECAY_ARMS, decayed


def test_each_weight_matrix_has_its_rms_and_its_largest_singular_value():
    model = MiniMoE(Config("mup", width=32, n_experts=4))
    sizes = weight_sizes(model).set_index("tensor")
    for name, row in sizes.iterrows():
        weight = model.get_parameter(name).detach().double()
        assert row.rms == pytest.approx(weight.square().mean().sqrt().item())
        tops = [torch.linalg.svdvals(matrix)[0].item() for matrix in weight.reshape(-1, *weight.shape[-2:])]
        assert row.top == pytest.approx(sum(tops) / len(tops))
        assert row.role == model.get_parameter(name).role.name
    assert {"attention", "attention_out", "router", "experts_up", "experts_down", "unembedding"} <= set(sizes.role)


def test_a_weight_without_a_role_is_an_error():
    with pytest.raises(TypeError, match="has no role"):
        weight_sizes(nn.Linear(2, 2))


def test_each_rule_of_decay_is_one_cell_of_the_hidden_weights():
    ratios = {"fan_in": 4.0, "width": 4.0}
    decays = [{role: table[role].weight_decay(ratios) for role in table.roles} for table in DECAY_ARMS]
    for own, hidden in zip(decays, (4, 2, 1), strict=True):
        assert {own[role] for role in ("attention", "experts_up", "experts_down")} == {hidden}
        assert {own[role] for role in ("embedding", "unembedding", "router")} == {1}


def test_a_rule_of_decay_keeps_what_there_is_and_has_its_own_name():
    halved = PARAMETRIZATIONS["mup"].replace("attention", "halved", weight_decay=0.5)
    assert decayed(halved, 1, "grown")["attention"].weight_decay == 0.5 * fan_in
    assert decayed(PARAMETRIZATIONS["sp"], 1, "same").name == "same"


def test_large_decay_takes_the_weights_to_a_size_of_their_own(corpus):
    """From inits that differ by 4 the hidden weights end at one size, somewhat below sqrt(LR / (2 * weight decay))."""
    options = TrainOptions(batch_size=4, eval_batches=1, evals=1, weight_decay=1.0, final_lr=1.0)
    tables = [DECAY_ARMS[2], DECAY_ARMS[2].replace("experts_up", "large", init_var=16 * DECAY_ARMS[2]["experts_up"].init_var)]
    configs = [Config(table, width=32, context=16, n_experts=4) for table in tables]
    start, end = (
        [weight_sizes(m).set_index("tensor").rms["blocks.0.moe.up"] for m in models]
        for models in (
            [MiniMoE(config) for config in configs],
            [run.model for run in train(configs, 2.0**-5, 0, corpus, 400, options, "cpu")],
        )
    )
    assert start[1] == pytest.approx(4 * start[0])
    assert end[1] == pytest.approx(end[0], rel=0.2)
    assert 0.4 < end[0] / (2.0**-5 / 2) ** 0.5 < 1
