"""Make the shipped sweeps again: `make data`, or `python data/make.py NAME`. What is there already is not trained again.

A pilot (one seed, whole octaves) centres the grids; the sweep then has, for each table and width, eight half-octave LRs
around the pilot's optimum, the pilot's own LRs, and the LR that turned out best at the smallest width, three seeds each.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
from transformers import MixtralConfig, OlmoeConfig

from minimoe import (
    AS_IT_IS,
    PARAMETRIZATIONS,
    Config,
    Plan,
    TrainOptions,
    adopt,
    adopted_sweep,
    coordinate_check,
    diagnosis,
    exponents,
    fan_in,
    first_losses,
    growing,
    mutations,
    read_sweep,
    suspects,
    sweep,
    train,
    transfer_report,
    weight_sizes,
)
from minimoe.arms import (
    ARMS,
    BRIDGE_ARMS,
    CAPACITY_ARMS,
    DECAY_ARMS,
    EMBEDDING_ARMS,
    EXPERT_ARMS,
    HORIZON_ARMS,
    REGIME_ARMS,
    Arm,
    embedding_times,
    one_varied,
    rate_arms,
)
from minimoe.learning import books
from minimoe.linearisations import linearisation as distances
from minimoe.parametrization import width as width_ratio
from minimoe.tables import READINGS, REGIMES, ROUTER_RULES, WIDTH_TABLES
from minimoe.verdicts import layers_compared

SWEEPS = Path(__file__).parent / "sweeps"
OCTAVES = [2.0**octave for octave in range(-9, -3)]
STEPS, SEEDS = 200, (0, 1, 2)
LEARNING_STEPS = range(10, STEPS + 1, 10)
OPTIONS = TrainOptions(evals=10)
WHOLE = [2.0**octave for octave in range(-7, -2)]
HALVES = [2.0 ** (half / 2) for half in range(-12, -5)]
DEPTH_HALVES = [2.0 ** (half / 2) for half in range(-13, -5)]
EXPERT_HALVES = [*HALVES, 2.0**-2.5]  # a single seed's optimum is at 2^-3.5 here and there
ARMS_OF_FIVE_SIZES = (
    "authors",
    "down by fan_in",
    "route K",
    "router mup",
    "all mended, fan_in",
    "all mended, route K",
)
ARMS_OF_THREE_SEEDS = (*ARMS_OF_FIVE_SIZES, "fan_in + K", "route K + router LR")
EXPERT_ARMS_OF_THREE_SEEDS = (
    "mup, raw, k=2",
    "mup, renormalised, k=2",
    "mup, raw, k=E/4",
    "simplep, raw, k=2",
    "simplep, raw, k=E/4",
    "simplep, renormalised, k=2",
    "mup, raw, k=2, forced balance",
)
EXPERTS = (2, 4, 8, 16, 32)
DOSES = tuple(name for name in EXPERT_ARMS if ", balance " in name)
AT_64_EXPERTS = (
    "mup, raw, k=2",
    "mup, raw, k=E/4",
    "mup, renormalised, k=2",
    "mup, raw, k=2, forced balance",
    "mup, renormalised, k=2, forced balance",
)
ROUTER_CELL_ARMS = ("router mup's LR", "router mup's init")
SCREENED_ARMS = [name for name in ARMS if name not in ROUTER_CELL_ARMS]
SCREENED_EXPERT_ARMS = [name for name in EXPERT_ARMS if name not in {*DOSES, AT_64_EXPERTS[-1]}]
HIDDEN_X4 = PARAMETRIZATIONS["mup"].replace("attention", "mup, hidden LR x 4", lr=4 / fan_in)  # a base that was tuned
for _role in ("experts_up", "experts_down"):
    HIDDEN_X4 = HIDDEN_X4.replace(_role, HIDDEN_X4.name, lr=4 / fan_in)
SMALL = {"base_width": 16}  # width 64 is four times that, at a third of the price of 128


def centred_sweep(store: Path, widths: tuple[int, ...], tables: tuple) -> None:
    """A pilot and then the sweep that it centres, both in `store`."""
    pilot = sweep(widths, tables, OCTAVES, (0,), STEPS, options=OPTIONS, store=store)
    best = transfer_report(pilot).set_index(["parametrization", "width"]).grid_lr
    for table in tables:
        transferred = set()
        for width in widths:
            centre = round(math.log2(best[getattr(table, "name", table), width]))
            print(f"{getattr(table, 'name', table)}, width {width}: pilot optimum 2^{centre}", flush=True)
            halves = [2.0 ** (centre + half / 2) for half in range(-4, 4)]
            grid = sorted({*halves, *OCTAVES, *transferred})
            frame = sweep((width,), (table,), grid, SEEDS, STEPS, options=OPTIONS, store=store)
            if width == widths[0]:
                transferred = set(transfer_report(frame).grid_lr)


def transfer() -> None:
    """Widths 32 to 256 under sp, simplep and mup: the famous picture."""
    centred_sweep(SWEEPS / "transfer.jsonl", (32, 64, 128, 256), ("sp", "simplep", "mup"))


def router_rules() -> None:
    """The router rules that are no training of `transfer` in another notation, at three widths."""
    names = ("released simplep router", "released mup router", "early router")
    centred_sweep(SWEEPS / "router_rules.jsonl", (32, 64, 128), tuple(ROUTER_RULES[name] for name in names))


def granularity_runs(
    names, granularities: tuple, lrs: list, seeds: tuple, steps: int = 400, width: int = 64, name: str = "granularity"
) -> None:
    """The named arms of `minimoe.arms.ARMS`, four times as wide as the base or more."""
    store, sizes = SWEEPS / f"{name}.jsonl", {**SMALL, "granularity": granularities, "base_granularity": 1}
    for arm in (ARMS[name] for name in names):
        sweep((width,), arm.table, lrs, seeds, steps, options=OPTIONS, store=store, **sizes, **arm.fields)


def granularity() -> None:
    """Every arm in a screen; those that moved, the authors' and the mended ones with three seeds; half as long; longer; wider."""
    granularity_runs(SCREENED_ARMS, (1, 4, 16), WHOLE, (0,))
    granularity_runs(ARMS_OF_THREE_SEEDS, (1, 4, 16), HALVES, SEEDS)
    granularity_runs(ARMS_OF_FIVE_SIZES, (2, 8), HALVES, SEEDS)
    granularity_runs(ARMS_OF_THREE_SEEDS, (1, 16), HALVES, SEEDS, 200)
    granularity_runs(("authors",), (1, 16), WHOLE, (0,), 800)
    granularity_runs(("authors", "router mup"), (1, 16, 32), WHOLE, (0,), width=128)


def router_cells() -> None:
    """What in muP's router row does it: SimpleP's router with muP's LR alone, and with muP's init alone; three seeds."""
    granularity_runs(ROUTER_CELL_ARMS, (1, 4, 16), HALVES, SEEDS, name="router_cells")


def expert_count_runs(
    names, lrs: list, seeds: tuple, steps: int = STEPS, widths: tuple = (64,), experts=EXPERTS, name: str = "expert_count"
) -> None:
    """The named arms of `minimoe.arms.EXPERT_ARMS`, four times as wide as the base."""
    store = SWEEPS / f"{name}.jsonl"
    for arm in (EXPERT_ARMS[name] for name in names):
        least = 2 if arm.fields["gates"] == "renormalized" else 1  # a single renormalised gate is always 1
        sizes = {**SMALL, "n_experts": [n for n in experts if arm.at(n_experts=n)["top_k"] >= least]}
        sweep(widths, arm.table, lrs, seeds, steps, options=OPTIONS, store=store, **sizes, **arm.fields)


def expert_count() -> None:
    """Two to 32 experts under every arm, in a screen and with three seeds, also half as long; width and experts; the dense."""
    expert_count_runs(SCREENED_EXPERT_ARMS, WHOLE, (0,))
    expert_count_runs(EXPERT_ARMS_OF_THREE_SEEDS, EXPERT_HALVES, SEEDS)
    for name in EXPERT_ARMS_OF_THREE_SEEDS:
        ends = (2 if name.endswith(("k=2", "forced balance")) else 4, 32)
        expert_count_runs((name,), EXPERT_HALVES, SEEDS, STEPS // 2, experts=ends)
    expert_count_runs(("mup, raw, k=2",), HALVES, SEEDS, widths=(32, 128), experts=(2, 8, 32))
    dense = {**SMALL, "n_experts": 1, "top_k": 1, "expert_ratio": 4}
    sweep((64,), ("simplep", "mup"), HALVES, SEEDS, STEPS, options=OPTIONS, store=SWEEPS / "expert_count.jsonl", **dense)


def balance() -> None:
    """Is it the balance? Forced balance with renormalised gates; other weights of the balance loss; and 64 experts."""
    expert_count_runs(("mup, renormalised, k=2, forced balance",), EXPERT_HALVES, SEEDS, name="balance")
    expert_count_runs(DOSES, EXPERT_HALVES, SEEDS, experts=(4, 32), name="balance")
    expert_count_runs(AT_64_EXPERTS, EXPERT_HALVES, SEEDS, experts=(64,), name="balance")


DEPTHS = (32, 16, 8, 4, 2)  # the longest first
DEPTH_TABLES = ("mup", "completep", "depth-mup")
WIDE_OCTAVES = [2.0**octave for octave in range(-8, -1)]


def depth() -> None:
    """2 to 32 blocks without a rule for the depth, and with 1/L or 1/sqrt(L): whole octaves in a screen, half octaves around
    the optima with three seeds, and these at the ends half as long."""
    store = SWEEPS / "depth.jsonl"
    runs = [(WIDE_OCTAVES, (0,), STEPS, DEPTHS), (DEPTH_HALVES, SEEDS, STEPS, DEPTHS)]
    runs += [(DEPTH_HALVES, SEEDS, STEPS // 2, (DEPTHS[0], DEPTHS[-1]))]
    for lrs, seeds, steps, depths in runs:
        for blocks in depths:
            sweep((32,), DEPTH_TABLES, lrs, seeds, steps, options=OPTIONS, store=store, depth=blocks, base_depth=2)


SIGMOID = {"gates": "sigmoid", "balance_weight": 0.0}  # as dmft has it
RATE = 0.1  # of the bias, by `bias_rate`
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
PER_ACTIVE = {**SMALL, "base_n_experts": 8, "base_top_k": 2}
QUARTER = {"n_experts": (32, 16, 8, 4), "top_k": (8, 4, 2, 1)}


def bias_rate() -> None:
    """How fast may the load move the bias? Five rates, and none, at 4 and at 32 experts, a quarter of them active."""
    ends = {"n_experts": (4, 32), "top_k": (1, 8)}
    fields = {**SIGMOID, **PER_ACTIVE, "bias_rate": (0.0, *RATES)}
    sweep((64,), ("dmft",), [2.0**-5], SEEDS, STEPS, options=OPTIONS, store=SWEEPS / "bias_rate.jsonl", path=ends, **fields)


def share() -> None:
    """dmft at a fixed share of active experts, 1/4, and its negative control: other shares with two active ones. Under mup with
    gates that sum to 1: other shares of 32 experts. (Its arm with two active experts is in `expert_count`.) The ends of all
    of these half as long."""
    store, fields = SWEEPS / "share.jsonl", {**SIGMOID, **PER_ACTIVE, "bias_rate": RATE}
    gates = {**SMALL, "gates": "renormalized"}
    for path in (QUARTER, {"n_experts": (32, 16, 4), "top_k": (2, 2, 2)}):
        sweep((64,), ("dmft",), EXPERT_HALVES, SEEDS, STEPS, options=OPTIONS, store=store, path=path, **fields)
    sweep((64,), ("mup",), EXPERT_HALVES, SEEDS, STEPS, options=OPTIONS, store=store, n_experts=32, top_k=(16, 8, 4), **gates)
    ends = {"n_experts": (32, 4, 32, 4), "top_k": (8, 1, 2, 2)}
    sweep((64,), ("dmft",), EXPERT_HALVES, SEEDS, STEPS // 2, options=OPTIONS, store=store, path=ends, **fields)
    ends = {"n_experts": (32, 32, 4), "top_k": (16, 2, 2)}
    sweep((64,), ("mup",), EXPERT_HALVES, SEEDS, STEPS // 2, options=OPTIONS, store=store, path=ends, **gates)


def share_batch() -> None:
    """The ends of these arms with four times the batch at the same number of steps: what is noise shrinks with it."""
    store, gates = SWEEPS / "share_batch.jsonl", {**SMALL, "gates": "renormalized", "batch_size": 64}
    path = {"n_experts": (32, 32, 4), "top_k": (16, 2, 2)}
    sweep((64,), ("mup",), EXPERT_HALVES, SEEDS, STEPS, options=OPTIONS, store=store, path=path, **gates)


def expert_size() -> None:
    """Experts 1 to 16 times as large as the width, under dmft, and under dmft with the usual init of the down projection;
    the ends half as long."""
    store, tables = SWEEPS / "expert_size.jsonl", ("dmft", READINGS["dmft, fan_in init"])
    fields = {**SIGMOID, "bias_rate": RATE, "base_expert_ratio": 1, "base_width": 16}
    for size in (16, 8, 4, 2, 1):
        sweep((32,), tables, EXPERT_HALVES, SEEDS, STEPS, options=OPTIONS, store=store, expert_ratio=size, **fields)
    sweep((32,), tables, EXPERT_HALVES, SEEDS, STEPS // 2, options=OPTIONS, store=store, expert_ratio=(16, 1), **fields)


def width_depth() -> None:
    """Width and depth together, four times as much of both: under mup, which has no rule for the depth, and under completep.
    The ends half as long."""
    path, store = {"width": (128, 64, 32), "depth": (8, 4, 2)}, SWEEPS / "width_depth.jsonl"
    sweep(None, ("mup", "completep"), DEPTH_HALVES, SEEDS, STEPS, options=OPTIONS, store=store, path=path, base_depth=2)
    path = {"width": (128, 32), "depth": (8, 2)}
    sweep(None, ("mup", "completep"), DEPTH_HALVES, SEEDS, STEPS // 2, options=OPTIONS, store=store, path=path, base_depth=2)


BRIDGE_HALVES = [2.0 ** (half / 2) for half in range(-15, -7)]  # the dense model's optimum is at 2^-6
CAPACITY_HALVES = [2.0**-8.5, 2.0**-8, *BRIDGE_HALVES]  # without the factor the best LR is smaller
DENSE_BASE = {"base_width": 64, "base_n_experts": 1, "base_top_k": 1, "base_granularity": 1, "base_expert_ratio": 4}
DENSE_BASE |= {"base_n_shared": 0}


def bridges() -> None:
    """From a dense model to mixtures of the same active size under complete-mue; to three of them also without its route scale,
    and under mup."""
    for steps in (STEPS, STEPS // 2):
        for arm in BRIDGE_ARMS.values():
            fields = {"options": OPTIONS, "store": SWEEPS / "bridges.jsonl", **DENSE_BASE, **arm.fields}
            sweep((64,), (arm.table,), BRIDGE_HALVES, SEEDS, steps, **fields)


def overlay() -> None:
    """The losses of the first 100 steps of each of these, at the LR that is best for the dense model."""
    path = SWEEPS.parent / "overlay.csv"
    if not path.exists():
        variants = {name: Config(arm.table, width=64, **DENSE_BASE, **arm.fields) for name, arm in BRIDGE_ARMS.items()}
        first_losses(variants, 2.0**-6, seeds=SEEDS, corpus="pydocs").to_csv(path, index=False, float_format="%.5g")


def upcycling() -> None:
    """A dense model trained for 400 steps, and 200 further steps of it and of mixtures made from it, at the dense model's LR."""
    path, arms = SWEEPS.parent / "upcycling.csv", BRIDGE_ARMS | CAPACITY_ARMS
    if not path.exists():
        names = ("dense", "8 of 8", "2 of 8", "2 of 8, 8 n", "R = 1, 8 of 8")
        variants = {name: Config(arms[name].table, width=64, **DENSE_BASE, **arms[name].fields) for name in names}
        more = {"dense": variants["dense"], "dense_steps": 400}
        first_losses(variants, 2.0**-6, 200, SEEDS, "pydocs", **more).to_csv(path, index=False, float_format="%.5g")


def capacities() -> None:
    """From the same dense model to networks of which more hidden values, or fewer, serve each token, under complete-mue; and
    without its factor for that."""
    for steps in (STEPS, STEPS // 2):
        for arm in CAPACITY_ARMS.values():
            fields = {"options": OPTIONS, "store": SWEEPS / "capacities.jsonl", **DENSE_BASE, **arm.fields}
            sweep((64,), (arm.table,), CAPACITY_HALVES, SEEDS, steps, **fields)


REGIME_WIDTHS = (128, 64, 32)
REGIME_HALVES = [2.0 ** (half / 2) for half in range(-12, -6)]  # at width 256; at the others the optima are near 2^-5
REGIME_PATHS = {  # of arXiv 2605.14200, each from 4 or 8 experts of the width at width 32
    "I": ({"width": REGIME_WIDTHS}, {"n_experts": 8, "top_k": 8, "expert_ratio": 1}),
    "II": (
        {"width": REGIME_WIDTHS, "granularity": (4, 2, 1)},
        {"n_experts": 4, "top_k": 2, "base_granularity": 1, "expert_ratio": 1},
    ),
    "III": (
        {"width": REGIME_WIDTHS, "n_experts": (16, 8, 4), "top_k": (8, 4, 2)},
        {"base_n_experts": 4, "base_top_k": 2, "expert_ratio": 1},
    ),
}


def regimes() -> None:
    """muP and MSSP in the three regimes in which experts grow with the width."""
    store = SWEEPS / "regimes.jsonl"
    for steps, ends in ((STEPS, slice(None)), (STEPS // 2, slice(None, None, 2))):
        for name, arm in reversed(REGIME_ARMS.items()):
            path, sizes = REGIME_PATHS[name.split()[-1]]
            path = {size: values[ends] for size, values in path.items()}
            fields = {"options": OPTIONS, "store": store, "path": path, **sizes, **arm.fields}
            sweep(None, (arm.table,), DEPTH_HALVES, SEEDS, steps, **fields)
    for name, arm in REGIME_ARMS.items():
        path, sizes = REGIME_PATHS[name.split()[-1]]
        path = {size: (2 * values[0],) for size, values in path.items()}
        lrs = REGIME_HALVES[1:] if name in ("mup I", "mssp I") else REGIME_HALVES
        fields = {"options": OPTIONS, "store": store, "path": path, **sizes, **arm.fields}
        sweep(None, (arm.table,), lrs, SEEDS, STEPS, **fields)


RATE_WIDTH = 64  # twice the base width, so that sp and mup differ
RATE_HALVES = {"sp": [2.0 ** (half / 2) for half in range(-15, -9)], "mup": [2.0 ** (half / 2) for half in range(-13, -7)]}


def rates() -> None:
    """RLRS on sp and mup: its end read in two ways, its first factors held, and two of its factors alone; 400 and 800 steps."""
    for steps, found in ((400, slice(None)), (800, slice(-4, None))):  # the optima at 400 steps are within these four
        for name, lrs in RATE_HALVES.items():
            store = SWEEPS / f"rates_{steps}.jsonl"
            sweep((RATE_WIDTH,), rate_arms(name), lrs[found], SEEDS, steps, options=OPTIONS, store=store)


EMBEDDING_FACTORS = (2, 4, 8, 16, 32)
SP_EMBEDDING_FACTORS = (8, 16, 32, 64)  # at four times the base width sp needs four times mup's, if the theory is right


def embedding_factors() -> None:
    """The embedding's LR times 2 to 32 under mup, at the base width and at four times that; there also under sp."""
    store = SWEEPS / "embedding_factors.jsonl"
    middle = [2.0 ** (half / 2) for half in (-11, -10, -9, -8)]  # at the base every factor has its optimum near 2^-5
    cells = [
        (32, "mup", EMBEDDING_FACTORS, RATE_HALVES["mup"]),
        (128, "mup", EMBEDDING_FACTORS, middle),
        (128, "sp", SP_EMBEDDING_FACTORS, [lr / 4 for lr in middle]),
    ]
    for width, name, factors, lrs in cells:
        tables = [name, *(embedding_times(name, factor) for factor in factors)]
        sweep((width,), tables, lrs, SEEDS, 400, options=OPTIONS, store=store)


U_CELLS = [  # table, width, factors, LR near the best of `embedding_factors`; at the base width sp is mup
    ("mup", 32, (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8), 2.0**-5),
    ("mup", 128, (1 / 4, 1, 4), 2.0**-5),
    ("sp", 128, (1 / 4, 1, 4), 2.0**-6.5),
]


def one_rate() -> None:
    """One LR changed at a time, from 1/8 to 8, about the best arm of `rates`, at the base width and at four times that."""
    for name, width, factors, lr in U_CELLS:
        tables = [table for *_, table in one_varied(name, factors)]
        sweep((width,), tables, (lr,), SEEDS, 400, options=OPTIONS, store=SWEEPS / "one_rate.jsonl")


def embedding_rule() -> None:
    """Is it the embedding? sp with the embedding's LR times the width's ratio, and mup with the LR divided by it."""
    for width in (256, 128, 64):
        octaves = round(math.log2(width / 32))
        for table, centre in zip(EMBEDDING_ARMS, (-5 - octaves, -5), strict=True):
            lrs = [2.0 ** (centre + half / 2) for half in range(-4, 4)]
            sweep((width,), (table,), lrs, SEEDS, STEPS, options=OPTIONS, store=SWEEPS / "embedding_rule.jsonl")


def one_active() -> None:
    """One active expert of 1 to 32, under mup and sp: is the joint law's LR rule a slope, or the step from dense to sparse?"""
    lower = [lr / 4 for lr in EXPERT_HALVES]  # the width is four times its base
    for n_experts in (32, 16, 8, 4, 2, 1):
        for name, lrs in (("mup", EXPERT_HALVES), ("sp", lower)):
            fields = {**SMALL, "n_experts": n_experts, "top_k": 1}
            sweep((64,), (name,), lrs, SEEDS, STEPS, options=OPTIONS, store=SWEEPS / "one_active.jsonl", **fields)


HORIZON_HALVES = [2.0 ** (half / 2) for half in range(-13, -7)]


def horizon() -> None:
    """Longer trainings, and larger batches at the same number of characters, with and without the square-root rule; why the ruled
    arm is worse: its betas alone."""
    base, ruled, betas = HORIZON_ARMS
    longer = {"steps": (1600, 800, 400, 200), "batch_size": (16, 16, 16, 16)}
    higher = [2**0.5 * lr for lr in HORIZON_HALVES]  # the rule divides the LRs of the longest training by 2^1.5
    cells = [(base, HORIZON_HALVES, slice(None)), (ruled, higher, slice(None)), (betas, HORIZON_HALVES, slice(1))]
    along(longer, cells, SWEEPS / "horizon_duration.jsonl", base_batch_size=16, base_steps=200)
    larger = {"steps": (1600, 800, 400, 200), "batch_size": (8, 16, 32, 64)}
    ends = slice(None, None, 3)  # of the ruled arm besides the base: these runs are the dearest
    cells = [(base, HORIZON_HALVES, slice(None)), (base, (2.0**-3.5, 2.0**-3), slice(2, None)), (ruled, HORIZON_HALVES, ends)]
    along(larger, cells, SWEEPS / "horizon_batch.jsonl", base_batch_size=16, base_steps=800)


def along(path: dict[str, tuple], cells: list[tuple], store: Path, **base: int) -> None:
    """Train each of (table, LRs, part of the path) at width 32; base: the sizes that the cells of a table compare with."""
    for table, lrs, part in cells:
        sizes = {size: values[part] for size, values in path.items()}
        sweep((32,), (table,), lrs, SEEDS, None, path=sizes, options=replace(OPTIONS, **base), store=store)


DECAY_STEPS = 1000  # LR * weight decay * steps is to be 1 at least, for hidden weights of the largest width too
DECAY = 0.3
DECAY_HALVES = [2.0 ** (half / 2) for half in range(-12, -7)]
DECAYS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def decay() -> None:
    """Three rules for the weight decay with the width: the best LR at one decay, and the best decay at one LR."""
    fields = {**SMALL, "steps": DECAY_STEPS, "seeds": SEEDS, "options": OPTIONS, "store": SWEEPS / "decay.jsonl"}
    for width in (64, 16):
        sweep((width,), DECAY_ARMS, DECAY_HALVES, weight_decay=DECAY, **fields)
        sweep((width,), DECAY_ARMS, (2.0**-5,), weight_decay=DECAYS, **fields)


def append(rows: pd.DataFrame, path: Path, digits: str = "%.5g") -> None:
    """Add the rows to a file of rows, which is made where there is none."""
    rows.to_csv(path, mode="a", header=not path.exists(), index=False, float_format=digits)


def labels_in(path: Path, *names: str) -> set[tuple]:
    """What a file of rows has already: the values of these columns, together; nothing where there is no file."""
    return set(pd.read_csv(path)[list(names)].itertuples(index=False, name=None)) if path.exists() else set()


def decay_sizes() -> None:
    """The sizes of the weights where LR and decay are in balance: a constant LR and a larger decay, widths 16 to 128."""
    path, options = SWEEPS.parent / "decay_sizes.csv", replace(OPTIONS, weight_decay=1.0, final_lr=1.0, evals=1)
    done = labels_in(path, "parametrization", "width")
    for width in (16, 32, 64, 128):
        for table in DECAY_ARMS:
            if (table.name, width) in done:
                continue
            runs = train(Config(table, width=width, **SMALL), 2.0**-5, SEEDS, "pydocs", DECAY_STEPS, options, "cpu")
            labels = ({"parametrization": table.name, "width": width, "seed": run.seed} for run in runs)
            rows = pd.concat([weight_sizes(run.model).assign(**own) for run, own in zip(runs, labels, strict=True)])
            append(rows, path)
            print(f"{path.name}: {table.name}, width {width}", flush=True)


def tiny(name: str, **changes) -> Plan:
    """transformers' Mixtral or OLMoE in a tiny size, as the library initialises it, adopted; its base width is 64."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    no_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    kinds = {"mixtral": (MixtralConfig, {"num_local_experts": 8}), "olmoe": (OlmoeConfig, {"num_experts": 8})}
    made, experts = kinds[name]
    config = made(**sizes, **heads, **no_tokens, **experts, **changes, tie_word_embeddings=False)
    return adopt(growing(config, "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"), 128, 64)


def adopted() -> None:
    """Mixtral and OLMoE as they are and under muP, widths 64 to 256, twice as long as `transfer` in half the batch."""
    options = TrainOptions(batch_size=8, evals=10)
    for name in ("mixtral", "olmoe"):
        store = SWEEPS / f"adopted_{name}.jsonl"
        lrs = [2.0**octave for octave in range(-11, -5)]
        adopted_sweep(tiny(name), (64, 128, 256), (AS_IT_IS, "mup"), lrs, SEEDS, 400, options=options, store=store, n_jobs=2)
    higher, store = [2.0**octave for octave in range(-10, -4)], SWEEPS / "adopted_mixtral_init.jsonl"
    large = tiny("mixtral", initializer_range=0.1)  # five times the library's
    adopted_sweep(large, (64, 256), (AS_IT_IS, "mup"), higher, SEEDS, 400, options=options, store=store, n_jobs=2)
    lower = [2.0**octave for octave in range(-13, -7)]  # the hidden weights' LR is four times that
    store = SWEEPS / "adopted_mixtral_tuned.jsonl"
    adopted_sweep(tiny("mixtral"), (64, 128, 256), (HIDDEN_X4,), lower, SEEDS, 400, options=options, store=store, n_jobs=2)


def coordinates() -> None:
    """The default coordinate check of the three tables and the mended SimpleP, as a frame."""
    path = SWEEPS.parent / "coordinates.csv"
    if path.exists():
        return
    mended = PARAMETRIZATIONS["simplep"].replace("router", lr=1 / fan_in)
    frame = coordinate_check([*WIDTH_TABLES, mended], corpus="pydocs")
    frame.to_csv(path, index=False, float_format="%.5g")


AXES = {  # what grows in a check, each by powers of two
    "width": {"widths": (64, 128, 256, 512)},
    "depth": {"widths": 32, "depth": (2, 4, 8, 16, 32, 64)},
    "n_experts": {"widths": 64, "path": {"n_experts": (4, 8, 16, 32, 64), "top_k": (1, 2, 4, 8, 16)}},
    "expert_ratio": {"widths": 32, "expert_ratio": (1, 2, 4, 8, 16, 32, 64)},
}
FURTHER = {  # tables that are checked along one axis alone
    "depth": [(READINGS["depth-mup, router without depth"], {})],
    "expert_ratio": [(READINGS["dmft, fan_in init"], SIGMOID | {"routing": "frozen"})],  # free, tokens change experts: no closure
}


def axes() -> None:
    """Coordinate checks of five tables along four axes: exponents and verdicts, and the values behind them."""
    tables = [(name, {}) for name in ("sp", "mup", "completep", "depth-mup")] + [("dmft", SIGMOID)]
    for axis, sizes in AXES.items():
        for table, fields in [*tables, *FURTHER.get(axis, [])]:
            add_check(axis, table, {**sizes, **fields})


def add_check(axis: str, rules, fields: dict, stem: str = "axes", name: str | None = None, sized_by: str | None = None) -> None:
    """Check one table along one axis, and append its exponents and its values after the last step. name: of the table in the
    files, `sized_by`: the size that grows, where it is not called `axis`."""
    exponents_file, values_file = (SWEEPS.parent / f"{file}.csv" for file in (stem, f"{stem}_values"))
    table_name = getattr(rules, "name", rules)
    name, sized_by = name or table_name, sized_by or axis
    if (axis, name) in labels_in(values_file, "axis", "parametrization"):
        return
    frame = coordinate_check(rules, steps=4, seeds=SEEDS, corpus="pydocs", **fields)
    table, labels = exponents(frame), ["parametrization", "layer", "tensor", "quantity"]
    judged = table[[*labels, "predicted", "measured", "stderr", "agrees", "verdict", "closure", "role", "kind"]]
    last = layers_compared(frame[(frame.step == frame.step.max()) | (frame.quantity == "init")])
    values = last.groupby([*labels, sized_by], sort=False).value.agg(["mean", "sem"]).reset_index()
    for path, rows in ((exponents_file, judged), (values_file, values.rename(columns={sized_by: "size"}))):
        append(rows.assign(axis=axis, parametrization=name), path, "%.4g")
    print(f"{axis}, {name}: {diagnosis(table, sized_by)[table_name]}", flush=True)


def regime_checks() -> None:
    """Coordinate checks of muP and MSSP in the three regimes, widths 32 to 256; and in the third, of the second's rule."""
    init_var = REGIMES["mssp II"]["experts_down"].init_var
    crossed = REGIMES["mup III"].replace("experts_down", "III with II's cell", init_var=init_var)
    arms = REGIME_ARMS | {crossed.name: Arm(crossed, REGIME_ARMS["mup III"].fields)}
    for name, arm in arms.items():
        regime = "III" if "III" in name else name.split()[1]
        path, sizes = REGIME_PATHS[regime]
        path = {size: (2 * values[0], *values) for size, values in path.items()}
        add_check(regime, arm.table, {"path": path, **sizes, **arm.fields}, "regimes", name, "width")


def linearisation() -> None:
    """How far a residual block is from linear in its own weights, over 2 to 512 blocks."""
    path = SWEEPS.parent / "linearisation.csv"
    if not path.exists():
        measured = distances(depths=[2**power for power in range(1, 10)])
        measured.to_csv(path, index=False, float_format="%.4g")


def mutants() -> None:
    """muP with each cell wrong by a root of the width, and which of its three desiderata that breaks."""
    path, wrong = SWEEPS.parent / "mutants.csv", list(mutations.mutants())
    if path.exists():
        return
    lazy = (
        PARAMETRIZATIONS["mup"]
        .replace("unembedding", "lazy", init_var=fan_in)
        .replace("embedding", "lazy", lr=1 / width_ratio**0.5)
    )
    for role in ("attention", "experts_up", "experts_down"):
        lazy = lazy.replace(role, "lazy", lr=1 / fan_in**1.5)
    tables = [*(table for *_, table in wrong), lazy]
    table = exponents(coordinate_check(tables, (64, 128, 256), 4, (0, 1), corpus="pydocs"))
    rows = []
    for role, cell, power, mutant in [*wrong, ("lazy", "-", math.nan, lazy)]:
        own = table[table.parametrization == mutant.name]
        caught, blamed = mutations.caught_by(own), suspects(own)
        first = f"{blamed.role[0]}.{blamed.cell[0]} x n^{blamed.power[0]:+.2f}" if len(blamed) else "-"
        closure = own.closure.dropna().iloc[0]
        broken = {quantity: quantity in caught for quantity in ("init", "update", "allocation")}
        rows.append({"role": role, "cell": cell, "power": power, **broken, "first_suspect": first, "closure": closure})
    pd.DataFrame(rows).to_csv(path, index=False, float_format="%.4g")


def learning() -> None:
    """Which role brought about how much of the loss's fall: sp and mup, each width at its own best LR of `transfer`; and the
    first 20 steps at one LR for all widths, with what the gradient promised."""
    best = transfer_report(read_sweep(SWEEPS / "transfer.jsonl")).set_index(["parametrization", "width"]).grid_lr
    for width in (32, 64, 128, 256):
        for name in ("sp", "mup"):
            add_books(SWEEPS.parent / "learning.csv", name, width, best[name, width], records=LEARNING_STEPS)
    for width in (64, 128, 256, 512):
        for name in ("sp", "mup"):
            add_books(SWEEPS.parent / "promise.csv", name, width, 2.0**-6, records=range(5, 25, 5), intervals=8)


def rate_books() -> None:
    """Which role lowered the loss by how much in 400 steps: muP, and muP with the embedding's LR times 5; width 32."""
    for table in ("mup", embedding_times("mup", 5)):
        add_books(SWEEPS.parent / "rate_books.csv", table, 32, 2.0**-5, steps=400, records=(20, *range(50, 401, 50)))


def add_books(path: Path, table, width: int, lr: float, steps: int = STEPS, **how) -> None:
    """Train three seeds, and append the books of each (see `minimoe.learning`) when it is done."""
    name = getattr(table, "name", table)
    done = labels_in(path, "parametrization", "width", "seed")
    for seed in SEEDS:
        if (name, width, seed) not in done:
            frame = books(Config(table, width=width, seed=seed), lr, "pydocs", steps, OPTIONS, **how)
            append(frame, path)
            print(f"{path.name}: {name}, width {width}, seed {seed}", flush=True)


def costs(store: Path) -> str:
    """How many rows and runs a sweep's store holds, and the training time by the runs' own clocks; nothing for no store."""
    if not store.exists():
        return ""
    rows = read_sweep(store)
    runs = rows.drop_duplicates("key")  # cells that are one run share its seconds
    return f", {len(rows)} rows, {len(runs)} runs, {runs.seconds.sum() / 3600:.1f} core-hours"


SWEPT = (
    transfer,
    router_rules,
    expert_count,
    balance,
    granularity,
    router_cells,
    depth,
    bias_rate,
    share,
    expert_size,
    width_depth,
    share_batch,
    bridges,
    capacities,
    regimes,
    rates,
    embedding_factors,
    one_rate,
    embedding_rule,
    one_active,
    horizon,
    decay,
)
CHECKED = (coordinates, axes, linearisation, regime_checks, overlay, upcycling, mutants)
MADE = {made.__name__: made for made in (*CHECKED, *SWEPT, decay_sizes, learning, rate_books, adopted)}

if __name__ == "__main__":
    for name in sys.argv[1:] or MADE:
        MADE[name]()
        print(f"{name}: made{costs(SWEEPS / f'{name}.jsonl')}", flush=True)
