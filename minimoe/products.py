"""Rows times their own expert's matrix, for all experts at once: torch's grouped matrix product.

Letters: S rows sorted by expert, E experts, D and M the sizes of an expert's matrix.

In bfloat16 a recent NVIDIA GPU (Hopper) has one kernel for it, which reads nothing back to the host. In float32 torch 2.13
loops over the experts instead, and reads `ends` back once for each product; and it lets torch.compile trace bfloat16
only. So a compiled float32 model calls the same function as an operator of this module's own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def grouped_product(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """rows (S, D), weights (E, D, M), ends (E,) int32, each expert's last row plus one -> (S, M). Differentiable."""
    if torch.compiler.is_compiling() and rows.dtype != torch.bfloat16:
        return _product(rows, weights, ends)
    return F.grouped_mm(rows, weights, offs=ends)


def can_be_grouped(rows: Tensor, *weights: Tensor) -> bool:
    """Whether torch takes these operands: no float64, and every row a multiple of 16 bytes long."""
    return rows.dtype != torch.float64 and all(t.shape[-1] * t.element_size() % 16 == 0 for t in (rows, *weights))


@torch.library.custom_op("minimoe::grouped_product", mutates_args=())
def _product(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(rows, weights, offs=ends)


@torch.library.custom_op("minimoe::grouped_outer_product", mutates_args=())
def _outer_product(rows: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    """rows (S, D), grad (S, M) -> (E, D, M): the gradient of each expert's matrix."""
    return F.grouped_mm(rows.T, grad, offs=ends)


@_product.register_fake
def _(rows, weights, ends):
    return rows.new_empty(rows.shape[0], weights.shape[2])


@_outer_product.register_fake
def _(rows, grad, ends):
    return rows.new_empty(ends.shape[0], rows.shape[1], grad.shape[1])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad):
    rows, weights, ends = ctx.saved_tensors
    return _product(grad.contiguous(), weights.mT, ends), _outer_product(rows, grad.contiguous(), ends), None


_product.register_autograd(_gradients, setup_context=_save)
