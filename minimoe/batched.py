"""Many runs of one shape as one program: the shape that a GPU likes.

Letters: R runs, P parameters of one run, B batch, T time.

The model is written for one run. Here its parameters become one row of an (R, P) tensor, `torch.func.vmap` adds the run axis
to forward and backward pass, and one AdamW, with a learning rate for each run and weight, updates them all. No step reads
anything back from the device. Runs of different parametrizations share a program: they differ only in numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from .grouped import BLOCK
from .model import Config, MiniMoE
from .parametrization import named_roles, numbers
from .step import TrainOptions, losses, measured


class BatchedRuns:
    """R models of one shape, with an LR each, trained as one program. See `step.SingleRun` for the plain way."""

    def __init__(self, models: Sequence[MiniMoE], lrs: Sequence[float], options: TrainOptions):
        self.options = options
        self.models = list(models)
        self.skeleton = models[0]
        self.shapes = {name: param.shape for name, param in named_roles(self.skeleton)}
        self.sizes = [shape.numel() for shape in self.shapes.values()]
        stacked, self.buffers = stack_module_state(self.models)
        self.weights = torch.cat([stacked[name].detach().flatten(1) for name in self.shapes], dim=1)  # (R, P)
        self.mean, self.square = torch.zeros_like(self.weights), torch.zeros_like(self.weights)  # Adam's
        tables = [model.config.parametrization for model in models]
        cells = [[numbers(p, table) for _, p in named_roles(m)] for m, table in zip(models, tables, strict=True)]
        self.lr = self._columns([[lr * c.lr for c in run] for run, lr in zip(cells, lrs, strict=True)])
        self.eps = self._columns([[options.eps * c.eps for c in run] for run in cells])
        self.decay = self._columns([[options.weight_decay * c.weight_decay for c in run] for run in cells])
        self.steps = 0

    def step(self, batch: Tensor, factor: float) -> Tensor:
        """One step of every run on its own batch (R, B, T + 1), at `factor` of its LRs; their cross-entropies (R,) before it."""
        gradients = vmap(grad_and_value(self._losses, has_aux=True))
        with _quiet_fallback():
            gradient, (_, cross_entropy) = gradients(self.weights, self.buffers, batch)
        if self.options.clip is not None:
            norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
            gradient = gradient * (self.options.clip / (norm + 1e-6)).clamp(max=1.0)
        self._adamw(gradient, factor)
        return cross_entropy

    @torch.no_grad()
    def measure(self, batches: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """As `step.measured`, with a leading run axis."""
        one = vmap(lambda weights, buffers: measured(self._run(weights, buffers), batches))
        with _quiet_fallback():
            return one(self.weights, self.buffers)

    def trained_models(self) -> list[MiniMoE]:
        """The models that were given, with the weights that training has reached."""
        with torch.no_grad():
            for model, weights in zip(self.models, self.weights, strict=True):
                for param, value in zip(model.parameters(), self._unflattened(weights).values(), strict=True):
                    param.copy_(value)
        return self.models

    def _losses(self, weights: Tensor, buffers: dict, batch: Tensor) -> tuple[Tensor, Tensor]:
        return losses(self._run(weights, buffers), self.skeleton.config, batch)

    def _run(self, weights: Tensor, buffers: dict):
        """tokens -> Output, for one run's weights (P,)."""
        state = (self._unflattened(weights), buffers)
        return lambda tokens: functional_call(self.skeleton, state, (tokens,))

    def _unflattened(self, weights: Tensor) -> dict[str, Tensor]:
        parts = zip(self.shapes.items(), weights.split(self.sizes), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts}

    def _columns(self, per_run: list[list[float]]) -> Tensor:
        """(R, P): a number for each tensor of each run, repeated for each of its weights."""
        table, repeats = torch.tensor(per_run, dtype=torch.float64), torch.tensor(self.sizes)
        return table.repeat_interleave(repeats, dim=1, output_size=sum(self.sizes)).to(self.weights)

    @torch.no_grad()
    def _adamw(self, gradient: Tensor, factor: float) -> None:
        """AdamW (arXiv 1711.05101), as torch.optim.AdamW has it: its test."""
        self.steps += 1
        first, second = self.options.betas
        if self.options.weight_decay:
            self.weights.mul_(1 - factor * self.lr * self.decay)
        self.mean.lerp_(gradient, 1 - first)
        self.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        scale = (self.square.sqrt() / (1 - second**self.steps) ** 0.5).add_(self.eps)
        self.weights.addcdiv_(self.mean * self.lr, scale, value=-factor / (1 - first**self.steps))


@contextmanager
def _quiet_fallback() -> Iterator[None]:
    """On a CPU attention has no batching rule and torch loops over the runs, with a warning: there it is only tested."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet implemented")
        yield


def memory_per_run(config: Config, options: TrainOptions) -> int:
    """The bytes that one run of a batched program needs at its peak, estimated from above (its test tracks a step)."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in MiniMoE(config).parameters())
    # weights twice, Adam's two, LR, eps, decay; gradients, apart and together; the update's temporaries; W times multiplier
    weights = 14 * parameters
    tokens, heads = options.batch_size * config.context, config.width // config.head_size
    slots = tokens * config.active_experts
    rows = slots + config.experts * BLOCK  # padded
    columns = config.expert_width * (2 if config.activation == "swiglu" else 1)
    kept = tokens * (16 * config.width + 4 * config.experts) + slots * (columns + 8)  # by each layer, for the backward pass
    passing = rows * (4 * config.width + 6 * columns) + 2 * tokens * heads * config.context  # while one layer is at work
    passing += 3 * (slots // BLOCK + config.experts) * config.width * columns  # the weights of each block
    return 4 * (weights + config.depth * kept + passing + tokens * 6 * config.vocab_size)
