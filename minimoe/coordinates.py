"""Coordinate checks: how large every site's output is, and how far its updates move it, against a size that grows.

For a weight W with input x (W0 and x0 at init, W = W0 + dW and x after some steps) four quantities are measured, each the
root mean square (RMS) over an output's coordinates, on fixed validation tokens:

    init     W0 x0             the weight's output at init
    update   dW x              what the weight's own change does to today's input
    drift    W0 (x - x0)       what the input's change does through the initial weight
    change   W x - W0 x0       their sum, which is what other tools show

`update` and `drift` follow different laws. Their sum is a blend that reads like neither: it would condemn a correct muP
router, and half excuse a wrong one. The verdict rests on `init` and `update`. For the output of the whole MoE, a gated sum
over experts, two updates are told apart:

    from_down  sum g dWdown h         what the down projections' change does to today's hidden values, under today's gates
    from_up    sum g Wdown0 (h - h')  what the up projections' change does through the initial down projections (h' : without it)

and for both and the router, whose updates move the gates, what the loss feels of them to first order:

    pull_up, pull_down, pull_router   the component of that part of the output's change along the loss's gradient
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Sequence

import joblib
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from .config import BASED, require, whole
from .corpus import Corpus, load_corpus
from .grids import Planned, planned_runs
from .model import MiniMoE
from .parametrization import Parametrization
from .probe import Observed, loss_gradients, mixture_parts, observed, output, route_by
from .step import SingleRun, TrainOptions
from .theory import AXES, predicted_exponents, site_labels
from .training import TextData, available_device, one_thread, windows

PROBED = 512  # validation tokens
SIZES = (*BASED, "expert_ratio", "batch_size")  # what can grow in a check
ROUTINGS = ("free", "forced", "frozen")


def coordinate_check(
    parametrization: str | Parametrization | Sequence[str | Parametrization] = "mup",
    widths: Sequence[int] = (64, 128, 256, 512),
    steps: int = 5,
    seeds: Sequence[int] = (0, 1, 2),
    lr: float = 2.0**-13,
    corpus: str | Corpus = "pydocs",
    *,
    routing: str = "free",
    batch_size: int | Sequence[int] = 16,
    eps: float = 1e-15,
    n_jobs: int | None = None,
    device: str | torch.device | None = None,
    **fields,
) -> pd.DataFrame:
    """Train a few steps at a constant LR (no warm-up, decay or clipping), and measure every site after each.

    One row per parametrization, size, seed, step, layer, tensor (the site's name) and quantity, with its `rms`; the
    `alignment` of an update: the RMS over what it would be if no two terms of any sum cancelled; the exponent of the RMS in
    the size that is `predicted` (NaN for drift and change, and for a size without a theory); and what the site is: the role
    whose row serves it, its kind, source, degree and place (see `theory.site_labels`). Step 0 has init, later steps the rest.
    Layer -1 is outside the blocks. Tensors: embedding, q, k, v, o, router, up, down and logits, each the output of a weight;
    scores (of attention), moe (output) and residual (stream) are no weight's own, and have init and change only (moe: the
    parts of its change too). Experts are measured on the tokens they get.

    The size is the width or, with one width, the one other field of Config that has several values (`granularity=(1, 2, 4)`,
    `depth=(2, 8)`), or the batch size. For granularity give a base_granularity, mostly 1: by default each granularity is its
    own base, whose std is that of its true fan_in. fields: of Config, each one value, several, or a function of the sizes.

    lr: predictions are to first order in the updates. The default is small enough for that even where updates grow by
    2^3 over the widths; at a training LR such tables leave the linear regime (their steps overshoot, their inputs blow up).

    routing: "free" is the model that trains: read this first. Near-ties between experts flip as it trains, which puts noise
    in the inputs of later layers (their drift and change), most of all at small widths. "frozen" lets the initial model
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
    axes = {"width": widths, **fields, "batch_size": batch_size, "steps": steps}
    runs = planned_runs(parametrization, [lr], seeds, corpus, TrainOptions(eps=eps), axes)
    axis = size_axis(pd.DataFrame([_sizes(run) for run in runs]))
    longest_first = sorted(runs, key=lambda run: tuple(-size for size in _sizes(run).values()))
    jobs = (joblib.delayed(_measured_run)(run, corpus, device, routing, axis) for run in longest_first)
    n_jobs = min(n_jobs or joblib.cpu_count(), len(runs)) if device.type == "cpu" else 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A worker stopped while some jobs")  # a wide model is no memory leak
        with joblib.parallel_config("loky", inner_max_num_threads=1) if n_jobs > 1 else joblib.parallel_config("sequential"):
            measured = dict(zip(longest_first, joblib.Parallel(n_jobs)(jobs), strict=True))
    return pd.DataFrame([row for run in runs for row in measured[run]])


def _sizes(run: Planned) -> dict[str, int]:
    """name -> value, for each of SIZES."""
    return {name: getattr(run.options if name == "batch_size" else run.config, name) for name in SIZES}


def size_axis(frame: pd.DataFrame) -> str:
    """The size that grows in a coordinate check's frame, e.g. "width". Raises ValueError unless it is exactly one."""
    growing = [name for name in SIZES if name in frame and frame[name].nunique() > 1]
    if not growing:
        raise ValueError(f"widths={sorted(set(frame.width))}: a slope over the width needs at least two")
    if len(growing) > 1:
        raise ValueError(f"both {' and '.join(growing)} have several values: let one of them grow at a time")
    return growing[0]


def _measured_run(run: Planned, corpus: Corpus, device: torch.device, routing: str, axis: str) -> list[dict]:
    """One run's rows."""
    config, options = run.config, run.options
    data, about = TextData(corpus, device), site_labels(config)
    predicted = predicted_exponents(config, axis) if axis in AXES else {}
    labels = {"parametrization": config.parametrization.name, **_sizes(run), "seed": config.seed}
    order = data.order([config.seed], run.steps, options.batch_size, config.context)
    (probe,) = data.validation(1, math.ceil(PROBED / config.context), config.context)
    rows = []

    def add(step: int, measured: Iterator[dict]) -> None:
        for row in measured:
            exponent = predicted.get((row["tensor"], row["quantity"]), math.nan)
            rows.append({**labels, "step": step, **row, "predicted": exponent, **about[row["layer"], row["tensor"]]})

    with one_thread():
        model = MiniMoE(config).to(device)
        initial, engine = copy.deepcopy(model), SingleRun([model], [run.lr], options, run.steps)
        start, constant = observed(initial, probe[:, :-1]), dict.fromkeys(engine.roles, 1.0)
        add(0, at_init(start))
        for step in range(1, run.steps + 1):
            batch = windows(data.train, order[step - 1], config.context)  # (1, B, T + 1)
            if routing == "frozen":
                route_by(model, observed(initial, batch[0, :, :-1]).experts)
            engine.step(batch, constant)
            if routing == "frozen":
                route_by(model, start.experts)
            add(step, since(start, observed(model, probe[:, :-1]), loss_gradients(model, probe)))
    return rows


def at_init(start: Observed) -> Iterator[dict]:
    """A row for the init of every site."""
    for site in start.sites.values():
        if site.weight is None:
            yield _row(site.layer, site.name, "init", site.output)
        else:
            rows, serving = site.input(start.experts[site.layer])
            yield _row(site.layer, site.name, "init", output(rows, site.weight, serving))


def since(start: Observed, now: Observed, gradients: list[Tensor]) -> Iterator[dict]:
    """A row for every site's update, drift and change, and for the parts of a mixture's change.

    gradients: of the loss at each layer's mixture (N, D), today. Both models are measured under today's choice of experts.
    """
    for place, site in now.sites.items():
        before, labels = start.sites[place], (site.layer, site.name)
        if site.weight is None:
            yield _row(*labels, "change", site.output - before.output)
        else:
            (x, serving), (x0, _) = (seen.input(now.experts[site.layer]) for seen in (site, before))
            moved = site.weight - before.weight
            update, drift = output(x, moved, serving), output(x - x0, before.weight, serving)
            largest = _rms(output(x.abs(), moved.abs(), serving))
            yield _row(*labels, "update", update, alignment=_rms(update) / largest if largest else math.nan)
            yield _row(*labels, "drift", drift)
            yield _row(*labels, "change", update + drift)
        if site.made_by == "mixture":
            for source, part in mixture_parts(start, now, site.layer).items():
                if source in site.made_of:
                    yield _row(*labels, f"from_{source}", part)
                yield _row(*labels, f"pull_{source}", _along(part, gradients[site.layer]))


def _along(part: Tensor, gradient: Tensor) -> Tensor:
    """(N,) per token: the component of a part (N, D) of an output's change along the loss's gradient there (N, D).

    It is divided by sqrt(D), so that its RMS compares with the RMS of the whole part.
    """
    return (part * F.normalize(gradient, dim=-1)).sum(-1) / math.sqrt(part.shape[-1])


def _row(layer: int, tensor: str, quantity: str, value: Tensor, alignment: float = math.nan) -> dict:
    return {"layer": layer, "tensor": tensor, "quantity": quantity, "rms": _rms(value), "alignment": alignment}


def _rms(value: Tensor) -> float:
    return float(value.square().mean().sqrt())
