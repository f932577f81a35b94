"""Sweeps: grid -> data frame, one row per run.

Two cells of a grid are one run when everything that training can see is equal: every evaluated number of the table, the
shape, the data, the schedule and the seed. Such a run is trained and stored once, and each cell keeps its row.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from functools import lru_cache
from pathlib import Path

import joblib
import pandas as pd
import torch
from tqdm.auto import tqdm

from . import __version__
from .corpus import Corpus, load_corpus
from .model import Config, MiniMoE, config_from_dict, config_to_dict
from .parametrization import Numbers, Parametrization, named_roles, numbers, parametrization
from .store import FORMAT, RunStore
from .training import TrainOptions, check_training, default_device, train

LRS = tuple(2.0**octave for octave in range(-10, -2))
NOT_SHAPE = ("parametrization", "seed", "base_width", "base_depth", "base_n_experts", "base_top_k", "base_granularity")


def sweep(
    widths: Sequence[int] = (32, 64, 128),
    parametrizations: Sequence[str | Parametrization] = ("sp", "simplep", "mup"),
    lrs: Sequence[float] = LRS,
    seeds: Sequence[int] = (0,),
    steps: int = 200,
    corpus: str | os.PathLike | Corpus = "pydocs",
    *,
    options: TrainOptions = TrainOptions(),  # noqa: B008 (frozen)
    store: str | os.PathLike | None = None,
    n_jobs: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    **config_fields,
) -> pd.DataFrame:
    """Train the grid widths x parametrizations x lrs x seeds; one row per cell, in that order.

    config_fields: any other field of Config (`depth=3, n_experts=6`). store: path of a JSON-lines file to which each
    finished run is appended at once, and whose runs are not trained again. n_jobs: processes on a CPU (default: one per
    core), each with one thread; on a GPU runs follow one another in this process.

    Columns: every Config field (parametrization by its name), lr, steps, train_loss and val_loss (nats per character;
    infinite if the run diverged), diverged, seconds, corpus, corpus_digest, key (the run's identity) and history (the
    records along the way, see `training.record`). Raises ValueError or TypeError, before any training, for bad input;
    KeyboardInterrupt on Ctrl-C, after saying how to go on.
    """
    corpus = load_corpus(corpus)
    cells = grid(widths, parametrizations, lrs, seeds, corpus.vocab_size, config_fields)
    check_training(cells, corpus, steps)
    keys = [run_key(config, lr, steps, options, corpus.digest) for config, lr in cells]
    distinct = dict(zip(keys, cells, strict=True))
    runs = {}
    if store is not None:
        store = RunStore(store)
        store.prepare()
        runs = {key: run for key, run in store.load().items() if key in distinct}
    missing = {key: cell for key, cell in distinct.items() if key not in runs}
    for run in _trained(missing, corpus, steps, options, n_jobs, device, progress, store):
        if store is not None:
            store.append(run)
        runs[run["key"]] = run
    return pd.DataFrame([_row(config, lr, runs[key]) for (config, lr), key in zip(cells, keys, strict=True)])


def read_sweep(path: str | os.PathLike) -> pd.DataFrame:
    """The frame of everything in a run store, in the columns of `sweep`.

    A run that several of the store's parametrizations share (at the base shape, all of them) has a row for each.
    Raises FileNotFoundError for a missing store, ValueError for a damaged or empty one.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no run store at {path}: `minimoe sweep --store {path}` makes one")
    runs = RunStore(path).load()
    if not runs:
        raise ValueError(f"{path} holds no runs of format {FORMAT}")
    configs = {key: config_from_dict(run["config"]) for key, run in runs.items()}
    rows = []
    for table in dict.fromkeys(config.parametrization for config in configs.values()):
        for key, run in runs.items():
            config = replace(configs[key], parametrization=table)
            same = run_key(config, run["lr"], run["steps"], TrainOptions(**run["options"]), run["corpus_digest"])
            if same == key:
                rows.append(_row(config, run["lr"], run))
    return pd.DataFrame(rows)


def grid(widths, parametrizations, lrs, seeds, vocab_size: int, config_fields: dict) -> list[tuple[Config, float]]:
    """(config, lr) for every cell. Raises ValueError for an empty axis or two tables under one name, TypeError for a
    field that Config does not have."""
    if isinstance(parametrizations, str | Parametrization):
        parametrizations = (parametrizations,)
    axes = {"widths": widths, "parametrizations": parametrizations, "lrs": lrs, "seeds": seeds}
    axes = {name: list(values) if isinstance(values, Iterable) else [values] for name, values in axes.items()}
    for name, values in axes.items():
        if not values:
            raise ValueError(f"{name} is empty: give at least one value")
    own = {"parametrization": "parametrizations", "width": "widths", "seed": "seeds", "vocab_size": "corpus"}
    known = [f.name for f in fields(Config) if f.name not in own]
    for name in config_fields:
        if name not in known:
            advice = f"give {own[name]} instead" if name in own else f"Config has {', '.join(known)}"
            raise TypeError(f"sweep got an unknown field {name!r}: {advice}")
    tables = [parametrization(table) for table in axes["parametrizations"]]
    for table in tables:
        if any(other.name == table.name and other != table for other in tables):
            raise ValueError(f"two different tables are called {table.name!r}: give one of them another name")
    return [
        (Config(table, width, vocab_size=vocab_size, seed=seed, **config_fields), float(lr))
        for table in dict.fromkeys(tables)
        for width in axes["widths"]
        for lr in axes["lrs"]
        for seed in axes["seeds"]
    ]


@lru_cache(maxsize=4096)
def tensor_numbers(config: Config) -> dict[str, Numbers]:
    """name -> evaluated numbers, for each of the model's tensors."""
    with torch.device("meta"):
        model = MiniMoE(config)
    return {name: numbers(param, config.parametrization) for name, param in named_roles(model)}


def run_key(config: Config, lr: float, steps: int, options: TrainOptions, corpus_digest: str) -> str:
    """The identity of a run: a digest of everything that its numbers depend on, and of nothing else."""
    evaluated = {
        name: (n.std, n.multiplier, lr * n.lr, options.eps * n.eps, options.weight_decay * n.weight_decay)
        for name, n in tensor_numbers(replace(config, seed=0)).items()
    }
    identity = {
        "format": FORMAT,
        "shape": {f.name: getattr(config, f.name) for f in fields(config) if f.name not in NOT_SHAPE},
        "numbers": evaluated,
        "seed": config.seed,
        "steps": steps,
        "options": asdict(options),
        "corpus": corpus_digest,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _trained(missing, corpus, steps, options, n_jobs, device, progress, store) -> Iterator[dict]:
    """The runs of `missing` as they finish, longest first, with a progress bar and a clean end on Ctrl-C."""
    device = default_device() if device is None else torch.device(device)
    cost = {key: training_cost(config) for key, (config, _) in missing.items()}
    longest_first = sorted(missing, key=cost.get, reverse=True)
    jobs = [(key, *missing[key], corpus, steps, options, device) for key in longest_first]
    n_jobs = min(joblib.cpu_count() if n_jobs is None else n_jobs, max(1, len(jobs))) if device.type == "cpu" else 1
    done = 0
    bar_format = "{desc}{percentage:3.0f}%|{bar}| {elapsed} elapsed, about {remaining} left"
    bar = tqdm(total=sum(cost.values()), bar_format=bar_format, disable=not progress or not jobs, smoothing=0)
    with bar:
        bar.set_description_str(f"run 0/{len(jobs)} ")
        try:
            for run in _executed(jobs, n_jobs):
                yield run
                done += 1
                bar.set_description_str(f"run {done}/{len(jobs)} ", refresh=False)
                bar.update(cost[run["key"]])
        except KeyboardInterrupt:
            kept = f"{done} of {len(jobs)} runs are in {store.path}: the same call goes on from there"
            lost = f"{done} of {len(jobs)} runs were finished; give a store to keep them next time"
            raise KeyboardInterrupt(f"sweep stopped; {kept if store is not None else lost}") from None


def training_cost(config: Config) -> float:
    """About how long a step takes, in arbitrary units: active matrix parameters, plus attention and a fixed overhead."""
    experts = config.active_experts * config.expert_width * config.width * (3 if config.activation == "swiglu" else 2)
    attention = 4 * config.width**2 + 12 * config.context * config.width
    return config.depth * (experts + attention + 30_000) + config.width * config.vocab_size


def _executed(jobs: list[tuple], n_jobs: int) -> Iterator[dict]:
    if n_jobs == 1:
        yield from (_run_row(*job) for job in jobs)
        return
    # batch_size=1: a finished run reaches the store at once, not when its neighbours have finished too
    pool = joblib.Parallel(n_jobs, backend="loky", batch_size=1, return_as="generator_unordered")
    with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
        results = pool(joblib.delayed(_worker)(*job) for job in jobs)
        try:
            yield from results
        finally:
            results.close()


def _worker(*job) -> dict:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    return _run_row(*job)


def _run_row(key, config, lr, corpus, steps, options, device) -> dict:
    """Train one cell and return its line for the store."""
    (run,) = train(config, lr, config.seed, corpus, steps, options, device)
    return {
        "format": FORMAT,
        "key": key,
        "config": config_to_dict(config),
        "lr": lr,
        "seed": run.seed,
        "steps": steps,
        "options": asdict(options),
        "train_loss": run.train_loss,
        "val_loss": run.val_loss,
        "diverged": run.diverged,
        "seconds": round(run.seconds, 3),
        "corpus": run.corpus,
        "corpus_digest": run.corpus_digest,
        "device": run.device,
        "versions": versions(),
        "history": run.history,
    }


def versions() -> dict[str, str]:
    """Of the packages that a run's numbers depend on."""
    return {"minimoe": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _row(config: Config, lr: float, run: dict) -> dict:
    """A frame's row: the cell's own labels, the run's results (null losses of the store are infinite)."""

    def number(value, missing):
        return missing if value is None else value

    labels = {f.name: getattr(config, f.name) for f in fields(config)} | {"parametrization": config.parametrization.name}
    losses = {name: number(run[name], math.inf) for name in ("train_loss", "val_loss")}
    history = [
        record
        | {name: number(record[name], math.inf) for name in ("train_loss", "val_loss")}
        | {"router_rms": [number(rms, math.nan) for rms in record["router_rms"]]}
        for record in run["history"]
    ]
    same = {name: run[name] for name in ("steps", "diverged", "seconds", "corpus", "corpus_digest", "key")}
    return {**labels, "lr": lr, **same, **losses, "history": history}
