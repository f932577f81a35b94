"""Which role each parameter of a model of others has, by what its forward pass does with it; or why none can be told.

    adopted(wide, base, (trace of base, trace of wide), {})    # one Adopted per trainable parameter; raises Refused

What reaches a `topk` is a router. What reaches the logits is the readout. A stack of matrices, or a matrix whose input rows a
router has picked, is an expert. A factor of a product of two activations is attention. A kind is which axes grow between two
widths, and which of them the product sums over. What use and shapes leave open is refused, with the remedy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from .checks import require
from .modules import layer_of
from .theory import kind as kind_of
from .traces import Origin, Trace, Use

MATRICES = ("hidden", "attention", "attention_out", "experts_up", "experts_down", "shared_up", "shared_down")
VECTORS = ("gain", "bias")
ROLES = ("embedding", "unembedding", "tied", "router", *MATRICES, *VECTORS)
Given = tuple[str, tuple[int, ...] | None]  # a role named by hand, and the axes that its product sums over
HOWS = {"product", "lookup", "convolution", "elementwise"}


class Refused(ValueError):
    """The use and the shapes of some parameters leave their role or kind open, or a table has no rule for them."""

    def __init__(self, problems: Iterable[str]):
        super().__init__("\n".join(problems))


class Adopted(NamedTuple):
    """One parameter: what it is."""

    name: str
    tensor: str  # the name with * for the layer, as in a check
    role: str  # one of ROLES
    kind: str  # one of theory.KINDS
    shape: tuple[int, ...]
    base_shape: tuple[int, ...]
    axes: tuple[int, ...]  # that its product sums over
    base_terms: int  # of each sum in the base model

    @property
    def ratio(self) -> float:
        """fan_in over base fan_in."""
        return math.prod(self.shape[axis] for axis in self.axes) / math.prod(self.base_shape[axis] for axis in self.axes)

    @property
    def terms(self) -> int:
        """fan_in: of each sum."""
        return round(self.base_terms * self.ratio)

    @property
    def row(self) -> str:
        """The role whose row of a table serves it, by its kind first: of a fixed size, no row. A matrix between two fixed ranks
        and the width is an input or an output weight, whatever it is for."""
        if self.kind == "fixed":
            return ""
        own, other = {
            "input": (("embedding", *VECTORS), "embedding"),
            "output": (("router", "unembedding"), "unembedding"),
            "hidden": (MATRICES[1:], "attention"),
        }[self.kind]
        return "embedding" if self.role == "tied" else self.role if self.role in own else other


def given_roles(roles: Mapping[str, str | Given]) -> dict[str, Given]:
    """Name or pattern -> (role, axes or None), checked."""
    found = {}
    for pattern, value in roles.items():
        role, axes = value if isinstance(value, tuple) else (value, None)
        require(role in ROLES, f"roles[{pattern!r}]", role, f"must be one of {', '.join(ROLES)}")
        found[pattern] = role, None if axes is None else tuple(axes)
    return found


def adopted(
    wide: nn.Module, base: nn.Module, traces: Sequence[Trace], given: Mapping[str, Given], adjusted: Iterable[float] = ()
) -> list[Adopted]:
    """What each trainable parameter is. traces: of the base model and of the wide one. adjusted: numbers in the wide model's
    forward pass that the plan will set right. Raises Refused."""
    before, after = (dict(module.named_parameters()) for module in (base, wide))
    if set(before) != set(after):
        only = sorted(set(before) ^ set(after))
        raise Refused([f"build makes models of other parameters: {', '.join(only[:5])}{' ...' if len(only) > 5 else ''}"])
    for pattern in given:
        require(any(fnmatchcase(name, pattern) for name in after), "roles", pattern, "no parameter has such a name")
    roles, found, problems = _Roles(base, traces[0]), [], list(_scaled_by_the_model(*traces, adjusted))
    for name, param in after.items():
        if not param.requires_grad:
            continue
        shapes = tuple(param.shape), tuple(before[name].shape)
        role, axes = next((value for pattern, value in given.items() if fnmatchcase(name, pattern)), (None, None))
        try:
            role = role or roles.role(name, len(shapes[0]))
            axes, terms = _sum(role, axes, shapes, *(trace.uses.get(name, []) for trace in traces))
            kind = kind_of(*shapes, axes) if role not in VECTORS else "fixed" if shapes[0] == shapes[1] else "input"
            found.append(Adopted(name, layer_of(base, name)[1], role, kind, *shapes, axes, terms))
        except ValueError as error:
            problems.append(f"{name} {shapes[0]}: {error}")
    stacks = {own.name for own in found if own.role.startswith("experts") and len(own.shape) > 2} - set(roles.trace.mixing)
    if stacks and not any(own.role == "router" for own in found) and not given:
        problems.append(f"{', '.join(sorted(stacks))}: stacks of matrices, and nothing chooses among them: name their roles")
    if not problems and all(own.kind == "fixed" for own in found):
        problems.append("build makes a model of the same shape at both widths")
    if problems:
        raise Refused(problems)
    return found


def _sum(role: str, axes: tuple[int, ...] | None, shapes: Sequence, narrow: list[Use], wide: list[Use]) -> tuple[tuple, int]:
    """(the axes that the parameter's product sums over, how many terms that is in the base model).

    Raises ValueError where they are not to be seen, or where the sum grows otherwise than its axes.
    """
    if axes is not None:
        axes = tuple(sorted(axis % len(shapes[0]) for axis in axes))
        return axes, math.prod(shapes[1][axis] for axis in axes)
    if role in (*VECTORS, "embedding"):
        return (), 1
    terms = [{use.axes: use.terms for use in uses if use.how in ("product", "convolution")} for uses in (narrow, wide)]
    seen = [axes for axes in terms[0] if axes in terms[1]]
    if not seen:
        raise ValueError(f"as {role} its product must sum over an axis, and none is to be seen: name it, ({role!r}, (axis,))")
    axes = seen[0]
    grown = math.prod(shapes[0][axis] / shapes[1][axis] for axis in axes)
    if terms[1][axes] != round(terms[0][axes] * grown):
        raise ValueError(f"its product sums over a part of axis {axes[0]}, and that grows otherwise: name its role and axes")
    return axes, terms[0][axes]


class _Roles:
    """The role of each parameter, from what one forward pass does with it."""

    def __init__(self, module: nn.Module, trace: Trace):
        self.trace = trace
        self.ndim = {name: param.ndim for name, param in module.named_parameters()}
        self.experts = {name for name, uses in trace.uses.items() if self._is_expert(name, uses)}
        shared_paths = ([_common(name, router) for router in trace.routers] for name in self.experts)
        self.blocks = {max(paths, key=len, default="") for paths in shared_paths} - {""}  # modules of experts and their router

    def _is_expert(self, name: str, uses: list[Use]) -> bool:
        multiplied = any(use.how == "product" for use in uses)
        return multiplied and (self.ndim[name] > 2 or self.trace.inputs[name].gathered)

    def role(self, name: str, ndim: int) -> str:
        """Raises ValueError where its use leaves the role open."""
        uses, hows = self.trace.uses.get(name, []), {use.how for use in self.trace.uses.get(name, [])}
        if not uses:
            raise ValueError("the forward pass does not use it: give a longer batch, freeze it, or name its role")
        if unknown := sorted(hows - HOWS):
            raise ValueError(f"it is used by {unknown[0]}, which says nothing of its sums: name its role and axes")
        if name in self.trace.multiplied:
            raise ValueError("its rows are looked up, and then multiplied with an activation and summed: name its role and axes")
        if len({(use.how, use.axes) for use in uses if use.how in ("product", "convolution")}) > 1:
            raise ValueError("its products sum over different axes, so that it has two kinds: name its role and axes")
        if {"product", "lookup"} <= hows:
            if name not in self.trace.readouts:
                raise ValueError("it is looked up and multiplied, and the product is no readout: name its role and axes")
            return "tied"
        if "product" in hows:
            return self._of_a_product(name)
        if "lookup" in hows:
            return "embedding"
        if "convolution" in hows:
            return "hidden"
        if ndim > 1 and any(use.ndim > 1 for use in uses):
            raise ValueError("a matrix that is only used elementwise: name its role ('embedding', 'gain' or 'bias')")
        return "gain" if name in self.trace.gains else "bias"

    def _of_a_product(self, name: str) -> str:
        trace, source = self.trace, self.trace.inputs[name]
        if name in trace.routers:
            return "router"
        if name in trace.readouts:
            return "unembedding"
        block = next((block for block in self.blocks if name.startswith(block)), None)
        inner = not self._is_the_stream(source) and any(other.startswith(block or "") for other in source.matrices)
        if name in self.experts:
            return "experts_down" if inner and source.matrices & self.experts else "experts_up"
        if block is not None:
            return "shared_down" if inner else "shared_up"
        if name in trace.mixing:
            return "attention"
        return "attention_out" if source.mixed else "hidden"

    def _is_the_stream(self, origin: Origin) -> bool:
        """Whether an embedding is part of it, as of the residual stream."""
        return any(use.how == "lookup" for table in origin.tables for use in self.trace.uses[table])


def _common(name: str, other: str) -> str:
    """The path of the smallest module that both parameters are in, with a dot behind; empty for the whole model."""
    shared = []
    for ours, theirs in zip(name.split(".")[:-1], other.split(".")[:-1], strict=False):
        if ours != theirs:
            break
        shared.append(f"{ours}.")
    return "".join(shared)


def _scaled_by_the_model(base: Trace, wide: Trace, adjusted: Iterable[float]) -> Iterable[str]:
    """Where the forward pass multiplies by a number that changes with the width: with a table on top it would scale twice."""
    for number in sorted(set(wide.numbers) - set(base.numbers) - {round(number, 9) for number in adjusted}):
        known = ", ".join(f"{value:.4g}" for value in sorted(set(base.numbers) - set(wide.numbers))) or "none"
        said = f"{wide.numbers[number]}: the forward pass multiplies it by {number:.4g}, and the base model by another number"
        yield f"{said} (of {known}): the model scales with the width itself; let `build` hold that number fixed"
