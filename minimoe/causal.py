"""How to run a causal language model of others: its logits, its loss, its batches; and how to make it at any width."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import require, whole
from .corpus import load_corpus

Batch = Tensor | Mapping[str, Tensor]  # token ids (B, T), or keyword arguments that contain `input_ids`
Build = Callable[[int], nn.Module]


def logits(module: nn.Module, batch: Batch) -> Tensor:
    """The module's output on a batch: its `.logits`, or what it returns, or the first of what it returns."""
    settings = {"use_cache": False} if "use_cache" in inspect.signature(module.forward).parameters else {}  # of transformers
    out = module(**batch, **settings) if isinstance(batch, Mapping) else module(batch, **settings)
    out = getattr(out, "logits", out)
    return out if isinstance(out, Tensor) else out[0]


def tokens_of(batch: Batch) -> Tensor:
    """(B, T) the batch's token ids."""
    return batch["input_ids"] if isinstance(batch, Mapping) else batch


def next_token_loss(scores: Tensor, tokens: Tensor) -> Tensor:
    """(B, T, V) logits, (B, T) tokens -> (), nats per token."""
    return F.cross_entropy(scores[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def text_for(module: nn.Module) -> Tensor:
    """(64, 64) characters of the default corpus as token ids, for a module with a `config.vocab_size`, always the same.

    Real text: on random tokens nothing that a step learns lowers the loss of other tokens. Raises ValueError for other modules.
    """
    vocabulary = getattr(getattr(module, "config", None), "vocab_size", None)
    require(whole(vocabulary, 1), "batch", None, "is needed: the model has no config.vocab_size, and its tokens are not known")
    train = load_corpus("pydocs").train
    first = np.linspace(0, len(train) - 64, 64).astype(int)
    return torch.from_numpy(train[first[:, None] + np.arange(64)].astype(np.int64)) % vocabulary


def rows_in_parts(batch: Batch, number: int) -> list[Batch]:
    """The batch's rows divided into so many batches. Raises ValueError where there are fewer rows."""
    rows = len(tokens_of(batch))
    require(rows >= number, "batch", f"of {rows} rows", f"{number - 1} steps and a probe need at least {number}")
    parts = [slice(at * rows // number, (at + 1) * rows // number) for at in range(number)]
    if isinstance(batch, Mapping):
        return [{name: value[part] for name, value in batch.items()} for part in parts]
    return [batch[part] for part in parts]


def growing(config: Any, width_field: str, *fields: str) -> Build:
    """`build` for `adopt`, from a config of Hugging Face: width -> model, the other fields in proportion.

        build = growing(MixtralConfig(hidden_size=64, ...), "hidden_size", "intermediate_size", "num_attention_heads")

    What is not named stays as it is. Raises ValueError for a field that the config does not have, or that would be no integer.
    """
    for name in (width_field, *fields):
        value = getattr(config, name, None)
        require(whole(value, 1), name, value, f"is no size of {type(config).__name__}")
    base = getattr(config, width_field)

    def build(width: int) -> nn.Module:
        from transformers import AutoModelForCausalLM  # the extra `hf`

        sizes = {width_field: width}
        for name in fields:
            size, rest = divmod(getattr(config, name) * width, base)
            require(rest == 0 and size > 0, name, getattr(config, name), f"is no integer at {width_field} {width}")
            sizes[name] = size
        return AutoModelForCausalLM.from_config(type(config)(**config.to_diff_dict() | sizes))

    return build


def imported(path: str) -> Build:
    """The function that `module:function` names, also of a module in the current folder. Raises ValueError if there is none."""
    name, _, function = path.partition(":")
    require(name and function, "model", path, "must be MODULE:FUNCTION, e.g. mymodel:build")
    sys.path.insert(0, "")
    try:
        build = getattr(import_module(name), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model={path!r}: {error}") from error
    finally:
        sys.path.remove("")
    require(callable(build), "model", path, "names no function")
    return build


def config_changes(base: nn.Module, wide: nn.Module) -> tuple[str, ...]:
    """The fields of Hugging Face configs that differ between two models; empty for models without."""
    configs = [getattr(module, "config", None) for module in (base, wide)]
    if not all(hasattr(config, "to_dict") for config in configs):
        return ()
    before, after = (config.to_dict() for config in configs)
    return tuple(f"{name} {before.get(name)} -> {value}" for name, value in after.items() if before.get(name) != value)


def made_by(build: Build, width: int, seed: int) -> nn.Module:
    """The module at this width, made after `torch.manual_seed(seed)`. Raises TypeError where it is none."""
    torch.manual_seed(seed)
    module = build(width)
    if not isinstance(module, nn.Module):
        raise TypeError(f"build must return a torch.nn.Module, got {type(module).__name__}")
    return module


def scalings(module: nn.Module) -> dict[str, float]:
    """Path of an attention module -> what it multiplies its scores by, where it says so: transformers' `scaling`."""
    named = ((path, getattr(part, "scaling", None)) for path, part in module.named_modules())
    return {path: value for path, value in named if isinstance(value, float)}
