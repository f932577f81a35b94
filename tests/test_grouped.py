"""The grouped product against one matrix product per expert, alone and with a run axis."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

from minimoe.grouped import add_rows, grouped_product, take_rows

SIZES = st.lists(st.integers(0, 7), min_size=1, max_size=6)


def double(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, d=st.integers(1, 5), m=st.integers(1, 5))
def test_it_equals_one_product_per_group(sizes, d, m):
    rows, weights = double(sum(sizes), d), double(len(sizes), d, m, seed=1)
    fast = grouped_product(rows, weights, torch.tensor(sizes))
    slow = torch.cat([x @ w for x, w in zip(rows.split(sizes), weights, strict=True)])
    torch.testing.assert_close(fast, slow)
    for a, b in zip(
        torch.autograd.grad(fast.sin().sum(), (rows, weights)),
        torch.autograd.grad(slow.sin().sum(), (rows, weights)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_first_and_second_derivatives_are_right():
    rows, weights, counts = double(6, 3), double(3, 3, 2, seed=1), torch.tensor([2, 0, 4])
    assert torch.autograd.gradcheck(lambda r, w: grouped_product(r, w, counts), (rows, weights))
    assert torch.autograd.gradgradcheck(lambda r, w: grouped_product(r, w, counts), (rows, weights))
    index = torch.tensor([4, 0, 0, 5])
    assert torch.autograd.gradcheck(lambda x: take_rows(x, index), (rows,))
    assert torch.autograd.gradcheck(lambda x: add_rows(x, torch.tensor([1, 1, 0, 2, 2, 2]), 4), (rows,))


@pytest.mark.parametrize("shared", [False, True])
def test_runs_fold_into_experts(shared):
    """R runs under vmap equal each run alone; `shared`: all runs use the same rows, as with one batch for many runs."""
    counts = torch.tensor([[2, 0, 4], [1, 5, 0]])
    rows = double(6, 3) if shared else double(2, 6, 3)
    weights = double(2, 3, 3, 2, seed=1)
    together = vmap(grouped_product, in_dims=(None if shared else 0, 0, 0))(rows, weights, counts)
    alone = torch.stack([grouped_product(rows if shared else rows[i], weights[i], counts[i]) for i in range(2)])
    assert torch.equal(together, alone)
    for a, b in zip(
        torch.autograd.grad(together.sin().sum(), (rows, weights)),
        torch.autograd.grad(alone.sin().sum(), (rows, weights)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_taking_and_adding_rows_under_vmap():
    x, index = double(3, 5, 2), torch.randint(5, (3, 7), generator=torch.Generator().manual_seed(0))
    assert torch.equal(vmap(take_rows)(x, index), torch.stack([x[i][index[i]] for i in range(3)]))
    rows = double(3, 7, 2)
    expected = torch.stack([torch.zeros(5, 2, dtype=torch.float64).index_add(0, index[i], rows[i]) for i in range(3)])
    assert torch.equal(vmap(lambda r, i: add_rows(r, i, 5))(rows, index), expected)
