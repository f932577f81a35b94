"""A published law for mixtures of experts: the loss, and the best LR, from active parameters, tokens and number of experts.

Joint scaling laws for dense and MoE models (Ludziejewski et al., ICML 2025, arXiv 2502.05172): equation 6 with the coefficients
of Table 3, and equation 8. The authors fitted the law to more than 280 trainings under SP: one active expert of 1 to 32,
79 million to 2.7 billion active parameters, 0.5 to 80 billion tokens. Nothing here was fitted by us. Far outside these ranges
the law says little; `joint_law` says which rows lie outside.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import pandas as pd

from .checks import not_negative, positive, require, typed

A, ALPHA, DELTA, GAMMA = 35.91, -0.1889, -0.2285, 0.0098  # of the active parameters
B, BETA, OMEGA, ZETA = 35.98, -0.1775, 0.5529, -0.0259  # of the tokens
E_START, E_MAX, C = 2.0732, 290.4521, 1.3637
LR_AT_1, LR_PER_PARAMETERS, LR_PER_EXPERTS = 8.39, -0.81, -0.25  # equation 8, in natural logarithms
FITTED = {"active": (79e6, 2.7e9), "tokens": (0.5e9, 80e9), "experts": (1, 32)}


class Chinchilla(NamedTuple):
    """L = m * N^mu + n * D^nu + c, for one number of experts; N active parameters, D tokens."""

    m: float
    mu: float
    n: float
    nu: float
    c: float

    def loss(self, active: float, tokens: float) -> float:
        """Nats per token."""
        return self.m * active**self.mu + self.n * tokens**self.nu + self.c


def chinchilla(experts: float) -> Chinchilla:
    """The joint law for this number of experts (its Table 4). Raises ValueError for fewer than one, TypeError for no number."""
    experts = typed("experts", "float", experts)
    require(1 <= experts < math.inf, "experts", experts, "must be 1 or more")
    seen = 1 / (1 / (experts - 1 + 1 / (1 / E_START - 1 / E_MAX)) + 1 / E_MAX)  # experts as they count: from E_START to E_MAX
    log = math.log(seen)
    return Chinchilla(A * seen**DELTA, ALPHA + GAMMA * log, B * seen**OMEGA, BETA + ZETA * log, C)


def joint_law(
    active: float, tokens: float, embedding: float = 0.0, experts: Iterable[int] = (1, 2, 4, 8, 16, 32)
) -> pd.DataFrame:
    """What the law says of a model: a row per number of experts, at equal active size.

    active: active parameters, embedding and unembedding included. tokens: of the whole training. embedding: how many of the
    active parameters are embedding and unembedding; the LR rule leaves them out. One expert is active for each token, as
    large as the dense model's feed-forward network.

    Columns: experts, loss (nats per token), gain (nats by which the loss lies below that of one expert), lr (the best peak LR of
    Adam under SP), fitted (whether all three sizes lie where the law was fitted). Raises ValueError or TypeError for what is no
    positive size.
    """
    active, tokens, embedding = positive("active", active), positive("tokens", tokens), not_negative("embedding", embedding)
    require(embedding < active, "embedding", embedding, f"must be less than active={active:g}")
    if not isinstance(experts, Iterable):
        raise TypeError(f"experts={experts!r}: must be several numbers of experts")
    dense, rows = chinchilla(1).loss(active, tokens), []
    for number in experts:
        loss = chinchilla(number).loss(active, tokens)
        lr = math.exp(LR_AT_1 + LR_PER_PARAMETERS * math.log(active - embedding) + LR_PER_EXPERTS * math.log(number))
        sizes = {"active": active, "tokens": tokens, "experts": number}
        fitted = all(low <= sizes[name] <= high for name, (low, high) in FITTED.items())
        rows.append({"experts": number, "loss": loss, "gain": dense - loss, "lr": lr, "fitted": fitted})
    return pd.DataFrame(rows)
