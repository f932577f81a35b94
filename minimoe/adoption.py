"""muP, or any table, for a model that is not ours: its parameters' roles are read off one forward pass, or it is refused.

    plan = adopt(build, width=2048, base_width=256, batch=tokens)    # build(width) makes the model; print(plan) says what it is
    model = plan.initialise("mup", seed=0)
    optimizer = torch.optim.AdamW(plan.param_groups("mup", lr=1e-2))
    exponents(plan.check("mup"))                                      # predicted beside measured, on the model itself

The forward pass stays as it is. A multiplier m is *folded*: Adam cannot tell a weight of multiplier m, std s, LR l, eps e and
weight decay w from one of 1, m s, m l, e / m and w / m (the abc symmetry, Tensor Programs V, appendix J.2.1). The model can
then be saved, loaded and trained without minimoe. Folding is exact for Adam alone, and without clipping by the gradient's norm.

A weight that is tied (embedding and readout at once) has one std and one LR, and muP's two rows agree in both. They differ in
the multiplier of the readout, which goes into the gain of the norm before it.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from .causal import Batch, Build, config_changes, logits, made_by, next_token_loss, rows_in_parts, scalings, text_for, tokens_of
from .checks import require, whole
from .explanations import Explanation, why
from .modules import ROUTER, check_module
from .parametrization import CELLS, Parametrization, Rule
from .roles import AT_BASE, moved_betas
from .roles_by_use import VECTORS, Adopted, Given, Refused, adopted, given_roles
from .tables import parametrization
from .traces import Trace, traced


def adopt(
    build: Build,
    width: int,
    base_width: int,
    batch: Batch | None = None,
    *,
    roles: Mapping[str, str | Given] | None = None,
    forward: Callable[[nn.Module, object], Tensor] = logits,
) -> Plan:
    """What a table needs to know of the model that `build` makes: read off a forward pass at both widths, or refused.

    build: width -> module; see `growing` for a config of Hugging Face. base_width: where the model is known to train well; there
    every table leaves it as it is. batch: what the model is run on: token ids (B, T), or keyword arguments that contain
    `input_ids` (default: characters of the default corpus, for a model with a `config.vocab_size`). Every parameter must be
    used on it: experts that are modules of their own need a token each. forward: (module, batch) -> logits, for a model that is
    called otherwise. roles: parameter's name or pattern -> one of `roles_by_use.ROLES`, or (role, the axes that its product
    sums over). A role that is given counts before one that is traced.

    Raises Refused, a ValueError, with one line for each parameter whose role or kind stays open, and the remedy.
    """
    for name, value in (("width", width), ("base_width", base_width)):
        require(whole(value, 1), name, value, "must be a positive integer")
    require(width != base_width, "width", width, "must differ from base_width: a kind is what grows between the two")
    base, wide = made_by(build, base_width, 0), made_by(build, width, 0)
    seen = batch
    if batch is None:
        batch = text_for(base)
        seen = batch[:8]  # enough to be traced on
    traces = [traced(module, lambda module=module: forward(module, seen)) for module in (base, wide)]
    before, after = scalings(base), scalings(wide)
    growing = {path: value for path, value in before.items() if after.get(path, value) != value}
    found = adopted(wide, base, traces, given_roles(roles or {}), [after[path] for path in growing])
    return Plan(build, width, base_width, batch, forward, tuple(found), traces[0], config_changes(base, wide), growing)


FOLDED_CELLS = tuple(cell for cell in CELLS if cell != "multiplier")  # in which the multiplier is folded


class Factors(NamedTuple):
    """What one parameter's numbers are, over those of the base model, the multiplier folded in."""

    std: float
    lr: float
    eps: float
    weight_decay: float
    one_minus_beta: float
    final_lr: float
    start: float  # the value around which a gain or a bias is drawn

    def times(self, m: float) -> Factors:
        """With a further multiplier folded in."""
        changed = {"std": self.std * m, "lr": self.lr * m, "eps": self.eps / m, "weight_decay": self.weight_decay / m}
        return self._replace(**changed, start=self.start * m)


@dataclass(frozen=True, repr=False)
class Plan:
    """What `adopt` found of a model, and what a table makes of it. Printed, it shows muP's factors like `explain`."""

    build: Build
    width: int
    base_width: int
    batch: object
    forward: Callable[[nn.Module, object], Tensor]
    parameters: tuple[Adopted, ...]
    trace: Trace  # of the base model
    changed: tuple[str, ...] = ()  # fields of the model's config that differ between the widths
    scalings: Mapping[str, float] = field(default_factory=dict)  # the base model's, of attention modules whose head size grows
    made: list = field(default_factory=list, compare=False)  # the last model that `initialise` made, and its table

    def factors(self, table: str | Parametrization) -> dict[str, Factors]:
        """Parameter's name -> what the table makes of its numbers. Raises Refused where the table has no rule for a tied weight,
        a multiplier is 0, or a cell follows another size than the width."""
        table = parametrization(table)
        others = {name for rule in dict(table.rules).values() for name in rule.ratios} - {"fan_in", "width", *AT_BASE}
        if others:
            raise Refused(
                [f"{table.name} has cells in {', '.join(sorted(others))}: a plan knows how the width grows, and no other size"]
            )
        found = {own.name: self._factors(own, table) for own in self.parameters}
        for name in self.readout_norm:
            found[name] = found[name].times(self.readout_factor(table))
        return found

    def _factors(self, own: Adopted, table: Parametrization) -> Factors:
        ratios = self._ratios(own)
        rule = self._tied_rule(own, table) if own.role == "tied" else table[own.row] if own.row else Rule()
        cells = [getattr(rule, cell)(ratios) for cell in FOLDED_CELLS]
        multiplier = rule.multiplier(ratios)
        if multiplier == 0:
            raise Refused([f"{own.name}: {table.name} gives it a multiplier of 0, which cannot be folded"])
        return Factors(math.sqrt(cells[0]), *cells[1:], 1.0).times(multiplier)

    def _ratios(self, own: Adopted) -> dict[str, float]:
        return {"fan_in": own.ratio, "width": self.width / self.base_width, **AT_BASE}

    def _tied_rule(self, own: Adopted, table: Parametrization) -> Rule:
        """The embedding's row, where the unembedding's says the same but for the multiplier."""
        ratios, rules = self._ratios(own), (table["embedding"], table["unembedding"])
        for cell in FOLDED_CELLS:
            looked_up, read_out = (getattr(rule, cell)(ratios) for rule in rules)
            if looked_up != read_out:
                said = f"{cell} {looked_up:g} as an embedding, {read_out:g} as a readout"
                raise Refused([f"{own.name} is tied, and {table.name} has no rule for both of its uses ({said}): untie it"])
        return rules[0]

    @property
    def tied(self) -> Adopted | None:
        """The parameter that is an embedding and a readout; None if there is none."""
        return next((own for own in self.parameters if own.role == "tied"), None)

    @property
    def readout_norm(self) -> tuple[str, ...]:
        """The gain (and the bias) of the norm before a tied readout, if its output goes nowhere else."""
        if self.tied is None:
            return ()
        gains = self.trace.inputs[self.tied.name].gains
        return gains if all(self.trace.gained[gain] == {self.tied.name} for gain in gains) else ()

    def readout_factor(self, table: str | Parametrization) -> float:
        """What the input of a tied readout is multiplied by; 1 where no weight is tied."""
        if self.tied is None:
            return 1.0
        table, ratios = parametrization(table), self._ratios(self.tied)
        return table["unembedding"].multiplier(ratios) / table["embedding"].multiplier(ratios)

    @torch.no_grad()
    def initialise(self, table: str | Parametrization = "mup", seed: int = 0) -> nn.Module:
        """The model at `width`, made after `torch.manual_seed(seed)`, and scaled as the table says.

        A matrix gets the std that it has in the base model of that seed, times the table's factor. What starts at zero stays
        there; gains and biases keep the values that the model gives them. At the base width this is the untouched model, bit
        for bit. Raises Refused where the table has no rule for a parameter.
        """
        table = parametrization(table)
        factors, base, model = (
            self.factors(table),
            made_by(self.build, self.base_width, seed),
            made_by(self.build, self.width, seed),
        )
        for own in self.parameters:
            param, std, start = model.get_parameter(own.name), factors[own.name].std, factors[own.name].start
            if own.role in VECTORS:
                mean = param.mean()
                param.copy_(mean * start + (param - mean) * std) if (std, start) != (1, 1) else None
            elif std != 1 or own.shape != own.base_shape:
                before, after = (m.get_parameter(own.name).float().std(correction=0).item() for m in (base, model))
                param.mul_(before * std / after if after else 1.0)
        self.adjust(model, table)
        self.made[:] = model, table
        return model

    def adjust(self, model: nn.Module, table: str | Parametrization = "mup") -> nn.Module:
        """Put into the forward pass what no weight can hold: the factor of a tied readout that no norm's gain stands before; and,
        where the head size C grows, attention's 1 / C in place of 1 / sqrt(C) (under every table, as in MiniMoE).

        `initialise` calls it, once. A model that was saved and loaded again needs it again, if the plan's notes say so.
        """
        for path, base in self.scalings.items():
            module = model.get_submodule(path)
            module.scaling = base * (module.scaling / base) ** 2
        factor = self.readout_factor(table)
        for name in (self.tied.name, *self.readout_norm) if self.tied else ():
            model.get_parameter(name).readout_factor = factor  # what check_module wants to know
        if factor != 1 and not self.readout_norm:
            find = getattr(model, "get_output_embeddings", None)
            if find is None or (readout := find()) is None:
                raise Refused([f"{self.tied.name} is tied, and its readout is no module and has no gain before it: untie it"])
            readout.register_forward_pre_hook(lambda module, inputs: (inputs[0] * factor, *inputs[1:]))
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
        """Groups for `torch.optim.AdamW`, each with its `role` and the parameters' `names`, and `final_lr` where the table has a
        factor on the end of the role's schedule (see `step.lr_factor`; a library's own scheduler knows nothing of it).

        model: of this plan's shape; default: the last one that `initialise` made. optimizer, max_grad_norm: what you will train
        with; where folded multipliers are not exact there, a UserWarning says so. (transformers' Trainer clips at
        max_grad_norm=1.0 unless told otherwise.)
        Raises ValueError for an lr that is not positive and finite, no model, or a model made under another table.
        """
        require(math.isfinite(lr) and lr > 0, "lr", lr, "must be positive and finite")
        for name, value in (("eps", eps), ("weight_decay", weight_decay)):
            require(math.isfinite(value) and value >= 0, name, value, "must be finite and not negative")
        table = parametrization(table)
        model = self._model_made_under(table) if model is None else model
        if self.width != self.base_width:
            _warn(optimizer, max_grad_norm)
        groups, roles = {}, {own.name: own.role for own in self.parameters}
        for name, own in self.factors(table).items():
            if own.one_minus_beta != 1 and betas is None:
                raise ValueError(f"{name}: its row changes Adam's betas: give those of the base, betas=(0.9, 0.95)")
            settings = {"role": roles[name], "lr": lr * own.lr, "eps": eps * own.eps}
            settings["weight_decay"] = weight_decay * own.weight_decay
            settings |= {} if betas is None else {"betas": moved_betas(betas, own.one_minus_beta)}
            settings |= {} if own.final_lr == 1 else {"final_lr": own.final_lr}
            group = groups.setdefault(tuple(settings.values()), {"params": [], "names": [], **settings})
            group["params"].append(model.get_parameter(name))
            group["names"].append(name)
        return list(groups.values())

    def _model_made_under(self, table: Parametrization) -> nn.Module:
        if not self.made:
            raise ValueError("there is no model yet: call initialise, or give model=")
        model, used = self.made
        if not used.same_rules(table):
            raise ValueError(f"the model was initialised under {used.name!r}, and these would be the groups of {table.name!r}")
        return model

    def explain(self, table: str | Parametrization = "mup", lr: float = 2.0**-6) -> Explanation:
        """One row per tensor, layers that agree together (a * for the layer), like `minimoe.explain`.

        init_std, lr, eps and weight_decay are factors on the base model's, the multiplier folded in; effective_lr is Adam's at
        the base LR `lr`.
        """
        table = parametrization(table)
        factors, rows = self.factors(table), {}
        ends = any(to.final_lr != 1 for to in factors.values())
        for own in self.parameters:
            to, rule = factors[own.name], table[own.row] if own.row else Rule()
            row = {"name": own.tensor, "role": own.role, "kind": own.kind, "shape": own.shape}
            row |= {"fan_in": own.terms, "ratio": own.ratio, "init_std": to.std, "lr": to.lr, "effective_lr": lr * to.lr}
            row |= {"eps": to.eps, "weight_decay": to.weight_decay} | ({"final_lr": to.final_lr} if ends else {})
            row |= {"why": why(own.kind, rule, float(own.ratio != 1))}
            rows[tuple(row.values())] = row
        return Explanation(list(rows.values()))

    def notes(self) -> list[str]:
        """What to know before trusting the plan."""
        said = [f"width {self.base_width} -> {self.width}" + (f": {', '.join(self.changed)}" if self.changed else "")]
        expected = {"output": ("router", "unembedding", "tied"), "input": ("embedding", *VECTORS)}
        for kind, sums in (("output", "a growing size into a fixed one"), ("input", "a fixed size into a growing one")):
            names = {own.tensor for own in self.parameters if own.kind == kind and own.role not in expected[kind]}
            if names:
                said.append(f"of {kind} kind, as each sums over {sums}: {', '.join(sorted(names))}")
        if self.tied:
            where = f"folded into {', '.join(self.readout_norm)}" if self.readout_norm else "a hook, which `adjust` puts in again"
            said.append(f"{self.tied.name} is tied; the multiplier of the readout is {where}")
        if self.scalings:
            said.append(
                "the head size grows: `adjust` sets the modules' `scaling` to 1 / head size, and a saved model needs it again"
            )
        if idle := {own.tensor for own in self.parameters if own.name in self.trace.without_gradient}:
            said.append(f"used, and without a gradient: {', '.join(sorted(idle))}")
        said.append("multipliers are folded: exact under Adam and AdamW, not under clipping by the gradient's norm")
        return said

    def __repr__(self) -> str:
        return "\n".join([repr(self.explain()), "", *self.notes()])

    def _repr_html_(self) -> str:
        return self.explain()._repr_html_() + "".join(f"<p>{escape(note)}</p>" for note in self.notes())

    def to_json(self, table: str | Parametrization = "mup") -> str:
        """For trainers that take a table and no dependency: a JSON list of {name, role, kind, init_std, start, lr, eps,
        weight_decay}, each number a factor on the base model's (start: on the mean of a gain or a bias); also one_minus_beta and
        final_lr (on the end of the schedule), where they are not 1."""
        factors = self.factors(table)
        rows = [
            {"name": own.name, "role": own.role, "kind": own.kind, "init_std": to.std, "start": to.start}
            | {"lr": to.lr, "eps": to.eps, "weight_decay": to.weight_decay}
            | {cell: getattr(to, cell) for cell in ("one_minus_beta", "final_lr") if getattr(to, cell) != 1}
            for own in self.parameters
            for to in [factors[own.name]]
        ]
        return json.dumps(rows, indent=1)

    def at(self, width: int) -> Plan:
        """The same plan for another width."""
        model = made_by(self.build, width, 0)
        shapes = [tuple(model.get_parameter(own.name).shape) for own in self.parameters]
        parameters = tuple(own._replace(shape=shape) for own, shape in zip(self.parameters, shapes, strict=True))
        return replace(self, width=width, parameters=parameters, made=[])

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
        lr: float = 2.0**-15,
    ) -> pd.DataFrame:
        """A coordinate check of the model under the table, for `exponents`, `suspects` and the figures: see `check_module`.

        widths: default once, twice and four times the base. batches, probe: one batch a step, and what is measured on; default:
        the plan's batch, its rows divided into `steps` batches and the probe. loss: (module, batch) -> (); default: the
        cross-entropy of the next token. lr: small against the weights; transformers' start at a std of 0.02.
        """
        widths = tuple(widths or (self.base_width, 2 * self.base_width, 4 * self.base_width))
        loss = loss or (lambda module, batch: next_token_loss(self.forward(module, batch), tokens_of(batch)))
        parts = rows_in_parts(self.batch, steps + 1) if batches is None or probe is None else []
        batches, probe = parts[:-1] if batches is None else batches, parts[-1] if probe is None else probe
        table, plans = parametrization(table), {width: self.at(width) for width in widths}

        def built(width: int) -> tuple[nn.Module, list[dict]]:
            model = plans[width].initialise(table, torch.initial_seed())  # the seed that check_module has set
            return model, plans[width].param_groups(table, lr, eps=1e-15)

        def kind(own: Adopted) -> str:
            return "input" if own.role == "tied" else ROUTER if own.row == "router" else own.kind

        kinds = {own.name: kind(own) for own in self.parameters}
        return check_module(built, widths, loss, batches, probe, seeds=seeds, kinds=kinds, name=table.name)


def _warn(optimizer: type, max_grad_norm: float | None) -> None:
    """Where folded multipliers are not exact."""
    if not issubclass(optimizer, torch.optim.Adam):  # AdamW is one
        warnings.warn(f"the rules are Adam's: under {optimizer.__name__} these groups are wrong", stacklevel=3)
    if max_grad_norm:
        said = f"clipping at a gradient norm of {max_grad_norm:g} is not exact: folded multipliers change the norm"
        warnings.warn(f"{said} (max_grad_norm=0 turns it off)", stacklevel=3)
