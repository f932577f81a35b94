"""How large the weights of a model are: what weight decay balances against the updates."""

from __future__ import annotations

import math

import pandas as pd
import torch
from torch import nn

from .roles import named_roles


@torch.no_grad()
def weight_sizes(module: nn.Module) -> pd.DataFrame:
    """One row per weight matrix, or stack of matrices: tensor, role, rms (root mean square of its entries) and top (largest
    singular value; of a stack the mean over its matrices). Multipliers are left out.

    With steps of random sign, AdamW's LR and weight decay balance where rms is about sqrt(LR / (2 * weight decay)), after some
    1 / (LR * weight decay) steps. Raises TypeError for a parameter without a role.
    """
    rows = []
    for name, param in named_roles(module):
        if param.ndim < 2:
            continue
        matrices = param.double().reshape(-1, *param.shape[-2:])
        top = torch.linalg.matrix_norm(matrices, ord=2).mean().item()
        rms = math.sqrt(param.double().square().mean().item())
        rows.append({"tensor": name, "role": param.role.name, "rms": rms, "top": top})
    return pd.DataFrame(rows)
