"""Training: configs, learning rates, seeds -> loss histories.

One run is the textbook loop (`step.SingleRun`); several may be one program (`batched.BatchedRuns`). A run's numbers depend
on the config, the seed, the corpus and the options alone: initial weights and data order have a generator each, and a CPU
run uses one thread (the order of a sum, and so its rounding, depends on the number of threads).
"""

from __future__ import annotations

import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import __version__
from .batched import BatchedRuns, memory_per_run
from .checks import positive, require, whole
from .config import Config, config_from_dict
from .corpus import Corpus, load_corpus
from .model import MiniMoE
from .parametrization import FAMILY
from .step import SingleRun, TrainOptions, lr_factors


@dataclass
class Run:
    """One finished run. Losses are cross-entropies in nats per character, without auxiliary losses; infinite if diverged."""

    config: Config
    lr: float
    seed: int
    steps: int
    train_loss: float  # mean over the last 10% of the steps
    val_loss: float
    diverged: bool  # a loss was not finite
    seconds: float  # wall time of this run
    corpus: str
    corpus_digest: str
    device: str
    history: list[dict]  # see `record`
    model: MiniMoE


def train(
    configs: Config | Sequence[Config],
    lrs: float | Sequence[float],
    seeds: int | Sequence[int],
    corpus: str | os.PathLike | Corpus,
    steps: int,
    options: TrainOptions = TrainOptions(),  # noqa: B008 (frozen)
    device: str | torch.device | None = None,
    *,
    at_once: int | None = None,
    deterministic: bool = False,
) -> list[Run]:
    """Train run i with configs[i], lrs[i] and seeds[i]; a single value or a list of one serves every run.

    A seed sets `config.seed` and the data order. device None takes a GPU when there is one. A run that diverges is
    returned like any other, with infinite losses.

    at_once: how many runs of one shape are trained as one batched program. By default one on a CPU, where that is
    fastest, and on a GPU as many as its memory holds. On a CPU a run's numbers are the same, bit for bit, each time and in
    any company; batched (at_once above 1) they agree with that to rounding. On a GPU a program of one run is the plain
    loop. There deterministic=True makes a program's numbers repeat (torch.use_deterministic_algorithms), at some cost in
    time.

    Raises ValueError for lists of different lengths, an LR that is not positive and finite, steps below 1, a device that
    is not there, or a corpus that has more symbols than a config's vocabulary or is too short.
    """
    corpus, device = load_corpus(corpus), available_device(device)
    specs = _broadcast(configs, lrs, seeds)
    steps = check_training(specs, corpus, steps)
    data, runs = TextData(corpus, device), {}

    def trained_part(part: list[int]) -> list[Run]:
        return _train([specs[i] for i in part], data, steps, options, engine(len(part), device, at_once))

    with one_thread(), _deterministic(deterministic):
        for part in parts_of_one_kind(range(len(specs)), lambda i: Kind(specs[i][0], options, steps), device, at_once):
            for indices, trained in _as_memory_allows(part, trained_part):
                runs |= dict(zip(indices, trained, strict=True))
    return [runs[i] for i in range(len(specs))]


def engine(runs: int, device: torch.device, at_once: int | None = None) -> type[SingleRun] | type[BatchedRuns]:
    """What trains a program of so many runs: one run is the plain loop.

    On a CPU a program of one run is batched where the caller asked for several at once: a run's numbers then do not depend
    on its company.
    """
    plain = runs == 1 and (device.type != "cpu" or at_once in (None, 1))
    return SingleRun if plain else BatchedRuns


class Kind(NamedTuple):
    """What runs of one program share: the config's shape, the options, the number of steps and the roles' schedules."""

    config: Config
    options: TrainOptions
    steps: int

    @property
    def key(self) -> tuple:
        """Equal for two kinds that can be one program."""
        table = self.config.parametrization
        served = [role for role in {*table.roles, *FAMILY} if role in table]  # a finer role has its family's end, or its own
        ends = {role: final for role, final in table.final_lrs(served).items() if final != 1}
        return (*self.config.shape.items(), self.options, self.steps, *sorted(ends.items()))


def planned_size(config: Config, options: TrainOptions, device: torch.device) -> int:
    """How many runs of this shape to train as one program: one on a CPU, elsewhere what fits in the free memory."""
    if device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, to be used again
    return max(1, int(0.8 * free / memory_per_run(config, options)))


def parts_of_one_kind(
    items: Iterable, kind_of: Callable[[Any], Kind], device: torch.device, at_once: int | None = None
) -> list[list]:
    """The items as batched programs, each of one kind and of `at_once` runs at most, by default the planned size.

    The runs of a program may differ in table, base shape and seed. Warns where a GPU's memory makes several programs of one
    kind. Raises ValueError for a bad at_once.
    """
    require(at_once is None or whole(at_once, 1), "at_once", at_once, "must be a positive integer or None")
    groups: dict[tuple, tuple[Kind, list]] = {}
    for item in items:
        kind = kind_of(item)
        groups.setdefault(kind.key, (kind, []))[1].append(item)
    parts = []
    for kind, group in groups.values():
        size = at_once or planned_size(kind.config, kind.options, device)
        if device.type != "cpu" and not at_once and len(group) > size:
            warnings.warn(f"{len(group)} runs of one shape, {size} at once: so many fit in the GPU's memory", stacklevel=3)
        parts += [group[i : i + size] for i in range(0, len(group), size)]
    return parts


def _as_memory_allows(runs: list, train_part: Callable[[list], list[Run]]) -> Iterator[tuple[list, list[Run]]]:
    """Train the runs at once; where memory runs out, warn and go on with half as many. Yields (part, its trained runs)."""
    waiting = [runs]
    while waiting:
        part, trained = waiting.pop(0), None
        try:
            trained = train_part(part)
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
        if trained is None:  # out of the except clause, whose traceback would keep what the attempt held
            half = (len(part) + 1) // 2
            warnings.warn(f"out of memory with {len(part)} runs at once: going on with {half}", stacklevel=3)
            torch.cuda.empty_cache()
            waiting = [rest[i : i + half] for rest in (part, *waiting) for i in range(0, len(rest), half)]
            continue
        yield part, trained


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """torch's deterministic algorithms inside, if wanted; the caller's setting again outside."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it; read when CUDA starts
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def available_device(device: str | torch.device | None = None) -> torch.device:
    """The named device; by default a GPU when there is one. Raises ValueError if it is not there."""
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={str(device)!r} is not available here ({str(error).splitlines()[0].split('. ')[0]})") from error
    require(found.type != "meta", "device", str(device), "holds no values")
    return found


def _broadcast(configs, lrs, seeds) -> list[tuple[Config, float]]:
    lists = [list(v) if isinstance(v, Sequence | np.ndarray) and not isinstance(v, str) else [v] for v in (configs, lrs, seeds)]
    runs = max(map(len, lists))
    for name, values in zip(("configs", "lrs", "seeds"), lists, strict=True):
        if not values:
            raise ValueError(f"{name} is empty")
        if len(values) not in (1, runs):
            raise ValueError(f"{name} has {len(values)} values for {runs} runs: give one, or one for each run")
    configs, lrs, seeds = (values * runs if len(values) == 1 else values for values in lists)
    for config in configs:
        require(isinstance(config, Config), "configs", config, "must be a Config, or several")
    return [(replace(c, seed=seed), positive("lr", lr)) for c, lr, seed in zip(configs, lrs, seeds, strict=True)]


def check_training(specs: Sequence[tuple[Config, float]], corpus: Corpus, steps: int) -> int:
    """The number of steps as an int; ValueError for what could not be trained: (config, lr) pairs, corpus or steps."""
    require(whole(steps, 1), "steps", steps, "must be a positive integer")
    rule = f"corpus {corpus.name!r} has {corpus.vocab_size} symbols; set vocab_size to at least that"
    for config, lr in specs:
        positive("lr", lr)
        require(corpus.vocab_size <= config.vocab_size, "vocab_size", config.vocab_size, rule)
        corpus.require_context(config.context)
    return int(steps)


@contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread inside, the caller's number again outside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class TextData:
    """A corpus on a device, cut into batches of sequences with their targets: (B, T + 1)."""

    def __init__(self, corpus: Corpus, device: torch.device):
        self.corpus, self.device = corpus, device
        self.train = _tensor(corpus.train).to(device)
        self.val = _tensor(corpus.val).to(device)

    def order(self, seeds: Sequence[int], steps: int, batch_size: int, context: int) -> Tensor:
        """(steps, R, B) first characters of the training sequences: run r's come from a generator of its own."""
        last = len(self.train) - context
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        drawn = [torch.randint(last, (steps, batch_size), generator=generator) for generator in generators]
        return torch.stack(drawn, dim=1).to(self.device)

    def validation(self, batches: int, batch_size: int, context: int) -> list[Tensor]:
        """The fixed validation batches, evenly spaced over the text."""
        first = torch.linspace(0, len(self.val) - context - 1, batches * batch_size, dtype=torch.float64).long()
        return list(windows(self.val, first.to(self.device), context).split(batch_size))


def _tensor(tokens: np.ndarray) -> Tensor:
    return torch.from_numpy(tokens.astype(np.uint8 if tokens.itemsize == 1 else np.int32))  # a copy: it may be read-only


def windows(text: Tensor, first: Tensor, context: int) -> Tensor:
    """(n,) text, (..., B) first characters -> (..., B, T + 1) int64 tokens."""
    return text[first[..., None] + torch.arange(context + 1, device=text.device)].long()


def record_steps(steps: int, evals: int) -> list[int]:
    """After how many steps a record is made: `evals` of them (all, if there are fewer), the last one at the end."""
    evals = min(steps, evals)
    return sorted({math.ceil(steps * i / evals) for i in range(1, evals + 1)})


def record(step: int, train_loss: float, val_loss: float, load: Tensor, square: Tensor) -> dict:
    """One row of a history: losses after `step` steps and, per layer, what the router does on the validation batches.

    train_loss: mean since the last record. max_load: largest load over the mean load. idle_experts: experts that no
    token chose. router_rms: root mean square of the router logits.
    """
    return {
        "step": step,
        "train_loss": train_loss,
        "val_loss": val_loss,
        "max_load": (load.max(-1).values * load.shape[-1]).tolist(),
        "idle_experts": (load == 0).sum(-1).tolist(),
        "router_rms": square.sqrt().tolist(),
    }


def _train(specs: list[tuple[Config, float]], data: TextData, steps: int, options: TrainOptions, trainer: type) -> list[Run]:
    """The runs of one shape, trained as one program. trainer: SingleRun or BatchedRuns."""
    start = time.perf_counter()
    config = specs[0][0]
    models = [MiniMoE(config).to(data.device) for config, _ in specs]
    program = trainer(models, [lr for _, lr in specs], options, steps)
    order = data.order([options.order_seed(config.seed) for config, _ in specs], steps, options.batch_size, config.context)
    validation = data.validation(options.eval_batches, options.batch_size, config.context)
    histories: list[list[dict]] = [[] for _ in specs]
    trace: list[Tensor] = []  # the cross-entropies (R,) of every step
    alive = [True] * len(specs)
    for model in models:
        model.alphabet = data.corpus.alphabet
    for stop in record_steps(steps, options.evals):
        since = len(trace)
        for step in range(since, stop):
            batch = windows(data.train, order[step], config.context)  # (R, B, T + 1)
            trace.append(program.step(batch, lr_factors(step, steps, options, program.finals)))
        train_losses = torch.stack(trace[since:]).mean(0).tolist()
        val_losses, loads, squares = program.measure(validation)
        for i, val_loss in enumerate(val_losses.tolist()):
            if alive[i]:
                row = record(stop, _finite(train_losses[i]), _finite(val_loss), loads[i], squares[i])
                histories[i].append(row)
                alive[i] = math.isfinite(row["train_loss"] + row["val_loss"])
        if not any(alive):
            break  # they never come back
    tails = torch.stack(trace[-math.ceil(steps / 10) :]).mean(0).tolist()
    seconds = (time.perf_counter() - start) / len(specs)
    results = zip(specs, program.trained_models(), histories, tails, alive, strict=True)
    return [
        Run(
            config=config,
            lr=lr,
            seed=config.seed,
            steps=steps,
            train_loss=tail if converged else math.inf,
            val_loss=history[-1]["val_loss"] if converged else math.inf,
            diverged=not converged,
            seconds=seconds,
            corpus=data.corpus.name,
            corpus_digest=data.corpus.digest,
            device=str(data.device),
            history=history,
            model=model,
        )
        for (config, lr), model, history, tail, converged in results
    ]


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def finished_runs(cells: list[dict], corpus: Corpus, device: torch.device, deterministic: bool = False) -> list[dict]:
    """Train cells of a sweep, all of one kind: their labels in, the same with the runs' results out, as the store keeps
    them."""
    options, steps = TrainOptions(**cells[0]["options"]), cells[0]["steps"]
    configs = [config_from_dict(cell["config"]) for cell in cells]
    lrs, seeds = [cell["lr"] for cell in cells], [config.seed for config in configs]
    runs = train(configs, lrs, seeds, corpus, steps, options, device, at_once=len(cells), deterministic=deterministic)
    versions = {"minimoe": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return [
        {
            **cell,
            "train_loss": run.train_loss,
            "val_loss": run.val_loss,
            "diverged": run.diverged,
            "seconds": round(run.seconds, 3),
            "device": run.device,
            "versions": versions,
            "history": run.history,
        }
        for cell, run in zip(cells, runs, strict=True)
    ]
