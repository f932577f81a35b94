"""A sweep of nine LRs against the loop that a user would write, as whole processes, start-up counted.

    python benchmarks/sweep.py

The loop: one process, torch's default number of threads, one run after the other, the same model and the same step.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from functools import partial

from timing import conditions, interleaved

LOOP = """
import torch
from minimoe import Config, MiniMoE, TrainOptions, load_corpus
from minimoe.step import SingleRun, lr_factors
from minimoe.training import TextData, record_steps, windows
steps, config, options = {steps}, Config("mup", {width}), TrainOptions()
data = TextData(load_corpus("pydocs"), torch.device("cpu"))
validation = data.validation(options.eval_batches, options.batch_size, config.context)
for i in range(9):
    run = SingleRun([MiniMoE(config)], [2.0 ** (i / 2 - 8)], options)
    order = data.order([0], steps, options.batch_size, config.context)
    for step in range(steps):
        run.step(windows(data.train, order[step], config.context), lr_factors(step, steps, options, run.finals))
        if step + 1 in record_steps(steps, options.evals):
            run.measure(validation)
"""
SWEEP = """
from minimoe import sweep
if __name__ == "__main__":
    sweep(({width},), ("mup",), [2.0 ** (i / 2 - 8) for i in range(9)], steps={steps}, progress=False)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"{conditions()}\n\n| width | loop, s | sweep, s | loop over sweep |\n|---|---|---|---|")
    for width in options.widths:
        scripts = {"loop": LOOP, "sweep": SWEEP}
        runs = {}
        for name, script in scripts.items():
            command = [sys.executable, "-c", script.format(width=width, steps=options.steps)]
            runs[name] = partial(subprocess.run, command, check=True)
        took = interleaved(runs, options.repeats, warmup=0)
        print(f"| {width} | {took['loop']:.1f} | {took['sweep']:.1f} | {took['loop'] / took['sweep']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
