"""Complete-muE: from a dense model to mixtures of experts; its identities, and the options that it needs."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from minimoe import (
    BRIDGE_ARMS,
    CAPACITY_ARMS,
    PARAMETRIZATIONS,
    READINGS,
    Config,
    MiniMoE,
    TrainOptions,
    coordinate_check,
    exponents,
    first_losses,
    predicted_exponents,
    square_root_rule,
    sweep,
    upcycled,
)
from minimoe.identity import run_key, tensor_numbers
from minimoe.roles import param_groups

MUE = PARAMETRIZATIONS["complete-mue"]
FROZEN = MUE.replace("router", "frozen router", init_var=0, lr=0)
BASE = {"width": 32, "base_width": 16, "context": 16, "depth": 2, "base_n_experts": 1, "base_top_k": 1, "base_granularity": 1}
BASE |= {"base_n_shared": 0, "gates": "renormalized sigmoid", "balance_weight": 0.0}


def dense(ratio: int, **fields) -> Config:
    """A dense model of this expansion, its own base but for the width."""
    return Config(FROZEN, n_experts=1, top_k=1, expert_ratio=ratio, base_expert_ratio=ratio, **BASE | fields)


def mixture(config: Config, experts: int, active: int, shared: int = 0, table=FROZEN, **fields) -> Config:
    """Experts as large as the width, measured against the dense model."""
    sizes = {"n_experts": experts, "top_k": active, "expert_ratio": 1, "n_shared": shared}
    return replace(config, parametrization=table, **sizes, **fields)


def trained(model: MiniMoE, steps: int = 50) -> torch.Tensor:
    """The logits after AdamW steps in float64, with weight decay."""
    batch = torch.randint(96, (4, 17), generator=torch.Generator().manual_seed(5))
    groups = param_groups(model, model.config.parametrization, 2**-6, eps=1e-12, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups)
    for _ in range(steps):
        loss = F.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model(batch[:, :-1]).logits.detach()


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize(("experts", "shared"), [(2, 0), (4, 0), (8, 0), (2, 2), (4, 4), (7, 1)])
def test_bridge_1_is_an_identity(experts, shared, activation):
    """Dense, and all experts active with the router frozen at 0: one training, to rounding (50 steps in float64)."""
    config = dense(experts + shared, activation=activation)
    start = MiniMoE(config).double()
    other = upcycled(start, mixture(config, experts, experts, shared))
    before = trained(start, 0)
    torch.testing.assert_close(trained(other, 0), before, rtol=0, atol=1e-13)
    after = trained(start)
    torch.testing.assert_close(trained(other), after, rtol=0, atol=1e-12)
    assert (after - before).abs().max() > 1  # it has learned


def test_route_scale_and_init_are_not_interchangeable():
    """No route scale, and down projections that start N times as large: the same function at step 0, and another training."""
    wrong = FROZEN.replace("routed", "init by N", multiplier=1)
    config = dense(4)
    start = MiniMoE(config).double()
    other = upcycled(start, mixture(config, 4, 4, table=wrong))
    with torch.no_grad():
        for block in other.blocks:
            block.moe.down *= 4
    torch.testing.assert_close(trained(other, 0), trained(start, 0), rtol=0, atol=1e-13)
    assert (trained(other) - trained(start)).abs().max() > 0.1


@pytest.mark.parametrize(("experts", "active", "shared"), [(8, 2, 0), (4, 2, 2)])
def test_experts_that_hold_the_whole_network_are_the_network(experts, active, shared):
    """Whatever the router says, under Complete-muE; without a rule the output would be larger where experts are shared."""
    config = dense(1)
    start = MiniMoE(config).double()
    grown = mixture(config, experts, active, shared, MUE)
    torch.testing.assert_close(trained(upcycled(start, grown), 0), trained(start, 0), rtol=0, atol=1e-12)
    if shared:
        other = upcycled(start, replace(grown, parametrization=PARAMETRIZATIONS["mup"]))
        assert (trained(other, 0) - trained(start, 0)).abs().max() > 0.1


def test_upcycling_keeps_the_dense_model_and_says_what_cannot_be():
    config = dense(4)
    start = MiniMoE(config)
    before = {name: value.clone() for name, value in start.state_dict().items()}
    grown = upcycled(start, mixture(config, 8, 2, table=MUE))
    assert all(torch.equal(before[name], value) for name, value in start.state_dict().items())
    assert grown.blocks[0].moe.up.shape == (8, 32, 32)
    assert torch.equal(grown.blocks[0].moe.up[1], grown.blocks[0].moe.up[5])  # four slices, and the same again
    assert torch.equal(grown.blocks[1].attention.o, start.blocks[1].attention.o)
    assert not torch.equal(grown.blocks[0].moe.router, grown.blocks[1].moe.router)
    sparse = mixture(config, 4, 2, table=MUE)
    for model, other, message in (
        (grown, sparse, "dense=.*8 experts.*: must have one expert and no shared ones"),
        (start, replace(sparse, depth=1), "depth=1: the dense model has 2"),
        (start, replace(sparse, expert_ratio=3), "expert_width=96: must divide the dense network's hidden size, 128"),
    ):
        with pytest.raises(ValueError, match=message):
            upcycled(model, other)


def test_shared_experts_serve_every_token():
    config = Config("mup", width=32, n_experts=4, top_k=1, n_shared=2, context=16, gates="sigmoid")
    model = MiniMoE(config)
    moe = model.blocks[0].moe
    x = torch.randn(10, 32)
    up, down = moe.shared_up_multiplier * moe.shared_up, moe.shared_down_multiplier * moe.shared_down
    expected = sum(F.relu(x @ up[expert]) @ down[expert] for expert in range(2))
    routed = moe.mixture(x, *moe.choice(moe.scores(moe.router_logits(x))))
    torch.testing.assert_close(moe(x)[0], routed + expected)
    assert moe.shared_up.role.name == "shared_up"


def test_renormalized_sigmoids_sum_to_1():
    model = MiniMoE(Config("mup", width=32, n_experts=8, top_k=3, gates="renormalized sigmoid", context=16))
    gates, experts = model.blocks[0].moe.choice(torch.rand(20, 8))
    torch.testing.assert_close(gates.sum(-1), torch.ones(20))
    scores = torch.rand(5, 8)
    gates, experts = model.blocks[0].moe.choice(scores)
    chosen = scores.gather(1, experts)
    torch.testing.assert_close(gates, chosen / chosen.sum(-1, keepdim=True))


def test_equal_experts_start_equal_and_the_rest_as_before():
    fields = {"width": 64, "n_experts": 4, "top_k": 2, "gates": "sigmoid", "context": 16}
    plain, same = MiniMoE(Config("mup", **fields)), MiniMoE(Config("mup", **fields, same_start=True))
    for name, value in plain.state_dict().items():
        if name.endswith((".up", ".down")):
            assert torch.equal(same.state_dict()[name], value[:1].expand_as(value))
        else:
            assert torch.equal(same.state_dict()[name], value)


@pytest.mark.parametrize(
    "gates", [{"gates": "renormalized"}, {"gates": "renormalized sigmoid"}, {"gates": "softmax", "top_k": 4}]
)
def test_equal_experts_with_gates_that_sum_to_1_are_refused(gates):
    """The router would get no gradient of the task: shown here, and then that the config says so."""
    fields = {"width": 32, "n_experts": 4, "top_k": 2, "context": 16} | gates
    model = MiniMoE(Config("mup", **fields)).double()
    with torch.no_grad():
        for block in model.blocks:
            block.moe.up.copy_(block.moe.up[:1].expand_as(block.moe.up))
            block.moe.down.copy_(block.moe.down[:1].expand_as(block.moe.down))
    batch = torch.randint(96, (4, 17), generator=torch.Generator().manual_seed(5))
    F.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
    assert model.blocks[0].moe.router.grad.abs().max() < 1e-12 < model.blocks[0].moe.up.grad.abs().max()
    with pytest.raises(ValueError, match="same_start=True: gates that sum to 1 would add equal experts up to one of them"):
        Config("mup", **fields, same_start=True)
    Config("mup", **fields | {"gates": "sigmoid"}, same_start=True)


def test_the_new_options_count_in_a_runs_identity_where_they_are_used():
    def key(**fields):
        return run_key(Config(width=32, context=16, n_experts=4, top_k=2, **fields), 0.01, 6, TrainOptions(), "text")

    assert key() == key(n_shared=0, same_start=False)
    several = [
        {},
        {"n_shared": 1},
        {"gates": "sigmoid"},
        {"gates": "sigmoid", "same_start": True},
        {"gates": "renormalized sigmoid"},
    ]
    assert len({key(**fields) for fields in several}) == len(several)


def test_shared_and_equal_experts_train_in_a_sweep(tmp_path, corpus):
    fields = {"context": 16, "n_experts": 4, "top_k": 2, "gates": "sigmoid", "same_start": True, "n_jobs": 1}
    fields |= {"options": TrainOptions(batch_size=4, eval_batches=2), "store": (store := tmp_path / "runs.jsonl")}
    frame = sweep((32,), ("mup",), [0.01], (0,), 6, corpus, n_shared=(0, 1), **fields)
    assert frame.n_shared.tolist() == [0, 1]
    assert frame.val_loss.nunique() == 2
    again = sweep((32,), ("mup",), [0.01], (0,), 6, corpus, n_shared=1, **fields)
    assert again.val_loss.tolist() == frame.val_loss[1:].tolist()
    assert len(store.read_text().splitlines()) == 2


def test_a_check_sees_shared_experts(corpus):
    small = {"seeds": (0,), "steps": 2, "n_jobs": 1, "context": 16, "corpus": corpus}
    table = exponents(coordinate_check("mup", (32, 64, 128), n_shared=2, gates="renormalized", **small))
    rows = table.set_index(["layer", "tensor", "quantity"])
    for tensor in ("shared up", "shared down"):
        for quantity in ("init", "update"):
            assert rows.loc[(0, tensor, quantity), "predicted"] == 0
            assert rows.loc[(0, tensor, quantity), "agrees"]
        assert (1, tensor, "allocation") in rows.index
    assert abs(table.closure.dropna() - 1).max() < 0.1


def test_the_printed_head_is_too_slow(corpus):
    """With an LR of 1 / n beside a multiplier of 1 / n the logits' update falls like 1 / n; CompleteP's head keeps it."""
    printed, mended = MUE, READINGS["complete-mue, completep's head"]
    for table, exponent in ((printed, -1), (mended, 0)):
        assert predicted_exponents(Config(table))["logits", "update"] == exponent
    fields = {"corpus": corpus, "context": 16, "seeds": (0,), "steps": 2, "n_jobs": 1, "gates": "renormalized sigmoid"}
    found = exponents(coordinate_check([printed, mended], (32, 64, 128), **fields))
    update = found[(found.tensor == "logits") & (found.quantity == "update")].set_index("parametrization").measured
    assert update["complete-mue"] == pytest.approx(-1, abs=0.25)
    assert update[mended.name] == pytest.approx(0, abs=0.25)


def test_every_cell_of_complete_mue_at_one_grown_shape():
    """Width x 4, depth x 2, from a dense model of four times the width to 2 of 8 experts and a shared one, each of the width."""
    config = Config(MUE, width=128, depth=4, n_experts=8, top_k=2, n_shared=1, expert_ratio=1, base_depth=2, base_expert_ratio=4,
                    **{name: value for name, value in BASE.items() if name not in ("width", "depth", "base_width")})  # fmt: skip
    config = replace(config, base_width=32)
    found = {name: n for name, n in tensor_numbers(config).items() if name.startswith(("blocks.0", "tok", "unemb"))}
    eps = 1 / (4 * 2)
    active = 3 * 128 / (4 * 32)  # hidden values of a token over the dense base's: 3
    down_std = (active / 4**2) ** 0.5 / 128**0.5  # the base's fan_in is 4 * 32
    expected = {
        "tokens": (1, 1, 1, eps),
        "blocks.0.attention.q": (0.5 / 32**0.5, 1, 1 / 4, eps),
        "blocks.0.attention.o": (0.5 / 32**0.5, 1 / 2, 1 / 4, eps),
        "blocks.0.moe.router": (0.5 / 32**0.5, 1, 1 / 4, eps),
        "blocks.0.moe.up": (0.5 / 32**0.5, 1, 1 / 4, eps),
        "blocks.0.moe.down": (down_std, 4 / active * 2 / 2, 1 / 4, eps),
        "blocks.0.moe.shared_down": (down_std, 4 / active / 2, 1 / 4, eps),
        "unembedding": (1 / 32**0.5, 1 / 4, 1 / 4, eps),
    }
    for name, numbers in expected.items():
        assert found[name][:4] == pytest.approx(numbers), name


def test_the_square_root_rule_moves_the_training_cells():
    table = square_root_rule(MUE, "complete-mue, batch")
    groups = MiniMoE(Config(table, width=32)).param_groups(0.01, 1e-8, 0.1, (0.9, 0.95), {"batch": 4.0, "duration": 4.0})
    plain = MiniMoE(Config(MUE, width=32)).param_groups(0.01, 1e-8, 0.1, (0.9, 0.95))
    assert [g["lr"] for g in groups] == [g["lr"] for g in plain]  # the same number of steps: nothing moves
    moved = MiniMoE(Config(table, width=32)).param_groups(0.01, 1e-8, 0.1, (0.9, 0.95), {"batch": 4.0, "duration": 1.0})
    for group, base in zip(moved, plain, strict=True):
        assert (group["lr"], group["weight_decay"], group["eps"]) == pytest.approx((2 * base["lr"], 0.2, base["eps"] / 2))
        assert group["betas"] == pytest.approx((1 - 4 * 0.1, 1 - 4 * 0.05))


def test_first_losses_lie_on_one_another_until_a_multiplier_is_wrong(corpus):
    """Dense, and all of its slices active: the same losses. Without the route scale: a gap."""
    config = dense(4)
    grown = mixture(config, 4, 4)
    broken = replace(grown, parametrization=FROZEN.replace("routed", "no route scale", multiplier=1))
    fields = {"corpus": corpus, "options": TrainOptions(batch_size=4), "seeds": (0, 1), "steps": 10}
    found = first_losses({"dense": config, "all active": grown, "broken": broken}, 2**-5, **fields)
    assert list(found.columns) == ["variant", "seed", "step", "loss"]
    assert len(found) == 3 * 2 * 10
    losses = found.pivot(index=["seed", "step"], columns="variant", values="loss")
    gap = losses.sub(losses.dense, axis=0).abs().groupby("step").mean()  # experts are drawn anew, so they agree as seeds do
    assert gap.broken.mean() > 1.5 * gap["all active"].mean()
    with pytest.raises(ValueError, match="steps=0: must be a positive integer"):
        first_losses({"dense": config}, 2**-5, 0, corpus=corpus)
    with pytest.raises(ValueError, match=r"variants=.*: must be name -> Config"):
        first_losses({}, 2**-5, corpus=corpus)


def test_the_arms_have_one_active_size():
    for name, arm in BRIDGE_ARMS.items():
        config = Config(arm.table, width=64, context=16, **arm.fields)
        assert config.active_width == 4 * 64, name
        assert name.endswith(f"{config.active_experts} of {config.experts}") or name == "dense" or config.shared_experts == 2


def test_losses_go_on_from_a_trained_dense_model(corpus):
    """Whole copies start at the trained model's loss and slices near it, on the text that comes next; each seed has its own."""
    config = dense(4)
    copies = replace(config, n_experts=4, top_k=2, parametrization=MUE)
    fields = {"corpus": corpus, "options": TrainOptions(batch_size=4), "seeds": (0, 1), "steps": 3}
    variants = {"dense": replace(config, parametrization=MUE), "copies": copies}
    found = first_losses(variants, 2**-5, **fields, dense=variants["dense"], dense_steps=20)
    start = found[found.step == 0].pivot(index="seed", columns="variant", values="loss")
    assert start["copies"].tolist() == pytest.approx(start["dense"].tolist(), abs=1e-5)
    untrained = first_losses(variants, 2**-5, **fields)
    assert (start["dense"] < untrained[untrained.step == 0].loss.min()).all()
    assert start["dense"].nunique() == 2
    with pytest.raises(ValueError, match="depth=1: the dense model has 2"):
        first_losses({"shallow": replace(copies, depth=1)}, 2**-5, **fields, dense=config, dense_steps=2)


def test_arms_of_other_active_sizes_start_alike_and_without_the_factor_do_not():
    """The std of the mixture's output at init, over the dense model's of the base size."""
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    base = {
        "base_width": 64,
        "base_n_experts": 1,
        "base_top_k": 1,
        "base_granularity": 1,
        "base_expert_ratio": 4,
        "base_n_shared": 0,
    }

    def std(arm):
        return MiniMoE(Config(arm.table, width=64, context=16, **base, **arm.fields)).blocks[0].moe(x)[0].std().item()

    reference, active = std(BRIDGE_ARMS["dense"]), {"n": 64, "16 n": 16 * 64, "32 n": 32 * 64}
    for name, arm in CAPACITY_ARMS.items():
        size = name.split(", ")[-1]
        assert Config(arm.table, width=64, **arm.fields).active_width == active.get(size, 8 * 64)
        expected = (active[size] / (4 * 64)) ** 0.5 if name.startswith("A = 1") else 1
        assert std(arm) / reference == pytest.approx(expected, rel=0.15), name
