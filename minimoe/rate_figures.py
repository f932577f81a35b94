"""Pictures of the LRs of single roles, over the schedule, and of what they gain: tables and rows in, a matplotlib Figure out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .checks import require, require_columns
from .figures import QUIET, plain, styles
from .optima_figures import look
from .parametrization import Parametrization
from .step import TrainOptions, lr_factor
from .tables import parametrization

LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))


def schedule_curves(
    tables: Sequence[str | Parametrization],
    roles: Sequence[str] = ("embedding", "unembedding", "router", "experts_up", "attention"),
    steps: int = 400,
    options: TrainOptions = TrainOptions(),  # noqa: B008 (frozen)
) -> Figure:
    """The LR of each role over the steps, in units of the base LR, at the base shape: a panel per table. An LR of 0 is not
    drawn. Raises ValueError for no table, KeyError for a role that a table lacks."""
    require(not isinstance(tables, str) and len(tables), "tables", tables, "must be one table or more, in a list")
    tables = [parametrization(table) for table in tables]
    figure = Figure(figsize=(4.1 * len(tables) + 1.4, 3.6), layout="constrained")
    for axes, table in zip(figure.subplots(1, len(tables), squeeze=False, sharey=True)[0], tables, strict=True):
        for place, role in enumerate(roles):
            peak, final = table[role].lr.coefficient, table[role].final_lr.coefficient
            lrs = [peak * lr_factor(step, steps, options, final) for step in range(steps)]
            line = {"color": look(place)["color"], "linestyle": LINES[place % len(LINES)], "linewidth": 1.8}
            axes.plot(range(1, steps + 1), lrs, label=plain(role.removesuffix("_up")), **line)
            axes.plot(steps, lrs[-1], **look(place), markersize=5, clip_on=False)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: str(Fraction(value))))
        axes.set_title(plain(table.name), fontsize=11)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
    figure.supylabel("LR over the base LR", fontsize=10)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False)
    return figure


def gain_chart(found: Mapping[str, pd.DataFrame], reference: str, labels: Mapping[str, str] | None = None) -> Figure:
    """By how many nats each arm's best loss lies below the reference's: a row per arm, a colour per entry of `found`; thick bars
    are one standard error over seeds, thin bars two. A point on the right is a lower loss.

    found: what the legend says -> a frame of `beside`. labels: parametrization -> what its row says. Raises ValueError for no
    frame, one without the reference, or no other arm.
    """
    require(found, "found", found, "must be name -> frame")
    for name, rows in found.items():
        require_columns(rows, f"found[{name!r}]", "parametrization", "gain", "gain_error")
        require((rows.parametrization == reference).any(), "reference", reference, f"{name!r} has no such row")
    arms = list(dict.fromkeys(name for rows in found.values() for name in rows.parametrization if name != reference))
    require(arms, "found", list(found), f"has no arm but {reference!r}")
    figure = Figure(figsize=(8.6, 1.2 + 0.5 * len(arms)), layout="constrained")
    axes, named = figure.subplots(), set()
    for place, (name, rows) in enumerate(found.items()):
        rows = rows.set_index("parametrization")
        colour = look(place)["color"]
        for height, arm in enumerate(arms):
            if arm not in rows.index:
                continue
            gain, error = rows.gain[arm], rows.gain_error[arm]
            y = height + 0.18 * (place - (len(found) - 1) / 2)
            for errors, width in ((1, 3.5), (2, 1.2)):
                axes.plot([gain - errors * error, gain + errors * error], [y, y], color=colour, linewidth=width)
            axes.plot(gain, y, **look(place), linestyle="none", markersize=7, label=None if name in named else name)
            named.add(name)
    axes.axvline(0, color=QUIET, linewidth=0.9)
    axes.set_yticks(range(len(arms)), [plain((labels or {}).get(arm, arm)) for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlabel(f"best loss of {plain((labels or {}).get(reference, reference))} less the arm's own, nats (right: better)")
    axes.grid(alpha=0.25, axis="x")
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


def factor_curves(rows: pd.DataFrame, panel: str, curve: str, loss: str = "val_loss") -> Figure:
    """Loss against a factor on one LR: a panel per value of `panel`, a curve per value of `curve` (widths have their colours).
    Mean over the seeds, bars of one standard error; a star at the lowest mean. A factor with a loss that is not finite is left
    out.

    rows: columns factor, seed, the loss, and those named by `panel` and `curve`, one row for each of their combinations. Raises
    ValueError for a missing column, no rows, or a factor that is not positive.
    """
    require_columns(rows, "rows", "factor", "seed", panel, curve, loss)
    require((rows.factor > 0).all(), "rows", float(rows.factor.min()), "a factor must be above 0")
    panels, curves = list(dict.fromkeys(rows[panel])), list(dict.fromkeys(rows[curve]))
    looks = styles(curves) if curve == "width" else {name: look(place) for place, name in enumerate(curves)}
    figure = Figure(figsize=(2.9 * len(panels) + 1.6, 3.4), layout="constrained")
    for axes, title in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
        for name in curves:
            own = rows[(rows[panel] == title) & (rows[curve] == name)].groupby("factor")[loss].agg(["mean", "sem"])
            own = own[np.isfinite(own["mean"])]
            if own.empty:
                continue
            errors, least = own["sem"].fillna(0), own["mean"].idxmin()
            line = {"markersize": 5, "capsize": 2, "linewidth": 1.5, "label": plain(str(name))}
            axes.errorbar(np.log2(own.index), own["mean"], yerr=errors, **looks[name], **line)
            star = {"color": looks[name]["color"], "markersize": 13, "markeredgecolor": "black", "zorder": 5}
            axes.plot(np.log2(least), own["mean"][least], "*", **star)
        ticks = sorted({round(float(tick)) for tick in np.log2(rows.factor)})
        axes.set_xticks(ticks, [str(Fraction(2.0**tick)) for tick in ticks])
        axes.set_title(plain(str(title)), fontsize=11)
        axes.grid(alpha=0.25)
    figure.supxlabel("factor on the LR", fontsize=10)
    figure.supylabel("validation loss, nats", fontsize=10)
    handles = {name: line for axes in figure.axes for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, title=plain(curve))
    return figure
