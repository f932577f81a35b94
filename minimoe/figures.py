"""Pictures: a frame in, a matplotlib Figure out. One colour and marker per width, everywhere."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter

from .transfer import drift_words, mean_losses, optimum, summary, transfer_report

MARKERS = "osD^vPX<>h"
# Each at a contrast of 3 or more with white; neighbours differ in lightness too, for eyes that do not tell red from green
PALETTE = ("#0173b2", "#c77700", "#00795c", "#9e2a00", "#9d4c8f", "#7d5a3c", "#d6409f", "#666666", "#8a7a00", "#2d8fb5")
ALERT, QUIET = "#c1121f", "#333333"  # broken, and not
WRAPPED = 5  # panels in one row
HOLLOW = {"marker": "s", "fillstyle": "none"}  # of a sketch
OFF_SCALE = 1.2  # nats above the best loss at which the picture ends


def styles(values: Iterable[float], by: str = "width") -> dict[float, dict]:
    """value -> the colour and marker that stand for it (colour-blind safe).

    A power of two has the same look in every figure, width 32 the first; other values take the looks that are left.
    """
    values = sorted(set(values))
    first = 5 if by == "width" else 0
    fixed = {v: int(math.log2(v) - first) % len(MARKERS) for v in values if v > 0 and math.log2(v).is_integer()}
    free = iter([step for step in reversed(range(len(MARKERS))) if step not in fixed.values()] * len(values))
    steps = {v: fixed[v] if v in fixed else next(free, 0) for v in values}
    return {v: {"color": PALETTE[step], "marker": MARKERS[step]} for v, step in steps.items()}


def lr_curves(
    frame: pd.DataFrame,
    by: str = "width",
    loss: str = "val_loss",
    *,
    minima: bool = True,
    my_lr: float | None = None,
    live: pd.DataFrame | None = None,
    swapped: bool = False,
    sketch: dict[float, dict[float, float]] | None = None,
    size: tuple[float, float] | None = None,
    losses: tuple[float, float] | None = None,
) -> Figure:
    """Loss against learning rate: a panel per parametrization, a curve per value of `by`, minima marked.

    frame: as `sweep` returns it. Curves are means over seeds, with a band of one standard deviation. A star and a dotted
    line mark each optimum (hollow: on the grid's edge); a cross at the top is a run that diverged or lies above. my_lr: an
    LR to mark in every panel. live: another sweep's frame, drawn dashed on top. swapped: a panel per value of `by` and a
    curve per parametrization. sketch: a reader's own curves, value of `by` -> {log2 of the LR: loss}, drawn dotted. size:
    of the figure, in inches. losses: the lowest and the highest to show. Raises ValueError as `mean_losses` does, or for a
    sketch of a value that the frame does not have.
    """
    means = mean_losses(frame, by, loss)
    sketched = _sketched(sketch or {}, means, by, swapped)
    others = means.iloc[:0] if live is None or live.empty else mean_losses(live, by, loss)
    shown = pd.concat([means, others])
    panel, curve = (by, "parametrization") if swapped else ("parametrization", by)
    names = sorted(set(means[by])) if swapped else list(dict.fromkeys(means.parametrization))
    titles = {name: f"{by.replace('_', ' ')} {name:g}" for name in names} if swapped else _titles(frame, by, loss)
    looks = table_styles(shown.parametrization) if swapped else styles(shown[by], by)
    figure, panels = _panels(len(names), {"val_loss": "validation", "train_loss": "training"}.get(loss, loss), size)
    top = fit_losses(panels[0], shown, losses)
    for axes, name in zip(panels, names, strict=True):
        for value, points in means[means[panel] == name].groupby(curve):
            draw_curve(axes, points.sort_values("lr"), _name(value), looks[value], top, minima)
        for value, points in others[others[panel] == name].groupby(curve):
            points = points.sort_values("lr")
            axes.plot(points.lr, points.loss.clip(upper=top), "--", markersize=7, fillstyle="none", **looks[value])
        if my_lr is not None:
            axes.axvline(my_lr, color="black", linewidth=1.4)
        for value, points in sketched.items():
            axes.plot(
                2.0 ** np.array(list(points)), list(points.values()), ":", linewidth=2, markersize=7, **looks[value] | HOLLOW
            )
        axes.set_title(titles[name], fontsize=11 if len(names) <= 3 else 9)
        label_octaves(axes, sorted({*means.lr, *(() if my_lr is None else (my_lr,))}))
        axes.grid(alpha=0.25)
    handles = {line.get_label(): line for axes in panels for line in axes.get_legend_handles_labels()[0]}
    lines = [handles[_name(value)] for value in looks if _name(value) in handles]
    if len(others):
        lines.append(Line2D([], [], color="black", linestyle="--", label="live"))
    if sketched:
        lines.append(Line2D([], [], color="black", linestyle=":", label="your sketch", **HOLLOW))
    if my_lr is not None:
        lines.append(Line2D([], [], color="black", linewidth=1.4, label="my LR"))
    figure.legend(handles=lines, title=None if swapped else by.replace("_", " "), loc="outside right center", frameon=False)
    return figure


def _sketched(sketch: dict, means: pd.DataFrame, by: str, swapped: bool) -> dict[float, dict[float, float]]:
    """The sketch with its LRs in order. Raises ValueError for one that cannot be drawn."""
    if sketch and swapped:
        raise ValueError("a sketch has a curve for each value, so the panels must be parametrizations: swapped=False")
    for value, points in sketch.items():
        if value not in set(means[by]):
            raise ValueError(f"the sketch is of {by} {value!r}; the frame has {', '.join(map(_name, sorted(set(means[by]))))}")
        if not isinstance(points, dict) or len(points) < 2:
            raise ValueError(f"the sketch of {by} {value!r} needs two or more points, {{log2 of the LR: loss}}")
    return {value: dict(sorted(points.items())) for value, points in sketch.items()}


def plain(name: str) -> str:
    """A name as matplotlib shows it letter by letter: a dollar sign would begin a formula. For every name in a picture."""
    return str(name).replace("$", r"\$")


def _name(value: float | str) -> str:
    return plain(value) if isinstance(value, str) else f"{value:g}"


def _panels(number: int, loss: str, size: tuple[float, float] | None) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels of loss against LR that share their axes, in rows of three or four where one is too long."""
    columns = number if number <= WRAPPED else 3 if number in (6, 9) else 4
    rows = math.ceil(number / columns)
    figure = Figure(figsize=size or (1.2 + 3.6 * columns, 4.2 if rows == 1 else 0.6 + 3.1 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for place, axes in enumerate(panels):
        if place >= number:
            axes.set_axis_off()
        if place + columns >= number:  # the last of its column
            axes.set_xlabel("learning rate")
            axes.tick_params(labelbottom=True)
        if place % columns == 0:
            axes.set_ylabel(f"{loss} loss (nats per character)")
    return figure, panels[:number]


def _titles(frame: pd.DataFrame, by: str, loss: str) -> dict[str, str]:
    """parametrization -> its name, and how far its best LR drifts."""
    report = transfer_report(frame, by, loss)
    sizes = report.groupby("parametrization").size()
    rows = summary(report).itertuples()
    drifts = {row.parametrization: f"\n{_drift(row)}" if sizes[row.parametrization] > 1 else "" for row in rows}
    return {name: plain(name) + drift for name, drift in drifts.items()}


def table_styles(names: Iterable[str]) -> dict[str, dict]:
    """name -> the colour and marker that stand for it within one figure, in their order."""
    names = list(dict.fromkeys(names))
    number = len(PALETTE)  # beyond it the colours come again, with other markers
    return {
        name: {"color": PALETTE[place % number], "marker": MARKERS[(place + place // number) % number]}
        for place, name in enumerate(names)
    }


def fit_losses(axes: Axes, means: pd.DataFrame, losses: tuple[float, float] | None = None) -> float:
    """Show these losses, or by default the finite ones up to OFF_SCALE above the best; returns the highest that is shown."""
    finite = means.loss[np.isfinite(means.loss)]
    best = finite.min() if len(finite) else 0.0
    best, top = losses or (best, min(finite.max(), best + OFF_SCALE) if len(finite) else 1.0)
    margin = 0.06 * max(top - best, 0.1)
    axes.set_ylim(best - margin, top + margin)
    return top


def _drift(row) -> str:
    """How far the best LR moves from the smallest size to the largest, in words: with an error where there are seeds."""
    if row.on_edge:
        return "an optimum lies on the grid's edge"
    if math.isnan(row.drift_error):
        return f"the best LR drifts by {row.drift_octaves:+.2f} octaves"
    return f"drift {drift_words(row.drift, row.drift_error)} octaves"


def draw_curve(axes: Axes, curve: pd.DataFrame, name: str, look: dict, ceiling: float, minima: bool) -> Line2D:
    """Draw one curve with its band, its lost runs and its minimum; the line is what a legend shows of it."""
    lrs, losses = curve.lr.to_numpy(), curve.loss.to_numpy()
    shown = np.where(np.isfinite(losses), losses, np.nan)
    (line,) = axes.plot(lrs, shown, label=name, markersize=5, linewidth=1.6, **look)
    if curve.seeds.max() > 1:
        spread = curve.spread.fillna(0).to_numpy()
        axes.fill_between(lrs, shown - spread, shown + spread, color=look["color"], alpha=0.2, linewidth=0)
    lost = lrs[~(losses <= ceiling)]  # diverged, or above the picture
    axes.plot(lost, np.full(len(lost), ceiling), "x", color=look["color"], markersize=6)
    found = optimum(lrs, losses)
    if minima and math.isfinite(found["best_loss"]):
        face = "none" if found["on_edge"] else look["color"]
        axes.axvline(found["best_lr"], color=look["color"], linestyle=":", linewidth=1.2)
        axes.plot(
            found["best_lr"],
            np.interp(math.log2(found["best_lr"]), np.log2(lrs), shown),  # on the curve as it is drawn
            "*",
            markersize=12,
            color=look["color"],
            markerfacecolor=face,
            markeredgecolor="black",
            markeredgewidth=0.7,
            zorder=5,
        )
    return line


def label_octaves(axes: Axes, lrs: list[float]) -> None:
    """A logarithmic axis in base 2, labelled at whole octaves."""
    axes.set_xscale("log", base=2)
    octaves = range(math.floor(math.log2(lrs[0])), math.ceil(math.log2(lrs[-1])) + 1)
    axes.xaxis.set_major_locator(FixedLocator([2.0**octave for octave in octaves]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda lr, _: f"$2^{{{round(math.log2(lr))}}}$"))
    axes.minorticks_off()


def drift_chart(report: pd.DataFrame, by: str, references: dict[str, float] | None = None) -> Figure:
    """How far the best LR moves per doubling of `by`: a row per parametrization, thick bars one standard error, thin ones two.

    report: from `summary`. A hollow point is one seed, without an error; a row without an optimum is said to have none.
    references: name -> octaves per doubling, e.g. what papers say, each a vertical line. Raises ValueError for no rows.
    """
    if report.empty:
        raise ValueError("the report has no rows")
    figure = Figure(figsize=(8.6, 1.3 + 0.36 * len(report)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(report.itertuples()):
        if math.isnan(row.per_doubling):
            axes.annotate("no optimum on the grid", (0, place), fontsize=8, va="center", ha="center")
            continue
        alone = math.isnan(row.per_doubling_error)
        for errors, width in ((1, 3.5), (2, 1.2)) if not alone else ():
            reach = errors * row.per_doubling_error
            axes.plot([row.per_doubling - reach, row.per_doubling + reach], [place, place], color=QUIET, linewidth=width)
        axes.plot(row.per_doubling, place, "o", color=QUIET, markersize=7, markerfacecolor="white" if alone else QUIET)
    axes.axvline(0, color=QUIET, linewidth=0.8)
    for (name, octaves), style in zip((references or {}).items(), ("-", "--", "-.", ":"), strict=False):
        axes.axvline(octaves, color=ALERT, linestyle=style, linewidth=1.2, label=f"{plain(name)}: {octaves:+g}")
    axes.set_yticks(range(len(report)), [plain(name) for name in report.parametrization])
    axes.set_ylim(len(report) - 0.5, -0.5)
    axes.set_xlabel(f"octaves of the best LR per doubling of {by.replace('_', ' ')}")
    axes.grid(alpha=0.25, axis="x")
    if references:
        figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure
