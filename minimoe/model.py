"""minimoe: a decoder-only transformer with a mixture of experts in every block, under a switchable parametrization.

This is the file to read. It is written for one run. Each weight declares its *role*; the table (`tables.py`) says how that
role is initialised, multiplied and trained; the forward pass uses the effective weight `self.w_multiplier * self.w`.

Letters in shape comments: B batch, T time, N = B*T tokens, D width, H heads, C head size, L depth, V vocabulary,
E experts (n_experts * granularity), K active experts per token (top_k * granularity), S shared experts (n_shared *
granularity), M expert hidden size.

Design: pre-norm; RMS norm without parameters; learned absolute positions; causal attention with a fixed head size, so that
its scale 1 / C does not move with the width; token-choice routing, dropless; no biases; an untied head. Options: gains after
the norms, shared experts, and a bias on the choice of experts that the load moves. A table's multiplier of a residual branch
is folded into that of the branch's last weight (see `Role.scales`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import saved
from .config import RENORMALIZED, SIGMOID, Config
from .corpus import Alphabet
from .experts import activated, attention, slot_counts, sorted_mixture
from .generation import generated
from .roles import RoleParameter, initialise, param_groups, parameter


class Output(NamedTuple):
    """What the model returns, always."""

    logits: Tensor  # (B, T, V)
    balance_loss: Tensor  # (), mean over layers, 1 at perfect balance
    router_logits: Tensor  # (L, B, T, E)
    load: Tensor  # (L, E), fraction of the N*K assignments that each expert serves; sums to 1


def weight(config: Config, role: str, shape: Callable[[Config], tuple], **more) -> RoleParameter:
    """The parameter of shape `shape(config)`, measured against what that shape is in the base model; see `roles.parameter`."""
    return parameter(role, shape(config), base_shape=shape(config.base), ratios=config.ratios, **more)


def rms_norm(x: Tensor) -> Tensor:
    """(..., D) -> (..., D) with root mean square 1 in the last axis (arXiv 1910.07467), without a gain."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Norm(nn.Module):
    """`rms_norm`, and a gain where the config has gains."""

    def __init__(self, config: Config, role: str = "gain"):
        super().__init__()
        self.gain = weight(config, role, lambda c: (c.width,), base_std=0.0, start=1.0) if config.gains else None

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        x = rms_norm(x)
        return x if self.gain is None else x * (self.gain_multiplier * self.gain)


class Attention(nn.Module):
    """Causal, H heads of C each: softmax(q k^T / C + mask) v. (1 / sqrt(C) would do as well, as long as C is fixed.)"""

    def __init__(self, config: Config):
        super().__init__()
        self.heads, self.head_size = config.width // config.head_size, config.head_size
        self.q = weight(config, "attention", lambda c: (c.width, c.width))
        self.k = weight(config, "attention", lambda c: (c.width, c.width))
        self.v = weight(config, "attention", lambda c: (c.width, c.width))
        self.o = weight(config, "attention_out", lambda c: (c.width, c.width), scales=("residual_attention",))

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
    """Token choice: a score for each expert, then the K largest, which are the gates; no token is dropped. Shared experts serve
    every token, without a gate."""

    mixture = sorted_mixture  # equals mixture_by_mask, but each expert computes its own tokens only; a test compares them

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        if config.experts > 1:  # a dense model has nothing to choose
            self.router = weight(config, "router", lambda c: (c.width, c.experts))
        columns = 2 if config.activation == "swiglu" else 1  # of the up projection, per hidden value
        routed = {"same_start": config.same_start}
        self.up = weight(config, "experts_up", lambda c: (c.experts, c.width, columns * c.expert_width), **routed)
        scales = ("routed", "residual_moe")  # of the sum over the active experts, and of the branch
        self.down = weight(config, "experts_down", lambda c: (c.experts, c.expert_width, c.width), scales=scales, **routed)
        if config.n_shared:
            number = config.shared_experts  # of the base, too: it may have none
            self.shared_up = weight(config, "shared_up", lambda c: (number, c.width, columns * c.expert_width))
            self.shared_down = weight(config, "shared_down", lambda c: (number, c.expert_width, c.width), scales=scales[1:])
        if config.bias_rate:
            self.register_buffer("bias", torch.zeros(config.experts, dtype=torch.float32))  # see `step.moved_biases`

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(N, D) -> (N, D), balance loss (), router logits (N, E), load (E,)."""
        logits = self.router_logits(x)  # (N, E)
        scores = self.scores(logits)  # (N, E)
        gates, experts = self.choice(scores)  # (N, K), (N, K)
        load = slot_counts(experts, self.config.experts).to(scores) / experts.numel()  # (E,)
        shares = scores / scores.sum(-1, keepdim=True) if self.config.gates in SIGMOID else scores  # a softmax's sum is 1
        balance_loss = self.config.experts * (load * shares.mean(0)).sum()  # Switch, arXiv 2101.03961 eq. 4
        y = self.mixture(x, gates, experts)
        return y + self.shared(x) if self.config.n_shared else y, balance_loss, logits, load

    def shared(self, x: Tensor) -> Tensor:  # (N, D) -> (N, D)
        hidden = activated(self.config.activation, x @ (self.shared_up_multiplier * self.shared_up))  # (S, N, M)
        return (hidden @ (self.shared_down_multiplier * self.shared_down)).to(x).sum(0)

    def router_logits(self, x: Tensor) -> Tensor:  # (N, D) -> (N, E)
        return x.new_zeros(x.shape[0], 1) if self.config.experts == 1 else (x @ (self.router_multiplier * self.router)).to(x)

    def scores(self, logits: Tensor) -> Tensor:  # (N, E) -> (N, E)
        apart = self.config.gates in SIGMOID and self.config.experts > 1
        return torch.sigmoid(logits) if apart else torch.softmax(logits, dim=-1)

    def choice(self, scores: Tensor) -> tuple[Tensor, Tensor]:  # (N, E) -> gates (N, K), expert numbers (N, K)
        experts = self.chosen(scores)
        return self.gates(scores, experts), experts

    def gates(self, scores: Tensor, experts: Tensor) -> Tensor:  # (N, E), expert numbers (N, K) -> (N, K)
        gates = scores.gather(1, experts)
        return gates / gates.sum(-1, keepdim=True) if self.config.gates in RENORMALIZED else gates

    def chosen(self, scores: Tensor) -> Tensor:  # (N, E) -> expert numbers (N, K)
        N, K, E = scores.shape[0], self.config.active_experts, self.config.experts
        if self.config.forced_balance:  # slot j of token t goes to expert (t*K + j) mod E
            return (torch.arange(N * K, device=scores.device) % E).view(N, K)
        return (scores + self.bias if self.config.bias_rate else scores).topk(K, dim=-1).indices


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.attention_norm, self.attention = Norm(config), Attention(config)
        self.moe_norm, self.moe = Norm(config), MoE(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, T, D) -> (B, T, D), balance loss (), router logits (B, T, E), load (E,)."""
        x = x + self.attention(self.attention_norm(x))
        y, balance_loss, logits, load = self.moe(self.moe_norm(x).flatten(0, 1))
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
        self.norm = Norm(config, "final_gain")
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
        logits = (self.norm(x) @ (self.unembedding_multiplier * self.unembedding)).to(x)  # (B, T, V)
        return Output(logits, balance_losses.mean(), router_logits, loads)

    def param_groups(self, lr: float, *settings, **more) -> list[dict]:
        """Groups for `torch.optim.AdamW` under the config's table; see `roles.param_groups` for the settings."""
        return param_groups(self, self.config.parametrization, lr, *settings, **more)

    @torch.no_grad()
    def generate(self, tokens: Tensor, n: int, temperature: float = 1.0, seed: int = 0) -> Tensor:
        """(B, T) prompt -> (B, T + n): n sampled tokens appended, each seeing the last `context` ones.

        temperature 0 takes the likeliest token. Raises ValueError for an empty prompt or tokens outside the vocabulary.
        """
        return generated(self, tokens, n, temperature, seed)

    def save(self, path: str | Path) -> None:
        """Write weights, config, table and alphabet to one file, whole or not at all. Raises OSError if it cannot be written."""
        saved.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> MiniMoE:
        """The model that `save` wrote, on the CPU. Raises OSError, or ValueError for another file, or a damaged one."""
        return saved.load(cls, path)
