"""The law of exponents, and what muP asks for: both written once.

With fan_in growing like n^f, and a weight's multiplier, init std and LR like n^m, n^s and n^l (Tensor Programs V, arXiv
2203.03466, appendix J, to first order in the updates):

    init     m + s + f/2    at init the terms of the sum over fan_in are independent
    update   m + l + f      an Adam step moves every weight by the LR, in the direction of its input

muP asks that every update is constant, and every init too; an output weight's init may shrink.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import pandas as pd

from .config import Config
from .identity import declared
from .probe import Site, sites
from .roles import AT_BASE, numbers

TOLERANCE = 0.25  # of a slope: half of 1/2, which is the least that a wrong power of the width moves a slope by
NONE = "-"  # in a frame's texts; an empty text would come back from a CSV file as NaN
AXES = ("width", "granularity")  # the sizes for which exponents are predicted
KINDS = {  # of Tensor Programs V, Table 3: which axes grow with the width
    "input": "its fan_in is fixed, so no sum gets longer",
    "hidden": "it sums over a growing fan_in, into outputs that grow in number",
    "output": "it sums over a growing fan_in, into a fixed number of outputs",
    "fixed": "no axis grows with the width",
}
MUP_INIT = {"output": -0.5}  # the exponent of the init under muP, by kind; 0 for the other kinds


class Growth(NamedTuple):
    """The exponents of one site's output."""

    init: float
    update: float


def law(multiplier: float, std: float, lr: float, fan_in: float) -> Growth:
    """The exponents that follow from those of a weight's numbers and of its fan_in, for an input of constant size."""
    return Growth(multiplier + std + fan_in / 2, multiplier + lr + fan_in)


def wanted(kind: str, quantity: str) -> tuple[float, float]:
    """(least, largest) exponent in the size that muP allows for a quantity of a weight of this kind."""
    return (-math.inf if kind == "output" and quantity == "init" else 0.0), 0.0


def as_wanted(kind: str, growth: Growth) -> bool:
    """Whether both exponents are, exactly, what muP asks for."""
    return all(low <= getattr(growth, name) <= high for name in Growth._fields for low, high in [wanted(kind, name)])


def kind(shape: Sequence[int], base: Sequence[int], axes: Sequence[int]) -> str:
    """input, hidden, output or fixed: which of a tensor's axes differ between two widths, `axes` being its fan_in.

    Raises ValueError if the shapes do not decide it.
    """
    if len(shape) != len(base):
        raise ValueError(f"it has {len(shape)} axes at one width and {len(base)} at the other")
    ratios = {axis: size / base[axis] for axis, size in enumerate(shape) if size != base[axis]}
    others = [axis for axis in range(len(shape)) if axis not in axes]
    if len(others) > 1 and others[0] in ratios:
        raise ValueError(f"its axis {others[0]} grows: a stack of experts must not, or name its fan_in so that one axis is left")
    if min(ratios.values(), default=1) < 1 < max(ratios.values(), default=1):
        raise ValueError("one axis grows where another shrinks")
    out = [axis for axis in ratios if axis not in axes]
    if len(out) > 1:
        raise ValueError(
            f"its axes {' and '.join(map(str, out))} both grow: one is fan_out, but a stack of experts must not grow"
        )
    summed = any(axis in ratios for axis in axes)
    return {(True, True): "hidden", (True, False): "output", (False, True): "input", (False, False): "fixed"}[summed, bool(out)]


def kinds(config: Config) -> dict[str, str]:
    """name -> kind, for each of the model's parameters, from comparing their shapes with those at twice the width."""
    wider = declared(replace(config, width=2 * config.width))
    return {
        name: kind(param.shape, wider[name].shape, [axis % param.ndim for axis in param.role.fan_in_axes])
        for name, param in declared(config).items()
    }


def site_labels(config: Config) -> dict[tuple[int, str], dict]:
    """(layer, name) -> what later rooms need to know of a site: the role whose row of the table serves it, its kind, its
    source and degree, and its place in the forward pass."""
    kind_of, table = kinds(config), config.parametrization
    return {
        (site.layer, site.name): {
            "role": table.row(site.role) if site.role else NONE,
            "kind": kind_of[site.parameters[0]] if site.parameters else NONE,
            "source": site.source or NONE,
            "degree": site.degree,
            "place": place,
        }
        for place, site in enumerate(sites(config))
    }


def predicted_exponents(config: Config, axis: str = "width") -> dict[tuple[str, str], float]:
    """(site, quantity) -> the exponent of its RMS in the width, or in the granularity, from the config's table alone.

    Every weight follows the law of this module. Norms make every input O(1); where a site's input is another site's output,
    its exponents follow that one's (the values for attention's output projection, the up projections for the down
    projections). Nothing is predicted of a mixture where raw gates change with the width: muP's flatten slowly from a peaked
    softmax towards 1 / E.

    In the granularity G the active experts are K = top_k G, and the gates of a token sum to the same share, raw or
    renormalised (the largest K of E logits are the same quantile of them), so that each gate goes like 1 / G. Experts are
    independent at init, and their sum goes like G^(-1/2) times one expert's output. Their outer weights move together, in
    the direction of the same gradient: that sum goes like one expert's update. What the inner weights change passes through
    the initial outer weights, and goes like the output at init. Of the gates' part of the change only bounds are known, and
    nothing is predicted: if the K gates, each of size 1 / G, all moved the right way, it would go like one expert's output at
    init times the router's update; if they moved at random, like G^(-1/2) times that.

    Raises ValueError for another axis.
    """
    if axis not in AXES:
        raise ValueError(f"axis={axis!r}: must be one of {', '.join(AXES)}")
    found = _growths(config, axis)
    predicted = {}
    for site in _one_layer(config):
        growth, moves = found[site.name], _moves(found, site)
        if site.made_by == "mixture" and moves:
            continue
        predicted[site.name, "init"] = growth.init
        if site.parameters:
            predicted[site.name, "update"] = growth.update
        if site.made_by == "mixture":
            inner, outer = site.made_of
            from_inner = growth.init + found[inner].update - found[inner].init
            predicted |= {(site.name, f"from_{inner}"): from_inner, (site.name, f"from_{outer}"): found[outer].update}
            if axis == "granularity" and config.experts > 1:  # in the width, pulls also grow with what the experts have learned
                predicted |= {(site.name, f"pull_{part}"): predicted[site.name, f"from_{part}"] for part in site.made_of}
    return {key: _rounded(exponent) for key, exponent in predicted.items()}


def predictions(config: Config, axis: str = "width") -> pd.DataFrame:
    """The same as a frame: one row per site and of init and update, in the order of the forward pass, with columns tensor,
    quantity, predicted (NaN where nothing is) and what the site is."""
    found, about = predicted_exponents(config, axis), site_labels(config)
    rows = [
        {"tensor": site.name, "quantity": quantity, "predicted": found.get((site.name, quantity), math.nan)}
        | about[site.layer, site.name]
        for site in _one_layer(config)
        for quantity in Growth._fields
    ]
    return pd.DataFrame(rows)


def _growths(config: Config, axis: str) -> dict[str, Growth]:
    """site -> its exponents, unrounded, also where they are not what is measured (a mixture whose gates move)."""
    law_of, found = _laws(config, axis), {}
    independent = -0.5 if axis == "granularity" else 0.0  # of a sum of independent experts
    for site in _one_layer(config):
        parts = [found[name].init for name in site.made_of if name in found]
        if site.parameters:
            inherited = site.degree * found[site.source].init if site.source else 0.0
            laws = [law_of(name) for name in site.parameters]
            init, update = (max(exponents) + inherited for exponents in zip(*laws, strict=True))
        elif site.made_by == "product":
            init, update = sum(parts), math.nan
        elif site.made_by == "mixture":
            init, update = parts[-1] + independent, math.nan
        else:  # of a sum: the largest; a zero adds nothing
            init, update = max((exponent for exponent in parts if not math.isnan(exponent)), default=math.nan), math.nan
        found[site.name] = Growth(init, update)
    return found


def _one_layer(config: Config) -> list[Site]:
    """The sites of a model of one block: the law is the same for every layer."""
    return sites(replace(config, depth=1, base_depth=None))


def _moves(found: Mapping[str, Growth], mixture: Site) -> bool:
    """Whether the gates of a mixture flatten or sharpen with the size, far from any limit."""
    return bool(mixture.gate) and _rounded(found[mixture.gate].init) != 0


def _laws(config: Config, axis: str) -> Callable[[str], Growth]:
    """A function: parameter's name -> its own exponents, from its numbers at a size and at twice that."""
    if axis == "granularity":  # from 1: doubling the config's own might not divide the hidden size
        narrow, wide = replace(config, granularity=1), replace(config, granularity=2)
    else:
        narrow, wide = config, replace(config, width=2 * config.width)
    small, large = declared(narrow), declared(wide)

    def growth(name: str) -> Growth:
        before, after = (numbers(p[name], config.parametrization, AT_BASE) for p in (small, large))
        m, s, l = (_log_ratio(getattr(after, cell), getattr(before, cell)) for cell in ("multiplier", "std", "lr"))
        role = small[name].role
        return law(m, s, l, math.log2(role.fan_in(large[name].shape) / role.fan_in(small[name].shape)))

    return growth


def _rounded(exponent: float) -> float:
    return round(exponent, 9) + 0.0  # a root's rounding; and no -0


def _log_ratio(after: float, before: float) -> float:
    return math.log2(after / before) if after and before else math.nan
