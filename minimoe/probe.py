"""How to read a model: its sites, what each is made of, and what each does on some tokens.

A *site* is a place in the forward pass where a weight meets its input, or an output that is no weight's own. The model
declares its sites here, once; theory, measurement, verdicts and figures see sites and know no name of a model's parts.

Letters in shape comments: B batch, T time, N = B*T probed tokens, D width, E experts, K active experts per token, S = N*K.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .config import Config
from .experts import activated
from .identity import declared
from .model import MiniMoE

PRODUCTS = (Tensor.mul, Tensor.__mul__, torch.mul, Tensor.matmul, Tensor.__matmul__, torch.matmul)
OUTSIDE = -1  # the layer of what belongs to no block


class Site(NamedTuple):
    """One site: what it is, and, once observed, what it does."""

    layer: int
    name: str
    parameters: tuple[str, ...] = ()  # the names of its weights; none where it is no weight's own
    role: str = ""  # that its weights declare
    source: str = ""  # the site of its layer whose output is its input; none where a norm stands between
    degree: int = 1  # the power with which its input follows the source's output
    made_by: str = ""  # what is no weight's own: a product, a sum, or a mixture (a gated sum over the routed experts)
    made_of: tuple[str, ...] = ()  # of these sites; of a mixture, the experts' inner and outer weights
    gate: str = ""  # the site whose output moves a mixture's gates; none where their sum is 1
    mixes: str = ""  # of what sets the shares of a sum: the site whose outputs are summed
    mixed: int = 1  # and how many coordinates of them each share multiplies
    weight: Tensor | None = None  # effective: (fan_in, fan_out), of experts (E, fan_in, fan_out)
    input: Callable | None = None  # the layer's chosen experts (N, K) -> rows (n, fan_in), the expert of each row or None
    output: Tensor | None = None  # of what is no weight's own


def sites(config: Config) -> list[Site]:
    """The sites of the config's model, in the order of its forward pass."""
    roles = {name: param.role.name for name, param in declared(config).items()}
    product_of_two = 2 if config.activation == "swiglu" else 1

    def weighed(layer: int, name: str, *parameters: str, **more) -> Site:
        return Site(layer, name, parameters, roles[parameters[0]], **more)

    found = [weighed(OUTSIDE, "embedding", "tokens", "positions")]
    for layer in range(config.depth):
        attention, moe = (f"blocks.{layer}.{part}." for part in ("attention", "moe"))
        if config.gains:
            found.append(weighed(layer, "attention gain", f"blocks.{layer}.attention_norm.gain"))
        found += [weighed(layer, name, attention + name) for name in "qkv"]
        found.append(Site(layer, "scores", made_by="product", made_of=("q", "k"), mixes="v", mixed=config.head_size))
        found.append(weighed(layer, "o", attention + "o", source="v"))
        if config.gains:
            found.append(weighed(layer, "moe gain", f"blocks.{layer}.moe_norm.gain"))
        if config.experts > 1:
            found.append(weighed(layer, "router", moe + "router", mixes="down", mixed=config.width))
        found.append(weighed(layer, "up", moe + "up"))
        found.append(weighed(layer, "down", moe + "down", source="up", degree=product_of_two))
        gate = "" if config.experts == 1 or config.gates_sum_to_1 else "router"
        found.append(Site(layer, "moe", made_by="mixture", made_of=("up", "down"), gate=gate))
        if config.n_shared:
            found.append(weighed(layer, "shared up", moe + "shared_up"))
            found.append(weighed(layer, "shared down", moe + "shared_down", source="shared up", degree=product_of_two))
        shared = ("shared down",) if config.n_shared else ()
        found.append(Site(layer, "residual", made_by="sum", made_of=("embedding", "o", "moe", *shared)))
    last = [weighed(OUTSIDE, "final gain", "norm.gain")] if config.gains else []
    return [*found, *last, weighed(OUTSIDE, "logits", "unembedding")]


class Observed(NamedTuple):
    """What a model does on some tokens."""

    sites: dict[tuple[int, str], Site]  # by layer and name; first those with a weight
    experts: list[Tensor]  # (N, K) per layer
    gates: list[Tensor]  # (N, K) per layer
    model: MiniMoE


@torch.no_grad()
def observed(model: MiniMoE, tokens: Tensor) -> Observed:
    """The model's sites on tokens (B, T), with their weights, inputs and outputs."""
    passed, inputs = _passed(model, tokens)
    gates, experts = zip(*(b.moe.choice(b.moe.scores(passed[b.moe][1][2])) for b in model.blocks), strict=True)
    seen, every_shared = {}, torch.arange(model.config.shared_experts, device=tokens.device)
    for site in sites(model.config):
        if site.parameters == ("tokens", "positions"):
            site = _looked_up(site, model, tokens)
        elif site.parameters:
            weight, x = effective(model, site.parameters[0]), inputs.get(site.parameters[0])
            weight = weight.diag() if weight.ndim == 1 else weight  # a gain multiplies each coordinate of its input
            site = site._replace(weight=weight, input=lambda chosen, x=x: (x.flatten(0, -2), None))
        if site.name == "up":
            site = site._replace(input=lambda chosen, x=passed[model.blocks[site.layer].moe][0]: _routed(x, chosen))
        if site.name == "shared up":
            site = site._replace(input=lambda chosen, x=x: _routed(x, every_shared.expand(len(x), -1)))
        if site.name in ("down", "shared down"):
            site = site._replace(input=lambda chosen, up=seen[site.layer, site.source]: _hidden(model.config, up, chosen))
        seen[site.layer, site.name] = site
    for layer, block in enumerate(model.blocks):
        x, (y, *_) = passed[block.moe]
        outputs = {"moe": y - block.moe.shared(x) if model.config.n_shared else y, "residual": passed[block][1][0]}
        outputs["scores"] = _causal_scores(block.attention, *(seen[layer, name] for name in "qk"), tokens.shape)
        seen |= {(layer, name): seen[layer, name]._replace(output=output) for name, output in outputs.items()}
    weighed_first = dict(sorted(seen.items(), key=lambda item: item[1].weight is None))
    return Observed(weighed_first, list(experts), list(gates), model)


def effective(model: nn.Module, name: str) -> Tensor:
    """The parameter of this name times its multiplier."""
    return model.get_buffer(f"{name}_multiplier") * model.get_parameter(name)


class _Inputs(TorchFunctionMode):
    """Records, by the parameter's name, what each effective weight is multiplied with: x of `x @ (multiplier * weight)`, or of
    a gain's `x * (multiplier * gain)`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.names = {id(param): name for name, param in model.named_parameters()}
        self.weights: dict[int, tuple[str, Tensor]] = {}  # by id; the tensor is kept, so that its id is not used again
        self.inputs: dict[str, Tensor] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in PRODUCTS and id(args[1]) in self.names:
            self.weights[id(out)] = self.names[id(args[1])], out
        if function in PRODUCTS and id(args[1]) in self.weights:
            self.inputs[self.weights[id(args[1])][0]] = args[0]
        return out


def _passed(model: MiniMoE, tokens: Tensor) -> tuple[dict[nn.Module, tuple], dict[str, Tensor]]:
    """(module -> (input, output) of each block and MoE, parameter's name -> what it is multiplied with) in a forward pass."""
    passed = {}
    modules = [module for block in model.blocks for module in (block, block.moe)]
    hooks = [m.register_forward_hook(lambda m, inputs, output: passed.update({m: (inputs[0], output)})) for m in modules]
    try:
        with _Inputs(model) as recorded:
            model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return passed, recorded.inputs


def _looked_up(site: Site, model: MiniMoE, tokens: Tensor) -> Site:
    """An embedding is a matrix too: its input is one-hot."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    table = torch.cat([effective(model, name) for name in site.parameters])  # (V + context, D)
    hot = [F.one_hot(tokens, model.config.vocab_size), F.one_hot(positions, model.config.context)]
    rows = torch.cat(hot, -1).flatten(0, 1).to(table)
    return site._replace(weight=table, input=lambda chosen: (rows, None))


def _routed(x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(S, D) each token's row for each expert that serves it, (S,) that expert."""
    return x.repeat_interleave(chosen.shape[1], dim=0), chosen.flatten()


def _hidden(config: Config, up: Site, chosen: Tensor) -> tuple[Tensor, Tensor]:
    rows, serving = up.input(chosen)
    return activated(config.activation, output(rows, up.weight, serving)), serving


def _causal_scores(attention: nn.Module, q: Site, k: Site, shape: torch.Size) -> Tensor:  # (B, H, T * (T + 1) / 2)
    heads = [attention.split(site.input(None)[0].unflatten(0, shape) @ site.weight) for site in (q, k)]
    seen = torch.ones(shape[1], shape[1], dtype=torch.bool, device=heads[0].device).tril()
    return (heads[0] @ heads[1].mT / attention.head_size)[..., seen]


def output(rows: Tensor, weight: Tensor, experts: Tensor | None) -> Tensor:
    """(n, fan_in) -> (n, fan_out); with experts (n,), row i times the matrix of its own expert."""
    if experts is None:
        return rows @ weight
    out = rows.new_empty(len(rows), weight.shape[-1])
    for number, own in enumerate(weight):
        mine = experts == number
        out[mine] = rows[mine] @ own
    return out


def route_by(model: MiniMoE, experts: list[Tensor]) -> None:
    """Let these experts (N, K) of each layer serve, whatever the router says; the gates stay the router's."""
    for block, chosen in zip(model.blocks, experts, strict=True):
        block.moe.chosen = lambda probabilities, chosen=chosen: chosen
