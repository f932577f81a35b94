"""Pictures of quantities that go like a power of a size: frames in, a matplotlib Figure out."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .checks import require_columns
from .figures import plain
from .optima_figures import look


def power(own: pd.DataFrame, by: str, value: str) -> tuple[float, float]:
    """The exponent p of value ~ by^p, the slope of one logarithm over the other: (mean, standard error over the seeds). Rows
    whose value is not finite or not positive are left out, and then seeds with a single size. The error of one seed is NaN, and
    so are both without any seed."""
    known = own[np.isfinite(own[value]) & (own[value] > 0)]
    seeds = [rows for _, rows in known.groupby("seed") if rows[by].nunique() > 1]
    slopes = pd.Series([np.polyfit(np.log2(rows[by]), np.log2(rows[value]), 1)[0] for rows in seeds], dtype=float)
    return float(slopes.mean()), float(slopes.sem())


def power_curves(
    frame: pd.DataFrame, by: str, value: str, xlabel: str, ylabel: str, panel: str | None = None, base: int = 10
) -> Figure:
    """A quantity against a size, both axes logarithmic: a curve per table, mean over the seeds with bars of one standard error;
    the legends have the exponents.

    frame: columns parametrization, seed, `by`, `value`, and `panel` for a panel per value of that column; one row for each
    combination. base: of the logarithm on the axis of the quantity. Raises ValueError for a missing column, or no rows.
    """
    require_columns(frame, "frame", "parametrization", "seed", by, value, *([panel] if panel else []))
    titles = [None] if panel is None else list(dict.fromkeys(frame[panel]))
    figure = Figure(figsize=(7.2 if panel is None else 4.4 * len(titles), 4.0), layout="constrained")
    names, sizes = list(dict.fromkeys(frame.parametrization)), sorted(set(frame[by]))
    for axes, title in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles, strict=True):
        shown = frame if panel is None else frame[frame[panel] == title]
        for place, name in enumerate(names):
            own = shown[shown.parametrization == name]
            if own.empty:
                continue
            means, (exponent, error) = own.groupby(by)[value].agg(["mean", "sem"]), power(own, by, value)
            label = f"{plain(name)}: {by}^{round(exponent, 2) + 0.0:+.2f} ± {error:.2f}"
            axes.errorbar(means.index, means["mean"], yerr=means["sem"], label=label, capsize=3, **look(place))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=base)
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: _power_of(base, number)))
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(alpha=0.25)
        if panel is None:
            figure.legend(loc="outside upper center", ncols=1, frameon=False, fontsize=9)
        else:
            axes.set_title(plain(str(title)), fontsize=11)
            axes.legend(frameon=False, fontsize=8)
    return figure


def _power_of(base: int, number: float) -> str:
    """How an axis writes a power of its base: 0.01, and for base 2 $2^{-5}$."""
    return f"{number:.3g}" if base == 10 else f"${base}^{{{round(np.log(number) / np.log(base))}}}$"
