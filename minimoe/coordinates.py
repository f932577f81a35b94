"""Coordinate checks: how large every tensor's output is, and how far its updates move it, against width or granularity.

For a weight W with input x (W0 and x0 at init, W = W0 + dW and x after some steps) four quantities are measured, each the
root mean square (RMS) over an output's coordinates, on fixed validation tokens:

    init     W0 x0             the weight's output at init
    update   dW x              what the weight's own change does to today's input
    drift    W0 (x - x0)       what the input's change does through the initial weight
    change   W x - W0 x0       their sum, which is what other tools show

`update` and `drift` follow different laws, and their sum is a blend that reads like neither: it would condemn a correct muP
router and half excuse a wrong one. The verdict rests on `init` and `update`. For the output of the whole MoE, a gated sum over
experts, two updates are told apart:

    from_down  sum g dWdown h         what the down projections' change does to today's hidden values, under today's gates
    from_up    sum g Wdown0 (h - h')  what the up projections' change does through the initial down projections (h' : without it)

and for both and the router, whose updates move the gates, what the loss feels of them to first order:

    pull_up, pull_down, pull_router   the component of that part of the output's change along the loss's gradient

Letters in shape comments: B batch, T time, N = B*T probed tokens, D width, E experts, K active experts per token, M expert
hidden size, S = N*K.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import joblib
import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import Config, whole
from .corpus import Corpus, load_corpus
from .experts import activated
from .identity import declared
from .model import MiniMoE, rms_norm
from .parametrization import Parametrization, width
from .roles import AT_BASE, Numbers, numbers
from .step import SingleRun, TrainOptions
from .sweeps import grid
from .tables import parametrization as table_of
from .training import TextData, available_device, check_training, one_thread, windows

PROBED = 512  # validation tokens
TOLERANCE = 0.25  # of a slope, for every tensor: half of 1/2, the least by which a wrong power of the width moves one
ROLES_OF = {  # the weights' outputs, in the order of the forward pass, and the roles of their weights
    "embedding": "embedding",
    "q": "attention",
    "k": "attention",
    "v": "attention",
    "o": "attention",
    "router": "router",
    "up": "experts_up",
    "down": "experts_down",
    "logits": "unembedding",
}
TENSORS = ("embedding", "q", "k", "v", "scores", "o", "router", "up", "down", "moe", "residual", "logits")
OUTPUTS = {"router": -0.5, "logits": -0.5}  # output-type: init at most constant; muP's own exponent
AXES = ("width", "granularity")  # sizes that a check can let grow
PARTS = ("from_up", "from_down", "pull_up", "pull_down", "pull_router")  # of the change of the MoE's output
JUDGED = ("init", "update", *PARTS)
OUTSIDE = -1  # the layer of what belongs to no block
ALLOWED = (("router", "init_var"), ("unembedding", "init_var"))  # smaller than muP has them: no desideratum forbids it
ROUTINGS = ("free", "forced", "frozen")


def coordinate_check(
    parametrization: str | Parametrization | Sequence[str | Parametrization] = "mup",
    widths: Sequence[int] = (64, 128, 256, 512),
    steps: int = 5,
    seeds: Sequence[int] = (0, 1, 2),
    lr: float = 2.0**-13,
    corpus: str | Corpus = "pydocs",
    *,
    granularities: Sequence[int] = (1,),
    routing: str = "free",
    batch_size: int = 16,
    eps: float = 1e-15,
    n_jobs: int | None = None,
    device: str | torch.device | None = None,
    **config_fields,
) -> pd.DataFrame:
    """Train a few steps at a constant LR (no warm-up, decay or clipping), and measure every tensor after each.

    One row per parametrization, size, seed, step, layer, tensor and quantity, with its `rms`, the `predicted` exponent of
    that RMS in the size (NaN for drift and change) and, for updates, the `alignment`: the RMS over what it would be if no
    two terms of any sum cancelled. Step 0 has init, later steps the rest. Layer -1 is outside the blocks. Tensors:
    embedding, q, k, v, o, router, up, down and logits, each the output of a weight; scores (of attention), moe (output)
    and residual (stream) are no weight's own, and have init and change only (moe: the PARTS too). Experts are measured on
    the tokens they get.

    The size is the width or, with one width and several `granularities`, the granularity. For that one give a
    base_granularity, mostly 1: by default each granularity is its own base, whose std is that of its true fan_in.

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
    if routing not in ROUTINGS:
        raise ValueError(f"routing={routing!r}: must be one of {', '.join(ROUTINGS)}")
    if n_jobs is not None and not whole(n_jobs, 1):
        raise ValueError(f"n_jobs={n_jobs!r}: must be a positive integer or None")
    if routing == "forced":
        config_fields |= {"forced_balance": True}
    corpus, device = load_corpus(corpus), available_device(device)
    options = TrainOptions(batch_size=batch_size, eps=eps)
    if "granularity" in config_fields:
        if _sequence(granularities) != [1]:
            raise ValueError("give granularity or granularities, not both")
        granularities = (config_fields.pop("granularity"),)
    cells = [
        cell
        for granularity in _sequence(granularities)
        for cell in grid(widths, parametrization, [lr], seeds, corpus.vocab_size, {**config_fields, "granularity": granularity})
    ]
    axis = size_axis(pd.DataFrame([config.shape for config, _ in cells]))
    steps = check_training(cells, corpus, steps)
    longest_first = sorted(cells, key=lambda cell: (-cell[0].width, -cell[0].granularity))
    jobs = (joblib.delayed(_measured_run)(*cell, steps, corpus, device, options, routing, axis) for cell in longest_first)
    n_jobs = min(n_jobs or joblib.cpu_count(), len(cells)) if device.type == "cpu" else 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A worker stopped while some jobs")  # a wide model is no memory leak
        with joblib.parallel_config("loky", inner_max_num_threads=1) if n_jobs > 1 else joblib.parallel_config("sequential"):
            measured = dict(zip(longest_first, joblib.Parallel(n_jobs)(jobs), strict=True))
    return pd.DataFrame([row for cell in cells for row in measured[cell]])


def _sequence(values) -> list:
    return list(values) if isinstance(values, Iterable) else [values]


def size_axis(frame: pd.DataFrame) -> str:
    """The size that grows in a coordinate check's frame: "width" or "granularity". Raises ValueError unless it is one."""
    sizes = {axis: sorted(set(frame[axis])) for axis in AXES if axis in frame}
    growing = [axis for axis, values in sizes.items() if len(values) > 1]
    if not growing:
        raise ValueError(f"widths={sizes['width']}: a slope over the width needs at least two")
    if len(growing) > 1:
        raise ValueError(f"both {' and '.join(growing)} have several values: let one of them grow at a time")
    return growing[0]


def _measured_run(
    config: Config,
    lr: float,
    steps: int,
    corpus: Corpus,
    device: torch.device,
    options: TrainOptions,
    routing: str,
    axis: str,
) -> list[dict]:
    """One run's rows."""
    data, predicted = TextData(corpus, device), predicted_exponents(config, axis)
    sizes = {name: getattr(config, name) for name in AXES}
    labels = {"parametrization": config.parametrization.name, **sizes, "seed": config.seed}
    order = data.order([config.seed], steps, options.batch_size, config.context)
    (probe,) = data.validation(1, math.ceil(PROBED / config.context), config.context)
    rows = []

    def add(step: int, measured: Iterator[dict]) -> None:
        for row in measured:
            exponent = predicted.get((row["tensor"], row["quantity"]), math.nan)
            rows.append({**labels, "step": step, **row, "predicted": exponent})

    with one_thread():
        model = MiniMoE(config).to(device)
        initial, engine = copy.deepcopy(model), SingleRun([model], [lr], options)
        start = observed(initial, probe[:, :-1])
        add(0, _at_init(start))
        for step in range(1, steps + 1):
            batch = windows(data.train, order[step - 1], config.context)  # (1, B, T + 1)
            if routing == "frozen":
                _route_by(model, observed(initial, batch[0, :, :-1]).experts)
            engine.step(batch, dict.fromkeys(engine.roles, 1.0))
            if routing == "frozen":
                _route_by(model, start.experts)
            add(step, _since(start, observed(model, probe[:, :-1]), loss_gradients(model, probe)))
    return rows


def _route_by(model: MiniMoE, experts: list[Tensor]) -> None:
    """Let these experts (N, K) of each layer serve, whatever the router says; the gates stay the router's."""
    for block, chosen in zip(model.blocks, experts, strict=True):
        block.moe.chosen = lambda probabilities, chosen=chosen: chosen


class Observed(NamedTuple):
    """What a model does on some tokens. Keys are (layer, tensor)."""

    weights: dict[tuple, Tensor]  # effective ones: (fan_in, fan_out), the experts' (E, fan_in, fan_out)
    inputs: dict[tuple, Tensor]  # what each weight is applied to: (N, fan_in), the down projections' left out
    activations: dict[tuple, Tensor]  # scores, moe, residual
    experts: list[Tensor]  # (N, K) per layer
    gates: list[Tensor]  # (N, K) per layer
    renormalize: bool
    activation: str


@torch.no_grad()
def observed(model: MiniMoE, tokens: Tensor) -> Observed:
    """The model's weights and their inputs on tokens (B, T)."""
    config, passed = model.config, _passed(model, tokens)
    table = torch.cat([_effective(model, "tokens"), _effective(model, "positions")])  # (V + context, D)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    hot = [F.one_hot(tokens, config.vocab_size), F.one_hot(positions, config.context)]  # an embedding is a matrix too
    weights, activations, experts, gates = {(OUTSIDE, "embedding"): table}, {}, [], []
    inputs = {(OUTSIDE, "embedding"): torch.cat(hot, -1).flatten(0, 1).to(table)}
    for layer, block in enumerate(model.blocks):
        x, _ = passed[block.attention]  # (B, T, D)
        weights |= {(layer, name): _effective(block.attention, name) for name in "qkvo"}
        inputs |= {(layer, name): x.flatten(0, 1) for name in "qkv"}
        inputs[layer, "o"] = block.attention.mixed(x).flatten(0, 1)
        activations[layer, "scores"] = _causal_scores(block.attention, x)
        x, (y, _, logits, _) = passed[block.moe]  # (N, D)
        if config.experts > 1:
            weights[layer, "router"], inputs[layer, "router"] = _effective(block.moe, "router"), x
        weights |= {(layer, "up"): _effective(block.moe, "up"), (layer, "down"): _effective(block.moe, "down")}
        inputs[layer, "up"] = x
        gate, chosen = block.moe.choice(torch.softmax(logits, -1))
        gates.append(gate)
        experts.append(chosen)
        activations |= {(layer, "moe"): y, (layer, "residual"): passed[block][1][0]}
    weights[OUTSIDE, "logits"] = _effective(model, "unembedding")
    inputs[OUTSIDE, "logits"] = rms_norm(activations[layer, "residual"]).flatten(0, 1)
    return Observed(weights, inputs, activations, experts, gates, config.renormalize, config.activation)


def _passed(model: MiniMoE, tokens: Tensor) -> dict[nn.Module, tuple]:
    """module -> (input, output), for each block, attention and MoE in a forward pass."""
    passed = {}
    modules = [module for block in model.blocks for module in (block, block.attention, block.moe)]
    hooks = [m.register_forward_hook(lambda m, inputs, output: passed.update({m: (inputs[0], output)})) for m in modules]
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return passed


def _effective(module: nn.Module, name: str) -> Tensor:
    return getattr(module, f"{name}_multiplier") * getattr(module, name)


def _causal_scores(attention: nn.Module, x: Tensor) -> Tensor:  # (B, T, D) -> (B, H, T * (T + 1) / 2)
    q, k = (attention.split(x @ _effective(attention, name)) for name in "qk")
    seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    return (q @ k.mT / attention.head_size)[..., seen]


def _output(x: Tensor, weight: Tensor, experts: Tensor | None) -> Tensor:
    """(N, fan_in) -> (N, fan_out); row i of the experts' (S, fan_in) by the expert experts[i]."""
    if experts is None:
        return x @ weight
    out = x.new_empty(len(x), weight.shape[-1])
    for number, own in enumerate(weight):
        mine = experts == number
        out[mine] = x[mine] @ own
    return out


def _at_init(start: Observed) -> Iterator[dict]:
    for layer, tensor in start.weights:
        x, experts = _input(start, layer, tensor, start.experts)
        yield _row(layer, tensor, "init", _output(x, start.weights[layer, tensor], experts))
    for (layer, tensor), value in start.activations.items():
        yield _row(layer, tensor, "init", value)


def _since(start: Observed, now: Observed, gradients: list[Tensor]) -> Iterator[dict]:
    """Every tensor's update, drift and change. gradients: of the loss at each layer's MoE output (N, D), today."""
    for layer, tensor in now.weights:
        weight0, moved = start.weights[layer, tensor], now.weights[layer, tensor] - start.weights[layer, tensor]
        x, experts = _input(now, layer, tensor, now.experts)
        x0, _ = _input(start, layer, tensor, now.experts)
        update, drift = _output(x, moved, experts), _output(x - x0, weight0, experts)
        largest = _rms(_output(x.abs(), moved.abs(), experts))
        yield _row(layer, tensor, "update", update, alignment=_rms(update) / largest if largest else math.nan)
        yield _row(layer, tensor, "drift", drift)
        yield _row(layer, tensor, "change", update + drift)
    for (layer, tensor), value in now.activations.items():
        yield _row(layer, tensor, "change", value - start.activations[layer, tensor])
        if tensor == "moe":
            for source, part in _moe_updates(start, now, layer).items():
                if source != "router":
                    yield _row(layer, tensor, f"from_{source}", part)
                yield _row(layer, tensor, f"pull_{source}", _along(part, gradients[layer]))


def _moe_updates(start: Observed, now: Observed, layer: int) -> dict[str, Tensor]:
    """What the changes of the up projections, the down projections and the router each do to the MoE's output (N, D)."""
    gates = now.gates[layer]  # (N, K)
    x, experts = _input(now, layer, "up", now.experts)  # (S, D), (S,)
    hidden, _ = _input(now, layer, "down", now.experts)  # (S, M)
    hidden0 = activated(now.activation, _output(x, start.weights[layer, "up"], experts))
    down, down0 = now.weights[layer, "down"], start.weights[layer, "down"]
    parts = {
        "up": (gates, _output(hidden - hidden0, down0, experts)),
        "down": (gates, _output(hidden, down - down0, experts)),
    }
    if (layer, "router") in now.weights:
        logits0 = now.inputs[layer, "router"] @ start.weights[layer, "router"]  # (N, E)
        gates0 = torch.softmax(logits0, -1).gather(1, now.experts[layer])  # of today's experts: none is exchanged
        gates0 = gates0 / gates0.sum(-1, keepdim=True) if now.renormalize else gates0
        parts["router"] = (gates - gates0, _output(hidden, down, experts))
    return {name: (gate[..., None] * rows.unflatten(0, gate.shape)).sum(1) for name, (gate, rows) in parts.items()}


def loss_gradients(model: MiniMoE, batch: Tensor) -> list[Tensor]:
    """The gradient of the cross-entropy on batch (B, T + 1) at each layer's MoE output: (N, D) per layer."""
    outputs: list[Tensor] = []
    hooks = [block.moe.register_forward_hook(lambda m, inputs, output: outputs.append(output[0])) for block in model.blocks]
    try:
        logits = model(batch[:, :-1]).logits
    finally:
        for hook in hooks:
            hook.remove()
    return list(torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()), outputs))


def _along(part: Tensor, gradient: Tensor) -> Tensor:
    """(N,) the components of a part of the MoE's output along the loss's gradient, over sqrt(D), as an RMS has it."""
    return (part * F.normalize(gradient, dim=-1)).sum(-1) / math.sqrt(part.shape[-1])


def _input(model: Observed, layer: int, tensor: str, experts: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """(what the weight is applied to, the expert of each row): an expert gets the tokens that `experts` send it."""
    if tensor not in ("up", "down"):
        return model.inputs[layer, tensor], None
    serving = experts[layer].flatten()  # (S,)
    x = model.inputs[layer, "up"].repeat_interleave(experts[layer].shape[1], dim=0)  # (S, D)
    if tensor == "down":
        x = activated(model.activation, _output(x, model.weights[layer, "up"], serving))  # (S, M)
    return x, serving


def _row(layer: int, tensor: str, quantity: str, value: Tensor, alignment: float = math.nan) -> dict:
    return {"layer": layer, "tensor": tensor, "quantity": quantity, "rms": _rms(value), "alignment": alignment}


def _rms(value: Tensor) -> float:
    return float(value.square().mean().sqrt())


def predicted_exponents(config: Config, axis: str = "width") -> dict[tuple[str, str], float]:
    """(tensor, quantity) -> the exponent of its RMS in the width, or in the granularity, from the config's table alone.

    The scaling arguments of Tensor Programs V (arXiv 2203.03466, appendix J), to first order in the updates. With fan_in
    growing like n^f, and multiplier, init std and LR like n^m, n^s, n^l: at init the terms of the sum over fan_in are
    independent, so that it grows like n^(m + s + f/2) times its input; an Adam step moves every weight by the LR, in the
    direction of its input, and the sum like n^(m + l + f). Norms make every input O(1), but for attention's output
    projection (the values) and the experts' down projections (what the up projections put out). Nothing is predicted of the
    MoE's output where raw gates change with the width: muP's flatten slowly from a peaked softmax towards 1 / E.

    In the granularity G the active experts are K = top_k G, and the gates of a token sum to the same share, raw or
    renormalised (the largest K of E logits are the same quantile of them), so that each gate goes like 1 / G. Experts are
    independent at init, and their sum goes like G^(-1/2) times one expert's output; their down projections move together,
    in the direction of the same gradient, and that sum like one expert's update. What the up projections change passes
    through the initial down projections, and goes like the output at init. Of the router's pull only bounds are known, and
    nothing is predicted: if the K gates, each of size 1 / G, all moved the right way, it would go like one expert's output at
    init times the router's update; if they moved at random, like G^(-1/2) times that.
    """
    narrow, wide = (_shapes_and_numbers(c) for c in _two_sizes(config, axis))
    summed = -0.5 if axis == "granularity" else 0.0  # of independent experts

    def exponents_of(name: str, inherited: float = 0.0) -> tuple[float, float]:
        (shape, now), (wide_shape, then) = narrow[name], wide[name]
        m, s, l = (_log_ratio(getattr(then, cell), getattr(now, cell)) for cell in ("multiplier", "std", "lr"))
        f = math.log2(wide_shape[-2] / shape[-2])
        return m + s + f / 2 + inherited, m + l + f + inherited

    block = "blocks.0."
    found = {"embedding": tuple(map(max, exponents_of("tokens"), exponents_of("positions")))}
    found |= {name: exponents_of(f"{block}attention.{name}") for name in "qkv"}
    found["o"] = exponents_of(f"{block}attention.o", inherited=found["v"][0])
    if config.experts > 1:
        found["router"] = exponents_of(f"{block}moe.router")
    found["up"] = exponents_of(f"{block}moe.up")
    found["down"] = exponents_of(f"{block}moe.down", inherited=_degree(config.activation) * found["up"][0])
    found["logits"] = exponents_of("unembedding")
    predicted = {(tensor, q): e for tensor, pair in found.items() for q, e in zip(("init", "update"), pair, strict=True)}
    predicted["scores", "init"] = found["q"][0] + found["k"][0]
    if config.experts == 1 or config.renormalize or round(found["router"][0], 9) == 0:
        predicted["moe", "init"] = found["down"][0] + summed  # else gates flatten or sharpen with width, far from any limit
        predicted["moe", "from_up"] = found["down"][0] + summed + (found["up"][1] - found["up"][0])
        predicted["moe", "from_down"] = found["down"][1]
        if axis == "granularity" and config.experts > 1:  # in the width, pulls also grow with what the experts have learned
            predicted["moe", "pull_up"] = predicted["moe", "from_up"]
            predicted["moe", "pull_down"] = predicted["moe", "from_down"]
    parts = (found["embedding"][0], found["o"][0], found["down"][0] + summed)
    predicted["residual", "init"] = max((e for e in parts if not math.isnan(e)), default=math.nan)  # a zero adds nothing
    return {key: round(exponent, 9) + 0.0 for key, exponent in predicted.items()}  # a root's rounding; and no -0


def _two_sizes(config: Config, axis: str) -> tuple[Config, Config]:
    """The config at one size and at twice that. Raises ValueError for an axis that is none."""
    if axis not in AXES:
        raise ValueError(f"axis={axis!r}: must be one of {', '.join(AXES)}")
    if axis == "granularity":  # from 1: doubling the config's own might not divide the hidden size
        return replace(config, granularity=1), replace(config, granularity=2)
    return config, replace(config, width=2 * config.width)


def _shapes_and_numbers(config: Config) -> dict[str, tuple[torch.Size, Numbers]]:
    return {name: (param.shape, numbers(param, config.parametrization, AT_BASE)) for name, param in declared(config).items()}


def _log_ratio(after: float, before: float) -> float:
    return math.log2(after / before) if after and before else math.nan


def _degree(activation: str) -> int:
    """The power with which a feed-forward network's hidden values follow its pre-activations."""
    return 2 if activation == "swiglu" else 1  # a product of two


def exponents(
    frame: pd.DataFrame, step: int | None = None, expected: Mapping[tuple[str, str], float] | None = None
) -> pd.DataFrame:
    """Measured and predicted exponents in the size: one row per parametrization, layer, tensor and quantity.

    frame: from `coordinate_check`. step: after which the updates, drifts and changes are taken (default: the last).
    expected: predictions to compare with instead of those of each table itself, e.g. `predicted_exponents(Config("mup"))`,
    to ask whether a table does what another one promises.

    measured: slope of log2 RMS over log2 size by least squares, every seed a point; stderr: its standard error.
    agrees: measured and predicted differ by at most TOLERANCE (missing where nothing is predicted, or all is zero): the
    theory describes the run. verdict, of init and updates: does the tensor do as muP desires (Tensor Programs V, appendix J),
    whatever was predicted? "holds": constant in the size, or for the init of router and logits at most constant; "shrinks",
    "explodes" (a run that diverged, too); "zero": the RMS is exactly zero, and there is no slope; else "unjudged".
    alignment: mean over sizes and seeds. (Over granularities, mind that one expert's update or init may well shrink or
    explode in a layer that is as it should be: what counts is the moe's.)

    Raises ValueError for an empty frame, one size, both sizes growing, or a step that the frame does not have.
    """
    if frame.empty:
        raise ValueError("the frame has no rows")
    axis = size_axis(frame)
    for _, rows in frame.groupby("parametrization"):
        size_axis(rows)
    steps = sorted(set(frame.step) - {0})
    step = steps[-1] if step is None and steps else step
    if step not in steps:
        raise ValueError(f"step={step}: the frame has the steps {', '.join(map(str, steps))}")
    wanted = frame[(frame.step == step) | (frame.quantity == "init")]
    rows = []
    for key, group in wanted.groupby(["parametrization", "layer", "tensor", "quantity"], sort=False):
        labels = dict(zip(("parametrization", "layer", "tensor", "quantity"), key, strict=True))
        tensor, quantity = labels["tensor"], labels["quantity"]
        predicted = group.predicted.iloc[0] if expected is None else expected.get((tensor, quantity), math.nan)
        measured, stderr = _slope(group[axis].to_numpy(), group.rms.to_numpy())
        judged = quantity in JUDGED and (tensor in ROLES_OF or not group.predicted.isna().all())
        verdict = _verdict(tensor, quantity, measured, group.rms, judged)
        unknown = math.isnan(predicted) or verdict == "zero"
        agrees = pd.NA if unknown else bool(abs(measured - predicted) <= TOLERANCE)
        measures = {"predicted": predicted, "measured": measured, "stderr": stderr, "agrees": agrees, "verdict": verdict}
        rows.append(labels | measures | {"alignment": group.alignment.mean()})
    table = pd.DataFrame(rows).astype({"agrees": "boolean"})
    place = table.tensor.map(TENSORS.index), table.quantity.map((*JUDGED, "drift", "change").index)
    depth = table.layer.where(table.tensor != "logits", table.layer.max() + 1)
    names = table.parametrization.map(list(table.parametrization.unique()).index)
    order = pd.DataFrame({"name": names, "depth": depth, "tensor": place[0], "quantity": place[1]})
    return table.loc[order.sort_values(list(order.columns)).index].reset_index(drop=True)


def _slope(sizes: np.ndarray, rms: np.ndarray) -> tuple[float, float]:
    """(slope, standard error) of log2 RMS over log2 size; NaN where an RMS is zero or not finite."""
    if not (np.isfinite(rms).all() and (rms > 0).all()):
        return math.nan, math.nan
    x, y = np.log2(sizes), np.log2(rms)
    slope, offset = np.polyfit(x, y, 1)
    freedom, spread = len(x) - 2, ((x - x.mean()) ** 2).sum()
    residuals = y - slope * x - offset
    return float(slope), math.sqrt((residuals**2).sum() / freedom / spread) if freedom else math.nan


def _verdict(tensor: str, quantity: str, slope: float, rms: pd.Series, judged: bool) -> str:
    if (rms == 0).any():
        return "zero"
    if not judged:
        return "unjudged"
    if not np.isfinite(rms).all() or slope > TOLERANCE:
        return "explodes"
    if slope < -TOLERANCE and not (quantity == "init" and tensor in OUTPUTS):
        return "shrinks"
    return "holds"


def suspects(table: pd.DataFrame, activation: str = "relu") -> pd.DataFrame:
    """The cells that an exponents table over widths condemns: columns parametrization, role, cell, power and because.

    A wrong multiplier moves init and update by the same power of the width, a wrong init_var (by half its power) init alone, a
    wrong lr update alone. What o and down inherit from v and up is taken off first, so that one wrong cell is named once.
    `power`: of the width, by which the cell is too large; the largest comes first, and what stands below it may be its
    consequence. Where several cells could be at fault the smallest repair is named. A run that diverged names none.
    """
    rows = []
    for name, group in table.groupby("parametrization", sort=False):
        measured = group.set_index(["layer", "tensor", "quantity"]).measured
        condemned = group[group.verdict.isin(("explodes", "shrinks"))]
        faults: dict[str, list] = {}
        for layer, tensor in dict.fromkeys(zip(condemned.layer, condemned.tensor, strict=True)):
            if tensor in ROLES_OF and (fault := _fault(tensor, measured[layer], activation)):
                faults.setdefault(ROLES_OF[tensor], []).append(fault)
        for role, found in faults.items():
            cell, power, because = max(found, key=lambda fault: abs(fault[1]))
            rows.append({"parametrization": name, "role": role, "cell": cell, "power": power, "because": because})
    rows.sort(key=lambda row: -abs(row["power"]))
    return pd.DataFrame(rows, columns=["parametrization", "role", "cell", "power", "because"])


def diagnosis(table: pd.DataFrame, activation: str = "relu") -> dict[str, str]:
    """parametrization -> what its exponents table says, in plain words, the cells to blame included."""
    blamed, said = suspects(table, activation), {}
    for name, rows in table.groupby("parametrization", sort=False):
        broken = rows[rows.verdict.isin(("explodes", "shrinks"))]
        own = blamed[blamed.parametrization == name]
        if broken.empty:
            said[name] = "every init and every update keeps muP's desiderata."
        elif broken.measured.isna().any():
            said[name] = "the run diverged: lower the LR."
        elif own.empty:
            said[name] = f"no single cell explains {', '.join(dict.fromkeys(broken.tensor))}."
        else:
            cells = (f"{s.role}.{s.cell} is too large by width^{s.power:+.2f} ({s.because})" for s in own.itertuples())
            said[name] = "; ".join(cells) + "."
    return said


def mutants(table: str | Parametrization = "mup") -> Iterator[tuple[str, str, Parametrization]]:
    """(role, cell, the table with that one cell wrong), for each init_var, multiplier and lr: 1 where it was not 1, and where
    it was, 1 / width (a ratio of its own: an embedding's fan_in is the vocabulary and never grows)."""
    table = table_of(table)
    for role in table.roles:
        for cell in ("init_var", "multiplier", "lr"):
            yield role, cell, table.replace(role, **{cell: 1 if getattr(table[role], cell).powers else 1 / width})


def mystery(number: int) -> Parametrization:
    """muP with one wrong cell; which, is for the reader to find. The same number gives the same table, from 0 on."""
    condemned = [mutant for role, cell, mutant in mutants() if (role, cell) not in ALLOWED]
    order = torch.randperm(len(condemned), generator=torch.Generator().manual_seed(2203)).tolist()
    return replace(condemned[order[number % len(order)]], name=f"mystery {number}")


def _fault(tensor: str, measured: pd.Series, activation: str) -> tuple[str, float, str] | None:
    """(cell, power by which it is too large, why) for one weight's output; None where its own exponents are right."""
    source, degree = {"o": ("v", 1), "down": ("up", _degree(activation))}.get(tensor, (None, 0))
    inherited = degree * measured[source, "init"] if source else 0.0
    init, update = (measured[tensor, quantity] - inherited for quantity in ("init", "update"))
    because = f"{tensor}: init {init:+.2f}, update {update:+.2f}" + (f" (less {inherited:+.2f} from {source})" if source else "")
    if math.isnan(init) or math.isnan(update):  # diverged, or zero
        return None
    surplus = init - OUTPUTS.get(tensor, 0.0)
    if abs(update) > TOLERANCE and abs(surplus - update) <= TOLERANCE:
        return "multiplier", update, because
    if tensor in OUTPUTS and init <= TOLERANCE:
        surplus = 0.0  # allowed
    if abs(surplus) > TOLERANCE and abs(update) <= TOLERANCE:
        return "init_var", 2 * surplus, because
    if abs(update) > TOLERANCE:
        return "lr" if abs(surplus) <= TOLERANCE else "init_var and lr", update, because
    return None
