"""Tiny random MoE models of transformers' own architectures, at a width: what `adopt` is tested on. Nothing is downloaded."""

from __future__ import annotations

import inspect
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()

VOCABULARY = 128
FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "llama4_text")
REFUSED = ("deepseek_v4", "doge", "gemma4_text", "jamba")  # what the forward pass leaves open: see docs/architectures.md
OTHERS = [
    "afmoe",
    "axk1",
    "axk2",
    "beam",
    "cohere2_moe",
    "deepseek_v2",
    "deepseek_v32",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "granitemoe_swa",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "hy_v3",
    "jetmoe",
    "kolibri1",
    "laguna",
    "lfm2_moe",
    "mellum",
    "mimo_v2_flash",
    "minimax",
    "minimax_m2",
    "phimoe",
    "qwen3_next",
    "solar_open",
]

OWN = {  # what an architecture needs besides the sizes, at a width
    "lfm2_moe": lambda width: {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": lambda width: {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": width // 16,
        "linear_num_value_heads": width // 16,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "beam": lambda width: {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v4": lambda width: {"mlp_layer_types": ["hash_moe", "moe"]},
    "doge": lambda width: {"is_moe": True, "num_experts": 16},
    "gemma4_text": lambda width: {
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCABULARY,
        "layer_types": ["sliding_attention", "full_attention"],
        "global_head_dim": 16,
    },
}


def sizes(width: int, experts: int = 8, head_dim: int = 16) -> dict:
    """The sizes of a tiny model, under every name that some config has for them."""
    heads = width // head_dim
    names = [
        (width, "hidden_size d_model moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size"),
        (2 * width, "intermediate_size ffn_hidden_size"),
        (2, "num_hidden_layers n_layers num_experts_per_tok moe_topk moe_k moe_top_k top_k_experts"),
        (heads, "num_attention_heads n_heads"),
        (max(1, heads // 2), "num_key_value_heads"),
        (head_dim, "head_dim v_head_dim qk_nope_head_dim"),
        (head_dim // 2, "qk_rope_head_dim"),
        (experts, "num_experts num_local_experts n_routed_experts moe_num_experts"),
        (1, "n_shared_experts num_shared_experts n_group topk_group first_k_dense_replace num_dense_layers decoder_sparse_step"),
        (64, "max_position_embeddings"),
    ]
    named = {name: value for value, known_as in names for name in known_as.split()}
    ranks = {"q_lora_rank": width // 2, "kv_lora_rank": width // 4, "qk_head_dim": head_dim + head_dim // 2}
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": 127, "bos_token_id": 126, "eos_token_id": 125, "moe_layer_start_index": 1}
    return named | ranks | tokens


def config(name: str, width: int, **changes):
    """The architecture's config at a width; changes: of its fields, or of `sizes`."""
    made = type(AutoConfig.for_model(name))
    known = {*vars(made()), *getattr(made, "attribute_map", {}), *inspect.signature(made.__init__).parameters}
    own = {key: changes.pop(key) for key in ("experts", "head_dim") if key in changes}
    fields = {key: value for key, value in sizes(width, **own).items() if key in known}
    if "qk_rope_head_dim" in known:  # MLA: the sizes of its heads are named otherwise
        fields.pop("head_dim", None)
        fields.pop("qk_head_dim", None)
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    return made(**fields | OWN.get(name, lambda width: {})(width) | changes)


def build(name: str, width: int, **changes) -> torch.nn.Module:
    """A model with random weights, from torch's current seed."""
    return AutoModelForCausalLM.from_config(config(name, width, **changes), attn_implementation="eager")


def tokens(rows: int = 4, length: int = 48, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
