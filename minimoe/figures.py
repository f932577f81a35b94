"""Pictures: a frame in, a matplotlib Figure out. One colour and marker per width, everywhere."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter

from .transfer import mean_losses, optimum, transfer_report

MARKERS = "osD^vPX<>h"
OFF_SCALE = 1.2  # nats above the best loss at which the picture ends


def style(value: float, by: str = "width") -> dict:
    """The colour and marker that stand for one value of `by` in every figure (colour-blind safe)."""
    step = round(math.log2(value) - (5 if by == "width" else 0)) % len(MARKERS)  # width 32 comes first
    return {"color": sns.color_palette("colorblind")[step], "marker": MARKERS[step]}


def lr_curves(frame: pd.DataFrame, by: str = "width", loss: str = "val_loss") -> Figure:
    """Loss against learning rate: a panel per parametrization, a curve per value of `by`, minima marked.

    frame: as `sweep` returns it. Curves are means over seeds, with a band of one standard deviation. A star and a dotted
    line mark each optimum (hollow: on the grid's edge); a cross at the top is a run that diverged.
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
    for axes, name in zip(panels, names, strict=True):
        for value, curve in means[means.parametrization == name].groupby(by):
            _draw_curve(axes, curve.sort_values("lr"), value, by, top + margin / 2)
        axes.set_title(f"{name}\n{_drift(reports.loc[name])}", fontsize=11)
        axes.set_xlabel("learning rate")
        _label_octaves(axes, sorted(means.lr.unique()))
        axes.grid(alpha=0.25)
    panels[0].set_ylabel({"val_loss": "validation", "train_loss": "training"}.get(loss, loss) + " loss (nats per character)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, title=by.replace("_", " "), loc="outside right center", frameon=False)
    return figure


def _drift(report: pd.Series) -> str:
    if report.on_edge:
        return "an optimum lies on the grid's edge"
    return f"the best LR drifts by {report.drift_octaves:+.2f} octaves"


def _draw_curve(axes: Axes, curve: pd.DataFrame, value: float, by: str, ceiling: float) -> None:
    look = style(value, by)
    lrs, losses = curve.lr.to_numpy(), curve.loss.to_numpy()
    shown = np.where(np.isfinite(losses), losses, np.nan)
    axes.plot(lrs, shown, label=f"{value:g}", markersize=5, linewidth=1.6, **look)
    if curve.seeds.max() > 1:
        spread = curve.spread.fillna(0).to_numpy()
        axes.fill_between(lrs, shown - spread, shown + spread, color=look["color"], alpha=0.2, linewidth=0)
    lost = lrs[~np.isfinite(losses)]
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
