"""Pictures that set several tables or models beside one another: rows of checks or of losses in, a matplotlib Figure out."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .checks import require
from .figures import QUIET, plain
from .optima_figures import look
from .verdicts import BROKEN, JUDGED

TERMS = {  # of a sum over experts, after a few steps -> what the legend says
    "init": "init: $W_0h_0$",
    "update": "effective: $\\Delta W\\,h$",
    "propagated": "propagating: $W_0\\,\\Delta h$",
}
SMOOTH = 5  # steps of an overlay's running mean
STRONGEST = 0.75  # the exponent at which a map's colours are strongest


def three_terms(values: pd.DataFrame, grid: list[list[str]], sizes: str = "number of experts") -> Figure:
    """The three terms of the routed sum against the size, each over its value at the smallest: a panel for each table of `grid`,
    a list of rows; the legends have the slopes.

    values: rows of the tensor "moe" of one layer, with columns parametrization, quantity, size and mean (an RMS). Raises
    ValueError for a table without rows.
    """
    shape = len(grid), max(map(len, grid))
    figure = Figure(figsize=(4.3 * shape[1], 2.7 * shape[0] + 0.3), layout="constrained")
    panels = figure.subplots(*shape, squeeze=False, sharex=True, sharey=True)
    for row, names in zip(panels, grid, strict=True):
        for axes, name in zip(row, names, strict=True):
            own = values[values.parametrization == name]
            require(len(own) > 0, "grid", name, "the values have no rows of this table")
            _draw_terms(axes, own)
            axes.set_title(plain(name), fontsize=11)
    figure.supxlabel(sizes, fontsize=10)
    figure.supylabel("log2 of the RMS over its smallest size's", fontsize=10)
    return figure


def _draw_terms(axes: Axes, own: pd.DataFrame) -> None:
    """One table's terms."""
    for place, (quantity, said) in enumerate(TERMS.items()):
        means = own[own.quantity == quantity].groupby("size")["mean"].mean()
        octaves = np.log2(means / means.iloc[0])
        slope = np.polyfit(np.log2(means.index), octaves, 1)[0]
        axes.plot(np.log2(means.index), octaves, label=f"{said}   {slope:+.2f}", linewidth=1.6, **look(place))
    axes.axhline(0, color=QUIET, linewidth=0.8)
    axes.set_xticks(np.log2(means.index), [f"{size:g}" for size in means.index])
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="lower left")


def verdict_map(judged: pd.DataFrame, columns: list[str]) -> Figure:
    """Where each table breaks: a row per tensor, a column per table. A coloured cell says which of init, update and allocation
    the verdict condemns, and with which exponent in the size: red grows, blue shrinks. A dot: all that is judged holds.

    judged: rows of `exponents` of one layer and of what is outside the blocks, with columns parametrization, tensor, quantity,
    measured and verdict, in the order of the forward pass. Raises ValueError for a table without rows.
    """
    for name in columns:
        require((judged.parametrization == name).any(), "columns", name, "there are no rows of this table")
    known = judged.quantity.isin(JUDGED) & (judged.verdict != "unjudged") & judged.parametrization.isin(columns)
    tensors = [tensor for tensor in dict.fromkeys(judged.tensor) if (judged[known].tensor == tensor).any()]
    judged = judged[known]
    figure = Figure(figsize=(1.7 + 1.25 * len(columns), 0.34 * len(tensors) + 0.9), layout="constrained")
    axes, colours = figure.subplots(), sns.color_palette("vlag", as_cmap=True)
    scale = Normalize(-STRONGEST, STRONGEST)
    for column, name in enumerate(columns):
        own = judged[judged.parametrization == name]
        for height, tensor in enumerate(tensors):
            broken = own[(own.tensor == tensor) & own.verdict.isin(BROKEN)]
            if broken.empty:
                axes.text(column, height, "·", ha="center", va="center", color=QUIET, fontsize=14)
                continue
            worst = broken.loc[broken.measured.abs().idxmax()].measured
            shade = colours(scale(worst if math.isfinite(worst) else STRONGEST))
            axes.add_patch(Rectangle((column - 0.48, height - 0.46), 0.96, 0.92, facecolor=shade, edgecolor="none"))
            said = ", ".join(f"{row.quantity} {row.measured:+.2f}" for row in broken.itertuples())
            axes.text(column, height, said, ha="center", va="center", fontsize=8, color="white" if abs(worst) > 0.55 else "black")
    axes.set_xticks(range(len(columns)), [plain(name) for name in columns], fontsize=9)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(tensors)), [plain(tensor) for tensor in tensors], fontsize=9)
    axes.tick_params(length=0)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(tensors) - 0.5, -0.5)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure


def overlay_curves(frame: pd.DataFrame, panels: dict[str, list[str]], reference: str = "dense") -> Figure:
    """The loss of each variant less that of the reference, seed by seed, at each of the first steps: a panel for each list of
    variants. Mean over the seeds and over five steps, with a band of one standard error.

    frame: from `upcycling.first_losses`. panels: title -> variants. Raises ValueError for a variant without rows.
    """
    losses = frame.pivot(index=["seed", "step"], columns="variant", values="loss")
    for name in (reference, *(name for names in panels.values() for name in names)):
        require(name in losses, "panels", name, "the frame has no rows of this variant")
    gaps = losses.sub(losses[reference], axis=0)
    figure = Figure(figsize=(4.6 * len(panels) + 0.4, 3.8), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels.items(), strict=True):
        for place, name in enumerate(names):
            own = gaps[name].unstack("seed").rolling(SMOOTH, min_periods=1).mean()
            mean, error = own.mean(axis=1), own.sem(axis=1)
            colour = look(place)["color"]
            axes.plot(own.index + 1, mean, color=colour, label=plain(name), linewidth=1.6)
            axes.fill_between(own.index + 1, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)
        axes.axhline(0, color=QUIET, linewidth=0.8)
        axes.set_title(plain(title), fontsize=11)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    figure.supylabel(f"loss less that of {plain(reference)}, nats", fontsize=10)
    return figure
