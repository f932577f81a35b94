"""The model's options that the rules for depth and experts need: gates, a bias that the load moves, gains, branch multipliers."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from minimoe import (
    PARAMETRIZATIONS,
    Config,
    MiniMoE,
    Parametrization,
    Rule,
    TrainOptions,
    coordinate_check,
    depth,
    exponents,
    read_sweep,
    sweep,
    top_k,
    train,
)
from minimoe.batched import BatchedRuns
from minimoe.identity import run_key
from minimoe.model import Block
from minimoe.roles import param_groups
from minimoe.step import SingleRun, bias_names, moved_biases

SMALL = {"width": 32, "context": 16, "n_experts": 4, "top_k": 1}
BIASED = Config(**SMALL, gates="sigmoid", bias_rate=0.1, balance_weight=0.0)
OPTIONS = TrainOptions(batch_size=4, eval_batches=2)
MUP = PARAMETRIZATIONS["mup"]


def tokens(runs=1, batch=4, seed=0):
    return torch.randint(96, (runs, batch, 17), generator=torch.Generator().manual_seed(seed))


def test_sigmoid_gates_do_not_see_the_other_experts():
    moe = MiniMoE(Config(width=32, gates="sigmoid")).blocks[0].moe
    logits = moe.router_logits(torch.randn(20, 32, generator=torch.Generator().manual_seed(0)))
    gates, chosen = moe.choice(moe.scores(logits))
    assert torch.equal(chosen, logits.topk(2).indices)  # a sigmoid keeps the order
    assert torch.equal(gates, torch.sigmoid(logits).gather(1, chosen))


@pytest.mark.parametrize("gates", ["softmax", "sigmoid"])
def test_the_balance_loss_is_1_at_perfect_balance_under_every_gate(gates):
    moe = MiniMoE(Config(width=32, gates=gates, forced_balance=True)).blocks[0].moe
    assert moe(torch.randn(16, 32))[1].item() == pytest.approx(1, abs=1e-5)


def test_a_dense_model_has_a_gate_of_1_under_every_gate():
    x = torch.randn(1, 8, 32)
    dense = [MiniMoE(Config(width=32, n_experts=1, top_k=1, gates=gates)).blocks[0](x)[0] for gates in ("softmax", "sigmoid")]
    assert torch.equal(*dense)


def test_the_bias_moves_by_the_share_of_tokens_that_is_too_large():
    """Four experts, one of them active: each should get a quarter of the tokens (DMFT-MoE, kappa = 1/4)."""
    load = torch.tensor([[0.5, 0.25, 0.25, 0.0]] * 2)
    moved = moved_biases(BIASED, {name: torch.zeros(4) for name in bias_names(BIASED)}, load)
    assert list(moved) == ["blocks.0.moe.bias", "blocks.1.moe.bias"]
    for bias in moved.values():
        torch.testing.assert_close(bias, torch.tensor([-0.025, 0, 0, 0.025]))
    two = replace(BIASED, top_k=2)  # each should get half of the tokens; the load, of two assignments each, sums to 1
    moved = moved_biases(two, {"blocks.0.moe.bias": torch.zeros(4)}, load)
    torch.testing.assert_close(moved["blocks.0.moe.bias"], torch.tensor([-0.05, 0, 0, 0.05]))


def test_the_bias_chooses_and_leaves_the_gates():
    moe = MiniMoE(BIASED).blocks[0].moe
    logits = moe.router_logits(torch.randn(20, 32))
    moe.bias[2] = 10.0
    gates, chosen = moe.choice(moe.scores(logits))
    assert (chosen == 2).all()
    assert torch.equal(gates[:, 0], torch.sigmoid(logits)[:, 2])


def test_the_bias_balances_without_a_loss(corpus):
    """The spread of the load over the experts, on validation tokens: nothing balances it, or a bias does. (Three seeds.)"""
    options = TrainOptions(batch_size=8, evals=1)
    worst = []
    for rate in (0.0, 0.1):
        runs = train(replace(BIASED, bias_rate=rate, n_experts=8), 2**-5, (0, 1, 2), corpus, 60, options)
        worst.append([max(run.history[-1]["max_load"]) for run in runs])
    assert max(worst[1]) < min(worst[0])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_the_bias_is_state_in_batched_runs_as_in_one():
    configs = [replace(BIASED, seed=seed) for seed in (0, 1)]
    alone = [SingleRun([MiniMoE(config)], [2**-6], OPTIONS) for config in configs]
    together = BatchedRuns([MiniMoE(config) for config in configs], [2**-6] * 2, OPTIONS)
    for step in range(4):
        batch = tokens(2, seed=step)
        together.step(batch)
        for i, run in enumerate(alone):
            run.step(batch[i : i + 1])
    for model, run in zip(together.trained_models(), alone, strict=True):
        for name in bias_names(BIASED):
            assert run.model.get_buffer(name).abs().max() > 0
            torch.testing.assert_close(model.get_buffer(name), run.model.get_buffer(name))


def test_the_bias_is_saved_with_the_model(corpus, tmp_path):
    (run,) = train(BIASED, 0.01, 0, corpus, 3, OPTIONS)
    run.model.save(tmp_path / "model.pt")
    loaded = MiniMoE.load(tmp_path / "model.pt")
    assert loaded.config == BIASED
    for name in bias_names(BIASED):
        assert run.model.get_buffer(name).abs().max() > 0
        assert torch.equal(loaded.get_buffer(name), run.model.get_buffer(name))


def test_a_stopped_sweep_goes_on_with_the_bias_of_each_run(corpus, tmp_path):
    fields = {"context": 16, "n_experts": 4, "gates": "sigmoid", "bias_rate": 0.1, "options": OPTIONS, "n_jobs": 1}
    grid = ((32,), "mup", [2**-6, 2**-5], (0,), 6, corpus)
    whole = sweep(*grid, **fields, progress=False)
    store = tmp_path / "runs.jsonl"
    sweep((32,), "mup", [2**-6], (0,), 6, corpus, **fields, progress=False, store=store)  # as far as the first sweep came
    sweep(*grid, **fields, progress=False, store=store)
    assert read_sweep(store).val_loss.tolist() == whole.val_loss.tolist()
    assert read_sweep(store).gates.tolist() == ["sigmoid"] * 2


def test_the_options_count_in_a_runs_identity_where_they_are_used():
    def key(**fields):
        return run_key(Config(**SMALL | fields), 0.01, 6, TrainOptions(), "text")

    assert key() == key(gates="softmax", bias_rate=0.0, gains=False)
    two = {"top_k": 2}
    several = [{}, {"gates": "sigmoid"}, two, two | {"gates": "renormalized"}, {"bias_rate": 0.1}, {"gains": True}]
    assert len({key(**fields) for fields in several}) == len(several)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"gates": "relu"}, "gates='relu': must be one of softmax, renormalized, sigmoid"),
        ({"bias_rate": -0.1}, "bias_rate=-0.1: must be finite and not negative"),
        ({"bias_rate": 0.1, "forced_balance": True}, "bias_rate=0.1: forced_balance takes no choice"),
        (
            {"parametrization": MUP.replace("router", init_var=0)},
            "router.init_var=0: a router that starts at 0 gives all experts",
        ),
        (
            {"parametrization": MUP.replace("router", init_var=0), "bias_rate": 0.1},
            "router.init_var=0: a router that starts at 0 gives all experts one score, so that the same experts would serve",
        ),
    ],
)
def test_what_cannot_work_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        Config(**fields)


def test_a_router_of_0_is_allowed_where_it_chooses_nothing():
    table = MUP.replace("router", init_var=0)
    Config(table, n_experts=2, top_k=2)
    Config(table, forced_balance=True)


def test_with_gains_of_1_the_model_is_the_same_function():
    plain = MiniMoE(Config("mup", width=64))
    gains = MiniMoE(Config("mup", width=64, gains=True))
    gains.load_state_dict(plain.state_dict(), strict=False)
    x = tokens()[0, :, :-1]
    assert torch.equal(plain(x).logits, gains(x).logits)
    assert [name for name, _ in gains.named_parameters() if "gain" in name] == [
        "blocks.0.attention_norm.gain", "blocks.0.moe_norm.gain", "blocks.1.attention_norm.gain", "blocks.1.moe_norm.gain",
        "norm.gain",
    ]  # fmt: skip


def test_gains_have_their_row():
    """depth-mup: the norms in the blocks learn slower by the root of the depth, the last norm does not."""
    groups = MiniMoE(Config("depth-mup", depth=8, base_depth=2, gains=True)).param_groups(lr=1.0)
    lrs = {group["role"]: group["lr"] for group in groups}
    assert (lrs["gain"], lrs["final_gain"]) == (0.5, 1)
    usual = {group["role"]: group["lr"] for group in MiniMoE(Config("mup", width=64, gains=True)).param_groups(lr=1.0)}
    assert (usual["gain"], usual["final_gain"]) == (1, 1)  # as a lookup


def test_a_check_sees_gains(corpus):
    small = {"seeds": (0,), "steps": 2, "n_jobs": 1, "context": 16, "corpus": corpus}
    frame = coordinate_check("mup", (32, 64, 128), gains=True, **small)
    table = exponents(frame).set_index(["layer", "tensor", "quantity"])
    for place in ((0, "attention gain"), (1, "moe gain"), (-1, "final gain")):
        assert table.loc[(*place, "init"), "measured"] == pytest.approx(0, abs=1e-6)  # a gain of 1 after a norm
        assert table.loc[(*place, "update"), "predicted"] == 0
        assert table.loc[(*place, "update"), "agrees"]
        assert (*place, "allocation") in table.index
    closure = exponents(frame).closure.dropna()
    assert abs(closure - 1).max() < 0.1


class Branched(Block):
    """A block whose branches have their multipliers outside, as the papers write them."""

    def forward(self, x):
        x = x + self.scale * self.attention(self.attention_norm(x))
        y, *routing = self.moe(self.moe_norm(x).flatten(0, 1))
        return x + self.scale * self.routed * y.view_as(x), *routing


def test_a_folded_multiplier_is_the_papers_training():
    """Branches times 1/L and the routed sum over k, outside and folded into the last weights: equal to rounding in 20 steps."""
    rules = dict(MUP.rules) | {"residual": Rule(multiplier=1 / depth), "routed": Rule(multiplier=1 / top_k)}
    fields = {"width": 64, "depth": 4, "base_depth": 2, "top_k": 4, "base_top_k": 1, "gates": "sigmoid", "context": 16}
    folded = MiniMoE(Config(Parametrization("folded", rules), **fields)).double()
    apart = MiniMoE(Config("mup", **fields)).double()
    for block in apart.blocks:
        block.__class__, block.scale, block.routed = Branched, 1 / 2, 1 / 4
    batch, logits = tokens()[0], []
    for model in (folded, apart):
        optimizer = torch.optim.AdamW(param_groups(model, model.config.parametrization, lr=2**-6, eps=0.0))
        for _ in range(20):
            loss = F.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        logits.append(model(batch[:, :-1]).logits)
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9)
    assert loss < 2  # it has learned the batch: from ln 96


def test_a_role_without_a_weight_has_a_multiplier_alone():
    with pytest.raises(ValueError, match="role 'residual' of parametrization 'x' has no weight: give its multiplier alone"):
        Parametrization("x", {"residual": Rule(multiplier=1 / depth, lr=0.5)})
    own = PARAMETRIZATIONS["completep"].replace("residual_moe", multiplier=1)
    model = MiniMoE(Config(own, depth=8, base_depth=2))
    assert model.get_buffer("blocks.0.attention.o_multiplier") == 0.25
    assert model.get_buffer("blocks.0.moe.down_multiplier") == 1
