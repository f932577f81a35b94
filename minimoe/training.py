"""Training: configs, learning rates, seeds -> loss histories.

One run is the textbook loop, `torch.optim.AdamW` over the model's own parameter groups. Its numbers depend on the config,
the seed, the corpus and the options alone: initial weights and data order have a generator each, and a CPU run uses one
thread (the order of a sum, and so its rounding, depends on the number of threads).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .corpus import Corpus
from .model import Config, MiniMoE


@dataclass(frozen=True)
class TrainOptions:
    """How to train, the same for every run of a sweep. Checked once, here; raises ValueError."""

    batch_size: int = 16  # sequences of `context` characters per step
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's
    eps: float = 1e-8  # AdamW's, before the table's factor
    weight_decay: float = 0.0  # AdamW's, before the table's factor
    warmup: float = 0.1  # fraction of the steps in which the LR rises linearly
    final_lr: float = 0.1  # the cosine's end, as a fraction of the peak
    clip: float | None = None  # largest gradient norm; None: no clipping (it breaks the abc symmetry)
    evals: int = 10  # records along the way, evenly spaced, the last one at the end
    eval_batches: int = 8  # fixed validation batches, evenly spaced over the validation text
    data_seed: int | None = None  # of the data order; None: the run's own seed

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(self.betas))
        valid = {
            "batch_size": _whole(self.batch_size, 1),
            "betas": len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "eps": math.isfinite(self.eps) and self.eps >= 0,
            "weight_decay": math.isfinite(self.weight_decay) and self.weight_decay >= 0,
            "warmup": 0 <= self.warmup <= 1,
            "final_lr": 0 <= self.final_lr <= 1,
            "clip": self.clip is None or (math.isfinite(self.clip) and self.clip > 0),
            "evals": _whole(self.evals, 1),
            "eval_batches": _whole(self.eval_batches, 1),
            "data_seed": self.data_seed is None or _whole(self.data_seed, 0),
        }
        for name in (f.name for f in fields(self)):
            if not valid[name]:
                raise ValueError(f"{name}={getattr(self, name)!r} is not valid: see TrainOptions")


def _whole(value, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


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
    model: MiniMoE | None


def train(
    configs: Config | Sequence[Config],
    lrs: float | Sequence[float],
    seeds: int | Sequence[int],
    corpus: Corpus,
    steps: int,
    options: TrainOptions = TrainOptions(),
    device: str | torch.device | None = None,
) -> list[Run]:
    """Train run i with configs[i], lrs[i] and seeds[i]; a single value or a list of one serves every run.

    A seed sets `config.seed` and the data order. device None takes a GPU when there is one. A run that diverges is
    returned like any other, with infinite losses. Raises ValueError for lists of different lengths, an LR that is not
    positive and finite, steps below 1, or a corpus that has more symbols than a config's vocabulary or is too short.
    """
    specs = _broadcast(configs, lrs, seeds)
    check_training(specs, corpus, steps)
    device = default_device() if device is None else torch.device(device)
    data = _Data(corpus, device)
    with one_thread():
        return [_train_alone(config, lr, data, steps, options) for config, lr in specs]


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _broadcast(configs, lrs, seeds) -> list[tuple[Config, float]]:
    lists = [list(v) if isinstance(v, Sequence | np.ndarray) else [v] for v in (configs, lrs, seeds)]
    runs = max(map(len, lists))
    for name, values in zip(("configs", "lrs", "seeds"), lists, strict=True):
        if not values:
            raise ValueError(f"{name} is empty")
        if len(values) not in (1, runs):
            raise ValueError(f"{name} has {len(values)} values for {runs} runs: give one, or one for each run")
    configs, lrs, seeds = (values * runs if len(values) == 1 else values for values in lists)
    return [(replace(c, seed=int(seed)), float(lr)) for c, lr, seed in zip(configs, lrs, seeds, strict=True)]


def check_training(specs: Sequence[tuple[Config, float]], corpus: Corpus, steps: int) -> None:
    """Raise ValueError for anything about (config, lr) pairs, corpus and steps that could not be trained."""
    if not _whole(steps, 1):
        raise ValueError(f"steps={steps!r}: must be a positive integer")
    for config, lr in specs:
        if not (math.isfinite(lr) and lr > 0):
            raise ValueError(f"lr={lr!r}: must be positive and finite")
        if corpus.vocab_size > config.vocab_size:
            held = f"corpus {corpus.name!r} has {corpus.vocab_size} symbols"
            raise ValueError(f"vocab_size={config.vocab_size}: {held}; set vocab_size to at least that")
        corpus.require_context(config.context)


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
    seed = config.seed if options.data_seed is None else options.data_seed
    order = data.order(seed, steps, options.batch_size, config.context)
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
