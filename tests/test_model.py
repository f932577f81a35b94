"""The model: shapes, routing, the dense oracle, granularity, causality, saving."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils.flop_counter import FlopCounterMode

from minimoe import PARAMETRIZATIONS, Config, MiniMoE, Parametrization, Rule, check_tokens, explain, fan_in
from minimoe.config import GATES, RENORMALIZED
from minimoe.model import MoE, mixture_by_mask, rms_norm
from minimoe.parametrization import ratio
from minimoe.roles import initialise
from minimoe.step import losses


def tokens(batch=2, time=16, vocab=96, seed=0):
    return torch.randint(vocab, (batch, time), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n_experts": 1, "top_k": 1},
        {"granularity": 4, "gates": "renormalized"},
        {"activation": "swiglu"},
        {"activation": "gelu", "forced_balance": True},
    ],
)
def test_forward_returns_the_same_named_tuple_always(fields):
    config = Config(width=64, **fields)
    out = MiniMoE(config)(tokens())
    assert out._fields == ("logits", "balance_loss", "router_logits", "load")
    assert out.logits.shape == (2, 16, 96)
    assert out.balance_loss.shape == ()
    assert out.router_logits.shape == (2, 2, 16, config.experts)
    assert out.load.shape == (2, config.experts)
    assert torch.allclose(out.load.sum(-1), torch.ones(2))
    assert not out.load.requires_grad


def moe_and_input(config, n, seed=0):
    torch.manual_seed(seed)
    moe = initialise(MoE(config), config.parametrization, seed).double()
    return moe, torch.randn(n, config.width, dtype=torch.float64, requires_grad=True)


@settings(max_examples=60, deadline=None)
@given(
    experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    granularity=st.sampled_from([1, 2, 4]),
    n=st.integers(1, 40),
    activation=st.sampled_from(["relu", "gelu", "swiglu"]),
    gates=st.sampled_from(GATES),
    name=st.sampled_from(["sp", "mup"]),
    seed=st.integers(0, 10),
)
def test_the_fast_expert_path_equals_the_dense_oracle(experts, top_k, granularity, n, activation, gates, name, seed):
    assume(top_k <= experts)
    assume(not (gates in RENORMALIZED and top_k * granularity == 1 and experts > 1))
    config = Config(
        name, 64, head_size=16, n_experts=experts, top_k=top_k, granularity=granularity, activation=activation,
        gates=gates,
    )  # fmt: skip
    moe, x = moe_and_input(config, n, seed)
    weights = [x, *moe.parameters()]
    outputs, gradients = [], []
    for mixture in (None, mixture_by_mask):
        gates, chosen = moe.choice(moe.scores(moe.router_logits(x)))
        out = moe(x)[0] if mixture is None else mixture(moe, x, gates, chosen)
        outputs.append(out)
        gradients.append(torch.autograd.grad(out.sin().sum(), weights, allow_unused=True))
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    for fast, slow in zip(*gradients, strict=True):
        slow = torch.zeros_like(fast) if slow is None else slow  # a dense gate has no gradient
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)


def test_an_expert_without_tokens_gets_zero_gradient_and_harms_nothing():
    config = Config(width=32, n_experts=8, top_k=2)
    moe, x = moe_and_input(config, 3)  # three tokens use at most six of eight experts
    out, _, _, load = moe(x)
    idle = load == 0
    assert idle.sum() >= 2
    out.sum().backward()
    assert moe.up.grad[idle].abs().max() == 0
    assert moe.up.grad[~idle].abs().max() > 0
    gates, chosen = moe.choice(moe.scores(moe.router_logits(x)))
    torch.testing.assert_close(out, mixture_by_mask(moe, x, gates, chosen), rtol=1e-9, atol=1e-9)


def counted_flops(config, n=12):
    """What one block's MoE really computes for n tokens, by torch's own counter."""
    moe, x = moe_and_input(config, n)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        moe(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_granularity_keeps_expert_parameters_and_flops_and_grows_the_router(activation):
    configs = [Config(width=64, granularity=g, activation=activation) for g in (1, 2, 4, 8)]
    tables = [explain(config).groupby("role")[["parameters", "flops"]].sum() for config in configs]
    experts = [table.loc[["experts_up", "experts_down"]].sum().tolist() for table in tables]
    router = [table.loc["router"].tolist() for table in tables]
    matrices = 3 if activation == "swiglu" else 2
    assert experts == [[2 * 8 * matrices * 64 * 128, 2 * 2 * 2 * matrices * 64 * 128]] * 4  # 2 layers; 8 experts, 2 active
    assert router == [[2 * 64 * 8 * g, 2 * 2 * 64 * 8 * g] for g in (1, 2, 4, 8)]
    for config, table in zip(configs, tables, strict=True):
        block = table.flops[["experts_up", "experts_down", "router"]].sum() / 2
        assert counted_flops(config, n=12) == 12 * block


@settings(max_examples=30, deadline=None)
@given(experts=st.integers(1, 8), top_k=st.integers(1, 8), granularity=st.sampled_from([1, 2, 4, 8]), sequences=st.integers(1, 3))
def test_balance_loss_is_one_at_perfect_balance(experts, top_k, granularity, sequences):
    assume(top_k <= experts)
    config = Config(width=32, depth=2, n_experts=experts, top_k=top_k, granularity=granularity, forced_balance=True, context=64)
    time = experts * granularity  # then the slots of each sequence go round evenly
    out = MiniMoE(config)(tokens(sequences, time))
    torch.testing.assert_close(out.load, torch.full_like(out.load, 1 / config.experts))
    torch.testing.assert_close(out.balance_loss, torch.tensor(1.0), rtol=1e-5, atol=1e-5)


def test_imbalance_costs_more_than_one():
    config = Config(width=32, n_experts=4, top_k=1)
    moe, x = moe_and_input(config, 64)
    with torch.no_grad():
        moe.router.zero_()
        moe.router[:, 0] = 10 * x.detach().mean(0)  # everybody likes expert 0
        x = x.detach() * 0.1 + x.detach().mean(0) * 10
    balance_loss, load = moe(x)[1], moe(x)[3]
    assert load[0] > 0.9
    assert balance_loss > 2


def test_forced_balance_sends_slot_j_of_token_t_to_the_expert_in_turn():
    config = Config(width=32, n_experts=6, top_k=2, granularity=2, forced_balance=True)
    moe, x = moe_and_input(config, 9)
    probabilities = moe.scores(moe.router_logits(x))
    gates, chosen = moe.choice(probabilities)
    for t in range(9):
        for j in range(4):
            expert = (t * 4 + j) % 12
            assert chosen[t, j] == expert
            assert gates[t, j] == probabilities[t, expert]


def test_gates_are_raw_or_renormalised():
    for kind in ("softmax", "renormalized"):
        moe, x = moe_and_input(Config(width=32, gates=kind), 20)
        probabilities = moe.scores(moe.router_logits(x))
        gates, chosen = moe.choice(probabilities)
        assert torch.equal(chosen.sort(-1).values, probabilities.argsort(-1, descending=True)[:, :2].sort(-1).values)
        if kind == "renormalized":
            torch.testing.assert_close(gates.sum(-1), torch.ones(20, dtype=torch.float64))
        else:
            assert torch.equal(gates, probabilities.gather(1, chosen))


def test_a_dense_model_is_one_expert_and_has_no_router():
    model = MiniMoE(Config(width=32, n_experts=1, top_k=1))
    assert {p.role.name for p in model.parameters()} == {
        "embedding", "unembedding", "attention", "attention_out", "experts_up", "experts_down"
    }  # fmt: skip
    moe = model.blocks[0].moe
    x = torch.randn(5, 32)
    torch.testing.assert_close(moe(x)[0], torch.relu(x @ moe.up[0]) @ moe.down[0])
    assert model(tokens()).balance_loss == 1


@settings(max_examples=20, deadline=None)
@given(
    cut=st.integers(1, 15), seed=st.integers(0, 100), fields=st.sampled_from([{}, {"granularity": 2}, {"forced_balance": True}])
)
def test_a_later_token_never_changes_an_earlier_logit(cut, seed, fields):
    model = MiniMoE(Config(width=32, **fields)).double()
    one, two = tokens(1, seed=seed), tokens(1, seed=seed)
    two[:, cut:] = tokens(1, 16 - cut, seed=seed + 1)
    assume(not torch.equal(one, two))
    before, after = model(one).logits, model(two).logits
    torch.testing.assert_close(before[:, :cut], after[:, :cut], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before[:, cut:], after[:, cut:])


def test_attention_scores_do_not_depend_on_the_width_by_their_scale():
    config = Config(width=64)
    model = MiniMoE(config)
    attention = model.blocks[0].attention
    x = rms_norm(torch.randn(1, 4, 64))
    q, k, v = (x @ w for w in (attention.q, attention.k, attention.v))
    out = torch.zeros(1, 4, 64)
    for head in range(4):
        part = slice(16 * head, 16 * head + 16)
        for t in range(4):
            scores = (q[0, t, part] * k[0, : t + 1, part]).sum(-1) / 16
            out[0, t, part] = torch.softmax(scores, 0) @ v[0, : t + 1, part]
    torch.testing.assert_close(attention(x), out @ attention.o, rtol=1e-4, atol=1e-5)


def test_the_model_is_reproducible_from_its_seed():
    one, two, other = (MiniMoE(Config(seed=seed)).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["tokens"], other["tokens"])


def saved_bytes(config, batch):
    """Bytes that the forward pass keeps for the backward pass, without the parameters."""
    model, kept = MiniMoE(config), {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(batch)
    assert out.logits.requires_grad
    return sum(size for size, _ in kept.values())


def test_memory_grows_with_active_experts_and_not_with_all():
    batch = tokens(8, 64)
    few, many = (saved_bytes(Config(width=64, n_experts=experts), batch) for experts in (8, 128))
    router = 4 * 2 * batch.numel() * (128 - 8)  # one number per token, expert and layer
    assert many - few < 6 * router  # logits, probabilities and their like
    assert saved_bytes(Config(width=64, top_k=8), batch) > 1.8 * few


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_it_runs_under_vmap_of_grad_each_run_with_its_own_multipliers():
    models = [MiniMoE(Config(name, 64, seed=seed, granularity=2)) for name in ("sp", "mup") for seed in (0, 1)]
    batch = torch.stack([tokens(4, 17, seed=i) for i in range(4)])
    parameters, buffers = stack_module_state(models)

    def loss(parameters, buffers, batch):
        return losses(lambda tokens: functional_call(models[0], (parameters, buffers), (tokens,)), models[0].config, batch)[0]

    stacked = vmap(grad(loss))(parameters, buffers, batch)
    for i, model in enumerate(models):
        losses(model, model.config, batch[i])[0].backward()
        for name, param in model.named_parameters():
            torch.testing.assert_close(stacked[name][i], param.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["mup", "edited"])
def test_save_and_load_give_equal_logits(tmp_path, name):
    table = PARAMETRIZATIONS["simplep"].replace("router", lr=1 / fan_in) if name == "edited" else name
    model = MiniMoE(Config(parametrization=table, width=64, granularity=2))
    model.save(tmp_path / "model.pt")
    loaded = MiniMoE.load(tmp_path / "model.pt")
    assert loaded.config == model.config
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_a_double_model_stays_double(tmp_path):
    model = MiniMoE(Config(width=32)).double()
    model.save(tmp_path / "model.pt")
    assert torch.equal(MiniMoE.load(tmp_path / "model.pt")(tokens()).logits, model(tokens()).logits)


def test_loading_something_else_is_one_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        MiniMoE.load(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    for name in ("text.pt", "other.pt"):
        with pytest.raises(ValueError, match="is not a model saved by minimoe"):
            MiniMoE.load(tmp_path / name)


def test_generate_appends_tokens_beyond_the_context():
    model = MiniMoE(Config(width=32, context=8, vocab_size=10))
    prompt = tokens(2, 3, vocab=10)
    out = model.generate(prompt, 12, seed=4)
    assert out.shape == (2, 15)
    assert torch.equal(out[:, :3], prompt)
    assert torch.equal(out, model.generate(prompt, 12, seed=4))
    greedy = model.generate(prompt, 1, temperature=0)
    assert torch.equal(greedy[:, -1], model(prompt).logits[:, -1].argmax(-1))
    for bad in (
        {"tokens": prompt[:, :0], "n": 1},
        {"tokens": prompt + 10, "n": 1},
        {"tokens": prompt, "n": 1, "temperature": -1},
    ):
        with pytest.raises(ValueError):
            model.generate(**bad)


def test_bad_tokens_and_long_sequences_are_refused():
    check_tokens(tokens(), 96)
    with pytest.raises(ValueError, match=r"tokens must lie in \[0, 10\)"):
        check_tokens(torch.tensor([[0, 10]]), 10)
    with pytest.raises(ValueError, match="tokens must lie in"):
        check_tokens(torch.tensor([[-1]]), 10)
    with pytest.raises(ValueError, match="must be int64"):
        check_tokens(torch.zeros(1, 1), 10)
    with pytest.raises(ValueError, match="65 tokens is longer than context=64"):
        MiniMoE(Config())(tokens(1, 65))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 40}, "width=40: must be a multiple of head_size=16"),
        ({"top_k": 9}, "top_k=9: must be at most n_experts=8"),
        ({"granularity": 3}, "granularity=3: must divide the experts' hidden size, expert_ratio \\* width = 128"),
        ({"granularity": 128, "base_granularity": 128}, "base_granularity=128: must divide .* base_width = 64"),
        ({"width": 0}, "width=0: must be a positive integer"),
        ({"depth": -1}, "depth=-1: must be a positive integer"),
        ({"n_experts": 0}, "n_experts=0"),
        ({"base_width": 0}, "base_width=0"),
        ({"seed": -1}, "seed=-1"),
        ({"balance_weight": -0.1}, "balance_weight=-0.1: must be finite and not negative"),
        ({"z_weight": float("nan")}, "z_weight=nan"),
        ({"activation": "tanh"}, "activation='tanh': must be one of relu, gelu, swiglu"),
        ({"parametrization": "np"}, "unknown parametrization 'np'; known: sp, simplep, mup"),
        ({"gates": "renormalized", "top_k": 1}, "gates='renormalized': with top_k \\* granularity = 1 .* no task gradient"),
        ({"base_top_k": 9}, "base_top_k=9: must be at most base_n_experts=8"),
        ({"base_width": 40}, "base_width=40: must be a multiple of head_size=16"),
        ({"width": 128, "head_size": 64}, "base_width=32: must be a multiple of head_size=64"),
        ({"gates": "renormalized", "base_top_k": 1}, "base_top_k \\* base_granularity = 1 .* no task gradient"),
        ({"parametrization": Parametrization("half", {"router": Rule()})}, "'half' has no rule for embedding, unembedding"),
        ({"parametrization": PARAMETRIZATIONS["mup"].replace("router", lr=1 / ratio("heads"))}, "unknown ratio heads"),
        ({"seed": 2**63}, "seed=9223372036854775808: must be an integer from 0"),
    ],
)
def test_every_bad_config_is_refused_early_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**fields)


@pytest.mark.parametrize("fields", [{"width": 64.0}, {"width": "64"}, {"depth": True}, {"gates": 1}, {"balance_weight": "x"}])
def test_wrong_types_are_refused(fields):
    with pytest.raises(TypeError, match=next(iter(fields))):
        Config(**fields)


def test_numpy_numbers_are_numbers_and_an_edited_copy_keeps_its_defaults():
    assert Config(width=np.int64(64), balance_weight=np.float32(0.5)) == Config(width=64, balance_weight=0.5)
    assert dataclasses.replace(Config(), depth=4) == Config(depth=4)


def test_renormalised_gates_are_allowed_where_the_router_still_learns():
    Config(gates="renormalized", top_k=1, granularity=2)
    Config(gates="renormalized", n_experts=1, top_k=1)


@given(
    width=st.integers(1, 16).map(lambda n: 16 * n),
    experts=st.integers(1, 64),
    top_k=st.integers(1, 64),
    granularity=st.integers(1, 16),
)
def test_every_config_is_either_refused_or_consistent(width, experts, top_k, granularity):
    try:
        config = Config(width=width, n_experts=experts, top_k=top_k, granularity=granularity)
    except ValueError:
        assert top_k > experts or (2 * width) % granularity or 64 % granularity
        return
    assert config.expert_width * granularity == 2 * width
    assert config.active_experts <= config.experts
    assert config.base.width == 32
    assert config.ratios["width"] == width / 32
