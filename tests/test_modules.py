"""The check of modules that are not ours: what theory says of them must be seen with nothing but their parameters."""

import math

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM

from minimoe import Config, MiniMoE, check_module, coordinate_check, diagnosis, exponents, fan_in, suspects
from minimoe.modules import uses
from minimoe.tables import PARAMETRIZATIONS
from minimoe.training import TextData, windows
from minimoe.verdicts import BROKEN

BASE, LR, CONTEXT, WIDTHS, SEEDS = 64, 2.0**-13, 64, (64, 128, 256), (0, 1)


@pytest.fixture(scope="module")
def text(pydocs):
    """(a function: seed -> three batches, a probe, the size of the vocabulary)"""
    data = TextData(pydocs, torch.device("cpu"))
    (probe,) = data.validation(1, 8, CONTEXT)

    def batches(seed):
        return [windows(data.train, starts, CONTEXT)[0] for starts in data.order([seed], 3, 16, CONTEXT)]

    return batches, probe, pydocs.vocab_size


def cross_entropy(model, batch):
    logits = model(batch[:, :-1])
    return F.cross_entropy(getattr(logits, "logits", logits).flatten(0, 1), batch[:, 1:].flatten())


def scaled(model, width, rule, kind_of):
    """Parameter groups with muP folded into init and LR, or the standard ones ("sp"); "big head": muP but for the head's std."""
    groups = []
    for name, param in model.named_parameters():
        kind, ratio = kind_of(name), width / BASE
        std = {"input": 1.0, "hidden": width**-0.5, "output": width**-0.5 / (ratio**0.5 if rule == "mup" else 1)}.get(kind)
        if std:
            nn.init.normal_(param, 0, std)
        groups.append({"params": [param], "lr": LR / ratio if rule != "sp" and kind in ("hidden", "output") else LR})
    return groups


class MLP(nn.Module):
    """Of two hidden layers, over the symbol before; norms without gains."""

    def __init__(self, vocab, width):
        super().__init__()
        self.embedding, self.unembedding = nn.Embedding(vocab, width), nn.Linear(width, vocab, bias=False)
        self.first, self.second = (nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in (self.first, self.second):
            x = F.relu(layer(F.rms_norm(x, x.shape[-1:])))
        return self.unembedding(F.rms_norm(x, x.shape[-1:]))


class Encoder(nn.Module):
    """torch.nn.TransformerEncoder with an embedding, a head and a causal mask."""

    def __init__(self, vocab, width):
        super().__init__()
        self.embedding, self.unembedding = nn.Embedding(vocab, width), nn.Linear(width, vocab, bias=False)
        layer = nn.TransformerEncoderLayer(width, width // 16, 2 * width, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.unembedding(self.encoder(self.embedding(tokens), mask=mask, is_causal=True))


def plain_kind(name):
    if name.startswith(("embedding", "unembedding")):
        return "output" if name.startswith("un") else "input"
    return "gain" if "norm" in name or name.endswith("bias") else "hidden"


def published_kind(name):
    if "norm" in name or "embed_tokens" in name:
        return "gain" if "norm" in name else "input"
    return "output" if "lm_head" in name or name.endswith("mlp.gate.weight") else "hidden"


PLAIN = {"unembedding*": "output", "embedding*": "input", "*": "hidden"}
ENCODER = {"*norm*": "input", "*bias": "input"} | PLAIN
PUBLISHED = {"lm_head*": "output", "*mlp.gate.weight": "router", "*embed*": "input", "*norm*": "input", "*": "hidden"}


def checked(text, make, rule, kind_of, kinds, widths=WIDTHS, seeds=SEEDS):
    batches, probe, vocab = text

    def build(width):
        model = make(vocab, width)
        return model, scaled(model, width, rule, kind_of)

    return exponents(check_module(build, widths, cross_entropy, batches, probe, seeds=seeds, kinds=kinds, name=rule))


def allocations(table):
    """tensor -> the slope of its allocation, the mean over layers."""
    return table[table.quantity == "allocation"].groupby("tensor").measured.mean()


@pytest.mark.parametrize("rule", ["sp", "big head", "mup"])
@pytest.mark.parametrize("make", [MLP, Encoder])
def test_torchs_own_layers(make, rule, text):
    table = checked(text, make, rule, plain_kind, ENCODER if make is Encoder else PLAIN)
    judged = table[table.predicted.notna() & ~table.tensor.str.contains("norm|bias")]
    assert judged.agrees.all(), judged[~judged.agrees]
    body = {"sp": 1.5, "big head": 0.5, "mup": 0.0}[rule]
    assert allocations(table)["embedding.weight"] == pytest.approx(min(body, 0.5), abs=0.2)
    assert allocations(table)["unembedding.weight"] == pytest.approx(1.0 if rule == "sp" else 0.0, abs=0.2)
    assert abs(table.closure.dropna() - 1).max() < 0.05
    blamed = suspects(table)
    assert blamed.empty == (rule == "mup")
    if rule == "big head":
        assert blamed.iloc[0][["role", "cell"]].to_list() == ["unembedding.weight", "init_var"]
        assert all("norm" in role for role in blamed.role[1:])  # the last norm's gain is slow to reach its law


def mixtral(vocab, width):
    sizes = {"vocab_size": vocab, "hidden_size": width, "intermediate_size": width, "num_hidden_layers": 2}
    heads = {"num_attention_heads": width // 16, "num_key_value_heads": width // 16, "max_position_embeddings": CONTEXT}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=8, num_experts_per_tok=2))
    model.set_experts_implementation("grouped_mm")
    return model


def olmoe(vocab, width):
    sizes = {"vocab_size": vocab, "hidden_size": width, "intermediate_size": width, "num_hidden_layers": 2}
    heads = {"num_attention_heads": width // 16, "num_key_value_heads": width // 16, "max_position_embeddings": CONTEXT}
    model = OlmoeForCausalLM(OlmoeConfig(**sizes, **heads, num_experts=8, num_experts_per_tok=2, tie_word_embeddings=False))
    model.set_experts_implementation("grouped_mm")
    return model


@pytest.mark.parametrize("make", [mixtral, olmoe])
def test_published_models_under_standard_init_and_lr(make, text):
    table = checked(text, make, "sp", published_kind, PUBLISHED)
    slopes = allocations(table)
    for name in ("q_proj.weight", "v_proj.weight", "o_proj.weight"):
        assert slopes[f"model.layers.*.self_attn.{name}"] == pytest.approx(1.4, abs=0.25)
    for name in ("gate_up_proj", "down_proj"):
        assert slopes[f"model.layers.*.mlp.experts.{name}"] == pytest.approx(1.4, abs=0.25)
    assert slopes["lm_head.weight"] == pytest.approx(0.95, abs=0.25)
    assert 0.5 < slopes["model.layers.*.mlp.gate.weight"] < 1.6
    updates = table[(table.quantity == "update") & table.predicted.notna()]
    assert updates.agrees.all()
    assert len(updates) == 1 + 2 * 7 + 1  # the experts and the router too, which are no nn.Linear
    condemned = set(suspects(table).role)
    assert {"model.layers.*.mlp.experts.down_proj", "lm_head.weight", "model.layers.*.self_attn.v_proj.weight"} <= condemned


@pytest.mark.parametrize("make", [mixtral, olmoe])
def test_published_models_under_mup(make, text):
    table = checked(text, make, "mup", published_kind, PUBLISHED, widths=(64, 128, 256, 512), seeds=(0, 1, 2))
    slopes = allocations(table)
    # OLMoE's gates are raw: they flatten as the router's init fades, and the experts' allocations with them
    experts = (-0.45, 0.15) if make is olmoe else (-0.2, 0.2)
    for name, slope in slopes.items():
        if "norm" in name:
            continue
        low, high = experts if "experts" in name else (-0.9, 0.0) if name.endswith("mlp.gate.weight") else (-0.2, 0.2)
        assert low <= slope <= high, (name, slope)
    broken = set(table[table.verdict.isin(BROKEN)].tensor)
    if make is olmoe:
        assert broken <= {name for name in slopes.index if "experts" in name or "post_attention" in name}  # behind the gates
    else:
        assert broken == set()
        assert diagnosis(table)["mup"].startswith("every init, update and allocation keeps")
    assert abs(table.closure.dropna() - 1).max() < 0.1


def test_without_kinds_allocations_are_measured_alone(text):
    table = checked(text, MLP, "sp", plain_kind, None, widths=(64, 128), seeds=(0,))
    assert table.predicted.isna().all()
    assert set(table[table.tensor != "loss"].kind) == {"unknown"}
    assert set(table[table.quantity == "allocation"].tensor) == {
        "embedding.weight", "unembedding.weight", "first.weight", "second.weight", "loss",
    }  # fmt: skip
    broken = table[(table.verdict == "explodes") & (table.quantity == "allocation")]
    assert {"first.weight", "second.weight", "unembedding.weight"} <= set(broken.tensor)


def test_parameters_with_roles_need_no_kinds(text, pydocs):
    """Our own model, as if it were somebody's: the same allocations as in its own check, and the same exponents of them."""
    batches, probe, vocab = text
    table = PARAMETRIZATIONS["mup"].replace("unembedding", "big head", init_var=fan_in)

    def build(width):
        model = MiniMoE(Config(table, width=width, vocab_size=vocab, seed=torch.initial_seed()))
        return model, model.param_groups(LR, 1e-15)

    def loss(model, batch):
        return F.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())

    frame = check_module(build, (64, 128), loss, batches, probe, seeds=(0,))
    own = coordinate_check(table, (64, 128), 3, (0,), LR, pydocs)
    found = frame.set_index(["width", "step", "layer", "tensor", "quantity"]).value
    expected = own.set_index(["width", "step", "layer", "tensor", "quantity"]).value
    for width in (64, 128):
        for ours, theirs in (("v", "attention.v"), ("up", "moe.up"), ("router", "moe.router")):
            a, b = found[width, 3, 1, f"blocks.*.{theirs}", "allocation"], expected[width, 3, 1, ours, "allocation"]
            assert a == pytest.approx(b, rel=0.02)
        for quantity, step in (("init", 0), ("update", 3)):
            a, b = found[width, step, 0, "blocks.*.attention.q", quantity], expected[width, step, 0, "q", quantity]
            assert a == pytest.approx(b, rel=1e-3)
    predicted = exponents(frame).set_index(["layer", "tensor", "quantity"]).predicted
    assert predicted[0, "blocks.*.moe.down", "allocation"] == pytest.approx(0.5, abs=0.05)  # a std is measured
    assert predicted[0, "blocks.*.moe.router", "allocation"] == pytest.approx(0, abs=0.05)
    assert predicted[-1, "unembedding", "init"] == pytest.approx(0, abs=0.05)


def test_layers_of_growing_depth_are_compared_as_first_last_and_sum(text):
    batches, probe, vocab = text

    class Stack(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.embedding, self.unembedding = nn.Embedding(vocab, 32), nn.Linear(32, vocab)
            self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(depth))

        def forward(self, tokens):
            x = self.embedding(tokens)
            for layer in self.layers:
                x = x + F.relu(layer(F.rms_norm(x, (32,)))) / len(self.layers)
            return self.unembedding(F.rms_norm(x, (32,)))

    def build(depth):
        model = Stack(depth)
        return model, [{"params": model.parameters(), "lr": LR}]

    table = exponents(check_module(build, (2, 4, 8), cross_entropy, batches, probe, seeds=(0, 1), axis="depth"))
    rows = table[table.quantity == "allocation"].set_index(["layer", "tensor"])
    assert set(rows.index.get_level_values("layer")) == {-1, "first", "last", "sum"}
    assert rows.measured["sum", "layers.*.weight"] == pytest.approx(0, abs=0.2)
    assert rows.measured["first", "layers.*.weight"] == pytest.approx(-1, abs=0.2)
    assert rows.verdict["sum", "layers.*.weight"] == "holds"


def test_a_training_lr_has_its_verdict_withheld(text):
    batches, probe, vocab = text

    def build(width):
        model = MLP(vocab, width)
        return model, [{"params": model.parameters(), "lr": 1.0}]

    table = exponents(check_module(build, (32, 64), cross_entropy, batches, probe, seeds=(0,)))
    rows = table[(table.quantity == "allocation") & (table.tensor != "loss")]
    assert set(rows.verdict) == {"withheld"}
    assert "lower the LR" in diagnosis(table)["module"]


def test_an_eps_in_the_way_has_its_verdict_withheld(text):
    batches, probe, vocab = text

    def build(width):
        model = MLP(vocab, width)
        return model, torch.optim.AdamW(model.parameters(), lr=2.0**-13, eps=1e3)

    table = exponents(check_module(build, (32, 64), cross_entropy, batches, probe, seeds=(0,)))
    assert set(table[(table.quantity == "allocation") & (table.tensor != "loss")].verdict) == {"withheld"}
    assert "lower Adam's eps" in diagnosis(table)["module"]


def test_a_layer_with_a_forward_pass_of_its_own_is_read_off_its_operators(text):
    _, probe, vocab = text

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model, inputs = MLP(vocab, 32), []
    model.first = Doubled(32, 32)
    model.first.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    found = uses(model, lambda: cross_entropy(model, probe))
    assert set(found) == {"embedding.weight", "first.weight", "second.weight", "unembedding.weight"}
    (use,), weight = found["first.weight"], torch.randn(32, 32)
    torch.testing.assert_close(
        use.output(weight), (inputs[0] @ weight.T).flatten(0, 1)
    )  # of the weight; what follows is not its own


def test_a_tied_weight_has_one_allocation_and_two_outputs(text):
    _, probe, vocab = text
    batches = iter(text[0](0))  # a generator serves all sizes

    def build(width):
        model = MLP(vocab, width)
        model.unembedding.weight = model.embedding.weight
        return model, [{"params": model.parameters(), "lr": LR}]

    frame = check_module(build, (32, 64), cross_entropy, batches, probe, seeds=(0,))
    tied, hidden = "embedding.weight", {"first.weight", "second.weight"}
    assert set(frame[frame.quantity == "allocation"].tensor) == {tied, *hidden, "loss"}
    assert set(frame[frame.quantity == "update"].tensor) == {tied, f"{tied} (readout)", *hidden}
    assert set(frame[frame.width == 64].step) == {0, 1, 2, 3}


def test_the_frame_can_be_kept(tmp_path, text):
    batches, probe, vocab = text

    def build(width):
        model = MLP(vocab, width)
        return model, [{"params": model.parameters(), "lr": LR}]

    frame = check_module(build, (32, 64), cross_entropy, batches, probe, seeds=(0, 1), kinds=PLAIN)
    frame.to_csv(tmp_path / "check.csv", index=False)
    pd.testing.assert_frame_equal(exponents(pd.read_csv(tmp_path / "check.csv")), exponents(frame))
    assert not frame.duplicated(["width", "seed", "step", "layer", "tensor", "quantity"]).any()
    assert math.isfinite(frame.value.sum())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sizes": (64,)}, ValueError, "a slope needs at least two"),
        ({"seeds": ()}, ValueError, "seeds=\\[\\]: is empty"),
        ({"axis": "temperature"}, ValueError, "axis='temperature': must be one of width"),
        ({"batches": []}, ValueError, "needs at least one step"),
        ({"kinds": {"first.*": "big"}}, ValueError, "'big': must be one of input, hidden, output, fixed, router"),
        ({"kinds": {"third.*": "hidden"}}, ValueError, "'third.\\*': no parameter has such a name"),
        ({"build": lambda width: nn.Linear(width, width)}, TypeError, "build must return a module and its optimizer"),
        ({"build": lambda width: other(width)}, ValueError, "build makes models of other parameters: 2.weight"),
    ],
)
def test_bad_input(changes, error, message, text):
    batches, probe, vocab = text

    def build(width):
        model = MLP(vocab, width)
        return model, [{"params": model.parameters(), "lr": LR}]

    given = {"build": build, "sizes": (32, 64), "loss": cross_entropy, "batches": batches, "probe": probe, "seeds": (0,)}
    with pytest.raises(error, match=message):
        check_module(**given | changes)


def other(width):
    layers = [nn.Embedding(128, width), nn.Linear(width, 128, bias=False)]
    if width == 64:
        layers.insert(1, nn.Linear(width, width, bias=False))
    model = nn.Sequential(*layers)
    return model, [{"params": model.parameters(), "lr": LR}]
