"""One step of training: the options, the schedule, the losses, and one run the textbook way.

`batched.py` takes the same steps for many runs at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import require, typed, whole
from .config import Config
from .model import MiniMoE, Output
from .optimizers import AdamW

# Fields that TrainOptions has got since the first shipped runs, each with the value that changes nothing (see
# `config.NEUTRAL`).
NEUTRAL: dict[str, object] = {"dtype": "float32"}
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class TrainOptions:
    """How to train, the same for every run of a sweep. Checked once, here; raises ValueError or TypeError."""

    batch_size: int = 16  # sequences of `context` characters per step
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's, before the table's factor on 1 - beta
    eps: float = 1e-8  # AdamW's, before the table's factor
    weight_decay: float = 0.0  # AdamW's, before the table's factor
    warmup: float = 0.1  # fraction of the steps in which the LR rises linearly
    final_lr: float = 0.1  # the cosine's end, as a fraction of the peak
    clip: float | None = None  # largest gradient norm; None: no clipping, which would break the abc symmetry
    evals: int = 10  # records along the way, evenly spaced, the last one at the end
    eval_batches: int = 4  # fixed validation batches, evenly spaced over the validation text
    data_seed: int | None = None  # of the data order; None: the run's own seed
    base_batch_size: int | None = None  # for cells that use the ratio `batch`; None: the batch size itself
    base_steps: int | None = None  # for cells that use the ratio `duration`; None: the number of steps itself
    dtype: str = "float32"  # of the matrix products; weights, optimizer and losses are in float32 under bfloat16, too

    def __post_init__(self):
        for f in fields(self):  # 1 and 1.0 are one run
            object.__setattr__(self, f.name, typed(f.name, f.type, getattr(self, f.name)))
        counts = ("batch_size", "evals", "eval_batches", "base_batch_size", "base_steps")
        self._require("a positive integer", lambda n: whole(n, 1), *counts)
        self._require("an integer, 0 or more", lambda n: whole(n, 0), "data_seed")
        self._require("a finite number, not negative", lambda x: 0 <= x < math.inf, "eps", "weight_decay")
        self._require("a positive number", lambda x: 0 < x < math.inf, "clip")
        self._require("a fraction from 0 to 1", lambda x: 0 <= x <= 1, "warmup", "final_lr")
        self._require("two in [0, 1)", lambda pair: all(0 <= beta < 1 for beta in pair), "betas")
        self._require(f"one of {', '.join(DTYPES)}", DTYPES.__contains__, "dtype")

    def _require(self, rule: str, valid: Callable[[Any], bool], *names: str) -> None:
        """Raise ValueError unless the fields of these names, where they are not None, are valid."""
        for name in names:
            value = getattr(self, name)
            require(value is None or valid(value), name, value, f"must be {rule}")

    @property
    def schedule(self) -> dict:
        """The options that a run's numbers depend on directly: not those that act through the table's cells, nor the seed."""
        left_out = ("eps", "weight_decay", "data_seed", "base_batch_size", "base_steps")
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    def ratios(self, steps: int) -> dict[str, float]:
        """The ratios of the training that a cell may use, true over base: `batch` in sequences, `duration` in tokens."""
        batch = self.batch_size / (self.base_batch_size or self.batch_size)
        return {"batch": batch, "duration": batch * steps / (self.base_steps or steps)}

    def order_seed(self, seed: int) -> int:
        """The seed of the data order in a run with this seed."""
        return seed if self.data_seed is None else self.data_seed


def lr_factor(step: int, steps: int, options: TrainOptions, final: float = 1.0) -> float:
    """The schedule at step 0 .. steps - 1: a linear warm-up to 1, then a cosine to final * `final_lr` at the last step."""
    warmup = round(options.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup + 1) / (steps - warmup)
    end = final * options.final_lr
    return end + (1 - end) * (1 + math.cos(math.pi * progress)) / 2


def lr_factors(step: int, steps: int, options: TrainOptions, finals: Mapping[str, float]) -> dict[str, float]:
    """role -> the factor on its LRs at this step. finals: role -> the factor on its schedule's end (the cell `final_lr`)."""
    return {role: lr_factor(step, steps, options, final) for role, final in finals.items()}


def autocast(dtype: str, device: torch.device) -> AbstractContextManager:
    """Inside, matrix products are in this dtype and everything else stays in float32."""
    if dtype == "float32":
        return nullcontext()
    # no cache: a product uses multiplier * weight, which is another tensor in each step
    return torch.autocast(device.type, getattr(torch, dtype), cache_enabled=False)


def losses(run: Callable[[Tensor], Output], config: Config, batch: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T + 1) -> (loss to train on, cross-entropy in nats), both (). `run` is a model: tokens -> Output."""
    return losses_and_load(run, config, batch)[:2]


def losses_and_load(run: Callable[[Tensor], Output], config: Config, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`losses`, and the load (L, E) of each expert."""
    out = run(batch[:, :-1])
    cross_entropy = F.cross_entropy(out.logits.flatten(0, 1), batch[:, 1:].flatten())
    loss = cross_entropy + config.balance_weight * out.balance_loss
    if config.z_weight:
        loss = loss + config.z_weight * out.router_logits.logsumexp(-1).square().mean()
    return loss, cross_entropy, out.load


def moved_biases(config: Config, biases: Mapping[str, Tensor], load: Tensor) -> dict[str, Tensor]:
    """The biases of the choice of experts after a step: bias -= bias_rate * (share of the tokens - K / E), outside the gradient.

    DMFT-MoE, arXiv 2601.20205: a bias balances the load without a loss of its own. biases: buffer's name -> (..., E), in the
    order of the layers, or empty; load: (..., L, E), which sums to 1 over the experts, so that an expert serves the share
    K * load of the tokens.
    """
    K, E = config.active_experts, config.experts
    layers = zip(biases.items(), load.unbind(-2), strict=False)  # without biases nothing is computed
    return {name: bias - config.bias_rate * (K * own - K / E) for (name, bias), own in layers}


def bias_names(config: Config) -> list[str]:
    """The names of the model's buffers that its load moves."""
    return [f"blocks.{layer}.moe.bias" for layer in range(config.depth)] if config.bias_rate else []


def measured(run: Callable[[Tensor], Output], batches: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Over validation batches: cross-entropy (), load (L, E), mean square of the router logits (L,).

    The cross-entropy is infinite where all logits of a token are 0. Such a model is broken: its residual stream is so large that
    the mean square in the last norm has overflowed, and the norm's output is 0. Its loss would be ln V, as of an untrained model.
    """
    totals = []
    for batch in batches:
        out = run(batch[:, :-1])
        loss = F.cross_entropy(out.logits.flatten(0, 1), batch[:, 1:].flatten())
        loss = torch.where((out.logits == 0).all(-1).any(), math.inf, loss)
        totals.append((loss, out.load, out.router_logits.square().mean((1, 2, 3))))
    loss, load, square = (sum(values) / len(batches) for values in zip(*totals, strict=True))
    return loss, load, square


class SingleRun:
    """One run, the textbook way: `torch.optim.AdamW` over the model's parameter groups. R is 1 in the shapes.

    It is what `batched.BatchedRuns` must equal.
    """

    def __init__(self, models: Sequence[MiniMoE], lrs: Sequence[float], options: TrainOptions, steps: int = 1):
        (self.model,), (lr,) = models, lrs
        self.options = options
        groups = self.model.param_groups(lr, options.eps, options.weight_decay, options.betas, options.ratios(steps))
        self.optimizer = AdamW(groups)
        self.finals = self.model.config.parametrization.final_lrs(sorted({group["role"] for group in groups}))

    def step(self, batch: Tensor, factors: Mapping[str, float] | None = None) -> Tensor:
        """One step on the batch (1, B, T + 1), each role's LRs times its factor; the cross-entropy (1,) before it.

        factors: role -> factor; None: 1 for every role.
        """
        loss, cross_entropy, load = losses_and_load(self._run, self.model.config, batch[0])
        self.optimizer.zero_grad()
        loss.backward()
        if self.options.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        self.optimizer.step(factors or dict.fromkeys(self.finals, 1.0))
        biases = {name: self.model.get_buffer(name) for name in bias_names(self.model.config)}
        for name, bias in moved_biases(self.model.config, biases, load).items():
            biases[name].copy_(bias)
        return cross_entropy.detach()[None]

    @torch.no_grad()
    def measure(self, batches: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """`measured` on the validation batches, with a leading axis of 1."""
        loss, load, square = measured(self._run, batches)
        return loss[None], load[None], square[None]

    def trained_models(self) -> list[MiniMoE]:
        """The model."""
        return [self.model]

    def _run(self, tokens: Tensor) -> Output:
        with autocast(self.options.dtype, tokens.device):
            return self.model(tokens)
