"""How far a residual block is from linear in its own weights: what the powers 1/2 and 1 of the depth differ in.

A block adds m W2 gelu(W1 h) to the residual stream, m its multiplier. A training step changes what it adds by a part that is
linear in the steps of W1 and W2, and by the rest. The *distance from the linearisation* is the size of the rest over the size
of the linear part. It goes like the step of a weight: with 1/sqrt(L) for branches and LRs (depth-mup) it shrinks like 1/sqrt(L),
and a deep model's blocks only learn as linear models do; with 1/L for branches alone (CompleteP) it does not shrink. This is
CompleteP's argument for its power (arXiv 2505.01618, figure 6), here with a network, data and code of our own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd.functional import jvp
from torch.func import functional_call
from torch.nn import functional as F

from .checks import positive, require, whole
from .parametrization import Parametrization
from .roles import RoleParameter, initialise, param_groups, parameter
from .tables import parametrization

INPUTS, OUTPUTS, SAMPLES = 64, 16, 128


class ResidualBlock(nn.Module):
    """h -> the change that it adds: W2 gelu(W1 h), (N, D) -> (N, D). Without a norm, as in the published experiment."""

    def __init__(self, width: int, ratios: dict[str, float]):
        super().__init__()
        self.up = parameter("experts_up", (width, width), ratios=ratios)
        self.down = parameter("experts_down", (width, width), ratios=ratios, scales=("residual_moe",))

    def forward(self, h: Tensor) -> Tensor:
        return F.gelu(h @ (self.up_multiplier * self.up)) @ (self.down_multiplier * self.down)


class ResidualNetwork(nn.Module):
    """(N, INPUTS) -> (N, OUTPUTS), through L residual blocks of two layers each."""

    def __init__(self, table: Parametrization, width: int, depth: int, base_depth: int, seed: int):
        super().__init__()
        ratios = {"width": 1.0, "depth": depth / base_depth}

        def weight(role: str, *shape: int) -> RoleParameter:
            return parameter(role, shape, ratios=ratios)

        self.read = weight("embedding", INPUTS, width)
        self.blocks = nn.ModuleList(ResidualBlock(width, ratios) for _ in range(depth))
        self.out = weight("unembedding", width, OUTPUTS)
        initialise(self.double(), table, seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.read_out(self.streams(x)[-1])

    def read_out(self, h: Tensor) -> Tensor:
        return h @ (self.out_multiplier * self.out)

    def streams(self, x: Tensor) -> list[Tensor]:
        """The residual stream (N, D) before each block, and after the last."""
        found = [x @ (self.read_multiplier * self.read)]
        for block in self.blocks:
            found.append(found[-1] + block(found[-1]))
        return found


def linearisation(
    tables: Iterable[str | Parametrization] = ("mup", "depth-mup", "completep"),
    depths: Sequence[int] = (2, 4, 8, 16, 32, 64, 128, 256),
    seeds: Sequence[int] = range(5),
    width: int = 64,
    lr: float = 2.0**-10,
) -> pd.DataFrame:
    """Take one AdamW step on random inputs with random classes, and measure each block's distance from its linearisation.

    One row per table, depth and seed: `distance` is the mean over the blocks; NaN where the network's loss is no finite number.
    The first depth is the base. In float64. Raises ValueError for no depths or seeds, or a depth, a width or an LR that is not
    positive.
    """
    for name, sizes in (("depths", depths), ("width", (width,))):
        require(len(sizes) > 0 and all(whole(size, 1) for size in sizes), name, sizes, "must be positive integers")
    require(len(seeds) > 0, "seeds", seeds, "give at least one")
    positive("lr", lr)
    rows = []
    for table in map(parametrization, tables):
        for depth in depths:
            for seed in seeds:
                distance = _mean_distance(ResidualNetwork(table, width, depth, depths[0], seed), table, lr, seed)
                rows.append({"parametrization": table.name, "depth": depth, "seed": seed, "distance": distance})
    return pd.DataFrame(rows)


def _mean_distance(network: ResidualNetwork, table: Parametrization, lr: float, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, INPUTS, generator=generator, dtype=torch.float64)
    classes = torch.randint(OUTPUTS, (SAMPLES,), generator=generator)
    before = [{name: weight.detach().clone() for name, weight in block.named_parameters()} for block in network.blocks]
    optimizer = torch.optim.AdamW(param_groups(network, table, lr, eps=1e-15))
    *inputs, last = network.streams(x)
    loss = F.cross_entropy(network.read_out(last), classes)
    if not loss.isfinite():
        return float("nan")
    loss.backward()
    optimizer.step()
    parts = zip(network.blocks, before, inputs, strict=True)
    return float(torch.stack([distance(block, start, h.detach()) for block, start, h in parts]).mean())


@torch.no_grad()
def distance(block: nn.Module, before: dict[str, Tensor], h: Tensor) -> Tensor:
    """(): how far the block's change on the stream h (N, D) is from linear in the steps of its weights since `before`: the norm
    of the rest over that of the linear part."""
    after = dict(block.named_parameters())
    steps = tuple(after[name].detach() - weight for name, weight in before.items())

    def added(*weights: Tensor) -> Tensor:
        return functional_call(block, dict(zip(before, weights, strict=True)), (h,))

    start, linear = jvp(added, tuple(before.values()), steps)
    return torch.linalg.vector_norm(block(h) - start - linear) / torch.linalg.vector_norm(linear)
