"""Pictures: a frame in, a matplotlib Figure out. One colour and marker per width, everywhere."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter

from .transfer import mean_losses, optimum, transfer_report

MARKERS = "osD^vPX<>h"
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
    return {v: {"color": sns.color_palette("colorblind")[step], "marker": MARKERS[step]} for v, step in steps.items()}


def lr_curves(frame: pd.DataFrame, by: str = "width", loss: str = "val_loss") -> Figure:
    """Loss against learning rate: a panel per parametrization, a curve per value of `by`, minima marked.

    frame: as `sweep` returns it. Curves are means over seeds, with a band of one standard deviation. A star and a dotted
    line mark each optimum (hollow: on the grid's edge); a cross at the top is a run that diverged or lies above. Raises
    ValueError as `mean_losses` does.
    """
    means = mean_losses(frame, by, loss)
    names = list(dict.fromkeys(means.parametrization))
    figure = Figure(figsize=(1.2 + 3.6 * len(names), 4.2), layout="constrained")
    panels = figure.subplots(1, len(names), sharex=True, sharey=True, squeeze=False)[0]
    reports = transfer_report(frame, by, loss).set_index("parametrization")
    finite = means.loss[np.isfinite(means.loss)]
    best = finite.min() if len(finite) else 0.0
    top = min(finite.max(), best + OFF_SCALE) if len(finite) else 1.0
    margin = 0.06 * max(top - best, 0.1)
    panels[0].set_ylim(best - margin, top + margin)
    looks = styles(means[by], by)
    for axes, name in zip(panels, names, strict=True):
        for value, curve in means[means.parametrization == name].groupby(by):
            _draw_curve(axes, curve.sort_values("lr"), f"{value:g}", looks[value], top)
        axes.set_title(f"{name}\n{_drift(reports.loc[name])}", fontsize=11)
        axes.set_xlabel("learning rate")
        _label_octaves(axes, sorted(means.lr.unique()))
        axes.grid(alpha=0.25)
    panels[0].set_ylabel({"val_loss": "validation", "train_loss": "training"}.get(loss, loss) + " loss (nats per character)")
    handles = {float(line.get_label()): line for axes in panels for line in axes.get_legend_handles_labels()[0]}
    figure.legend(
        handles=[handles[value] for value in sorted(handles)],
        title=by.replace("_", " "),
        loc="outside right center",
        frameon=False,
    )
    return figure


def _drift(report: pd.Series) -> str:
    if report.on_edge:
        return "an optimum lies on the grid's edge"
    return f"the best LR drifts by {report.drift_octaves:+.2f} octaves"


def _draw_curve(axes: Axes, curve: pd.DataFrame, name: str, look: dict, ceiling: float) -> None:
    lrs, losses = curve.lr.to_numpy(), curve.loss.to_numpy()
    shown = np.where(np.isfinite(losses), losses, np.nan)
    axes.plot(lrs, shown, label=name, markersize=5, linewidth=1.6, **look)
    if curve.seeds.max() > 1:
        spread = curve.spread.fillna(0).to_numpy()
        axes.fill_between(lrs, shown - spread, shown + spread, color=look["color"], alpha=0.2, linewidth=0)
    lost = lrs[~(losses <= ceiling)]  # diverged, or above the picture
    axes.plot(lost, np.full(len(lost), ceiling), "x", color=look["color"], markersize=6)
    found = optimum(lrs, losses)
    if math.isfinite(found["loss"]):
        face = "none" if found["on_edge"] else look["color"]
        axes.axvline(found["best_lr"], color=look["color"], linestyle=":", linewidth=1.2)
        axes.plot(
            found["best_lr"],
            found["loss"],
            "*",
            markersize=12,
            color=look["color"],
            markerfacecolor=face,
            markeredgecolor="black",
            markeredgewidth=0.7,
            zorder=5,
        )


def _label_octaves(axes: Axes, lrs: list[float]) -> None:
    """A logarithmic axis in base 2, labelled at whole octaves."""
    axes.set_xscale("log", base=2)
    octaves = range(math.floor(math.log2(lrs[0])), math.ceil(math.log2(lrs[-1])) + 1)
    axes.xaxis.set_major_locator(FixedLocator([2.0**octave for octave in octaves]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda lr, _: f"$2^{{{round(math.log2(lr))}}}$"))
    axes.minorticks_off()
