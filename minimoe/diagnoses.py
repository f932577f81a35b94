"""Which cells an exponents table condemns, and what it says in plain words."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd

from .probe import OUTSIDE
from .theory import MUP_INIT, NONE, TOLERANCE, wanted
from .verdicts import BROKEN, NOISE


def suspects(table: pd.DataFrame) -> pd.DataFrame:
    """The cells that an exponents table condemns: columns parametrization, role, cell, power and because.

    A wrong multiplier moves init and update by the same power of the size, a wrong init_var (by half its power) init alone,
    a wrong lr update alone. What a site inherits from its source is taken off first, so that one wrong cell is named once.
    A head that starts too large, its std above 1 / n, is seen in the other weights' allocations: they grow, with their
    updates as they should be. So are the experts' outer weights, where the size of the experts grows. A mixture that is wrong
    blames the experts' outer weights. Where a tensor has no update of its own in the table, its allocation stands in for it,
    less what the head explains. Over the depth, an allocation that grows blames its LR.

    `power`: of the size, by which the cell is too large. The largest comes first (to half a power; of equal ones the first in
    the forward pass), and what stands below it may be its consequence. What is known by its allocation alone (a gain, a bias)
    comes after the weights whose own outputs are wrong: the allocation follows them too. Where several cells could be at fault
    the smallest repair is named. A run that diverged names none.
    """
    rows, seen = [], table[table.quantity == "update"].groupby("parametrization").role.agg(set)
    for name, group in table.groupby("parametrization", sort=False):
        faults: dict[str, list] = {}
        for role, *fault in _faults(group):
            faults.setdefault(role, []).append(fault)
        for role, found in faults.items():
            cell, power, because = found[0]  # of the first in the forward pass: what follows may be its consequence
            rows.append({"parametrization": name, "role": role, "cell": cell, "power": power, "because": because})

    def order(row: dict) -> tuple[bool, int]:
        known = row["role"] in seen.get(row["parametrization"], ())
        return not known, -round(2 * abs(row["power"]))  # wrong by the same root of the size: first in the forward pass first

    rows.sort(key=order)
    return pd.DataFrame(rows, columns=["parametrization", "role", "cell", "power", "because"])


def _faults(group: pd.DataFrame) -> Iterator[tuple[str, str, float, str]]:
    """(role, cell, power by which it is too large, why) for every weight of one parametrization whose own exponents are off,
    in the order of the forward pass."""
    group = _with_mixtures(group)
    broken = group[group.verdict.isin(BROKEN) & (group.role != NONE)]
    broken = broken.drop_duplicates(["layer", "tensor"], keep="last")  # that of the allocation, if it is one of them
    if not np.isfinite(broken.measured).all():
        return  # diverged
    if (group.layer == "sum").any():
        for row in broken.sort_values("measured", key=abs, ascending=False).itertuples():
            summed = "" if row.layer == OUTSIDE else ", summed over the layers"
            yield row.role, "lr", row.measured, f"{row.tensor}: allocation {row.measured:+.2f}{summed}"
        return
    measured = group.set_index(["layer", "tensor", "quantity"]).measured
    head, surplus = _head_surplus(group, measured)
    for site in broken.itertuples():
        if found := _fault(site, measured[site.layer], surplus, site.tensor == head):
            yield site.role, *found
    yield from _surplus_inside(group, measured)
    if head and surplus and not ((broken.layer == OUTSIDE) & (broken.tensor == head)).any():
        felt = group[(group.quantity == "allocation") & (group.verdict == "explodes")].tensor.unique()
        because = f"{head}: init {surplus + MUP_INIT['output']:+.2f}; the gradients that pass through it make the allocations "
        role = group[(group.tensor == head) & (group.layer == OUTSIDE)].role.iloc[0]
        yield role, "init_var", 2 * surplus, because + f"of {', '.join(felt)} grow"


def _with_mixtures(group: pd.DataFrame) -> pd.DataFrame:
    """The rows, where a mixture has the role of its outer weight, whose cells make the mixture's init and update."""
    outer = group[(group.mixture != NONE) & (group.source != NONE)].drop_duplicates("mixture").set_index("mixture").role
    updates = group[(group.quantity == "update") & group.tensor.isin(outer.index)].tensor.unique()
    return group.assign(role=group.role.where(~group.tensor.isin(updates), group.tensor.map(outer)))


def _surplus_inside(group: pd.DataFrame, measured: pd.Series) -> Iterator[tuple[str, str, float, str]]:
    """The faults of output weights inside the blocks that start above muP's power, where the weight before each feels it: the
    experts' outer weights, as their size grows."""
    grows = group[(group.quantity == "allocation") & (group.verdict == "explodes")].set_index(["layer", "tensor"]).index
    outer = group[(group.quantity == "init") & (group.kind == "output") & (group.source != NONE) & (group.layer != OUTSIDE)]
    for site in outer.itertuples():
        surplus = measured[site.layer, site.tensor, "init"] - MUP_INIT["output"]
        if surplus > TOLERANCE and (site.layer, site.source) in grows:
            init = f"{site.tensor}: init {measured[site.layer, site.tensor, 'init']:+.2f}"
            because = f"{init}; the gradients that pass through it make the allocation of {site.source} grow"
            yield site.role, "init_var", 2 * surplus, because


def _head_surplus(group: pd.DataFrame, measured: pd.Series) -> tuple[str, float]:
    """(the last output weight, the power by which its init is above muP's, where the other weights' allocations feel it: most
    of them, because all gradients pass through it)."""
    outputs = group[(group.kind == "output") & (group.layer == OUTSIDE) & (group.quantity == "init")]
    if outputs.empty:
        return "", 0.0
    head = outputs.loc[outputs.place.idxmax()].tensor
    others = group[(group.quantity == "allocation") & group.verdict.isin((*BROKEN, "holds")) & (group.tensor != head)]
    felt = (others.verdict == "explodes").mean() > 0.5
    surplus = measured[OUTSIDE, head, "init"] - MUP_INIT["output"]
    return head, surplus if surplus > TOLERANCE and felt else 0.0


def _fault(site, measured: pd.Series, surplus: float, is_head: bool) -> tuple[str, float, str] | None:
    """(cell, power by which it is too large, why) for one weight's output; None where its own exponents are right.

    surplus: of the head's init, which the weights before it feel.
    """
    if (site.tensor, "update") not in measured:
        at_start = -0.5 if site.kind == "output" else 0.0  # a router's allocation under muP
        allocated = measured[site.tensor, "allocation"] - surplus - at_start
        because = f"{site.tensor}: allocation {measured[site.tensor, 'allocation']:+.2f}"
        because += f" (less {surplus:+.2f} from the head)" if surplus else ""
        noise = 0.0 if math.isnan(site.stderr) else NOISE * site.stderr
        return ("lr", allocated, because) if abs(allocated) > max(TOLERANCE, noise) else None
    inherited = site.degree * measured[site.source, "init"] if site.source != NONE else 0.0
    init, update = (measured[site.tensor, quantity] - inherited for quantity in ("init", "update"))
    because = f"{site.tensor}: init {init:+.2f}, update {update:+.2f}"
    because += f" (less {inherited:+.2f} from {site.source})" if site.source != NONE else ""
    if math.isnan(init) or math.isnan(update):  # zero
        return None
    excess = init - MUP_INIT.get(site.kind, 0.0)
    if abs(update) > TOLERANCE and abs(excess - update) <= TOLERANCE:
        return "multiplier", update, because
    low, high = wanted(site.kind, "init")
    if low < 0 and init <= high + TOLERANCE and not (is_head and surplus):
        excess = 0.0  # muP allows it to shrink
    if abs(excess) > TOLERANCE and abs(update) <= TOLERANCE:
        return "init_var", 2 * excess, because
    if abs(update) > TOLERANCE:
        return "lr" if abs(excess) <= TOLERANCE else "init_var and lr", update, because
    return None


def diagnosis(table: pd.DataFrame, axis: str = "width") -> dict[str, str]:
    """parametrization -> what its exponents table in this size says, in plain words, the cells to blame included."""
    blamed, said = suspects(table), {}
    for name, rows in table.groupby("parametrization", sort=False):
        broken = rows[rows.verdict.isin(BROKEN)]
        own = blamed[blamed.parametrization == name]
        withheld = rows.loc[rows.verdict == "withheld", "why"].unique()
        if broken.empty and len(withheld):
            said[name] = "every init and every update keeps muP's desiderata."
        elif broken.empty:
            said[name] = "every init, update and allocation keeps muP's desiderata."
        elif broken.measured.isna().any():
            said[name] = "the run diverged: lower the LR."
        elif own.empty:
            said[name] = f"no single cell explains {', '.join(dict.fromkeys(broken.tensor))}."
        else:
            cells = (f"{s.role}.{s.cell} is too large by {axis}^{s.power:+.2f} ({s.because})" for s in own.itertuples())
            said[name] = "; ".join(cells) + "."
        if len(withheld) and not broken.measured.isna().any():
            said[name] += f" The allocations are not judged: {withheld[0]}."
    return said
