"""Pictures of allocations: which tensor does the learning, at every size and along a whole training."""

from __future__ import annotations

import math
import textwrap

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from .checks import require
from .coordinates import LOSS, size_axis
from .figures import ALERT, PALETTE, QUIET, plain
from .probe import OUTSIDE
from .verdicts import BROKEN, exponents, layers_compared

FULL = 2.0  # octaves of growth at which the colours are strongest
ROW = 0.26  # inches
PROMISES = {  # columns of a frame of books -> what stands in the legend, and how it is drawn
    "left": ("promised by the gradient before each step", ":", "^"),
    "trapezoid": ("mean of the gradients before and after", "--", "s"),
    "fall": ("true fall of the loss", "-", "o"),
}


def allocation_map(frame: pd.DataFrame, step: int | None = None) -> Figure:
    """How every tensor's share of the learning grows with the size: a panel per parametrization.

    frame: from `coordinate_check` or `check_module`. Rows are tensors, in the order of the forward pass (where the depth
    grows, the sums over the layers), columns sizes; number and colour are log2 of the allocation, the mean over seeds, over
    that at the smallest size. On the right is its slope with its standard error, and in brackets the predicted one; red is
    what the verdict condemns. Below stand the sum of the allocations, the true fall of the loss, and the closure, one over
    the other. step: after which (default: the last). Raises ValueError as `exponents` does, or for a frame without
    allocations.
    """
    table, axis = exponents(frame, step), size_axis(frame)
    step = frame.step.max() if step is None else step
    rows = layers_compared(frame)
    rows = rows[(rows.step == step) & rows.quantity.isin(("allocation", "fall"))]
    if rows.empty:
        raise ValueError("the frame has no allocations")
    names = list(dict.fromkeys(frame.parametrization))
    means = rows.groupby(["parametrization", "layer", "tensor", "quantity", axis]).value.mean().unstack()
    lines = table[table.quantity.isin(("allocation", "fall"))]
    if (table.layer == "sum").any():
        lines = lines[lines.layer.isin(("sum", OUTSIDE))]
    tall = max(len(own) for _, own in lines.groupby("parametrization"))
    figure = Figure(figsize=((2.9 + 0.5 * means.shape[1]) * len(names) + 0.6, ROW * (tall + 1) + 1.3), layout="constrained")
    for place, (axes, name) in enumerate(zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True)):
        _draw_map(axes, lines[lines.parametrization == name], means.loc[name], labels=place == 0 or len(names) < 3)
        axes.set_title(f"{plain(name)}\n", fontsize=11)
        axes.set_xlabel(axis)
    smallest = means.columns.min()
    words = f"Numbers and colours: log2 of the allocation over that at {axis} {smallest:g}. Red has grown, blue has shrunk. "
    words += "On the right the slope, and in brackets the predicted one."
    figure.supxlabel(textwrap.fill(words, round(13 * figure.get_figwidth())), fontsize=9)
    return figure


def _draw_map(axes: Axes, lines: pd.DataFrame, means: pd.Series, labels: bool) -> None:
    """One parametrization's rows, from the first tensor at the top to the closure at the bottom."""
    sizes, colours, scale = list(means.columns), sns.color_palette("vlag", as_cmap=True), Normalize(-FULL, FULL)
    height = -1.0
    names, places = [], []
    for row in lines.itertuples():
        height += 1.5 if row.tensor == LOSS and row.quantity == "allocation" else 1.0
        nats = means.loc[(row.layer, row.tensor, row.quantity)].to_numpy(float)
        with np.errstate(invalid="ignore", divide="ignore"):
            growth = np.log2(np.where(nats > 0, nats, np.nan) / nats[0])
        for column, octaves in enumerate(growth):
            known = math.isfinite(octaves)
            shade = colours(scale(octaves)) if known else "white"
            axes.add_patch(_cell(column, height, shade))
            text = f"{octaves:+.1f}" if known else "< 0"
            dark = known and abs(octaves) > 0.7 * FULL
            axes.text(column, height, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        error = "" if math.isnan(row.stderr) else f" ± {row.stderr:.2f}"
        expected = "" if math.isnan(row.predicted) else f" ({row.predicted + 0.0:+.1f})"
        said = row.verdict if math.isnan(row.measured) else f"{row.measured:+.2f}{error}{expected}"
        color = ALERT if row.verdict in BROKEN else QUIET
        axes.text(len(sizes) - 0.35, height, said, ha="left", va="center", fontsize=8, color=color)
        names.append(_label(row))
        places.append(height)
    books = {quantity: means.loc[(OUTSIDE, LOSS, quantity)].to_numpy(float) for quantity in ("allocation", "fall")}
    for column, closed in enumerate(books["allocation"] / books["fall"]):
        axes.text(column, height + 1, f"{closed:.2f}", ha="center", va="center", fontsize=8)
    axes.set_yticks([*places, height + 1], [*names, "closure"], fontsize=8)
    axes.tick_params(length=0, labelleft=labels)
    axes.set_xticks(range(len(sizes)), [f"{size:g}" for size in sizes], fontsize=8)
    axes.set_xlim(-0.5, len(sizes) + 2.0)
    axes.set_ylim(height + 1.6, -0.6)
    for side in axes.spines.values():
        side.set_visible(False)


def _cell(column: int, height: float, shade) -> Rectangle:
    return Rectangle((column - 0.48, height - 0.46), 0.96, 0.92, facecolor=shade, edgecolor="none")


def _label(row) -> str:
    if row.tensor == LOSS:
        return "sum of all" if row.quantity == "allocation" else "true fall of the loss"
    return f"{plain(row.tensor)}{'' if row.layer in (OUTSIDE, 'sum') else f', layer {row.layer}'}"


def learning_shares(books: pd.DataFrame) -> Figure:
    """Who does the learning: what each role has done to the loss by a step, stacked; a row per table, a panel per width.

    books: from `learning.books`, of one or more tables, widths and seeds. Heights are means over the seeds; the black line is
    the true fall of the loss, with a band of one standard deviation. A share below 0 (a role whose steps raised the loss) is
    drawn below the axis. Raises ValueError for a frame without rows.
    """
    require(len(books) > 0, "books", len(books), "has no rows")
    tables, widths = list(dict.fromkeys(books.parametrization)), sorted(set(books.width))
    roles = list(dict.fromkeys(books.role))
    colours = dict(zip(roles, PALETTE[: len(roles)], strict=True))
    figure = Figure(figsize=(2.5 * len(widths) + 1.9, 2.3 * len(tables) + 0.9), layout="constrained")
    panels = figure.subplots(len(tables), len(widths), sharex=True, sharey=True, squeeze=False)
    for line, table in zip(panels, tables, strict=True):
        for axes, width in zip(line, widths, strict=True):
            own = books[(books.parametrization == table) & (books.width == width)]
            _draw_shares(axes, own, colours)
            axes.set_title(f"{plain(table)}, width {width}, LR 2^{math.log2(own.lr.iloc[0]):.1f}", fontsize=9)
        line[0].set_ylabel("fall of the loss (nats)")
    for axes in panels[-1]:
        axes.set_xlabel("step")
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside right center", frameon=False, fontsize=9)
    return figure


def _draw_shares(axes: Axes, books: pd.DataFrame, colours: dict[str, tuple]) -> None:
    by_role = books.groupby(["step", "role"], sort=False).allocation.mean().unstack().cumsum()
    falls = books.groupby(["seed", "step"]).fall.first().unstack("seed").cumsum()
    steps = [0, *by_role.index]
    above, below = np.zeros(len(steps)), np.zeros(len(steps))
    for role, colour in colours.items():
        share = np.array([0.0, *by_role[role]])
        bottom = np.where(share >= 0, above, below)
        axes.fill_between(steps, bottom, bottom + share, color=colour, linewidth=0, label=plain(role))
        above, below = above + np.maximum(share, 0), below + np.minimum(share, 0)
    mean, spread = (np.array([0.0, *values]) for values in (falls.mean(axis=1), falls.std(axis=1).fillna(0)))
    axes.plot(steps, mean, color="black", linewidth=1.5, label="true fall")
    axes.fill_between(steps, mean - spread, mean + spread, color="black", alpha=0.25, linewidth=0)
    axes.axhline(0, color=QUIET, linewidth=0.6)
    axes.grid(alpha=0.25)


def promise_and_fall(books: pd.DataFrame) -> Figure:
    """What the gradients promised and what the loss did, by width: a panel per table.

    books: from `learning.books`, at one LR for all. Points are sums over the steps, means over the seeds, with one standard
    deviation. Raises ValueError for a frame without rows, or with several LRs.
    """
    require(len(books) > 0, "books", len(books), "has no rows")
    require(books.lr.nunique() == 1, "lr", sorted(set(books.lr)), "must be one LR for all")
    runs = books.groupby(["parametrization", "width", "seed", "step"], sort=False)
    sums = runs[["left", "trapezoid"]].sum().join(runs.fall.first())
    sums = sums.groupby(level=[0, 1, 2], sort=False).sum()
    tables = list(dict.fromkeys(books.parametrization))
    figure = Figure(figsize=(3.6 * len(tables) + 0.4, 3.9), layout="constrained")
    for axes, table in zip(figure.subplots(1, len(tables), sharey=True, squeeze=False)[0], tables, strict=True):
        by_width = sums.loc[table].groupby(level=0)
        means, spreads = by_width.mean(), by_width.std().fillna(0)
        for column, (name, style, marker) in PROMISES.items():
            color = QUIET if column == "fall" else ALERT
            axes.errorbar(means.index, means[column], yerr=spreads[column], color=color, linestyle=style, marker=marker,
                          markersize=4, capsize=2, label=name)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(means.index, [f"{width:g}" for width in means.index])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda nats, _: f"{nats:g}"))
        axes.set_xlabel("width")
        axes.set_title(plain(table))
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel(f"nats, after {books.step.max()} steps at LR 2^{math.log2(books.lr.iloc[0]):g}")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=1, frameon=False, fontsize=9)
    return figure
