"""What a sweep says: optimum, drift and regret."""

from __future__ import annotations

import math
from dataclasses import fields
from itertools import pairwise

import numpy as np
import pandas as pd

from .config import Config
from .step import TrainOptions

# What the points of one curve must share
CONSTANT = {f.name for kind in (Config, TrainOptions) for f in fields(kind)} - {"parametrization", "seed"}
CONSTANT |= {"steps", "corpus_digest"}


def mean_losses(frame: pd.DataFrame, by: str = "width", loss: str = "val_loss") -> pd.DataFrame:
    """Mean over seeds: one row per parametrization, value of `by` and lr, with columns loss, spread (std) and seeds.

    Raises ValueError for a missing column, no rows, a `by` that is not numeric, or rows that differ in more than these.
    """
    missing = {"parametrization", by, "lr", loss} - set(frame.columns)
    if missing:
        raise ValueError(f"the frame lacks the columns {', '.join(sorted(missing))}")
    if frame.empty:
        raise ValueError("the frame has no rows")
    if not pd.api.types.is_numeric_dtype(frame[by]) or by in ("lr", "seed", loss):
        raise ValueError(f"by={by!r}: must be a numeric axis such as width, depth, n_experts or granularity")
    curves = frame.groupby(["parametrization", by], sort=False)
    for column in sorted((CONSTANT & set(frame.columns)) - {by}):
        mixed = curves[column].nunique() > 1
        if mixed.any():
            name, value = mixed.idxmax()
            raise ValueError(f"the rows of {name!r} at {by} {value} differ in {column}: select one value of it first")
    if "seed" in frame.columns:
        frame = frame.drop_duplicates(["parametrization", by, "lr", "seed"])
    with np.errstate(invalid="ignore"):  # the spread of infinite losses
        groups = frame.groupby(["parametrization", by, "lr"], sort=False)[loss].agg(["mean", "std", "count"])
    return groups.rename(columns={"mean": "loss", "std": "spread", "count": "seeds"}).reset_index()


def losses_at(frame: pd.DataFrame, step: int) -> pd.DataFrame:
    """The frame with `val_loss` and `train_loss` as recorded after `step` steps (see `training.record`), infinite for a run
    that had diverged by then. Raises ValueError, naming the recorded steps, if a run has no such record."""
    recorded = sorted({record["step"] for history in frame.history for record in history})
    if step not in recorded:
        raise ValueError(f"step={step}: the records are at {', '.join(map(str, recorded))}")
    found = [{record["step"]: record for record in history}.get(step, {}) for history in frame.history]
    for record, history, diverged in zip(found, frame.history, frame.diverged, strict=True):
        if not record and not (diverged and history[-1]["step"] < step):
            raise ValueError(f"step={step}: a run's records are at {', '.join(str(r['step']) for r in history)}")
    return frame.assign(**{loss: [r.get(loss, math.inf) for r in found] for loss in ("val_loss", "train_loss")})


def regrets(frame: pd.DataFrame, lr: float, by: str = "width", loss: str = "val_loss") -> pd.DataFrame:
    """What the LR costs each model: its loss there, on a line in log2 LR between the grid's points, less its best grid loss.

    One row per parametrization and value of `by`, with columns best_lr, regret and inside (False, and regret NaN, where the
    LR lies outside the grid). Raises ValueError as `mean_losses` does, or for an LR that is not positive.
    """
    if not lr > 0:
        raise ValueError(f"lr={lr!r}: must be positive")
    rows = []
    for (name, value), curve in mean_losses(frame, by, loss).groupby(["parametrization", by], sort=False):
        curve = curve.sort_values("lr")
        found = optimum(curve.lr.to_numpy(), curve.loss.to_numpy())
        inside = curve.lr.min() * (1 - 1e-9) <= lr <= curve.lr.max() * (1 + 1e-9)
        here = float(np.interp(math.log2(lr), np.log2(curve.lr), curve.loss)) if inside else math.nan
        regret = here - found["loss"] if math.isfinite(found["loss"]) else math.nan
        rows.append({"parametrization": name, by: value, "best_lr": found["best_lr"], "regret": regret, "inside": inside})
    return pd.DataFrame(rows)


def optimum(lrs: np.ndarray, losses: np.ndarray) -> dict:
    """The minimum of one curve, sorted by lr: `grid_lr` and `loss` of the best grid point, `best_lr` by a parabola in
    log2 lr through it and its neighbours, `on_edge` where that is impossible (then best_lr is the grid point).

    A curve without any finite loss has best_lr NaN, loss infinite and on_edge True.
    """
    if not np.isfinite(losses).any():
        return {"grid_lr": math.nan, "best_lr": math.nan, "loss": math.inf, "on_edge": True}
    i = int(np.argmin(losses))
    found = {"grid_lr": float(lrs[i]), "best_lr": float(lrs[i]), "loss": float(losses[i]), "on_edge": True}
    if 0 < i < len(lrs) - 1 and np.isfinite(losses[i - 1 : i + 2]).all():
        vertex = _vertex(np.log2(lrs[i - 1 : i + 2]), losses[i - 1 : i + 2])
        found |= {"best_lr": float(2.0**vertex), "on_edge": False}
    return found


def _vertex(x: np.ndarray, y: np.ndarray) -> float:
    """Where the parabola through three points (x increasing, y[1] the least) has its minimum."""
    left, right = x[1] - x[0], x[2] - x[1]
    fall, rise = y[0] - y[1], y[2] - y[1]  # both >= 0
    if fall == rise == 0:
        return float(x[1])
    return float(x[1] + (fall * right**2 - rise * left**2) / (2 * (fall * right + rise * left)))


def transfer_report(frame: pd.DataFrame, by: str = "width", loss: str = "val_loss") -> pd.DataFrame:
    """How well the best LR transfers over `by`: one row per parametrization, losses averaged over seeds.

    Columns: best_lr_<value>, grid_lr_<value>, best_loss_<value> and on_edge_<value> per value of `by` (see `optimum`);
    drift_octaves: log2(best_lr at the largest / at the smallest); regret: loss of the largest model at the smallest
    model's best grid LR minus its own best grid loss (NaN if that LR is not on its grid); on_edge: any optimum is on its
    grid's edge, so that drift_octaves is only a bound; wider_is_better: neighbouring pairs whose best loss rises;
    seeds: the fewest behind any point. Raises ValueError for an empty frame, a missing column, or
    rows that differ in something else than lr and seed within one curve.
    """
    rows = []
    for name, group in mean_losses(frame, by, loss).groupby("parametrization", sort=False):
        curves = {value: curve.sort_values("lr") for value, curve in group.groupby(by)}
        optima = {value: optimum(c.lr.to_numpy(), c.loss.to_numpy()) for value, c in curves.items()}
        small, large = min(optima), max(optima)
        at_small = curves[large].set_index("lr").loss.get(optima[small]["grid_lr"], math.nan)
        best = [optima[value]["loss"] for value in sorted(optima)]
        row = {"parametrization": name}
        for column, key in (("best_lr", "best_lr"), ("grid_lr", "grid_lr"), ("best_loss", "loss"), ("on_edge", "on_edge")):
            row |= {f"{column}_{value}": optima[value][key] for value in sorted(optima)}
        rows.append(
            row
            | {
                "drift_octaves": math.log2(optima[large]["best_lr"] / optima[small]["best_lr"]),
                "regret": at_small - optima[large]["loss"] if math.isfinite(optima[large]["loss"]) else math.nan,
                "on_edge": any(found["on_edge"] for found in optima.values()),
                "wider_is_better": sum(after > before for before, after in pairwise(best)),
                "seeds": int(group.seeds.min()),
            }
        )
    return pd.DataFrame(rows)


def seed_optima(frame: pd.DataFrame, by: str = "width", loss: str = "val_loss") -> pd.DataFrame:
    """Each seed's own optimum: one row per parametrization, value of `by` and seed, with column best_octave.

    best_octave: log2 of the LR where a parabola in log2 LR is least, fitted (least squares) to the seed's losses within an
    octave of the best grid LR of the mean curve. The parabola's curvature is the mean curve's: how flat a valley is belongs
    to the model, and is too noisy to be fitted seed by seed. Then the mean over seeds is the optimum of the mean curve.
    Only LRs that every seed has count. NaN where the best LR lies on the grid's edge, a loss near it is infinite, or the
    parabola has no minimum within the octave. Raises ValueError as `mean_losses` does.
    """
    mean_losses(frame, by, loss)  # refuses what is no set of curves
    rows = []
    points = frame.drop_duplicates(["parametrization", by, "seed", "lr"])
    for (name, value), own in points.groupby(["parametrization", by], sort=False):
        losses = own.pivot(index="seed", columns="lr", values=loss).dropna(axis=1)  # a row per seed, sorted by LR
        found = zip(losses.index, _seed_vertices(np.log2(losses.columns.to_numpy()), losses.to_numpy()), strict=True)
        rows += [{"parametrization": name, by: value, "seed": seed, "best_octave": best} for seed, best in found]
    return pd.DataFrame(rows)


def _seed_vertices(octaves: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """(seeds,) where each row of losses (seeds, LRs) has its minimum, in octaves; see `seed_optima`."""
    nowhere = np.full(len(losses), math.nan)
    best = optimum(2.0**octaves, losses.mean(0))
    if best["on_edge"]:
        return nowhere
    x = octaves - math.log2(best["grid_lr"])
    near = np.abs(x) <= 1 + 1e-9
    x, y = x[near], losses[:, near]
    if len(x) < 3 or not np.isfinite(y).all():
        return nowhere
    curvature = np.polyfit(x, y.mean(0), 2)[0]
    if curvature <= 0:
        return nowhere
    slopes = np.polyfit(x, (y - curvature * x**2).T, 1)[0]
    places = -slopes / (2 * curvature)
    return np.where(np.abs(places) <= 1, places + math.log2(best["grid_lr"]), math.nan)


def drift_report(frame: pd.DataFrame, by: str = "width", loss: str = "val_loss") -> pd.DataFrame:
    """How far the best LR moves over `by`, with the seeds' error: one row per parametrization.

    Columns: best_octave_<value> and error_<value> (mean over seeds of `seed_optima`, and its standard error), drift and
    drift_error (octaves, largest less smallest value, seed by seed), per_doubling and per_doubling_error (slope over
    log2 of `by`, by least squares over all values, seed by seed), regret and regret_error (nats: the largest model at the
    smallest's best grid LR less its own best; see `transfer_report`), best_loss_<value>, seeds (the fewest behind any
    optimum). An error is NaN with one seed, a drift with one size. Raises ValueError as `mean_losses` does.
    """
    optima, means = seed_optima(frame, by, loss), transfer_report(frame, by, loss).set_index("parametrization")
    rows = []
    for name, own in optima.groupby("parametrization", sort=False):
        octaves = own.pivot(index="seed", columns=by, values="best_octave")  # a row per seed
        sizes, row = sorted(octaves), {"parametrization": name}
        for size in sizes:
            row[f"best_octave_{size}"], row[f"error_{size}"] = _mean_and_error(octaves[size])
        whole = octaves.dropna() if len(sizes) > 1 else octaves.head(0)
        row["drift"], row["drift_error"] = _mean_and_error(whole[sizes[-1]] - whole[sizes[0]])
        slopes = pd.Series([np.polyfit(np.log2(sizes), line, 1)[0] for line in whole.to_numpy()], dtype=float)
        row["per_doubling"], row["per_doubling_error"] = _mean_and_error(slopes)
        large = frame[(frame.parametrization == name) & (frame[by] == sizes[-1])].drop_duplicates(["seed", "lr"])
        losses = large.pivot(index="seed", columns="lr", values=loss)
        there, best = (losses.get(means.loc[name, f"grid_lr_{size}"]) for size in (sizes[0], sizes[-1]))
        row["regret"], row["regret_error"] = (math.nan, math.nan) if there is None else _mean_and_error(there - best)
        row |= {f"best_loss_{size}": means.loc[name, f"best_loss_{size}"] for size in sizes}
        rows.append(row | {"seeds": int(octaves.notna().sum().min())})
    return pd.DataFrame(rows)


def _mean_and_error(values: pd.Series) -> tuple[float, float]:
    """Mean and standard error; NaN where there are too few values."""
    values = values.dropna()
    return (float(values.mean()), float(values.std() / math.sqrt(len(values)))) if len(values) else (math.nan, math.nan)


def drift_words(drift: float, error: float) -> str:
    """A drift in octaves with its standard error, in words: what lies within two errors of 0 was not seen."""
    if math.isnan(drift):
        return "no optimum"
    if math.isnan(error):
        return f"{drift:+.2f} (one seed)"
    return f"{drift:+.2f} ± {error:.2f}" if abs(drift) > 2 * error else f"none seen, |drift| < {abs(drift) + 2 * error:.2f}"


def sentence(row: pd.Series, by: str = "width") -> str:
    """One row of a report in plain words."""
    values = [column.removeprefix("best_lr_") for column in row.index if column.startswith("best_lr_")]
    first, last = values[0], values[-1]
    dead = [value for value in values if math.isnan(row[f"best_lr_{value}"])]
    if dead:
        return f"{row.parametrization}: every run at {by} {', '.join(dead)} diverged, so there is no optimum to compare."
    if len(values) == 1:
        return f"{row.parametrization}: one {by} only ({first}), so there is no transfer to report."
    moved = f"from {by} {first} to {last} the best LR moves by {row.drift_octaves:+.2f} octaves"
    if row.on_edge:
        edges = ", ".join(value for value in values if row[f"on_edge_{value}"])
        moved += f" (a bound only: the minimum at {by} {edges} lies on the grid's edge)"
    cost = f"using {by} {first}'s LR at {by} {last} costs {row.regret:.3f} nats"
    return f"{row.parametrization}: {moved}; {cost}."
