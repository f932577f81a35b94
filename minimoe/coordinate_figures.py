"""Pictures of coordinate checks: a check's frame in, a matplotlib Figure out."""

from __future__ import annotations

import math
from itertools import zip_longest

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from .coordinates import size_axis
from .figures import ALERT, QUIET, draw_curve, fit_losses, label_octaves, plain, styles
from .probe import OUTSIDE
from .theory import TOLERANCE, Growth, wanted
from .transfer import mean_losses
from .verdicts import BROKEN, exponents, layers_compared

COLUMNS = 6  # panels in one row
MOVED = ("update", "change")
AMBER = "#b07800"  # of allocations
MARKERS = {"init": "o", "update": "o", "change": "o", "allocation": "s"}
FARTHEST = 2.1  # exponents beyond it are drawn at it, rather than out of sight


def coordinate_curves(frame: pd.DataFrame, layer: int | str | None = None) -> Figure:
    """A coordinate check as small multiples: a panel per tensor, how its numbers grow with the size, relative to the smallest.

    frame: from `coordinate_check`; each parametrization gets two rows of panels. Dark: the output at init; blue, a line
    per step: the update (change, where a tensor is no weight's own); amber: the allocation, after the last step. Dashed: the
    predicted slopes. Red: what the verdict condemns. layer: the one to show; where the depth grows, "first", "last" or "sum"
    (default: of each tensor the one with the largest violation or deviation).
    Raises ValueError as `exponents` does, or for a layer that the frame does not have.
    """
    table, axis = exponents(frame), size_axis(frame)
    frame = layers_compared(frame)
    if layer is not None and layer not in set(frame.layer) - {OUTSIDE}:
        raise ValueError(f"layer={layer!r}: the frame has {sorted(set(frame.layer) - {OUTSIDE})}")
    names = list(dict.fromkeys(frame.parametrization))
    means = _growth(frame)
    number = len(in_forward_order(table[table.quantity.isin(MOVED)]))
    columns, rows = min(COLUMNS, number), math.ceil(number / COLUMNS)
    figure = Figure(figsize=(max(9, 2.08 * columns), (2.2 if rows > 1 else 2.9) * rows * len(names) + 0.5), layout="constrained")
    for part, name in zip(np.atleast_1d(figure.subfigures(len(names), 1)), names, strict=True):
        part.suptitle(f"{plain(name)}: growth with {axis}", fontsize=12)
        own = table[(table.parametrization == name) & (table.layer.isin((layer, OUTSIDE)) | (layer is None))]
        tensors = in_forward_order(own[own.quantity.isin(MOVED)])
        panels = part.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
        for axes, tensor in zip_longest(panels, tensors):
            if tensor is None:
                axes.set_axis_off()
            else:
                _draw_tensor(axes, own[own.tensor == tensor], means[name])
        for axes in part.axes:
            axes.set_xlabel(axis, fontsize=9)
            axes.label_outer()
        part.supylabel(f"size over that at\nthe smallest {axis}", fontsize=9)
        _coordinate_legend(part, sorted(set(frame.step) - {0}))
    shown = [axes for part in figure.subfigs for axes in part.axes if axes.axison]
    low, high = (f(axes.get_ylim()[i] for axes in shown) for i, f in enumerate((min, max)))
    for axes in shown:
        axes.set_ylim(min(low, 1 / 4), max(high, 4))  # the same for all, and flat is seen to be flat
    return figure


def in_forward_order(table: pd.DataFrame) -> list[str]:
    """The names of a frame's or table's tensors, in the order of the forward pass: those of the first layer come first."""
    return list(table.groupby("tensor").place.min().sort_values().index)


def _growth(frame: pd.DataFrame) -> pd.Series:
    """log2 of each RMS (mean over seeds) over that at the smallest size; the index ends in step and size."""
    means = frame.assign(value=np.log2(frame.value.where(frame.value > 0)))
    means = means.groupby(["parametrization", "layer", "tensor", "quantity", "step", size_axis(frame)]).value.mean()
    return means - means.groupby(level=[0, 1, 2, 3, 4]).transform("first")  # levels are sorted


def _draw_tensor(axes: Axes, rows: pd.DataFrame, means: pd.Series) -> None:
    """One tensor's panel, at the layer where it looks worst."""
    rows = rows[rows.quantity.isin(("init", *MOVED, "allocation"))]
    broken = rows.verdict.isin(BROKEN)
    off = (rows.measured - rows.predicted).abs().fillna(0) + 100 * broken
    rows = rows[rows.layer == rows.loc[off.idxmax(), "layer"]].set_index("quantity")
    layer, tensor = rows.layer.iloc[0], rows.tensor.iloc[0]
    shown = [name for name in ("init", "update", "allocation") if name in rows.index]
    said = []
    for quantity in shown if "update" in shown else [*shown, "change"]:
        row = rows.loc[quantity]
        alert = row.verdict in BROKEN
        curves = means[layer, tensor, quantity].unstack(-1)  # a row per step, a column per size, log2
        if quantity == "allocation":
            curves = curves.tail(1)
        if curves.notna().all(axis=None):
            for shade, (_, curve) in zip(_shades(quantity, len(curves)), curves.iterrows(), strict=True):
                last = curve.name == curves.index[-1]
                color = ALERT if alert and last else shade
                axes.plot(
                    curve.index, 2.0**curve, color=color, linewidth=2 if last else 1.2, marker=MARKERS[quantity], markersize=3
                )
            if not math.isnan(row.predicted):
                sizes = curves.columns.to_numpy(float)
                expected = (sizes / sizes[0]) ** row.predicted
                axes.plot(sizes, expected, "--", color="black", linewidth=1, zorder=5)
        word = f" {row.verdict}" if row.verdict in (*BROKEN, "zero", "negative", "withheld") else ""
        said.append((f"{quantity} {row.measured:+.2f}{word}", alert))
    place = "" if layer == OUTSIDE else f", layer {layer}"
    axes.set_title(f"{plain(tensor)}{place}\n" + "\n".join(text for text, _ in said), fontsize=9)
    if any(alert for _, alert in said):
        axes.title.set_color(ALERT)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda growth, _: f"{growth:g}" if growth >= 1 else f"1/{1 / growth:g}"))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)


def _shades(quantity: str, steps: int) -> list:
    """A colour for each step."""
    return {"init": [QUIET], "allocation": [AMBER]}.get(quantity) or sns.color_palette("Blues", steps + 2)[2:]


def _coordinate_legend(part, steps: list[int]) -> None:
    blues = sns.color_palette("Blues", len(steps) + 2)[2:]
    lines = [Line2D([], [], color=QUIET, marker="o", markersize=3, label="init")]
    shown = sorted({0, len(steps) - 1})
    lines += [Line2D([], [], color=blues[i], marker="o", markersize=3, label=f"update, step {steps[i]}") for i in shown]
    lines += [Line2D([], [], color=AMBER, marker=MARKERS["allocation"], markersize=3, label="allocation")]
    lines += [Line2D([], [], color="black", linestyle="--", label="predicted")]
    lines += [Line2D([], [], color=ALERT, linewidth=2, label="breaks muP's desiderata")]
    part.legend(handles=lines, loc="outside lower right", ncols=len(lines), frameon=False, fontsize=8)


def exponents_chart(predicted: pd.DataFrame, table: pd.DataFrame | None = None) -> Figure:
    """Exponents in the width, a row per tensor: of init, update and allocation, from left to right.

    predicted: from `theory.predictions`, hollow diamonds. table: from `exponents`, dots with their standard errors, one per
    layer. The grey band is where muP wants them (the init and the allocation of an output weight may lie lower); red is
    outside.
    """
    if table is not None and table.parametrization.nunique() > 1:
        raise ValueError(f"the table holds {', '.join(table.parametrization.unique())}: select one of them")
    tensors = in_forward_order(predicted)
    outputs = predicted[(predicted.kind == "output") & (predicted.quantity == "init")]
    head = outputs.loc[outputs.place.idxmax()].predicted
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, 3, sharey=True), Growth._fields, strict=True):
        for place, tensor in enumerate(reversed(tensors)):
            for row in predicted[(predicted.tensor == tensor) & (predicted.quantity == quantity)].dropna().itertuples():
                least, largest = wanted(row.kind, quantity, head)
                low, high = max(least - TOLERANCE, -FARTHEST - 0.4), largest + TOLERANCE
                axes.fill_betweenx([place - 0.4, place + 0.4], low, high, color="#dddddd", linewidth=0)
                color = QUIET if low <= row.predicted <= high else ALERT
                axes.plot(_in_sight(row.predicted), place, "D", markersize=8, color=color, fillstyle="none")
            if table is not None:
                for found in table[(table.tensor == tensor) & (table.quantity == quantity)].itertuples():
                    at = place + 0.12 * (1 - 2 * (found.layer % 2)) * (found.layer != OUTSIDE)
                    color = ALERT if found.verdict in BROKEN else QUIET
                    axes.errorbar(_in_sight(found.measured), at, xerr=found.stderr, fmt="o", markersize=4, color=color)
        axes.set_yticks(range(len(tensors)), [plain(name) for name in reversed(tensors)])
        axes.set_xlim(-FARTHEST - 0.1, FARTHEST + 0.1)
        axes.set_xlabel(f"exponent of the {quantity} in the width")
        axes.grid(alpha=0.25, axis="x")
    lines = [Line2D([], [], color=QUIET, marker="D", fillstyle="none", linestyle="", label="predicted from the table")]
    if table is not None:
        lines.append(Line2D([], [], color=QUIET, marker="o", markersize=4, label="measured, with standard error"))
    lines.append(Patch(color="#dddddd", label="as muP wants it"))
    lines.append(Line2D([], [], color=ALERT, marker="o", linestyle="", label="measured, not as muP wants it"))
    figure.legend(handles=lines, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


def _in_sight(exponent: float) -> float:
    return max(-FARTHEST, min(exponent, FARTHEST))


def tensor_curves(frame: pd.DataFrame, tensor: str, layer: int = OUTSIDE, step: int | None = None) -> Figure:
    """One tensor of one coordinate check: each of its quantities, an RMS or nats, against the size, with fitted slopes.

    frame: rows of one parametrization from `coordinate_check`. Dots are seeds; dashed: the slope predicted for the
    quantity. step: of update, propagated and change (default: the last). Raises ValueError if there is no such tensor.
    """
    rows = exponents(frame, step)
    rows = rows[(rows.tensor == tensor) & (rows.layer == layer)]
    if rows.empty or rows.parametrization.nunique() > 1:
        raise ValueError(f"the frame needs one parametrization and the tensor {tensor!r} of layer {layer}")
    step, axis = frame.step.max() if step is None else step, size_axis(frame)
    points = frame[(frame.tensor == tensor) & (frame.layer == layer) & frame.step.isin((0, step))]
    figure = Figure(figsize=(2.1 * len(rows) + 0.6, 3.2), layout="constrained")
    panels = figure.subplots(1, len(rows), sharex=True, squeeze=False)[0]
    for axes, row in zip(panels, rows.itertuples(), strict=True):
        own = points[points.quantity == row.quantity]
        broken = row.verdict in BROKEN
        axes.set_title(f"{row.quantity}\n" + _slope_words(row), fontsize=10, color=ALERT if broken else "black")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(set(own[axis])), [f"{size:g}" for size in sorted(set(own[axis]))])
        axes.minorticks_off()
        axes.set_xlabel(axis)
        axes.grid(alpha=0.25)
        if math.isnan(row.measured):
            why = "exactly zero" if row.verdict == "zero" else "no logarithm of it"
            axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center")
            axes.set_yticks([])
            continue
        means = own.groupby(axis).value.apply(lambda values: float(np.exp(np.log(values).mean())))
        axes.plot(own[axis], own.value, "o", markersize=3, color=ALERT if broken else QUIET, alpha=0.5)
        axes.plot(means.index, means, color=ALERT if broken else QUIET, linewidth=1.8)
        if not math.isnan(row.predicted):
            middle, centre = np.exp(np.log(means).mean()), np.exp(np.log(means.index.to_numpy(float)).mean())
            axes.plot(means.index, middle * (means.index.to_numpy(float) / centre) ** row.predicted, "k--", linewidth=1.2)
        axes.set_yscale("log", base=2)
        low, high = axes.get_ylim()
        room = max(1.0, 4 / math.sqrt(high / low))  # so that noise on a flat line looks like noise
        axes.set_ylim(low / room, high * room)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda rms, _: f"$2^{{{round(math.log2(rms))}}}$"))
        axes.tick_params(labelsize=8)
    panels[0].set_ylabel("RMS (allocation: nats)")
    return figure


def _slope_words(row) -> str:
    if math.isnan(row.measured):
        return ""
    expected = "" if math.isnan(row.predicted) else f"\npredicted {row.predicted + 0.0:+.1f}"
    return f"slope {row.measured:+.2f} ± {row.stderr:.2f}{expected}"


def router_rules(check: pd.DataFrame, frame: pd.DataFrame, loss: str = "val_loss") -> Figure:
    """What each parametrization's router does, above the LR curves that it gives: a column per parametrization of `frame`.

    check: from `coordinate_check`, of (at least) the same parametrizations; drawn is the router of the last layer. frame: as
    `sweep` returns it. Raises ValueError if the check lacks a parametrization, or its models have no router.
    """
    means, table = mean_losses(frame, loss=loss), exponents(check)
    names = list(dict.fromkeys(means.parametrization))
    if missing := set(names) - set(check.parametrization):
        raise ValueError(f"the check lacks {', '.join(sorted(missing))}")
    figure = Figure(figsize=(2.1 * len(names) + 0.8, 5.4), layout="constrained")
    above, below = figure.subplots(2, len(names), sharex="row", sharey="row", squeeze=False)
    looks, top = styles(means.width), fit_losses(below[0], means)
    logits = table[(table.role == "router") & (table.quantity != "allocation")]
    router = logits[logits.layer == logits.layer.max()]
    if router.empty:
        raise ValueError("the check is of dense models, which have no router")
    growth = _growth(check)
    for upper, lower, name in zip(above, below, names, strict=True):
        _draw_tensor(upper, router[router.parametrization == name], growth[name])
        upper.set_title(
            f"{plain(name)}\n" + "\n".join(upper.get_title().split("\n")[1:]), fontsize=9, color=upper.title.get_color()
        )
        for width, curve in means[means.parametrization == name].groupby("width"):
            draw_curve(lower, curve.sort_values("lr"), f"{width:g}", looks[width], top, minima=True)
        label_octaves(lower, sorted(means.lr.unique()))
        upper.set_xlabel("width")
        lower.set_xlabel("learning rate")
        lower.grid(alpha=0.25)
    above[0].set_ylabel("router logits' growth with width")
    below[0].set_ylabel("validation loss")
    handles = {float(line.get_label()): line for axes in below for line in axes.get_legend_handles_labels()[0]}
    lines = [handles[width] for width in sorted(handles)]
    figure.legend(handles=lines, title="width", loc="outside right lower", frameon=False)
    return figure
