"""The course's exercises: each check takes what a reader wrote, and says what is wrong with the answer, or that it is right.

A wrong answer raises `Wrong`, whose message names the fault; a notebook shows the message alone, without a traceback.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from .config import Config
from .mutations import deep_mystery, mystery
from .parametrization import CELLS, Monomial, Parametrization, as_monomial
from .tables import PARAMETRIZATIONS
from .theory import predicted_exponents
from .transfer import mean_losses

if TYPE_CHECKING:
    from .adoption import Plan

DATA = Path(__file__).parent.parent / "data"  # beside the package, in a checkout; MINIMOE_DATA names another folder
NEAR = 0.25  # how far a measured exponent may be from the law's


class Wrong(AssertionError):
    """An answer that is not right yet; the message says what is wrong with it."""

    def _render_traceback_(self) -> list[str]:  # what a notebook shows in place of a traceback
        return [f"Not yet: {self}"]


def shipped(name: str) -> Path:
    """The path of a file that comes with the course, such as "sweeps/transfer.jsonl", wherever the notebook lies.

    The environment variable MINIMOE_DATA names the folder, where it is not the checkout's data/. Raises FileNotFoundError, with
    what to do, if there is no such file.
    """
    folder = Path(os.environ.get("MINIMOE_DATA", DATA))
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{name} is not in {folder.name}/, the folder of shipped data: install minimoe from a checkout of the course "
            "(pip install --editable .), or set MINIMOE_DATA to its folder data/"
        )
    return path


def require(right: bool, wrong: str) -> None:
    """Raise `Wrong` with these words unless the answer is right."""
    if not right:
        raise Wrong(wrong)


def asked(answer: Callable, *arguments):
    """What the reader's function returns. Raises `Wrong` for a function that is still blank."""
    found = answer(*arguments)
    require(found is not None and found is not ..., f"`{answer.__name__}` returns nothing: fill in the blank")
    return found


def check_sign_step(step: Callable[[Tensor, Tensor, float], Tensor]) -> str:
    """step(W, gradient, lr) -> W after the first step of Adam, compared with torch's Adam (its epsilon out of the way)."""
    generator = torch.Generator().manual_seed(0)
    W, lr = torch.randn(4, 3, generator=generator), 0.1
    gradient = torch.randn(4, 3, generator=generator) * torch.tensor([1e-3, 1.0, 1e3])
    gradient[0, 0] = 0
    given = W.clone()
    moved = torch.as_tensor(asked(step, given, gradient, lr))
    require(torch.equal(given, W), "your function changes W itself: return a new tensor")
    require(moved.shape == W.shape, f"W has the shape {tuple(W.shape)}, your answer {tuple(moved.shape)}")
    weight = torch.nn.Parameter(W.clone())
    weight.grad = gradient.clone()
    torch.optim.Adam([weight], lr=lr, eps=1e-12).step()
    right, sign = weight.detach(), lr * gradient.sign()
    require(not torch.allclose(moved, W - lr * gradient), "this is the step of SGD: Adam's does not know the gradient's size")
    require(not torch.allclose(moved, W + sign), "the loss goes up: a step goes against the gradient")
    require(not torch.allclose(moved, -sign, atol=1e-6), "this is the step alone: return W after the step")
    worst = int((moved - right).abs().nan_to_num(math.inf).argmax())
    entries = (f"{name} {float(values.flatten()[worst]):+.3g}" for name, values in (("yours", moved - W), ("Adam's", right - W)))
    where = f"where the gradient is {float(gradient.flatten()[worst]):+.3g} the step is: {', '.join(entries)}"
    require(torch.allclose(moved, right, atol=1e-6), where)
    return "Right: the first step of Adam has the size of the LR, whatever the gradient's."


def check_gates(gates: Callable[[Tensor, int], Tensor]) -> str:
    """gates(logits, k) -> (N, E): the raw gates of arXiv 2508.09752, 0 for an expert that is not active."""
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    k = 2
    found = torch.as_tensor(asked(gates, logits, k))
    require(found.shape == logits.shape, f"return a gate for each of the 8 experts, (64, 8); yours has {tuple(found.shape)}")
    active = (found != 0).sum(-1)
    require(bool((active == k).all()), f"{k} experts are active for each token; yours has up to {int(active.max())}")
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(k).indices, 1.0)
    require(torch.equal((found != 0).float(), chosen), "these are not the experts with the largest logits")
    right = torch.softmax(logits, -1) * chosen
    sums_to_one = torch.allclose(found.sum(-1), torch.ones(64), atol=1e-5)
    require(not sums_to_one, "the gates sum to 1: the softmax is over all 8 experts, and comes before the choice")
    require(torch.allclose(found, right, atol=1e-5), "the right experts, but not with the values of the softmax over all 8")
    return f"Right: the softmax first, then the choice; here a token's gates sum to {float(right.sum(-1).mean()):.2f} on average."


def check_router_row(init_var: Monomial | float, multiplier: Monomial | float, lr: Monomial | float) -> str:
    """Is this row, of multiplier 1, the training of muP's router? Cells are numbers or powers such as 1 / fan_in."""
    cells = {name: as_monomial(cell) for name, cell in zip(CELLS, (init_var, multiplier, lr), strict=False)}
    require(cells["multiplier"] == as_monomial(1), f"the multiplier is {cells['multiplier']}: the task asks for 1")
    wrong = _unlike_mup(PARAMETRIZATIONS["mup"].replace("router", "yours", **cells))
    require(not wrong, "; ".join(wrong))
    return "Right: in effect muP's router, without a multiplier (DMFT's rule, arXiv 2601.20205)."


def check_coordinates(updates: Callable[[str, Sequence[int]], Sequence[float]]) -> str:
    """updates(table, widths) -> for each width the RMS of dW x of the first layer's router, after an Adam step."""
    widths, laws = (32, 64, 128, 256), {"sp": 1.0, "mup": 0.0}
    for table, law in laws.items():
        sizes = np.asarray(asked(updates, table, widths), dtype=float)
        require(sizes.shape == (4,), f"under {table}: one number for each of the widths {widths}, yours has {sizes.shape}")
        require(bool((np.isfinite(sizes) & (sizes > 0)).all()), f"under {table}: {sizes} are not sizes of an update")
        slope = np.polyfit(np.log2(widths), np.log2(sizes), 1)[0]
        said = f"under {table} yours grows like n^{slope:+.2f}, the law says n^{law:+.0f}"
        if table == "sp" and 0.5 < slope < 1:
            said += " (symbols drawn at random have too little in common: use text)"
        if table == "mup" and abs(slope + 0.5) < NEAR:
            said += " (n^-1/2 is the law of the logits at init: take the weight's change, W after less W before)"
        require(abs(slope - law) < NEAR, said)
    return "Right: SP's router moves its logits by n, muP's by a constant."


def check_mended(table: Parametrization, number: int) -> str:
    """Is this `mystery(number)` with its one wrong cell mended, and nothing else changed?"""
    changed = _changed_cells(table, mystery(number), f"mystery({number})")
    if not table.same_rules(PARAMETRIZATIONS["mup"]):
        require(len(changed) == 1, f"one cell is wrong; yours changes {len(changed)}")
        raise Wrong("; ".join(_unlike_mup(table)) or "this cell is not as muP writes it")
    return f"Right: {changed[0][0]}.{changed[0][1]}."


def check_deep_mended(table: Parametrization) -> str:
    """Is this `deep_mystery()` with its one wrong cell mended, and nothing else changed?"""
    broken, right = deep_mystery(), PARAMETRIZATIONS["depth-mup"]
    changed = _changed_cells(table, broken, "deep_mystery()")
    require(len(changed) == 1, f"one cell is wrong; yours changes {len(changed)}")
    ((role, cell),) = changed
    wanted = getattr(right[role], cell)
    said = f"{role}.{cell} is {getattr(table[role], cell)} in yours"
    require(wanted != getattr(broken[role], cell), f"{said}: this cell was right")
    require(table.same_rules(right), f"{said}: the right cell, with another power of the depth than the other weights of a block")
    return f"Right: {role}.{cell} = {wanted}."


def _changed_cells(table: Parametrization, broken: Parametrization, called: str) -> list[tuple[str, str]]:
    """(role, cell) of each cell that is not as in `broken`. Raises `Wrong` for what is no table, or if there is none."""
    require(isinstance(table, Parametrization), f"give a table, as `{called}.replace(...)` returns it")
    cells = [(role, cell) for role in table.roles for cell in CELLS]
    changed = [(role, cell) for role, cell in cells if getattr(table[role], cell) != getattr(broken[role], cell)]
    require(bool(changed), "this is the mystery as it was: change the wrong cell")
    return changed


def _unlike_mup(table: Parametrization) -> list[str]:
    """Where the table's exponents of init and update differ from muP's, in words."""
    ours, mups = predicted_exponents(Config(table)), predicted_exponents(Config("mup"))
    return [
        f"{tensor}: the {quantity} goes like n^{ours.get((tensor, quantity), math.nan):+g}, muP's like n^{power:+g}"
        for (tensor, quantity), power in mups.items()
        if quantity in ("init", "update") and ours.get((tensor, quantity)) != power
    ]


@dataclass
class Budget:
    """Runs to be bought: `run(width, lr)` looks a run up in a shipped sweep, for the price of (width / smallest width)^2.

    frame: rows of one table. spent: what the runs so far cost; a run that was bought already costs nothing.
    """

    frame: pd.DataFrame
    limit: float
    bought: dict[tuple[int, float], float] = field(default_factory=dict)

    def __post_init__(self):
        means = mean_losses(self.frame)
        self.losses = {(int(row.width), float(row.lr)): float(row.loss) for row in means.itertuples()}
        self.smallest, self.largest = int(means.width.min()), int(means.width.max())

    @property
    def spent(self) -> float:
        return sum((width / self.smallest) ** 2 for width, _ in self.bought)

    def run(self, width: int, lr: float) -> float:
        """The validation loss of this width at this LR. Raises `Wrong` where the sweep has no such run, or the budget ends."""
        if (width, lr) not in self.losses:
            there = ", ".join(f"2^{math.log2(own):g}" for size, own in self.losses if size == width)
            raise Wrong(f"no run of width {width} at LR {lr:.4g}: " + (f"there are {there}" if there else "no such width"))
        self.bought[width, lr] = self.losses[width, lr]
        require(self.spent <= self.limit, f"the budget is {self.limit:g}, and this run brings it to {self.spent:g}")
        return self.losses[width, lr]


def check_budget(tune: Callable[[Callable[[int, float], float]], float], frame: pd.DataFrame, limit: float) -> str:
    """tune(run) -> an LR for the largest width of `frame` (one table), found with runs that cost at most `limit`."""
    budget = Budget(frame, limit)
    lr = float(asked(tune, budget.run))
    own = {own_lr: loss for (width, own_lr), loss in budget.losses.items() if width == budget.largest}
    require(lr in own, f"LR {lr:.4g} is not on the grid of width {budget.largest}: return an LR of the sweep")
    cost = own[lr] - min(own.values())
    price = f"LR 2^{math.log2(lr):g} costs {cost:.3f} nats at width {budget.largest}, for a budget of {budget.spent:g}"
    require(cost < 0.01, f"{price}: more than 0.01")
    return f"Right: {price} of {limit:g}."


def check_allocation(book: Callable[[Mapping, Mapping, Mapping, Mapping], Mapping[str, float]]) -> str:
    """book(before, after, gradients_before, gradients_after) -> name -> nats: each tensor's allocation of one step, by the
    mean of the gradients before and after. All four arguments map names to tensors."""
    generator = torch.Generator().manual_seed(0)
    scales = {"up": 1.0, "down": -2.0}  # of a quadratic loss sum(scale * w^2 / 2), on which the mean of two gradients is exact
    before = {name: torch.randn(3, 4, generator=generator) for name in scales}
    after = {name: weight + 0.3 * torch.randn(3, 4, generator=generator) for name, weight in before.items()}
    gradients = [{name: scales[name] * weight for name, weight in point.items()} for point in (before, after)]
    found = {name: float(value) for name, value in asked(book, before, after, *gradients).items()}
    require(set(found) == set(scales), f"an allocation for each of {', '.join(scales)}; yours has {', '.join(found) or 'none'}")
    right = {name: float(scale * (before[name].square() - after[name].square()).sum() / 2) for name, scale in scales.items()}

    def close(other: Mapping[str, float]) -> bool:
        return all(math.isclose(found[name], value, rel_tol=1e-3, abs_tol=1e-5) for name, value in other.items())

    step = {name: after[name] - before[name] for name in scales}
    at = [{name: -float((gradient[name] * step[name]).sum()) for name in scales} for gradient in gradients]
    require(
        not close({name: -value for name, value in right.items()}), "the sign: a tensor that lowers the loss has a positive one"
    )
    require(not close(at[0]), "this is the gradient before the step alone: the gradient turns on the way, take the mean of both")
    require(not close(at[1]), "this is the gradient after the step alone: take the mean of both")
    require(
        not close({name: 2 * value for name, value in right.items()}), "twice too much: the mean of two gradients, not their sum"
    )
    fall = sum(right.values())
    require(close(right), f"yours add up to {sum(found.values()):+.3f}, but the loss falls by {fall:+.3f}")
    return "Right: the allocations add up to the fall of the loss."


def check_missed(missed: Callable[[nn.Module, Plan], Iterable[str]], module: nn.Module, plan: Plan) -> str:
    """missed(module, plan) -> the names of the parameters that sum over a growing size (hidden or output kind), and are not the
    weight of an nn.Linear."""
    found, kinds = set(asked(missed, module, plan)), {own.name: own.kind for own in plan.parameters}
    linear = {f"{path}.weight" for path, part in module.named_modules() if isinstance(part, nn.Linear)}
    right = {name for name, kind in kinds.items() if kind in ("hidden", "output")} - linear
    for name in sorted(map(str, found - right)):
        require(name in kinds, f"{name} is no parameter of the plan: give the names of plan.parameters")
        require(name not in linear, f"{name} is the weight of an nn.Linear: the rule sees it")
        require(False, f"{name} is of {kinds[name]} kind: it sums over no growing size, and muP leaves its numbers as they are")
    kinds_left = sorted({kinds[name] for name in right - found})
    require(found == right, f"there are {len(right)}; yours are {len(found)}. What is left is of {' and '.join(kinds_left)} kind")
    return f"Right: {len(right)} parameters."
