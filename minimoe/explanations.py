"""What a parametrization does to each tensor of a model."""

from __future__ import annotations

import pandas as pd
import torch

from .model import Config, MiniMoE
from .parametrization import named_roles, numbers


def explain(config: Config) -> pd.DataFrame:
    """One row per tensor of the model: what the config's table gives it.

    Columns: name, role, shape, parameters (their number), flops (of its matrix products in one token's forward pass),
    ratio (fan_in over base fan_in), init_std, multiplier, and lr, eps and weight_decay as factors on the base values.
    """
    with torch.device("meta"):
        model = MiniMoE(config)
    rows = []
    for name, param in named_roles(model):
        cells = numbers(param, config.parametrization)
        rows.append(
            {
                "name": name,
                "role": param.role.name,
                "shape": tuple(param.shape),
                "parameters": param.numel(),
                "flops": _flops(config, param),
                "ratio": param.role.ratios["fan_in"],
                "init_std": cells.std,
                "multiplier": cells.multiplier,
                "lr": cells.lr,
                "eps": cells.eps,
                "weight_decay": cells.weight_decay,
            }
        )
    return pd.DataFrame(rows)


def _flops(config: Config, param: torch.nn.Parameter) -> int:
    """2 per weight that a token meets: none of an embedding's (it is looked up), the active share of the experts'."""
    if param.role.name == "embedding":
        return 0
    active = config.active_experts if param.ndim == 3 else 1  # stacked experts: (E, fan_in, fan_out)
    return 2 * active * param.shape[-2] * param.shape[-1]
