"""Others' code as an oracle: Microsoft's mup for the rules, transformers for the routing and the experts."""

from importlib.metadata import version

import pytest
import torch
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeSparseMoeBlock

from minimoe import Config, MiniMoE, adopt, explain

BASE, EXPERTS = 64, 8


class Theirs(nn.Module):
    """The tensors of our model as mup knows them: one nn.Linear per expert, a MuReadout router."""

    def __init__(self, width):
        from mup import MuReadout

        super().__init__()
        self.tokens = nn.Embedding(96, width)
        self.q = nn.Linear(width, width, bias=False)
        self.router = MuReadout(width, EXPERTS, bias=False)
        self.up = nn.ModuleList(nn.Linear(width, 2 * width, bias=False) for _ in range(EXPERTS))
        self.down = nn.ModuleList(nn.Linear(2 * width, width, bias=False) for _ in range(EXPERTS))
        self.unembedding = MuReadout(width, 96, bias=False)

    def forward(self, tokens):
        """What a reader of operators needs to see; a readout's own multiplier, which only mup can give, is left out."""
        x = self.q(self.tokens(tokens)).flatten(0, 1)
        gates, chosen = nn.functional.linear(x, self.router.weight).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for expert, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            out = out.index_add(0, rows, gates[rows, place, None] * down(up(x[rows]).relu()))
        return nn.functional.linear(out, self.unembedding.weight).unflatten(0, tokens.shape)


PAIRS = {  # theirs -> ours
    "tokens.weight": "tokens",
    "q.weight": "blocks.0.attention.q",
    "router.weight": "blocks.0.moe.router",
    "up.3.weight": "blocks.0.moe.up",
    "down.3.weight": "blocks.0.moe.down",
    "unembedding.weight": "unembedding",
}


def in_mup(width):
    """name -> (init std over the base's, forward multiplier, Adam's LR factor), by mup's own functions."""
    from mup import MuAdamW, MuReadout, init, set_base_shapes

    model = set_base_shapes(Theirs(width), Theirs(BASE), delta=Theirs(2 * BASE))
    lrs = {id(p): group["lr"] for group in MuAdamW(model.parameters(), lr=1.0).param_groups for p in group["params"]}
    found = {}
    for name in PAIRS:
        param, layer = model.get_parameter(name), model.get_submodule(name.removesuffix(".weight"))
        init.normal_(param, std=1.0)
        x = torch.randn(5, width)
        multiplier = (layer(x) / nn.functional.linear(x, param)).mean().item() if isinstance(layer, MuReadout) else 1.0
        found[name] = param.std().item(), multiplier, lrs[id(param)]
    return found


def test_mup_gives_the_same_init_lr_and_multipliers_at_four_times_the_width():
    wide, base = (explain(Config("mup", width=w, base_width=BASE)).set_index("name") for w in (4 * BASE, BASE))
    theirs = in_mup(4 * BASE)
    for name, ours in PAIRS.items():
        std, multiplier, lr = theirs[name]
        assert wide.init_std[ours] / base.init_std[ours] == pytest.approx(std, rel=0.06)  # theirs is a sample's
        assert wide.multiplier[ours] == pytest.approx(multiplier, rel=1e-5)
        assert wide.lr[ours] == pytest.approx(lr)
    assert theirs["up.3.weight"][1:] == (1.0, 0.25)
    assert theirs["router.weight"][2] == 1


def test_adopt_reads_mups_model_as_mup_does():
    """mup knows its readouts by their class, adopt by what they do; its multipliers are folded here."""
    tokens = torch.randint(96, (4, 64), generator=torch.Generator().manual_seed(0))
    factors = adopt(Theirs, 4 * BASE, BASE, tokens).factors("mup")
    for name, (std, multiplier, lr) in in_mup(4 * BASE).items():
        assert factors[name].std == pytest.approx(std * multiplier, rel=0.06)
        assert factors[name].lr == pytest.approx(lr * multiplier, rel=1e-5)


def test_torch_is_the_locked_version_still():
    """mup's own requirements would have brought another one."""
    assert version("mup") == "1.0.0"
    assert torch.__version__.split("+")[0] == "2.13.0"


def mixtral(width, hidden, experts, top_k):
    config = MixtralConfig(
        hidden_size=width, intermediate_size=hidden, num_local_experts=experts, num_experts_per_tok=top_k, hidden_act="silu"
    )
    return MixtralSparseMoeBlock(config)


def olmoe(width, hidden, experts, top_k):
    config = OlmoeConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_experts=experts,
        num_experts_per_tok=top_k,
        hidden_act="silu",
        norm_topk_prob=False,
    )
    return OlmoeSparseMoeBlock(config)


@pytest.mark.parametrize(("peer", "gates"), [(mixtral, "renormalized"), (olmoe, "softmax")])
@pytest.mark.parametrize("table", ["sp", "mup"])  # the table's multipliers are part of the weights copied over
@torch.no_grad()
def test_our_moe_is_transformers_with_the_same_weights(peer, gates, table):
    config = Config(table, width=64, n_experts=6, top_k=2, activation="swiglu", gates=gates)
    moe = MiniMoE(config).blocks[0].moe
    theirs = peer(config.width, config.expert_width, config.experts, config.active_experts).eval()
    theirs.gate.weight.copy_((moe.router_multiplier * moe.router).T)
    theirs.experts.gate_up_proj.copy_((moe.up_multiplier * moe.up).mT)
    theirs.experts.down_proj.copy_((moe.down_multiplier * moe.down).mT)
    x = torch.randn(50, config.width, generator=torch.Generator().manual_seed(0))
    ours, _, logits, _ = moe(x)
    _, experts = moe.choice(torch.softmax(logits, -1))
    gates, _ = moe.choice(torch.softmax(logits, -1))
    their_logits, their_gates, their_experts = theirs.gate(x)
    assert torch.equal(experts, their_experts)
    torch.testing.assert_close(gates, their_gates, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits, their_logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours, theirs(x[None])[0], rtol=0, atol=1e-5)
    assert ours.std() > 0.01  # and not nothing at all
