"""minimoe: a decoder-only transformer with a mixture of experts in every block, under a switchable parametrization.

This is the file to read. It is written for one run. Each weight declares its *role*; the table (`tables.py`) says how that
role is initialised, multiplied and trained; the forward pass uses the effective weight `self.w_multiplier * self.w`.

Letters in shape comments: B batch, T time, N = B*T tokens, D width, H heads, C head size, L depth, V vocabulary,
E experts (n_experts * granularity), K active experts per token (top_k * granularity), M expert hidden size.

Design: pre-norm; RMS norm without parameters; learned absolute positions; causal attention with a fixed head size, so that
its scale 1 / C does not move with the width; token-choice routing, dropless; no biases; an untied head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import saved
from .checks import require
from .config import Config
from .corpus import Alphabet, check_tokens
from .experts import activated, attention, slot_counts, sorted_mixture
from .roles import RoleParameter, initialise, param_groups, parameter


class Output(NamedTuple):
    """What the model returns, always."""

    logits: Tensor  # (B, T, V)
    balance_loss: Tensor  # (), mean over layers, 1 at perfect balance
    router_logits: Tensor  # (L, B, T, E)
    load: Tensor  # (L, E), fraction of the N*K assignments that each expert serves; sums to 1


def weight(config: Config, role: str, shape: Callable[[Config], tuple], base_std: float | None = None) -> RoleParameter:
    """The parameter of shape `shape(config)`, measured against what that shape is in the base model."""
    return parameter(role, shape(config), base_shape=shape(config.base), base_std=base_std, ratios=config.ratios)


def rms_norm(x: Tensor) -> Tensor:
    """(..., D) -> (..., D) with root mean square 1 in the last axis (arXiv 1910.07467), without a gain."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Attention(nn.Module):
    """Causal, H heads of C each: softmax(q k^T / C + mask) v. (1 / sqrt(C) would do as well, as long as C is fixed.)"""

    def __init__(self, config: Config):
        super().__init__()
        self.heads, self.head_size = config.width // config.head_size, config.head_size
        self.q = weight(config, "attention", lambda c: (c.width, c.width))
        self.k = weight(config, "attention", lambda c: (c.width, c.width))
        self.v = weight(config, "attention", lambda c: (c.width, c.width))
        self.o = weight(config, "attention_out", lambda c: (c.width, c.width))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        q = self.split(x @ (self.q_multiplier * self.q))  # (B, H, T, C)
        k = self.split(x @ (self.k_multiplier * self.k))
        v = self.split(x @ (self.v_multiplier * self.v))
        mixed = attention(q, k, v, scale=1 / self.head_size).transpose(1, 2).flatten(2)  # (B, T, D), the heads side by side
        return mixed @ (self.o_multiplier * self.o)

    def split(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, H, T, C)
        return x.unflatten(-1, (self.heads, self.head_size)).transpose(1, 2)


def mixture_by_mask(moe: MoE, x: Tensor, gates: Tensor, experts: Tensor) -> Tensor:
    """Each token's gated sum of its experts' outputs (N, D), the obvious way: every expert on every token, then masked."""
    weights = x.new_zeros(len(x), moe.config.experts).scatter(1, experts, gates)  # (N, E), 0 if inactive
    hidden = activated(moe.config.activation, torch.einsum("nd,edm->enm", x, moe.up_multiplier * moe.up))  # (E, N, M)
    outputs = torch.einsum("enm,emd->end", hidden, moe.down_multiplier * moe.down)
    return torch.einsum("ne,end->nd", weights, outputs)


class MoE(nn.Module):
    """Token choice: softmax over all experts, then the K largest; no token is dropped."""

    mixture = sorted_mixture  # equals mixture_by_mask, but each expert computes its own tokens only; a test compares them

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        if config.experts > 1:  # a dense model has nothing to choose
            self.router = weight(config, "router", lambda c: (c.width, c.experts))
        columns = 2 if config.activation == "swiglu" else 1  # of the up projection, per hidden value
        self.up = weight(config, "experts_up", lambda c: (c.experts, c.width, columns * c.expert_width))
        self.down = weight(config, "experts_down", lambda c: (c.experts, c.expert_width, c.width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(N, D) -> (N, D), balance loss (), router logits (N, E), load (E,)."""
        logits = self.router_logits(x)  # (N, E)
        probabilities = torch.softmax(logits, dim=-1)
        gates, experts = self.choice(probabilities)  # (N, K), (N, K)
        load = slot_counts(experts, self.config.experts).to(probabilities) / experts.numel()  # (E,)
        balance_loss = self.config.experts * (load * probabilities.mean(0)).sum()  # Switch, arXiv 2101.03961 eq. 4
        return self.mixture(x, gates, experts), balance_loss, logits, load

    def router_logits(self, x: Tensor) -> Tensor:  # (N, D) -> (N, E)
        return x.new_zeros(x.shape[0], 1) if self.config.experts == 1 else (x @ (self.router_multiplier * self.router)).to(x)

    def choice(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:  # (N, E) -> gates (N, K), expert numbers (N, K)
        experts = self.chosen(probabilities)
        return self.gates(probabilities, experts), experts

    def gates(self, probabilities: Tensor, experts: Tensor) -> Tensor:  # (N, E), expert numbers (N, K) -> (N, K)
        gates = probabilities.gather(1, experts)
        return gates / gates.sum(-1, keepdim=True) if self.config.renormalize else gates

    def chosen(self, probabilities: Tensor) -> Tensor:  # (N, E) -> expert numbers (N, K)
        N, K, E = probabilities.shape[0], self.config.active_experts, self.config.experts
        if self.config.forced_balance:  # slot j of token t goes to expert (t*K + j) mod E
            return (torch.arange(N * K, device=probabilities.device) % E).view(N, K)
        return probabilities.topk(K, dim=-1).indices


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.attention = Attention(config)
        self.moe = MoE(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, T, D) -> (B, T, D), balance loss (), router logits (B, T, E), load (E,)."""
        x = x + self.attention(rms_norm(x))
        y, balance_loss, logits, load = self.moe(rms_norm(x).flatten(0, 1))
        return x + y.view_as(x), balance_loss, logits.unflatten(0, x.shape[:2]), load


class MiniMoE(nn.Module):
    """The model, initialised under `config.parametrization` from `config.seed`."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.alphabet: Alphabet | None = None  # of the corpus that it is trained on
        self.tokens = weight(config, "embedding", lambda c: (c.vocab_size, c.width), base_std=1.0)
        self.positions = weight(config, "embedding", lambda c: (c.context, c.width), base_std=0.5)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.unembedding = weight(config, "unembedding", lambda c: (c.width, c.vocab_size))
        initialise(self, config.parametrization, config.seed)

    def forward(self, tokens: Tensor) -> Output:
        """(B, T) int64 tokens below vocab_size (see `check_tokens`) -> Output. Raises ValueError if T exceeds the context."""
        T = tokens.shape[1]
        if T > self.config.context:
            raise ValueError(f"a sequence of {T} tokens is longer than context={self.config.context}")
        x = F.embedding(tokens, self.tokens_multiplier * self.tokens)  # (B, T, D)
        x = x + self.positions_multiplier * self.positions[:T]
        per_layer = []
        for block in self.blocks:
            x, *routing = block(x)
            per_layer.append(routing)
        balance_losses, router_logits, loads = (torch.stack(values) for values in zip(*per_layer, strict=True))
        logits = (rms_norm(x) @ (self.unembedding_multiplier * self.unembedding)).to(x)  # (B, T, V)
        return Output(logits, balance_losses.mean(), router_logits, loads)

    def param_groups(self, lr: float, *settings, **more) -> list[dict]:
        """Groups for `torch.optim.AdamW` under the config's table; see `roles.param_groups` for the settings."""
        return param_groups(self, self.config.parametrization, lr, *settings, **more)

    @torch.no_grad()
    def generate(self, tokens: Tensor, n: int, temperature: float = 1.0, seed: int = 0) -> Tensor:
        """(B, T) prompt -> (B, T + n): n sampled tokens appended, each seeing the last `context` ones.

        temperature 0 takes the likeliest token. Raises ValueError for an empty prompt or tokens outside the vocabulary.
        """
        rule = "must be finite and not negative"
        require(tokens.ndim == 2 and tokens.shape[1] > 0, "prompt", tuple(tokens.shape), "must be (B, T) with T at least 1")
        require(math.isfinite(temperature) and temperature >= 0, "temperature", temperature, rule)
        require(n >= 0, "n", n, rule)
        check_tokens(tokens, self.config.vocab_size)
        generator = torch.Generator(tokens.device).manual_seed(seed)
        for _ in range(n):
            logits = self(tokens[:, -self.config.context :]).logits[:, -1]  # (B, V)
            if not logits.isfinite().all():
                raise ValueError("the model's logits are not finite: it diverged in training")
            odds = torch.softmax(logits / (temperature or 1.0), -1)  # (B, V)
            drawn = torch.multinomial(odds, 1, generator=generator) if temperature else odds.argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, drawn], dim=1)
        return tokens

    def save(self, path: str | Path) -> None:
        """Write weights, config, table and alphabet to one file, whole or not at all. Raises OSError if it cannot be written."""
        saved.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> MiniMoE:
        """The model that `save` wrote, on the CPU. Raises OSError, or ValueError for another file, or a damaged one."""
        return saved.load(cls, path)
