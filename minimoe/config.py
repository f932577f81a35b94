"""A model's shape, rules and seed; what makes two of them the same; and the points of a grid of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import product
from types import SimpleNamespace

from .checks import LIMIT, not_negative, require, shown, typed
from .parametrization import SCALES, TRAINING, Parametrization
from .tables import parametrization

ACTIVATIONS = ("relu", "gelu", "swiglu")
ROLES = ("embedding", "unembedding", "attention", "attention_out", "experts_up", "experts_down", "router")  # of the model
GATES = ("softmax", "renormalized", "sigmoid", "renormalized sigmoid")
RENORMALIZED = ("renormalized", "renormalized sigmoid")  # a token's gates sum to 1
SIGMOID = ("sigmoid", "renormalized sigmoid")  # a score looks at its own expert alone
SIZES = ("width", "depth", "n_experts", "top_k", "granularity", "expert_ratio")
BASED = (*SIZES, "n_shared")  # what has a base value
RATIOS = (*SIZES, "expert_width", "active_width")  # true over base, for the cells of a table
SMALLEST_IS_BASE = ("depth", "n_experts", "top_k", "expert_ratio")  # in a check in which they grow, unless a base is given

# Fields that Config has got since the first shipped runs (store format 2), each with the value that changes nothing. A
# field counts in a run's identity only where it differs from that value: a new feature never makes an old run another one.
NEUTRAL: dict[str, object] = {"bias_rate": 0.0, "gains": False, "n_shared": 0, "same_start": False}


@dataclass(frozen=True)
class Config:
    """A model's shape, rules and seed; nothing about training.

    Checked once, here: a ValueError or TypeError names the field, its value and what would be valid.
    """

    parametrization: str | Parametrization = "mup"  # a name in PARAMETRIZATIONS, or a table of your own
    width: int = 64  # D, size of the residual stream
    depth: int = 2  # L, number of blocks
    head_size: int = 16  # C, fixed while the width grows, so that heads = width / head_size
    n_experts: int = 8  # experts per block at granularity 1; 1 is a dense model
    top_k: int = 2  # experts that serve one token at granularity 1
    granularity: int = 1  # G: n_experts * G experts, top_k * G active, hidden size / G (arXiv 2402.07871)
    expert_ratio: int = 2  # expert hidden size over width, at granularity 1
    n_shared: int = 0  # further experts of this size that serve every token, at granularity 1
    activation: str = "relu"  # relu, gelu, or swiglu (a third matrix, stored beside the up projection)
    gates: str = "softmax"  # or sigmoid: each by itself; renormalized, or renormalized sigmoid: the active experts' sum to 1
    bias_rate: float = 0.0  # the choice is by score plus bias, and the load moves the bias at this rate; 0: no bias
    gains: bool = False  # each norm is followed by a gain
    same_start: bool = False  # all routed experts of a block start from the same weights
    forced_balance: bool = False  # debugging and teaching: tokens go round the experts in turn, gates stay the router's
    balance_weight: float = 0.01  # weight of the balance loss, which is 1 at perfect balance for every E, K, G
    z_weight: float = 0.0  # weight of the router z-loss, mean logsumexp(router logits)^2 (arXiv 2202.08906)
    vocab_size: int = 96  # V: newline and printable ASCII, the pydocs corpus
    context: int = 64  # longest sequence
    seed: int = 0  # of the initial weights
    base_width: int = 32  # the base shape, where all parametrizations are the same run
    base_depth: int | None = None  # None: the config's own value
    base_n_experts: int | None = None  # likewise
    base_top_k: int | None = None  # likewise
    base_granularity: int | None = None  # likewise
    base_expert_ratio: int | None = None  # likewise
    base_n_shared: int | None = None  # likewise

    def __post_init__(self):
        object.__setattr__(self, "parametrization", parametrization(self.parametrization))
        for f in fields(self):
            object.__setattr__(self, f.name, typed(f.name, f.type, getattr(self, f.name)))
        _check(self)

    @property
    def experts(self) -> int:  # E
        return self.n_experts * self.granularity

    @property
    def active_experts(self) -> int:  # K
        return self.top_k * self.granularity

    @property
    def shared_experts(self) -> int:  # S
        return self.n_shared * self.granularity

    @property
    def expert_width(self) -> int:  # M
        return self.expert_ratio * self.width // self.granularity

    @property
    def active_width(self) -> int:  # hidden values that serve one token: H_act of Complete-muE
        return (self.active_experts + self.shared_experts) * self.expert_width

    @property
    def gates_sum_to_1(self) -> bool:  # whatever the router says
        return self.gates in RENORMALIZED or (self.gates == "softmax" and self.active_experts == self.experts)

    @property
    def shape(self) -> dict:
        """Every field that shapes the computation: all but the table, the base sizes and the seed. Configs of one shape
        can be trained as one program."""
        left_out = ("parametrization", "seed", *(f"base_{name}" for name in BASED))
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}

    @property
    def base(self) -> Config:
        """The config at the base shape, where every ratio is 1."""
        return replace(self, **{name: self.base_size(name) for name in BASED})

    def base_size(self, name: str) -> int:
        """The base shape's value of one of BASED."""
        size = getattr(self, f"base_{name}")
        return getattr(self, name) if size is None else size

    @property
    def ratios(self) -> dict[str, float]:
        """True over base, for the named ratios that a cell may use (`fan_in` is each tensor's own)."""
        base = self.base
        return {name: getattr(self, name) / getattr(base, name) for name in RATIOS}


def differing(values: Mapping[str, object], neutral: Mapping[str, object]) -> dict:
    """The values without those that are neutral: what counts in a run's identity."""
    return {name: value for name, value in values.items() if name not in neutral or value != neutral[name]}


def shape_in_key(config: Config) -> dict:
    """The shape as it counts in a run's identity: without what is neutral, and as the first shipped runs had it."""
    shape = differing(config.shape, NEUTRAL)
    gates = shape.pop("gates")  # these runs had `renormalize` in its place
    return shape | {"renormalize": gates == "renormalized"} | ({"gates": gates} if gates in SIGMOID else {})


def _check(c: Config) -> None:
    for f in fields(c):
        value = getattr(c, f.name)
        if f.name == "seed":
            require(0 <= value < LIMIT, f.name, value, "must be an integer from 0 to 2^63 - 1")
        elif f.type.startswith("int"):
            least, rule = (0, "a non-negative") if f.name.endswith("n_shared") else (1, "a positive")
            require(value is None or least <= value < LIMIT, f.name, value, f"must be {rule} integer below 2^63")
        elif f.type == "float":
            not_negative(f.name, value)
    for name, known in (("activation", ACTIVATIONS), ("gates", GATES)):
        require(getattr(c, name) in known, name, getattr(c, name), f"must be one of {', '.join(known)}")
    moved = not (c.bias_rate and c.forced_balance)
    require(moved, "bias_rate", c.bias_rate, "forced_balance takes no choice, so there is no bias to move")
    for base, size in (("", lambda name: getattr(c, name)), ("base_", c.base_size)):  # the base is a model too
        hidden = size("expert_ratio") * size("width")
        wide, finer = size("width"), size("granularity")
        require(wide % c.head_size == 0, f"{base}width", wide, f"must be a multiple of head_size={c.head_size}")
        most = f"must be at most {base}n_experts={size('n_experts')}"
        require(size("top_k") <= size("n_experts"), f"{base}top_k", size("top_k"), most)
        rule = f"must divide the experts' hidden size, {base}expert_ratio * {base}width = {hidden}"
        require(hidden % finer == 0, f"{base}granularity", finer, rule)
        learns = c.gates not in RENORMALIZED or size("top_k") * finer > 1 or size("n_experts") == 1
        rule = f"with {base}top_k * {base}granularity = 1 the gate is always 1: no task gradient would reach the router"
        require(learns, "gates", c.gates, rule)
    _check_table(c.parametrization, c.gains)
    tied = c.parametrization["router"].init_var.coefficient == 0 and c.active_experts < c.experts and not c.forced_balance
    rule = "a router that starts at 0 gives all experts one score, so that the same experts would serve every token"
    require(not tied, "router.init_var", 0, rule)
    learns = not (c.same_start and c.gates_sum_to_1 and c.experts > 1)
    rule = "gates that sum to 1 would add equal experts up to one of them: no task gradient would reach the router"
    require(learns, "same_start", c.same_start, rule)


def _check_table(table: Parametrization, gains: bool) -> None:
    roles = (*ROLES, "gain", "final_gain") if gains else ROLES
    missing = [role for role in roles if role not in table]
    if missing:
        raise ValueError(f"parametrization {table.name!r} has no rule for {', '.join(missing)}")
    known = {"fan_in", *RATIOS, *TRAINING}
    roles = (*roles, *(scale for scale in SCALES if scale in table))
    unknown = {name for role in roles for name in table[role].ratios} - known
    if unknown:
        raise ValueError(f"parametrization {table.name!r} uses the unknown ratio {', '.join(sorted(unknown))}")


def config_to_dict(config: Config) -> dict:
    """The config as plain JSON, its table by value."""
    plain = {f.name: getattr(config, f.name) for f in fields(config)}
    return {**plain, "parametrization": config.parametrization.to_dict()}


def config_from_dict(data: dict) -> Config:
    """The config that `config_to_dict` wrote, in this version or an older one.

    A field that the data lack had its neutral value when they were written, whatever its default is today.
    """
    return _checked_config(json.dumps(data))


@lru_cache(maxsize=4096)  # a sweep's rows share their configs, and checking one takes longer than reading its row
def _checked_config(text: str) -> Config:
    data = NEUTRAL | json.loads(text)
    if "renormalize" in data:  # an older version's field, in place of `gates`
        data["gates"] = "renormalized" if data.pop("renormalize") else "softmax"
    if data.pop("balance_times_k", False):  # until version 0.2: a balance loss that counted each token K times
        data["balance_weight"] *= data["top_k"] * data["granularity"]
    return Config(**{**data, "parametrization": Parametrization.from_dict(data["parametrization"])})


Axis = object  # one value, several (an iterable that is no text), or a function of the sizes that gives one


def points(axes: Mapping[str, Axis], path: Mapping[str, Iterable] | None = None) -> list[dict]:
    """Every combination of the axes' values, the last axis fastest: name -> value for each point.

    An axis is one value, several, or a function of the point's sizes, as in `top_k=lambda size: size.n_experts // 4`;
    the function sees all other fields of Config. path: sizes that grow together, name -> values of equal number:
    `{"width": (32, 64), "n_experts": (4, 8)}` gives two points, and not four.
    Raises ValueError for an axis without values, a path of unequal lengths, or a name in both.
    """
    functions = {name: value for name, value in axes.items() if callable(value)}
    listed = {name: several(name, value) for name, value in axes.items() if name not in functions}
    require(path is None or isinstance(path, Mapping), "path", path, "must be name -> values")
    together = {name: _listed(name, value) for name, value in (path or {}).items()}
    if both := sorted(set(together) & set(axes)):
        raise ValueError(f"{', '.join(both)}: give it on the path or by itself, not both")
    if len({len(values) for values in together.values()}) > 1:
        counts = ", ".join(f"{len(values)} of {name}" for name, values in together.items())
        raise ValueError(f"the sizes of a path grow together, so each needs as many values as the others: got {counts}")
    steps = [dict(zip(together, values, strict=True)) for values in zip(*together.values(), strict=True)] if together else [{}]
    found = [step | dict(zip(listed, values, strict=True)) for step in steps for values in product(*listed.values())]
    defaults = {f.name: f.default for f in fields(Config)}
    return [point | {name: f(SimpleNamespace(**defaults | point)) for name, f in functions.items()} for point in found]


def several(name: str, values: Axis) -> list:
    """The distinct values of an axis, in order: of one value, a list of it. Raises ValueError if there are none."""
    try:
        return [*dict.fromkeys(_listed(name, values))]
    except TypeError:  # a list in the list
        raise TypeError(f"{name}={shown(values)}: must be one value or several") from None


def _listed(name: str, values: Axis) -> list:
    alone = isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0
    listed = [values] if alone else list(values)
    if not listed:
        raise ValueError(f"{name} is empty: give at least one value")
    return listed
