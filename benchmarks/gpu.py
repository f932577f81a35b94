"""Many runs at once on a GPU: how long nine and twenty-seven runs take, over the time of one.

    python benchmarks/gpu.py

Width 128, the default shape, 200 steps, validation counted. Says so and measures nothing where there is no GPU.
"""

from __future__ import annotations

import statistics
import time

import torch
from timing import conditions

from minimoe import Config, load_corpus, train


def main() -> None:
    if not torch.cuda.is_available():
        print("no GPU here: nothing measured")
        return
    print(f"{torch.cuda.get_device_name()}, {conditions()}\n\n| runs at once | s | over one run |\n|---|---|---|")
    corpus, one = load_corpus("pydocs"), None
    for runs in (1, 9, 27):
        lrs = [2.0 ** (-9 + 6 * i / runs) for i in range(runs)]
        times = []
        for _ in range(4):
            start = time.perf_counter()
            train(Config("mup", 128), lrs, 0, corpus, 200, device="cuda", at_once=runs)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        took = statistics.median(times[1:])
        one = one or took
        print(f"| {runs} | {took:.1f} | {took / one:.2f} |", flush=True)


if __name__ == "__main__":
    main()
