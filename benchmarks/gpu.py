"""Many runs at once on a GPU: how long nine and twenty-seven runs take, over the time of one.

    python benchmarks/gpu.py

Width 128, the default shape, 200 steps, validation counted. Says so and measures nothing where there is no GPU.
"""

from __future__ import annotations

import torch
from timing import conditions, interleaved

from minimoe import Config, load_corpus, train


def main() -> None:
    if not torch.cuda.is_available():
        print("no GPU here: nothing measured")
        return
    print(f"{torch.cuda.get_device_name()}, {conditions()}\n\n| runs at once | s | over one run |\n|---|---|---|")
    corpus = load_corpus("pydocs")

    def at_once(runs: int):
        lrs = [2.0 ** (-9 + 6 * i / runs) for i in range(runs)]

        def run():
            train(Config("mup", 128), lrs, 0, corpus, 200, device="cuda", at_once=runs)
            torch.cuda.synchronize()

        return run

    took = interleaved({runs: at_once(runs) for runs in (1, 9, 27)}, repeats=3, warmup=1)
    for runs, seconds in took.items():
        print(f"| {runs} | {seconds:.1f} | {seconds / took[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
