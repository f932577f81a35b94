"""The arms of the ablations as data: each is a table and some fields of Config.

Granularity (`ARMS`). The published code differs from a muP purist's in five places, and each can be crossed on its own:

    gates     raw softmax values of the active experts, or renormalised to sum to 1
    down      the down projections' init variance and LR: 1 / width, as their name has it, or 1 / their true fan_in
    balance   the balance loss K times 0.01, which grows with the granularity, or 2 times 0.01 at every granularity
    route     the scale of the routed sum: 1, sqrt(K) or K, relative to that at granularity 1 (a multiplier of `down`)
    router    the router's row of the table: SimpleP's; muP's; or SimpleP's with one change: muP's LR alone, muP's init alone
              (both in effect: of multiplier times weight), or its LR over sqrt(G)

With base_granularity=1 and top_k=2 all arms with one kind of gates and router are one run at granularity 1.

Number of experts (`EXPERT_ARMS`): muP and SimpleP, gates raw and renormalised, two active experts or a quarter of all.
Two interventions on the balance, under muP at k = 2: tokens that go round the experts in turn, whatever the router says
("forced balance"), and other weights of the balance loss than the default 0.01.

Share of active experts (`SHARE_ARMS`): dmft at a fixed share and at other shares; muP with gates that sum to 1, at other shares
through the number of active experts, and through the number of experts.

From dense to sparse (`BRIDGE_ARMS`): the dense model with a feed-forward network of four times the width, and mixtures with as
many hidden values at work for each token, under Complete-muE; three of them also without its route scale ("R = 1"), and under
mup, whose down projection goes by its own fan_in.

Experts that grow with the width (`REGIME_ARMS`): muP and MSSP in the three regimes of arXiv 2605.14200.

Some arms differ in the table alone, whose name is the arm's: `rate_arms` (LRs of single roles over the schedule),
`EMBEDDING_ARMS` (is it the embedding?), `DECAY_ARMS` (weight decay with the width), `HORIZON_ARMS` (batch and duration).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pandas as pd

from .config import points
from .parametrization import Monomial, Parametrization, Rule, fan_in, granularity, width
from .tables import PARAMETRIZATIONS, REGIMES, RELATIVE_RATES, relative_rates, square_root_rule


class Arm(NamedTuple):
    """What an arm sets: its table, and fields of Config. A field may be a function of the size, such as
    `lambda size: size.n_experts // 4`, where `size` has every other field of Config."""

    table: Parametrization
    fields: dict[str, object]

    def at(self, **size) -> dict:
        """The arm's fields at this size: n_experts=8, say; other fields of Config have their defaults."""
        (point,) = points(size | self.fields)
        return {name: point[name] for name in self.fields}


GATES = {"raw": "softmax", "renormalised": "renormalized"}  # an arm's word for Config's
ROUTES: dict[str, Monomial | float] = {"1": 1, "sqrt(K)": granularity**0.5, "K": granularity}
DOWN = {"width": width, "fan_in": fan_in}  # what init variance and LR are the inverse of
SIMPLEP_ROUTER = PARAMETRIZATIONS["simplep"]["router"]
ROUTER_EDITS = {  # of SimpleP's router
    "simplep, LR / sqrt(G)": {"lr": SIMPLEP_ROUTER.lr / granularity**0.5},
    "simplep, muP's LR": {"lr": SIMPLEP_ROUTER.lr / fan_in},
    "simplep, muP's init": {"init_var": SIMPLEP_ROUTER.init_var / fan_in},
}
ROUTERS = ("simplep", "mup", *ROUTER_EDITS)
TOP_K = 2  # at granularity 1


def arm(gates: str = "raw", down: str = "width", balance: str = "K", route: str = "1", router: str = "simplep") -> Arm:
    """One arm; the defaults are the published code (arXiv 2508.09752, SimpleP).

    gates: raw or renormalised. down: width or fan_in. balance: K or 1. route: 1, sqrt(K) or K. router: one of ROUTERS.
    Raises ValueError for another choice.
    """
    choices = {
        "gates": (gates, tuple(GATES)),
        "down": (down, tuple(DOWN)),
        "balance": (balance, ("K", "1")),
        "route": (route, tuple(ROUTES)),
        "router": (router, ROUTERS),
    }
    for name, (choice, valid) in choices.items():
        if choice not in valid:
            raise ValueError(f"{name}={choice!r}: must be one of {', '.join(valid)}")
    cells = {"init_var": 1 / DOWN[down], "lr": 1 / DOWN[down], "multiplier": ROUTES[route]}
    name, table = f"{router}, down by {down}, route {route}", PARAMETRIZATIONS[router.partition(",")[0]]
    if router in ROUTER_EDITS:
        table = table.replace("router", name, **ROUTER_EDITS[router])
    table = table.replace("experts_down", name, **cells)
    weight = _counted_k_times if balance == "K" else 0.01 * TOP_K
    return Arm(table, {"top_k": TOP_K, "gates": GATES[gates], "balance_weight": weight})


def _counted_k_times(size) -> float:
    """The weight of a balance loss that counts each token once for each of its K active experts."""
    return 0.01 * (size.top_k * size.granularity)


ARMS: dict[str, Arm] = {
    "authors": arm(),
    "gates renormalised": arm(gates="renormalised"),
    "down by fan_in": arm(down="fan_in"),
    "balance 1": arm(balance="1"),
    "route sqrt(K)": arm(route="sqrt(K)"),
    "route K": arm(route="K"),
    "router mup": arm(router="mup"),
    "fan_in + sqrt(K)": arm(down="fan_in", route="sqrt(K)"),
    "fan_in + K": arm(down="fan_in", route="K"),
    "fan_in + router mup": arm(down="fan_in", router="mup"),
    "route K + router mup": arm(route="K", router="mup"),
    "route K + router LR": arm(route="K", router="simplep, LR / sqrt(G)"),
    "router mup's LR": arm(router="simplep, muP's LR"),
    "router mup's init": arm(router="simplep, muP's init"),
    "all mended, fan_in": arm("renormalised", "fan_in", "1", "1", "mup"),
    "all mended, route K": arm("renormalised", "width", "1", "K", "mup"),
}


def _two(_size) -> int:
    return TOP_K


def _quarter(size) -> int:
    return size.n_experts // 4


def _expert_arm(name: str, gates: str, top_k: Callable, forced: bool = False, balance: float = 0.01) -> Arm:
    fields = {"gates": GATES[gates], "forced_balance": forced, "top_k": top_k, "balance_weight": balance}
    return Arm(PARAMETRIZATIONS[name], fields)


EXPERT_ARMS: dict[str, Arm] = (
    {
        f"{name}, {gates}, k={active}": _expert_arm(name, gates, top_k)
        for name in ("mup", "simplep")
        for gates in GATES
        for active, top_k in (("2", _two), ("E/4", _quarter))
    }
    | {f"mup, {gates}, k=2, forced balance": _expert_arm("mup", gates, _two, forced=True) for gates in GATES}
    | {f"mup, raw, k=2, balance {weight:g}": _expert_arm("mup", "raw", _two, balance=weight) for weight in (0, 0.1, 1)}
)


_SUM_TO_1 = {"gates": GATES["renormalised"], "forced_balance": False, "balance_weight": 0.01}
SHARE_ARMS: dict[str, Arm] = {
    "dmft, k=E/4": Arm(PARAMETRIZATIONS["dmft"], {"top_k": _quarter}),
    "dmft, k=2": Arm(PARAMETRIZATIONS["dmft"], {"top_k": _two}),
    "mup, E=32, other k": Arm(PARAMETRIZATIONS["mup"], {"n_experts": 32, **_SUM_TO_1}),
    "mup, k=2, other E": Arm(PARAMETRIZATIONS["mup"], {"top_k": _two, **_SUM_TO_1}),
}


_MUE = PARAMETRIZATIONS["complete-mue"]
_NO_ROUTE_SCALE = _MUE.replace("routed", "complete-mue, R = 1", multiplier=1)


def _bridge(active: int, experts: int, shared: int = 0, table: Parametrization = _MUE) -> Arm:
    """`active` of `experts` experts and `shared` shared ones (as many, or none), each of 4 n / (active + shared) hidden values;
    n is the width."""
    sizes = {"n_experts": experts // active, "top_k": 1, "granularity": active, "expert_ratio": 2 if shared else 4}
    return Arm(table, {**sizes, "n_shared": shared // active, "gates": "renormalized sigmoid"})


_BRIDGES = [(1, 1), (8, 8), (2, 8), (2, 32), (4, 8), (2, 2), (2, 4), (2, 16), (4, 4), (4, 16), (8, 32)]  # active of all experts
_WITHOUT = [(8, 8), (2, 8), (2, 32)]
BRIDGE_ARMS: dict[str, Arm] = (
    {"dense" if experts == 1 else f"{active} of {experts}": _bridge(active, experts) for active, experts in _BRIDGES}
    | {f"2 of {experts} + 2 shared": _bridge(2, experts, 2) for experts in (2, 8)}
    | {f"R = 1, {active} of {experts}": _bridge(active, experts, table=_NO_ROUTE_SCALE) for active, experts in _WITHOUT}
    | {f"mup, {active} of {experts}": _bridge(active, experts, table=PARAMETRIZATIONS["mup"]) for active, experts in _WITHOUT}
)

_ALL_AT_1 = _MUE.replace("experts_down", "complete-mue, A = 1", multiplier=1, init_var=1 / width)


def _capacity(experts: int, active: int, granularity: int, ratio: int, table: Parametrization = _MUE) -> Arm:
    sizes = {"n_experts": experts, "top_k": active, "granularity": granularity, "expert_ratio": ratio, "n_shared": 0}
    return Arm(table, {**sizes, "gates": "renormalized sigmoid"})


_CAPACITIES = {  # active experts, and the hidden values that serve a token; the dense model of `BRIDGE_ARMS` has 4 n
    "2 of 8, n": (4, 1, 2, 1),
    "2 of 8, 8 n": (8, 2, 1, 4),
    "dense, 16 n": (1, 1, 1, 16),
    "8 of 8, 32 n": (8, 8, 1, 4),
}
CAPACITY_ARMS: dict[str, Arm] = {name: _capacity(*sizes) for name, sizes in _CAPACITIES.items()} | {
    f"A = 1, {name}": _capacity(*_CAPACITIES[name], _ALL_AT_1) for name in ("2 of 8, n", "dense, 16 n", "8 of 8, 32 n")
}

_SIGMOID = {"gates": "sigmoid", "balance_weight": 0.01, "same_start": False}
REGIME_ARMS: dict[str, Arm] = {name: Arm(table, _SIGMOID) for name, table in REGIMES.items()} | {
    "mssp III": Arm(REGIMES["mup III"], _SIGMOID | {"same_start": True})
}


VARIED = {  # of the model's roles, those whose LRs move together
    "embedding": ("embedding",),
    "unembedding": ("unembedding",),
    "router": ("router",),
    "experts": ("experts_up", "experts_down"),
    "attention": ("attention",),
}


def rate_arms(name: str) -> list[Parametrization]:
    """The table of this name, and the table with the rates of RLRS for a MoE (arXiv 2507.03526): their end read in two ways, held
    at the peak's factors, and two of them alone."""
    rates = RELATIVE_RATES["moe"]
    held = {role: (peak, 1) for role, (peak, _) in rates.items()}
    experts = {role: held[role] for role in VARIED["experts"]}
    return [
        PARAMETRIZATIONS[name],
        relative_rates(name, rates, f"{name}, rlrs"),
        relative_rates(name, rates, f"{name}, rlrs, base's end", "base"),
        relative_rates(name, held, f"{name}, rlrs held"),
        relative_rates(name, experts, f"{name}, experts x 0.3"),
        embedding_times(name, 5),
    ]


def embedding_times(name: str, factor: float) -> Parametrization:
    """The table of this name with the embedding's LR multiplied, at every width."""
    return relative_rates(name, {"embedding": (factor, 1)}, f"{name}, embedding x {factor:g}")


def one_varied(name: str, factors: tuple[float, ...]) -> list[tuple[str, float, Parametrization]]:
    """One LR changed at a time, about the table of this name with the embedding's LR times 5: (role, factor, table) of each. A
    factor of 1 is that table itself."""
    start, found = embedding_times(name, 5), []
    for role, members in VARIED.items():
        for factor in factors:
            label = start.name if factor == 1 else f"{start.name}, {role} x {factor:g}"
            found.append((role, factor, relative_rates(start, dict.fromkeys(members, (factor, 1)), label)))
    return found


def with_factors(frame: pd.DataFrame, name: str, factors: tuple[float, ...]) -> pd.DataFrame:
    """The rows of a sweep that belong to `one_varied`, with the role and the factor that each has changed; the rows of the table
    that nothing has changed stand there once for every role."""
    cells = [{"role": role, "factor": factor, "parametrization": table.name} for role, factor, table in one_varied(name, factors)]
    return pd.DataFrame(cells).merge(frame, on="parametrization")


_SP, _MUP = PARAMETRIZATIONS["sp"], PARAMETRIZATIONS["mup"]
EMBEDDING_ARMS: list[Parametrization] = [  # arXiv 2605.21486: is muP's gain the embedding's LR alone?
    _SP.replace("embedding", "sp, embedding LR x n", lr=width),
    _MUP.replace("embedding", "mup, embedding LR / n", lr=1 / width),
]


def decayed(table: Parametrization, power: float, name: str) -> Parametrization:
    """The table, under this name, with a weight decay times this power of the fan_in for each role whose LR falls with it."""

    def moved(rule: Rule) -> Rule:
        falls = dict(rule.lr.powers).get("fan_in", 0) < 0
        return replace(rule, weight_decay=rule.weight_decay * fan_in**power) if falls else rule

    return Parametrization(name, {role: moved(rule) for role, rule in table.rules})


# Under mup the hidden weights' LR falls like 1 / n. Weight decay times n: CompleteP, arXiv 2505.01618, and Complete(d)P,
# 2512.22382; times the root of n: 2510.15262; as it is: Complete-muE, 2605.23893.
DECAY_ARMS: list[Parametrization] = [
    decayed(_MUP, 1, "mup, decay x n"),
    decayed(_MUP, 0.5, "mup, decay x sqrt n"),
    _MUP,
]


_RULED = square_root_rule(_MUP, "mup, square-root rule")
_BETAS = "mup, its betas alone"
HORIZON_ARMS: list[Parametrization] = [  # batch and duration: no rule, Complete(d)P's (arXiv 2512.22382), and one part of that
    _MUP,
    _RULED,
    Parametrization(_BETAS, {role: replace(rule, one_minus_beta=_RULED[role].one_minus_beta) for role, rule in _MUP.rules}),
]


def labelled(frame: pd.DataFrame, arms: dict[str, Arm] = ARMS) -> pd.DataFrame:
    """The rows of a sweep that belong to an arm, with the arm's name for their parametrization, in the arms' order."""
    parts = []
    for name, arm in arms.items():
        mine = frame.parametrization == arm.table.name
        for field, value in arm.fields.items():
            mine &= frame[field] == ([value(size) for size in frame.itertuples()] if callable(value) else value)
        parts.append(frame[mine].assign(parametrization=name))
    return pd.concat(parts, ignore_index=True)
