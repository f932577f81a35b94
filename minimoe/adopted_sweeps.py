"""Learning-rate sweeps of a model that was adopted (`adoption`): the same text, batches and schedule as `sweep`'s own runs.

frame = adopted_sweep(plan, widths=(64, 128, 256), tables=("as it is", "mup"), lrs=LRS, store="runs/mixtral.jsonl")
transfer_report(frame)
lr_curves(frame)
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path

import joblib
import pandas as pd
import torch
from torch import nn

from .adoption import Plan, logits, next_token_loss
from .checks import require, whole
from .corpus import Corpus, load_corpus
from .parametrization import Parametrization, require_distinct_names
from .step import TrainOptions, lr_factor
from .tables import parametrization
from .training import TextData, one_thread, record_steps, windows

CONTEXT = 64  # characters of a sequence
BASE = "base"  # in place of a table's name, in a store: at the base width all tables without coefficients are one run


def adopted_sweep(
    plan: Plan,
    widths: Sequence[int],
    tables: Sequence[str | Parametrization],
    lrs: Sequence[float],
    seeds: Sequence[int] = (0,),
    steps: int = 200,
    corpus: str | Corpus = "pydocs",
    *,
    options: TrainOptions = TrainOptions(),  # noqa: B008 (frozen)
    store: str | Path | None = None,
    n_jobs: int = 1,
) -> pd.DataFrame:
    """Train the plan's model over tables x widths x lrs x seeds; one row per cell, for `transfer_report` and `lr_curves`.

    store: a file of one JSON line per finished run; what it holds is not trained again. At the base width tables whose
    coefficients are 1 are one run, trained once. n_jobs: processes of one thread each.

    Columns: parametrization, width, lr, seed, steps, train_loss (mean over the last 10% of the steps), val_loss (nats per
    character; infinite if the run diverged), diverged, seconds, history (records of step, train_loss and val_loss).
    Raises ValueError for an empty list, an LR that is not positive, or a store that holds other settings.
    """
    tables = [parametrization(table) for table in tables]
    require_distinct_names(tables)
    for name, values in (("widths", widths), ("tables", tables), ("lrs", lrs), ("seeds", seeds)):
        require(len(values) > 0, name, values, "is empty")
    require(all(math.isfinite(lr) and lr > 0 for lr in lrs), "lrs", lrs, "must be positive and finite")
    require(whole(steps, 1), "steps", steps, "must be a positive integer")
    corpus, store = load_corpus(corpus), Path(store) if store else None
    settings = {"steps": steps, "corpus_digest": corpus.digest, "batch_size": options.batch_size, "base_width": plan.base_width}
    done = {_key(row): row for row in _read(store, settings)}

    neutral = {table.name for table in tables if _is_neutral(plan.at(plan.base_width), table)}

    def cell(table: Parametrization, width: int, lr: float, seed: int) -> dict:
        name = BASE if width == plan.base_width and table.name in neutral else table.name
        return {"parametrization": name, "width": width, "lr": float(lr), "seed": seed}

    longest_first = [cell(*values) for values in product(tables, sorted(widths, reverse=True), lrs, seeds)]
    missing = {_key(wanted): wanted for wanted in longest_first if _key(wanted) not in done}
    named = {table.name: table for table in tables} | {BASE: tables[0]}
    plans = {width: plan.at(width) for width in widths} if missing else {}
    jobs = (
        joblib.delayed(_trained)(plans[wanted["width"]], named[wanted["parametrization"]], wanted, corpus, steps, options)
        for wanted in missing.values()
    )
    for row in joblib.Parallel(n_jobs=n_jobs, return_as="generator_unordered", pre_dispatch="n_jobs")(jobs):
        row |= settings
        done[_key(row)] = row
        _append(store, row)
    return pd.DataFrame(
        done[_key(cell(table, *rest))] | {"parametrization": table.name} for table, *rest in product(tables, widths, lrs, seeds)
    )


def read_adopted(store: str | Path, base_width: int) -> pd.DataFrame:
    """The rows of a store of `adopted_sweep`, each run that all tables share at the base width once for every table."""
    frame = pd.DataFrame(_read(Path(store), {}))
    base, others = frame[frame.parametrization == BASE], frame[frame.parametrization != BASE]
    own_base = set(others[others.width == base_width].parametrization)
    shared = [base.assign(parametrization=name) for name in others.parametrization.unique() if name not in own_base]
    return pd.concat([*shared, others], ignore_index=True)


def _is_neutral(plan: Plan, table: Parametrization) -> bool:
    """Whether the table leaves the base model as it is: all its coefficients are 1."""
    return all(factor == 1 for factors in plan.factors(table).values() for factor in factors)


def _trained(plan: Plan, table: Parametrization, cell: Mapping, corpus: Corpus, steps: int, options: TrainOptions) -> dict:
    """The cell with the results of its run."""
    start = time.perf_counter()
    with one_thread():
        model = plan.initialise(table, cell["seed"])
        groups = plan.param_groups(table, cell["lr"], options.eps, options.weight_decay, options.betas)
        optimizer = torch.optim.AdamW(groups, fused=True)
        peaks = [group["lr"] for group in groups]
        data = TextData(corpus, torch.device("cpu"))
        order = data.order([cell["seed"]], steps, options.batch_size, CONTEXT)
        validation = data.validation(options.eval_batches, options.batch_size, CONTEXT)
        losses, history = [], []
        stops = record_steps(steps, options.evals)
        for step in range(steps):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * lr_factor(step, steps, options, group.get("final_lr", 1.0))
            loss = _loss(model, windows(data.train, order[step], CONTEXT)[0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                break
            if step + 1 in stops:
                since = history[-1]["step"] if history else 0
                train_loss = math.fsum(losses[since:]) / (step + 1 - since)
                history.append({"step": step + 1, "train_loss": train_loss, "val_loss": _validated(model, validation)})
    diverged = len(losses) < steps or not math.isfinite(losses[-1]) or not math.isfinite(history[-1]["val_loss"])
    tail = losses[-math.ceil(steps / 10) :]
    return {
        **cell,
        "train_loss": math.inf if diverged else math.fsum(tail) / len(tail),
        "val_loss": math.inf if diverged else history[-1]["val_loss"],
        "diverged": diverged,
        "seconds": round(time.perf_counter() - start, 3),
        "history": history,
    }


def _loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of (B, T + 1) tokens, each after those before it."""
    return next_token_loss(logits(model, tokens), tokens)


@torch.no_grad()
def _validated(model: nn.Module, batches: Iterable[torch.Tensor]) -> float:
    model.eval()
    values = [_loss(model, batch).item() for batch in batches]
    model.train()
    return math.fsum(values) / len(values)


def _key(row: Mapping) -> tuple:
    return row["parametrization"], row["width"], row["lr"], row["seed"]


def _read(store: Path | None, settings: Mapping) -> list[dict]:
    """The store's rows. Raises ValueError where its settings are others, or a line is no run."""
    if store is None or not store.exists():
        return []
    rows = []
    for number, line in enumerate(store.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            differing = {name: row[name] for name, value in settings.items() if row[name] != value}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{store}, line {number}: it is no run of adopted_sweep") from error
        if differing:
            raise ValueError(f"{store} holds runs of other settings ({differing}): take another store")
        rows.append(row)
    return rows


def _append(store: Path | None, row: dict) -> None:
    if store is not None:
        store.parent.mkdir(parents=True, exist_ok=True)
        with store.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
