"""One training step against its floor, against transformers' Mixtral, and over granularity.

    python benchmarks/step.py --threads 1 2

Forward + backward + update, float32, 16 sequences of 64 characters, 2 layers, fused AdamW. The floor is the step's matrix
products, attention and loss, each timed alone: ten times in a row on the same data, so that what fits is in the cache.
Mixtral is that of `contenders.py`.
"""

from __future__ import annotations

import argparse

import torch
from contenders import mixtral, ours
from timing import conditions, interleaved
from torch.nn import functional as F

from minimoe import Config

B, T, L, V = 16, 64, 2, 96
IN_A_ROW = 10
SHAPES = [(32, 1), (64, 1), (128, 1), (256, 1), (128, 4)]  # width, granularity; 8 experts, top-2


def floor(config: Config) -> list:
    """The step's arithmetic, piece by piece: functions to be timed alone, with how often a step does them."""
    N, D, M, E, S = B * T, config.width, config.expert_width, config.experts, B * T * config.active_experts

    def product(n, d, m):  # forward, and both gradients
        x, w, g = torch.randn(n, d), torch.randn(d, m), torch.randn(n, m)
        return lambda: (x @ w, g @ w.T, x.T @ g)

    def experts(d, m):
        one = product(S // E, d, m)
        return lambda: [one() for _ in range(E)]

    q, k, v = (torch.randn(B, D // 16, T, 16, requires_grad=True) for _ in range(3))
    g = torch.randn(B, D // 16, T, 16)

    def attention():
        torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1 / 16), (q, k, v), g)

    logits, targets = torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))

    def loss():
        torch.autograd.grad(F.cross_entropy(logits, targets), logits)

    return [
        (product(N, D, D), 4 * L), (product(N, D, E), L), (experts(D, M), L), (experts(M, D), L), (attention, L),
        (product(N, D, V), 1), (loss, 1),
    ]  # fmt: skip


def repeated(piece):
    return lambda: [piece() for _ in range(IN_A_ROW)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=25)
    options = parser.parse_args()
    for threads in options.threads:
        torch.set_num_threads(threads)
        print(f"\n{conditions()}\n\n| width, E, k, G | ms | floor, ms | over the floor | Mixtral, ms | Mixtral over ours |")
        print("|---|---|---|---|---|---|")
        for width, granularity in SHAPES:
            config = Config(width=width, granularity=granularity)
            pieces = floor(config)
            contenders = {"ours": ours(config), "mixtral": mixtral(config)}
            contenders |= {f"piece {i}": repeated(piece) for i, (piece, _) in enumerate(pieces)}
            took = interleaved(contenders, options.repeats)
            least = sum(count * took[f"piece {i}"] / IN_A_ROW for i, (_, count) in enumerate(pieces))
            row = [f"{width}, 8, 2, {granularity}", f"{1e3 * took['ours']:.1f}", f"{1e3 * least:.1f}"]
            row += [f"{took['ours'] / least:.2f}", f"{1e3 * took['mixtral']:.1f}", f"{took['mixtral'] / took['ours']:.2f}"]
            print("| " + " | ".join(row) + " |", flush=True)
        print(
            "\n| width | "
            + " | ".join(f"G={g}" for g in (1, 2, 4, 8))
            + " | (time of a step over that at G=1)\n|---|---|---|---|---|"
        )
        for width in (128, 256):
            took = interleaved({g: ours(Config(width=width, granularity=g)) for g in (1, 2, 4, 8)}, options.repeats)
            print(f"| {width} | " + " | ".join(f"{took[g] / took[1]:.2f}" for g in (1, 2, 4, 8)) + " |", flush=True)


if __name__ == "__main__":
    main()
