"""Pictures of what the depth does: frames in, a matplotlib Figure out."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .checks import require
from .figures import MARKERS, plain
from .optima_figures import LOOKS


def linearisation_curves(frame: pd.DataFrame) -> Figure:
    """The distance of a residual block from its linearisation, against the number of blocks: a curve per table, both axes
    logarithmic, bars of one standard error over the seeds; the legend has the slopes.

    frame: from `linearisations.linearisation`. Raises ValueError for a frame without rows.
    """
    require(len(frame) > 0, "frame", len(frame), "has no rows")
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots()
    for place, (name, own) in enumerate(frame.groupby("parametrization", sort=False)):
        means = own.groupby("depth").distance.agg(["mean", "sem"])
        slope, error = slope_over_depth(own)
        look = {"color": LOOKS[place % len(LOOKS)], "marker": MARKERS[place % len(MARKERS)], "capsize": 3}
        label = f"{plain(name)}: depth^{round(slope, 2) + 0.0:+.2f} ± {error:.2f}"
        axes.errorbar(means.index, means["mean"], yerr=means["sem"], label=label, **look)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10)
    depths = sorted(set(frame.depth))
    axes.set_xticks(depths, [f"{depth:g}" for depth in depths])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set(xlabel="number of residual blocks", ylabel="distance from the linearisation")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside upper center", ncols=1, frameon=False, fontsize=9)
    return figure


def slope_over_depth(own: pd.DataFrame) -> tuple[float, float]:
    """(mean, standard error over the seeds) of the slope of log distance over log depth, of one table's rows with a finite
    distance."""
    known = own[np.isfinite(own.distance) & (own.distance > 0)]
    slopes = [np.polyfit(np.log2(rows.depth), np.log2(rows.distance), 1)[0] for _, rows in known.groupby("seed")]
    return float(np.mean(slopes)), float(np.std(slopes, ddof=1) / len(slopes) ** 0.5) if len(slopes) > 1 else float("nan")
