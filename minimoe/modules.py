"""A coordinate check of any torch module: nothing is asked of it but its parameters, an optimizer and a loss.

    def build(width):
        model = nn.Sequential(nn.Embedding(96, width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 96))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-4, eps=1e-15)

    frame = check_module(build, (64, 128, 256), loss, batches, probe)
    print(exponents(frame))

Every parameter has its allocation. A weight that is multiplied or looked up, a stack of experts too, has init and update: its
inputs are seen from the operators of a forward pass (`traces`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .allocations import Ledger, evaluating
from .checks import require
from .coordinates import LOSS, SIZES, rms
from .probe import OUTSIDE, effective
from .theory import KINDS, NONE, UNKNOWN, kind, law
from .traces import Tracing, Use

READOUT = " (readout)"  # behind the name of a weight that is an embedding too
ROUTER = "router"  # a kind here, besides KINDS: an output weight whose outputs are the shares of a sum
BETAS, EPS = (0.9, 0.95), 1e-15  # of AdamW where `build` gives parameter groups; eps out of the way, as the theory has it
Built = tuple[nn.Module, "Optimizer | Iterable[dict]"]


class _Made(NamedTuple):
    """One parameter of a model as it was built."""

    place: tuple[int, str]  # see layer_of
    shape: tuple[int, ...]
    std: float  # of its entries at init
    multiplier: float
    lr: float
    fan_in: int  # 1 where its layer is not known
    axes: tuple[int, ...] | None  # of its fan_in, if it declares a role
    kind: str
    readout_factor: float = 1.0  # what a tied readout's input is multiplied by (see `adopt`)


def check_module(
    build: Callable[[int], Built],
    sizes: Sequence[int],
    loss: Callable[[nn.Module, object], Tensor],
    batches: Iterable | Callable[[int], Iterable],
    probe: object,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    kinds: Mapping[str, str] | None = None,
    axis: str = "width",
    name: str = "module",
) -> pd.DataFrame:
    """Train the module that `build` makes at each size, a step on each batch, and measure every parameter after each step.

    build: size -> (module, optimizer), or (module, parameter groups), for which AdamW is made with eps 1e-15; torch's seed
    is set before. loss: (module, batch) -> (), for the batches and the probe alike. batches: the same for all sizes and
    seeds, or a function of the seed. probe: a batch that is not trained on, always the same. axis: what the size is, one of
    `coordinates.SIZES`. name: what the rows are called under `parametrization`.

    Predictions are to first order: take a small LR (2^-13, say) and few steps. `exponents` withholds its verdict where the
    allocations do not add up to the fall of the loss.

    kinds: parameter's name or pattern -> input, hidden, output, fixed (see `theory.KINDS`; a gain or bias that grows is an
    input) or router, e.g. {"lm_head.*": "output", "*.gate.weight": "router"}; `adopt` finds
    them. A parameter that declares a role needs none. Where the kinds are known, exponents are predicted from what the
    optimizer and the init do between the smallest and the largest size; the last output weight is taken for the head. Where
    a kind is not known, the allocation is measured alone, and muP's question is put to it as to a router's.

    Returns a frame like `coordinate_check`'s, for `exponents`, `suspects`, `diagnosis` and the figures: one row per size,
    seed, step, layer (the place in a ModuleList; -1 outside), tensor (the parameter's name, with * for the layer) and
    quantity: init, update, allocation; and for the tensor "loss" allocation (the sum) and fall. Raises ValueError for bad
    input, or a model whose parameters' names change with the size, unless the axis is depth.
    """
    sizes, seeds = list(dict.fromkeys(sizes)), list(dict.fromkeys(seeds))
    require(len(sizes) > 1, "sizes", sizes, "a slope needs at least two")
    require(len(seeds) > 0, "seeds", seeds, "is empty")
    require(axis in SIZES, "axis", axis, f"must be one of {', '.join(SIZES)}")
    rows, made = [], {}
    fixed = batches if callable(batches) else list(batches)
    for size in sizes:
        for seed in seeds:
            torch.manual_seed(seed)
            module, optimizer = _built(build(size))
            if seed == seeds[0]:
                made[size] = _made(module, optimizer, kinds or {}, uses(module, partial(loss, module, probe)))
            run = _measured(module, optimizer, loss, list(fixed(seed) if callable(fixed) else fixed), probe)
            rows += [{"parametrization": name, axis: size, "seed": seed, **row} for row in run]
    return _labelled(pd.DataFrame(rows), made[min(sizes)], made[max(sizes)], max(sizes) / min(sizes), axis)


def _built(built: Built) -> tuple[nn.Module, Optimizer]:
    if not (isinstance(built, tuple) and len(built) == 2 and isinstance(built[0], nn.Module)):
        raise TypeError("build must return a module and its optimizer (or its parameter groups)")
    module, optimizer = built
    return module, optimizer if isinstance(optimizer, Optimizer) else torch.optim.AdamW(
        list(optimizer), betas=BETAS, eps=EPS, weight_decay=0.0
    )


def _measured(module: nn.Module, optimizer: Optimizer, loss: Callable, batches: list, probe: object) -> Iterator[dict]:
    """One run's rows: step, tensor (the parameter's whole name), quantity and value."""
    require(len(batches) > 0, "batches", batches, "is empty: a check needs at least one step")
    ledger, nats, fall = Ledger(module, lambda: loss(module, probe), intervals=1), Counter(), 0.0
    initial = {name: param.detach().clone() for name, param in module.named_parameters()}
    for name, own in uses(module, lambda: loss(module, probe)).items():
        yield {"step": 0, "tensor": name, "quantity": "init", "value": rms(_outputs(own, initial[_weight(name)]))}
    for step, batch in enumerate(batches, 1):
        optimizer.zero_grad()
        loss(module, batch).backward()
        optimizer.step()
        entry = ledger.entry()
        nats.update(entry.allocations)
        fall += entry.fall
        now = dict(module.named_parameters())
        for name, own in uses(module, lambda: loss(module, probe)).items():
            moved = now[_weight(name)].detach() - initial[_weight(name)]
            yield {"step": step, "tensor": name, "quantity": "update", "value": rms(_outputs(own, moved))}
        for name in entry.allocations:
            yield {"step": step, "tensor": name, "quantity": "allocation", "value": nats[name]}
        yield {"step": step, "tensor": LOSS, "quantity": "allocation", "value": math.fsum(nats.values())}
        yield {"step": step, "tensor": LOSS, "quantity": "fall", "value": fall}


def uses(module: nn.Module, forward: Callable[[], object]) -> dict[str, list[Callable[[Tensor], Tensor]]]:
    """Tensor's name -> functions: a tensor in its place -> what it makes of its input, one for each time that `forward` uses it.

    Of weights that are multiplied or looked up, also as stacks of experts. A weight that is both looked up and multiplied
    (tied) has two entries, the second under its name with READOUT behind.
    """
    with evaluating(module), torch.enable_grad(), Tracing(module) as tracing:  # without gradients torch fuses whole layers
        forward()
    found: dict[str, list] = {}
    for name, uses_of_it in tracing.trace.uses.items():
        tied = {"lookup", "product"} <= {use.how for use in uses_of_it}
        for use in uses_of_it:
            if use.output is not None and use.how != "elementwise":
                found.setdefault(name + (READOUT if tied and use.how == "product" else ""), []).append(use)
    return found


def _weight(tensor: str) -> str:
    """The name of the parameter behind a tensor's name."""
    return tensor.removesuffix(READOUT)


def _outputs(own: list[Use], weight: Tensor) -> Tensor:
    """What a tensor in the weight's place makes of all its inputs, in one row."""
    return torch.cat([use.output(weight).flatten() for use in own])


def _made(module: nn.Module, optimizer: Optimizer, given: Mapping[str, str], used: Mapping[str, list[Use]]) -> dict[str, _Made]:
    """Tensor's name -> how it was made, in the order of the module; tied readouts last."""
    lrs = {id(param): group["lr"] for group in optimizer.param_groups for param in group["params"]}
    names = dict(module.named_parameters())
    for pattern, wanted in given.items():
        require(wanted in (*KINDS, ROUTER), f"kinds[{pattern!r}]", wanted, f"must be one of {', '.join((*KINDS, ROUTER))}")
        require(any(fnmatchcase(name, pattern) for name in names), "kinds", pattern, "no parameter has such a name")
    found = {}
    for name, param in names.items():
        role = getattr(param, "role", None)
        kinds = [value for pattern, value in given.items() if fnmatchcase(name, pattern)]
        fan_in = role.fan_in(param.shape) if role else max((use.terms for use in used.get(name, ())), default=1)
        multiplier = effective(module, name).detach().norm() / param.detach().norm() if role else torch.ones(())
        found[name] = _Made(
            layer_of(module, name),
            tuple(param.shape),
            param.detach().std(correction=0).item(),
            multiplier.item(),
            lrs.get(id(param), math.nan),
            fan_in,
            role.fan_in_axes if role else None,
            kinds[0] if kinds else (ROUTER if role and role.name == ROUTER else UNKNOWN),
            getattr(param, "readout_factor", 1.0),
        )
    for name, own in used.items():
        if name not in found:  # the embedding, as a readout
            tied = found[_weight(name)]
            place = tied.place[0], name
            found[name] = tied._replace(place=place, multiplier=tied.readout_factor, fan_in=own[0].terms, kind="output")
    return found


def _labelled(frame: pd.DataFrame, small: dict[str, _Made], large: dict[str, _Made], ratio: float, axis: str) -> pd.DataFrame:
    """The frame with what `exponents` wants to know of each tensor: its layer, kind and place, and what is predicted."""
    if set(small) != set(large) and axis != "depth":
        only = sorted(set(small) ^ set(large))
        raise ValueError(f"build makes models of other parameters: {', '.join(only[:5])}{' ...' if len(only) > 5 else ''}")
    large = {name: made._replace(kind=_kind(made, small.get(name, made))) for name, made in large.items()}
    predicted = {} if axis == "depth" else dict(_predicted(small, large, ratio))
    rows, places = [], {name: place for place, name in enumerate([*large, LOSS])}
    for row in frame.to_dict("records"):
        name = row["tensor"]
        layer, tensor = large[name].place if name in large else (OUTSIDE, name)
        kind_of = large[name].kind if name in large else NONE
        row |= {"layer": layer, "tensor": tensor, "alignment": math.nan}
        row |= {"predicted": predicted.get((name, row["quantity"]), math.nan), "role": NONE if name == LOSS else tensor}
        row |= {"kind": "output" if kind_of == ROUTER else kind_of, "source": NONE, "degree": 1}
        row |= {"mixture": NONE, "place": places[name]}
        rows.append(row)
    return pd.DataFrame(rows)


def _kind(made: _Made, small: _Made) -> str:
    """Its kind as it was given, or as its role and shapes tell."""
    if made.kind != UNKNOWN or made.axes is None:
        return made.kind
    return kind(made.shape, small.shape, [axis % len(made.shape) for axis in made.axes])


def layer_of(module: nn.Module, name: str) -> tuple[int, str]:
    """(the place in a ModuleList, the name with * for it): blocks.3.moe.up -> 3, blocks.*.moe.up; outside of any, (-1, name)."""
    parts = name.split(".")
    for place, part in enumerate(parts[:-1]):
        if part.isdigit() and isinstance(module.get_submodule(".".join(parts[:place])), nn.ModuleList):
            return int(part), ".".join([*parts[:place], "*", *parts[place + 1 :]])
    return OUTSIDE, name


def _predicted(small: dict[str, _Made], large: dict[str, _Made], ratio: float) -> Iterator[tuple[tuple[str, str], float]]:
    """(name, quantity) -> its exponent by the law of `theory`, for parameters whose kind is known.

    As there, norms are taken to make every input O(1), and hidden weights to keep the size of the gradient.
    """

    def log(after: float, before: float) -> float:
        return math.log(after / before, ratio) if after > 0 and before > 0 else math.nan

    heads = [name for name, made in large.items() if made.kind == "output" and len(made.shape) > 1]
    if not heads:
        return
    powers = {
        name: {cell: log(getattr(made, cell), getattr(small[name], cell)) for cell in ("multiplier", "std", "lr", "fan_in")}
        for name, made in large.items()
    }
    behind = powers[heads[-1]]["multiplier"] + powers[heads[-1]]["std"]
    for name, made in large.items():
        if made.kind == UNKNOWN:
            continue
        signal = {"output": 0.0, "fixed": math.nan, ROUTER: behind + 0.5}.get(made.kind, behind)
        if made.readout_factor != 1 and len(made.shape) == 1:  # the gain that holds the factor: it meets the gradient before it
            signal -= log(made.readout_factor, small[name].readout_factor)
        entries = log(math.prod(made.shape), math.prod(small[name].shape))
        growth = law(**powers[name], outputs=entries - powers[name]["fan_in"], signal=signal)
        for quantity, power in growth._asdict().items():
            yield (name, quantity), round(power, 2) + 0.0  # a std is measured, on the entries that were drawn
