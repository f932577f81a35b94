"""What a parametrization does to each tensor of a model, ours or another, and why."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from html import escape

import pandas as pd
import torch
from torch import nn

from .config import Config, require
from .identity import declared
from .model import MiniMoE
from .parametrization import Parametrization, Rule, require_distinct_names
from .probe import sites
from .roles import AT_BASE, RoleParameter, numbers
from .tables import PARAMETRIZATIONS, parametrization
from .theory import KINDS, MUP_INIT, Growth, as_wanted, kind, kinds, law, predicted_exponents

ROLE_OF_KIND = {"input": "embedding", "hidden": "attention", "output": "unembedding"}  # whose row of muP's table applies
Axes = int | Sequence[int] | None


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

    def param_groups(self, module: nn.Module, lr: float, eps: float = 1e-8, weight_decay: float = 0.0) -> list[dict]:
        """Groups for `torch.optim.AdamW` over the explained module: every parameter with muP's lr, eps and weight_decay.

        The module's forward pass stays as it is: a multiplier is folded into init, LR, eps and decay (the abc symmetry, see
        `tables.shift`). Raises ValueError for an lr that is not positive and finite, or an explanation of a Config.
        """
        require(math.isfinite(lr) and lr > 0, "lr", lr, "must be positive and finite")
        groups: dict[tuple, dict] = {}
        for row in self._of_a_module().itertuples():
            settings = {
                "lr": lr * row.lr * row.multiplier,
                "eps": eps * row.eps / row.multiplier,
                "weight_decay": weight_decay * row.weight_decay / row.multiplier,
            }
            group = groups.setdefault(tuple(settings.values()), {"params": [], "names": [], **settings})
            group["params"].append(module.get_parameter(row.name))
            group["names"].append(row.name)
        return list(groups.values())

    @torch.no_grad()
    def initialise(self, module: nn.Module) -> nn.Module:
        """Scale every parameter of the explained module to the std that muP gives it, from the std that it has in the module
        that `build` made; returns the module. A constant (a gain at 1, a bias at 0) stays as it is."""
        for row in self._of_a_module().itertuples():
            param = module.get_parameter(row.name)
            if std := param.std(correction=0).item():
                param.mul_(row.base_std * row.init_std * row.multiplier / std)
        return module

    def _of_a_module(self) -> pd.DataFrame:
        if "base_std" not in self.columns:
            raise ValueError("this explains a Config: its model has param_groups, and is initialised by itself")
        return pd.DataFrame(self)

    def reasons(self) -> list[str]:
        """One line per distinct reason, with the tensors it holds for."""
        by = "role" if "role" in self.columns else "name"
        return [f"{', '.join(dict.fromkeys(group[by]))}: {why}" for why, group in self.groupby("why", sort=False)]


def explain(
    subject: Config | nn.Module,
    build: Callable[[], nn.Module] | None = None,
    *,
    fan_in: Mapping[str, Axes] | None = None,
    lr: float = 2.0**-6,
) -> Explanation:
    """One row per tensor: what its parametrization gives it, and why.

    subject: a Config or a MiniMoE, explained under its own table. Columns: name, role, kind (of Tensor Programs V, from
    comparing its shape with that of a wider model), shape, fan_in, parameters (their number), flops (of its matrix products
    in one token's forward pass), ratio (fan_in over base fan_in), init_std, multiplier, lr (factor on the base LR),
    effective_lr (what Adam uses at the base LR `lr`), eps and weight_decay (factors) and why.

    Or any other torch module, with `build`, which makes the same model at another width, its base shape: what muP would
    do. There init_std is a factor on the base model's, which is the column base_std, and role and flops are left out; the
    explanation can be applied, by its methods `initialise` and `param_groups`. Layouts are those of torch's
    own layers; for a parameter of another class name the axis (or axes) it sums over in `fan_in`, by name or pattern, None
    for a gain or bias: {"experts.up": 1, "*.norm.weight": None}. Of a stack of experts the expert axis must not grow.

    Raises ValueError, naming the parameter, where the kind is not determined; TypeError for anything else to explain.
    """
    require(math.isfinite(lr) and lr > 0, "lr", lr, "must be positive and finite")
    if isinstance(subject, MiniMoE):
        subject = subject.config
    if isinstance(subject, Config):
        if build is not None or fan_in is not None:
            raise ValueError("build and fan_in are for modules that are not minimoe's: a Config says all itself")
        return Explanation(_rows_of_config(subject, lr))
    if not isinstance(subject, nn.Module):
        raise TypeError(f"explain takes a Config or a torch.nn.Module, got {type(subject).__name__}")
    if build is None:
        raise ValueError("explain needs build, a function that makes the same model at another width")
    return Explanation(_rows_of_module(subject, build, dict(fan_in or {}), lr))


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
    for cell in ("init_std", "multiplier", "lr", "eps", "weight_decay"):
        values = pd.DataFrame({name: rows[cell] for name, rows in explained.items()})
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
                "ratio": role.ratios["fan_in"],
                "init_std": cells.std,
                "multiplier": cells.multiplier,
                "lr": cells.lr,
                "effective_lr": lr * cells.lr,
                "eps": cells.eps,
                "weight_decay": cells.weight_decay,
                "why": why(
                    kind_of[name],
                    _in_width(config.parametrization[role.name]),
                    grows,
                    exponents.get((site_of[name], "allocation"), math.nan),
                    head,
                ),
            }
        )
    return pd.DataFrame(rows)


def _in_width(rule: Rule) -> Rule:
    """The rule with only those ratios that grow with the width."""
    others = dict.fromkeys(rule.ratios - {"fan_in", "width", "expert_width"}, 1.0)
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
    active = config.active_experts if param.ndim == 3 else 1  # stacked experts: (E, fan_in, fan_out)
    return 2 * active * param.shape[-2] * param.shape[-1]


def _rows_of_module(module: nn.Module, build: Callable[[], nn.Module], fan_in: dict[str, Axes], lr: float) -> pd.DataFrame:
    base, owners = dict(build().named_parameters()), _owners(module)
    names = {names[0][0]: names for names in owners}
    if set(names) != set(base):
        only = sorted(set(names) ^ set(base))
        raise ValueError(f"build makes a model of other parameters: {', '.join(only[:5])}{' ...' if len(only) > 5 else ''}")
    known = [name for uses in owners for name, *_ in uses]
    for pattern in fan_in:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(f"fan_in names {pattern!r}, which no parameter matches")
    rows = [_row_of_parameter(uses, base[name], fan_in, lr) for name, uses in names.items()]
    table = pd.DataFrame(rows)
    if (table.kind == "fixed").all():
        raise ValueError("build makes a model of the same shape: give it another width")
    return table


def _owners(module: nn.Module) -> list[list[tuple[str, nn.Module, str, nn.Parameter]]]:
    """For each parameter all its uses: (name, the module that owns it, its name there, itself). Tied ones have several."""
    uses: dict[int, list] = {}
    for path, owner in module.named_modules():
        for leaf, param in owner._parameters.items():
            if param is not None:
                uses.setdefault(id(param), []).append((f"{path}.{leaf}".lstrip("."), owner, leaf, param))
    return list(uses.values())


def _row_of_parameter(uses: list, in_base: nn.Parameter, fan_in: dict[str, Axes], lr: float) -> dict:
    name, _, _, param = uses[0]
    shape, base = tuple(param.shape), tuple(in_base.shape)
    try:
        found = {_kind_and_axes(use, base, fan_in) for use in uses}
        if len({kind for kind, _ in found}) > 1:
            tied = " and ".join(f"{use[0]} ({_kind_and_axes(use, base, fan_in)[0]})" for use in uses)
            raise ValueError(f"it is tied and has two kinds: {tied}; muP has no rule for both: untie it, or name its fan_in")
    except ValueError as error:
        raise ValueError(f"{name} {shape}: {error}") from None
    tensor_kind, axes = min(found)
    size, base_size = (math.prod(sizes[axis] for axis in axes) for sizes in (shape, base))
    rule = PARAMETRIZATIONS["mup"][ROLE_OF_KIND[tensor_kind]] if tensor_kind in ROLE_OF_KIND else Rule()
    ratios = {"fan_in": size / base_size}
    return {
        "name": name,
        "kind": tensor_kind,
        "shape": shape,
        "fan_in": size,
        "parameters": param.numel(),
        "ratio": ratios["fan_in"],
        "base_std": in_base.detach().std(correction=0).item(),
        "init_std": math.sqrt(rule.init_var(ratios)),
        "multiplier": rule.multiplier(ratios),
        "lr": rule.lr(ratios),
        "effective_lr": lr * rule.lr(ratios),
        "eps": rule.eps(ratios),
        "weight_decay": rule.weight_decay(ratios),
        "why": why(tensor_kind, rule, grows=float(size != base_size)),
    }


def _kind_and_axes(use: tuple, base: tuple[int, ...], fan_in: dict[str, Axes]) -> tuple[str, tuple[int, ...]]:
    name, owner, leaf, param = use
    shape = tuple(param.shape)
    given = [axes for pattern, axes in fan_in.items() if fnmatchcase(name, pattern)]
    axes = _normal(given[0], param.ndim) if given else _layout(owner, leaf, param)
    if shape == base:
        return "fixed", axes or ()
    if axes is None:
        raise ValueError(
            f"a parameter of {type(owner).__name__}, whose layout is not known: name the axis it sums over, "
            f"fan_in={{{name!r}: 0}}, or None if it is a gain or bias"
        )
    return kind(shape, base, axes), axes


def _normal(axes: Axes, ndim: int) -> tuple[int, ...]:
    axes = () if axes is None else (axes,) if isinstance(axes, int) else tuple(axes)
    if any(not -ndim <= axis < ndim for axis in axes):
        raise ValueError(f"fan_in={axes}: it has {ndim} axes")
    return tuple(sorted(axis % ndim for axis in axes))


NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def _layout(owner: nn.Module, leaf: str, param: nn.Parameter) -> tuple[int, ...] | None:
    """The axes that a parameter of one of torch's own layers sums over; () for gains and biases, None if unknown."""
    if isinstance(param, RoleParameter):
        return (param.ndim - 2,) if param.ndim > 1 else ()
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag) and leaf == "weight":
        return (0,)  # (vocabulary, width), looked up by row
    if isinstance(owner, nn.Linear | nn.MultiheadAttention) and leaf.endswith("weight"):
        return (1,)  # (out, in)
    if isinstance(owner, nn.modules.conv._ConvTransposeNd) and leaf == "weight":
        return (0, *range(2, param.ndim)) if owner.groups == 1 else None  # (in, out, *kernel); groups leave it open
    if isinstance(owner, nn.modules.conv._ConvNd) and leaf == "weight":
        return tuple(range(1, param.ndim))  # (out, in, *kernel)
    layers = (nn.Linear, nn.MultiheadAttention, nn.modules.conv._ConvNd)
    if isinstance(owner, NORMS) or (isinstance(owner, layers) and leaf in ("bias", "in_proj_bias")):
        return ()
    return None
