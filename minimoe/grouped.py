"""The grouped matrix product: many experts, each with rows of its own, in one differentiable call.

Letters: R runs, E experts, S rows (tokens x active experts) sorted by expert, D in, M out, N tokens.

*To the product, R runs of E experts are R*E experts*: each function here carries a vmap rule that folds the run axis
into the expert (or row) axis, so that a model written for one run trains many at once under `torch.func.vmap`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function


def grouped_product(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """(S, D) rows sorted by expert, (E, D, M) weights, (E,) counts that sum to S -> (S, M): rows of e times weights[e]."""
    return _Product.apply(rows, weights, counts)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """(N, D), (S,) -> (S, D): x[index], whose gradient is `add_rows`."""
    return _Take.apply(x, index)


def add_rows(rows: Tensor, index: Tensor, n: int) -> Tensor:
    """(S, D), (S,) -> (n, D): row i is the sum of those rows whose index is i; its gradient is `take_rows`."""
    return _Add.apply(rows, index, n)


class _Product(Function):
    @staticmethod
    def forward(rows, weights, counts):
        out = rows.new_empty(rows.shape[0], weights.shape[2])
        sizes = counts.tolist()
        # unbind, not weights[e]: autograd answers each index with a zero tensor of all experts (a third of the step)
        for x, w, y in zip(rows.split(sizes), weights.unbind(0), out.split(sizes), strict=True):
            torch.mm(x, w, out=y)
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        rows, weights, counts = ctx.saved_tensors
        d_rows = grouped_product(grad, weights.transpose(1, 2), counts) if ctx.needs_input_grad[0] else None
        d_weights = _Outer.apply(rows, grad, counts) if ctx.needs_input_grad[1] else None
        return d_rows, d_weights, None

    @staticmethod
    def vmap(info, in_dims, rows, weights, counts):
        rows, weights, counts = _batched(info, in_dims, rows, weights, counts)
        out = grouped_product(rows.flatten(0, 1), weights.flatten(0, 1), counts.flatten())
        return out.unflatten(0, rows.shape[:2]), 0


class _Outer(Function):
    """Weight gradients: (S, D), (S, M), (E,) -> (E, D, M), for each expert its rows' transpose times their gradients."""

    @staticmethod
    def forward(rows, grads, counts):
        sizes = counts.tolist()
        out = rows.new_empty(len(sizes), rows.shape[1], grads.shape[1])
        for x, g, w in zip(rows.split(sizes), grads.split(sizes), out.unbind(0), strict=True):
            torch.mm(x.T, g, out=w)
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        rows, grads, counts = ctx.saved_tensors
        return grouped_product(grads, grad.transpose(1, 2), counts), grouped_product(rows, grad, counts), None

    @staticmethod
    def vmap(info, in_dims, rows, grads, counts):
        rows, grads, counts = _batched(info, in_dims, rows, grads, counts)
        out = _Outer.apply(rows.flatten(0, 1), grads.flatten(0, 1), counts.flatten())
        return out.unflatten(0, counts.shape), 0


class _Take(Function):
    @staticmethod
    def forward(x, index):
        return x.index_select(0, index)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, index = inputs
        ctx.n = x.shape[0]
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return add_rows(grad, index, ctx.n), None

    @staticmethod
    def vmap(info, in_dims, x, index):
        x, index = _batched(info, in_dims, x, index)
        out = take_rows(x.flatten(0, 1), _folded(index, x.shape[1]))
        return out.unflatten(0, index.shape), 0


class _Add(Function):
    @staticmethod
    def forward(rows, index, n):
        return rows.new_zeros(n, rows.shape[1]).index_add_(0, index, rows)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return take_rows(grad, index), None, None

    @staticmethod
    def vmap(info, in_dims, rows, index, n):
        rows, index = _batched(info, in_dims, rows, index)
        runs = rows.shape[0]
        out = add_rows(rows.flatten(0, 1), _folded(index, n), runs * n)
        return out.unflatten(0, (runs, n)), 0


def _batched(info, in_dims, *tensors: Tensor) -> list[Tensor]:
    """Each tensor with the run axis in front, repeated where the runs share it."""
    return [
        tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, in_dims, strict=False)
    ]


def _folded(index: Tensor, n: int) -> Tensor:
    """(R, S) row numbers below n -> (R*S,) row numbers in R tables of n rows laid end to end."""
    first = n * torch.arange(index.shape[0], device=index.device)
    return (index + first[:, None]).flatten()
