"""Training: configs, learning rates, seeds -> loss histories.

One run is the textbook loop, `torch.optim.AdamW` over the model's own parameter groups. Its numbers depend on the config,
the seed, the corpus and the options alone: initial weights and data order have a generator each, and a CPU run uses one
thread (the order of a sum, and so its rounding, depends on the number of threads).
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from os import PathLike

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import __version__
from .corpus import Corpus, load_corpus
from .model import Config, MiniMoE, config_from_dict


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
    eval_batches: int = 8  # fixed validation batches, evenly spaced over the validation text
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
    corpus: str | PathLike | Corpus,
    steps: int,
    options: TrainOptions = TrainOptions(),
    device: str | torch.device | None = None,
) -> list[Run]:
    """Train run i with configs[i], lrs[i] and seeds[i]; a single value or a list of one serves every run.

    A seed sets `config.seed` and the data order. device None takes a GPU when there is one. A run that diverges is
    returned like any other, with infinite losses. On a CPU the numbers are the same, bit for bit, each time and in any
    company. Raises ValueError for lists of different lengths, an LR that is not positive and finite, steps below 1, a
    device that is not there, or a corpus that has more symbols than a config's vocabulary or is too short.
    """
    corpus = load_corpus(corpus)
    specs = _broadcast(configs, lrs, seeds)
    steps = check_training(specs, corpus, steps)
    data = _Data(corpus, available_device(device))
    with one_thread():
        return [_train_alone(config, lr, data, steps, options) for config, lr in specs]


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

    def order(self, seed: int, steps: int, batch_size: int, context: int) -> Tensor:
        """(steps, B) first characters of the training sequences."""
        generator = torch.Generator("cpu").manual_seed(seed)
        last = len(self.train) - context
        return torch.randint(last, (steps, batch_size), generator=generator).to(self.device)

    def validation(self, batches: int, batch_size: int, context: int) -> list[Tensor]:
        """The fixed validation batches, evenly spaced over the text."""
        first = torch.linspace(0, len(self.val) - context - 1, batches * batch_size, dtype=torch.float64).long()
        return list(windows(self.val, first.to(self.device), context).split(batch_size))


def _tensor(tokens: np.ndarray) -> Tensor:
    return torch.from_numpy(tokens.astype(np.uint8 if tokens.itemsize == 1 else np.int32))  # a copy: it may be read-only


def windows(text: Tensor, first: Tensor, context: int) -> Tensor:
    """(n,) text, (B,) first characters -> (B, T + 1) int64 tokens."""
    return text[first[:, None] + torch.arange(context + 1, device=text.device)].long()


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


def losses(model: MiniMoE, batch: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T + 1) -> (loss to train on, cross-entropy in nats), both ()."""
    out = model(batch[:, :-1])
    cross_entropy = F.cross_entropy(out.logits.flatten(0, 1), batch[:, 1:].flatten())
    loss = cross_entropy + model.config.balance_weight * out.balance_loss
    if model.config.z_weight:
        loss = loss + model.config.z_weight * out.router_logits.logsumexp(-1).square().mean()
    return loss, cross_entropy


@torch.no_grad()
def measure(model: MiniMoE, batches: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Over validation batches: cross-entropy (), load (L, E), mean square of the router logits (L,)."""
    loss, load, square = 0.0, 0.0, 0.0
    for batch in batches:
        out = model(batch[:, :-1])
        loss = loss + F.cross_entropy(out.logits.flatten(0, 1), batch[:, 1:].flatten())
        load = load + out.load
        square = square + out.router_logits.square().mean((1, 2, 3))
    n = len(batches)
    return loss / n, load / n, square / n


def record(step: int, train_loss: float, measured: tuple[Tensor, Tensor, Tensor]) -> dict:
    """One row of a history: losses after `step` steps and, per layer, what the router does on the validation batches.

    train_loss: mean since the last record. max_load: largest load over the mean load. idle_experts: experts that no
    token chose. router_rms: root mean square of the router logits.
    """
    loss, load, square = measured
    return {
        "step": step,
        "train_loss": train_loss,
        "val_loss": _finite(loss.item()),
        "max_load": (load.max(-1).values * load.shape[-1]).tolist(),
        "idle_experts": (load == 0).sum(-1).tolist(),
        "router_rms": square.sqrt().tolist(),
    }


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _train_alone(config: Config, lr: float, data: _Data, steps: int, options: TrainOptions) -> Run:
    """One run, the plain way."""
    start = time.perf_counter()
    model = MiniMoE(config).to(data.device)
    groups = model.param_groups(lr, options.eps, options.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=options.betas, fused=True)
    peaks = [group["lr"] for group in optimizer.param_groups]
    order = data.order(options.order_seed(config.seed), steps, options.batch_size, config.context)
    validation = data.validation(options.eval_batches, options.batch_size, config.context)
    history: list[dict] = []
    trace: list[Tensor] = []  # the cross-entropy of every step
    for stop in record_steps(steps, options.evals):
        since = len(trace)
        for step in range(since, stop):
            factor = lr_factor(step, steps, options)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            loss, cross_entropy = losses(model, windows(data.train, order[step], config.context))
            optimizer.zero_grad()
            loss.backward()
            if options.clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
            optimizer.step()
            trace.append(cross_entropy.detach())
        train_loss = _finite(torch.stack(trace[since:]).mean().item())
        history.append(record(stop, train_loss, measure(model, validation)))
        if math.isinf(train_loss) or math.isinf(history[-1]["val_loss"]):
            break  # it never comes back
    diverged = history[-1]["step"] < steps or math.isinf(history[-1]["train_loss"] + history[-1]["val_loss"])
    tail = torch.stack(trace[-max(1, math.ceil(steps / 10)) :]).mean().item()
    return Run(
        config=config,
        lr=lr,
        seed=config.seed,
        steps=steps,
        train_loss=math.inf if diverged else tail,
        val_loss=math.inf if diverged else history[-1]["val_loss"],
        diverged=diverged,
        seconds=time.perf_counter() - start,
        corpus=data.corpus.name,
        corpus_digest=data.corpus.digest,
        device=str(data.device),
        history=history,
        model=model,
    )


def finished_run(cell: dict, corpus: Corpus, device: torch.device) -> dict:
    """Train one cell of a sweep: its labels in, the same with the run's results out, as the store keeps them."""
    config, options = config_from_dict(cell["config"]), TrainOptions(**cell["options"])
    (run,) = train(config, cell["lr"], config.seed, corpus, cell["steps"], options, device)
    return {
        **cell,
        "train_loss": run.train_loss,
        "val_loss": run.val_loss,
        "diverged": run.diverged,
        "seconds": round(run.seconds, 3),
        "device": run.device,
        "versions": {"minimoe": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "history": run.history,
    }
