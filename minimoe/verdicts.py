"""What a coordinate check says: exponents, verdicts, the cells to blame; and wrong tables to practise on.

Everything here is read off the check's frame, which says of each site its role, kind, source, degree and place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from .config import Config, require
from .coordinates import size_axis
from .parametrization import FORWARD_CELLS, Parametrization, width
from .probe import OUTSIDE
from .tables import parametrization
from .theory import MUP_INIT, NONE, TOLERANCE, site_labels, wanted

BROKEN = ("explodes", "shrinks")
ABOUT = ("role", "kind", "source", "degree", "place")  # columns that say what a site is
QUANTITIES = ("init", "update", "from_", "pull_", "drift", "change")  # in the order of a table; beginnings of the parts' names


def is_judged(quantity: str) -> bool:
    """Whether muP asks something of this quantity: of init, update and the parts of a mixture's change."""
    return quantity not in ("drift", "change")


def exponents(
    frame: pd.DataFrame, step: int | None = None, expected: Mapping[tuple[str, str], float] | None = None
) -> pd.DataFrame:
    """Measured and predicted exponents in the size: one row per parametrization, layer, tensor and quantity.

    frame: from `coordinate_check`. step: after which the updates, drifts and changes are taken (default: the last).
    expected: predictions to compare with instead of those of each table itself, e.g. `predicted_exponents(Config("mup"))`,
    to ask whether a table does what another one promises.

    measured: slope of log2 RMS over log2 size by least squares, every seed a point; stderr: its standard error.
    agrees: measured and predicted differ by at most TOLERANCE (missing where nothing is predicted, or all is zero): the
    theory describes the run. verdict, of init and updates: does the tensor do as muP asks (see `theory.wanted`), whatever
    was predicted? "holds": it does, within TOLERANCE; "shrinks", "explodes" (a run that diverged, too); "zero": the RMS is
    exactly zero, and there is no slope; else "unjudged". alignment: mean over sizes and seeds. What is said of the site
    itself (role, kind, source, degree, place) comes last. (Over granularities, one expert's update or init may well shrink or
    explode in a layer that is as it should be: what counts is the mixture's.)

    Raises ValueError for an empty frame, one size, two sizes growing, or a step that the frame does not have.
    """
    if frame.empty:
        raise ValueError("the frame has no rows")
    axis = size_axis(frame)
    for _, rows in frame.groupby("parametrization"):
        size_axis(rows)
    steps = sorted(set(frame.step) - {0})
    step = steps[-1] if step is None and steps else step
    require(step in steps, "step", step, f"the frame has the steps {', '.join(map(str, steps))}")
    wanted_rows = frame[(frame.step == step) | (frame.quantity == "init")]
    rows = []
    for key, group in wanted_rows.groupby(["parametrization", "layer", "tensor", "quantity"], sort=False):
        labels = dict(zip(("parametrization", "layer", "tensor", "quantity"), key, strict=True))
        predicted = group.predicted.iloc[0] if expected is None else expected.get(key[2:], math.nan)
        measured, stderr = _slope(group[axis].to_numpy(), group.rms.to_numpy())
        about = {name: group[name].iloc[-1] for name in ABOUT}
        judged = is_judged(key[3]) and (about["role"] != NONE or not group.predicted.isna().all())
        verdict = _verdict(about["kind"], key[3], measured, group.rms, judged)
        unknown = math.isnan(predicted) or verdict == "zero"
        agrees = pd.NA if unknown else bool(abs(measured - predicted) <= TOLERANCE)
        measures = {"predicted": predicted, "measured": measured, "stderr": stderr, "agrees": agrees, "verdict": verdict}
        rows.append(labels | measures | {"alignment": group.alignment.mean()} | about)
    table = pd.DataFrame(rows).astype({"agrees": "boolean"})
    names = table.parametrization.map(list(table.parametrization.unique()).index)
    order = pd.DataFrame({"name": names, "place": table.place, "quantity": table.quantity.map(_place_of)})
    return table.loc[order.sort_values(list(order.columns), kind="stable").index].reset_index(drop=True)


def _place_of(quantity: str) -> int:
    return next(place for place, start in enumerate(QUANTITIES) if quantity.startswith(start))


def _slope(sizes: np.ndarray, rms: np.ndarray) -> tuple[float, float]:
    """(slope, standard error) of log2 RMS over log2 size; NaN for one size, or where an RMS is zero or not finite."""
    if len(set(sizes)) < 2 or not (np.isfinite(rms).all() and (rms > 0).all()):
        return math.nan, math.nan
    x, y = np.log2(sizes), np.log2(rms)
    slope, offset = np.polyfit(x, y, 1)
    freedom, spread = len(x) - 2, ((x - x.mean()) ** 2).sum()
    residuals = y - slope * x - offset
    return float(slope), math.sqrt((residuals**2).sum() / freedom / spread) if freedom else math.nan


def _verdict(kind: str, quantity: str, slope: float, rms: pd.Series, judged: bool) -> str:
    low, high = wanted(kind, quantity)
    if (rms == 0).any():
        return "zero"
    if not judged:
        return "unjudged"
    if not np.isfinite(rms).all() or slope > high + TOLERANCE:
        return "explodes"
    if math.isnan(slope):  # a layer that the smallest model does not have
        return "unjudged"
    return "shrinks" if slope < low - TOLERANCE else "holds"


def suspects(table: pd.DataFrame) -> pd.DataFrame:
    """The cells that an exponents table over widths condemns: columns parametrization, role, cell, power and because.

    A wrong multiplier moves init and update by the same power of the width, a wrong init_var (by half its power) init alone,
    a wrong lr update alone. What a site inherits from its source is taken off first, so that one wrong cell is named once.
    `power`: of the width, by which the cell is too large; the largest comes first, and what stands below it may be its
    consequence. Where several cells could be at fault the smallest repair is named. A run that diverged names none.
    """
    rows = []
    for name, group in table.groupby("parametrization", sort=False):
        measured = group.set_index(["layer", "tensor", "quantity"]).measured
        faults: dict[str, list] = {}
        for site in group[group.verdict.isin(BROKEN) & (group.role != NONE)].drop_duplicates(["layer", "tensor"]).itertuples():
            if fault := _fault(site, measured[site.layer]):
                faults.setdefault(site.role, []).append(fault)
        for role, found in faults.items():
            cell, power, because = max(found, key=lambda fault: abs(fault[1]))
            rows.append({"parametrization": name, "role": role, "cell": cell, "power": power, "because": because})
    rows.sort(key=lambda row: -abs(row["power"]))
    return pd.DataFrame(rows, columns=["parametrization", "role", "cell", "power", "because"])


def _fault(site, measured: pd.Series) -> tuple[str, float, str] | None:
    """(cell, power by which it is too large, why) for one weight's output; None where its own exponents are right."""
    inherited = site.degree * measured[site.source, "init"] if site.source != NONE else 0.0
    init, update = (measured[site.tensor, quantity] - inherited for quantity in ("init", "update"))
    because = f"{site.tensor}: init {init:+.2f}, update {update:+.2f}"
    because += f" (less {inherited:+.2f} from {site.source})" if site.source != NONE else ""
    if math.isnan(init) or math.isnan(update):  # diverged, or zero
        return None
    surplus = init - MUP_INIT.get(site.kind, 0.0)
    if abs(update) > TOLERANCE and abs(surplus - update) <= TOLERANCE:
        return "multiplier", update, because
    low, high = wanted(site.kind, "init")
    if low < 0 and init <= high + TOLERANCE:
        surplus = 0.0  # muP allows it to shrink
    if abs(surplus) > TOLERANCE and abs(update) <= TOLERANCE:
        return "init_var", 2 * surplus, because
    if abs(update) > TOLERANCE:
        return "lr" if abs(surplus) <= TOLERANCE else "init_var and lr", update, because
    return None


def diagnosis(table: pd.DataFrame) -> dict[str, str]:
    """parametrization -> what its exponents table says, in plain words, the cells to blame included."""
    blamed, said = suspects(table), {}
    for name, rows in table.groupby("parametrization", sort=False):
        broken = rows[rows.verdict.isin(BROKEN)]
        own = blamed[blamed.parametrization == name]
        if broken.empty:
            said[name] = "every init and every update keeps muP's desiderata."
        elif broken.measured.isna().any():
            said[name] = "the run diverged: lower the LR."
        elif own.empty:
            said[name] = f"no single cell explains {', '.join(dict.fromkeys(broken.tensor))}."
        else:
            cells = (f"{s.role}.{s.cell} is too large by width^{s.power:+.2f} ({s.because})" for s in own.itertuples())
            said[name] = "; ".join(cells) + "."
    return said


def exponents_text(table: pd.DataFrame) -> str:
    """One row per tensor, for a terminal."""
    rows = []
    for (layer, tensor), group in table.groupby(["layer", "tensor"], sort=False):
        row = {"layer": "" if layer == OUTSIDE else layer, "tensor": tensor}
        for quantity in ("init", "update", "drift", "change"):
            for found in group[group.quantity == quantity].itertuples():
                predicted = "" if math.isnan(found.predicted) else f" ({found.predicted + 0.0:+.1f})"
                row[quantity] = f"{found.measured:+.2f}{predicted}" if found.verdict != "zero" else "zero"
        row["alignment"] = group.alignment.max()
        judged = group[group.quantity.isin(("init", "update")) & ~group.verdict.isin(("holds", "unjudged"))]
        broken = [f"{found.quantity} {found.verdict}" for found in judged.itertuples()]
        row["verdict"] = ", ".join(broken) or "holds"
        row["agrees"] = "yes" if group.agrees.dropna().all() else "no"
        rows.append(row)
    return pd.DataFrame(rows).to_string(index=False, na_rep="", float_format="{:.2f}".format)


def parts_text(table: pd.DataFrame) -> str:
    """One row per layer, a column per part of the MoE's change, for a terminal."""
    parts = table[table.quantity.str.startswith(("from_", "pull_"))]
    words = [f"{part.measured:+.2f}" + ("" if math.isnan(part.predicted) else f" ({part.predicted + 0.0:+.1f})")
             for part in parts.itertuples()]  # fmt: skip
    wide = parts.assign(words=words).pivot(index="layer", columns="quantity", values="words")
    return wide[parts.quantity.unique()].to_string(na_rep="")


def mutants(table: str | Parametrization = "mup") -> Iterator[tuple[str, str, Parametrization]]:
    """(role, cell, a copy of the table in which that one cell is wrong), for each init_var, multiplier and lr of each role.

    A cell that moves with the shape becomes 1. A cell that is constant becomes 1 / width: the width and not the fan_in,
    because an embedding's fan_in is the vocabulary and never grows.
    """
    table = parametrization(table)
    for role in table.roles:
        for cell in (*FORWARD_CELLS, "lr"):
            yield role, cell, table.replace(role, **{cell: 1 if getattr(table[role], cell).powers else 1 / width})


def is_harmless(role: str, cell: str) -> bool:
    """Whether muP asks nothing of a cell of its table that is smaller than muP has it: the init of an output weight."""
    kinds = {label["role"]: label["kind"] for label in site_labels(Config()).values() if label["role"] != NONE}
    return cell == "init_var" and kinds[role] == "output"


def mystery(number: int) -> Parametrization:
    """muP with one wrong cell; which, is for the reader to find. The same number gives the same table, from 0 on."""
    condemned = [mutant for role, cell, mutant in mutants() if not is_harmless(role, cell)]
    order = torch.randperm(len(condemned), generator=torch.Generator().manual_seed(2203)).tolist()
    return replace(condemned[order[number % len(order)]], name=f"mystery {number}")
