"""What cannot fit in memory is refused before anything is allocated, and before anything counts up to a huge number."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from .config import Config
from .memory import free_memory, gigabytes
from .step import TrainOptions

COPIES = 16  # bytes of a parameter in training: the weight, its gradient and Adam's two averages, in float32
BLOCK = 10_000  # bytes of a block's Python objects, without its weights
KEPT = 8  # values per token and channel that each block keeps for the backward pass: from below
STEP = 100  # bytes of a step's loss in the trace
MOST = 2**60  # parameters, whose bytes torch counts in 63 bits
BLAMED = ("width", "depth", "n_experts", "expert_ratio", "granularity", "top_k", "vocab_size", "context")


def parameters(config: Config) -> int:
    """The number of the model's parameters, without making it."""
    columns = 3 if config.activation == "swiglu" else 2
    experts = config.experts * config.expert_width * config.width * columns
    router = config.width * config.experts if config.experts > 1 else 0
    gains = config.width * (2 * config.depth + 1) if config.gains else 0
    outside = config.width * (2 * config.vocab_size + config.context)
    return gains + outside + config.depth * (4 * config.width**2 + router + experts)


def memory_of_training(config: Config, options: TrainOptions, steps: int) -> int:
    """The bytes that one run needs at least."""
    tokens = options.batch_size * config.context
    kept = 4 * tokens * (KEPT * config.width * config.depth + config.vocab_size)
    batches = 8 * options.batch_size * (steps + options.eval_batches * (config.context + 1))
    return COPIES * parameters(config) + BLOCK * config.depth + kept + batches + STEP * steps


def require_memory(runs: Iterable[tuple], here: bool = True) -> None:
    """Raise ValueError, naming the size to blame, if one of the runs (config, lr, steps, options) cannot fit in memory.

    here: whether they are trained in this machine's own memory; elsewhere, only the model's objects must fit here.
    """
    free = free_memory()
    for config, _, steps, options in runs:
        need = memory_of_training(config, options, steps) if here else BLOCK * config.depth
        if free is not None and need > free:
            name, value = _to_blame(config, options, steps)
            raise ValueError(f"{name}={value}: a run needs at least {gigabytes(need)} of memory, and {gigabytes(free)} are free")


def require_countable(config: Config) -> None:
    """Raise ValueError if the model has more blocks than memory can list, or more parameters than torch can count."""
    require_memory([(config, None, 0, TrainOptions())], here=False)
    if parameters(config) > MOST:
        name, value = _to_blame(config, TrainOptions(), 0)
        raise ValueError(f"{name}={value}: the model would have {parameters(config):.1e} parameters")


def _to_blame(config: Config, options: TrainOptions, steps: int) -> tuple[str, int]:
    """(the size that is furthest above its default, its value)."""
    usual = {f.name: f.default for f in (*fields(Config), *fields(TrainOptions))} | {"steps": 1000}
    sizes = {name: getattr(config, name) for name in BLAMED} | {"steps": steps}
    sizes |= {name: getattr(options, name) for name in ("batch_size", "eval_batches")}
    return max(sizes.items(), key=lambda size: size[1] / usual[size[0]])
