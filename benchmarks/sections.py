"""The section of results.md that one run of `gpu.py` adds: its tables, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from minimoe import read_sweep
from minimoe.arms import ARMS, EXPERT_ARMS, Arm, labelled

SIZES = {"granularity": "granularity", "experts": "n_experts"}


def section(done: list[dict], place: Mapping[str, str], command: str, stores: Mapping[str, Path]) -> str:
    """Heading, place and command, and a table for each kind of part that was done.

    done: the records of this command. place: device, torch and corpus. stores: granularity and experts -> the sweep's store.
    """
    kinds = {record["kind"] for record in done}
    blocks = [f"\n## {place['device']}, torch {place['torch']}", f"`{command}`"]
    if "step" in kinds:
        blocks.append(step_table([record for record in done if record["kind"] == "step"]))
    blocks += [runs_table(record) for record in done if record["kind"] == "runs"]
    for kind, arms in (("granularity", ARMS), ("experts", EXPERT_ARMS)):
        if kind in kinds:
            frame = read_sweep(stores[kind])
            names = {record["name"].partition(", width")[0] for record in done if record["kind"] == kind}
            mine = {name: arm for name, arm in arms.items() if name in names}
            blocks.append(sweep_table(kind, frame[frame.corpus == place["corpus"]], mine))
    return "\n\n".join(blocks) + "\n"


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table under a line of text."""
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return f"{title}\n\n" + "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def step_table(records: list[dict]) -> str:
    """Median times, their ratio, and peak memory."""
    rows = []
    for r in records:
        milliseconds = [f"{1e3 * r['seconds'][name]:.2f}" for name in ("ours", "mixtral")]
        memory = [f"{r['memory'][name] / 2**20:.0f}" if r["memory"][name] else "not measured" for name in ("ours", "mixtral")]
        ratio = f"{r['seconds']['mixtral'] / r['seconds']['ours']:.2f}"
        rows.append([r["width"], r["dtype"], "yes" if r["compiled"] else "no", *milliseconds, ratio, *memory])
    columns = ("width", "precision", "compiled", "ms", "Mixtral, ms", "Mixtral over ours", "MiB", "Mixtral, MiB")
    return table("The step:", columns, rows)


def runs_table(record: dict) -> str:
    """Seconds over the number of runs at once."""
    seconds = record["seconds"]
    rows = [[runs, f"{took:.1f}", f"{took / seconds['1']:.2f}"] for runs, took in seconds.items()]
    return table("Runs at once:", ("runs at once", "s", "over one run"), rows)


def sweep_table(kind: str, frame: pd.DataFrame, arms: Mapping[str, Arm]) -> str:
    """For each arm, width and size: the best LR of the grid and its loss, over the seeds that are there."""
    size, rows = SIZES[kind], []
    for (arm, width, value), group in labelled(frame, arms).groupby(["parametrization", "width", size], sort=False):
        means = group.groupby("lr").val_loss.mean()
        curve = ", ".join(f"{loss:.3f}" for loss in means)
        octaves = f"{math.log2(means.index[0]):g} to {math.log2(means.index[-1]):g}"
        rows.append(
            [arm, width, value, f"{math.log2(means.idxmin()):g}", f"{means.min():.3f}", octaves, curve, group.seed.nunique()]
        )
    columns = ("arm", "width", {"granularity": "G", "experts": "E"}[kind], "best log2 LR", "loss", "grid", "losses", "seeds")
    return table("Granularity:" if kind == "granularity" else "Number of experts:", columns, rows)
