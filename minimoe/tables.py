"""Every published table, as data: the parametrizations, and the eight treatments of the router.

Variances, multipliers and Adam LRs are relative to the base shape (see `parametrization.py`). A source that gives a
standard deviation stands here squared.
"""

from __future__ import annotations

from .parametrization import Monomial, Parametrization, Rule, TwoTables, fan_in


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
