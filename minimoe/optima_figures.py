"""Pictures of where the best LR lies, and how it moves with a size: reports in, a matplotlib Figure out."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .checks import require
from .figures import ALERT, MARKERS, QUIET, plain

LOOKS = ("#1b4f8a", "#a8480e", "#00735c", "#7a2d7a", "#555555")  # each at a contrast of 4.5 or more with white
LAW_STYLES = ("--", ":", "-.")


def look(place: int) -> dict[str, str]:
    """Colour and marker of the curve at this place."""
    return {"color": LOOKS[place % len(LOOKS)], "marker": MARKERS[place % len(MARKERS)]}


def optima_curves(
    report: pd.DataFrame,
    by: str,
    laws: dict[str, float] | None = None,
    labels: dict[str, str] | None = None,
    laws_from: str | None = None,
) -> Figure:
    """The best LR against the size, both on axes of octaves: a curve per parametrization, bars of one standard error over seeds.

    report: from `transfer_report`. laws: name -> octaves of the LR per doubling of `by`, each a line through the mean of the
    curves at the smallest size, or through the curve of the parametrization `laws_from` there. labels: parametrization -> what
    the legend says in its place. Raises ValueError for an empty report, one without any optimum, or one without `laws_from`.
    """
    found = report[report.octave.notna()]
    if found.empty:
        raise ValueError("the report has no optimum to show")
    figure = Figure(figsize=(8.6, 4.2), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(found.parametrization))
    for place, name in enumerate(names):
        own = found[found.parametrization == name]
        x = np.log2(own[by]) + 0.05 * (place - (len(names) - 1) / 2)  # side by side, so that no bar hides another
        axes.errorbar(
            x,
            own.octave,
            yerr=own.octave_error.fillna(0),
            label=plain((labels or {}).get(name, name)),
            linewidth=1.6,
            capsize=3,
            **look(place),
        )
    sizes = sorted(set(found[by]))
    starts = found[found[by] == sizes[0]]
    if laws_from is not None:
        starts = starts[starts.parametrization == laws_from]
        require(len(starts), "laws_from", laws_from, f"has no optimum at {by} {sizes[0]:g}")
    start = starts.octave.mean()
    for (law, slope), style in zip((laws or {}).items(), LAW_STYLES, strict=False):
        ends = np.log2([sizes[0], sizes[-1]])
        colour = ALERT if slope else QUIET
        axes.plot(
            ends,
            start + slope * (ends - ends[0]),
            style,
            color=colour,
            linewidth=1.4,
            label=plain(f"{law}: {slope:+g} per doubling" if slope else law),
        )
    axes.set_xticks(np.log2(sizes), [f"{size:g}" for size in sizes])
    axes.set(xlabel=by.replace("_", " "), ylabel="best LR (log2), mean and standard error")
    low, high = axes.get_ylim()
    axes.set_ylim(math.floor(2 * low) / 2, math.ceil(2 * high) / 2)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure
