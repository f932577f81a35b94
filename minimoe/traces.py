"""How a model of others uses each of its parameters, seen from the operators of one forward pass.

    trace = traced(model, lambda: model(tokens).logits)
    trace.uses["lm_head.weight"][0].axes    # (1,): the axis that the product sums over
    trace.routers                           # the parameters whose products reach a `topk`

Nothing is read off a name or a layer's class. A product says which axis of a parameter it sums over: the axis that has the
stride of the summed dimension, so that square matrices, transposed ones and stacks of experts are all told apart. Copies of a
parameter (cast, scaled by a number, gathered by expert) are still that parameter.

Each activation carries, from operator to operator, which parameters made it: see `Origin`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from .allocations import evaluating

aten = torch.ops.aten
PRODUCTS = {  # operator -> (the positions of its two factors, the product alone; None: the operator itself)
    "aten::mm": (0, 1, torch.mm),
    "aten::bmm": (0, 1, torch.bmm),
    "aten::addmm": (1, 2, torch.mm),
    "aten::baddbmm": (1, 2, torch.bmm),
    "aten::_grouped_mm": (0, 1, None),
    "transformers::grouped_mm_fallback": (0, 1, None),  # the same product, in a library's own operator
    "minimoe::grouped_product": (0, 1, None),
}
LOOKUPS = {"aten::embedding", "aten::index_select", "aten::index", "aten::gather"}
SELECTIONS = {"aten::topk", "aten::sort", "aten::argmax", "aten::argsort", "aten::max"}
SCATTERS = {f"aten::{name}{inplace}" for name in ("index_add", "index_put", "scatter_add") for inplace in ("", "_")}
COPIES = {"aten::_to_copy", "aten::clone", "aten::contiguous", "aten::mul", "aten::div", "aten::neg", "aten::index"}
ROWS = {"aten::_to_copy", "aten::clone", "aten::index", "aten::slice"}  # the same values, or some rows of them
NORMS = {"aten::native_layer_norm", "aten::_fused_rms_norm", "aten::rms_norm"}
UNSEEN = {f"aten::{what}" for what in ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")}
UNSEEN |= {f"aten::new_{what}" for what in ("empty", "zeros", "ones", "full", "empty_strided")}  # nothing comes of the values


class Use(NamedTuple):
    """One time that a parameter is used."""

    how: str  # product, lookup, convolution, elementwise (a gain or a bias), or the name of an operator that is not known
    axes: tuple[int, ...] = ()  # of the parameter: those that a product or a convolution sums over
    terms: int = 1  # in each sum
    ndim: int = 1  # axes of the parameter that are in play: those of a row, where a row was taken
    output: Callable[[Tensor], Tensor] | None = None  # a tensor in the parameter's place -> what is made of it, linear in it


@dataclass(frozen=True)
class Origin:
    """What an activation is made of, elementwise or by sums of such parts, since the last product."""

    matrices: frozenset[str] = frozenset()  # the parameters whose products it contains
    tables: frozenset[str] = frozenset()  # the parameters in which it was looked up
    gains: tuple[str, ...] = ()  # it is a norm's output: the norm's gain, and its bias
    mixed: bool = False  # a product of two activations: attention
    gathered: bool = False  # rows that a router's choice has picked
    chosen: bool = False  # integers or truth values that follow from a router's choice

    def __or__(self, other: Origin) -> Origin:
        """Of a sum or an elementwise product of both: of picked rows only if neither has others."""
        gathered = (self.gathered or not self) and (other.gathered or not other) and (self.gathered or other.gathered)
        mixed, chosen = self.mixed or other.mixed, self.chosen or other.chosen
        return Origin(self.matrices | other.matrices, self.tables | other.tables, (), mixed, gathered, chosen)

    def __bool__(self) -> bool:
        """Whether it is made of any parameter."""
        return bool(self.matrices or self.tables or self.mixed)

    def __str__(self) -> str:
        if self.mixed and not self.matrices:
            return "attention's scores"
        return " + ".join(sorted(self.matrices | self.tables))


NOTHING = Origin()


class _Held(NamedTuple):
    """A storage that holds a parameter, or a copy of it."""

    name: str
    strides: dict[int, int]  # the parameter's axis -> its stride here
    sizes: dict[int, int]
    remade: Callable[[Tensor], Tensor]  # a tensor in the parameter's place -> what this storage would hold


@dataclass
class Trace:
    """What one forward pass says of a model's parameters, by their names."""

    uses: dict[str, list[Use]] = field(default_factory=dict)
    inputs: dict[str, Origin] = field(default_factory=dict)  # what the other factor of its products is made of
    routers: set[str] = field(default_factory=set)  # their products reach a selection
    mixing: set[str] = field(default_factory=set)  # their products are factors of a product of two activations
    readouts: frozenset[str] = frozenset()  # their products reach the output
    picked: set[str] = field(default_factory=set)  # looked up at indices that a router has chosen
    multiplied: set[str] = field(default_factory=set)  # and the rows are factors of a product of two activations
    without_gradient: frozenset[str] = frozenset()  # used, but the output does not depend on them smoothly
    numbers: dict[float, str] = field(default_factory=dict)  # factors in the forward pass -> what is multiplied
    gains: set[str] = field(default_factory=set)  # vectors that multiply an activation
    gained: dict[str, set[str]] = field(default_factory=dict)  # a norm's gain -> the parameters that its output meets


def traced(module: nn.Module, forward: Callable[[], Tensor]) -> Trace:
    """The uses of the module's parameters in `forward`, which returns the output (logits). In evaluation mode."""
    with evaluating(module), torch.enable_grad(), Tracing(module) as tracing:
        output = forward()
    trace, names = tracing.trace, dict(module.named_parameters())
    trace.readouts = tracing.origin(output).matrices
    asked = {name: param for name, param in names.items() if param.requires_grad}
    slope = output.float().logsumexp(-1).sum()
    found = torch.autograd.grad(slope, list(asked.values()), allow_unused=True) if slope.requires_grad else [None] * len(asked)
    trace.without_gradient = frozenset(name for name, grad in zip(asked, found, strict=True) if grad is None)
    trace.routers -= trace.without_gradient  # an indexer chooses too, and does not learn by it
    trace.uses = {name: list({use._replace(output=None) for use in uses}) for name, uses in trace.uses.items()}
    return trace


class Tracing(TorchDispatchMode):
    """Sees every operator of a forward pass below autograd."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.trace = Trace()
        self.held: dict[int, _Held] = {}  # by storage
        self.origins: dict[int, Origin] = {}  # by storage
        self.kept: list = []  # every storage seen, so that no address is used twice
        for name, param in module.named_parameters():
            strides, sizes = dict(enumerate(param.stride())), dict(enumerate(param.shape))
            self.held[_storage(param)] = _Held(name, strides, sizes, lambda weight: weight)

    def origin(self, tensor: object) -> Origin:
        return self.origins.get(_storage(tensor), NOTHING) if isinstance(tensor, Tensor) else NOTHING

    def holding(self, tensor: object) -> _Held | None:
        return self.held.get(_storage(tensor)) if isinstance(tensor, Tensor) else None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        tensors = [part for part in tree_flatten((args, kwargs))[0] if isinstance(part, Tensor)]
        outs = [part for part in tree_flatten(out)[0] if isinstance(part, Tensor)]
        self.kept += [part.untyped_storage() for part in outs]
        seen = {_storage(part) for part in tensors}
        if not func._schema.is_mutable and all(_storage(part) in seen for part in outs):
            return out  # a view of what it was
        if name in PRODUCTS:
            made = self._product(name, func, args, kwargs)
        elif name == "aten::convolution" and self.holding(args[1]):
            made = self._convolution(func, args)
        elif name in LOOKUPS and self.holding(args[0]) and not self._is_gathered_matrix(name, args[0]):
            made = self._lookup(func, args, kwargs)
        elif name in COPIES and (copied := self._copied(func, args, kwargs, outs)):
            self.held[_storage(outs[0])] = copied
            return out
        elif name in UNSEEN:
            made = NOTHING
        else:
            made = self._elementwise(name, args, kwargs, tensors)
        for part in outs:
            whole = part.dtype.is_floating_point or part.dtype.is_complex
            self.origins[_storage(part)] = replace(made, chosen=False) if whole else Origin(chosen=made.chosen)
        return out

    def _product(self, name: str, func: Callable, args: tuple, kwargs: dict) -> Origin:
        first, second, product = PRODUCTS[name]
        holds = [(at, held) for at in (first, second) if (held := self.holding(args[at]))]
        if len(holds) == 2:
            for _, held in holds:
                self._note(held.name, Use("a product of two parameters"))
            return NOTHING
        if not holds:
            for origin in (self.origin(args[first]), self.origin(args[second])):
                self.trace.mixing |= origin.matrices
                self.trace.multiplied |= origin.tables & self.trace.picked if not origin.matrices else set()
            return Origin(mixed=True)
        ((at, held),) = holds
        view, other = args[at], args[first if at == second else second]
        axes, terms = _axes(held, view, dim=-2 if at == second else -1)
        kept = other.detach().clone()  # the model may write over it

        def output(weight: Tensor) -> Tensor:
            factor = _as_view(held.remade(weight), view)
            pair = (kept, factor) if at == second else (factor, kept)
            return product(*pair) if product else func(*pair, *args[2:], **kwargs)

        self._note(held.name, Use("product", axes, terms, view.ndim, output))
        origin = self.origin(other)
        before = self.trace.inputs.get(held.name)
        self.trace.inputs[held.name] = origin if before is None else before | origin
        for gain in origin.gains:
            self.trace.gained.setdefault(gain, set()).add(held.name)
        if name in ("aten::addmm", "aten::baddbmm") and (bias := self.holding(args[0])):
            self._note(bias.name, Use("elementwise", ndim=1))
        return Origin(matrices=frozenset([held.name]), gathered=origin.gathered)

    def _convolution(self, func: Callable, args: tuple) -> Origin:
        weight, groups = self.holding(args[1]), args[-1]
        axes = tuple(range(1, args[1].ndim)) if not args[6] else (0, *range(2, args[1].ndim))  # args[6]: transposed

        kept = args[0].detach().clone()

        def output(tensor: Tensor) -> Tensor:
            return func(kept, _as_view(weight.remade(tensor), args[1]), None, *args[3:])

        terms = math.prod(args[1].shape[axis] for axis in axes) // (groups if args[6] else 1)
        self._note(weight.name, Use("convolution", axes, terms, args[1].ndim, output))
        if bias := self.holding(args[2]):
            self._note(bias.name, Use("elementwise"))
        self.trace.inputs[weight.name] = self.origin(args[0])
        return Origin(matrices=frozenset([weight.name]))

    def _lookup(self, func: Callable, args: tuple, kwargs: dict) -> Origin:
        table, view = self.holding(args[0]), args[0]

        def output(weight: Tensor) -> Tensor:
            return func(_as_view(table.remade(weight), view), *args[1:], **kwargs)

        by_choice = any(self.origin(index).chosen for index in tree_flatten(args[1:])[0])
        self.trace.picked |= {table.name} if by_choice else set()
        how = "elementwise" if view.ndim == 1 or by_choice else "lookup"
        self._note(table.name, Use(how, (), 1, view.ndim - 1, output))
        return Origin(tables=frozenset([table.name]))

    def _is_gathered_matrix(self, name: str, tensor: Tensor) -> bool:
        """Whether whole matrices are taken from a stack: then what was taken is still the parameter."""
        return name == "aten::index" and tensor.ndim > 2

    def _copied(self, func: Callable, args: tuple, kwargs: dict, outs: list[Tensor]) -> _Held | None:
        """How the result holds the parameter, where it is a copy: cast, scaled by a number, or gathered by expert."""
        at = [place for place, part in enumerate(args) if self.holding(part) and part.ndim > 1]
        if len(at) != 1 or len(outs) != 1:
            return None
        (place,) = at
        source, made, gathers = args[place], outs[0], func._schema.name == "aten::index"
        others = [part for other, part in enumerate(args) if other != place and isinstance(part, Tensor)]
        if not gathers and (any(part.numel() != 1 for part in others) or made.shape != source.shape):
            return None
        lead = source.ndim - made.ndim if gathers else 0
        if gathers and (lead or made.shape[1:] != source.shape[1:]):
            return None
        held, strides, sizes = self.holding(source), {}, {}
        for dim in range(source.ndim):
            axes, _ = _axes(held, source, dim)
            stride = made.stride(dim)
            for axis in reversed(axes):
                strides[axis], sizes[axis] = stride, made.shape[dim] if gathers and dim == 0 else held.sizes[axis]
                stride *= held.sizes[axis]

        def remade(weight: Tensor) -> Tensor:
            return func(*args[:place], _as_view(held.remade(weight), source), *args[place + 1 :], **kwargs)

        return _Held(held.name, strides, sizes, remade)

    def _elementwise(self, name: str, args: tuple, kwargs: dict, tensors: list[Tensor]) -> Origin:
        """What any other operator makes of its arguments, and what that says of the parameters among them."""
        made, vectors = NOTHING, []
        for part in tensors:
            made = made | self.origin(part)
            if held := self.holding(part):
                how = "elementwise" if name.startswith(("aten::", "prims::")) else f"the operator {name}"
                self._note(held.name, Use(how, ndim=sum(size > 1 for size in part.shape)))
                vectors.append(held.name)
        if name in SELECTIONS:
            self.trace.routers |= made.matrices
            return Origin(made.matrices, chosen=True)
        if "scaled_dot_product" in name or "flash_attention" in name:
            self.trace.mixing |= made.matrices
            return Origin(mixed=True)
        if made and (factor := _factor(name, args, kwargs)):
            self.trace.numbers.setdefault(round(factor, 9), str(made))
        if name in LOOKUPS and made.chosen:
            return Origin(made.matrices, made.tables, gathered=True, chosen=True)
        if name in SCATTERS:
            return replace(made, gathered=False)
        if vectors and (name in NORMS or name == "aten::mul"):
            self.trace.gains.add(vectors[0])  # of a norm that is one operator, the second is the bias
            return replace(made, gains=tuple(vectors))
        if name in ROWS and tensors:
            return replace(made, gains=self.origin(tensors[0]).gains)
        return made

    def _note(self, name: str, use: Use) -> None:
        self.trace.uses.setdefault(name, []).append(use)


def _factor(name: str, args: tuple, kwargs: dict) -> float | None:
    """The number that this operator multiplies an activation by: one that a model may compute from its width."""
    if "scaled_dot_product" in name:
        return kwargs.get("scale") or args[0].shape[-1] ** -0.5  # its default
    factor = args[1] if name in ("aten::mul", "aten::mul_", "aten::div", "aten::div_") else None
    if isinstance(factor, Tensor) and factor.numel() == 1 and factor.dtype.is_floating_point:
        factor = factor.item()
    if not isinstance(factor, float | int) or not factor:
        return None
    return float(factor) if "mul" in name else 1 / factor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _axes(held: _Held, view: Tensor, dim: int) -> tuple[tuple[int, ...], int]:
    """(the parameter's axes that this dimension of a view runs over, its length): several where a view has merged them."""
    length, stride = view.shape[dim], view.stride(dim)
    matching = [axis for axis in held.strides if held.strides[axis] == stride]
    found = [axis for axis in matching if held.sizes[axis] > 1] or matching[:1]
    if length == 1 or not found:
        return (), length
    last, run = found[-1], [found[-1]]
    while math.prod(held.sizes[axis] for axis in run) < length and run[0] - 1 in held.strides:
        if held.strides[run[0] - 1] != held.strides[run[0]] * held.sizes[run[0]]:
            break
        run.insert(0, run[0] - 1)
    return tuple(run) if length >= held.sizes[last] else (last,), length


def _as_view(weight: Tensor, view: Tensor) -> Tensor:
    """The view's window on another tensor of its base's layout."""
    return torch.as_strided(weight, view.shape, view.stride(), view.storage_offset())
