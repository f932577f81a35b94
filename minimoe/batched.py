"""Many runs of one shape as one program: the shape that a GPU likes.

Letters: R runs, P parameters of one run, B batch, T time.

The model is written for one run. Here its parameters become one row of an (R, P) tensor, `torch.func.vmap` adds the run axis
to forward and backward pass, and one AdamW, with a learning rate for each run and weight, updates them all. No step reads
anything back from the device. Runs of different parametrizations share a program: they differ only in numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from .config import Config
from .experts import BLOCK
from .model import MiniMoE, Output
from .optimizers import BatchedAdamW
from .roles import moved_betas, named_roles, numbers
from .step import TrainOptions, autocast, bias_names, losses_and_load, measured, moved_biases


class BatchedRuns:
    """R models of one shape, with an LR each, trained as one program. See `step.SingleRun` for the plain way."""

    def __init__(self, models: Sequence[MiniMoE], lrs: Sequence[float], options: TrainOptions, steps: int = 1):
        self.options = options
        self.models = list(models)
        self.skeleton = models[0]
        shapes = {name: param.shape for name, param in named_roles(self.skeleton)}
        stacked, self.buffers = stack_module_state(self.models)
        weights = torch.cat([stacked[name].detach().flatten(1) for name in shapes], dim=1)  # (R, P)
        settings = [_settings(model, lr, options, steps) for model, lr in zip(models, lrs, strict=True)]
        self.optimizer = BatchedAdamW(weights, shapes, settings)
        self.finals, *others = [model.config.parametrization.final_lrs(sorted(set(self.optimizer.roles))) for model in models]
        if any(finals != self.finals for finals in others):
            raise ValueError("the runs of one program share a schedule: their tables must agree in final_lr")

    @property
    def weights(self) -> Tensor:
        """(R, P)."""
        return self.optimizer.weights

    def step(self, batch: Tensor, factors: Mapping[str, float] | None = None) -> Tensor:
        """One step of every run on its own batch (R, B, T + 1), each role's LRs times its factor; their cross-entropies (R,)
        before it.

        factors: role -> factor; None: 1 for every role.
        """
        gradients = vmap(grad_and_value(self._losses, has_aux=True))
        with _quiet_fallback():
            gradient, (_, (cross_entropy, load)) = gradients(self.weights, self.buffers, batch)
        if self.options.clip is not None:
            norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
            gradient = gradient * (self.options.clip / (norm + 1e-6)).clamp(max=1.0)
        self.optimizer.step(gradient, factors or dict.fromkeys(self.finals, 1.0))
        self.buffers |= moved_biases(self.skeleton.config, self._biases(), load)
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
                for param, value in zip(model.parameters(), self.optimizer.views(weights).values(), strict=True):
                    param.copy_(value)
            for name, biases in self._biases().items():
                for model, bias in zip(self.models, biases, strict=True):
                    model.get_buffer(name).copy_(bias)
        return self.models

    def _biases(self) -> dict[str, Tensor]:
        """Buffer's name -> (R, E), of those that the load moves."""
        return {name: self.buffers[name] for name in bias_names(self.skeleton.config)}

    def _losses(self, weights: Tensor, buffers: dict, batch: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        loss, cross_entropy, load = losses_and_load(self._run(weights, buffers), self.skeleton.config, batch)
        return loss, (cross_entropy, load)

    def _run(self, weights: Tensor, buffers: dict) -> Callable[[Tensor], Output]:
        """tokens -> Output, for one run's weights (P,)."""
        state = (self.optimizer.views(weights), buffers)

        def run(tokens: Tensor) -> Output:
            with autocast(self.options.dtype, tokens.device):
                return functional_call(self.skeleton, state, (tokens,))

        return run


def _settings(model: MiniMoE, lr: float, options: TrainOptions, steps: int) -> list[dict]:
    """For each of the model's tensors: role, lr, eps, weight_decay and betas."""
    table, training = model.config.parametrization, options.ratios(steps)
    evaluated = [(param.role.name, numbers(param, table, training)) for _, param in named_roles(model)]
    return [
        {
            "role": role,
            "lr": lr * n.lr,
            "eps": options.eps * n.eps,
            "weight_decay": options.weight_decay * n.weight_decay,
            "betas": moved_betas(options.betas, n.one_minus_beta),
        }
        for role, n in evaluated
    ]


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
    kept += tokens * config.shared_experts * 3 * columns  # of the shared experts, before and after their activation
    passing = rows * (4 * config.width + 6 * columns) + 2 * tokens * heads * config.context  # while one layer is at work
    passing += 3 * (slots // BLOCK + config.experts) * config.width * columns  # the weights of each block
    return 4 * (weights + config.depth * kept + passing + tokens * 6 * config.vocab_size)
