"""The law of exponents, and what muP asks for: both written once.

With fan_in growing like n^f, and a weight's multiplier, init std and LR like n^m, n^s and n^l (Tensor Programs V, arXiv
2203.03466, appendix J, to first order in the updates):

    init        m + s + f/2      at init the terms of the sum over fan_in are independent
    update      m + l + f        an Adam step moves every weight by the LR, in the direction of its input
    allocation  update + c + b   the loss that this step takes away: c outputs grow like n^c, the loss's gradient at each n^b

muP asks that every update and every allocation is constant, and every init too; an output weight's init may shrink, and a
router's allocation with it.

The gradient comes from behind. At the residual stream it goes like the unembedding's multiplier times std, n^e: that sum over
the vocabulary does not get longer. From one output to that of the weight before, it passes through the transpose of the
initial weight, and takes n^(m + s + c/2). What sets the shares of a sum (a router, attention's scores) gets one number for
each share, the gradient times what is shared, summed over D coordinates: D^(1/2) at init, where these are independent; D once
what is shared has learned along the gradient. So a router's allocation follows one of two laws:

    at init      n^(b + 1/2) behind its logits      muP's router: l + m + 1 + e + 1/2 = -1/2
    learned      n^(b + 1)                          muP's router: l + m + 1 + e + 1   =  0

`learned=True` asks for the second. A check of a few small steps sees the first.

Reading an allocation as a coordinate check, with exponents from the table, is this project's own, as far as we know; the
allocation itself is *Loss Change Allocation* (arXiv 1909.01440).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import pandas as pd

from .checks import require
from .config import BASED, SMALLEST_IS_BASE, Config
from .identity import declared
from .probe import OUTSIDE, Site, sites
from .roles import AT_BASE, numbers

TOLERANCE = 0.25  # of a slope: half of 1/2, which is the least that a wrong power of the width moves a slope by
NONE = "-"  # in a frame's texts; an empty text would come back from a CSV file as NaN
UNKNOWN = "unknown"  # the kind of a weight of which nobody has said it
AXES = ("width", "depth", "granularity", "expert_ratio", "n_experts")  # for which exponents are predicted, alone or together
LOSS_WEIGHTS = ("balance_weight", "z_weight")  # they turn a gradient, and Adam takes steps of one size in any direction
KINDS = {  # of Tensor Programs V, Table 3: which axes grow with the width
    "input": "its fan_in is fixed, so no sum gets longer",
    "hidden": "it sums over a growing fan_in, into outputs that grow in number",
    "output": "it sums over a growing fan_in, into a fixed number of outputs",
    "fixed": "no axis grows with the width",
}
MUP_INIT = {"output": -0.5}  # the exponent of the init under muP, by kind; 0 for the other kinds
LEAST = {  # that muP allows; 0 where nothing stands here
    ("output", "init"): -math.inf,  # it may start at 0
    ("output", "allocation"): -math.inf,  # a router's gradient is small and scattered at init; its update says whether it moves
    ("fixed", "allocation"): -math.inf,  # its step moves it as far at every size; what that brings is the gradient's affair
    (UNKNOWN, "init"): -math.inf,  # it may be an output weight
    (UNKNOWN, "allocation"): -0.5,  # it may be a router
}


class Growth(NamedTuple):
    """The exponents of one site: of its output at init, of its update, and of its weights' allocation."""

    init: float
    update: float
    allocation: float = math.nan


def law(multiplier: float, std: float, lr: float, fan_in: float, outputs: float = 0.0, signal: float = math.nan) -> Growth:
    """The exponents that follow from those of a weight's numbers and sizes, for an input of constant size.

    outputs: of the number of its entries over its fan_in. signal: of the loss's gradient at each of its outputs.
    """
    update = multiplier + lr + fan_in
    return Growth(multiplier + std + fan_in / 2, update, update + outputs + signal)


def wanted(kind: str, quantity: str, head: float = MUP_INIT["output"]) -> tuple[float, float]:
    """(least, largest) exponent in the size that muP allows for a quantity of a weight of this kind.

    head: the exponent of the logits at init. What a head does that starts smaller than muP's is late, and not wrong: the
    weights before it get as much smaller gradients, until the head has learned (a head may even start at zero).
    """
    late = min(0.0, head - MUP_INIT["output"]) if quantity == "allocation" else 0.0
    return LEAST.get((kind, quantity), 0.0) + late, 0.0


def as_wanted(kind: str, growth: Growth, head: float = MUP_INIT["output"]) -> bool:
    """Whether the exponents are, exactly, what muP asks for; one that is not known counts as such."""
    known = {name: power for name, power in growth._asdict().items() if not math.isnan(power)}
    return all(low <= known[name] <= high for name in known for low, high in [wanted(kind, name, head)])


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


def kinds(config: Config, axis: str = "width") -> dict[str, str]:
    """name -> kind, for each of the model's parameters, from comparing their shapes with those at twice the width, or at twice
    the size of the experts (`expert_ratio`). No other axis makes a sum longer."""
    axis = axis if axis == "expert_ratio" else "width"
    wider = declared(replace(config, **{axis: 2 * getattr(config, axis)}))
    return {
        name: kind(param.shape, wider[name].shape, [axis % param.ndim for axis in param.role.fan_in_axes])
        for name, param in declared(config).items()
    }


def site_labels(config: Config, axis: str = "width") -> dict[tuple[int, str], dict]:
    """(layer, name) -> what later rooms need to know of a site: the role whose row of the table serves it, its kind where this
    axis grows, its source and degree, the mixture that it is a part of, and its place in the forward pass."""
    kind_of, table = kinds(config, axis), config.parametrization
    mixtures = {(site.layer, part): site.name for site in sites(config) if site.made_by == "mixture" for part in site.made_of}
    return {
        (site.layer, site.name): {
            "role": table.row(site.role) if site.role else NONE,
            "kind": kind_of[site.parameters[0]] if site.parameters else NONE,
            "source": site.source or NONE,
            "degree": site.degree,
            "mixture": mixtures.get((site.layer, site.name), NONE),
            "place": place,
        }
        for place, site in enumerate(sites(config))
    }


def predicted_exponents(config: Config, axis: str = "width", learned: bool = False) -> dict[tuple[str, str], float]:
    """(site, quantity) -> the exponent of its RMS, or of its weights' allocation, in one of AXES, from the config's table
    alone: each size is compared with twice that size (granularity: 1 with 2).

    Every weight follows the law of this module. Norms make every input O(1); where a site's input is another site's output,
    its exponents follow that one's (the values for attention's output projection, the up projections for the down
    projections). Nothing is predicted of a mixture where raw gates change with the size: muP's flatten slowly from a peaked
    softmax towards 1 / E. learned: see this module.

    Over the depth an exponent is that of each layer's own number. The sum over L layers has one more for updates and
    allocations, which all move the loss in one direction, and half of one for inits, which are independent. Of allocations
    nothing is predicted where the layers make the residual stream grow: there the first layers' gradients differ from the
    last layers', and what the embedding contributes fades slowly, by no power.

    In the granularity G the active experts are K = top_k G, and the gates of a token sum to the same share, raw or
    renormalised (the largest K of E logits are the same quantile of them), so that each gate goes like 1 / G. Experts are
    independent at init, and their sum goes like G^(-1/2) times one expert's output. Each outer weight's gradient carries its
    gate, and there are as many outer weights as before: their allocation goes like one expert's update. That of the inner
    weights passes through the initial outer weights, and goes like the output at init. Of the router's nothing is
    predicted: only bounds are known of how its shares move together.

    In the number of experts (`n_experts`) the active ones grow with it, so that each expert serves the same share of the
    tokens. The same is then true as for the granularity, but each expert keeps its size. A sigmoid gate does not shrink with
    the number of gates: there a table must divide the sum itself (`dmft`, its row `routed`).

    Raises ValueError for another axis. Number of experts alone or of active ones alone, batch size: which tokens an expert
    gets, and how large its gate is, follows no power there.
    """
    require(axis in AXES, "axis", axis, f"must be one of {', '.join(AXES)}")
    bases = {f"base_{name}": config.base_size(name) for name in SMALLEST_IS_BASE}
    sizes = (1, 2) if axis == "granularity" else (getattr(config, axis), 2 * getattr(config, axis))
    active = [config.top_k * size // sizes[0] if axis == "n_experts" else config.top_k for size in sizes]
    small, large = (replace(config, **bases | {"top_k": k, axis: size}) for k, size in zip(active, sizes, strict=True))
    return exponents_between(small, large, axis, learned)


def exponents_between(small: Config, large: Config, axis: str, learned: bool = False) -> dict[tuple[str, str], float]:
    """The same between two configs, in which `axis`, and perhaps others of AXES with it, have grown by powers of one ratio:
    that of `axis`. Empty where a size has grown of which there is no theory, or their tables differ."""
    more_shared = small.n_shared and small.granularity != large.granularity
    one_is_dense = (small.experts == 1) != (large.experts == 1)
    if small.top_k * large.n_experts != large.top_k * small.n_experts or more_shared or one_is_dense:
        return {}
    free = (*AXES, "top_k", *(f"base_{name}" for name in BASED), *LOSS_WEIGHTS, "seed")
    neutral = {name: getattr(small, name) for name in free}
    if replace(large, **neutral) != small:
        return {}
    return {key: _rounded(exponent) for key, exponent in _Growths(small, large, axis, learned).predicted()}


def predictions(config: Config, axis: str = "width") -> pd.DataFrame:
    """The same as `predicted_exponents` as a frame: one row per site and of init, update and allocation, in the order of the
    forward pass, with columns tensor, quantity, predicted (NaN where nothing is) and what the site is."""
    found, about = predicted_exponents(config, axis), site_labels(config, axis)
    rows = [
        {"tensor": site.name, "quantity": quantity, "predicted": found.get((site.name, quantity), math.nan)}
        | about[site.layer, site.name]
        for site in _one_layer(config)
        for quantity in Growth._fields
    ]
    return pd.DataFrame(rows)


class _Weight(NamedTuple):
    """The exponents of one parameter's numbers and sizes."""

    multiplier: float
    std: float
    lr: float
    fan_in: float
    outputs: float  # of its entries over its fan_in
    fan_out: float  # of one matrix


class _Growths:
    """The exponents of every site between two configs."""

    def __init__(self, small: Config, large: Config, axis: str, learned: bool):
        self.ratio, self.learned = getattr(large, axis) / getattr(small, axis), learned
        self.sites = _one_layer(small)
        self.depth, self.active = (self._log(getattr(large, n), getattr(small, n)) for n in ("depth", "active_experts"))
        self.gate = 0.0 if small.gates == "sigmoid" else -self.active  # of an active expert: the others' sum is a constant share
        self.terms = self.active if small.same_start else self.active / 2  # of the routed sum at init: equal, or independent
        self.mixed = {a.name: self._log(b.mixed, a.mixed) for a, b in zip(self.sites, _one_layer(large), strict=True)}
        self.weights = dict(self._weights(small, large))
        self.found: dict[str, Growth] = {}
        for site in self.sites:
            self.found[site.name] = self._forward(site)
        self.signals = self._backward()

    def predicted(self) -> Iterator[tuple[tuple[str, str], float]]:
        for site in self.sites:
            growth = self.found[site.name]
            if site.made_by == "mixture" and site.gate and _rounded(self.found[site.gate].init) != 0:
                continue  # its gates flatten or sharpen with the size, far from any limit
            if not math.isnan(growth.init):
                yield (site.name, "init"), growth.init
            if site.parameters or site.made_by == "mixture":
                yield (site.name, "update"), growth.update
            if site.parameters:
                allocations = [self._law(site, name, self.signals[site.name]).allocation for name in site.parameters]
                if not math.isnan(allocation := max(allocations)):
                    yield (site.name, "allocation"), allocation

    def _forward(self, site: Site) -> Growth:
        parts = [(name, self.found[name].init) for name in site.made_of if name in self.found]
        if site.parameters:
            laws = [self._law(site, name) for name in site.parameters]
            return Growth(max(law.init for law in laws), max(law.update for law in laws))
        if site.made_by == "product":
            return Growth(sum(init for _, init in parts), math.nan)
        if site.made_by == "mixture":  # K outputs, each with its gate
            return Growth(parts[-1][1] + self.gate + self.terms, self.found[site.made_of[-1]].update + self.gate + self.active)
        layers = {other.name: 0.0 if other.layer == OUTSIDE else self.depth / 2 for other in self.sites}  # independent ones
        return Growth(max((init + layers[name] for name, init in parts if not math.isnan(init)), default=math.nan), math.nan)

    def _law(self, site: Site, name: str, signal: float = math.nan) -> Growth:
        """A parameter's own law, and what its input inherits from its source."""
        weight = self.weights[name]
        inherited = site.degree * self.found[site.source].init if site.source else 0.0
        own = law(weight.multiplier, weight.std, weight.lr, weight.fan_in, weight.outputs, signal)
        return Growth(*(power + inherited for power in own))

    def _backward(self) -> dict[str, float]:
        """site -> the exponent of the loss's gradient at each of its outputs; NaN where nothing is predicted of it."""
        *body, head = self.sites
        behind = max(self._through(name) - self.weights[name].fan_out / 2 for name in head.parameters)  # few tokens: no sum
        signals = dict.fromkeys((site.name for site in body), math.nan) | {head.name: 0.0}
        for site in reversed(body):
            if site.made_by == "sum":
                size = self.found[site.name].init  # the norm behind the stream divides by it
                steady = _rounded(self.found[site.made_of[0]].init - size) == 0  # else layers and stream are not yet of one size
                stream = behind - size if steady else math.nan
                signals |= dict.fromkeys((site.name, *site.made_of), stream)
            elif site.made_by == "mixture":
                signals[site.made_of[-1]] = signals[site.name] + self.gate
            elif site.made_by == "product":
                signals[site.name] = self._of_shares(site, signals)
                for name, other in (site.made_of, reversed(site.made_of)):
                    signals[name] = signals[site.name] + self.found[other].init
            elif site.mixes:
                signals[site.name] = math.nan if self.active else self._of_shares(site, signals)
            if site.source:
                passed = max(self._through(name) for name in site.parameters)
                slope = (site.degree - 1) * self.found[site.source].init  # of a product of two in its other factor
                signals[site.source] = signals[site.name] + passed + slope
        return signals

    def _through(self, name: str) -> float:
        """What the gradient takes on its way through an initial weight, from its outputs to its inputs."""
        weight = self.weights[name]
        return weight.multiplier + weight.std + weight.fan_out / 2

    def _of_shares(self, site: Site, signals: Mapping[str, float]) -> float:
        """At what sets the shares of a sum; NaN where these go to 0 and 1 as the size grows, and stop learning."""
        if _rounded(self.found[site.name].init) > 0:
            return math.nan
        shared, terms = self.found[site.mixes], self.mixed[site.name]
        independent, aligned = shared.init + terms / 2, shared.update + terms
        return signals[site.mixes] + (max(independent, aligned) if self.learned else independent)

    def _weights(self, small: Config, large: Config) -> Iterator[tuple[str, _Weight]]:
        before, after = declared(small), declared(large)
        for site in self.sites:
            for name in site.parameters:
                narrow, wide = (numbers(p[name], small.parametrization, AT_BASE) for p in (before, after))
                role, shapes = before[name].role, [tuple(p[name].shape) for p in (after, before)]
                powers = [self._log(getattr(wide, cell), getattr(narrow, cell)) for cell in ("multiplier", "std", "lr")]
                fan_in = self._log(*(role.fan_in(shape) for shape in shapes))
                outputs = self._log(*(math.prod(shape) for shape in shapes)) - fan_in
                yield name, _Weight(*powers, fan_in, outputs, self._log(*(role.fan_out(shape) for shape in shapes)))

    def _log(self, after: float, before: float) -> float:
        return math.log(after / before, self.ratio) if after and before else math.nan


def _one_layer(config: Config) -> list[Site]:
    """The sites of a model of one block: the law is the same for every layer."""
    return sites(replace(config, depth=1, base_depth=None))


def _rounded(exponent: float) -> float:
    return round(exponent, 9) + 0.0  # a root's rounding; and no -0
