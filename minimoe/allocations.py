"""Loss change allocation: how much of the loss's fall each tensor brought about, in nats.

Where a training moves a tensor W from W0 to W1, and all others at the same time, the fall of a loss L along the way is

    L(start) - L(end)  =  sum over W of  allocation(W),      allocation(W) = - integral of <dL/dW, dW>

The idea is *Loss Change Allocation* (Lan, Liu, Zhou, Yosinski, NeurIPS 2019, arXiv 1909.01440). L is one loss, on a *probe*:
tokens that stay the same and that are not trained on. (On the training batch itself every step looks too good.)

A step is taken as a straight line, and the integral is computed from gradients at a few points of the line: first the two
ends (the trapezoidal rule), then the middle too (Simpson's rule), then Simpson's rule on two halves, and so on, until the
allocations add up to the true fall. Their sum over the true fall is the *closure*: the instrument's own test.

A negative allocation is a tensor whose steps raise the loss. A tied tensor has one allocation. A frozen one has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from .checks import require, whole

BOUND = 0.10  # of the closure: where sum over fall lies farther from 1, nothing is concluded
ENOUGH = 0.02  # a rule is taken if sum and fall differ by at most this part of the larger of fall and turnover
INTERVALS = 2  # Simpson's at most, by default: 1 after the trapezoidal rule, then 2, 4, ...


class Entry(NamedTuple):
    """What one step did."""

    allocations: dict[str, float]  # parameter's name -> nats; positive where it lowered the loss
    fall: float  # of the probe's loss, true
    points: int  # of the line at which gradients were taken: 2 is the trapezoidal rule

    @property
    def sum(self) -> float:
        """Of the allocations."""
        return math.fsum(self.allocations.values())


class Ledger:
    """Books each step of a training to the tensors: make it, take a step, ask for its `entry`, and so on.

        ledger = Ledger(model, lambda: loss(model, probe))
        for batch in batches:
            train_one_step(model, batch)
            print(ledger.entry().allocations)

    It works with any optimizer and any schedule, and costs one gradient of the probe's loss a step under the trapezoidal
    rule, two under Simpson's. The probe's loss is computed in evaluation mode: dropout would be noise in it.
    """

    def __init__(self, module: nn.Module, probe: Callable[[], Tensor], intervals: int = INTERVALS):
        """probe: no arguments -> the loss (), always of the same tokens. intervals: of Simpson's rule, at most; 0: the
        trapezoidal rule alone. Raises ValueError for a module without trainable parameters, or a probe whose loss is no
        finite number."""
        require(whole(intervals, 0), "intervals", intervals, "must be an integer, 0 or more")
        self.module, self.probe, self.intervals = module, probe, intervals
        self.params = {name: param for name, param in module.named_parameters() if param.requires_grad}
        if not self.params:
            raise ValueError(f"{type(module).__name__} has no trainable parameter")
        self._remember()
        if not math.isfinite(self.loss):
            raise ValueError(f"the probe's loss is {self.loss} before the first step")

    def entry(self) -> Entry:
        """The step, or steps, since the ledger was made or last asked."""
        before, gradients, start = self.loss, self.gradients, self.weights
        self._remember()
        moves = [after - ahead for after, ahead in zip(self.weights, start, strict=True)]
        fall = before - self.loss
        known = {0.0: _dots(gradients, moves), 1.0: _dots(self.gradients, moves)}  # place on the line -> <dL/dW, dW> per tensor
        parts = -(known[0.0] + known[1.0]) / 2
        intervals = 1
        while intervals <= self.intervals and not _closes(parts, fall):
            for k in range(1, 2 * intervals):
                if (place := k / (2 * intervals)) not in known:
                    known[place] = self._dots_at(place, start, moves)
            parts, intervals = -_simpson(known, intervals), 2 * intervals
        return Entry(dict(zip(self.params, parts.tolist(), strict=True)), fall, len(known))

    def _remember(self) -> None:
        self.weights = [param.detach().clone() for param in self.params.values()]
        self.loss, self.gradients = self._probed()

    def _probed(self) -> tuple[float, list[Tensor]]:
        """The probe's loss, and its gradient for each parameter."""
        with torch.enable_grad(), evaluating(self.module):
            loss = self.probe()
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                raise ValueError(f"the loss must be a tensor of one number, got {_described(loss)}")
            if not loss.requires_grad:
                raise ValueError("the loss does not depend on any parameter: was it computed without gradients?")
            params = list(self.params.values())
            gradients = torch.autograd.grad(loss.squeeze(), params, allow_unused=True)
        unused = (torch.zeros_like(param) if found is None else found for found, param in zip(gradients, params, strict=True))
        return loss.item(), list(unused)

    @torch.no_grad()
    def _dots_at(self, place: float, start: list[Tensor], moves: list[Tensor]) -> Tensor:
        """<dL/dW, dW> of each tensor at a place of the line, from 0 (before the step) to 1; the weights stay as they are."""
        params = list(self.params.values())
        for param, ahead, move in zip(params, start, moves, strict=True):
            param.copy_(ahead + place * move)
        try:
            return _dots(self._probed()[1], moves)
        finally:
            for param, weight in zip(params, self.weights, strict=True):
                param.copy_(weight)


def allocation(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[nn.Module, object], Tensor],
    probe: object,
    batches: Iterable,
    intervals: int = INTERVALS,
) -> pd.DataFrame:
    """Train one step on each batch, and say what each tensor's step did to the loss of the probe.

    loss: (module, batch) -> (), for the batches and the probe alike. probe: a batch that is not trained on.

    One row per step and tensor: step (from 1), tensor, allocation (nats); and of the whole step: fall (of the probe's loss,
    nats), closure (sum of the allocations over the fall) and points (gradients on the line of the step: 2 is the trapezoidal
    rule, 3 Simpson's, more are Simpson's on parts). A longer training is the sum of its steps:
    `frame.groupby("tensor").allocation.sum()`. For a training loop of your own see `Ledger`.

    Raises ValueError for no batch, no trainable parameter, or a loss that is no finite number at the start.
    """
    ledger, rows = Ledger(module, lambda: loss(module, probe), intervals), []
    for step, batch in enumerate(batches, 1):
        optimizer.zero_grad()
        loss(module, batch).backward()
        optimizer.step()
        entry = ledger.entry()
        whole_step = {"fall": entry.fall, "closure": closure(entry.sum, entry.fall), "points": entry.points}
        rows += [{"step": step, "tensor": name, "allocation": nats} | whole_step for name, nats in entry.allocations.items()]
    if not rows:
        raise ValueError("batches is empty: an allocation needs at least one step")
    return pd.DataFrame(rows)


def closure(total: float, fall: float) -> float:
    """The sum of the allocations over the true fall of the loss: 1 where the books close. NaN where the loss stood still."""
    return total / fall if fall else math.nan


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode inside; afterwards each part is in the mode in which it was."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _dots(gradients: list[Tensor], moves: list[Tensor]) -> Tensor:
    """(tensors,) <gradient, move> of each tensor."""
    return torch.stack([(gradient * move).sum().double() for gradient, move in zip(gradients, moves, strict=True)]).cpu()


def _simpson(known: dict[float, Tensor], intervals: int) -> Tensor:
    """(tensors,) the integral over the line, from the values at 2 * intervals + 1 evenly spaced places."""
    last = 2 * intervals
    weights = [1 if k in (0, last) else 4 if k % 2 else 2 for k in range(last + 1)]
    return sum(weight * known[k / last] for k, weight in enumerate(weights)) / (3 * last)


def _closes(parts: Tensor, fall: float) -> bool:
    """Whether the allocations add up to the fall; late in a training both are small beside what goes up and down."""
    return abs(parts.sum().item() - fall) <= ENOUGH * max(abs(fall), parts.abs().sum().item())


def _described(value: object) -> str:
    return f"one of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
