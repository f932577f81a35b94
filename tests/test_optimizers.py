"""AdamW's two forms against torch's own, with LRs, betas and schedules that differ from role to role."""

import pytest
import torch

from minimoe import Config, MiniMoE, TrainOptions
from minimoe.batched import BatchedRuns
from minimoe.optimizers import AdamW
from minimoe.step import SingleRun
from minimoe.tables import PARAMETRIZATIONS

FIELDS = {"width": 64, "context": 16, "n_experts": 4}
LRS = [2**-6, 2**-7, 2**-5, 2**-6]
SLOW_ROUTER = PARAMETRIZATIONS["mup"].replace("router", "slow router", one_minus_beta=0.5)


def models(*tables, dtype=torch.float64, **fields):
    """One model for each table, of seeds 0, 1, ..."""
    return [MiniMoE(Config(table, seed=seed, **FIELDS | fields)).to(dtype) for seed, table in enumerate(tables)]


def one_factor(roles, step):
    return dict.fromkeys(roles, 0.1 + step / 12)


def a_factor_for_each_role(roles, step):
    return {role: (1 + i) / (2 + step) for i, role in enumerate(roles)}


def gradient(like, step, draw):
    return torch.randn(like.shape, generator=draw, dtype=like.dtype) * 10.0 ** (step % 3 - 9)


class ByHand:
    """torch.optim.AdamW with a group for each parameter, whose LR is set by its role."""

    def __init__(self, model, lr, options):
        groups = model.param_groups(lr, options.eps, options.weight_decay, options.betas)
        self.roles = [group["role"] for group in groups]
        self.peaks = [group["lr"] for group in groups]
        self.torchs = torch.optim.AdamW([{**group, "params": list(group["params"])} for group in groups])

    def step(self, factors):
        for group, role, peak in zip(self.torchs.param_groups, self.roles, self.peaks, strict=True):
            group["lr"] = peak * factors[role]
        self.torchs.step()


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("factors_at", [one_factor, a_factor_for_each_role])
@pytest.mark.parametrize("tables", [("mup", "sp", "mup", "simplep"), (SLOW_ROUTER, "mup", SLOW_ROUTER, "sp")])
def test_the_batched_update_is_torchs_adamw_to_rounding(decay, factors_at, tables):
    """The same gradients into both, in float64, so that only the update is compared."""
    options = TrainOptions(weight_decay=decay)
    runs = models(*tables)
    batched = BatchedRuns(runs, LRS, options)
    by_hand = [ByHand(model, lr, options) for model, lr in zip(runs, LRS, strict=True)]
    draw = torch.Generator().manual_seed(0)
    for step in range(12):
        factors, drawn = factors_at(batched.finals, step), gradient(batched.weights, step, draw)
        batched.optimizer.step(drawn, factors)
        for i, (model, optimizer) in enumerate(zip(runs, by_hand, strict=True)):
            for param, part in zip(model.parameters(), batched.optimizer.views(drawn[i]).values(), strict=True):
                param.grad = part
            optimizer.step(factors)
    for i, model in enumerate(runs):
        expected = torch.cat([p.detach().flatten() for p in model.parameters()])
        torch.testing.assert_close(batched.weights[i], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("factors_at", [one_factor, a_factor_for_each_role])
@pytest.mark.parametrize("table", ["mup", SLOW_ROUTER])
def test_the_update_of_one_run_is_torchs_adamw(dtype, decay, factors_at, table):
    options = TrainOptions(weight_decay=decay)
    one, other = models(table, table, dtype=dtype)
    other.load_state_dict(one.state_dict())
    single, by_hand = SingleRun([one], LRS[:1], options), ByHand(other, LRS[0], options)
    draw = torch.Generator().manual_seed(0)
    for step in range(12):
        factors = factors_at(single.finals, step)
        for param, twin in zip(one.parameters(), other.parameters(), strict=True):
            param.grad = twin.grad = gradient(param, step, draw)
        single.optimizer.step(factors)
        by_hand.step(factors)
    exact = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-7}
    for param, twin in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(param, twin, **exact)


def test_a_table_can_move_the_betas_of_one_role():
    single = SingleRun(models(SLOW_ROUTER), [0.01], TrainOptions())
    betas = {role: group["betas"] for group in single.optimizer.torchs.param_groups for role in group["members"]}
    assert betas.pop("router") == pytest.approx((0.95, 0.975))
    assert set(betas.values()) == {(0.9, 0.95)}


def test_groups_are_split_where_roles_part_and_keep_roles_and_state():
    model, options = models("sp")[0], TrainOptions()
    single = SingleRun([model], [0.01], options)
    together = len(single.optimizer.torchs.param_groups)
    assert together < len(single.finals)  # under SP most roles have the same numbers
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    single.optimizer.step(dict.fromkeys(single.finals, 1.0))
    assert len(single.optimizer.torchs.param_groups) == together
    single.optimizer.step(a_factor_for_each_role(single.finals, 1))
    groups = single.optimizer.torchs.param_groups
    assert sorted(role for group in groups for role in group["members"]) == list(single.finals)
    for group in groups:
        (role,) = group["members"]
        assert {param.role.name for param in group["params"]} == {role}
        assert {single.optimizer.torchs.state[param]["step"].item() for param in group["params"]} == {2}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_roles_of_unequal_numbers_are_not_merged():
    model = models("mup")[0]
    groups = model.param_groups(0.01, 1e-8, 0.0, (0.9, 0.95))
    merged = AdamW(groups).torchs.param_groups
    assert {p for group in merged for p in group["params"]} == set(model.parameters())
    assert len({group["lr"] for group in merged}) == len(merged) > 1


def test_views_have_the_tensors_shapes_and_share_their_memory():
    runs = models("mup", "sp")
    batched = BatchedRuns(runs, LRS[:2], TrainOptions())
    both, second = batched.optimizer.views(batched.weights), batched.optimizer.views(batched.weights[1])
    for name, param in runs[1].named_parameters():
        assert both[name].shape == (2, *param.shape)
        assert second[name].shape == param.shape
        torch.testing.assert_close(second[name], param)
        second[name].fill_(7.0)
        assert (both[name][1] == 7).all()
    assert (batched.weights[1] == 7).all()
    assert not (batched.weights[0] == 7).any()
