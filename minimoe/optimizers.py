"""How a tensor is updated: the one place that says so, for one run and for many at once.

An optimizer has two forms here, which tests hold equal: for one run (`AdamW`) and for R runs whose weights are one matrix
(`BatchedAdamW`). Both know each tensor's role, so that a schedule can give each role a factor of its own. An optimizer that
needs a weight as a matrix (Muon) takes its (R, *shape) views: see `BatchedAdamW.views`.

Letters: R runs, P parameters of one run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


class AdamW:
    """AdamW (arXiv 1711.05101) for one run: torch's own, fused, over groups that know their roles."""

    def __init__(self, groups: Iterable[dict]):
        """groups: from `roles.param_groups`, with betas."""
        merged: dict[tuple, dict] = {}  # roles with equal numbers: each group costs AdamW a tenth of a millisecond
        for group in groups:
            settings = {name: group[name] for name in ("lr", "eps", "weight_decay", "betas")}
            whole = merged.setdefault(tuple(settings.values()), {"params": [], "members": {}, "peak": group["lr"], **settings})
            whole["params"] += group["params"]
            whole["members"].setdefault(group["role"], []).extend(group["params"])
        self.torchs = torch.optim.AdamW(merged.values(), fused=True)

    def zero_grad(self) -> None:
        self.torchs.zero_grad()

    def step(self, factors: Mapping[str, float]) -> None:
        """Update every parameter by its gradient, at factors[role] of its peak LR."""
        for group in list(self.torchs.param_groups):
            if len({factors[role] for role in group["members"]}) > 1:
                self._split(group)
        for group in self.torchs.param_groups:
            group["lr"] = group["peak"] * factors[next(iter(group["members"]))]
        self.torchs.step()

    def _split(self, group: dict) -> None:
        """Give each of the group's roles a group of its own; torch keeps a parameter's state by parameter."""
        place = self.torchs.param_groups.index(group)
        parts = [{**group, "params": params, "members": {role: params}} for role, params in group["members"].items()]
        self.torchs.param_groups[place : place + 1] = parts


class BatchedAdamW:
    """AdamW for R runs as one program: every weight has its own LR, eps and decay, and no step reads from the device."""

    def __init__(self, weights: Tensor, shapes: Mapping[str, torch.Size], settings: Sequence[Sequence[Mapping]]):
        """weights: (R, P), updated in place. shapes: name -> shape of each tensor of one run, in the order of P.
        settings: for each run and tensor its role, lr, eps, weight_decay and betas."""
        self.weights, self.shapes = weights, dict(shapes)
        self.sizes = [shape.numel() for shape in self.shapes.values()]
        self.roles = [tensor["role"] for tensor in settings[0]]
        self.mean, self.square = torch.zeros_like(weights), torch.zeros_like(weights)
        self.lr, self.eps, self.decay = (self._numbers(settings, name) for name in ("lr", "eps", "weight_decay"))
        self.decays = any(tensor["weight_decay"] for run in settings for tensor in run)
        betas = {tensor["betas"] for run in settings for tensor in run}
        self.betas = betas.pop() if len(betas) == 1 else self._columns_of_betas(settings)
        self.steps = 0

    def views(self, matrix: Tensor) -> dict[str, Tensor]:
        """(R, P) or (P,) -> name -> (R, *shape) or shape: each tensor as the model has it, without a copy."""
        parts = zip(self.shapes.items(), matrix.split(self.sizes, dim=-1), strict=True)
        return {name: part.unflatten(-1, tuple(shape)) if shape else part[..., 0] for (name, shape), part in parts}

    @torch.no_grad()
    def step(self, gradient: Tensor, factors: Mapping[str, float]) -> None:
        """Update every weight by its gradient (R, P), at factors[role] of its peak LR."""
        self.steps += 1
        factor, (first, second) = self._factor(factors), self.betas
        if self.decays:
            self.weights.mul_(1 - factor * self.lr * self.decay)
        self.mean.lerp_(gradient, 1 - first)
        if isinstance(second, Tensor):
            self.square.mul_(second).add_(gradient * gradient * (1 - second))
        else:
            self.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        scale = (self.square.sqrt() / (1 - second**self.steps) ** 0.5).add_(self.eps)
        size = -factor / (1 - first**self.steps)
        if isinstance(size, Tensor):
            self.weights.addcdiv_(self.mean * self.lr * size, scale)
        else:
            self.weights.addcdiv_(self.mean * self.lr, scale, value=size)

    def _factor(self, factors: Mapping[str, float]) -> float | Tensor:
        """The factor of all weights where the roles agree; else (P,), each weight's own."""
        each = [factors[role] for role in self.roles]
        return each[0] if len(set(each)) == 1 else self._repeated(torch.tensor(each, dtype=torch.float64)[None])[0]

    def _numbers(self, settings: Sequence[Sequence[Mapping]], name: str) -> Tensor:
        """(R, P): a number for each tensor of each run, repeated for each of its weights."""
        return self._repeated(torch.tensor([[tensor[name] for tensor in run] for run in settings], dtype=torch.float64))

    def _columns_of_betas(self, settings: Sequence[Sequence[Mapping]]) -> tuple[Tensor, Tensor]:
        table = torch.tensor([[tensor["betas"] for tensor in run] for run in settings], dtype=torch.float64)
        return self._repeated(table[..., 0]), self._repeated(table[..., 1])

    def _repeated(self, table: Tensor) -> Tensor:
        return table.repeat_interleave(torch.tensor(self.sizes), dim=1, output_size=sum(self.sizes)).to(self.weights)
