"""muP, or any table, for a model that is not ours: its parameters' roles are read off one forward pass, or it is refused.

    plan = adopt(build, width=2048, base_width=256, batch=tokens)   # build(width) makes the model; print(plan) says what it found
    model = plan.initialise("mup", seed=0)
    optimizer = torch.optim.AdamW(plan.param_groups("mup", lr=1e-2))
    exponents(plan.check("mup"))                                     # predicted beside measured, on the model itself

A role follows from what the forward pass does with a parameter (`traces`): what reaches a `topk` is a router, what reaches the
logits is the readout, what is fed from a selection is an expert. A kind follows from which axes grow between two widths, and
which of them the product sums over (Tensor Programs V, Table 3). What both leave open is an error that names the parameter.

The forward pass stays as it is. A multiplier m is *folded*: Adam cannot tell m, std s, LR l, eps e and weight decay w from 1,
m s, m l, e / m and w / m (the abc symmetry, Tensor Programs V, appendix J.2.1). The model can then be saved, loaded and trained
without minimoe. Folding is exact for Adam alone, and without clipping by the gradient's norm.
"""

from __future__ import annotations

import inspect
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import require, whole
from .explanations import Explanation, why
from .modules import ROUTER, check_module
from .parametrization import FAMILY, Parametrization, Rule
from .roles import moved_betas
from .tables import parametrization
from .theory import kind as kind_of
from .traces import Origin, Trace, traced

MATRICES = ("hidden", "attention", "attention_out", "experts_up", "experts_down", "shared_up", "shared_down")  # rows for hidden weights
VECTORS = ("gain", "bias")
ROLES = ("embedding", "unembedding", "tied", "router", *MATRICES, *VECTORS)  # that a parameter of a stranger may have
Role = str | tuple[str, tuple[int, ...]]
Build = Callable[[int], nn.Module]


class Refused(ValueError):
    """The model's use of its parameters leaves a role or a kind open, or muP has no rule for it."""

    def __init__(self, problems: Iterable[str]):
        super().__init__("\n".join(problems))


class Adopted(NamedTuple):
    """One parameter: what it is."""

    name: str
    role: str  # one of ROLES
    kind: str  # of theory.KINDS
    shape: tuple[int, ...]
    base_shape: tuple[int, ...]
    axes: tuple[int, ...]  # that its product sums over
    terms: int  # of each sum
    base_terms: int

    @property
    def row(self) -> str:
        """The role whose row of a table serves it; empty where nothing of it grows."""
        if self.kind == "fixed":
            return ""
        own, other = {
            "input": (("embedding", *VECTORS), "embedding"),
            "output": (("router", "unembedding"), "unembedding"),
            "hidden": (MATRICES[1:], "attention"),
        }[self.kind]
        return self.role if self.role in own else other


class Factors(NamedTuple):
    """On one parameter's numbers in the base model, its multiplier folded in."""

    std: float
    lr: float
    eps: float
    weight_decay: float
    one_minus_beta: float
    start: float  # on the value around which a vector is drawn


def adopt(
    build: Build,
    width: int,
    base_width: int,
    batch: Tensor | Mapping[str, Tensor] | None = None,
    *,
    roles: Mapping[str, Role] | None = None,
    forward: Callable[[nn.Module, object], Tensor] | None = None,
) -> Plan:
    """What muP, or any table, needs to know of the model that `build` makes: traced at both widths, or refused.

    build: width -> module (see `growing` for a config of Hugging Face). base_width: of the model whose numbers are known to be
    good; there every table leaves the model as it is. batch: what the model is run on: token ids (B, T), or keyword arguments
    that contain `input_ids` (default: 4 x 32 random ids below `model.config.vocab_size`). Every part of the model must be used
    on it: of experts that are modules of their own, each needs a token. forward: (module, batch) -> logits, for other models.
    roles: parameter's name or pattern -> one of ROLES, or (role, the axes that its product sums over); what is given
    counts before what was traced.

    Raises Refused, a ValueError, with one line per parameter whose role or kind stays open, and the remedy.
    """
    for name, value in (("width", width), ("base_width", base_width)):
        require(whole(value, 1), name, value, "must be a positive integer")
    require(width != base_width, "width", width, "must differ from base_width: a kind is what grows between them")
    given = {pattern: _given(pattern, role) for pattern, role in (roles or {}).items()}
    base, wide = _made(build, base_width, 0), _made(build, width, 0)
    batch = _default_batch(base) if batch is None else batch
    forward = forward or logits
    traces = [traced(module, lambda module=module: forward(module, batch)) for module in (base, wide)]
    found = _adopted(wide, base, traces, given)
    return Plan(build, width, base_width, batch, forward, tuple(found), traces[0], _config_changes(base, wide), given)


@dataclass(frozen=True, repr=False)
class Plan:
    """What `adopt` found of a model, and what a table makes of it. Printing it shows muP's factors, like `explain`."""

    build: Build
    width: int
    base_width: int
    batch: object
    forward: Callable[[nn.Module, object], Tensor]
    parameters: tuple[Adopted, ...]
    trace: Trace
    changed: tuple[str, ...] = ()  # fields of the model's config that differ between the widths
    given: Mapping[str, tuple] = field(default_factory=dict)
    made: list = field(default_factory=list, compare=False)  # the last model that `initialise` made, and its table

    def factors(self, table: str | Parametrization) -> dict[str, Factors]:
        """Parameter's name -> what the table makes of its numbers. Raises Refused where the table has no rule for a tied weight."""
        table = parametrization(table)
        found = {adopted.name: self._factors(adopted, table) for adopted in self.parameters}
        scale = self.readout_factor(table)
        for name in self.readout_norm if scale != 1 else ():
            own = found[name]
            found[name] = own._replace(
                start=own.start * scale,
                std=own.std * scale,
                lr=own.lr * scale,
                eps=own.eps / scale,
                weight_decay=own.weight_decay / scale,
            )
        return found

    def _factors(self, adopted: Adopted, table: Parametrization) -> Factors:
        rule = table[adopted.row] if adopted.row else Rule()
        ratios = self._ratios(adopted)
        if adopted.role == "tied":
            rule = self._tied_rule(adopted, table)
        m = rule.multiplier(ratios)
        if not m > 0:
            raise Refused([f"{adopted.name}: its multiplier is {m:g}, which cannot be folded into init and LR"])
        std = math.sqrt(rule.init_var(ratios)) * m
        return Factors(
            std, rule.lr(ratios) * m, rule.eps(ratios) / m, rule.weight_decay(ratios) / m, rule.one_minus_beta(ratios), m
        )

    def _ratios(self, adopted: Adopted) -> dict[str, float]:
        return {"fan_in": adopted.terms / adopted.base_terms, "width": self.width / self.base_width, "batch": 1.0, "duration": 1.0}

    def _tied_rule(self, adopted: Adopted, table: Parametrization) -> Rule:
        """The embedding's row, where the unembedding's differs from it in the multiplier alone."""
        rules, ratios = (table["embedding"], table["unembedding"]), self._ratios(adopted)
        for cell in ("init_var", "lr", "eps", "weight_decay", "one_minus_beta"):
            values = [getattr(rule, cell)(ratios if at else ratios | {"fan_in": 1.0}) for at, rule in enumerate(rules)]
            if values[0] != values[1]:
                problem = f"{adopted.name} is tied: {table.name} has no rule for both of its uses"
                raise Refused([f"{problem} ({cell} {values[0]:g} as an embedding, {values[1]:g} as a readout): untie it"])
        return replace(rules[0], multiplier=rules[0].multiplier(ratios | {"fan_in": 1.0}))

    def readout_factor(self, table: str | Parametrization) -> float:
        """What the input of a tied readout is multiplied by; 1 where no weight is tied."""
        tied = [adopted for adopted in self.parameters if adopted.role == "tied"]
        ratios = self._ratios(tied[0]) if tied else {}
        table = parametrization(table)
        one = table["embedding"].multiplier(ratios | {"fan_in": 1.0}) if tied else 1.0
        return table["unembedding"].multiplier(ratios) / one if tied else 1.0

    @property
    def readout_norm(self) -> tuple[str, ...]:
        """The gain (and bias) of the norm before a tied readout, where a factor can be folded into them: they feed nothing else."""
        tied = {adopted.name for adopted in self.parameters if adopted.role == "tied"}
        gains = self.trace.inputs[min(tied)].gains if tied else ()
        return gains if all(self.trace.gained[gain] <= tied for gain in gains) else ()

    @torch.no_grad()
    def initialise(self, table: str | Parametrization = "mup", seed: int = 0) -> nn.Module:
        """The model at `width`, made after `torch.manual_seed(seed)` and scaled as the table says; `param_groups` is for it.

        Every matrix gets the base model's std (made from the same seed) times the table's factor; zeros, and the constants and
        special starts of gains and biases, stay. At the base width this is the untouched model, bit for bit.
        """
        table = parametrization(table)
        factors = self.factors(table)
        base, model = dict(_made(self.build, self.base_width, seed).named_parameters()), _made(self.build, self.width, seed)
        for adopted in self.parameters:
            param, own = model.get_parameter(adopted.name), factors[adopted.name]
            if adopted.role in VECTORS or not adopted.axes and adopted.role not in ("embedding", "tied"):
                if own.start != 1 or own.std != 1:
                    mean = param.mean()
                    param.copy_(mean * own.start + (param - mean) * own.std)
            elif param.shape != base[adopted.name].shape and (std := param.float().std(correction=0).item()):
                param.mul_(base[adopted.name].float().std(correction=0).item() * own.std / std)
        self.adjust(model, table)
        self.made[:] = [model, table]
        return model

    def adjust(self, model: nn.Module, table: str | Parametrization = "mup") -> nn.Module:
        """Put into a model's forward pass what no weight can hold: the factor of a tied readout, if no norm's gain stands before it.

        `initialise` does it. A model that was saved and loaded again needs it again; most models need nothing.
        """
        scale = self.readout_factor(table)
        for name in (*self.readout_norm, *(adopted.name for adopted in self.parameters if adopted.role == "tied")):
            model.get_parameter(name).readout_factor = scale  # for check_module
        if scale != 1 and not self.readout_norm:
            readout = getattr(model, "get_output_embeddings", lambda: None)()
            if readout is None:
                raise Refused(["the tied readout is no module (get_output_embeddings), and no norm's gain stands before it: untie it"])
            readout.register_forward_pre_hook(lambda module, inputs: (inputs[0] * scale, *inputs[1:]))
        return model

    def param_groups(
        self,
        table: str | Parametrization = "mup",
        lr: float = 1e-3,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        betas: tuple[float, float] | None = None,
        *,
        model: nn.Module | None = None,
        optimizer: type = torch.optim.AdamW,
        max_grad_norm: float | None = None,
    ) -> list[dict]:
        """Groups for `torch.optim.AdamW`, with `role` and `names`: every trainable parameter of the last model that `initialise`
        made (or of `model`, one of that shape), with the table's lr, eps and weight_decay.

        optimizer, max_grad_norm: what you will train with; a UserWarning says where folded multipliers are not exact. Hugging
        Face's Trainer clips at max_grad_norm=1.0 unless told otherwise.
        Raises ValueError for an lr that is not positive and finite, another table than the model's, or no model yet.
        """
        require(math.isfinite(lr) and lr > 0, "lr", lr, "must be positive and finite")
        for name, value in (("eps", eps), ("weight_decay", weight_decay)):
            require(math.isfinite(value) and value >= 0, name, value, "must be finite and not negative")
        table = parametrization(table)
        if model is None:
            if not self.made:
                raise ValueError("param_groups needs a model: call initialise first, or give model=")
            model, initialised = self.made
            if not initialised.same_rules(table):
                raise ValueError(f"the model was initialised under {initialised.name!r}, and these are the groups of {table.name!r}")
        self._warn(table, optimizer, max_grad_norm)
        groups: dict[tuple, dict] = {}
        for name, own in self.factors(table).items():
            param, role = model.get_parameter(name), next(adopted.role for adopted in self.parameters if adopted.name == name)
            settings = {"role": role, "lr": lr * own.lr, "eps": eps * own.eps, "weight_decay": weight_decay * own.weight_decay}
            if betas is not None:
                settings["betas"] = moved_betas(betas, own.one_minus_beta)
            elif own.one_minus_beta != 1:
                raise ValueError(f"{role}: its row changes Adam's betas: give those of the base, betas=(0.9, 0.95)")
            group = groups.setdefault(tuple(settings.values()), {"params": [], "names": [], **settings})
            group["params"].append(param)
            group["names"].append(name)
        return list(groups.values())

    def _warn(self, table: Parametrization, optimizer: type, max_grad_norm: float | None) -> None:
        if self.width == self.base_width:
            return
        if not issubclass(optimizer, torch.optim.Adam | torch.optim.AdamW):
            warnings.warn(f"the rules are Adam's: under {optimizer.__name__} these groups are wrong", stacklevel=3)
        if max_grad_norm:
            message = f"clipping at a gradient norm of {max_grad_norm:g} is not exact: folding changes the norm (max_grad_norm=0 turns it off)"
            warnings.warn(message, stacklevel=3)

    def explain(self, table: str | Parametrization = "mup", lr: float = 2.0**-6) -> Explanation:
        """One row per tensor, layers together where they agree, like `minimoe.explain`: what the table makes of it, and why.

        init_std, lr, eps and weight_decay are factors on the base model's, the multiplier folded in; effective_lr is what Adam
        uses at the base LR `lr`.
        """
        table = parametrization(table)
        factors, rows = self.factors(table), {}
        for adopted in self.parameters:
            own = factors[adopted.name]
            rule = table[adopted.row] if adopted.row else Rule()
            ratio = adopted.terms / adopted.base_terms
            row = {
                "name": starred(adopted.name),
                "role": adopted.role,
                "kind": adopted.kind,
                "shape": adopted.shape,
                "fan_in": adopted.terms,
                "ratio": ratio,
                "init_std": own.std,
                "lr": own.lr,
                "effective_lr": lr * own.lr,
                "eps": own.eps,
                "weight_decay": own.weight_decay,
                "why": why(adopted.kind, rule, grows=float(ratio != 1)),
            }
            rows[tuple(row.values())] = row
        return Explanation(list(rows.values()))

    def notes(self) -> list[str]:
        """What a reader should know before they trust the plan."""
        said = [f"width {self.base_width} -> {self.width}" + (f": {', '.join(self.changed)}" if self.changed else "")]
        for kind, expected in (("output", ("router", "unembedding", "tied")), ("input", ("embedding", *VECTORS))):
            names = {starred(a.name) for a in self.parameters if a.kind == kind and a.role not in expected}
            if names:
                side = "sums over a growing size into a fixed one" if kind == "output" else "sums over a fixed size into a growing one"
                said.append(f"{kind} kind, as it {side}: {', '.join(sorted(names))}")
        if any(adopted.role == "tied" for adopted in self.parameters):
            where = f"folded into {', '.join(self.readout_norm)}" if self.readout_norm else "put in by a hook: call plan.adjust(model) on a loaded model"
            said.append(f"the embedding is tied to the readout: the readout's multiplier is {where}")
        if idle := {starred(name) for name in self.trace.without_gradient}:
            said.append(f"used, and without a gradient: {', '.join(sorted(idle))}")
        said.append("multipliers are folded: exact for Adam and AdamW, not under clipping by the gradient's norm")
        return said

    def __repr__(self) -> str:
        return "\n".join([repr(self.explain()), "", *self.notes()])

    def _repr_html_(self) -> str:
        from html import escape

        return self.explain()._repr_html_() + "".join(f"<p>{escape(note)}</p>" for note in self.notes())

    def to_json(self, table: str | Parametrization = "mup") -> str:
        """The plan as JSON, for trainers that take a table and no dependency: a list of {name, role, kind, init_std, lr, eps,
        weight_decay}, each number a factor on that of the base model; for a vector also `start`, a factor on its values."""
        rows = []
        factors = self.factors(table)
        for adopted in self.parameters:
            own = factors[adopted.name]
            row = {"name": adopted.name, "role": adopted.role, "kind": adopted.kind, "init_std": own.std, "start": own.start}
            rows.append(row | {"lr": own.lr, "eps": own.eps, "weight_decay": own.weight_decay})
        return json.dumps(rows, indent=1)

    def at(self, width: int) -> Plan:
        """The same plan for another width. Raises Refused where a kind is another one there."""
        model = _made(self.build, width, 0)
        ratio = width / self.base_width
        found = []
        for adopted in self.parameters:
            shape = tuple(model.get_parameter(adopted.name).shape)
            terms = adopted.base_terms
            if adopted.terms != adopted.base_terms:  # the sum's length follows from those of two widths
                grown = math.log(adopted.terms / adopted.base_terms, self.width / self.base_width)
                terms = round(adopted.base_terms * ratio**grown)
            found.append(adopted._replace(shape=shape, terms=terms))
        return replace(self, width=width, parameters=tuple(found), made=[])

    def check(
        self,
        table: str | Parametrization = "mup",
        widths: Sequence[int] | None = None,
        *,
        batches: Iterable | None = None,
        probe: object = None,
        loss: Callable[[nn.Module, object], Tensor] | None = None,
        seeds: Sequence[int] = (0, 1, 2),
        steps: int = 3,
        lr: float = 2.0**-13,
    ) -> pd.DataFrame:
        """A coordinate check of the model under the table, for `exponents`, `suspects` and the figures: see `check_module`.

        widths: default the base, twice and four times the base. batches, probe: what is trained on, one batch a step, and what
        is measured on; default: the plan's batch, its rows divided into `steps` batches and the probe. loss: (module, batch)
        -> (); default: the cross-entropy of the next token.
        """
        widths = tuple(widths or (self.base_width, 2 * self.base_width, 4 * self.base_width))
        loss = loss or (lambda module, batch: next_token_loss(self.forward(module, batch), tokens_of(batch)))
        if batches is None or probe is None:
            parts = _rows_in_parts(self.batch, steps + 1)
            batches, probe = (parts[:-1] if batches is None else batches), (parts[-1] if probe is None else probe)
        table, plans = parametrization(table), {}

        def built(width):
            plan = plans.setdefault(width, self.at(width))
            model = plan.initialise(table, torch.initial_seed())  # the seed that check_module has set
            return model, plan.param_groups(table, lr, eps=1e-15, model=model)

        def kind(adopted):
            return "input" if adopted.role == "tied" else ROUTER if adopted.row == "router" else adopted.kind

        kinds = {adopted.name: kind(adopted) for adopted in self.parameters}
        return check_module(built, widths, loss, batches, probe, seeds=seeds, kinds=kinds, name=table.name)


def logits(module: nn.Module, batch: Tensor | Mapping[str, Tensor]) -> Tensor:
    """The model's output on a batch: its `.logits`, or what it returns, or the first of what it returns."""
    settings = {"use_cache": False} if "use_cache" in inspect.signature(module.forward).parameters else {}  # of transformers
    out = module(**batch, **settings) if isinstance(batch, Mapping) else module(batch, **settings)
    out = getattr(out, "logits", out)
    return out if isinstance(out, Tensor) else out[0]


def tokens_of(batch: Tensor | Mapping[str, Tensor]) -> Tensor:
    return batch["input_ids"] if isinstance(batch, Mapping) else batch


def next_token_loss(scores: Tensor, tokens: Tensor) -> Tensor:
    """(B, T, V) logits, (B, T) tokens -> (), nats per token."""
    return F.cross_entropy(scores[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def growing(config, width_field: str, *fields: str) -> Build:
    """`build` for `adopt`, from a Hugging Face config: width -> model, the width field set and the others grown in proportion.

        build = growing(MixtralConfig(hidden_size=64, ...), "hidden_size", "intermediate_size", "num_attention_heads")

    What is not named stays. Raises ValueError for a field that the config does not have, or that would not be an integer.
    """
    base = getattr(config, width_field, None)
    require(whole(base, 1), width_field, base, f"is no size in {type(config).__name__}")
    for name in fields:
        require(whole(getattr(config, name, None), 1), name, getattr(config, name, None), f"is no size in {type(config).__name__}")

    def build(width: int) -> nn.Module:
        from transformers import AutoModelForCausalLM  # the extra `hf`

        sizes = {width_field: width}
        for name in fields:
            grown, rest = divmod(getattr(config, name) * width, base)
            require(rest == 0 and grown > 0, name, getattr(config, name) * width / base, f"at {width_field} {width}: no integer")
            sizes[name] = grown
        return AutoModelForCausalLM.from_config(type(config)(**config.to_diff_dict() | sizes))

    return build


def starred(name: str) -> str:
    """The name with * for each number: layers.3.mlp.gate -> layers.*.mlp.gate."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _made(build: Build, width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    module = build(width)
    if not isinstance(module, nn.Module):
        raise TypeError(f"build must return a module, got {type(module).__name__}")
    return module


def _given(pattern: str, role: Role) -> tuple[str, tuple[int, ...] | None]:
    name, axes = role if isinstance(role, tuple) else (role, None)
    require(name in ROLES, f"roles[{pattern!r}]", name, f"must be one of {', '.join(ROLES)}")
    return name, None if axes is None else tuple(axes)


def _default_batch(module: nn.Module) -> Tensor:
    vocabulary = getattr(getattr(module, "config", None), "vocab_size", None)
    require(whole(vocabulary, 1), "batch", None, "is needed: the model has no config.vocab_size to draw random tokens from")
    return torch.randint(vocabulary, (4, 32), generator=torch.Generator().manual_seed(0))


def _config_changes(base: nn.Module, wide: nn.Module) -> tuple[str, ...]:
    configs = [getattr(module, "config", None) for module in (base, wide)]
    if not all(hasattr(config, "to_dict") for config in configs):
        return ()
    before, after = (config.to_dict() for config in configs)
    return tuple(f"{name} {before.get(name)} -> {value}" for name, value in after.items() if before.get(name) != value)


def _rows_in_parts(batch: object, number: int) -> list:
    """The batch's rows divided into so many batches."""
    rows = len(tokens_of(batch))
    require(rows >= number, "batch", rows, f"has too few rows for {number - 1} steps and a probe: give more, or batches and probe")
    cut = [slice(at * rows // number, (at + 1) * rows // number) for at in range(number)]
    if isinstance(batch, Mapping):
        return [{name: value[part] for name, value in batch.items()} for part in cut]
    return [batch[part] for part in cut]


def _adopted(wide: nn.Module, base: nn.Module, traces: list[Trace], given: Mapping[str, tuple]) -> list[Adopted]:
    """What each trainable parameter is. Raises Refused."""
    before, after = (dict(module.named_parameters()) for module in (base, wide))
    if set(before) != set(after):
        only = sorted(set(before) ^ set(after))
        raise Refused([f"build makes models of other parameters: {', '.join(only[:5])}{' ...' if len(only) > 5 else ''}"])
    for pattern in given:
        require(any(fnmatchcase(name, pattern) for name in after), "roles", pattern, "no parameter has such a name")
    found, problems = [], _width_in_the_forward_pass(*traces)
    roles = _Roles(base, traces[0])
    for name, param in after.items():
        if not param.requires_grad:
            continue
        shapes = tuple(param.shape), tuple(before[name].shape)
        own = [value for pattern, value in given.items() if fnmatchcase(name, pattern)]
        try:
            found.append(_parameter(name, shapes, roles, traces, *(own[0] if own else (None, None))))
        except ValueError as error:
            problems.append(f"{name} {shapes[0]}: {error}")
    stacks = [adopted.name for adopted in found if adopted.role.startswith("experts") and len(adopted.shape) > 2]
    if stacks and not any(adopted.role == "router" for adopted in found) and not given:
        problems.append(f"{', '.join(sorted(map(starred, stacks)))}: a stack of experts, and nothing that chooses among them: name the roles by hand")
    if not problems and all(adopted.kind == "fixed" for adopted in found):
        problems.append("build makes a model of the same shape at both widths")
    if problems:
        raise Refused(dict.fromkeys(problems))
    return found


def _parameter(name: str, shapes: tuple, roles: _Roles, traces: list[Trace], role: str | None, axes: tuple | None) -> Adopted:
    """What the parameter is. Raises ValueError where use and shapes leave it open."""
    role = role or roles.role(name, len(shapes[0]))
    summed = [_summed(trace, name) for trace in traces]
    if axes is None:
        both = set(summed[0]) & set(summed[1]) or set(summed[0])
        axes = min(both, default=()) if role not in VECTORS and role != "embedding" else ()
        terms = [found.get(axes, 1) for found in summed]
    else:
        axes = tuple(sorted(axis % len(shapes[0]) for axis in axes))
        terms = [math.prod(shape[axis] for axis in axes) for shape in reversed(shapes)]
    if role in MATRICES and not axes:
        raise ValueError(f"given as {role}, and no product shows which axis it sums over: give it, roles={{{name!r}: ({role!r}, (axis,))}}")
    return Adopted(name, role, kind_of(*shapes, axes), *shapes, axes, terms[1], terms[0])


def _summed(trace: Trace, name: str) -> dict[tuple[int, ...], int]:
    """The axes that the parameter's products sum over -> how many terms; several where its products differ."""
    uses = [use for use in trace.uses.get(name, ()) if use.how in ("product", "convolution")]
    return {axes: max(use.terms for use in uses if use.axes == axes) for axes in {use.axes for use in uses}}


class _Roles:
    """The role of each parameter, from what one forward pass does with it."""

    def __init__(self, module: nn.Module, trace: Trace):
        self.module, self.trace = module, trace
        self.experts = {name for name in trace.uses if self._is_expert(name)}
        routers = trace.routers
        self.blocks = {name: max((_common(name, router) for router in routers), key=len, default="") for name in self.experts}

    def _is_expert(self, name: str) -> bool:
        products = [use for use in self.trace.uses[name] if use.how == "product"]
        stacked = self.module.get_parameter(name).ndim > 2 and products
        return bool(stacked) or bool(products) and self.trace.inputs[name].gathered

    def role(self, name: str, ndim: int) -> str:
        """Raises ValueError where the use leaves it open, or muP has no role for it."""
        uses, trace = self.trace.uses.get(name, []), self.trace
        hows = {use.how for use in uses}
        if not uses:
            raise ValueError("the forward pass does not use it: give a longer batch, freeze it, or name its role")
        if unknown := sorted(hows - {"product", "lookup", "convolution", "elementwise"}):
            raise ValueError(f"it is used by {unknown[0]}, whose meaning is not known: name its role and axes")
        if name in trace.multiplied:
            raise ValueError("its rows are looked up, and then multiplied with an activation and summed: muP has no role for that; name one")
        if len({use.axes for use in uses if use.how == "product"}) > 1 or {"product", "convolution"} <= hows:
            raise ValueError("its products sum over different axes: it has two kinds; name its role and axes")
        if {"product", "lookup"} <= hows:
            if name not in trace.readouts:
                raise ValueError("it is looked up and multiplied, and the product is not the readout: name its role and axes")
            return "tied"
        if "product" in hows:
            return self._of_a_product(name)
        if "lookup" in hows:
            return "embedding"
        if "convolution" in hows:
            return "hidden"  # or whatever its axes say
        if ndim > 1 and any(use.ndim > 1 for use in uses):
            raise ValueError(f"a matrix that is only added or multiplied elementwise: name it, roles={{{name!r}: 'bias'}} (or 'embedding', 'gain')")
        return "gain" if any(name in origin.gains for origin in trace.inputs.values()) else "bias"

    def _of_a_product(self, name: str) -> str:
        trace, source = self.trace, self.trace.inputs[name]
        if name in trace.routers:
            return "router"
        if name in trace.readouts:
            return "unembedding"
        block = next((block for block in set(self.blocks.values()) if block and name.startswith(block)), "")
        inner = not self._from_the_stream(source) and any(_common(name, other).startswith(block) for other in source.matrices)
        if name in self.experts:
            return "experts_down" if inner and source.matrices & self.experts else "experts_up"
        if block:
            return "shared_down" if inner else "shared_up"
        if name in trace.mixing:
            return "attention"
        return "attention_out" if source.mixed else "hidden"

    def _from_the_stream(self, origin: Origin) -> bool:
        """Whether it contains an embedding, as the residual stream does."""
        return any(use.how == "lookup" for table in origin.tables for use in self.trace.uses[table])


def _common(name: str, other: str) -> str:
    """The module that both parameters are in: the dotted path that their names share."""
    shared = []
    for ours, theirs in zip(name.split(".")[:-1], other.split(".")[:-1], strict=False):
        if ours != theirs:
            break
        shared.append(ours)
    return ".".join(shared) + "."


def _width_in_the_forward_pass(base: Trace, wide: Trace) -> list[str]:
    """A model whose forward pass multiplies by a number that changes with the width scales by itself: muP on top would double it."""
    said = []
    for value, what in wide.numbers.items():
        if value not in base.numbers and base.numbers:
            said.append(f"{what}: the forward pass multiplies it by {value:g}, and by no such number at the base width")
    return said
