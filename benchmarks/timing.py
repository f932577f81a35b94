"""Honest comparisons: every contender in turn, many times over, and ratios of medians."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import torch


def interleaved(contenders: dict[str, Callable], repeats: int, warmup: int = 2) -> dict[str, float]:
    """name -> median seconds of a call, the contenders taking turns so that the machine's moods fall on all of them."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(-warmup, repeats):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if repeat >= 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def matmul_rate(size: int = 512) -> float:
    """GFLOP/s of a square float32 product, now, on the threads in force."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / interleaved({"product": lambda: a @ b}, repeats=20)["product"] / 1e9


def conditions() -> str:
    """What the figures below were measured with."""
    rate = f"{matmul_rate():.0f} GFLOP/s in a 512 x 512 float32 product"
    return f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} thread(s), {rate}"
