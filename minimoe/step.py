"""One step of training: the options, the schedule, the losses, and one run the textbook way.

`batched.py` takes the same steps for many runs at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.nn import functional as F

from .model import Config, MiniMoE, Output


@dataclass(frozen=True)
class TrainOptions:
    """How to train, the same for every run of a sweep. Checked once, here; raises ValueError."""

    batch_size: int = 16  # sequences of `context` characters per step
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's
    eps: float = 1e-8  # AdamW's, before the table's factor
    weight_decay: float = 0.0  # AdamW's, before the table's factor
    warmup: float = 0.1  # fraction of the steps in which the LR rises linearly
    final_lr: float = 0.1  # the cosine's end, as a fraction of the peak
    clip: float | None = None  # largest gradient norm; None: no clipping, which would break the abc symmetry
    evals: int = 10  # records along the way, evenly spaced, the last one at the end
    eval_batches: int = 4  # fixed validation batches, evenly spaced over the validation text
    data_seed: int | None = None  # of the data order; None: the run's own seed

    def __post_init__(self):
        if isinstance(self.betas, Iterable):
            object.__setattr__(self, "betas", tuple(self.betas))
        self._require("betas", isinstance(self.betas, tuple), "a pair of numbers")
        self._require("betas", len(self.betas) == 2 and all(_number(b) and 0 <= b < 1 for b in self.betas), "two in [0, 1)")
        for name in ("batch_size", "evals", "eval_batches"):
            self._require(name, whole(getattr(self, name), 1), "a positive integer")
        for name in ("eps", "weight_decay"):
            value = getattr(self, name)
            self._require(name, _number(value) and value >= 0, "a finite number, not negative")
        for name in ("warmup", "final_lr"):
            value = getattr(self, name)
            self._require(name, _number(value) and 0 <= value <= 1, "a fraction from 0 to 1")
        self._require("clip", self.clip is None or (_number(self.clip) and self.clip > 0), "a positive number or None")
        self._require("data_seed", self.data_seed is None or whole(self.data_seed, 0), "an integer, 0 or more, or None")
        for f in fields(self):  # 1 and 1.0 are one run
            if f.type.startswith("float") and getattr(self, f.name) is not None:
                object.__setattr__(self, f.name, float(getattr(self, f.name)))

    def _require(self, name: str, valid: bool, rule: str) -> None:
        if not valid:
            raise ValueError(f"{name}={getattr(self, name)!r}: must be {rule}")

    def order_seed(self, seed: int) -> int:
        """The seed of the data order in a run with this seed."""
        return seed if self.data_seed is None else self.data_seed


def whole(value, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least


def _number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def lr_factor(step: int, steps: int, options: TrainOptions) -> float:
    """The schedule at step 0 .. steps - 1: a linear warm-up to 1, then a cosine to `final_lr` at the last step."""
    warmup = round(options.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup + 1) / (steps - warmup)
    return options.final_lr + (1 - options.final_lr) * (1 + math.cos(math.pi * progress)) / 2


def losses(run: Callable[[Tensor], Output], config: Config, batch: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T + 1) -> (loss to train on, cross-entropy in nats), both (). `run` is a model: tokens -> Output."""
    out = run(batch[:, :-1])
    cross_entropy = F.cross_entropy(out.logits.flatten(0, 1), batch[:, 1:].flatten())
    loss = cross_entropy + config.balance_coefficient * out.balance_loss
    if config.z_weight:
        loss = loss + config.z_weight * out.router_logits.logsumexp(-1).square().mean()
    return loss, cross_entropy


def measured(run: Callable[[Tensor], Output], batches: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Over validation batches: cross-entropy (), load (L, E), mean square of the router logits (L,)."""
    totals = []
    for batch in batches:
        out = run(batch[:, :-1])
        loss = F.cross_entropy(out.logits.flatten(0, 1), batch[:, 1:].flatten())
        totals.append((loss, out.load, out.router_logits.square().mean((1, 2, 3))))
    loss, load, square = (sum(values) / len(batches) for values in zip(*totals, strict=True))
    return loss, load, square


class SingleRun:
    """One run, the textbook way: `torch.optim.AdamW` over the model's parameter groups. R is 1 in the shapes.

    It is what `batched.BatchedRuns` must equal, and on a CPU the faster of the two.
    """

    def __init__(self, models: Sequence[MiniMoE], lrs: Sequence[float], options: TrainOptions):
        (self.model,), (lr,) = models, lrs
        self.options = options
        merged: dict[tuple, dict] = {}  # roles with equal numbers: each group costs AdamW a tenth of a millisecond
        for group in self.model.param_groups(lr, options.eps, options.weight_decay):
            settings = {name: group[name] for name in ("lr", "eps", "weight_decay")}
            merged.setdefault(tuple(settings.values()), {"params": [], **settings})["params"] += group["params"]
        self.optimizer = torch.optim.AdamW(merged.values(), betas=options.betas, fused=True)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]

    def step(self, batch: Tensor, factor: float) -> Tensor:
        """One step on the batch (1, B, T + 1) at `factor` of the LRs; the cross-entropy (1,) before it."""
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        loss, cross_entropy = losses(self.model, self.model.config, batch[0])
        self.optimizer.zero_grad()
        loss.backward()
        if self.options.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        self.optimizer.step()
        return cross_entropy.detach()[None]

    @torch.no_grad()
    def measure(self, batches: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """`measured` on the validation batches, with a leading axis of 1."""
        loss, load, square = measured(self.model, batches)
        return loss[None], load[None], square[None]

    def trained_models(self) -> list[MiniMoE]:
        """The model."""
        return [self.model]
