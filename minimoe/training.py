"""Training: configs, learning rates, seeds -> loss histories.

One run is the textbook loop (`SingleRun`); several may be one program (`batched.BatchedRuns`). A run's numbers depend
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
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import __version__
from .corpus import Corpus, load_corpus
from .model import Config, MiniMoE, Output, config_from_dict


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
    options: TrainOptions = TrainOptions(),
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
    any company; batched (at_once above 1) they agree with that to rounding. On a GPU, deterministic=True makes a program's
    numbers repeat (torch.use_deterministic_algorithms), at some cost in time.

    Raises ValueError for lists of different lengths, an LR that is not positive and finite, steps below 1, a device that
    is not there, or a corpus that has more symbols than a config's vocabulary or is too short.
    """
    corpus, device = load_corpus(corpus), available_device(device)
    specs = _broadcast(configs, lrs, seeds)
    steps = check_training(specs, corpus, steps)
    if at_once is not None and not whole(at_once, 1):
        raise ValueError(f"at_once={at_once!r}: must be a positive integer or None")
    data, runs = _Data(corpus, device), {}
    plain = device.type == "cpu" and (at_once or 1) == 1
    with one_thread(), _deterministic(deterministic):
        for part in parts_of_one_shape(list(enumerate(specs)), lambda item: item[1][0], options, device, at_once):
            for numbered, trained in _as_memory_allows(part, lambda p: _train([s for _, s in p], data, steps, options, plain)):
                runs |= {i: run for (i, _), run in zip(numbered, trained, strict=True)}
    return [runs[i] for i in range(len(specs))]


def planned_size(config: Config, options: TrainOptions, device: torch.device) -> int:
    """How many runs of this shape to train as one program: one on a CPU, elsewhere what fits in the free memory."""
    if device.type != "cuda":
        return 1
    from .batched import memory_per_run

    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, to be used again
    return max(1, int(0.8 * free / memory_per_run(config, options)))


def parts_of_one_shape(
    items: list, config_of: Callable, options: TrainOptions, device: torch.device, at_once: int | None = None
) -> list[list]:
    """The items as batched programs: of one shape each (all but table, base shape and seed), of the planned size at most.

    Where a GPU's memory makes several programs of one shape, that is said in a warning.
    """
    groups: dict[tuple, list] = {}
    for item in items:
        groups.setdefault(tuple(config_of(item).shape.items()), []).append(item)
    parts = []
    for group in groups.values():
        size = at_once or planned_size(config_of(group[0]), options, device)
        if device.type != "cpu" and not at_once and len(group) > size:
            warnings.warn(f"{len(group)} runs of one shape, {size} at once: so many fit in the GPU's memory", stacklevel=3)
        parts += [group[i : i + size] for i in range(0, len(group), size)]
    return parts


def _as_memory_allows(runs: list, train_part: Callable[[list], list[Run]]) -> Iterator[tuple[list, list[Run]]]:
    """(part, its runs): all of them at once or, where memory runs out, by halves, and that is said."""
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
        raise ValueError(f"device={str(device)!r} is not available here ({str(error).splitlines()[0]})") from error
    return found


def _broadcast(configs, lrs, seeds) -> list[tuple[Config, float]]:
    lists = [list(v) if isinstance(v, Sequence | np.ndarray) else [v] for v in (configs, lrs, seeds)]
    runs = max(map(len, lists))
    for name, values in zip(("configs", "lrs", "seeds"), lists, strict=True):
        if not values:
            raise ValueError(f"{name} is empty")
        if len(values) not in (1, runs):
            raise ValueError(f"{name} has {len(values)} values for {runs} runs: give one, or one for each run")
    configs, lrs, seeds = (values * runs if len(values) == 1 else values for values in lists)
    return [(replace(c, seed=seed), float(lr)) for c, lr, seed in zip(configs, lrs, seeds, strict=True)]


def check_training(specs: Sequence[tuple[Config, float]], corpus: Corpus, steps: int) -> int:
    """The number of steps as an int; ValueError for what could not be trained: (config, lr) pairs, corpus or steps."""
    if not whole(steps, 1):
        raise ValueError(f"steps={steps!r}: must be a positive integer")
    for config, lr in specs:
        if not (math.isfinite(lr) and lr > 0):
            raise ValueError(f"lr={lr!r}: must be positive and finite")
        if corpus.vocab_size > config.vocab_size:
            held = f"corpus {corpus.name!r} has {corpus.vocab_size} symbols"
            raise ValueError(f"vocab_size={config.vocab_size}: {held}; set vocab_size to at least that")
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


class _Data:
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


def lr_factor(step: int, steps: int, options: TrainOptions) -> float:
    """The schedule at step 0 .. steps - 1: a linear warm-up to 1, then a cosine to `final_lr` at the last step."""
    warmup = round(options.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup + 1) / (steps - warmup)
    return options.final_lr + (1 - options.final_lr) * (1 + math.cos(math.pi * progress)) / 2


def record_steps(steps: int, evals: int) -> list[int]:
    """After how many steps a record is made: `evals` of them (all, if there are fewer), the last one at the end."""
    return sorted({math.ceil(steps * i / evals) for i in range(1, evals + 1)})


def losses(run: Callable[[Tensor], Output], config: Config, batch: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T + 1) -> (loss to train on, cross-entropy in nats), both (). `run` is a model: tokens -> Output."""
    out = run(batch[:, :-1])
    cross_entropy = F.cross_entropy(out.logits.flatten(0, 1), batch[:, 1:].flatten())
    loss = cross_entropy + config.balance_weight * out.balance_loss
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


def _train(specs: list[tuple[Config, float]], data: _Data, steps: int, options: TrainOptions, plain: bool) -> list[Run]:
    """The runs of one shape: as one batched program, or, for a single one, the plain way."""
    from .batched import BatchedRuns

    start = time.perf_counter()
    config = specs[0][0]
    models = [MiniMoE(config).to(data.device) for config, _ in specs]
    engine = (SingleRun if plain else BatchedRuns)(models, [lr for _, lr in specs], options)
    order = data.order([options.order_seed(config.seed) for config, _ in specs], steps, options.batch_size, config.context)
    validation = data.validation(options.eval_batches, options.batch_size, config.context)
    histories: list[list[dict]] = [[] for _ in specs]
    trace: list[Tensor] = []  # the cross-entropies (R,) of every step
    alive = [True] * len(specs)
    for stop in record_steps(steps, options.evals):
        since = len(trace)
        for step in range(since, stop):
            batch = windows(data.train, order[step], config.context)  # (R, B, T + 1)
            trace.append(engine.step(batch, lr_factor(step, steps, options)))
        train_losses = torch.stack(trace[since:]).mean(0).tolist()
        val_losses, loads, squares = engine.measure(validation)
        for i, val_loss in enumerate(val_losses.tolist()):
            if alive[i]:
                row = record(stop, _finite(train_losses[i]), _finite(val_loss), loads[i], squares[i])
                histories[i].append(row)
                alive[i] = math.isfinite(row["train_loss"] + row["val_loss"])
        if not any(alive):
            break  # they never come back
    tails = torch.stack(trace[-math.ceil(steps / 10) :]).mean(0).tolist()
    seconds = (time.perf_counter() - start) / len(specs)
    results = zip(specs, engine.trained_models(), histories, tails, alive, strict=True)
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
    """Train cells of a sweep: their labels in, the same with the runs' results out, as the store keeps them."""
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
