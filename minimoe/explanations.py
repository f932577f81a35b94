"""What a parametrization does to each tensor of a model, and why."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from dataclasses import replace
from html import escape

import pandas as pd
from torch import nn

from .checks import require
from .config import Config
from .identity import declared
from .model import MiniMoE
from .parametrization import Parametrization, Rule, require_distinct_names
from .probe import sites
from .roles import AT_BASE, numbers
from .tables import parametrization
from .theory import KINDS, MUP_INIT, Growth, as_wanted, kinds, law, predicted_exponents


class Explanation(pd.DataFrame):
    """A data frame that prints its `why` below the numbers, once for all tensors that share it."""

    @property
    def _constructor(self):
        return pd.DataFrame  # a selection of it is an ordinary frame

    def __repr__(self) -> str:
        table = pd.DataFrame(self.drop(columns="why")).to_string(index=False, float_format="{:.4g}".format)
        return "\n".join([table, "", *(textwrap.fill(line, 120, subsequent_indent="    ") for line in self.reasons())])

    __str__ = __repr__

    def _repr_html_(self) -> str:
        table = pd.DataFrame(self.drop(columns="why")).to_html(index=False, float_format="{:.4g}".format, border=0)
        return table + "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in self.reasons()) + "</ul>"

    def reasons(self) -> list[str]:
        """One line per distinct reason, with the tensors it holds for."""
        by = "role" if "role" in self.columns else "name"
        return [f"{', '.join(dict.fromkeys(group[by]))}: {why}" for why, group in self.groupby("why", sort=False)]


def explain(subject: Config | MiniMoE, *, lr: float = 2.0**-6) -> Explanation:
    """One row per tensor: what its parametrization gives it, and why. (For a model that is not ours see `adopt`.)

    subject: a Config or a MiniMoE, explained under its own table. Columns: name, role, kind (of Tensor Programs V, from
    comparing its shape with that of a wider model), shape, fan_in, parameters (their number), flops (of its matrix products
    in one token's forward pass), ratio (fan_in over base fan_in), init_std, multiplier, lr (factor on the base LR),
    effective_lr (what Adam uses at the base LR `lr`), eps and weight_decay (factors), final_lr (factor on the end of the
    schedule; only where a row of the table has one) and why.

    Raises TypeError for anything else to explain.
    """
    require(math.isfinite(lr) and lr > 0, "lr", lr, "must be positive and finite")
    config = subject.config if isinstance(subject, MiniMoE) else subject
    if not isinstance(config, Config):
        raise TypeError(f"explain takes a Config or a MiniMoE, got {type(subject).__name__}; for other models there is adopt")
    return Explanation(_rows_of_config(config, lr))


def side_by_side(config: Config, tables: Iterable[str | Parametrization]) -> pd.DataFrame:
    """The numbers that several tables give to each tensor: columns (cell, table), and ("differs", "") naming the cells in
    which they are not all the same."""
    tables = [parametrization(table) for table in tables]
    require_distinct_names(tables)
    if not tables:
        raise ValueError("side_by_side needs at least one table")
    explained = {}
    for table in tables:
        one = replace(config, parametrization=table)
        explained[one.parametrization.name] = explain(one).set_index("name")
    first = next(iter(explained.values()))
    columns, differing = {("kind", ""): first.kind, ("shape", ""): first["shape"]}, {name: [] for name in first.index}
    for cell in ("init_std", "multiplier", "lr", "eps", "weight_decay", "final_lr"):
        values = pd.DataFrame({name: rows.get(cell, pd.Series(1.0, rows.index)) for name, rows in explained.items()})
        unequal = values.nunique(axis=1) > 1
        if cell in ("init_std", "multiplier", "lr") or unequal.any():
            columns |= {(cell, name): values[name] for name in values}
        for name in first.index[unequal]:
            differing[name].append(cell)
    columns["differs", ""] = pd.Series({name: ", ".join(cells) for name, cells in differing.items()})
    return pd.DataFrame(columns)


def marked(table: pd.DataFrame) -> str:
    """A `side_by_side` frame for a terminal, an asterisk at each number that is not the same in every table."""
    text = pd.DataFrame(index=table.index)
    for cell, name in table.columns:
        if cell == "differs":
            continue
        text[f"{cell} {name}".strip()] = [
            (f"{value:.4g}" if isinstance(value, float) else str(value)) + ("*" if cell in differs.split(", ") else "")
            for value, differs in zip(table[cell, name], table["differs", ""], strict=True)
        ]
    return text.to_string()


def why(kind: str, rule: Rule, grows: float, allocation: float = math.nan, head: float = MUP_INIT["output"]) -> str:
    """In words: what the kind is, and what follows from the rule; fan_in grows like width^grows, the tensor's allocation like
    width^allocation (NaN where it is not known), and the logits at init like width^head."""
    ratios = {"fan_in": 2.0**grows} | dict.fromkeys({name for name in rule.ratios if name != "fan_in"}, 2.0)
    m, v, l = (
        math.log2(value) if (value := getattr(rule, cell)(ratios)) else -math.inf for cell in ("multiplier", "init_var", "lr")
    )
    growth = Growth(*(round(power, 9) + 0.0 for power in law(m, v / 2, l, grows)[:2]), allocation)  # a root's rounding; no -0
    judged = "as muP wants it" if as_wanted(kind, growth, head) else "not as muP wants it"
    if kind == "fixed":
        return f"{kind}, {KINDS[kind]}: nothing to change"
    said = f"its output at init {_growth(growth.init)}, an Adam step's effect on it {_growth(growth.update)}"
    if not math.isnan(allocation):
        said += f", its share of the loss's first fall {_growth(allocation)}"
    return f"{kind}, {KINDS[kind]}; {said}: {judged}"


def _growth(power: float) -> str:
    if power == 0:
        return "does not depend on width"
    if power == -math.inf:
        return "is zero"
    return f"{'grows' if power > 0 else 'shrinks'} like width^{power:g}"


def _rows_of_config(config: Config, lr: float) -> pd.DataFrame:
    wider, kind_of = declared(replace(config, width=2 * config.width)), kinds(config)
    site_of = {name: site.name for site in sites(config) for name in site.parameters}
    exponents = predicted_exponents(config)
    head = exponents.get((sites(config)[-1].name, "init"), -math.inf)
    rows = []
    for name, param in declared(config).items():
        cells, shape, role = numbers(param, config.parametrization, AT_BASE), tuple(param.shape), param.role
        grows = math.log2(role.fan_in(wider[name].shape) / role.fan_in(shape))
        rows.append(
            {
                "name": name,
                "role": config.parametrization.row(role.name),
                "kind": kind_of[name],
                "shape": shape,
                "fan_in": role.fan_in(shape),
                "parameters": param.numel(),
                "flops": _flops(config, param),
                "ratio": role.ratios.get("fan_in", 1.0),  # none of a gain
                "init_std": cells.std,
                "multiplier": cells.multiplier,
                "lr": cells.lr,
                "effective_lr": lr * cells.lr,
                "eps": cells.eps,
                "weight_decay": cells.weight_decay,
                "final_lr": cells.final_lr,
                "why": why(
                    kind_of[name],
                    _in_width(config.parametrization[role.name]),
                    grows,
                    exponents.get((site_of[name], "allocation"), math.nan),
                    head,
                ),
            }
        )
    table = pd.DataFrame(rows)
    return table if (table.final_lr != 1).any() else table.drop(columns="final_lr")


def _in_width(rule: Rule) -> Rule:
    """The rule with only those ratios that grow with the width."""
    others = dict.fromkeys(rule.ratios - {"fan_in", "width", "expert_width", "active_width"}, 1.0)
    cells = {}
    for cell in ("init_var", "multiplier", "lr"):
        monomial = getattr(rule, cell)
        kept = tuple((name, power) for name, power in monomial.powers if name not in others)
        cells[cell] = replace(monomial, coefficient=1.0 if monomial.coefficient else 0.0, powers=kept)
    return Rule(**cells)


def _flops(config: Config, param: nn.Parameter) -> int:
    """2 per weight that a token meets: none of an embedding's (it is looked up), the active share of the experts'."""
    if param.role.name == "embedding":
        return 0
    routed = param.role.name in ("experts_up", "experts_down")
    return 2 * param.numel() * (config.active_experts if routed else config.experts) // config.experts
