"""minimoe: a decoder-only transformer with a mixture of experts in every block, under a switchable parametrization.

This is the file to read. It is written for one run and knows no parametrization: each weight declares its *role*, the
table (`parametrization.py`) says how that role is initialised, multiplied and trained, and the forward pass uses the
effective weight `self.w_multiplier * self.w`.

Letters in shape comments: B batch, T time, N = B*T tokens, D width, H heads, C head size, L depth, V vocabulary,
E experts (n_experts * granularity), K active experts per token (top_k * granularity), M expert hidden size, S = N*K.

Design: pre-norm; RMS norm without parameters; learned absolute positions; causal multi-head attention with a fixed head
size, so that its scale 1 / C does not move with the width; token-choice routing, dropless; no biases; an untied head.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .grouped import activated, attention, expert_mixture
from .parametrization import (
    Parametrization,
    RoleParameter,
    initialise,
    named_roles,
    param_groups,
    parameter,
    parametrization,
)

ACTIVATIONS = ("relu", "gelu", "swiglu")
ROLES = ("embedding", "unembedding", "attention", "experts_up", "experts_down", "router")  # what a table must cover
BASED = ("width", "depth", "n_experts", "top_k", "granularity")  # sizes that have a base value


@dataclass(frozen=True)
class Config:
    """A model's shape, rules and seed; nothing about training.

    Checked once, here: a ValueError or TypeError names the field, its value and what would be valid.
    """

    parametrization: str | Parametrization = "mup"  # a name in PARAMETRIZATIONS, or a table of your own
    width: int = 64  # D, size of the residual stream
    depth: int = 2  # L, number of blocks
    head_size: int = 16  # C, fixed while the width grows, so that heads = width / head_size
    n_experts: int = 8  # experts per block at granularity 1; 1 is a dense model
    top_k: int = 2  # experts that serve one token at granularity 1
    granularity: int = 1  # G: n_experts * G experts, top_k * G active, hidden size / G (arXiv 2402.07871)
    expert_ratio: int = 2  # expert hidden size over width, at granularity 1
    activation: str = "relu"  # relu, gelu, or swiglu (a third matrix, stored beside the up projection)
    renormalize: bool = False  # gates of the active experts sum to 1 (Mixtral), or stay as the softmax left them
    forced_balance: bool = False  # debugging and teaching: tokens go round the experts in turn, gates stay the router's
    balance_weight: float = 0.01  # weight of the balance loss, which is 1 at perfect balance for every E, K, G
    balance_times_k: bool = False  # K times that weight: the loss counts each token K times, and so is K at perfect balance
    z_weight: float = 0.0  # weight of the router z-loss, mean logsumexp(router logits)^2 (arXiv 2202.08906)
    vocab_size: int = 96  # V: newline and printable ASCII, the pydocs corpus
    context: int = 64  # longest sequence
    seed: int = 0  # of the initial weights
    base_width: int = 32  # the base shape, where all parametrizations are the same run
    base_depth: int | None = None  # None: the config's own value
    base_n_experts: int | None = None  # likewise
    base_top_k: int | None = None  # likewise
    base_granularity: int | None = None  # likewise

    def __post_init__(self):
        object.__setattr__(self, "parametrization", parametrization(self.parametrization))
        for f in fields(self):
            object.__setattr__(self, f.name, _typed(f.name, f.type, getattr(self, f.name)))
        _check(self)

    @property
    def experts(self) -> int:  # E
        return self.n_experts * self.granularity

    @property
    def active_experts(self) -> int:  # K
        return self.top_k * self.granularity

    @property
    def expert_width(self) -> int:  # M
        return self.expert_ratio * self.width // self.granularity

    @property
    def balance_coefficient(self) -> float:
        """What the balance loss, 1 at perfect balance, is multiplied by."""
        return self.balance_weight * (self.active_experts if self.balance_times_k else 1)

    @property
    def shape(self) -> dict:
        """Every field that shapes the computation: all but the table, the base sizes it is measured by, and the seed.

        The balance loss's coefficient stands for both its fields: who multiplies it, training cannot tell.
        """
        left_out = ("parametrization", "seed", "balance_times_k", *(f"base_{name}" for name in BASED))
        shaping = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        return {**shaping, "balance_weight": self.balance_coefficient}

    @property
    def base(self) -> Config:
        """The config at the base shape, where every ratio is 1."""
        return replace(self, **{name: self.base_size(name) for name in BASED})

    def base_size(self, name: str) -> int:
        """The base shape's width, depth, n_experts, top_k or granularity."""
        size = getattr(self, f"base_{name}")
        return getattr(self, name) if size is None else size

    @property
    def ratios(self) -> dict[str, float]:
        """True over base, for the named ratios that a cell may use (`fan_in` is each tensor's own)."""
        base = self.base
        return {name: getattr(self, name) / getattr(base, name) for name in (*BASED, "expert_width")}


def _typed(name: str, kind: str, value):
    """The value as the field's own type, numpy's numbers included. Raises TypeError."""
    if kind == "bool" and not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: must be True or False")
    if kind.startswith("int") and value is not None:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name}={value!r}: must be an integer")
        return int(value)
    if kind == "float":
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}={value!r}: must be a number")
        return float(value)
    return value


def _check(c: Config) -> None:
    def require(valid: bool, name: str, rule: str) -> None:
        if not valid:
            raise ValueError(f"{name}={getattr(c, name)!r}: {rule}")

    for f in fields(c):
        value = getattr(c, f.name)
        if f.name == "seed":
            require(0 <= value < 2**63, f.name, "must be an integer from 0 to 2^63 - 1")
        elif f.type.startswith("int"):
            require(value is None or value >= 1, f.name, "must be a positive integer")
        elif f.type == "float":
            require(math.isfinite(value) and value >= 0, f.name, "must be finite and not negative")
    require(c.activation in ACTIVATIONS, "activation", f"must be one of {', '.join(ACTIVATIONS)}")
    for base, size in (("", lambda name: getattr(c, name)), ("base_", c.base_size)):  # the base is a model too
        hidden = c.expert_ratio * size("width")
        require(size("width") % c.head_size == 0, f"{base}width", f"must be a multiple of head_size={c.head_size}")
        require(size("top_k") <= size("n_experts"), f"{base}top_k", f"must be at most {base}n_experts={size('n_experts')}")
        rule = f"must divide the experts' hidden size, expert_ratio * {base}width = {hidden}"
        require(hidden % size("granularity") == 0, f"{base}granularity", rule)
        learns = not c.renormalize or size("top_k") * size("granularity") > 1 or size("n_experts") == 1
        rule = f"with {base}top_k * {base}granularity = 1 the gate is always 1: no task gradient would reach the router"
        require(learns, "renormalize", rule)
    missing = [role for role in ROLES if role not in c.parametrization.roles]
    if missing:
        raise ValueError(f"parametrization {c.parametrization.name!r} has no rule for {', '.join(missing)}")
    unknown = {name for role in ROLES for name in c.parametrization[role].ratios} - {"fan_in", "expert_width", *BASED}
    if unknown:
        raise ValueError(f"parametrization {c.parametrization.name!r} uses the unknown ratio {', '.join(sorted(unknown))}")


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
        self.o = weight(config, "attention", lambda c: (c.width, c.width))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        return self.mixed(x) @ (self.o_multiplier * self.o)

    def mixed(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D), the heads side by side
        q = self.split(x @ (self.q_multiplier * self.q))  # (B, H, T, C)
        k = self.split(x @ (self.k_multiplier * self.k))
        v = self.split(x @ (self.v_multiplier * self.v))
        return attention(q, k, v, scale=1 / self.head_size).transpose(1, 2).flatten(2)

    def split(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, H, T, C)
        return x.unflatten(-1, (self.heads, self.head_size)).transpose(1, 2)


class MoE(nn.Module):
    """Token choice: softmax over all experts, then the K largest; no token is dropped."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        gated = 2 if config.activation == "swiglu" else 1
        if config.experts > 1:  # a dense model has nothing to choose
            self.router = weight(config, "router", lambda c: (c.width, c.experts))
        self.up = weight(config, "experts_up", lambda c: (c.experts, c.width, gated * c.expert_width))
        self.down = weight(config, "experts_down", lambda c: (c.experts, c.expert_width, c.width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(N, D) -> (N, D), balance loss (), router logits (N, E), load (E,)."""
        logits = self.router_logits(x)  # (N, E)
        probabilities = torch.softmax(logits, dim=-1)
        gates, experts = self.choice(probabilities)  # (N, K), (N, K)
        counts = torch.zeros_like(logits[0]).scatter_add(0, experts.flatten(), torch.ones_like(gates).flatten())  # (E,)
        load = counts.detach() / experts.numel()
        balance_loss = self.config.experts * (load * probabilities.mean(0)).sum()  # Switch, arXiv 2101.03961 eq. 4
        return self.mixture(x, gates, experts, counts.long()), balance_loss, logits, load

    def router_logits(self, x: Tensor) -> Tensor:  # (N, D) -> (N, E)
        return x.new_zeros(x.shape[0], 1) if self.config.experts == 1 else x @ (self.router_multiplier * self.router)

    def choice(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:  # (N, E) -> gates (N, K), expert numbers (N, K)
        experts = self.chosen(probabilities)
        gates = probabilities.gather(1, experts)
        return (gates / gates.sum(-1, keepdim=True) if self.config.renormalize else gates), experts

    def chosen(self, probabilities: Tensor) -> Tensor:  # (N, E) -> expert numbers (N, K)
        N, K, E = probabilities.shape[0], self.config.active_experts, self.config.experts
        if self.config.forced_balance:  # slot j of token t goes to expert (t*K + j) mod E
            return (torch.arange(N * K, device=probabilities.device) % E).view(N, K)
        return probabilities.topk(K, dim=-1).indices

    def mixture(self, x: Tensor, gates: Tensor, experts: Tensor, counts: Tensor) -> Tensor:
        """Each token's gated sum of its experts' outputs (N, D); the S slots are sorted, expert by expert."""
        order = experts.flatten().argsort(stable=True)  # (S,)
        gate = (self.down_multiplier * gates).flatten().index_select(0, order)  # (S,); a multiplier is cheapest here
        token = order // self.config.active_experts  # (S,)
        return expert_mixture(self.up_multiplier * x, token, gate, counts, self.up, self.down, self.config.activation)


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
        logits = rms_norm(x) @ (self.unembedding_multiplier * self.unembedding)  # (B, T, V)
        return Output(logits, balance_losses.mean(), router_logits, loads)

    def param_groups(self, lr: float, eps: float = 1e-8, weight_decay: float = 0.0) -> list[dict]:
        """Groups for `torch.optim.AdamW`, each with role, lr, eps and weight_decay under the config's table."""
        return param_groups(self, self.config.parametrization, lr, eps, weight_decay)

    @torch.no_grad()
    def generate(self, tokens: Tensor, n: int, temperature: float = 1.0, seed: int = 0) -> Tensor:
        """(B, T) prompt -> (B, T + n): n sampled tokens appended, each seeing the last `context` ones.

        temperature 0 takes the likeliest token. Raises ValueError for an empty prompt or tokens outside the vocabulary.
        """
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"the prompt must have shape (B, T) with T at least 1, got {tuple(tokens.shape)}")
        if not (math.isfinite(temperature) and temperature >= 0 and n >= 0):
            raise ValueError(f"temperature and n must be finite and not negative, got {temperature} and {n}")
        check_tokens(tokens, self.config.vocab_size)
        generator = torch.Generator(tokens.device).manual_seed(seed)
        for _ in range(n):
            logits = self(tokens[:, -self.config.context :]).logits[:, -1]  # (B, V)
            if not logits.isfinite().all():
                raise ValueError("the model's logits are not finite: it diverged in training")
            if temperature == 0:
                drawn = logits.argmax(-1, keepdim=True)
            else:
                drawn = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)
            tokens = torch.cat([tokens, drawn], dim=1)
        return tokens

    def save(self, path: str | Path) -> None:
        """Write weights, config and table to one file, without pickled code. Raises RuntimeError if it cannot be written."""
        torch.save({"config": config_to_dict(self.config), "state": self.state_dict()}, path)

    @classmethod
    def load(cls, path: str | Path) -> MiniMoE:
        """The model that `save` wrote, on the CPU. Raises FileNotFoundError, or ValueError if the file is something else."""
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            model = cls(config_from_dict(saved["config"])).to(saved["state"]["tokens"].dtype)
            model.load_state_dict(saved["state"])
        except FileNotFoundError:
            raise
        except Exception as error:  # whatever torch says of a file that is not one
            raise ValueError(f"{path} is not a model saved by minimoe ({type(error).__name__}: {error})") from error
        return model


def declared(config: Config) -> dict[str, RoleParameter]:
    """name -> parameter of the config's model, with shape and role but no values: it costs no memory."""
    with torch.device("meta"):
        return dict(named_roles(MiniMoE(config)))


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless `tokens` are int64 numbers in [0, vocab_size). For where data enters: it reads the values."""
    if tokens.dtype != torch.int64:
        raise ValueError(f"tokens must be int64, got {tokens.dtype}")
    if tokens.numel() and not (0 <= int(tokens.min()) and int(tokens.max()) < vocab_size):
        low, high = int(tokens.min()), int(tokens.max())
        raise ValueError(f"tokens must lie in [0, {vocab_size}), got values from {low} to {high}")


def config_to_dict(config: Config) -> dict:
    """The config as plain JSON, its table by value."""
    plain = {f.name: getattr(config, f.name) for f in fields(config)}
    return {**plain, "parametrization": config.parametrization.to_dict()}


def config_from_dict(data: dict) -> Config:
    """The config that `config_to_dict` wrote."""
    return _checked_config(json.dumps(data))


@lru_cache(maxsize=4096)  # a sweep's rows share their configs, and checking one takes longer than reading its row
def _checked_config(text: str) -> Config:
    data = json.loads(text)
    return Config(**{**data, "parametrization": Parametrization.from_dict(data["parametrization"])})


def mixture_by_mask(moe: MoE, x: Tensor, gates: Tensor, experts: Tensor) -> Tensor:
    """The slow oracle of `MoE.mixture`: every expert on every token, then masked. (N, D) -> (N, D)."""
    weights = x.new_zeros(len(x), moe.config.experts).scatter(1, experts, gates)  # (N, E), 0 if inactive
    hidden = activated(moe.config.activation, torch.einsum("nd,edm->enm", x, moe.up_multiplier * moe.up))  # (E, N, M)
    outputs = torch.einsum("enm,emd->end", hidden, moe.down_multiplier * moe.down)
    return torch.einsum("ne,end->nd", weights, outputs)
