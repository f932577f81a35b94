"""What is timed against each other: one training step of minimoe and one of transformers' Mixtral, of equal size.

Mixtral has the same width, depth, heads, experts, top-k and active FLOPs (three matrices of 2/3 the size), its balance loss
on and its experts as `grouped_mm`. Both have fused AdamW. In bfloat16 both run under autocast, with weights in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from minimoe import Config, MiniMoE, TrainOptions
from minimoe.step import SingleRun, autocast

HERE = torch.device("cpu")


def ours(
    config: Config, sequences: int = 16, device: torch.device = HERE, dtype: str = "float32", backend: str | None = None
) -> Callable[[], object]:
    """A function that takes one training step. backend: torch.compile's; None: not compiled."""
    run = SingleRun([MiniMoE(config).to(device)], [1e-3], TrainOptions(dtype=dtype))
    if backend is not None:
        run.model = torch.compile(run.model, fullgraph=True, backend=backend)
    batch = torch.randint(config.vocab_size, (1, sequences, config.context + 1), device=device)
    return lambda: run.step(batch)


def mixtral(
    config: Config, sequences: int = 16, device: torch.device = HERE, dtype: str = "float32", backend: str | None = None
) -> Callable[[], object]:
    """The same for Mixtral, which may be compiled in several graphs."""
    multiple = 16 // getattr(torch, dtype).itemsize  # grouped_mm wants rows of 16 bytes
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=round(config.expert_width * 2 / 3 / multiple) * multiple,
            num_hidden_layers=config.depth,
            num_attention_heads=config.width // config.head_size,
            num_key_value_heads=config.width // config.head_size,
            head_dim=config.head_size,
            num_local_experts=config.experts,
            num_experts_per_tok=config.active_experts,
            max_position_embeddings=config.context,
            output_router_logits=True,
            router_aux_loss_coef=0.01,
            use_cache=False,
            sliding_window=None,
            attn_implementation="sdpa",
            experts_implementation="grouped_mm",
        )
    ).to(device)
    run = model if backend is None else torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    tokens = torch.randint(config.vocab_size, (sequences, config.context), device=device)

    def step():
        with autocast(dtype, device):
            loss = run(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step
