"""The experts' arithmetic against one small network per expert, on both paths, alone and with a run axis."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap

from minimoe import grouped
from minimoe.grouped import activated, activation_gradient, expert_mixture

PATHS = {
    "in turn": (grouped._forward_in_turn, grouped._backward_in_turn),
    "in blocks": (grouped._forward_in_blocks, grouped._backward_in_blocks),
}


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Run the test on the CPU's path and, on the CPU too, on the GPU's."""
    forward, backward = PATHS[request.param]
    monkeypatch.setattr(grouped, "_forward_in_turn", forward)
    monkeypatch.setattr(grouped, "_backward_in_turn", backward)


def arguments(sizes, n=5, d=3, m=2, activation="relu", seed=0):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=draw).requires_grad_()

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
    outs = [f(q, k, v, 0.25) for f in (grouped.attention, grouped._Attention.apply)]
    torch.testing.assert_close(*outs)
    gradients = [torch.autograd.grad(out.sin().sum(), (q, k, v)) for out in outs]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("error")  # torch's own fallback, one run after the other, would warn
def test_attention_folds_runs_into_sequences():
    q, k, v = (x.detach() for x in attention_inputs(runs=(3,)))
    loss = lambda q, k, v: grouped._Attention.apply(q, k, v, 0.25).sin().sum()  # noqa: E731
    together = vmap(grad(loss, argnums=(0, 1, 2)))(q, k, v)
    for i in range(3):
        alone = grad(lambda *t: grouped.attention(*t, 0.25).sin().sum(), argnums=(0, 1, 2))(q[i], k[i], v[i])
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[i], b)
