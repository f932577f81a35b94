"""Parametrizations as data: which numbers belong to which role, and how they move with the shape.

A parametrization is a table. For each *role* (embedding, attention, router, ...) a `Rule` holds five cells, and each cell
is a coefficient times a monomial in *ratios* to a base shape:

    Rule(init_var=1, multiplier=1 / fan_in, lr=1)         # muP's router

`fan_in` here is not a size but a ratio, true fan_in / base fan_in, so that at the base shape every cell is just its
coefficient and every parametrization is the same run, bit for bit. Three functions put a table to work on any module
whose parameters carry a role:

    self.router = parameter("router", (width, n_experts), base_shape=(base_width, n_experts))
    initialise(module, PARAMETRIZATIONS["mup"], seed=0)   # draws the weights, registers the multipliers
    torch.optim.AdamW(param_groups(module, PARAMETRIZATIONS["mup"], lr=1e-2))
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from dataclasses import replace as dataclass_replace
from numbers import Real
from typing import NamedTuple

import torch
from torch import nn


@dataclass(frozen=True)
class Monomial:
    """A coefficient times powers of named ratios, e.g. `2 / fan_in`; calling it with the ratios gives a number."""

    coefficient: float = 1.0
    powers: tuple[tuple[str, float], ...] = ()  # ((ratio's name, exponent), ...), sorted, no zero exponents

    def __post_init__(self):
        if not (math.isfinite(self.coefficient) and self.coefficient >= 0):
            raise ValueError(f"a cell's coefficient must be finite and not negative, got {self.coefficient!r}")

    def __call__(self, ratios: Mapping[str, float]) -> float:
        """The cell's value for one tensor. Raises KeyError naming a ratio that the tensor does not know."""
        value = self.coefficient
        for name, exponent in self.powers:
            if name not in ratios:
                raise KeyError(f"the cell {self} needs the ratio {name!r}; this parameter knows {sorted(ratios)}")
            value *= ratios[name] ** exponent
        return value

    def __mul__(self, other: Monomial | float) -> Monomial:
        other = as_monomial(other)
        powers = dict(self.powers)
        for name, exponent in other.powers:
            powers[name] = powers.get(name, 0.0) + exponent
        kept = tuple(sorted((name, exponent) for name, exponent in powers.items() if exponent))
        return Monomial(self.coefficient * other.coefficient, kept)

    __rmul__ = __mul__

    def __pow__(self, exponent: float) -> Monomial:
        if exponent == 0:
            return Monomial()
        return Monomial(self.coefficient**exponent, tuple((name, power * exponent) for name, power in self.powers))

    def __truediv__(self, other: Monomial | float) -> Monomial:
        return self * as_monomial(other) ** -1

    def __rtruediv__(self, other: float) -> Monomial:
        return as_monomial(other) * self**-1

    def __str__(self) -> str:
        def product(powers):
            return "*".join(name if power == 1 else f"{name}^{_short(power)}" for name, power in powers)

        above = product([(name, power) for name, power in self.powers if power > 0])
        below = product([(name, -power) for name, power in self.powers if power < 0])
        if self.coefficient != 1 or not above:
            above = _short(self.coefficient) + (f"*{above}" if above else "")
        return above + (f"/({below})" if "*" in below else f"/{below}" if below else "")

    __repr__ = __str__


def _short(value: float) -> str:
    """The shortest text that reads back as the same number: 1, 0.25, 1e-08."""
    return repr(float(value)).removesuffix(".0")


def as_monomial(value: Monomial | float) -> Monomial:
    """The cell that a plain number stands for; a Monomial passes through."""
    if isinstance(value, Monomial):
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"a cell is a number or a monomial such as 1 / fan_in, got {value!r}")
    return Monomial(float(value))


def ratio(name: str) -> Monomial:
    """The monomial of one named ratio, true value / base value."""
    return Monomial(powers=((name, 1.0),))


fan_in = ratio("fan_in")  # of the tensor in question: rows of the matrix, those that grow
width = ratio("width")
depth = ratio("depth")
n_experts = ratio("n_experts")
top_k = ratio("top_k")
granularity = ratio("granularity")
expert_width = ratio("expert_width")  # hidden size M of one expert


@dataclass(frozen=True)
class Rule:
    """One role's five cells, each a number or a `Monomial`.

    init_var: variance at init, relative to the base variance. multiplier: what the forward pass multiplies the weight
    by. lr, eps, weight_decay: Adam's, relative to the base values given to `param_groups`.
    """

    init_var: Monomial = 1.0
    multiplier: Monomial = 1.0
    lr: Monomial = 1.0
    eps: Monomial = 1.0
    weight_decay: Monomial = 1.0

    def __post_init__(self):
        for cell in fields(self):
            object.__setattr__(self, cell.name, as_monomial(getattr(self, cell.name)))

    @property
    def ratios(self) -> set[str]:
        """The named ratios that its cells use."""
        return {name for cell in fields(self) for name, _ in getattr(self, cell.name).powers}


CELLS = tuple(cell.name for cell in fields(Rule))


@dataclass(frozen=True, repr=False)
class Parametrization:
    """A named table: role -> Rule. Printing it shows it as the paper does; `replace` edits one role's cells."""

    name: str
    rules: tuple[tuple[str, Rule], ...]  # a mapping is accepted

    def __post_init__(self):
        rules = dict(self.rules)
        for role, rule in rules.items():
            if not isinstance(rule, Rule):
                raise TypeError(f"role {role!r} of parametrization {self.name!r} needs a Rule, got {rule!r}")
        object.__setattr__(self, "rules", tuple(rules.items()))

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(role for role, _ in self.rules)

    def __getitem__(self, role: str) -> Rule:
        for known, rule in self.rules:
            if known == role:
                return rule
        raise KeyError(f"parametrization {self.name!r} has no role {role!r}; it has {', '.join(self.roles)}")

    def replace(self, role: str, name: str | None = None, **cells: Monomial | float) -> Parametrization:
        """The same table with some cells of one role changed; unless given a name, it names itself by its edits, e.g.
        `simplep[router.lr=1/fan_in]`.

        Raises KeyError for an unknown role and TypeError for an unknown cell.
        """
        unknown = sorted(set(cells) - set(CELLS))
        if unknown or not cells:
            raise TypeError(f"replace changes at least one of the cells {', '.join(CELLS)}; got {unknown or 'none'}")
        changed = dataclass_replace(self[role], **cells)
        if name is None:
            base, _, earlier = self.name.removesuffix("]").partition("[")
            edits = dict(edit.split("=") for edit in earlier.split(",") if edit)
            edits |= {f"{role}.{cell}": str(getattr(changed, cell)) for cell in cells}
            name = f"{base}[{','.join('='.join(edit) for edit in edits.items())}]"
        return Parametrization(name, tuple((known, changed if known == role else rule) for known, rule in self.rules))

    def __repr__(self) -> str:
        return f"<Parametrization {self.name}>"

    def __str__(self) -> str:
        columns = list(_columns(self))
        rows = [[""] + [title for title, _ in columns]]
        rows += [[cell] + [str(getattr(rule, cell)) for _, rule in columns] for cell in CELLS]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(text.ljust(size) for text, size in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([self.name, *lines])

    def to_dict(self) -> dict:
        """Plain JSON: {"name", "rules": {role: {cell: [coefficient, {ratio: exponent}]}}}."""
        rules = {role: {cell: _monomial_to_json(getattr(rule, cell)) for cell in CELLS} for role, rule in self.rules}
        return {"name": self.name, "rules": rules}

    @classmethod
    def from_dict(cls, data: dict) -> Parametrization:
        """The table that `to_dict` wrote."""

        def rule(cells):
            return Rule(**{c: Monomial(value, tuple(sorted(powers.items()))) for c, (value, powers) in cells.items()})

        return cls(data["name"], {role: rule(cells) for role, cells in data["rules"].items()})


def _monomial_to_json(cell: Monomial) -> list:
    return [cell.coefficient, dict(cell.powers)]


def _columns(table: Parametrization) -> Iterator[tuple[str, Rule]]:
    """(title, rule) per printed column: roles `x_up` and `x_down` share the column `x` where their rules agree."""
    rules = dict(table.rules)
    for role, rule in table.rules:
        stem = role.removesuffix("_up").removesuffix("_down")
        pair = (rules.get(f"{stem}_up"), rules.get(f"{stem}_down"))
        if role == stem or pair[0] != pair[1]:
            yield role, rule
        elif role.endswith("_up"):
            yield stem, rule


def _table(name: str, *, hidden: Rule, embedding: Rule, unembedding: Rule, router: Rule) -> Parametrization:
    roles = {
        "embedding": embedding,
        "unembedding": unembedding,
        "attention": hidden,
        "experts_up": hidden,
        "experts_down": hidden,
        "router": router,
    }
    return Parametrization(name, roles)


# arXiv 2508.09752, the table of SimpleP | muP. For a MoE the experts are hidden weights ("scalable to scalable"); the two
# differ in the router alone, which muP treats as an output weight ("scalable to fixed") and SimpleP leaves as in SP.
PARAMETRIZATIONS: dict[str, Parametrization] = {
    table.name: table
    for table in (
        _table(
            "sp",
            embedding=Rule(init_var=1, multiplier=1, lr=1),
            unembedding=Rule(init_var=1 / fan_in, multiplier=1, lr=1),
            hidden=Rule(init_var=1 / fan_in, multiplier=1, lr=1),
            router=Rule(init_var=1 / fan_in, multiplier=1, lr=1),
        ),
        _table(
            "simplep",
            embedding=Rule(init_var=1, multiplier=1, lr=1),
            unembedding=Rule(init_var=1, multiplier=1 / fan_in, lr=1),
            hidden=Rule(init_var=1 / fan_in, multiplier=1, lr=1 / fan_in),
            router=Rule(init_var=1 / fan_in, multiplier=1, lr=1),
        ),
        _table(
            "mup",
            embedding=Rule(init_var=1, multiplier=1, lr=1),
            unembedding=Rule(init_var=1, multiplier=1 / fan_in, lr=1),
            hidden=Rule(init_var=1 / fan_in, multiplier=1, lr=1 / fan_in),
            router=Rule(init_var=1, multiplier=1 / fan_in, lr=1),
        ),
    )
}


def parametrization(table: str | Parametrization) -> Parametrization:
    """The table that a name or a table stands for. Raises ValueError listing the known names, or on a borrowed name."""
    if isinstance(table, Parametrization):
        known = PARAMETRIZATIONS.get(table.name)
        if known is not None and known != table:
            raise ValueError(f"two different tables are called {table.name!r}: give the edited one another name")
        return table
    if not isinstance(table, str):
        raise TypeError(f"a parametrization is a name or a table, got {table!r}")
    if table not in PARAMETRIZATIONS:
        raise ValueError(f"unknown parametrization {table!r}; known: {', '.join(PARAMETRIZATIONS)} (or give a table)")
    return PARAMETRIZATIONS[table]


def shift(table: str | Parametrization, role: str, t: Monomial | float, name: str | None = None) -> Parametrization:
    """The same training in another notation: the role's multiplier times t, init std and LR over t.

    Adam cannot tell (the abc symmetry, Tensor Programs V, appendix J.2.1): the effective weight starts where it did, and
    moves as far. Gradients become t times as large, so epsilon does too; weight decay is t times as large because Adam
    multiplies it by the LR. Clipping by the norm of the gradient would tell. t: a number, or a monomial such as `fan_in`.
    """
    table, t = parametrization(table), as_monomial(t)
    if t.coefficient == 0:
        raise ValueError("t must not be 0")
    rule = table[role]
    changed = {"init_var": rule.init_var / t**2, "multiplier": rule.multiplier * t, "lr": rule.lr / t}
    return table.replace(role, name, **changed, eps=rule.eps * t, weight_decay=rule.weight_decay * t)


def require_distinct_names(tables: Iterable[Parametrization]) -> None:
    """Raise ValueError if two different tables carry one name: rows are told apart by it."""
    first: dict[str, Parametrization] = {}
    for table in tables:
        if first.setdefault(table.name, table) != table:
            raise ValueError(f"two different tables are called {table.name!r}: give one of them another name")


@dataclass(frozen=True)
class Role:
    """What a parameter declares about itself: its role, its ratios to the base shape, its init std at the base."""

    name: str
    base_std: float
    ratios: Mapping[str, float] = field(default_factory=dict)


class RoleParameter(nn.Parameter):
    """An `nn.Parameter` that carries its `Role` as `.role`, through deepcopy too."""

    def __deepcopy__(self, memo):
        copied = super().__deepcopy__(memo)
        copied.role = copy.deepcopy(self.role, memo)
        return copied


def parameter(
    role: str,
    shape: tuple[int, ...],
    *,
    base_shape: tuple[int, ...] | None = None,
    base_std: float | None = None,
    ratios: Mapping[str, float] | None = None,
) -> RoleParameter:
    """A parameter that declares its role, to be filled by `initialise`. Shape: (..., fan_in, fan_out), used as x @ W.

    base_shape: its shape in the base model (default: the same), which gives the ratio `fan_in`. base_std: its init std
    there (default 1 / sqrt(base fan_in)). ratios: further named ratios that its rule may use, such as {"width": 4.0}.
    Raises ValueError for a shape of fewer than two axes without base_std, or one that differs from base_shape in length.
    """
    base_shape = tuple(shape) if base_shape is None else tuple(base_shape)
    if len(base_shape) != len(shape):
        raise ValueError(f"{role}: shape {tuple(shape)} and base shape {base_shape} differ in their number of axes")
    if any(size < 1 for size in (*shape, *base_shape)):
        raise ValueError(f"{role}: sizes must be positive, got {tuple(shape)} with base {base_shape}")
    ratios = dict(ratios or {})
    if len(shape) >= 2:
        ratios["fan_in"] = shape[-2] / base_shape[-2]
    elif base_std is None:
        raise ValueError(f"{role}: a parameter of shape {tuple(shape)} has no fan_in; give its base_std")
    made = RoleParameter(torch.zeros(shape))
    made.role = Role(role, 1 / math.sqrt(base_shape[-2]) if base_std is None else base_std, ratios)
    return made


class Numbers(NamedTuple):
    """The evaluated cells of one tensor: what training can tell apart of a parametrization."""

    std: float  # init std
    multiplier: float
    lr: float  # factor on the base LR; likewise eps and weight_decay
    eps: float
    weight_decay: float


def numbers(param: nn.Parameter, table: Parametrization) -> Numbers:
    """The table's cells evaluated for one parameter. Raises KeyError where its role or a ratio is missing."""
    rule, ratios = table[param.role.name], param.role.ratios
    cells = {cell: getattr(rule, cell)(ratios) for cell in CELLS}
    std = param.role.base_std * math.sqrt(cells.pop("init_var"))
    return Numbers(std, **cells)


def named_roles(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """`module.named_parameters()`, each checked to carry a role. Raises TypeError naming one that does not."""
    for name, param in module.named_parameters():
        if not hasattr(param, "role"):
            raise TypeError(f"parameter {name!r} of {type(module).__name__} has no role: make it with minimoe.parameter")
        yield name, param


@torch.no_grad()
def initialise(module: nn.Module, table: str | Parametrization, seed: int = 0) -> nn.Module:
    """Draw every parameter at the table's std and register its multiplier beside it; returns the module.

    The parameter `w` gets a 0-dim buffer `w_multiplier` in the module that owns it, and the forward pass must use the
    product `self.w_multiplier * self.w`. (A buffer and not a float: under vmap each stacked run needs its own.)
    The same seed draws the same standard normals under every table. Raises TypeError for a parameter without a role.
    """
    table = parametrization(table)
    generator = torch.Generator("cpu").manual_seed(seed)
    for name, param in list(named_roles(module)):
        evaluated = numbers(param, table)
        if not param.is_meta:  # a meta module has shapes and roles but no values
            normal = torch.randn(param.shape, generator=generator, dtype=param.dtype, device="cpu")
            param.copy_(normal * evaluated.std)
        path, _, leaf = name.rpartition(".")
        multiplier = torch.tensor(evaluated.multiplier, dtype=param.dtype, device=param.device)
        module.get_submodule(path).register_buffer(f"{leaf}_multiplier", multiplier)
    return module


def param_groups(
    module: nn.Module, table: str | Parametrization, lr: float, eps: float = 1e-8, weight_decay: float = 0.0
) -> list[dict]:
    """Groups for `torch.optim.AdamW`: every parameter once, with its role and the table's lr, eps and weight_decay.

    The rules are Adam's. Adam's step has the size of the LR whatever the size of the gradient, so the LR alone sets how
    far a weight moves. SGD's step is LR times gradient, and gradients themselves scale with width (1 / fan_in for muP's
    hidden matrices): its LR cells are other monomials (Tensor Programs V, Table 3), and these groups would be wrong.
    Raises ValueError for an lr that is not positive and finite, TypeError for a parameter without a role.
    """
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr must be positive and finite, got {lr!r}")
    table = parametrization(table)
    groups: dict[tuple, dict] = {}
    for _, param in named_roles(module):
        cells = numbers(param, table)
        settings = {
            "role": param.role.name,
            "lr": lr * cells.lr,
            "eps": eps * cells.eps,
            "weight_decay": weight_decay * cells.weight_decay,
        }
        groups.setdefault(tuple(settings.values()), {"params": [], **settings})["params"].append(param)
    return list(groups.values())
