"""How a weight gets its numbers: each parameter declares its role, and the table's row for that role says the rest.

    self.router = parameter("router", (width, n_experts), base_shape=(base_width, n_experts))
    initialise(module, PARAMETRIZATIONS["mup"], seed=0)   # draws the weights, registers the multipliers
    torch.optim.AdamW(param_groups(module, PARAMETRIZATIONS["mup"], lr=1e-2))

These functions work on any module whose parameters carry a role. Nothing is read off a parameter's name.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import nn

from .checks import PAIR, finite, not_negative, positive, require, typed
from .parametrization import CELLS, FORWARD_CELLS, SCALES, Parametrization
from .tables import parametrization

AT_BASE = {"batch": 1.0, "duration": 1.0}  # the ratios of a training at its base batch and duration


@dataclass(frozen=True)
class Role:
    """What a parameter declares about itself: its role, and how it relates to the base shape."""

    name: str
    base_std: float  # standard deviation at init in the base model
    ratios: Mapping[str, float] = field(default_factory=dict)  # true over base, for the named ratios that cells may use
    fan_in_axes: tuple[int, ...] = (-2,)  # the axes that its product sums over; none for a gain or a bias
    start: float = 0.0  # the value around which it is drawn: 1 for a gain
    scales: tuple[str, ...] = ()  # roles without a weight whose multipliers, where a table has them, multiply its own
    same_start: bool = False  # whether the parts along its first axis start equal

    def fan_in(self, shape: tuple[int, ...]) -> int:
        """The number of terms in each sum that a parameter of this shape makes; 1 for a gain or a bias."""
        return math.prod(shape[axis] for axis in self.fan_in_axes)

    def fan_out(self, shape: tuple[int, ...]) -> int:
        """The number of outputs of one matrix of a parameter of this shape: its last axis that is not summed over."""
        summed = {axis % len(shape) for axis in self.fan_in_axes}
        return next((size for axis, size in reversed(list(enumerate(shape))) if axis not in summed), 1)


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
    fan_in_axes: tuple[int, ...] | None = None,
    start: float = 0.0,
    scales: tuple[str, ...] = (),
    same_start: bool = False,
) -> RoleParameter:
    """A parameter that declares its role, to be filled by `initialise`. Shape: (..., fan_in, fan_out), used as x @ W.

    base_shape: its shape in the base model (default: the same), which gives the ratio `fan_in`. base_std: its init std
    there (default 1 / sqrt(base fan_in)). ratios: further named ratios that its rule may use, such as {"width": 4.0}.
    fan_in_axes: the axes that its product sums over, for another layout than x @ W; () for a gain or a bias, which then
    needs its base_std, mostly 0. start: the value around which it is drawn, 1 for a gain. scales: of SCALES, the roles without
    a weight that multiply the output of its product, such as ("residual_attention",). same_start: the matrices of a stack all
    start equal to the first.
    Raises ValueError for a parameter without a fan_in and a base_std, for a shape that differs from base_shape in length,
    and for axes that it does not have; ValueError or TypeError for what is no size, no finite number or a negative base_std.
    """
    role = typed("role", "str", role)
    shape, base_shape = (
        _integers(f"{role}: shape", shape),
        _integers(f"{role}: base_shape", shape if base_shape is None else base_shape),
    )
    if len(base_shape) != len(shape):
        raise ValueError(f"{role}: shape {shape} and base shape {base_shape} differ in their number of axes")
    if any(size < 1 for size in (*shape, *base_shape)):
        raise ValueError(f"{role}: the sizes in a shape must be positive, got {shape} with base_shape {base_shape}")
    axes = (-2,) if len(shape) >= 2 else ()
    if fan_in_axes is not None:
        axes = _integers(f"{role}: fan_in_axes", fan_in_axes)
    if any(not -len(shape) <= axis < len(shape) for axis in axes):
        raise ValueError(f"{role}: fan_in_axes={axes}, but a parameter of shape {shape} has {len(shape)} axes")
    ratios = _positive_ratios(f"{role}: ratios", ratios)
    declared = Role(role, 0.0, ratios, axes, finite(f"{role}: start", start))
    require(set(scales) <= set(SCALES), f"{role}: scales", scales, f"must be of {', '.join(SCALES)}")
    if axes:
        ratios["fan_in"] = declared.fan_in(shape) / declared.fan_in(base_shape)
    elif base_std is None:
        raise ValueError(f"{role}: a parameter of shape {shape} has no fan_in; give its base_std")
    std = 1 / math.sqrt(declared.fan_in(base_shape)) if base_std is None else not_negative(f"{role}: base_std", base_std)
    made = RoleParameter(torch.zeros(shape, dtype=torch.float32))  # whatever torch's default is: it is in no run's key
    made.role = replace(declared, base_std=std, scales=tuple(scales), same_start=typed(f"{role}: same_start", "bool", same_start))
    return made


def _integers(name: str, values: Iterable[int]) -> tuple[int, ...]:
    several = isinstance(values, Iterable) and not isinstance(values, str) and getattr(values, "ndim", 1) == 1
    require(several, name, values, "must be several integers")
    return tuple(typed(name, "int", value) for value in values)


def _positive_ratios(name: str, ratios: Mapping[str, float] | None) -> dict[str, float]:
    require(ratios is None or isinstance(ratios, Mapping), name, ratios, "must be name -> number")
    return {typed(name, "str", ratio): positive(f"{name}[{ratio!r}]", value) for ratio, value in (ratios or {}).items()}


class Numbers(NamedTuple):
    """The evaluated cells of one tensor: what training can tell apart of a parametrization."""

    std: float  # init std
    multiplier: float
    lr: float  # factor on the base LR; likewise eps and weight_decay
    eps: float
    weight_decay: float
    one_minus_beta: float  # factor on 1 - beta
    final_lr: float  # factor on the end of the schedule


def _evaluated(param: nn.Parameter, table: Parametrization, ratios: Mapping[str, float], cells: tuple[str, ...]) -> dict:
    rule, known = table[param.role.name], {**param.role.ratios, **ratios}
    values = {cell: getattr(rule, cell)(known) for cell in cells}
    for scale in param.role.scales:
        if scale in table:
            values["multiplier"] *= table[scale].multiplier(known)
    return {"std": param.role.base_std * math.sqrt(values.pop("init_var")), **values}


def numbers(param: nn.Parameter, table: Parametrization, training: Mapping[str, float] | None = None) -> Numbers:
    """The table's cells evaluated for one parameter. training: the ratios `batch` and `duration`, for cells that use them.

    Raises KeyError where its role or a ratio is missing.
    """
    return Numbers(**_evaluated(param, table, training or {}, CELLS))


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
    A parameter whose std is 0 gets its role's start. The same seed draws the same standard normals under every table.
    Raises TypeError for a parameter without a role.
    """
    table = parametrization(table)
    generator = torch.Generator("cpu").manual_seed(seed)
    for name, param in list(named_roles(module)):
        cells = _evaluated(param, table, {}, FORWARD_CELLS)
        if not param.is_meta:  # a meta module has shapes and roles but no values
            normal = torch.randn(param.shape, generator=generator, dtype=param.dtype, device="cpu")
            normal = normal[:1] if param.role.same_start else normal
            param.copy_(normal * cells["std"] + param.role.start)
        path, _, leaf = name.rpartition(".")
        multiplier = torch.tensor(cells["multiplier"], dtype=param.dtype, device=param.device)
        module.get_submodule(path).register_buffer(f"{leaf}_multiplier", multiplier)
    return module


def param_groups(
    module: nn.Module,
    table: str | Parametrization,
    lr: float,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    betas: tuple[float, float] | None = None,
    training: Mapping[str, float] | None = None,
) -> list[dict]:
    """Groups for `torch.optim.AdamW`: every parameter once, with its role and the table's lr, eps and weight_decay.

    betas: Adam's at the base; given, each group carries the table's. training: the ratios `batch` and `duration`, for
    cells that use them. A group whose row changes the end of its schedule carries the factor as `final_lr`, for a scheduler of
    yours: it should end at final_lr times the usual fraction of the group's own lr.

    The rules are Adam's. Adam's step has the size of the LR whatever the size of the gradient, so the LR alone sets how
    far a weight moves. SGD's step is LR times gradient, and gradients themselves scale with width (1 / fan_in for muP's
    hidden matrices): its LR cells are other monomials (Tensor Programs V, Table 3), and these groups would be wrong.
    Raises ValueError or TypeError for an lr that is not positive and finite, an eps or a weight decay that is negative, or
    betas out of [0, 1); ValueError for a beta that the table makes negative; TypeError for a parameter without a role.
    """
    lr, eps, weight_decay = positive("lr", lr), not_negative("eps", eps), not_negative("weight_decay", weight_decay)
    if betas is not None:
        betas = typed("betas", PAIR, betas)
        require(all(0 <= beta < 1 for beta in betas), "betas", betas, "must be two in [0, 1)")
    training = _positive_ratios("training", training)
    table = parametrization(table)
    groups: dict[tuple, dict] = {}
    for _, param in named_roles(module):
        cells = numbers(param, table, training)
        if cells.one_minus_beta != 1 and betas is None:
            raise ValueError(f"{param.role.name}: its row changes Adam's betas: give those of the base, betas=(0.9, 0.95)")
        settings = {
            "role": param.role.name,
            "lr": lr * cells.lr,
            "eps": eps * cells.eps,
            "weight_decay": weight_decay * cells.weight_decay,
        }
        if betas is not None:
            settings["betas"] = moved_betas(betas, cells.one_minus_beta)
        if cells.final_lr != 1:
            settings["final_lr"] = cells.final_lr
        groups.setdefault(tuple(settings.values()), {"params": [], **settings})["params"].append(param)
    return list(groups.values())


def moved_betas(betas: tuple[float, float], one_minus_beta: float) -> tuple[float, float]:
    """Adam's betas, with 1 - beta multiplied. Raises ValueError where that makes a beta negative."""
    moved = tuple(beta if one_minus_beta == 1 else 1 - (1 - beta) * one_minus_beta for beta in betas)
    if min(moved) < 0:
        raise ValueError(f"one_minus_beta={one_minus_beta:g} makes a beta of {min(moved):g} out of {betas}: give larger betas")
    return moved
