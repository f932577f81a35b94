"""The experts' arithmetic against one small network per expert, on every path, alone and with a run axis."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap

from minimoe import Config, MiniMoE
from minimoe import experts as module
from minimoe.experts import activated, activation_gradient, expert_mixture, slot_counts
from minimoe.products import can_be_grouped
from minimoe.step import losses

PATHS = {
    "in turn": (module._forward_in_turn, module._backward_in_turn),
    "in blocks": (module._forward_in_blocks, module._backward_in_blocks),
}


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Run the test on the CPU's path and, on the CPU too, on the GPU's."""
    forward, backward = PATHS[request.param]
    monkeypatch.setattr(module, "_forward_in_turn", forward)
    monkeypatch.setattr(module, "_backward_in_turn", backward)


def arguments(sizes, n=5, d=3, m=2, activation="relu", seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=dtype, generator=draw).requires_grad_()

    token = torch.randint(n, (sum(sizes),), generator=draw)
    columns = 2 * m if activation == "swiglu" else m
    tensors = (normal(n, d), normal(sum(sizes)), normal(len(sizes), d, columns), normal(len(sizes), m, d))
    return tensors, token, torch.tensor(sizes)


def plainly(tensors, token, counts, activation):
    x, gate, up, down = tensors
    rows, start = torch.zeros_like(x), 0
    for e, size in enumerate(counts.tolist()):
        for i in range(start, start + size):
            y = gate[i] * (activated(activation, x[token[i]] @ up[e]) @ down[e])
            rows = rows + torch.nn.functional.one_hot(token[i], len(x))[:, None] * y
        start += size
    return rows


def mixture(tensors, token, counts, activation):
    x, gate, up, down = tensors
    return expert_mixture(x, token, gate, counts, up, down, activation)


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
@pytest.mark.parametrize("sizes", [[3], [2, 0, 4], [0, 0, 5, 1], [40, 1, 0, 33]])
def test_it_equals_one_network_per_expert(path, sizes, activation):
    tensors, token, counts = arguments(sizes, activation=activation)
    outputs = [f(tensors, token, counts, activation) for f in (mixture, plainly)]
    torch.testing.assert_close(*outputs)
    gradients = [torch.autograd.grad(out.sin().sum(), tensors) for out in outputs]
    for fast, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, plain)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 70), min_size=1, max_size=6).filter(any), seed=st.integers(0, 9))
def test_both_paths_agree(sizes, seed):
    tensors, token, counts = arguments(sizes, n=40, seed=seed)
    x, gate, up, down = (tensor.detach() for tensor in tensors)
    outs = []
    for forward, backward in PATHS.values():
        out, pre = forward(x, token, gate, counts, up, down, "gelu")
        outs.append((out, pre, *backward(out.sin(), x, token, gate, counts, up, down, pre, "gelu")))
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
@pytest.mark.parametrize("sizes", [[3], [2, 0, 4], [0, 0, 5, 1], [40, 1, 0, 33]])
def test_the_grouped_path_equals_the_others(sizes, activation):
    """In float32: torch's grouped product has no float64."""
    tensors, token, counts = arguments(sizes, n=8, d=8, m=4, activation=activation, dtype=torch.float32)
    x, gate, up, down = tensors
    paths = (module._grouped, module._in_turn_or_blocks, module._in_blocks)
    outputs = [path(x, token, gate, counts, up, down, activation) for path in paths]
    gradients = [torch.autograd.grad(out.sin().sum(), tensors) for out in outputs]
    for out, gradient in zip(outputs[1:], gradients[1:], strict=True):
        torch.testing.assert_close(out, outputs[0], rtol=1e-5, atol=1e-5)
        for one, other in zip(gradient, gradients[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def paths_taken(monkeypatch, run):
    taken = []
    for name in ("_grouped", "_in_blocks", "_in_turn_or_blocks"):
        path = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, path=path: taken.append(name) or path(*a))
    run()
    return set(taken)


@pytest.mark.parametrize(
    ("sizes", "dtype", "compiling", "expected"),
    [({}, torch.float32, False, "_in_turn_or_blocks"), ({}, torch.float32, True, "_grouped"),
     ({"m": 3}, torch.float32, True, "_in_blocks"), ({"d": 6}, torch.float32, True, "_in_blocks"),
     ({}, torch.float64, True, "_in_blocks")],
)  # fmt: skip
def test_the_path_follows_from_the_place_and_the_sizes(sizes, dtype, compiling, expected, monkeypatch):
    tensors, token, counts = arguments([2, 0, 4], **{"d": 8, "m": 4} | sizes, dtype=dtype)
    monkeypatch.setattr(module, "is_compiling", lambda: compiling)
    assert paths_taken(monkeypatch, lambda: mixture(tensors, token, counts, "relu")) == {expected}


def test_on_a_gpu_one_run_is_grouped_and_many_are_in_blocks(monkeypatch):
    """The choice alone, on tensors without values: a torch without CUDA has no kernels for them."""
    (x, _, up, down), _, _ = arguments([2, 0, 4], d=8, m=4, dtype=torch.float32)
    gpu = [torch.empty(t.shape, device="meta") for t in (x, up, down)]
    assert module._path(*gpu) is module._grouped
    taken = []
    vmap(lambda x: taken.append(module._path(x, *gpu[1:])) or x)(gpu[0])
    assert taken == [module._in_turn_or_blocks]


@pytest.mark.parametrize("path", ["_grouped", "_in_blocks", "_in_turn_or_blocks"])
def test_products_in_bfloat16_are_near_those_in_float32(path, monkeypatch):
    tensors, token, counts = arguments([40, 1, 0, 33], n=8, d=8, m=8, activation="gelu", dtype=torch.float32)
    exact = mixture(tensors, token, counts, "gelu")
    monkeypatch.setattr(module, "_path", lambda *_: getattr(module, path))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = mixture(tensors, token, counts, "gelu")
    assert rounded.dtype == torch.float32
    for one, other in [(exact, rounded), *zip(*(torch.autograd.grad(o.sum(), tensors) for o in (exact, rounded)), strict=True)]:
        assert other.dtype == torch.float32
        difference = torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(one)
        assert 0 < difference < 0.02


def test_slots_are_counted_exactly_in_bfloat16():
    """bfloat16 has 8 bits: counts above 256 would be rounded."""
    model = MiniMoE(Config(width=32, n_experts=2, top_k=2, depth=1))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.zeros(9, 57, dtype=torch.int64))
    assert slot_counts(torch.zeros(513, 1, dtype=torch.int64), 2).tolist() == [513, 0]
    assert out.load.tolist() == [[0.5, 0.5]]
    assert out.load.dtype == out.logits.dtype == out.router_logits.dtype == torch.float32


@pytest.mark.parametrize(
    "fields",
    [{}, {"granularity": 4, "gates": "renormalized"}, {"activation": "swiglu"}, {"activation": "gelu", "z_weight": 0.1},
     {"n_experts": 1, "top_k": 1}, {"forced_balance": True}, {"gates": "sigmoid", "bias_rate": 0.1, "gains": True},
     {"expert_ratio": 1, "granularity": 32}],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_compiled_model_is_the_eager_one(fields, dtype):
    """The whole model as one graph, forward and backward. The last shape's rows are too short for the grouped product."""
    config = Config(width=32, context=16, **fields)
    batch = torch.randint(96, (4, 17), generator=torch.Generator().manual_seed(0))
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = MiniMoE(config)
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        with torch.autocast("cpu", dtype, enabled=dtype is not None, cache_enabled=False):
            loss, cross_entropy = losses(run, config, batch)
        loss.backward()
        results.append((loss.detach(), cross_entropy.detach(), *(p.grad for p in model.parameters())))
    for eager, compiled in zip(*results, strict=True):
        if dtype is None:
            torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-6)
        else:
            assert torch.linalg.vector_norm(eager - compiled) <= 0.05 * torch.linalg.vector_norm(eager)


def test_what_torchs_grouped_product_takes():
    rows, aligned, short = (torch.empty(3, columns) for columns in (8, 12, 6))
    assert can_be_grouped(rows, aligned)
    assert not can_be_grouped(rows, short)
    assert not can_be_grouped(rows.double(), aligned.double())
    assert not can_be_grouped(rows.bfloat16(), aligned.bfloat16())  # 12 columns are 24 bytes


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
def test_activation_gradients_are_autograds(activation):
    pre = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = activated(activation, pre)
    (expected,) = torch.autograd.grad(out, pre, torch.cos(out))
    torch.testing.assert_close(activation_gradient(activation, torch.cos(out).detach(), pre.detach()), expected)


def test_the_derivative_is_right_by_differences(path):
    tensors, token, counts = arguments([2, 0, 4], activation="gelu")
    assert torch.autograd.gradcheck(lambda *t: mixture(t, token, counts, "gelu"), tensors)


def test_it_is_differentiable_once_and_says_so():
    tensors, token, counts = arguments([2, 3])
    (first,) = torch.autograd.grad(mixture(tensors, token, counts, "relu").sum(), tensors[:1], create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError)):
        first.sum().backward()


def test_runs_fold_into_experts(path):
    runs = [arguments(sizes, seed=i) for i, sizes in enumerate(([2, 0, 4], [1, 5, 0], [0, 0, 6]))]
    stacked = [torch.stack(ts).detach() for ts in zip(*(r[0] for r in runs), strict=True)]
    token, counts = torch.stack([r[1] for r in runs]), torch.stack([r[2] for r in runs])

    def loss(tensors, token, counts):
        return mixture(tensors, token, counts, "relu").sin().sum()

    together = vmap(grad(loss))(tuple(stacked), token, counts)
    for i, (tensors, token_i, counts_i) in enumerate(runs):
        alone = torch.autograd.grad(loss(tensors, token_i, counts_i), tensors)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i], b)


def test_runs_that_share_an_argument(path):
    (x, gate, up, down), token, counts = arguments([2, 0, 4])
    ups = torch.stack([up, 2 * up]).detach()
    together = vmap(lambda u: expert_mixture(x, token, gate, counts, u, down, "relu"))(ups)
    torch.testing.assert_close(together[1], 2 * together[0])
    torch.testing.assert_close(together[0], mixture((x, gate, up, down), token, counts, "relu"))


def attention_inputs(runs=()):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(*runs, 2, 3, 5, 4, dtype=torch.float64, generator=draw).requires_grad_() for _ in range(3)]


def test_attention_on_a_gpus_path_is_the_plain_one():
    q, k, v = attention_inputs()
    outs = [f(q, k, v, 0.25) for f in (module.attention, module._Attention.apply)]
    torch.testing.assert_close(*outs)
    gradients = [torch.autograd.grad(out.sin().sum(), (q, k, v)) for out in outs]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("error")  # torch's own fallback, one run after the other, would warn
def test_attention_folds_runs_into_sequences():
    q, k, v = (x.detach() for x in attention_inputs(runs=(3,)))
    loss = lambda q, k, v: module._Attention.apply(q, k, v, 0.25).sin().sum()  # noqa: E731
    together = vmap(grad(loss, argnums=(0, 1, 2)))(q, k, v)
    for i in range(3):
        alone = grad(lambda *t: module.attention(*t, 0.25).sin().sum(), argnums=(0, 1, 2))(q[i], k[i], v[i])
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i], b)
