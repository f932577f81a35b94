"""Coordinate checks: how large every site's output is, how far its updates move it, and what they do to the loss.

For a weight W with input x (W0 and x0 at init, W = W0 + dW and x after some steps) four quantities are measured, each the
root mean square (RMS) over an output's coordinates, on fixed validation tokens:

    init         W0 x0             the weight's output at init
    update       dW x              what the weight's own change does to today's input
    propagated   W0 (x - x0)       what the input's change does through the initial weight
    change       W x - W0 x0       the sum of the last two, which is what other tools show

`update` has a law. `propagated` has none: the input's change is in part aligned with W0 and in part independent of it, and
the two parts grow differently. The sum would condemn a correct muP router, and half excuse a wrong one. And each weight has

    allocation    by how much its steps have lowered the loss of those tokens, in nats (see `allocations`)

The verdict rests on `init`, `update` and `allocation`: muP's three desiderata.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import joblib
import pandas as pd
import torch
from torch import Tensor

from .allocations import Entry, Ledger
from .checks import require, whole
from .config import SIZES as MODEL_SIZES
from .config import SMALLEST_IS_BASE, Config
from .corpus import Corpus, load_corpus
from .grids import Planned, planned_runs
from .model import MiniMoE
from .parametrization import Parametrization
from .probe import OUTSIDE, Observed, observed, output, route_by, sites
from .room import require_memory
from .step import SingleRun, TrainOptions, losses
from .theory import NONE, TOLERANCE, exponents_between, site_labels
from .training import TextData, available_device, one_thread, windows
from .workers import finished

PROBED = 512  # validation tokens
WIDTHS = (64, 128, 256, 512)
SIZES = (*MODEL_SIZES, "batch_size")  # what can grow in a check
LED = 4  # times as large as the independent part of a gradient must the aligned part be, to lead it
LOSS = "loss"  # in place of a tensor: the sum of the allocations, and the true fall of the loss
ROUTINGS = ("free", "forced", "frozen")


def coordinate_check(
    parametrization: str | Parametrization | Sequence[str | Parametrization] = "mup",
    widths: int | Sequence[int] | None = None,
    steps: int = 5,
    seeds: Sequence[int] = (0, 1, 2),
    lr: float = 2.0**-13,
    corpus: str | Corpus = "pydocs",
    *,
    routing: str = "free",
    batch_size: int | Sequence[int] = 16,
    eps: float = 1e-15,
    path: Mapping[str, Iterable] | None = None,
    n_jobs: int | None = None,
    device: str | torch.device | None = None,
    **fields,
) -> pd.DataFrame:
    """Train a few steps at a constant LR (no warm-up, decay or clipping), and measure every site after each.

    One row per parametrization, size, seed, step, layer, tensor (the site's name) and quantity, with its `value`, an RMS or
    nats; the `alignment` of an update: the RMS over what it would be if no two terms of any sum cancelled; the exponent of
    the value in the size that is `predicted` (NaN where there is no theory, as for propagated and change); and what the site is:
    its role, kind, source, degree, mixture and place (see `theory.site_labels`). Step 0 has init; later steps
    have the rest, all since the start. Layer -1 is outside the blocks. Tensors: embedding, q, k, v, o, router, up, down and
    logits, each the output of a weight; scores (of attention), moe (the routed sum) and residual (stream) are no weight's
    own, and have init and change only, but for moe: its update and its propagated part are the sums of those of the experts'
    outer weights, each times its gate; loss has the sum of all allocations, and the true fall. Experts are measured on the tokens
    they get.

    The size is the width (default 64, 128, 256, 512), or the one other field of Config that has several values
    (`granularity=(1, 2, 4)`, `depth=(2, 8)`), or the batch size; then the width is 64 unless you give it. Or several grow
    together: `path={"width": (64, 128), "depth": (2, 4)}`. Slopes are taken against the first of SIZES that grows. Let the
    number of experts grow with that of the active ones, `path={"n_experts": (4, 8), "top_k": (1, 2)}`: of experts that get
    another share of the tokens there is no theory. fields: of Config, each one value, several, or a function of the sizes. Where
    the depth, a number of experts or their size (`expert_ratio`) grows, the smallest one is its base unless you give it
    (`base_depth=`), so that cells may use it. For granularity give a base_granularity, mostly 1: by default each granularity
    is its own base, whose std is that of its true fan_in.

    lr: predictions are to first order in the updates. The default is small enough for that even where updates grow by
    2^3 over the widths; at a training LR such tables leave the linear regime (their steps overshoot, their inputs blow up).

    routing: "free" is the model that trains: read this first. Near-ties between experts flip as it trains, which puts noise
    in the inputs of later layers (their propagated part and change), most of all at small widths. "frozen" lets the initial model
    choose every token's experts throughout: what remains is the weights' own scaling; read it if the free check is
    unclear. "forced" sends tokens round the experts in turn: the same assignment at every width, so that a difference
    between widths cannot come from which expert got which token.

    eps: Adam's, before the table's factor. The default is out of the way, as the theory has it; give your training's own
    to see whether it is. (Under 1e-8 the gradients of a weight behind two shrinking multipliers are not: its updates shrink
    faster than the table says.)

    n_jobs: processes of one thread each on a CPU (default: one per core). Raises ValueError or TypeError for bad input.
    """
    require(routing in ROUTINGS, "routing", routing, f"must be one of {', '.join(ROUTINGS)}")
    require(n_jobs is None or whole(n_jobs, 1), "n_jobs", n_jobs, "must be a positive integer or None")
    if routing == "forced":
        fields |= {"forced_balance": True}
    corpus, device = load_corpus(corpus), available_device(device)
    axes, path = _with_bases({"width": widths, **fields, "batch_size": batch_size, "steps": steps}, dict(path or {}))
    runs = planned_runs(parametrization, [lr], seeds, corpus, TrainOptions(eps=eps), axes, path)
    require_memory(runs, here=device.type == "cpu")
    axis = size_axis(pd.DataFrame([_sizes(run) for run in runs]))
    expected = {table: [_expected(rows, axis, law) for law in (False, True)] for table, rows in _by_table(runs).items()}
    longest_first = sorted(runs, key=lambda run: tuple(-size for size in _sizes(run).values()))
    jobs = ((run, corpus, device, routing, axis, expected[run.config.parametrization.name]) for run in longest_first)
    n_jobs = min(n_jobs or joblib.cpu_count(), len(runs)) if device.type == "cpu" else 1
    if n_jobs > 1:
        rows = dict(finished((joblib.delayed(_numbered_rows)(*job) for job in enumerate(jobs)), n_jobs))
    else:
        rows = dict(_numbered_rows(*job) for job in enumerate(jobs))
    measured = {run: rows[number] for number, run in enumerate(longest_first)}
    return pd.DataFrame([row for run in runs for row in measured[run]])


def _numbered_rows(number: int, job: tuple) -> tuple[int, list[dict]]:
    """(the number, the run's rows): processes finish in an order of their own."""
    return number, _measured_run(*job)


def _with_bases(axes: dict, path: dict) -> tuple[dict, dict]:
    """The axes and the path with widths where neither has them, and with the bases of SMALLEST_IS_BASE sizes that grow."""
    grown = {name: tuple(values) for name, values in {**axes, **path}.items() if name in SIZES and isinstance(values, Iterable)}
    if axes["width"] is None:
        alone = "width" not in path and not any(len(values) > 1 for values in grown.values())
        axes = {name: value for name, value in axes.items() if name != "width"}
        axes |= {} if "width" in path else {"width": WIDTHS if alone else WIDTHS[:1]}
    bases = {f"base_{name}": min(grown[name]) for name in SMALLEST_IS_BASE if grown.get(name)}
    return bases | axes, path


def _by_table(runs: Iterable[Planned]) -> dict[str, list[Planned]]:
    found: dict[str, list[Planned]] = {}
    for run in runs:
        found.setdefault(run.config.parametrization.name, []).append(run)
    return found


def _expected(runs: list[Planned], axis: str, learned: bool) -> dict[tuple[str, str], float]:
    """(site, quantity) -> the exponent between the ends of one table's path, if all its parts agree; none for batch sizes."""
    configs = list(dict.fromkeys(replace(run.config, seed=0) for run in runs))
    if len(configs) < 2:
        return {}
    configs.sort(key=lambda config: getattr(config, axis))
    parts = [exponents_between(*pair, axis, learned) for pair in pairwise(configs)]
    ends = exponents_between(configs[0], configs[-1], axis, learned)
    agreed = (key for key in ends if all(abs(part.get(key, math.inf) - ends[key]) < TOLERANCE / 2 for part in parts))
    return {key: ends[key] for key in agreed}


def _sizes(run: Planned) -> dict[str, int]:
    """name -> value, for each of SIZES."""
    return {name: getattr(run.options if name == "batch_size" else run.config, name) for name in SIZES}


def size_axis(frame: pd.DataFrame) -> str:
    """The size that grows in a coordinate check's frame, e.g. "width"; of several that grow together, the first of SIZES.

    Raises ValueError where none grows, or where two do and are not larger together."""
    growing = [name for name in SIZES if name in frame and frame[name].nunique() > 1]
    if not growing:
        raise ValueError(f"widths={sorted(set(frame.width))}: a slope over the width needs at least two")
    points = frame[growing].drop_duplicates().sort_values(growing)
    if not all(points[name].is_monotonic_increasing for name in growing) or points[growing[0]].duplicated().any():
        raise ValueError(f"both {' and '.join(growing)} have several values: let one of them grow at a time, or all along a path")
    return growing[0]


def _measured_run(
    run: Planned, corpus: Corpus, device: torch.device, routing: str, axis: str, expected: Sequence[Mapping]
) -> list[dict]:
    """One run's rows. axis: the size that grows. expected: the predictions at init, and once what is shared has learned (see
    `theory`)."""
    config, options = run.config, run.options
    data, about = TextData(corpus, device), site_labels(config, axis)
    about[OUTSIDE, LOSS] = {"role": NONE, "kind": NONE, "source": NONE, "degree": 1, "mixture": NONE, "place": len(about)}
    labels = {"parametrization": config.parametrization.name, **_sizes(run), "seed": config.seed}
    order = data.order([config.seed], run.steps, options.batch_size, config.context)
    (probe,) = data.validation(1, math.ceil(PROBED / config.context), config.context)
    rows = []

    def add(step: int, measured: list[dict]) -> None:
        learned = _learned(config, [*rows, *measured])
        for row in measured:
            place = row["layer"], row["tensor"]
            exponent = expected[place in learned].get((row["tensor"], row["quantity"]), math.nan)
            rows.append({**labels, "step": step, **row, "predicted": exponent, **about[place]})

    with one_thread():
        model = MiniMoE(config).to(device)
        initial, engine = copy.deepcopy(model), SingleRun([model], [run.lr], options, run.steps)
        start, constant = observed(initial, probe[:, :-1]), dict.fromkeys(engine.finals, 1.0)
        if routing == "frozen":
            route_by(model, start.experts)
        ledger, booked = Ledger(model, lambda: losses(model, config, probe)[1], intervals=1), Booked(config)
        add(0, [*at_init(start)])
        for step in range(1, run.steps + 1):
            batch = windows(data.train, order[step - 1], config.context)  # (1, B, T + 1)
            if routing == "frozen":
                route_by(model, observed(initial, batch[0, :, :-1]).experts)
            engine.step(batch, constant)
            if routing == "frozen":
                route_by(model, start.experts)
            booked.add(ledger.entry())
            add(step, [*since(start, observed(model, probe[:, :-1])), *booked.rows()])
    return rows


def _learned(config: Config, rows: list[dict]) -> set[tuple[int, str]]:
    """Where the gradient is led by what is shared having learned: its update, summed over coordinates that agree, is larger
    than its init, summed over independent ones."""
    last = {(row["layer"], row["tensor"], row["quantity"]): row["value"] for row in rows}
    found = set()
    for site in sites(config):
        update, init = (last.get((site.layer, site.mixes, quantity), 0.0) for quantity in ("update", "init"))
        if update * math.sqrt(site.mixed) > LED * init:
            found.add((site.layer, site.name))
    return found


class Booked:
    """The allocations of a run so far, by site."""

    def __init__(self, config: Config):
        self.sites = {(site.layer, site.name): site.parameters for site in sites(config) if site.parameters}
        self.nats, self.fall = Counter(), 0.0

    def add(self, entry: Entry) -> None:
        self.nats.update(entry.allocations)
        self.fall += entry.fall

    def rows(self) -> Iterator[dict]:
        """A row for each weight's allocation, one for their sum, and one for the true fall of the loss."""
        for place, parameters in self.sites.items():
            yield _row(*place, "allocation", math.fsum(self.nats[name] for name in parameters))
        yield _row(OUTSIDE, LOSS, "allocation", math.fsum(self.nats.values()))
        yield _row(OUTSIDE, LOSS, "fall", self.fall)


def at_init(start: Observed) -> Iterator[dict]:
    """A row for the init of every site."""
    for site in start.sites.values():
        if site.weight is None:
            yield _row(site.layer, site.name, "init", rms(site.output))
        else:
            rows, serving = site.input(start.experts[site.layer])
            yield _row(site.layer, site.name, "init", rms(output(rows, site.weight, serving)))


def since(start: Observed, now: Observed) -> Iterator[dict]:
    """A row for every site's update, propagated part and change. Both models are measured under today's choice of experts."""
    parts = {}
    for place, site in now.sites.items():  # those with a weight come first
        before, labels = start.sites[place], (site.layer, site.name)
        if site.weight is not None:
            (x, serving), (x0, _) = (seen.input(now.experts[site.layer]) for seen in (site, before))
            moved = site.weight - before.weight
            update, propagated = parts[place] = output(x, moved, serving), output(x - x0, before.weight, serving)
            largest = rms(output(x.abs(), moved.abs(), serving))
            yield _row(*labels, "update", rms(update), alignment=rms(update) / largest if largest else math.nan)
            yield _row(*labels, "propagated", rms(propagated))
            yield _row(*labels, "change", rms(update + propagated))
            continue
        if site.made_by == "mixture":
            update, propagated = (gated_sum(part, now.gates[site.layer]) for part in parts[site.layer, site.made_of[-1]])
            yield _row(*labels, "update", rms(update))
            yield _row(*labels, "propagated", rms(propagated))
        yield _row(*labels, "change", rms(site.output - before.output))


def gated_sum(rows: Tensor, gates: Tensor) -> Tensor:
    """(N * K, D) each token's outputs of its experts, (N, K) its gates -> (N, D)."""
    return (rows.unflatten(0, gates.shape) * gates[..., None]).sum(1)


def _row(layer: int, tensor: str, quantity: str, value: float, alignment: float = math.nan) -> dict:
    return {"layer": layer, "tensor": tensor, "quantity": quantity, "value": value, "alignment": alignment}


def rms(value: Tensor) -> float:
    """The root mean square over all entries."""
    return float(value.square().mean().sqrt())
