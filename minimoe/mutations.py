"""Wrong tables to practise on: muP with one wrong cell, and how the check catches each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pandas as pd
import torch

from .config import Config
from .identity import declared
from .parametrization import FORWARD_CELLS, SCALES, Parametrization, fan_in, width
from .tables import READINGS, parametrization
from .theory import Growth, kinds
from .verdicts import BROKEN


def mutants(table: str | Parametrization = "mup") -> Iterator[tuple[str, str, float, Parametrization]]:
    """(role, cell, power, a copy of the table in which that one cell is too large by the width to that power).

    Each init_var, multiplier and lr of each role, in both directions, by the least that theory tells apart: a root of the
    width in what the cell does (so a whole power in a variance).
    """
    table = parametrization(table)
    for role in table.roles:
        for cell in ("multiplier",) if role in SCALES else (*FORWARD_CELLS, "lr"):
            for sign in (1, -1):
                power = sign * (1.0 if cell == "init_var" else 0.5)
                yield role, cell, power, _mutant(table, role, cell, power)


def _mutant(table: Parametrization, role: str, cell: str, power: float) -> Parametrization:
    grows = any(param.role.name == role and param.role.ratios["fan_in"] != 1 for param in declared(Config(table)).values())
    size = fan_in if grows else width  # an embedding's fan_in is the vocabulary
    return table.replace(role, **{cell: getattr(table[role], cell) * size**power})


def caught_by(table: pd.DataFrame) -> tuple[str, ...]:
    """Which of init, update and allocation condemn anything in the exponents table of one parametrization."""
    broken = set(table[table.verdict.isin(BROKEN)].quantity)
    return tuple(quantity for quantity in Growth._fields if quantity in broken)


def is_harmless(role: str, cell: str, power: float) -> bool:
    """Whether muP asks nothing of a cell that is wrong in this way: the init of an output weight may be smaller."""
    kind_of = kinds(Config())
    return (
        power < 0
        and cell == "init_var"
        and any(kind_of[name] == "output" for name, param in declared(Config()).items() if param.role.name == role)
    )


def mystery(number: int) -> Parametrization:
    """muP with one wrong cell; which, is for the reader to find. The same number gives the same table, from 0 on.

    The cell is wrong by a whole power of the width: constant where it should move, moving where it should be constant.
    """
    table, condemned = parametrization("mup"), []
    for role in table.roles:
        for cell in (*FORWARD_CELLS, "lr"):
            power = 1.0 if getattr(table[role], cell).powers else -1.0
            if not is_harmless(role, cell, power):
                condemned.append(_mutant(table, role, cell, power))
    order = torch.randperm(len(condemned), generator=torch.Generator().manual_seed(2203)).tolist()
    return replace(condemned[order[number % len(order)]], name=f"mystery {number}")


def deep_mystery() -> Parametrization:
    """depth-mup with one wrong cell; which, is for the reader to find."""
    return replace(READINGS["depth-mup, router without depth"], name="deep mystery")
