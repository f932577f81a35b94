"""What a coordinate check says: exponents, verdicts, the cells to blame; and wrong tables to practise on.

Everything here is read off the check's frame, which says of each site its role, kind, source, degree and place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd

from .allocations import BOUND, closure
from .checks import require
from .coordinates import LOSS, size_axis
from .probe import OUTSIDE
from .theory import MUP_INIT, NONE, TOLERANCE, Growth, wanted

BROKEN = ("explodes", "shrinks")
ABOUT = ("role", "kind", "source", "degree", "mixture", "place")  # columns that say what a site is
QUANTITIES = (*Growth._fields, "fall", "propagated", "change")  # in the order of a table
JUDGED = Growth._fields  # the quantities of which muP asks something
NOISE = 3  # standard errors: a slope has few points, and a check some twenty tensors
STILL = 1e-5  # nats: a loss in single precision cannot say much about a smaller fall


def exponents(
    frame: pd.DataFrame, step: int | None = None, expected: Mapping[tuple[str, str], float] | None = None
) -> pd.DataFrame:
    """Measured and predicted exponents in the size: one row per parametrization, layer, tensor and quantity.

    frame: from `coordinate_check` or `check_module`. step: after which all but the inits are taken (default: the last).
    expected: predictions to compare with instead of those of each table itself, e.g. `predicted_exponents(Config("mup"))`,
    to ask whether a table does what another one promises.

    measured: slope of log2 of the value over log2 of the size by least squares, every seed a point; stderr: its standard
    error. (Allocations, of which some seeds' may be negative, are then averaged over the seeds first.)
    agrees: measured and predicted differ by at most TOLERANCE (missing where nothing is predicted, or all is zero): the
    theory describes the run. verdict, of inits, updates and allocations: does the tensor do as muP asks (see
    `theory.wanted`), whatever was predicted? "holds": it does, within TOLERANCE; "shrinks", "explodes" (a run that diverged,
    too); "unclear": it does not, but by less than NOISE standard errors (take more seeds, or sizes), or an allocation that
    shrinks no more between the two largest sizes (what fades beside something constant ends so: a gain's); "zero": the value
    is exactly zero, and there is no slope; "negative": a mean allocation is, and has no logarithm; "withheld": the
    allocations do not add up to the fall of the loss within BOUND, and `why` says what is in the way; else "unjudged".
    closure: of allocations, the sum over the fall at the size where that is farthest from 1. alignment: mean over sizes and
    seeds. What is said of the site itself (role, kind, source, degree, mixture, place) comes last.

    Where the depth grows, layers are compared as "first", "last" and "sum" (see `layers_compared`), and muP's question is
    put to the sum of the allocations. Where the number of experts grows, it is put to the allocations alone; where their size
    grows, to the weights alone. Where more experts are active, the init and the update of one expert's outer weight may well
    shrink in a layer that is as it should be: the question is put to the mixture's in their place.

    Raises ValueError for an empty frame, one size, two sizes that do not grow together, or a step that the frame does not
    have.
    """
    if frame.empty:
        raise ValueError("the frame has no rows")
    require("value" in frame, "columns", list(frame.columns), "a check's frame has `value`; earlier versions wrote others")
    axis = size_axis(frame)
    for _, rows in frame.groupby("parametrization"):
        size_axis(rows)
    steps = sorted(set(frame.step) - {0})
    step = steps[-1] if step is None and steps else step
    require(step in steps, "step", step, f"the frame has the steps {', '.join(map(str, steps))}")
    frame = frame[(frame.step == step) | (frame.quantity == "init")]
    if expected is not None:
        keys = zip(frame.tensor, frame.quantity, strict=True)
        frame = frame.assign(predicted=[expected.get(key, math.nan) for key in keys])
    tables = layers_compared(frame).groupby("parametrization", sort=False)
    rows = [{"parametrization": name} | row for name, own in tables for row in _Judgement(own, axis).rows()]
    table = pd.DataFrame(rows).astype({"agrees": "boolean"})
    names = table.parametrization.map(list(table.parametrization.unique()).index)
    order = pd.DataFrame({"name": names, "place": table.place, "quantity": table.quantity.map(QUANTITIES.index)})
    return table.loc[order.sort_values(list(order.columns), kind="stable").index].reset_index(drop=True)


class _Judgement:
    """The rows of one parametrization in a check's frame, after one step, their slopes, and what is to be said of them."""

    def __init__(self, rows: pd.DataFrame, axis: str):
        self.all, self.axis, self.deep = rows, axis, (rows.layer == "sum").any()
        self.more_active = {"top_k", "granularity"} <= set(rows) and (rows.top_k * rows.granularity).nunique() > 1
        self.groups = dict(list(rows.groupby(["layer", "tensor", "quantity"], sort=False)))
        self.slopes = {key: _slope(group[axis].to_numpy(), group.value.to_numpy(), key[2]) for key, group in self.groups.items()}
        self.closure, self.why = _closure(rows[rows.tensor == LOSS], axis)
        self.head, self.fades = self._head_start(), dict(self._fades())

    def rows(self) -> Iterator[dict]:
        """A row of `exponents` for each layer, tensor and quantity."""
        for key, group in self.groups.items():
            about = {name: group[name].iloc[-1] for name in ABOUT}
            (measured, stderr), predicted = self.slopes[key], group.predicted.iloc[0]
            verdict = self._verdict(key, group, about)
            unknown = math.isnan(predicted) or verdict in ("zero", "negative", "withheld")
            yield {
                **dict(zip(("layer", "tensor", "quantity"), key, strict=True)),
                "predicted": predicted,
                "measured": measured,
                "stderr": stderr,
                "agrees": pd.NA if unknown else bool(abs(measured - predicted) <= TOLERANCE),
                "verdict": verdict,
                "closure": self.closure if key[2] == "allocation" else math.nan,
                "why": self.why if verdict == "withheld" else NONE,
                "alignment": group.alignment.mean(),
                **about,
            }

    def _verdict(self, key: tuple, group: pd.DataFrame, about: dict) -> str:
        layer, _, quantity = key
        if (group.value == 0).any():
            return "zero"
        if not self._is_judged(layer, quantity, group):
            return "unjudged"
        if quantity == "allocation" and abs(self.closure - 1) > BOUND:
            return "withheld"
        low, high = wanted(about["kind"], quantity, self.head)
        if quantity == "allocation":
            low += self.fades.get((layer, about["mixture"]), 0.0)
        return _verdict(*self.slopes[key], group.set_index(self.axis).value, quantity, (low, high))

    def _is_judged(self, layer: int | str, quantity: str, group: pd.DataFrame) -> bool:
        """Whether muP asks something of this quantity of this site."""
        if self.deep and (quantity != "allocation" or layer not in ("sum", OUTSIDE)):
            return False
        if self.axis == "n_experts" and quantity != "allocation":
            return False
        if self.axis == "expert_ratio" and group.role.iloc[-1] == NONE:
            return False
        is_outer = group.source.iloc[-1] != NONE and group.mixture.iloc[-1] != NONE
        if self.more_active and is_outer and quantity != "allocation":
            return False
        return quantity in JUDGED and (group.role.iloc[-1] != NONE or not group.predicted.isna().all())

    def _head_start(self) -> float:
        """The exponent of the logits at init: of the last output weight's output; muP's own where there is none."""
        outputs = self.all[(self.all.kind == "output") & (self.all.layer == OUTSIDE) & (self.all.quantity == "init")]
        if outputs.empty:
            return MUP_INIT["output"]
        last = outputs.loc[outputs.place.idxmax()]
        measured, _ = self.slopes[last.layer, last.tensor, "init"]
        zero = (outputs[outputs.tensor == last.tensor].value == 0).any()
        return -math.inf if zero else MUP_INIT["output"] if math.isnan(measured) else measured

    def _fades(self) -> Iterator[tuple[tuple, float]]:
        """(layer, mixture) -> the exponent with which its gates fade, where they do and by no law: raw gates, as the router's
        init shrinks, fall from a peaked softmax towards 1 / E. What passes through them fades with them, and is not wrong."""
        inits = self.all[self.all.quantity == "init"]
        for (layer, mixture), parts in inits[inits.mixture != NONE].groupby(["layer", "mixture"], sort=False):
            key = layer, mixture, "init"
            if key in self.groups and self.groups[key].predicted.isna().all():
                outer = parts.loc[parts.place.idxmax()].tensor
                fade = self.slopes[key][0] - self.slopes[layer, outer, "init"][0]
                yield (layer, mixture), min(0.0, fade) if math.isfinite(fade) else 0.0


def layers_compared(frame: pd.DataFrame) -> pd.DataFrame:
    """A check's rows as they can be compared between sizes: as they are, unless the depth grows.

    Then the layers are "first", "last" and "sum", of all layers: plain for updates, propagated parts, changes and allocations,
    which may all move the output in one direction; for inits, which are independent, the root of the sum of squares. What is
    predicted of the sum grows accordingly. What is no weight's own has no sum, and only its last layer is predicted.
    """
    if "depth" not in frame or frame.depth.nunique() < 2:
        return frame
    axis = size_axis(frame)
    per_size = math.log(frame.depth.max() / frame.depth.min(), frame[axis].max() / frame[axis].min())
    inside = frame[frame.layer != OUTSIDE]
    squared = inside[inside.role != NONE]
    squared = squared.assign(value=squared.value.where(squared.quantity != "init", squared.value**2))
    labels = [name for name in frame.columns if name not in ("layer", "value", "alignment", "predicted", "place")]
    summed = squared.groupby(labels, sort=False, dropna=False).agg(
        {"value": lambda values: values.sum(skipna=False), "alignment": "mean", "predicted": "first", "place": "first"}
    )
    summed = summed.reset_index()
    init = summed.quantity == "init"
    summed["value"] = summed.value.where(~init, summed.value**0.5)
    summed["predicted"] += per_size * init.map({True: 0.5, False: 1.0})
    first = inside[inside.layer == 0]
    first = first.assign(layer="first", predicted=first.predicted.where(first.role != NONE))
    ends = first, inside[inside.layer == inside.depth - 1].assign(layer="last")
    first_places = inside[inside.layer == 0].groupby("tensor").place.first()
    parts = [part.assign(place=part.tensor.map(first_places)) for part in (*ends, summed.assign(layer="sum"))]
    return pd.concat([frame[frame.layer == OUTSIDE], *parts], ignore_index=True)[frame.columns]


def _closure(booked: pd.DataFrame, axis: str) -> tuple[float, str]:
    """(sum of the allocations over the fall where that is farthest from 1, what is in the way where it is too far).

    booked: the rows of LOSS; NaN where there are none. Infinite where a run diverged.
    """
    if booked.empty:
        return math.nan, NONE
    sums = booked.groupby([axis, "quantity"]).value.agg(lambda values: values.mean(skipna=False)).unstack()
    if not np.isfinite(sums).all(axis=None):
        return math.inf, "the run diverged: lower the LR"
    closures = [closure(row.allocation, row.fall) for row in sums.itertuples()]
    worst = max(closures, key=lambda value: math.inf if math.isnan(value) else abs(value - 1))
    if sums.fall.abs().min() < STILL:
        return worst if math.isfinite(worst) else math.inf, "the loss hardly moves: raise the LR, or lower Adam's eps"
    size = sums.index[closures.index(worst)]
    said = f"at {axis} {size} the allocations add up to {worst:.2f} of the loss's fall"
    return worst, f"{said}: the steps are too large (lower the LR), or tokens change their experts (freeze the routing)"


def _slope(sizes: np.ndarray, values: np.ndarray, quantity: str) -> tuple[float, float]:
    """(slope, standard error) of log2 of the values over log2 size; NaN for one size, or where a logarithm is not finite."""
    if quantity in ("allocation", "fall") and not (values > 0).all():
        values, sizes = (pd.Series(column).groupby(sizes).mean().to_numpy() for column in (values, sizes))
    if len(set(sizes)) < 2 or not (np.isfinite(values).all() and (values > 0).all()):
        return math.nan, math.nan
    x, y = np.log2(sizes), np.log2(values)
    slope, offset = np.polyfit(x, y, 1)
    freedom, spread = len(x) - 2, ((x - x.mean()) ** 2).sum()
    residuals = y - slope * x - offset
    return float(slope), math.sqrt((residuals**2).sum() / freedom / spread) if freedom else math.nan


def _verdict(slope: float, stderr: float, values: pd.Series, quantity: str, allowed: tuple[float, float]) -> str:
    """values: by size. allowed: (least, largest) slope."""
    low, high = allowed
    if not np.isfinite(values).all():
        return "explodes"
    if math.isnan(slope):  # a mean allocation that is not positive
        return "negative"
    if low - TOLERANCE <= slope <= high + TOLERANCE:
        return "holds"
    if low - NOISE * stderr <= slope <= high + NOISE * stderr:
        return "unclear"
    if quantity == "allocation":
        *_, before, last = values.groupby(level=0).mean().items()
        end = math.log(last[1] / before[1], last[0] / before[0])
        if slope < low - TOLERANCE <= end:
            return "unclear"
    return "explodes" if slope > high else "shrinks"


def exponents_text(table: pd.DataFrame) -> str:
    """One row per tensor, for a terminal."""
    rows = []
    for (layer, tensor), group in table.groupby(["layer", "tensor"], sort=False):
        row = {"layer": "" if layer == OUTSIDE else layer, "tensor": tensor}
        for quantity in QUANTITIES:
            for found in group[group.quantity == quantity].itertuples():
                predicted = "" if math.isnan(found.predicted) else f" ({found.predicted + 0.0:+.1f})"
                row[quantity] = found.verdict if math.isnan(found.measured) else f"{found.measured:+.2f}{predicted}"
        row["alignment"] = group.alignment.max()
        judged = group[group.quantity.isin(JUDGED) & ~group.verdict.isin(("holds", "unjudged"))]
        broken = [f"{found.quantity} {found.verdict}" for found in judged.itertuples()]
        row["verdict"] = ", ".join(broken) or ("" if tensor == LOSS else "holds")
        row["agrees"] = "" if group.agrees.isna().all() else "yes" if group.agrees.dropna().all() else "no"
        rows.append(row)
    known = [name for name in QUANTITIES if any(name in row for row in rows)]
    columns = ["layer", "tensor", *known, "alignment", "verdict", "agrees"]
    text = pd.DataFrame(rows)[columns].to_string(index=False, na_rep="", float_format="{:.2f}".format)
    closures = table[table.quantity == "allocation"].closure.dropna()
    if not closures.empty:
        text += f"\nthe allocations add up to {closures.iloc[0]:.3f} of the loss's fall where that is farthest from 1"
    return text
