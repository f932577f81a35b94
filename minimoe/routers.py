"""Nobody agrees on the router: the eight published treatments, each an edit of muP's router row."""

from __future__ import annotations

from .parametrization import PARAMETRIZATIONS, Parametrization, Rule, fan_in

_MUP = PARAMETRIZATIONS["mup"]


def _edited(name: str, rule: Rule) -> Parametrization:
    return _MUP.replace("router", name, init_var=rule.init_var, multiplier=rule.multiplier, lr=rule.lr)


# Initial *variance* (the sources give a std: squared here), multiplier and Adam LR, relative to the base width.
ROUTER_RULES: dict[str, Parametrization] = {
    table.name: table
    for table in (
        _MUP,  # arXiv 2508.09752, its table's muP column; also MuReadout as the package mup advises for outputs
        _edited("simplep router", Rule(init_var=1 / fan_in, multiplier=1, lr=1)),  # its SimpleP column: as in SP
        _edited("released simplep router", Rule(init_var=1 / fan_in, multiplier=1, lr=1 / fan_in)),  # its authors' code: the
        _edited("released mup router", Rule(init_var=1, multiplier=1 / fan_in, lr=1 / fan_in)),  # name gets the hidden LR
        _edited("early router", Rule(init_var=1, multiplier=1, lr=1)),  # its authors' code of February 2025
        _edited("hidden router", Rule(init_var=1 / fan_in, multiplier=1, lr=1 / fan_in)),  # Megatron: any matrix is hidden
        _edited("dmft router", Rule(init_var=1 / fan_in**2, multiplier=1, lr=1 / fan_in)),  # arXiv 2601.20205
        _edited("fork router", Rule(init_var=1, multiplier=1 / fan_in**0.5, lr=1 / fan_in**0.5)),  # a nanoGPT-mup fork's
    )
}
