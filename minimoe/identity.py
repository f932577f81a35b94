"""What makes two runs one: the numbers that a table gives each tensor, and the digest of all that a run depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import torch

from . import step
from .config import Config, differing, shape_in_key
from .model import MiniMoE
from .roles import AT_BASE, Numbers, RoleParameter, moved_betas, named_roles, numbers
from .step import TrainOptions
from .store import FORMAT


def declared(config: Config) -> dict[str, RoleParameter]:
    """name -> parameter of the config's model, with shape and role but no values: it costs no memory."""
    with torch.device("meta"):
        return dict(named_roles(MiniMoE(config)))


def tensor_numbers(config: Config, training: Mapping[str, float] = AT_BASE) -> dict[str, Numbers]:
    """name -> evaluated numbers, for each of the model's tensors. training: the ratios `batch` and `duration`."""
    return _tensor_numbers(config, tuple(sorted(training.items())))


@lru_cache(maxsize=4096)
def _tensor_numbers(config: Config, training: tuple) -> dict[str, Numbers]:
    return {name: numbers(param, config.parametrization, dict(training)) for name, param in declared(config).items()}


def run_key(config: Config, lr: float, steps: int, options: TrainOptions, corpus_digest: str) -> str:
    """The identity of a run: a digest of everything that its numbers depend on, and of nothing else.

    Fields that have been added since the first shipped runs (`config.NEUTRAL`, `step.NEUTRAL`) count where they differ from
    their neutral values only, so that a new feature leaves the key of every older run as it was.
    """
    evaluated = {
        name: (n.std, n.multiplier, lr * n.lr, options.eps * n.eps, options.weight_decay * n.weight_decay)
        + (moved_betas(options.betas, n.one_minus_beta) if n.one_minus_beta != 1 else ())
        + ((("final_lr", options.final_lr * n.final_lr),) if options.final_lr * n.final_lr != options.final_lr else ())
        for name, n in tensor_numbers(replace(config, seed=0), options.ratios(steps)).items()
    }
    identity = {
        "format": FORMAT,
        "shape": shape_in_key(config),
        "numbers": evaluated,
        "seeds": [config.seed, options.order_seed(config.seed)],
        "steps": steps,
        "schedule": differing(options.schedule, step.NEUTRAL),
        "corpus": corpus_digest,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
