"""Sampling from a model, token by token."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checks import require
from .corpus import check_tokens

if TYPE_CHECKING:
    from .model import MiniMoE


def generated(model: MiniMoE, tokens: Tensor, n: int, temperature: float, seed: int) -> Tensor:
    """`MiniMoE.generate`."""
    rule = "must be finite and not negative"
    require(tokens.ndim == 2 and tokens.shape[1] > 0, "prompt", tuple(tokens.shape), "must be (B, T) with T at least 1")
    require(math.isfinite(temperature) and temperature >= 0, "temperature", temperature, rule)
    require(n >= 0, "n", n, rule)
    check_tokens(tokens, model.config.vocab_size)
    generator = torch.Generator(tokens.device).manual_seed(seed)
    for _ in range(n):
        logits = model(tokens[:, -model.config.context :]).logits[:, -1]  # (B, V)
        if not logits.isfinite().all():
            raise ValueError("the model's logits are not finite: it diverged in training")
        odds = torch.softmax(logits / (temperature or 1.0), -1)  # (B, V)
        drawn = torch.multinomial(odds, 1, generator=generator) if temperature else odds.argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, drawn], dim=1)
    return tokens
