"""From a dense model to a mixture of experts that begins where the dense one stands (upcycling), and what the first steps show.

The dense feed-forward network has H hidden values. Experts of M hidden values hold it in H / M slices; the shared experts and
then the routed ones get the slices in turn, and get them again where there are more experts. Complete-muE (arXiv 2605.23893)
says that no weight has to be rescaled: the multipliers of its table do it. Then the mixture is the same function

    where each slice has one expert, and all are active with equal gates (Bridge I there): the same training as well
    where each expert holds the whole network (M = H), whatever the router says: until the experts' steps differ
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor

from .checks import require
from .config import Config
from .corpus import Corpus, load_corpus
from .model import MiniMoE
from .step import SingleRun, TrainOptions, lr_factors
from .training import TextData, check_training, one_thread, train, windows

MAY_DIFFER = ("n_experts", "top_k", "granularity", "expert_ratio", "n_shared", "gates", "bias_rate", "balance_weight", "z_weight")


@torch.no_grad()
def upcycled(dense: MiniMoE, config: Config) -> MiniMoE:
    """A mixture of this config whose experts hold the dense model's feed-forward network in slices; all other weights are the
    dense model's, and the router is drawn from the config's seed. Weights are copied as they are: see this module.

    Raises ValueError for a model that is not dense, a config that differs from the dense one in more than its experts, gates and
    balance, or experts whose size does not divide that of the dense network.
    """
    counted = f"{dense.config.experts} experts and {dense.config.shared_experts} shared ones"
    alone = (dense.config.experts, dense.config.n_shared) == (1, 0)
    require(alone, "dense", counted, "must have one expert and no shared ones")
    for name, value in dense.config.shape.items():
        if name not in MAY_DIFFER and getattr(config, name) != value:
            raise ValueError(f"{name}={getattr(config, name)!r}: the dense model has {value!r}")
    hidden, size = dense.config.expert_width, config.expert_width
    require(hidden % size == 0, "expert_width", size, f"must divide the dense network's hidden size, {hidden}")
    model = MiniMoE(config).to(next(dense.parameters()).dtype)
    own, grown = dense.state_dict(), model.state_dict()
    model.load_state_dict({name: own[name] if _is_copied(name, own) else value for name, value in grown.items()})
    for block, source in zip(model.blocks, dense.blocks, strict=True):
        up, down = _slices(source.moe.up, source.moe.down, size)
        slots = torch.arange(config.shared_experts + config.experts) % len(up)
        shared, routed = slots.split([config.shared_experts, config.experts])
        block.moe.up.copy_(up[routed])
        block.moe.down.copy_(down[routed])
        if config.n_shared:
            block.moe.shared_up.copy_(up[shared])
            block.moe.shared_down.copy_(down[shared])
    return model


def _is_copied(name: str, own: Mapping[str, Tensor]) -> bool:
    """Whether a tensor of the mixture is the dense model's: all outside the experts, but for the multipliers."""
    return name in own and ".moe." not in name and not name.endswith("_multiplier")


def _slices(up: Tensor, down: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(1, D, columns * H), (1, H, D) -> (H / size, D, columns * size), (H / size, size, D); columns is 2 for swiglu."""
    columns = up.shape[2] // down.shape[1]
    parts = up[0].unflatten(-1, (columns, -1, size))  # (D, columns, H / size, size)
    return parts.permute(2, 0, 1, 3).flatten(2), down[0].unflatten(0, (-1, size))


def first_losses(
    variants: Mapping[str, Config],
    lr: float,
    steps: int = 100,
    seeds: Sequence[int] = (0, 1, 2),
    corpus: str | Corpus = "pydocs",
    options: TrainOptions = TrainOptions(),  # noqa: B008 (frozen)
    dense: Config | None = None,
    dense_steps: int = 0,
) -> pd.DataFrame:
    """The training loss of each variant at each of the first steps, at one LR and on the same batches: a row per variant, seed
    and step, with the loss before it (nats). Variants that are one model in the limit should lie on one another; a gap that
    grows names a misplaced multiplier (a test of Complete-muE's author). The schedule is that of a training of so many steps.

    dense: where it is given, every variant is upcycled from this model, trained for `dense_steps` at the same LR; the text goes
    on from there, and the optimizer starts anew. Raises ValueError or TypeError for bad input, or as `upcycled` does.
    """
    require(variants, "variants", variants, "must be name -> Config")
    corpus = load_corpus(corpus)
    steps = check_training([(config, lr) for config in variants.values()], corpus, steps)
    trained = [] if dense is None else train(dense, lr, seeds, corpus, dense_steps, options, "cpu")
    grown, before = {run.seed: run.model for run in trained}, dense_steps if trained else 0
    data, rows = TextData(corpus, torch.device("cpu")), []
    with one_thread():
        for name, config in variants.items():
            for seed in seeds:
                config = replace(config, seed=seed)
                model = upcycled(grown[seed], config) if grown else MiniMoE(config)
                engine = SingleRun([model], [lr], options, steps)
                order = data.order([options.order_seed(seed)], before + steps, options.batch_size, config.context)
                for step in range(steps):
                    batch = windows(data.train, order[before + step], config.context)
                    (loss,) = engine.step(batch, lr_factors(step, steps, options, engine.finals)).tolist()
                    rows.append({"variant": name, "seed": seed, "step": step, "loss": loss})
    return pd.DataFrame(rows)
