"""Pictures: a frame in, a matplotlib Figure out. One colour and marker per width, everywhere."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter

from .coordinates import OUTPUTS, OUTSIDE, TENSORS, TOLERANCE, exponents, size_axis
from .transfer import mean_losses, optimum, transfer_report

MARKERS = "osD^vPX<>h"
ALERT, QUIET = "#c1121f", "#333333"  # broken, and not
WRAPPED = 5  # panels in one row
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


def lr_curves(
    frame: pd.DataFrame,
    by: str = "width",
    loss: str = "val_loss",
    *,
    minima: bool = True,
    my_lr: float | None = None,
    live: pd.DataFrame | None = None,
    swapped: bool = False,
    notes: dict[tuple[str, float], str] | None = None,
) -> Figure:
    """Loss against learning rate: a panel per parametrization, a curve per value of `by`, minima marked.

    frame: as `sweep` returns it. Curves are means over seeds, with a band of one standard deviation. A star and a dotted
    line mark each optimum (hollow: on the grid's edge); a cross at the top is a run that diverged or lies above. my_lr: an
    LR to mark in every panel. live: another sweep's frame, drawn dashed on top. swapped: a panel per value of `by` and a
    curve per parametrization. notes: (parametrization, value) -> what to say of that curve in a legend of its own panel.
    Raises ValueError as `mean_losses` does.
    """
    means = mean_losses(frame, by, loss)
    others = means.iloc[:0] if live is None or live.empty else mean_losses(live, by, loss)
    shown = pd.concat([means, others])
    panel, curve = (by, "parametrization") if swapped else ("parametrization", by)
    names = sorted(set(means[by])) if swapped else list(dict.fromkeys(means.parametrization))
    titles = {name: f"{by.replace('_', ' ')} {name:g}" for name in names} if swapped else _titles(frame, by, loss)
    looks = table_styles(shown.parametrization) if swapped else styles(shown[by], by)
    figure, panels = _panels(len(names), {"val_loss": "validation", "train_loss": "training"}.get(loss, loss))
    top = _fit_losses(panels[0], shown)
    for axes, name in zip(panels, names, strict=True):
        drawn = {
            value: _draw_curve(axes, points.sort_values("lr"), _name(value), looks[value], top, minima)
            for value, points in means[means[panel] == name].groupby(curve)
        }
        for value, points in others[others[panel] == name].groupby(curve):
            points = points.sort_values("lr")
            axes.plot(points.lr, points.loss.clip(upper=top), "--", markersize=7, fillstyle="none", **looks[value])
        if my_lr is not None:
            axes.axvline(my_lr, color="black", linewidth=1.4)
        axes.set_title(titles[name], fontsize=11 if len(names) <= WRAPPED else 9)
        curves = {(value, name) if swapped else (name, value): line for value, line in drawn.items()}
        if noted := [key for key in curves if key in (notes or {})]:
            handles, words = [curves[key] for key in noted], [notes[key] for key in noted]
            axes.legend(handles, words, loc="upper center", fontsize=8, edgecolor="none")
        _label_octaves(axes, sorted({*means.lr, *(() if my_lr is None else (my_lr,))}))
        axes.grid(alpha=0.25)
    handles = {line.get_label(): line for axes in panels for line in axes.get_legend_handles_labels()[0]}
    lines = [handles[_name(value)] for value in looks if _name(value) in handles]
    if len(others):
        lines.append(Line2D([], [], color="black", linestyle="--", label="live"))
    if my_lr is not None:
        lines.append(Line2D([], [], color="black", linewidth=1.4, label="my LR"))
    figure.legend(handles=lines, title=None if swapped else by.replace("_", " "), loc="outside right center", frameon=False)
    return figure


def _name(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _panels(number: int, loss: str) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels of loss against LR that share their axes, in rows of three or four where one is too long."""
    columns = number if number <= WRAPPED else 3 if number in (6, 9) else 4
    rows = math.ceil(number / columns)
    figure = Figure(figsize=(1.2 + 3.6 * columns, 4.2 if rows == 1 else 0.6 + 3.1 * rows), layout="constrained")
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
    reports = transfer_report(frame, by, loss).set_index("parametrization")
    return {name: f"{name}\n{_drift(report)}" for name, report in reports.iterrows()}


def table_styles(names: Iterable[str]) -> dict[str, dict]:
    """name -> the colour and marker that stand for it within one figure, in their order."""
    names = list(dict.fromkeys(names))
    looks = zip(sns.color_palette("husl", len(names)), MARKERS * len(names), strict=False)
    return {name: {"color": color, "marker": marker} for name, (color, marker) in zip(names, looks, strict=False)}


def _fit_losses(axes: Axes, means: pd.DataFrame) -> float:
    """Show the finite losses, up to OFF_SCALE above the best; returns the highest that is shown."""
    finite = means.loss[np.isfinite(means.loss)]
    best = finite.min() if len(finite) else 0.0
    top = min(finite.max(), best + OFF_SCALE) if len(finite) else 1.0
    margin = 0.06 * max(top - best, 0.1)
    axes.set_ylim(best - margin, top + margin)
    return top


def _drift(report: pd.Series) -> str:
    if report.on_edge:
        return "an optimum lies on the grid's edge"
    return f"the best LR drifts by {report.drift_octaves:+.2f} octaves"


def _draw_curve(axes: Axes, curve: pd.DataFrame, name: str, look: dict, ceiling: float, minima: bool) -> Line2D:
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
    if minima and math.isfinite(found["loss"]):
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
    return line


def _label_octaves(axes: Axes, lrs: list[float]) -> None:
    """A logarithmic axis in base 2, labelled at whole octaves."""
    axes.set_xscale("log", base=2)
    octaves = range(math.floor(math.log2(lrs[0])), math.ceil(math.log2(lrs[-1])) + 1)
    axes.xaxis.set_major_locator(FixedLocator([2.0**octave for octave in octaves]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda lr, _: f"$2^{{{round(math.log2(lr))}}}$"))
    axes.minorticks_off()


def drift_chart(report: pd.DataFrame, by: str, references: dict[str, float] | None = None) -> Figure:
    """How far the best LR moves per doubling of `by`: a row per parametrization, thick bars one standard error, thin ones two.

    report: from `drift_report`. A hollow point is one seed, without an error; a row without an optimum is said to have none.
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
        axes.axvline(octaves, color=ALERT, linestyle=style, linewidth=1.2, label=f"{name}: {octaves:+g}")
    axes.set_yticks(range(len(report)), report.parametrization)
    axes.set_ylim(len(report) - 0.5, -0.5)
    axes.set_xlabel(f"octaves of the best LR per doubling of {by.replace('_', ' ')}")
    axes.grid(alpha=0.25, axis="x")
    if references:
        figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


def coordinate_curves(frame: pd.DataFrame, layer: int | None = None) -> Figure:
    """A coordinate check as small multiples: a panel per tensor, how its RMS grows with the size, relative to the smallest.

    frame: from `coordinate_check`; each parametrization gets two rows of panels. Dark: the output at init; blue, a line
    per step: the update (change, where a tensor is no weight's own). Dashed: the predicted slopes. Red: what the verdict
    condemns. layer: the blocks' layer to show (default: of each tensor the one with the largest violation or deviation).
    Raises ValueError as `exponents` does, or for a layer that the frame does not have.
    """
    if layer is not None and layer not in set(frame.layer) - {OUTSIDE}:
        raise ValueError(f"layer={layer!r}: the frame has {sorted(set(frame.layer) - {OUTSIDE})}")
    table, axis = exponents(frame), size_axis(frame)
    names = list(dict.fromkeys(frame.parametrization))
    means = _growth(frame)
    figure = Figure(figsize=(12.5, 4.9 * len(names)), layout="constrained")
    for part, name in zip(np.atleast_1d(figure.subfigures(len(names), 1)), names, strict=True):
        part.suptitle(f"{name}: growth with {axis}", fontsize=12)
        panels = part.subplots(2, 6, sharex=True, sharey=True).flat
        own = table[table.parametrization == name]
        for axes, tensor in zip(panels, TENSORS, strict=True):
            rows = own[(own.tensor == tensor) & ((own.layer == layer) | (own.layer == OUTSIDE) | (layer is None))]
            if rows.empty:  # a dense model has no router
                axes.set_axis_off()
            else:
                _draw_tensor(axes, rows, means[name])
        for axes in part.axes:
            axes.set_xlabel(axis, fontsize=9)
            axes.label_outer()
        part.supylabel(f"RMS / RMS at the smallest {axis}", fontsize=9)
        _coordinate_legend(part, sorted(set(frame.step) - {0}))
    shown = [axes for part in figure.subfigs for axes in part.axes if axes.axison]
    low, high = (f(axes.get_ylim()[i] for axes in shown) for i, f in enumerate((min, max)))
    for axes in shown:
        axes.set_ylim(min(low, 1 / 4), max(high, 4))  # the same for all, and flat is seen to be flat
    return figure


def _growth(frame: pd.DataFrame) -> pd.Series:
    """log2 of each RMS (mean over seeds) over that at the smallest size; the index ends in step and size."""
    means = frame.assign(rms=np.log2(frame.rms.where(frame.rms > 0)))
    means = means.groupby(["parametrization", "layer", "tensor", "quantity", "step", size_axis(frame)]).rms.mean()
    return means - means.groupby(level=[0, 1, 2, 3, 4]).transform("first")  # levels are sorted


def _draw_tensor(axes: Axes, rows: pd.DataFrame, means: pd.Series) -> None:
    """One tensor's panel, at the layer where it looks worst."""
    rows = rows[rows.quantity.isin(("init", "update", "change"))]
    broken = rows.verdict.isin(("explodes", "shrinks"))
    off = (rows.measured - rows.predicted).abs().fillna(0) + 100 * broken
    rows = rows[rows.layer == rows.loc[off.idxmax(), "layer"]].set_index("quantity")
    layer, tensor = rows.layer.iloc[0], rows.tensor.iloc[0]
    moved = "update" if "update" in rows.index else "change"
    said = []
    for quantity in ("init", moved):
        row = rows.loc[quantity]
        alert = row.verdict in ("explodes", "shrinks")
        curves = means[layer, tensor, quantity].unstack(-1)  # a row per step, a column per size, log2
        if curves.notna().all(axis=None):
            shades = [QUIET] if quantity == "init" else sns.color_palette("Blues", len(curves) + 2)[2:]
            for shade, (_, curve) in zip(shades, curves.iterrows(), strict=True):
                last = curve.name == curves.index[-1]
                color = ALERT if alert and last else shade
                axes.plot(curve.index, 2.0**curve, color=color, linewidth=2 if last else 1.2, marker="o", markersize=3)
            if not math.isnan(row.predicted):
                sizes = curves.columns.to_numpy(float)
                expected = (sizes / sizes[0]) ** row.predicted
                axes.plot(sizes, expected, "--", color="black", linewidth=1, zorder=5)
        word = f" {row.verdict}" if row.verdict in ("explodes", "shrinks", "zero") else ""
        said.append((f"{quantity} {row.measured:+.2f}{word}", alert))
    place = "" if layer == OUTSIDE else f", layer {layer}"
    axes.set_title(f"{tensor}{place}\n" + "\n".join(text for text, _ in said), fontsize=9)
    if any(alert for _, alert in said):
        axes.title.set_color(ALERT)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda growth, _: f"{growth:g}" if growth >= 1 else f"1/{1 / growth:g}"))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)


def _coordinate_legend(part, steps: list[int]) -> None:
    blues = sns.color_palette("Blues", len(steps) + 2)[2:]
    lines = [Line2D([], [], color=QUIET, marker="o", markersize=3, label="init")]
    shown = sorted({0, len(steps) - 1})
    lines += [Line2D([], [], color=blues[i], marker="o", markersize=3, label=f"update, step {steps[i]}") for i in shown]
    lines += [Line2D([], [], color="black", linestyle="--", label="predicted")]
    lines += [Line2D([], [], color=ALERT, linewidth=2, label="breaks muP's desiderata")]
    part.legend(handles=lines, loc="outside lower right", ncols=len(lines), frameon=False, fontsize=8)


def exponents_chart(predicted: dict[tuple[str, str], float], table: pd.DataFrame | None = None) -> Figure:
    """Exponents in the width, a row per tensor: init on the left, update on the right.

    predicted: from `predicted_exponents`, hollow diamonds. table: from `exponents`, dots with their standard errors, one
    per layer. The grey band is where muP wants them (a router's and the logits' init may lie below it); red is outside.
    """
    if table is not None and table.parametrization.nunique() > 1:
        raise ValueError(f"the table holds {', '.join(table.parametrization.unique())}: select one of them")
    figure = Figure(figsize=(8.6, 4.2), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, 2, sharey=True), ("init", "update"), strict=True):
        for place, tensor in enumerate(reversed(TENSORS)):
            low = -2.5 if quantity == "init" and tensor in OUTPUTS else -TOLERANCE
            exponent = predicted.get((tensor, quantity), math.nan)
            if not math.isnan(exponent):
                axes.fill_betweenx([place - 0.4, place + 0.4], low, TOLERANCE, color="#dddddd", linewidth=0)
                color = QUIET if low <= exponent <= TOLERANCE else ALERT
                exponent = max(-2.1, min(exponent, 2.1))  # at the edge, rather than out of sight
                axes.plot(exponent, place, "D", markersize=8, color=color, fillstyle="none")
            if table is not None:
                for found in table[(table.tensor == tensor) & (table.quantity == quantity)].itertuples():
                    broken = found.verdict in ("explodes", "shrinks")
                    at = place + 0.12 * (1 - 2 * (found.layer % 2)) * (found.layer != OUTSIDE)
                    axes.errorbar(
                        max(-2.1, min(found.measured, 2.1)),
                        at,
                        xerr=found.stderr,
                        fmt="o",
                        markersize=4,
                        color=ALERT if broken else QUIET,
                    )
        axes.set_yticks(range(len(TENSORS)), reversed(TENSORS))
        axes.set_xlim(-2.2, 2.2)
        axes.set_xlabel(f"exponent of the {quantity} in the width")
        axes.grid(alpha=0.25, axis="x")
    lines = [Line2D([], [], color=QUIET, marker="D", fillstyle="none", linestyle="", label="predicted from the table")]
    if table is not None:
        lines.append(Line2D([], [], color=QUIET, marker="o", markersize=4, label="measured, with standard error"))
    lines += [Patch(color="#dddddd", label="as muP wants it"), Line2D([], [], color=ALERT, marker="o", linestyle="", label="not")]
    figure.legend(handles=lines, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


def tensor_curves(frame: pd.DataFrame, tensor: str, layer: int = OUTSIDE, step: int | None = None) -> Figure:
    """One tensor of one coordinate check: the RMS of each of its quantities against the size, with fitted slopes.

    frame: rows of one parametrization from `coordinate_check`. Dots are seeds; dashed: the slope predicted for the
    quantity. step: of update, drift and change (default: the last). Raises ValueError if there is no such tensor.
    """
    rows = exponents(frame, step)
    rows = rows[(rows.tensor == tensor) & (rows.layer == layer)]
    if rows.empty or rows.parametrization.nunique() > 1:
        raise ValueError(f"the frame needs one parametrization and the tensor {tensor!r} of layer {layer}")
    step, axis = frame.step.max() if step is None else step, size_axis(frame)
    points = frame[(frame.tensor == tensor) & (frame.layer == layer) & frame.step.isin((0, step))]
    figure = Figure(figsize=(2.6 * len(rows) + 0.6, 3.2), layout="constrained")
    panels = figure.subplots(1, len(rows), sharex=True, squeeze=False)[0]
    for axes, row in zip(panels, rows.itertuples(), strict=True):
        own = points[points.quantity == row.quantity]
        broken = row.verdict in ("explodes", "shrinks")
        axes.set_title(f"{row.quantity}\n" + _slope_words(row), fontsize=10, color=ALERT if broken else "black")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(set(own[axis])), [f"{size:g}" for size in sorted(set(own[axis]))])
        axes.minorticks_off()
        axes.set_xlabel(axis)
        axes.grid(alpha=0.25)
        if row.verdict == "zero":
            axes.text(0.5, 0.5, "exactly zero", transform=axes.transAxes, ha="center")
            axes.set_yticks([])
            continue
        means = own.groupby(axis).rms.apply(lambda rms: float(np.exp(np.log(rms).mean())))
        axes.plot(own[axis], own.rms, "o", markersize=3, color=ALERT if broken else QUIET, alpha=0.5)
        axes.plot(means.index, means, color=ALERT if broken else QUIET, linewidth=1.8)
        if not math.isnan(row.predicted):
            middle, centre = np.exp(np.log(means).mean()), np.exp(np.log(means.index.to_numpy(float)).mean())
            axes.plot(means.index, middle * (means.index.to_numpy(float) / centre) ** row.predicted, "k--", linewidth=1.2)
        axes.set_yscale("log", base=2)
        low, high = axes.get_ylim()
        room = max(1.0, 4 / math.sqrt(high / low))  # so that noise on a flat line looks like noise
        axes.set_ylim(low / room, high * room)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda rms, _: f"{rms:.3g}"))
        axes.tick_params(labelsize=8)
    panels[0].set_ylabel("RMS")
    return figure


def _slope_words(row) -> str:
    if row.verdict == "zero":
        return ""
    expected = "" if math.isnan(row.predicted) else f", predicted {row.predicted + 0.0:+.1f}"
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
    figure = Figure(figsize=(2.5 * len(names) + 0.8, 5.4), layout="constrained")
    above, below = figure.subplots(2, len(names), sharex="row", sharey="row", squeeze=False)
    looks, top = styles(means.width), _fit_losses(below[0], means)
    router = table[(table.tensor == "router") & (table.layer == table.layer.max())]
    if router.empty:
        raise ValueError("the check is of dense models, which have no router")
    growth = _growth(check)
    for upper, lower, name in zip(above, below, names, strict=True):
        _draw_tensor(upper, router[router.parametrization == name], growth[name])
        upper.set_title(f"{name}\n" + "\n".join(upper.get_title().split("\n")[1:]), fontsize=9, color=upper.title.get_color())
        for width, curve in means[means.parametrization == name].groupby("width"):
            _draw_curve(lower, curve.sort_values("lr"), f"{width:g}", looks[width], top, minima=True)
        _label_octaves(lower, sorted(means.lr.unique()))
        upper.set_xlabel("width")
        lower.set_xlabel("learning rate")
        lower.grid(alpha=0.25)
    above[0].set_ylabel("router logits' growth with width")
    below[0].set_ylabel("validation loss")
    handles = {float(line.get_label()): line for axes in below for line in axes.get_legend_handles_labels()[0]}
    lines = [handles[width] for width in sorted(handles)]
    figure.legend(handles=lines, title="width", loc="outside right lower", frameon=False)
    return figure
