"""The books of whole trainings: which role brought about how much of the loss's fall, and what the gradient had promised.

A step moves all weights by dW at once, from where the probe's gradient is g0 to where it is g1. Three sums are kept:

    left          - <g0, dW>              what the gradient before the step promises: the first order
    trapezoid     - <(g0 + g1) / 2, dW>   the mean of the promise and of what is true at the step's end
    allocation    - integral of <g, dW>   what the step did (see `allocations`)

The sum of the allocations is the fall of the loss. The other two are as large only where the steps are small.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from .allocations import Ledger, closure
from .checks import require, whole
from .config import Config
from .coordinates import PROBED
from .corpus import Corpus, load_corpus
from .model import MiniMoE
from .roles import named_roles
from .step import SingleRun, TrainOptions, losses, lr_factors
from .training import TextData, check_training, one_thread, windows

SUMS = ("allocation", "trapezoid", "left")


def books(
    config: Config,
    lr: float,
    corpus: str | Corpus = "pydocs",
    steps: int = 200,
    options: TrainOptions = TrainOptions(),  # noqa: B008 (frozen)
    *,
    records: Iterable[int] | None = None,
    intervals: int = 4,
) -> pd.DataFrame:
    """Train one model just as `train` does, on a CPU, and book every step to the roles of the weights.

    One row per record and role: parametrization, width, lr, seed, step, role; allocation, trapezoid and left, in nats,
    summed over the steps since the record before (see this module); and of all roles together: fall (of the loss of 512
    validation tokens), closure (sum of the allocations over it) and points (gradients on the line of a step, at most).

    records: after which steps (default: each). The training ends with the last one; its schedule remains that of `steps`.
    intervals: of Simpson's rule, at most (see `Ledger`). Raises ValueError for bad input, as `train` does.
    """
    corpus = load_corpus(corpus)
    steps = check_training([(config, lr)], corpus, steps)
    records = sorted(set(range(1, steps + 1) if records is None else records))
    valid = records and all(whole(step, 1) for step in records) and records[-1] <= steps
    require(valid, "records", records, f"must be integers from 1 to steps={steps}, at least one")
    labels = {"parametrization": config.parametrization.name, "width": config.width, "lr": lr, "seed": config.seed}
    rows, since = [], []
    with one_thread():
        for step, booked in enumerate(_booked_steps(config, lr, corpus, steps, options, intervals), 1):
            since.append(booked)
            if step in records:
                rows += [labels | {"step": step} | row for row in _summed(since)]
                since = []
            if step == records[-1]:
                return pd.DataFrame(rows)


class _Step(NamedTuple):
    sums: pd.DataFrame  # a row per role, the columns SUMS
    fall: float
    points: int


def _booked_steps(
    config: Config, lr: float, corpus: Corpus, steps: int, options: TrainOptions, intervals: int
) -> Iterator[_Step]:
    data, model = TextData(corpus, torch.device("cpu")), MiniMoE(config)
    program = SingleRun([model], [lr], options, steps)
    order = data.order([options.order_seed(config.seed)], steps, options.batch_size, config.context)
    (probe,) = data.validation(1, math.ceil(PROBED / config.context), config.context)
    ledger = Ledger(model, lambda: losses(model, config, probe)[1], intervals)
    roles = [param.role.name for name, param in named_roles(model) if name in ledger.params]
    for step in range(steps):
        gradients, start = ledger.gradients, ledger.weights
        program.step(windows(data.train, order[step], config.context), lr_factors(step, steps, options, program.finals))
        entry = ledger.entry()
        moves = [after - before for after, before in zip(ledger.weights, start, strict=True)]
        left, right = _promised(gradients, moves), _promised(ledger.gradients, moves)
        trapezoid = [(a + b) / 2 for a, b in zip(left, right, strict=True)]
        columns = (entry.allocations.values(), trapezoid, left)
        sums = pd.DataFrame(dict(zip(SUMS, columns, strict=True))).groupby(roles, sort=False).sum()
        yield _Step(sums, entry.fall, entry.points)


def _promised(gradients: list[Tensor], moves: list[Tensor]) -> list[float]:
    """-<g, dW> of each tensor, in nats."""
    return [-(gradient * move).sum(dtype=torch.float64).item() for gradient, move in zip(gradients, moves, strict=True)]


def _summed(steps: list[_Step]) -> Iterator[dict]:
    """A row per role, of these steps together."""
    sums = sum(step.sums for step in steps)
    fall = math.fsum(step.fall for step in steps)
    of_all = {"fall": fall, "closure": closure(sums.allocation.sum(), fall), "points": max(step.points for step in steps)}
    for role, row in sums.iterrows():
        yield {"role": role, **row, **of_all}
