"""The experts' arithmetic: many feed-forward networks, each on rows of its own, in one differentiable call; and attention.

Letters: R runs, N tokens, D width, E experts, K active experts per token, S = N*K rows sorted by expert, M hidden size of
one expert (the up projection has 2M columns for swiglu).

*R runs of E experts are R*E experts*: the vmap rules here fold the run axis into the token and expert axes, so that a
model written for one run trains many at once under `torch.func.vmap`.

There are three paths, and `expert_mixture` chooses:

in turn    On a CPU the experts take turns. Each one's rows, hidden values and gradients stay in the cache: between the
           products there is no pass over memory.
grouped    One run on a GPU, and whatever torch.compile compiles: torch's grouped matrix product, in plain autograd.
in blocks  Many runs on a GPU, under vmap, for which torch's grouped product has no rule. Rows are padded to blocks that
           belong to one expert each, so that every shape is known in advance and nothing is read back from the device.

Under `torch.autocast` the matrix products are in its dtype. Gates, sums over experts and the result stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling
from torch.nn import functional as F

from .products import can_be_grouped, grouped_product

BLOCK = 32  # rows of a block on a GPU


def slot_counts(experts: Tensor, number: int) -> Tensor:
    """(N, K) expert numbers -> (E,) how many of the N*K slots each of the `number` experts serves. Integers: exact in any
    precision of the model."""
    slots = experts.flatten()
    return slots.new_zeros(number).scatter_add(0, slots, torch.ones_like(slots))


def sorted_mixture(moe, x: Tensor, gates: Tensor, experts: Tensor) -> Tensor:
    """`model.mixture_by_mask`, where each expert computes its own tokens only: the S slots are sorted, expert by expert.

    moe: its weights, multipliers and config; x (N, D); gates and experts (N, K) -> (N, D).
    """
    counts = slot_counts(experts, moe.config.experts)
    order = experts.flatten().argsort(stable=True)  # (S,)
    gate = (moe.down_multiplier * gates).flatten().index_select(0, order)  # (S,); a multiplier is cheapest here
    token = order // experts.shape[1]  # (S,)
    return expert_mixture(moe.up_multiplier * x, token, gate, counts, moe.up, moe.down, moe.config.activation)


def expert_mixture(x: Tensor, token: Tensor, gate: Tensor, counts: Tensor, up: Tensor, down: Tensor, activation: str) -> Tensor:
    """Row t of the result is the sum, over the slots i with token[i] == t, of gate[i] * expert(x[t]).

    x (N, D), token (S,) and gate (S,) sorted by expert, counts (E,) of slots per expert that sum to S, up (E, D, M),
    down (E, M, D), activation relu, gelu or swiglu -> (N, D), of the gate's dtype. Differentiable once, in x, gate, up and
    down.
    """
    if torch.is_autocast_enabled(x.device.type):
        x, up, down = (tensor.to(torch.get_autocast_dtype(x.device.type)) for tensor in (x, up, down))
    return _path(x, up, down)(x, token, gate, counts, up, down, activation)


def _path(x: Tensor, up: Tensor, down: Tensor) -> Callable:
    """The function that computes the mixture: see the top of this file."""
    if not is_compiling() and (x.device.type == "cpu" or _under_vmap()):
        return _in_turn_or_blocks
    return _grouped if can_be_grouped(x, up, down) else _in_blocks


def _under_vmap() -> bool:
    """Whether a transform of torch.func is active. (torch's own `Function.apply` asks the same.)"""
    return torch._C._are_functorch_transforms_active()


def _grouped(x, token, gate, counts, up, down, activation):
    """The mixture in torch's own differentiable functions."""
    ends = counts.cumsum(0).to(torch.int32)
    pre = grouped_product(x.index_select(0, token), up, ends)  # (S, M)
    gated = activated(activation, pre) * gate[:, None]
    rows = grouped_product(gated.to(down.dtype), down, ends)  # (S, D)
    return _summed(rows, token, gate, x)


def _in_blocks(x, token, gate, counts, up, down, activation):
    """The mixture in padded blocks, in plain autograd: for sizes that the grouped product refuses."""
    return _forward_in_blocks(x, token, gate, counts, up, down, activation)[0]


def _in_turn_or_blocks(*arguments):
    """The mixture with a backward pass of its own and rules for vmap."""
    return _Mixture.apply(*arguments)[0]


def _summed(rows: Tensor, token: Tensor, gate: Tensor, like: Tensor) -> Tensor:
    """(S, D) rows -> (N, D), of the gate's dtype: each token's sum."""
    return gate.new_zeros(like.shape).index_add(0, token, rows.to(gate.dtype))


def activated(activation: str, pre: Tensor) -> Tensor:
    """(..., M) -> (..., M), or (..., 2M) -> (..., M) for swiglu."""
    if activation == "swiglu":
        gate, up = pre.chunk(2, dim=-1)
        return F.silu(gate) * up
    return F.relu(pre) if activation == "relu" else F.gelu(pre)


def activation_gradient(activation: str, grad: Tensor, pre: Tensor) -> Tensor:
    """The gradient at `pre` from the gradient at `activated(pre)`."""
    if activation == "swiglu":
        gate, up = pre.chunk(2, dim=-1)
        return torch.cat([torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)], dim=-1)
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, pre, 0)
    return torch.ops.aten.gelu_backward(grad, pre)


def _by_turns(x: Tensor, gate: Tensor) -> bool:
    """Whether the experts take turns: on a CPU, in one precision."""
    return x.device.type == "cpu" and x.dtype == gate.dtype


class _Mixture(Function):
    """Returns (out, pre-activations): the second is kept for the backward pass."""

    @staticmethod
    def forward(x, token, gate, counts, up, down, activation):
        path = _forward_in_turn if _by_turns(x, gate) else _forward_in_blocks
        return path(x, token, gate, counts, up, down, activation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.activation = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx, grad, _):
        d_x, d_gate, d_up, d_down = _MixtureGradient.apply(grad, *ctx.saved_tensors, ctx.activation)
        return d_x, None, d_gate, None, d_up, d_down, None

    @staticmethod
    def vmap(info, in_dims, x, token, gate, counts, up, down, activation):
        tensors = _batched(info, in_dims, x, token, gate, counts, up, down)
        out, pre = _Mixture.apply(*_folded(*tensors), activation)
        return (out.unflatten(0, tensors[0].shape[:2]), pre.unflatten(0, (info.batch_size, -1))), (0, 0)


class _MixtureGradient(Function):
    """The backward pass, a function of its own so that it too can fold the run axis."""

    @staticmethod
    def forward(grad, x, token, gate, counts, up, down, pre, activation):
        path = _backward_in_turn if _by_turns(x, gate) else _backward_in_blocks
        return path(grad, x, token, gate, counts, up, down, pre, activation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError("expert_mixture is differentiable once")

    @staticmethod
    def vmap(info, in_dims, grad, x, token, gate, counts, up, down, pre, activation):
        grad, x, token, gate, counts, up, down, pre = _batched(info, in_dims, grad, x, token, gate, counts, up, down, pre)
        folded = _folded(x, token, gate, counts, up, down)
        d_x, d_gate, d_up, d_down = _MixtureGradient.apply(grad.flatten(0, 1), *folded, pre.flatten(0, 1), activation)
        like = zip((d_x, d_gate, d_up, d_down), (x, gate, up, down), strict=True)
        return tuple(d.unflatten(0, tensor.shape[:2]) for d, tensor in like), (0, 0, 0, 0)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """(B, H, T, C) each -> (B, H, T, C): causal attention, softmax(scale * q k^T + mask) v, by torch's own kernels."""
    if is_compiling() or q.device.type == "cpu" or not _under_vmap():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return _Attention.apply(q, k, v, scale)


class _Attention(Function):
    """The same with vmap rules: runs are more sequences. (torch has no batching rule for the kernels' backward pass, on
    any device, and would launch them run by run.) The backward pass computes the forward one again."""

    @staticmethod
    def forward(q, k, v, scale):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        return *_AttentionGradient.apply(grad, *ctx.saved_tensors, ctx.scale), None

    @staticmethod
    def vmap(info, in_dims, q, k, v, scale):
        q, k, v = _batched(info, in_dims, q, k, v)
        return _Attention.apply(*(x.flatten(0, 1) for x in (q, k, v)), scale).unflatten(0, q.shape[:2]), 0


class _AttentionGradient(Function):
    @staticmethod
    def forward(grad, q, k, v, scale):
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            out = F.scaled_dot_product_attention(*inputs, is_causal=True, scale=scale)
            return torch.autograd.grad(out, inputs, grad)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError("attention is differentiable once here")

    @staticmethod
    def vmap(info, in_dims, grad, q, k, v, scale):
        grad, q, k, v = _batched(info, in_dims, grad, q, k, v)
        gradients = _AttentionGradient.apply(*(x.flatten(0, 1) for x in (grad, q, k, v)), scale)
        return tuple(x.unflatten(0, q.shape[:2]) for x in gradients), (0, 0, 0)


def _forward_in_turn(x, token, gate, counts, up, down, activation):
    sizes = counts.tolist()
    out, pre = torch.zeros_like(x), x.new_empty(len(token), up.shape[2])
    # unbind, not up[e]: an index costs more than a small product
    experts = zip(token.split(sizes), gate[:, None].split(sizes), pre.split(sizes), up.unbind(0), down.unbind(0), strict=True)
    for t, g, p, u, d in experts:
        torch.mm(x.index_select(0, t), u, out=p)
        out.index_add_(0, t, (activated(activation, p) * g) @ d)  # the gate where the rows are short
    return out, pre


def _backward_in_turn(grad, x, token, gate, counts, up, down, pre, activation):
    sizes = counts.tolist()
    d_x, d_gate, d_up, d_down = (torch.zeros_like(x), *map(torch.empty_like, (gate, up, down)))
    slots = (token.split(sizes), gate[:, None].split(sizes), pre.split(sizes), d_gate[:, None].split(sizes))
    for t, g, p, d_g, u, d, d_u, d_d in zip(*slots, *(w.unbind(0) for w in (up, down, d_up, d_down)), strict=True):
        h, d_y = activated(activation, p), grad.index_select(0, t)
        d_h = d_y @ d.T  # of the gated hidden values
        torch.linalg.vecdot(d_h, h, out=d_g[:, 0])
        torch.mm(h.mul_(g).T, d_y, out=d_d)
        d_p = activation_gradient(activation, d_h.mul_(g), p)
        torch.mm(x.index_select(0, t).T, d_p, out=d_u)
        d_x.index_add_(0, t, d_p @ u.T)
    return d_x, d_gate, d_up, d_down


def _blocks(counts: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """(place (S,) of each slot among the padded rows, expert (blocks,) of each block), all shapes known in advance.

    Each expert's rows fill whole blocks, the last of them perhaps in part. S // BLOCK + E blocks are always enough. Blocks
    that nobody needs hold zeros; they are given to the last expert, whose sums they leave as they are.
    """
    blocks = (counts + BLOCK - 1) // BLOCK  # (E,)
    ends, slot_ends = blocks.cumsum(0), counts.cumsum(0)
    slot = torch.arange(slots, device=counts.device)
    expert_of_slot = torch.searchsorted(slot_ends, slot, right=True)
    place = slot + ((ends - blocks) * BLOCK - (slot_ends - counts))[expert_of_slot]
    numbers = torch.arange(slots // BLOCK + len(counts), device=counts.device)
    return place, torch.searchsorted(ends, numbers, right=True).clamp(max=len(counts) - 1)


def _padded(rows: Tensor, place: Tensor, expert: Tensor) -> Tensor:
    """(S, C) rows -> (blocks, BLOCK, C), zeros between."""
    return rows.new_zeros(len(expert) * BLOCK, rows.shape[1]).index_copy(0, place, rows).unflatten(0, (-1, BLOCK))


def _per_expert(blocks: Tensor, expert: Tensor, gate: Tensor, like: Tensor) -> Tensor:
    """(blocks, C, C') -> (E, C, C'): the sum over each expert's blocks, in the gate's precision."""
    return gate.new_zeros(like.shape).index_add_(0, expert, blocks.to(gate.dtype)).to(like.dtype)


def _forward_in_blocks(x, token, gate, counts, up, down, activation):
    place, expert = _blocks(counts, len(token))
    pre = _padded(x.index_select(0, token), place, expert) @ up.index_select(0, expert)  # (blocks, BLOCK, M)
    gated = activated(activation, pre) * _padded(gate[:, None], place, expert)
    rows = (gated.to(down.dtype) @ down.index_select(0, expert)).flatten(0, 1).index_select(0, place)  # (S, D)
    return _summed(rows, token, gate, x), pre.flatten(0, 1).index_select(0, place)


def _backward_in_blocks(grad, x, token, gate, counts, up, down, pre, activation):
    place, expert = _blocks(counts, len(token))
    g, p = _padded(gate[:, None], place, expert), _padded(pre, place, expert)
    d_y = _padded(grad.index_select(0, token).to(down.dtype), place, expert)
    h, d_h = activated(activation, p), d_y @ down.index_select(0, expert).mT
    d_gate = torch.linalg.vecdot(d_h.to(gate.dtype), h.to(gate.dtype)).flatten().index_select(0, place)
    d_down = _per_expert((h * g).to(down.dtype).mT @ d_y, expert, gate, down)
    d_p = activation_gradient(activation, (d_h * g).to(p.dtype), p)
    d_up = _per_expert(_padded(x.index_select(0, token), place, expert).mT @ d_p, expert, gate, up)
    d_rows = (d_p @ up.index_select(0, expert).mT).flatten(0, 1).index_select(0, place)
    return _summed(d_rows, token, gate, x).to(x.dtype), d_gate, d_up, d_down


def _batched(info, in_dims, *tensors: Tensor) -> list[Tensor]:
    """Each tensor with the run axis in front, repeated where the runs share it."""
    return [
        tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, in_dims, strict=False)
    ]


def _folded(x, token, gate, counts, up, down) -> tuple[Tensor, ...]:
    """The arguments of R mixtures as those of one: run r's tokens are numbered from r*N on."""
    runs, n = x.shape[:2]
    first = n * torch.arange(runs, device=token.device)[:, None]
    return tuple(tensor.flatten(0, 1) for tensor in (x, token + first, gate, counts, up, down))
