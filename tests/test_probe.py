"""Sites: declared once, observed without changing the model, and measured as they are called."""

import numpy as np
import pytest
import torch

from minimoe import Config, MiniMoE, coordinate_check
from minimoe.coordinates import at_init, since
from minimoe.model import mixture_by_mask
from minimoe.probe import OUTSIDE, observed, sites

TINY = {"widths": (32, 64), "steps": 2, "seeds": (0,), "n_jobs": 1, "context": 16, "n_experts": 4}


def test_sites_stand_for_every_parameter_once_in_the_order_of_the_forward_pass():
    config = Config(depth=2)
    found = sites(config)
    assert sorted(name for site in found for name in site.parameters) == sorted(dict(MiniMoE(config).named_parameters()))
    layer = ["q", "k", "v", "scores", "o", "router", "up", "down", "moe", "residual"]
    assert [site.name for site in found] == ["embedding", *layer, *layer, "logits"]
    assert [site.layer for site in found] == [OUTSIDE, *[0] * 10, *[1] * 10, OUTSIDE]
    by_name = {site.name: site for site in found}
    assert (by_name["o"].source, by_name["down"].source, by_name["down"].degree) == ("v", "up", 1)
    assert {site.name: site.degree for site in sites(Config(activation="swiglu"))}["down"] == 2
    assert "router" not in {site.name for site in sites(Config(n_experts=1, top_k=1))}


def test_every_site_is_observed_with_a_weight_and_an_input_or_an_output(corpus):
    model = MiniMoE(Config(width=32, vocab_size=corpus.vocab_size))
    seen = observed(model, torch.zeros(2, 8, dtype=torch.int64))
    for site in seen.sites.values():
        if site.parameters:
            rows, _ = site.input(seen.experts[site.layer])
            assert rows.shape[-1] == site.weight.shape[-2]
            assert site.output is None
        else:
            assert site.output.numel() > 0


def test_quantities_are_what_they_are_called(corpus):
    """Against the model's own outputs: what the split says must add up to what the forward pass does."""
    torch.manual_seed(0)
    start = MiniMoE(Config(width=32, depth=1, vocab_size=corpus.vocab_size, seed=0))
    now = MiniMoE(Config(width=32, depth=1, vocab_size=corpus.vocab_size, seed=0))
    with torch.no_grad():
        for param in now.parameters():
            param.add_(0.02 * torch.randn_like(param))
    tokens = torch.from_numpy(np.ascontiguousarray(corpus.val[: 8 * 16])).long().view(8, 16)
    seen = [observed(model, tokens) for model in (start, now)]
    first = {(r["tensor"], r["quantity"]): r["value"] for r in at_init(seen[0])}
    later = {(r["tensor"], r["quantity"]): r["value"] for r in since(*seen)}
    alignment = {r["tensor"]: r["alignment"] for r in since(*seen) if r["quantity"] == "update" and r["tensor"] != "moe"}

    def rms(x):
        return x.square().mean().sqrt().item()

    before, after = start(tokens), now(tokens)
    assert first["logits", "init"] == pytest.approx(rms(before.logits), rel=1e-5)
    assert first["router", "init"] == pytest.approx(rms(before.router_logits), rel=1e-5)
    assert later["logits", "change"] == pytest.approx(rms(after.logits - before.logits), rel=1e-4)
    assert later["router", "change"] == pytest.approx(rms(after.router_logits - before.router_logits), rel=1e-4)
    assert "embedding" in alignment
    assert later["embedding", "propagated"] == 0
    assert later["embedding", "change"] == later["embedding", "update"]
    assert all(0 < value <= 1 for value in alignment.values())
    # an expert's outputs, token by token
    moe0, moe = start.blocks[0].moe, now.blocks[0].moe
    x0, x = (s.sites[0, "router"].input(None)[0] for s in seen)
    ups, downs = [], []
    for token, experts in enumerate(seen[1].experts[0]):
        for e in experts:
            h0, h = torch.relu(x0[token] @ moe0.up[e]), torch.relu(x[token] @ moe.up[e])
            ups.append(x[token] @ (moe.up[e] - moe0.up[e]))
            downs.append((h - h0) @ moe0.down[e])
    assert later["up", "update"] == pytest.approx(rms(torch.stack(ups)), rel=1e-5)
    assert later["down", "propagated"] == pytest.approx(rms(torch.stack(downs)), rel=1e-4)
    # and their sum: the outputs of today's weights, less those of the initial ones on the initial inputs, under today's gates
    gates, experts = seen[1].gates[0], seen[1].experts[0]
    mixed = mixture_by_mask(moe, x, gates, experts) - mixture_by_mask(moe0, x0, gates, experts)
    propagated = (torch.stack(downs).unflatten(0, gates.shape) * gates[..., None]).sum(1)
    assert later["moe", "propagated"] == pytest.approx(rms(propagated), rel=1e-4)
    assert later["moe", "update"] == pytest.approx(rms(mixed - propagated), rel=1e-4)


def test_observing_changes_nothing_and_leaves_no_hooks(corpus):
    model = MiniMoE(Config(width=32, vocab_size=corpus.vocab_size))
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    before = model(tokens).logits
    observed(model, tokens)
    assert torch.equal(model(tokens).logits, before)
    assert not any(module._forward_hooks for module in model.modules())


def test_frozen_routing_keeps_the_initial_choice(corpus, monkeypatch):
    seen = []
    real = observed

    def recording(model, tokens):
        seen.append((id(model), real(model, tokens)))
        return seen[-1][1]

    monkeypatch.setattr("minimoe.coordinates.observed", recording)
    coordinate_check("mup", corpus=corpus, routing="frozen", lr=2.0**-3, **TINY)
    first, last = seen[0][1], seen[4][1]  # of width 64: at init; (batch, probe) per step
    assert all(torch.equal(a, b) for a, b in zip(first.experts, last.experts, strict=True))
    seen.clear()
    coordinate_check("mup", corpus=corpus, routing="free", lr=2.0**-3, **TINY)
    assert not all(torch.equal(a, b) for a, b in zip(seen[0][1].experts, seen[2][1].experts, strict=True))
