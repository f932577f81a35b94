"""Parametrizations as data: which numbers belong to which role, and how they move with the shape.

A parametrization is a table. For each *role* (embedding, attention, router, ...) a `Rule` holds seven cells, and each cell
is a coefficient times a monomial in *ratios* to a base run:

    Rule(init_var=1, multiplier=1 / fan_in, lr=1)         # muP's router

`fan_in` here is not a size but a ratio, true fan_in / base fan_in. At the base run every cell is therefore just its
coefficient, and every parametrization is the same run, bit for bit. `tables.py` has the published tables; `roles.py` puts
a table to work on a module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from dataclasses import replace as dataclass_replace
from numbers import Real

from .checks import finite, not_negative, require, shown, typed


@dataclass(frozen=True)
class Monomial:
    """A coefficient times powers of named ratios, e.g. `2 / fan_in`; calling it with the ratios gives a number."""

    coefficient: float = 1.0
    powers: tuple[tuple[str, float], ...] = ()  # ((ratio's name, exponent), ...), sorted, no zero exponents

    def __post_init__(self):
        object.__setattr__(self, "coefficient", not_negative("a cell's coefficient", self.coefficient))
        object.__setattr__(self, "powers", _sorted_powers(self.powers))

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
        return Monomial(self.coefficient * other.coefficient, tuple(powers.items()))

    __rmul__ = __mul__

    def __pow__(self, exponent: float) -> Monomial:
        exponent = finite("a cell's exponent", exponent)
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


def _sorted_powers(powers: Iterable[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    """((ratio's name, exponent), ...), sorted, without zero exponents. Raises ValueError or TypeError."""
    try:
        pairs = [(name, exponent) for name, exponent in powers]
    except (TypeError, ValueError):
        raise TypeError(f"powers={shown(powers)}: must be pairs of a ratio's name and an exponent") from None
    found = {typed("a ratio's name", "str", name): finite(f"the power of {shown(name)}", exponent) for name, exponent in pairs}
    require(len(found) == len(pairs), "powers", powers, "a ratio is there twice")
    return tuple(sorted((name, exponent) for name, exponent in found.items() if exponent))


def _short(value: float) -> str:
    """The shortest text that reads back as the same number: 1, 0.25, 1e-08."""
    return repr(float(value)).removesuffix(".0")


def as_monomial(value: Monomial | float, name: str = "value") -> Monomial:
    """The cell that a plain number stands for; a Monomial passes through. name: of the cell, for errors."""
    if isinstance(value, Monomial):
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={shown(value)}: a cell is a number or a monomial such as 1 / fan_in")
    return Monomial(not_negative(name, value))


def ratio(name: str) -> Monomial:
    """The monomial of one named ratio, true value / base value."""
    return Monomial(powers=((name, 1.0),))


fan_in = ratio("fan_in")  # of the tensor in question: the axes that its product sums over
width = ratio("width")
depth = ratio("depth")
n_experts = ratio("n_experts")
top_k = ratio("top_k")
granularity = ratio("granularity")
expert_width = ratio("expert_width")  # hidden size M of one expert
active_width = ratio("active_width")  # hidden values that serve one token, of shared experts too
batch = ratio("batch")  # sequences in a batch: m_B in Complete(d)P, arXiv 2512.22382
duration = ratio("duration")  # tokens seen in the whole training: m_D there
TRAINING = ("batch", "duration")  # ratios of the training, not of the model's shape


@dataclass(frozen=True)
class Rule:
    """One role's seven cells, each a number or a `Monomial`.

    init_var: variance at init, relative to the base variance. multiplier: what the forward pass multiplies the weight
    by. lr, eps, weight_decay: Adam's, relative to the base values given to `param_groups`. one_minus_beta: the factor on
    1 - beta, for both of Adam's betas. final_lr: the factor on the end of the schedule, which is a fraction of the role's own
    peak LR; a number, because one schedule serves a role at all sizes.
    """

    init_var: Monomial = 1.0
    multiplier: Monomial = 1.0
    lr: Monomial = 1.0
    eps: Monomial = 1.0
    weight_decay: Monomial = 1.0
    one_minus_beta: Monomial = 1.0
    final_lr: Monomial = 1.0

    def __post_init__(self):
        for cell in fields(self):
            object.__setattr__(self, cell.name, as_monomial(getattr(self, cell.name), cell.name))
        for cell in FORWARD_CELLS:
            if used := {name for name, _ in getattr(self, cell).powers} & set(TRAINING):
                raise ValueError(f"{cell} cannot depend on {', '.join(sorted(used))}: the model is made before its training")
        require(not self.final_lr.powers, "final_lr", self.final_lr, "must be a number: one schedule serves a role at all sizes")

    def __repr__(self) -> str:
        """As it is written in a table, with the five cells that are always printed."""
        shown = (cell for cell in CELLS if cell in PRINTED or getattr(self, cell) != as_monomial(1))
        return f"Rule({', '.join(f'{cell}={getattr(self, cell)!r}' for cell in shown)})"

    @property
    def ratios(self) -> set[str]:
        """The named ratios that its cells use."""
        return {name for cell in fields(self) for name, _ in getattr(self, cell.name).powers}


FORWARD_CELLS = ("init_var", "multiplier")  # what the model itself is made with
CELLS = tuple(cell.name for cell in fields(Rule))
PRINTED = CELLS[:5]  # always; a further cell is printed where it is not 1

# A finer role takes the row of its family where a table has no row for it: published tables have one column for q, k, v
# and the output projection; a shared expert is an expert; gains and biases are what a lookup is, a vector per input
# ("input weights and all biases", Tensor Programs V, Table 3).
FAMILY = {
    "attention_out": "attention",
    "shared_up": "experts_up",
    "shared_down": "experts_down",
    "gain": "embedding",
    "final_gain": "gain",  # of the last norm, before the unembedding
    "bias": "embedding",
    "residual_attention": "residual",
    "residual_moe": "residual",
}

# Roles without a weight: the multiplier of a residual branch, and that of the routed sum inside the mixture. Each is folded
# into the multiplier of the last weight of its branch (see `Role.scales`), which is the same function and the same training.
SCALES = ("residual", "residual_attention", "residual_moe", "routed")


def nearest(role: str, known: Iterable[str]) -> str | None:
    """The role itself, or the nearest one of its family, that is known; None if there is none."""
    while role is not None and role not in known:
        role = FAMILY.get(role)
    return role


@dataclass(frozen=True, repr=False)
class Parametrization:
    """A named table: role -> Rule. Printing it shows it as the paper does; `replace` edits one role's cells.

    A role of FAMILY needs no row of its own: `table["attention_out"]` is the row `attention` unless the table says more.
    """

    name: str
    rules: tuple[tuple[str, Rule], ...]  # a mapping is accepted
    origin: str | None = field(default=None, compare=False)  # the name of the table that was edited
    edits: tuple[tuple[str, str], ...] = field(default=(), compare=False)  # (role.cell, its new value), in order

    def __post_init__(self):
        typed("name", "str", self.name)
        try:
            rules = dict(self.rules)
        except (TypeError, ValueError):
            raise TypeError(f"rules={shown(self.rules)}: must be role -> Rule") from None
        for role, rule in rules.items():
            typed("role", "str", role)
            if not isinstance(rule, Rule):
                raise TypeError(f"role {role!r} of parametrization {self.name!r} needs a Rule, got {rule!r}")
            if role in SCALES and rule != Rule(multiplier=rule.multiplier):
                raise ValueError(f"role {role!r} of parametrization {self.name!r} has no weight: give its multiplier alone")
        object.__setattr__(self, "rules", tuple(rules.items()))

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that have a row of their own."""
        return tuple(role for role, _ in self.rules)

    def row(self, role: str) -> str:
        """The role whose row serves this one: itself, or its family. Raises KeyError if the table has neither."""
        served = self._row_or_none(role)
        if served is None:
            raise KeyError(f"parametrization {self.name!r} has no role {role!r}; it has {', '.join(self.roles)}")
        return served

    def _row_or_none(self, role: str) -> str | None:
        return nearest(role, self.roles)

    def final_lrs(self, roles: Iterable[str]) -> dict[str, float]:
        """role -> the factor on the end of its schedule. Raises KeyError for a role that the table does not serve."""
        return {role: self[role].final_lr.coefficient for role in roles}

    def __getitem__(self, role: str) -> Rule:
        return dict(self.rules)[self.row(role)]

    def __contains__(self, role: str) -> bool:
        return self._row_or_none(role) is not None

    def same_rules(self, other: Parametrization) -> bool:
        """Whether both tables give every role the same rule, however finely each is written."""
        roles = {*self.roles, *other.roles}
        return all(role in self and role in other and self[role] == other[role] for role in roles)

    def replace(self, role: str, name: str | None = None, **cells: Monomial | float) -> Parametrization:
        """The same table with some cells of one role changed; unless given a name, it names itself by its edits, e.g.
        `simplep[router.lr=1/fan_in]`. A role that has no row of its own gets one.

        Raises KeyError for an unknown role and TypeError for an unknown cell.
        """
        unknown = sorted(set(cells) - set(CELLS))
        if unknown or not cells:
            raise TypeError(f"replace changes at least one of the cells {', '.join(CELLS)}; got {unknown or 'none'}")
        row, changed = self.row(role), dataclass_replace(self[role], **cells)
        origin, edits = self.origin or self.name, ()
        if name is None:
            edits = dict(self.edits) | {f"{role}.{cell}": str(getattr(changed, cell)) for cell in cells}
            name = f"{origin}[{','.join(f'{cell}={value}' for cell, value in edits.items())}]"
        else:
            origin = None
        rules = []
        for known, rule in self.rules:
            rules.append((known, changed if known == role else rule))
            if known == row != role:
                rules.append((role, changed))
        return Parametrization(name, tuple(rules), origin, tuple(dict(edits).items()))

    def shift(self, role: str, t: Monomial | float, name: str | None = None) -> Parametrization:
        """The same training in another notation; see `tables.shift`."""
        t = as_monomial(t)
        if t.coefficient == 0:
            raise ValueError("t must not be 0")
        rule = self[role]
        changed = {"init_var": rule.init_var / t**2, "multiplier": rule.multiplier * t, "lr": rule.lr / t}
        return self.replace(role, name, **changed, eps=rule.eps * t, weight_decay=rule.weight_decay * t)

    def __repr__(self) -> str:
        return f"<Parametrization {self.name}>"

    def __str__(self) -> str:
        columns = list(_columns(self))
        cells = [cell for cell in CELLS if cell in PRINTED or any(getattr(rule, cell) != Monomial() for _, rule in columns)]
        rows = [[""] + [title for title, _ in columns]]
        rows += [[cell] + [_shown_cell(role, rule, cell) for role, rule in columns] for cell in cells]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(text.ljust(size) for text, size in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([self.name, *lines])

    def to_dict(self) -> dict:
        """Plain JSON: {"name", "rules": {role: {cell: [coefficient, {ratio: exponent}]}}}."""
        rules = {role: {cell: _monomial_to_json(getattr(rule, cell)) for cell in _written(rule)} for role, rule in self.rules}
        return {"name": self.name, "rules": rules}

    @classmethod
    def from_dict(cls, data: dict) -> Parametrization:
        """The table that `to_dict` wrote, in this version or an older one: a cell that it lacks is 1.

        Raises ValueError or TypeError for other data.
        """

        try:
            rules = {
                role: {cell: (c, tuple(p.items())) for cell, (c, p) in cells.items()} for role, cells in data["rules"].items()
            }
            name = data["name"]
        except (TypeError, ValueError, KeyError, AttributeError):
            wanted = "{name, rules: {role: {cell: [coefficient, {ratio: exponent}]}}}"
            raise ValueError(f"a table is {wanted}, got {shown(data)}") from None
        return cls(name, {role: Rule(**{cell: Monomial(*pair) for cell, pair in cells.items()}) for role, cells in rules.items()})


def _written(rule: Rule) -> list[str]:
    """The cells that a file has of a rule: `final_lr` only where it is not 1, so that older lines are what they were."""
    return [cell for cell in CELLS if cell != "final_lr" or rule.final_lr != Monomial()]


def _monomial_to_json(cell: Monomial) -> list:
    return [cell.coefficient, dict(cell.powers)]


def _shown_cell(role: str, rule: Rule, cell: str) -> str:
    """A cell in a printed table; of a role without a weight, its multiplier alone."""
    return "" if role in SCALES and cell != "multiplier" else str(getattr(rule, cell))


def _columns(table: Parametrization) -> Iterator[tuple[str, Rule]]:
    """(title, rule) per printed column. Roles `x_up` and `x_down` share the column `x` where their rules agree, and a role
    whose rule is its family's has no column of its own."""
    rules = dict(table.rules)
    for role, rule in table.rules:
        stem = role.removesuffix("_up").removesuffix("_down")
        pair = (rules.get(f"{stem}_up"), rules.get(f"{stem}_down"))
        if role in FAMILY and rule == rules.get(FAMILY[role]):
            continue
        if role == stem or pair[0] != pair[1]:
            yield role, rule
        elif role.endswith("_up"):
            yield stem, rule


class TwoTables(ValueError):
    """Two different tables carry one name: rows are told apart by the name."""

    def __init__(self, name: str):
        super().__init__(f"two different tables are called {name!r}: give one of them another name")


def require_distinct_names(tables: Iterable[Parametrization]) -> None:
    """Raise TwoTables if two different tables carry one name."""
    first: dict[str, Parametrization] = {}
    for table in tables:
        if not first.setdefault(table.name, table).same_rules(table):
            raise TwoTables(table.name)
