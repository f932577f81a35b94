"""Every published table, as data: the parametrizations, the eight treatments of the router, the rates of single roles.

Variances, multipliers and Adam LRs are relative to the base shape (see `parametrization.py`). A source that gives a
standard deviation stands here squared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .checks import PAIR, require, shown, typed
from .parametrization import (
    SCALES,
    Monomial,
    Parametrization,
    Rule,
    TwoTables,
    active_width,
    batch,
    depth,
    duration,
    expert_width,
    fan_in,
    granularity,
    n_experts,
    nearest,
    top_k,
    width,
)


def table(name: str, *, embedding: Rule, unembedding: Rule, hidden: Rule, router: Rule) -> Parametrization:
    """A table written as coarsely as the papers write it: `hidden` is the rule of attention and of both expert matrices."""
    experts = {"experts_up": hidden, "experts_down": hidden}
    return Parametrization(
        name, {"embedding": embedding, "unembedding": unembedding, "attention": hidden, **experts, "router": router}
    )


# arXiv 2508.09752, the table of SimpleP | muP. For a MoE the experts are hidden weights ("scalable to scalable"); the two
# differ in the router alone, which muP treats as an output weight ("scalable to fixed") and SimpleP leaves as in SP.
PARAMETRIZATIONS: dict[str, Parametrization] = {
    known.name: known
    for known in (
        table(
            "sp",
            embedding=Rule(init_var=1, multiplier=1, lr=1),
            unembedding=Rule(init_var=1 / fan_in, multiplier=1, lr=1),
            hidden=Rule(init_var=1 / fan_in, multiplier=1, lr=1),
            router=Rule(init_var=1 / fan_in, multiplier=1, lr=1),
        ),
        table(
            "simplep",
            embedding=Rule(init_var=1, multiplier=1, lr=1),
            unembedding=Rule(init_var=1, multiplier=1 / fan_in, lr=1),
            hidden=Rule(init_var=1 / fan_in, multiplier=1, lr=1 / fan_in),
            router=Rule(init_var=1 / fan_in, multiplier=1, lr=1),
        ),
        table(
            "mup",
            embedding=Rule(init_var=1, multiplier=1, lr=1),
            unembedding=Rule(init_var=1, multiplier=1 / fan_in, lr=1),
            hidden=Rule(init_var=1 / fan_in, multiplier=1, lr=1 / fan_in),
            router=Rule(init_var=1, multiplier=1 / fan_in, lr=1),
        ),
    )
}

WIDTH_TABLES = tuple(PARAMETRIZATIONS)  # of arXiv 2508.09752: all else is fixed while the width grows


def completep(name: str, alpha: float, router: Rule | None = None) -> Parametrization:
    """Residual branches times L^-alpha (CompleteP, arXiv 2505.01618, Table 1 and the authors' code), for a MoE.

    The paper is about dense models, with hidden matrices, biases, norms, embedding and unembedding. Here experts are hidden,
    and the router has the output weight's row of `mup`, with the depth factor on its LR that every weight inside a block has.
    eps: as in the authors' code, one factor for all groups. Weight decay: times the width's ratio for hidden weights, so that
    LR times weight decay stays.
    """
    eps, slower = 1 / (width * depth**alpha), depth ** (alpha - 1)
    hidden = Rule(init_var=1 / fan_in, lr=slower / fan_in, eps=eps, weight_decay=fan_in)
    rows = {
        "embedding": Rule(eps=eps),
        "unembedding": Rule(multiplier=1 / fan_in, eps=eps),
        "attention": hidden,
        "experts_up": hidden,
        "experts_down": hidden,
        "router": router or Rule(multiplier=1 / fan_in, lr=slower, eps=eps),
        "gain": Rule(lr=slower, eps=eps),
        "final_gain": Rule(eps=eps),
        "residual": Rule(multiplier=depth**-alpha),
    }
    return Parametrization(name, rows)


# DMFT-MoE, arXiv 2601.20205 (v3), Table 2. For sigmoid gates; active experts over experts is fixed while both grow. The paper
# ties embedding and readout, so the unembedding has the embedding's row here, and its own multiplier. It scales a standard
# deviation of the down projection by the expert size over the width, on top of the width's own root.
_per_depth = 1 / (width * depth)
DMFT = Parametrization(
    "dmft",
    {
        "embedding": Rule(eps=1 / width),
        "unembedding": Rule(multiplier=1 / fan_in, eps=1 / width),
        "attention": Rule(init_var=1 / fan_in, lr=1 / fan_in, eps=_per_depth),
        "experts_up": Rule(init_var=1 / fan_in, lr=1 / fan_in, eps=1 / (expert_width * depth)),
        "experts_down": Rule(init_var=width / expert_width**2, lr=1 / expert_width, eps=width / (expert_width**2 * depth)),
        "router": Rule(init_var=1 / fan_in**2, lr=1 / fan_in, eps=_per_depth),
        "gain": Rule(),
        "residual": Rule(multiplier=1 / depth),
        "routed": Rule(multiplier=1 / (top_k * granularity)),
    },
)


def complete_mue(name: str, head: Rule) -> Parametrization:
    """Complete-muE (arXiv 2605.23893; the first author's write-up): from a dense model to any mixture of experts.

    For gates "renormalized sigmoid". The base is a dense model (`n_experts=1`), and a mixture's output is
    A * (shared experts + R * routed sum), with A = width / active width in every down projection, and R the number of active
    experts. The down projections start with a std that is larger by the root of 1 / A. Learning rates do not change
    with the number of experts, of active ones, or with their size. Depth as in CompleteP. Weight decay does not change with
    the width. Batch and duration: see `square_root_rule`.
    """
    eps = 1 / (width * depth)
    hidden = Rule(init_var=1 / fan_in, lr=1 / fan_in, eps=eps)
    rows = {
        "embedding": Rule(eps=eps),
        "unembedding": replace(head, eps=eps),
        "attention": hidden,
        "experts_up": hidden,
        "experts_down": Rule(init_var=active_width / width**2, multiplier=width / active_width, lr=1 / width, eps=eps),
        "router": hidden,
        "residual": Rule(multiplier=1 / depth),
        "routed": Rule(multiplier=top_k * granularity),
    }
    return Parametrization(name, rows)


COMPLETE_MUE = complete_mue("complete-mue", Rule(multiplier=1 / fan_in, lr=1 / fan_in))  # as printed; see READINGS
_FOR_OTHER_SIZES = (
    completep("completep", 1),
    completep("depth-mup", 0.5),  # arXiv 2310.02244, Adam
    DMFT,
    COMPLETE_MUE,
)
PARAMETRIZATIONS |= {known.name: known for known in _FOR_OTHER_SIZES}


def _router(name: str, rule: Rule) -> Parametrization:
    """muP with another router."""
    return PARAMETRIZATIONS["mup"].replace("router", name, init_var=rule.init_var, multiplier=rule.multiplier, lr=rule.lr)


# Nobody agrees on the router: the eight published treatments, each an edit of muP's router row.
ROUTER_RULES: dict[str, Parametrization] = {
    rule.name: rule
    for rule in (
        PARAMETRIZATIONS["mup"],  # arXiv 2508.09752, the muP column; also what the package mup advises for outputs
        _router("simplep router", Rule(init_var=1 / fan_in, multiplier=1, lr=1)),  # the SimpleP column there: as in SP
        _router("released simplep router", Rule(init_var=1 / fan_in, multiplier=1, lr=1 / fan_in)),  # its authors' code: the
        _router("released mup router", Rule(init_var=1, multiplier=1 / fan_in, lr=1 / fan_in)),  # name gets the hidden LR
        _router("early router", Rule(init_var=1, multiplier=1, lr=1)),  # its authors' code of February 2025
        _router("hidden router", Rule(init_var=1 / fan_in, multiplier=1, lr=1 / fan_in)),  # Megatron: any matrix is hidden
        _router("dmft router", Rule(init_var=1 / fan_in**2, multiplier=1, lr=1 / fan_in)),  # arXiv 2601.20205
        _router("fork router", Rule(init_var=1, multiplier=1 / fan_in**0.5, lr=1 / fan_in**0.5)),  # a nanoGPT-mup fork's
    )
}


def _with_eps(table: Parametrization, name: str, eps: Monomial) -> Parametrization:
    """The table with one eps for every weight."""
    rules = {role: rule if role in SCALES else replace(rule, eps=eps) for role, rule in table.rules}
    return Parametrization(name, rules)


# Where the sources of a rule disagree, the other readings.
READINGS: dict[str, Parametrization] = {
    rule.name: rule
    for rule in (
        # A released code finds its hidden matrices by name, and misses the router: its LR has no depth factor.
        completep("depth-mup, router without depth", 0.5, Rule(multiplier=1 / fan_in, eps=1 / (width * depth**0.5))),
        # Complete(d)P, arXiv 2512.22382, Table 1: a router is a hidden weight; no multiplier but those of the branches; an eps of
        # its own for embedding and unembedding.
        completep("complete(d)p", 1, Rule(init_var=1 / fan_in, lr=1 / fan_in, eps=1 / (width * depth), weight_decay=fan_in))
        .replace("embedding", "complete(d)p", eps=1 / width)
        .replace("unembedding", "complete(d)p", init_var=1 / fan_in**2, multiplier=1, lr=1 / fan_in, eps=1, weight_decay=fan_in)
        .replace("gain", "complete(d)p", eps=1 / (width * depth))
        .replace("final_gain", "complete(d)p", eps=1),
        # DMFT-MoE's released code: one eps for all groups, and not the paper's.
        _with_eps(DMFT, "dmft, one eps", _per_depth),
        # The usual init of the down projection, which the paper compares its own with: its std by the root of fan_in.
        DMFT.replace("experts_down", "dmft, fan_in init", init_var=1 / fan_in),
        # Complete-muE prints a multiplier of 1 / width for the head, and an LR of 1 / width as well; CompleteP the former alone.
        complete_mue("complete-mue, completep's head", Rule(multiplier=1 / fan_in)),
    )
}


def _regime(name: str, router: Rule, routed: Monomial | float, eps: dict[str, Monomial]) -> Parametrization:
    """muP in one regime of arXiv 2605.14200, for Adam and sigmoid gates; eps: role -> its factor. The paper writes no multiplier
    but that of the routed sum, so the head's smallness is in its init and its LR."""
    hidden = Rule(init_var=1 / fan_in, lr=1 / fan_in, eps=1 / width)
    rows = {
        "embedding": Rule(eps=1 / width),
        "unembedding": Rule(init_var=1 / fan_in**2, lr=1 / fan_in),
        "attention": hidden,
        "experts_up": replace(hidden, eps=eps["experts_up"]),
        "experts_down": replace(hidden, eps=eps["experts_down"]),
        "router": replace(router, lr=1 / fan_in, eps=eps["router"]),
        "routed": Rule(multiplier=routed),
    }
    return Parametrization(name, rows)


# arXiv 2605.14200 and its code (mssp-moe): three regimes, in which other sizes grow with the width. I: the experts' size; II:
# their number, at a fixed size; III: both. muP and MSSP differ in one entry of each. In III this is no cell: MSSP starts
# with equal experts (`Config.same_start`), so both have the table "mup III".
_experts = n_experts * granularity
_eps_i = {"experts_up": 1 / width, "experts_down": 1 / width, "router": 1}
_eps_ii = {"experts_up": 1 / _experts, "experts_down": 1 / (width * _experts), "router": 1 / _experts}
_eps_iii = {**_eps_ii, "experts_up": 1 / (width * _experts)}
_mup_i = _regime("mup I", Rule(init_var=1 / fan_in**2), 1, _eps_i)
_mup_ii = _regime("mup II", Rule(init_var=1 / fan_in), 1 / _experts, _eps_ii)
REGIMES: dict[str, Parametrization] = {
    rule.name: rule
    for rule in (
        _mup_i,
        _mup_i.replace("router", "mssp I", init_var=0),
        _mup_ii,
        _mup_ii.replace("experts_down", "mssp II", init_var=_experts / fan_in),
        _regime("mup III", Rule(init_var=1 / fan_in), 1 / _experts, _eps_iii),
    )
}


def square_root_rule(table: Parametrization, name: str) -> Parametrization:
    """The table with the square-root rule for batch and duration: with m_B the ratio of the batches and m_D that of the tokens
    seen, LR and weight decay times (m_B / m_D)^1/2, eps over it, and 1 - beta times m_B / m_D (Complete(d)P, arXiv 2512.22382,
    Table 1; Complete-muE, arXiv 2605.23893). `param_groups` then needs `betas` and `training`."""
    sde = (batch / duration) ** 0.5

    def moved(rule: Rule) -> Rule:
        cells = {"lr": rule.lr * sde, "weight_decay": rule.weight_decay * sde, "eps": rule.eps / sde}
        return replace(rule, one_minus_beta=rule.one_minus_beta * sde**2, **cells)

    return Parametrization(name, {role: rule if role in SCALES else moved(rule) for role, rule in table.rules})


# RLRS, relative learning rates (arXiv 2507.03526): role -> the factors on its LR at the schedule's peak and at its end. The
# values are those of the authors' configuration files, tuned at a small size: for a MoE of 8 experts, and for a dense model.
RELATIVE_RATES: dict[str, dict[str, tuple[float, float]]] = {
    "moe": {
        "embedding": (5, 0.666),
        "unembedding": (0.666, 0.444),
        "router": (0.666, 1),
        "experts_up": (0.3, 1.125),
        "experts_down": (0.3, 1.125),
        "attention": (1, 1),
    },
    "dense": {
        "embedding": (5, 0.6666),
        "unembedding": (1, 0.4444),
        "experts_up": (1, 0.6666),
        "experts_down": (1, 0.6666),
        "attention": (1, 0.2),
    },
}
ENDS = ("own", "base")  # what the factor at the end multiplies: see `relative_rates`


def relative_rates(
    table: str | Parametrization, rates: Mapping[str, tuple[float, float]], name: str, end: str = "own"
) -> Parametrization:
    """The table with factors on the LR of single roles, at the peak and at the end of the schedule (arXiv 2507.03526).

    rates: role -> (factor at the peak, factor at the end). A finer role goes with its family, a gain or a bias with the
    embedding (`parametrization.FAMILY`), unless it has factors of its own; other roles stay. end: what the last factor
    multiplies. "own", as in the authors' scheduler: the end of the role's own schedule, which the first factor has multiplied
    already; a last factor of 1 then keeps the first throughout. "base", as in the paper's formula: the end of the schedule of an
    LR without factors.

    Raises ValueError for another `end`, a negative factor, a factor of 0 at the peak under "base", or a role without a weight;
    TypeError for rates that are no mapping to pairs of numbers; KeyError for a role that the table lacks.
    """
    require(end in ENDS, "end", end, f"must be one of {', '.join(ENDS)}")
    table = parametrization(table)
    if not isinstance(rates, Mapping):
        raise TypeError(f"rates={shown(rates)}: must be role -> (factor at the peak, factor at the end)")
    for role, pair in rates.items():
        table.row(role)
        require(role not in SCALES, "rates", role, "has no weight, and so no LR")
        label = f"rates[{role!r}]"
        peak, last = typed(label, PAIR, pair)
        require(min(peak, last) >= 0, label, pair, "must not be negative")
        require(peak > 0 or end == "own", label, pair, "the base's end needs a peak above 0")

    def moved(role: str, rule: Rule) -> Rule:
        peak, last = rates.get(nearest(role, rates), (1, 1))
        return replace(rule, lr=rule.lr * peak, final_lr=rule.final_lr * (last if end == "own" else last / peak))

    finer = {role: table[role] for role in rates if role not in table.roles}  # its family's row stays what it is
    rows = dict(table.rules) | finer
    return Parametrization(name, {role: rule if role in SCALES else moved(role, rule) for role, rule in rows.items()})


# What a library does that knows of no width: one init std and one LR for every matrix, at every size (transformers' own
# models: `initializer_range`).
AS_IT_IS = table("as it is", embedding=Rule(), unembedding=Rule(), hidden=Rule(), router=Rule())


def parametrization(wanted: str | Parametrization) -> Parametrization:
    """The table that a name or a table stands for. Raises ValueError listing the known names, or on a borrowed name."""
    if isinstance(wanted, Parametrization):
        known = PARAMETRIZATIONS.get(wanted.name)
        if known is not None and not known.same_rules(wanted):
            raise TwoTables(wanted.name)
        return wanted
    if not isinstance(wanted, str):
        raise TypeError(f"a parametrization is a name or a table, got {wanted!r}")
    if wanted not in PARAMETRIZATIONS:
        raise ValueError(f"unknown parametrization {wanted!r}; known: {', '.join(PARAMETRIZATIONS)} (or give a table)")
    return PARAMETRIZATIONS[wanted]


def shift(wanted: str | Parametrization, role: str, t: Monomial | float, name: str | None = None) -> Parametrization:
    """The same training in another notation: the role's multiplier times t, init std and LR over t.

    Adam cannot tell (the abc symmetry, Tensor Programs V, appendix J.2.1): the effective weight starts where it did, and
    moves as far. Gradients become t times as large, so epsilon does too; weight decay is t times as large because Adam
    multiplies it by the LR. Clipping by the norm of the gradient would tell. t: a number, or a monomial such as `fan_in`.
    """
    return parametrization(wanted).shift(role, t, name)
