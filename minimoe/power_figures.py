"""Pictures of quantities that go like a power of a size: frames in, a matplotlib Figure out."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .checks import require
from .figures import MARKERS, plain
from .optima_figures import LOOKS


def power(own: pd.DataFrame, by: str, value: str) -> tuple[float, float]:
    """The exponent p of value ~ by^p, the slope of one logarithm over the other: (mean, standard error over the seeds). Rows
    whose value is not finite or not positive are left out; the error of one seed is NaN."""
    known = own[np.isfinite(own[value]) & (own[value] > 0)]
    slopes = [np.polyfit(np.log2(rows[by]), np.log2(rows[value]), 1)[0] for _, rows in known.groupby("seed")]
    return float(np.mean(slopes)), float(np.std(slopes, ddof=1) / len(slopes) ** 0.5) if len(slopes) > 1 else float("nan")


def power_curves(
    frame: pd.DataFrame, by: str, value: str, xlabel: str, ylabel: str, panel: str | None = None, base: int = 10
) -> Figure:
    """A quantity against a size, both axes logarithmic: a curve per table, mean over the seeds with bars of one standard error;
    the legends have the exponents.

    frame: columns parametrization, seed, `by`, `value`, and `panel` for a panel per value of that column; one row for each
    combination. base: of the logarithm on the axis of the quantity. Raises ValueError for a frame without rows.
    """
    require(len(frame) > 0, "frame", len(frame), "has no rows")
    titles = [None] if panel is None else list(dict.fromkeys(frame[panel]))
    figure = Figure(figsize=(7.2 if panel is None else 4.4 * len(titles), 4.0), layout="constrained")
    names, sizes = list(dict.fromkeys(frame.parametrization)), sorted(set(frame[by]))
    for axes, title in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles, strict=True):
        shown = frame if panel is None else frame[frame[panel] == title]
        for place, name in enumerate(names):
            own = shown[shown.parametrization == name]
            means, (exponent, error) = own.groupby(by)[value].agg(["mean", "sem"]), power(own, by, value)
            look = {"color": LOOKS[place % len(LOOKS)], "marker": MARKERS[place % len(MARKERS)], "capsize": 3}
            label = f"{plain(name)}: {by}^{round(exponent, 2) + 0.0:+.2f} ± {error:.2f}"
            axes.errorbar(means.index, means["mean"], yerr=means["sem"], label=label, **look)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=base)
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:.3g}"))
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(alpha=0.25)
        if panel is None:
            figure.legend(loc="outside upper center", ncols=1, frameon=False, fontsize=9)
        else:
            axes.set_title(plain(str(title)), fontsize=11)
            axes.legend(frameon=False, fontsize=8)
    return figure
