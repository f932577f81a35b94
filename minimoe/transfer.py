"""What a sweep says: optimum, drift and regret."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pandas as pd

from .checks import require
from .config import Config
from .step import TrainOptions

# What the points of one curve must share
CONSTANT = {f.name for kind in (Config, TrainOptions) for f in fields(kind)} - {"parametrization", "seed"}
CONSTANT |= {"steps", "corpus_digest"}


def mean_losses(frame: pd.DataFrame, by: str = "width", loss: str = "val_loss") -> pd.DataFrame:
    """Mean over seeds: one row per parametrization, value of `by` and lr, with columns loss, spread (std) and seeds.

    by: any column of numbers: a size such as width or n_experts, batch_size, steps. Where sizes grow together on a path,
    each of them can be `by`. Raises ValueError for a missing column, no rows, a `by` that is not numeric, or a curve whose
    rows differ in more than lr and seed.
    """
    with np.errstate(invalid="ignore"):  # the spread of infinite losses
        curves = _points(frame, by, loss).groupby(["parametrization", by, "lr"], sort=False)[loss].agg(["mean", "std", "count"])
    return curves.rename(columns={"mean": "loss", "std": "spread", "count": "seeds"}).reset_index()


def _points(frame: pd.DataFrame, by: str, loss: str) -> pd.DataFrame:
    """The rows of `frame`, one per parametrization, value of `by`, lr and seed; in a frame without seeds each row is one."""
    missing = {"parametrization", by, "lr", loss} - set(frame.columns)
    if missing:
        raise ValueError(f"the frame lacks the columns {', '.join(sorted(missing))}")
    if frame.empty:
        raise ValueError("the frame has no rows")
    numeric = pd.api.types.is_numeric_dtype(frame[by]) and by not in ("lr", "seed", loss)
    require(numeric, "by", by, "must be a numeric axis such as width, depth, n_experts or batch_size")
    curves = frame.groupby(["parametrization", by], sort=False)
    for column in sorted((CONSTANT & set(frame.columns)) - {by}):
        mixed = curves[column].nunique() > 1
        if mixed.any():
            name, value = mixed.idxmax()
            raise ValueError(f"the rows of {name!r} at {by} {value} differ in {column}: select one value of it first")
    if "seed" not in frame.columns:
        frame = frame.assign(seed=frame.groupby(["parametrization", by, "lr"]).cumcount())
    return frame.drop_duplicates(["parametrization", by, "lr", "seed"])


def losses_at(frame: pd.DataFrame, step: int) -> pd.DataFrame:
    """The frame with `val_loss` and `train_loss` as recorded after `step` steps (see `training.record`), infinite for a run
    that had diverged by then. Raises ValueError, naming the recorded steps, if a run has no such record."""
    recorded = sorted({record["step"] for history in frame.history for record in history})
    require(step in recorded, "step", step, f"the records are at {', '.join(map(str, recorded))}")
    found = [{record["step"]: record for record in history}.get(step, {}) for history in frame.history]
    for record, history, diverged in zip(found, frame.history, frame.diverged, strict=True):
        known = record or (diverged and history[-1]["step"] < step)
        require(known, "step", step, f"a run's records are at {', '.join(str(r['step']) for r in history)}")
    return frame.assign(**{loss: [r.get(loss, math.inf) for r in found] for loss in ("val_loss", "train_loss")})


def regrets(frame: pd.DataFrame, lr: float, by: str = "width", loss: str = "val_loss") -> pd.DataFrame:
    """What the LR costs each model: its loss there, on a line in log2 LR between the grid's points, less its best grid loss.

    One row per parametrization and value of `by`, with columns best_lr, regret and inside (False, and regret NaN, where the
    LR lies outside the grid). Raises ValueError as `mean_losses` does, or for an LR that is not positive.
    """
    require(lr > 0, "lr", lr, "must be positive")
    rows = []
    for (name, value), curve in mean_losses(frame, by, loss).groupby(["parametrization", by], sort=False):
        curve = curve.sort_values("lr")
        found = optimum(curve.lr.to_numpy(), curve.loss.to_numpy())
        inside = curve.lr.min() * (1 - 1e-9) <= lr <= curve.lr.max() * (1 + 1e-9)
        here = float(np.interp(math.log2(lr), np.log2(curve.lr), curve.loss)) if inside else math.nan
        regret = here - found["best_loss"] if math.isfinite(found["best_loss"]) else math.nan
        rows.append({"parametrization": name, by: value, "best_lr": found["best_lr"], "regret": regret, "inside": inside})
    return pd.DataFrame(rows)


def optimum(lrs: np.ndarray, losses: np.ndarray) -> dict:
    """The minimum of one curve, sorted by lr: `grid_lr` and `best_loss` of the best grid point, `best_lr` by a parabola
    in log2 lr through it and its neighbours, `on_edge` where that is impossible (then best_lr is the grid point).

    A loss that is NaN counts as infinite. A curve without any finite loss has best_lr NaN, best_loss infinite and on_edge True.
    """
    losses = np.where(np.isnan(losses), math.inf, losses)
    if not np.isfinite(losses).any():
        return {"grid_lr": math.nan, "best_lr": math.nan, "best_loss": math.inf, "on_edge": True}
    i = int(np.argmin(losses))
    found = {"grid_lr": float(lrs[i]), "best_lr": float(lrs[i]), "best_loss": float(losses[i]), "on_edge": True}
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
    """How well the best LR transfers over `by`: one row per parametrization and size (value of `by`), sizes ascending.

    The size's own optimum, columns grid_lr, best_lr, best_loss and on_edge: that of its mean curve (see `optimum`).
    octave, octave_error: log2 of the best LR, mean and standard error over the seeds' optima (see `seed_optima`).

    The size compared with the smallest one of its parametrization:
    drift_octaves: by how many octaves the mean curve's best LR moves, log2(best_lr / best_lr of the smallest).
    drift, drift_error: by how many octaves each seed's own optimum moves, mean and standard error over the seeds. The error
    tells a move from noise. A seed counts if it has an optimum at every size.
    per_doubling, per_doubling_error: octaves per doubling of `by`, over the sizes up to this one: each of those seeds gives
    the slope of a line through its optima over log2(size), by least squares.
    regret, regret_error: what the smallest size's grid_lr costs here (nats): the loss at that LR less the loss at the
    size's own grid_lr, mean and standard error over the seeds that have both.

    seeds: the fewest behind any point of the size's mean curve. seeds_with_optimum: how many have an optimum of their own.
    What cannot be computed is NaN: an error of one seed, a slope of one size. Raises ValueError as `mean_losses` does.
    """
    octaves = seed_optima(frame, by, loss).pivot(index=["parametrization", "seed"], columns=by, values="best_octave")
    losses = _points(frame, by, loss).pivot(index=["parametrization", by, "seed"], columns="lr", values=loss)
    rows = []
    for name, sizes in optima(mean_losses(frame, by, loss), by).groupby("parametrization", sort=False):
        small, small_lr = sizes[by].iloc[0], sizes.grid_lr.iloc[0]
        own = octaves.loc[name, list(sizes[by])]  # a row per seed, a column per size
        whole = own.dropna()
        for row in sizes.to_dict("records"):
            size = row[by]
            there, here = losses.loc[name, size].reindex(columns=[small_lr, row["grid_lr"]]).to_numpy().T
            row |= _mean_and_error("octave", own[size])
            row |= _mean_and_error("drift", whole[size] - whole[small])
            row |= _mean_and_error("per_doubling", _slopes(whole.loc[:, :size]))
            row |= _mean_and_error("regret", pd.Series(there) - pd.Series(here))
            rows.append(row | {"seeds_with_optimum": int(own[size].count())})
    return pd.DataFrame(rows)


def optima(means: pd.DataFrame, by: str = "width") -> pd.DataFrame:
    """The optimum of every curve of `mean_losses`: one row per parametrization and size, sizes ascending, with `optimum`'s
    columns, drift_octaves and seeds as in `transfer_report`."""
    rows = []
    for name, curves in means.groupby("parametrization", sort=False):
        curves = dict(list(curves.sort_values("lr").groupby(by)))
        best = {size: optimum(curve.lr.to_numpy(), curve.loss.to_numpy()) for size, curve in curves.items()}
        small = best[min(best)]["best_lr"]
        for size, found in best.items():
            moved = {"drift_octaves": math.log2(found["best_lr"] / small), "seeds": int(curves[size].seeds.min())}
            rows.append({"parametrization": name, by: size} | found | moved)
    return pd.DataFrame(rows)


def at_best_lr(frame: pd.DataFrame, by: str = "width", loss: str = "val_loss") -> pd.DataFrame:
    """The rows of each parametrization and size (value of `by`) at the LR whose mean loss is the lowest: one per seed. Raises
    ValueError as `mean_losses` does."""
    best = optima(mean_losses(frame, by, loss), by)[["parametrization", by, "grid_lr"]]
    return _points(frame, by, loss).merge(best.rename(columns={"grid_lr": "lr"}), on=["parametrization", by, "lr"])


def beside(frame: pd.DataFrame, reference: str, loss: str = "val_loss") -> pd.DataFrame:
    """How well the best LR of one parametrization (or arm) serves the others, each at one size and the same number of steps: one
    row per parametrization, in their order, with grid_lr, best_loss, octave and octave_error as in `transfer_report`, and

    moved, moved_error: by how many octaves each seed's optimum lies above the reference's, mean and standard error over seeds.
    regret, regret_error: what the reference's grid_lr costs here (nats), as in `transfer_report`.
    gain, gain_error: by how many nats the loss at the own grid_lr lies below the reference's at its own, seed by seed.

    Raises ValueError as `mean_losses` does, or for a reference that has no rows.
    """
    own = transfer_report(frame, "steps", loss).set_index("parametrization")
    require(reference in own.index, "reference", reference, f"must be one of {', '.join(own.index)}")
    require(own.index.is_unique, "steps", sorted(set(own.steps)), "must be one number")
    octaves = seed_optima(frame, "steps", loss).pivot(index="parametrization", columns="seed", values="best_octave")
    losses = _points(frame, "steps", loss).pivot(index=["parametrization", "seed"], columns="lr", values=loss)

    def losses_at_lr(name: str, lr: float) -> pd.Series:
        return losses.loc[name].get(lr, pd.Series(dtype=float))  # nothing at NaN, where every run diverged

    rows, best = [], losses_at_lr(reference, own.grid_lr[reference])
    for name, found in own.iterrows():
        there, here = losses_at_lr(name, own.grid_lr[reference]), losses_at_lr(name, found.grid_lr)
        row = {"parametrization": name, **found[["grid_lr", "best_loss", "octave", "octave_error"]]}
        row |= _mean_and_error("moved", octaves.loc[name] - octaves.loc[reference])
        row |= _mean_and_error("gain", best - here)
        rows.append(row | _mean_and_error("regret", there - here))
    return pd.DataFrame(rows)


def _slopes(octaves: pd.DataFrame) -> pd.Series:
    """Each row's slope over log2 of the columns, by least squares: octaves per doubling. NaN for one column, or size 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        doublings = np.log2(octaves.columns.to_numpy(float))
        doublings = doublings - doublings.mean()
        return octaves @ (doublings / (doublings @ doublings))


def summary(report: pd.DataFrame) -> pd.DataFrame:
    """One row per parametrization of a `transfer_report`, in their order: its largest size compared with its smallest.

    Columns: the largest size, drift_octaves, drift, per_doubling and regret with their errors, as the report has them (with
    one size only, drift is NaN); on_edge: whether any size's optimum is on its grid's edge, so that drift_octaves is only
    a bound; larger_is_worse: in how many pairs of neighbouring sizes the larger has the higher best loss; seeds and
    seeds_with_optimum: the fewest of any size.
    """
    sizes = report.groupby("parametrization", sort=False)
    largest = sizes.tail(1).set_index("parametrization")
    largest = largest.drop(columns=["grid_lr", "best_lr", "best_loss", "octave", "octave_error"])
    largest.loc[sizes.size() == 1, ["drift", "drift_error"]] = math.nan
    largest["on_edge"] = sizes.on_edge.any()
    largest["larger_is_worse"] = sizes.best_loss.agg(lambda losses: int((losses.diff() > 0).sum()))
    fewest = sizes[["seeds", "seeds_with_optimum"]].min()
    return largest.assign(**fewest).reset_index()


def seed_optima(frame: pd.DataFrame, by: str = "width", loss: str = "val_loss") -> pd.DataFrame:
    """Each seed's own optimum: one row per parametrization, value of `by` and seed, with column best_octave.

    best_octave: log2 of the LR where a parabola in log2 LR is least, fitted (least squares) to the seed's losses within an
    octave of the best grid LR of the mean curve. The parabola's curvature is the mean curve's: how flat a valley is belongs
    to the model, and is too noisy to be fitted seed by seed. Then the mean over seeds is the optimum of the mean curve.
    An LR is used only if every seed has a run there. NaN where the best LR lies on the grid's edge, a loss near it is
    infinite, or the parabola has no minimum within the octave. Raises ValueError as `mean_losses` does.
    """
    rows = []
    for (name, value), own in _points(frame, by, loss).groupby(["parametrization", by], sort=False):
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


def _mean_and_error(name: str, values: pd.Series) -> dict[str, float]:
    """The mean as `name` and its standard error as `name`_error; NaN where there are too few values."""
    with np.errstate(invalid="ignore"):  # the spread of infinite losses
        return {name: float(values.mean()), f"{name}_error": float(values.std() / math.sqrt(max(values.count(), 1)))}


def drift_words(drift: float, error: float) -> str:
    """A drift in octaves with its standard error, in words: what lies within two errors of 0 was not seen."""
    if math.isnan(drift):
        return "no optimum"
    if math.isnan(error):
        return f"{drift:+.2f} (one seed)"
    return f"{drift:+.2f} ± {error:.2f}" if abs(drift) > 2 * error else f"none seen, |drift| < {abs(drift) + 2 * error:.2f}"


def sentence(rows: pd.DataFrame, by: str = "width") -> str:
    """One parametrization's rows of a `transfer_report` in plain words."""
    name, first, last = rows.parametrization.iloc[0], rows[by].iloc[0], rows[by].iloc[-1]
    dead, edges = (", ".join(map(str, rows[by][where])) for where in (rows.best_lr.isna(), rows.on_edge))
    if dead:
        return f"{name}: every run at {by} {dead} diverged, so there is no optimum to compare."
    if len(rows) == 1:
        return f"{name}: one {by} only ({first}), so there is no transfer to report."
    moved = f"from {by} {first} to {last} the best LR moves by {rows.drift_octaves.iloc[-1]:+.2f} octaves"
    if edges:
        moved += f" (a bound only: the minimum at {by} {edges} lies on the grid's edge)"
    return f"{name}: {moved}; using {by} {first}'s LR at {by} {last} costs {rows.regret.iloc[-1]:.3f} nats."
