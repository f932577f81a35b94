"""Peak memory of a training step over the number of experts, at a fixed top-k.

    python benchmarks/memory.py

Each number of experts has a process of its own: its peak resident memory over three steps, less what it held once model
and optimizer state were there, is what the step's activations and gradients took; gradients are as large as the weights
and are given beside it.
"""

from __future__ import annotations

import subprocess
import sys

CHILD = """
import resource, sys, torch
from minimoe import Config, MiniMoE, TrainOptions
from minimoe.step import SingleRun
torch.set_num_threads(1)
config = Config(width=128, n_experts=int(sys.argv[1]), top_k=int(sys.argv[2]))
run, batch = SingleRun([MiniMoE(config)], [1e-3], TrainOptions(batch_size=64)), torch.randint(96, (1, 64, 65))
for p in run.model.parameters():  # AdamW's state and the gradients, before the first step
    p.grad = torch.zeros_like(p)
run.optimizer.step(dict.fromkeys(run.finals, 1.0))
weights = sum(p.numel() for p in run.model.parameters())
page = resource.getpagesize()
held = int(open("/proc/self/statm").read().split()[1]) * page
for _ in range(3):
    run.step(batch)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print((peak - held) / 2**20, 4 * weights / 2**20)
"""


def main() -> None:
    print("width 128, 64 x 64 tokens\n\n| E | k | step's memory, MiB | weights, MiB |\n|---|---|---|---|")
    for experts, top_k in ((8, 2), (16, 2), (32, 2), (64, 2), (128, 2), (128, 8)):
        command = [sys.executable, "-c", CHILD, str(experts), str(top_k)]
        step, weights = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        print(f"| {experts} | {top_k} | {step:.0f} | {weights:.0f} |", flush=True)


if __name__ == "__main__":
    main()
