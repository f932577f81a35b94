"""Models of others under our tables: identities at the base, folding against hooks, errors, round trips, other oracles."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from architectures import FAMILIES, VOCABULARY, build, config, tokens
from minimoe import AS_IT_IS, PARAMETRIZATIONS, Refused, adopt, fan_in, growing
from minimoe.causal import next_token_loss


def plan_of(name, width=128, base_width=64, **changes):
    return adopt(lambda width: build(name, width, **changes), width, base_width, tokens())


def losses(model, groups, steps=20, eps=None):
    """The losses of some steps of AdamW, each on a batch of its own."""
    optimizer, found = torch.optim.AdamW(groups, betas=(0.9, 0.95)), []
    for step in range(steps):
        batch = tokens(2, 32, seed=step)
        loss = next_token_loss(model(input_ids=batch, use_cache=False).logits, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


# ---------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("table", ["sp", "mup"])
def test_at_the_base_width_a_model_is_untouched_bit_for_bit(name, table):
    plan = plan_of(name).at(64)
    torch.manual_seed(3)
    untouched = build(name, 64)
    model = plan.initialise(table, seed=3)
    for (first, ours), (second, theirs) in zip(model.named_parameters(), untouched.named_parameters(), strict=True):
        assert first == second
        assert torch.equal(ours, theirs)
    groups = plan.param_groups(table, lr=1e-3, eps=1e-8, weight_decay=0.1)
    plain = [{"params": list(untouched.parameters()), "lr": 1e-3, "eps": 1e-8, "weight_decay": 0.1}]
    assert losses(model, groups) == losses(untouched, plain)


@pytest.mark.parametrize("ratio", [2, 4])
def test_folded_multipliers_are_the_training_with_hooks_bit_for_bit(ratio):
    """Router and readout at std 1, LR 1 and a multiplier of 1 / ratio, put in by hooks, against the plan's folded numbers."""
    width, settings = 64 * ratio, {"lr": 2.0**-8, "eps": 2.0**-13, "weight_decay": 2.0**-3}
    plan = plan_of("mixtral", width)
    folded = plan.initialise("mup", seed=0)
    hooked = copy.deepcopy(folded)
    outputs = [own.name for own in plan.parameters if own.role in ("router", "unembedding")]
    with torch.no_grad():
        for name in outputs:
            hooked.get_parameter(name).mul_(ratio)
            module = hooked.get_submodule(name.rpartition(".")[0])
            module.register_forward_pre_hook(lambda module, inputs: (inputs[0] / ratio, *inputs[1:]))
    groups = []
    for own in plan.parameters:
        hidden = own.kind == "hidden"
        numbers = settings | {"lr": settings["lr"] / ratio if hidden else settings["lr"]}
        groups.append({"params": [hooked.get_parameter(own.name)], **numbers})
    assert losses(folded, plan.param_groups("mup", **settings)) == losses(hooked, groups)


@pytest.mark.parametrize("name", ["ernie4_5_moe", "cohere2_moe"])
def test_a_tied_readout_folded_into_the_last_gain_is_the_hook_on_the_readout(name):
    plan = plan_of(name)
    assert plan.readout_norm == ("model.norm.weight",)
    settings = {"lr": 2.0**-8, "eps": 2.0**-13, "weight_decay": 2.0**-3}
    folded = plan.initialise("mup", seed=0)
    hooked = copy.deepcopy(folded)
    with torch.no_grad():
        hooked.model.norm.weight.mul_(2)
    hooked.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: (inputs[0] / 2, *inputs[1:]))
    groups = [
        dict(group, params=[hooked.get_parameter(own) for own in group["names"]])
        for group in plan.param_groups("mup", **settings)
    ]
    for group in groups:
        if group["names"] == ["model.norm.weight"]:
            group |= settings
    assert losses(folded, plan.param_groups("mup", **settings)) == losses(hooked, groups)


def test_a_gain_that_is_no_factor_leaves_the_readout_to_a_hook():
    class Plus(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.embedding, self.body = nn.Embedding(VOCABULARY, width), nn.Linear(width, width)
            self.gain, self.lm_head = nn.Parameter(torch.zeros(width)), nn.Linear(width, VOCABULARY, bias=False)
            self.lm_head.weight = self.embedding.weight

        def get_output_embeddings(self):
            return self.lm_head

        def forward(self, batch):
            x = self.body(self.embedding(batch))
            return self.lm_head((1 + self.gain) * F.rms_norm(x, x.shape[-1:]))

    plan = adopt(Plus, 128, 64, tokens())
    assert plan.readout_norm == ()
    assert "a hook, which `adjust` puts in again" in "\n".join(plan.notes())
    model = plan.initialise("mup", seed=0)
    before = model(tokens())
    again = Plus(128)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(tokens()), 2 * before)
    torch.testing.assert_close(plan.adjust(again)(tokens()), before)
    with pytest.raises(Refused, match=r"embedding.weight is tied, and its readout is no module and has no gain before it"):
        adopt(type("Functional", (Plus,), {"get_output_embeddings": None}), 128, 64, tokens()).initialise("mup")


def test_the_std_is_the_base_models_times_the_tables_factor():
    plan = plan_of("gpt_oss", 256)
    torch.manual_seed(1)
    base, model = build("gpt_oss", 64), plan.initialise("mup", seed=1)
    for own in plan.parameters:
        before, after = base.get_parameter(own.name), model.get_parameter(own.name)
        if own.role in ("gain", "bias"):
            assert not after.std() or own.role == "bias"
        else:
            factor = {"hidden": 0.5, "output": 0.25, "input": 1.0}[own.kind]
            assert after.std(correction=0).item() == pytest.approx(factor * before.std(correction=0).item(), rel=1e-4)


def test_an_edited_table_moves_one_row():
    plan, edited = plan_of("qwen2_moe"), PARAMETRIZATIONS["mup"].replace("router", lr=1 / fan_in, init_var=4)
    before, after = plan.factors("mup"), plan.factors(edited)
    changed = {own.tensor for own in plan.parameters if before[own.name] != after[own.name]}
    assert changed == {"model.layers.*.mlp.gate.weight"}
    name = "model.layers.0.mlp.gate.weight"
    assert (after[name].std, after[name].lr) == (2 * before[name].std, before[name].lr / 2)
    assert all(set(factors) == {1} for factors in plan.factors(AS_IT_IS).values())


def test_attention_scales_like_one_over_the_head_size_where_that_grows():
    """head size 16 -> 32: transformers has 1 / sqrt(32), muP 1 / 4 * 16 / 32."""
    plan = adopt(lambda width: build("mixtral", width, head_dim=width // 4), 128, 64, tokens())
    assert "the head size grows" in "\n".join(plan.notes())
    model = plan.initialise("mup", seed=0)
    assert [part.scaling for part in model.modules() if hasattr(part, "scaling")] == pytest.approx([0.125, 0.125])
    assert {part.scaling for part in plan.at(64).initialise("mup").modules() if hasattr(part, "scaling")} == {0.25}


# ------------------------------------------------------------------------------------------------------------ other oracles


@pytest.mark.parametrize("width", [128, 256])
def test_the_package_mup_agrees_on_a_model_of_plain_layers(width):
    """A nanoGPT-like model: mup's base shapes and its optimizer against the plan's groups, as LR factors over the base's."""
    mup = pytest.importorskip("mup")

    class Model(nn.Module):
        def __init__(self, width, readout=nn.Linear):
            super().__init__()
            self.wte, self.wpe = nn.Embedding(VOCABULARY, width), nn.Embedding(64, width)
            self.attention, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            self.heads, self.lm_head = width // 16, readout(width, VOCABULARY, bias=False)

        def forward(self, batch):
            x = self.wte(batch) + self.wpe(torch.arange(batch.shape[1]))
            q, k, v = (part.unflatten(-1, (self.heads, 16)).transpose(1, 2) for part in self.attention(self.norm(x)).chunk(3, -1))
            x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            return self.lm_head(x + self.down(F.gelu(self.up(x))))

    plan = adopt(Model, width, 64, tokens())
    theirs = Model(width, mup.MuReadout)
    mup.set_base_shapes(theirs, Model(64, mup.MuReadout), delta=Model(128, mup.MuReadout))
    lrs = {id(param): group["lr"] for group in mup.MuAdam(theirs.parameters(), lr=1.0).param_groups for param in group["params"]}
    for own in plan.parameters:
        factors, expected = plan.factors("mup")[own.name], lrs[id(theirs.get_parameter(own.name))]
        multiplier = 64 / width if own.name == "lm_head.weight" else 1.0  # MuReadout divides its input
        assert factors.lr == pytest.approx(expected * multiplier), own.name
    roles = {own.name: own.role for own in plan.parameters}
    assert roles["attention.weight"] == "attention"
    assert roles["proj.weight"] == "attention_out"
    assert roles["norm.weight"], roles["norm.bias"] == ("gain", "bias")


def test_the_package_mup_agrees_on_mixtral_with_its_experts_unstacked():
    """Each expert as two matrices of its own, which mup can see; its `infinite dimensions` against the plan's kinds."""
    mup = pytest.importorskip("mup")

    def unstacked(width):
        model = build("mixtral", width)
        model.lm_head = mup.MuReadout(width, VOCABULARY, bias=False)
        for layer in model.model.layers:
            stacks = layer.mlp.experts
            for leaf in ("gate_up_proj", "down_proj"):
                stack = getattr(stacks, leaf)
                setattr(stacks, f"each_{leaf}", nn.ParameterList(nn.Parameter(matrix.detach().clone()) for matrix in stack))
                delattr(stacks, leaf)
        return model

    plan, theirs = plan_of("mixtral"), unstacked(128)
    mup.set_base_shapes(theirs, unstacked(64), delta=unstacked(96 + 32 + 64), rescale_params=False)
    lrs = {id(param): group["lr"] for group in mup.MuAdam(theirs.parameters(), lr=1.0).param_groups for param in group["params"]}
    for own in plan.parameters:
        names = [own.name]
        if own.role.startswith("experts"):
            path, _, leaf = own.name.rpartition(".")
            names = [f"{path}.each_{leaf}.{expert}" for expert in range(8)]
        for name in names:
            infinite = sum(dim.isinf() for dim in theirs.get_parameter(name).infshape)
            assert infinite == {"hidden": 2, "output": 1, "input": 1}[own.kind]
            if own.kind != "output":  # there mup leaves the LR and asks for a multiplier in the module
                assert lrs[id(theirs.get_parameter(name))] == pytest.approx(plan.factors("mup")[own.name].lr)


def test_a_plain_model_of_torchs_own_layers():
    class Plain(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.positions = nn.Parameter(torch.randn(48, width))
            self.up = nn.Parameter(torch.randn(4, width, 2 * width))  # experts, all on every token
            self.down = nn.Parameter(torch.randn(4, 2 * width, width))
            self.tokens, self.norm = nn.Embedding(VOCABULARY, width), nn.LayerNorm(width)
            self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
            self.convolution, self.router = nn.Conv1d(width, width, 3, padding=1), nn.Linear(width, 4, bias=False)
            self.head = nn.Linear(width, VOCABULARY)

        def forward(self, batch):
            x = self.norm(self.tokens(batch) + self.positions)
            x = x + self.attention(x, x, x, need_weights=False)[0]
            x = x + self.convolution(x.mT).mT
            gates = torch.zeros(*x.shape[:2], 4).scatter(-1, *self.chosen(x))
            hidden = torch.einsum("btd,edm->betm", x, self.up).relu()
            return self.head(x + (torch.einsum("betm,emd->betd", hidden, self.down) * gates.mT[..., None]).sum(1))

        def chosen(self, x):
            gates, experts = self.router(x).softmax(-1).topk(2)
            return experts, gates

    plan = adopt(Plain, 128, 32, tokens(), roles={"positions": "embedding"})
    found = {
        own.name: (own.role, own.kind, plan.factors("mup")[own.name].std, plan.factors("mup")[own.name].lr)
        for own in plan.parameters
    }
    assert found == {
        "positions": ("embedding", "input", 1, 1),
        "up": ("experts_up", "hidden", 0.5, 0.25),
        "down": ("experts_down", "hidden", 0.5, 0.25),
        "tokens.weight": ("embedding", "input", 1, 1),
        "norm.weight": ("gain", "input", 1, 1),
        "norm.bias": ("bias", "input", 1, 1),
        "attention.in_proj_weight": ("attention", "hidden", 0.5, 0.25),
        "attention.in_proj_bias": ("bias", "input", 1, 1),
        "attention.out_proj.weight": ("attention_out", "hidden", 0.5, 0.25),
        "attention.out_proj.bias": ("bias", "input", 1, 1),
        "convolution.weight": ("hidden", "hidden", 0.5, 0.25),
        "convolution.bias": ("bias", "input", 1, 1),
        "router.weight": ("router", "output", 0.25, 0.25),
        "head.weight": ("unembedding", "output", 0.25, 0.25),
        "head.bias": ("bias", "fixed", 1, 1),
    }


# --------------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "ernie4_5_moe"])
def test_a_saved_model_loads_without_us_and_gives_equal_logits(name, tmp_path):
    from transformers import AutoModelForCausalLM

    plan = plan_of(name)
    model = plan.initialise("mup", seed=0)
    losses(model, plan.param_groups("mup", lr=1e-3), steps=3)
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    batch = tokens()
    assert torch.equal(loaded(input_ids=batch, use_cache=False).logits, model(input_ids=batch, use_cache=False).logits)


def test_the_json_has_every_number_that_a_trainer_needs():
    plan = plan_of("ernie4_5_moe", 256)
    rows = {row["name"]: row for row in json.loads(plan.to_json("mup"))}
    assert rows["model.norm.weight"] == {
        "name": "model.norm.weight",
        "role": "gain",
        "kind": "input",
        "init_std": 0.25,
        "start": 0.25,
        "lr": 0.25,
        "eps": 4.0,
        "weight_decay": 4.0,
    }
    groups = plan.initialise("mup") and plan.param_groups("mup", lr=2.0, eps=3.0, weight_decay=5.0)
    assert sorted(name for group in groups for name in group["names"]) == sorted(rows)
    for group in groups:
        for name in group["names"]:
            row = rows[name]
            assert (group["lr"], group["eps"], group["weight_decay"]) == (2 * row["lr"], 3 * row["eps"], 5 * row["weight_decay"])


def test_a_config_grows_its_named_fields():
    grown = growing(config("mixtral", 64), "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    plan = adopt(grown, 256, 64)
    changes = "hidden_size 64 -> 256, intermediate_size 128 -> 512, num_attention_heads 4 -> 16, num_key_value_heads 2 -> 8"
    assert plan.notes()[0] == f"width 64 -> 256: {changes}"
    with pytest.raises(ValueError, match=r"num_key_value_heads=2: is no integer at hidden_size 80"):
        grown(80)
    with pytest.raises(ValueError, match=r"wings=None: is no size of MixtralConfig"):
        growing(config("mixtral", 64), "hidden_size", "wings")


def test_fixed_heads_make_output_weights_and_the_plan_says_so():
    grown = growing(config("mixtral", 64), "hidden_size", "intermediate_size", "num_attention_heads")
    plan = adopt(grown, 256, 64)
    kinds = {own.tensor: own.kind for own in plan.parameters}
    assert kinds["model.layers.*.self_attn.k_proj.weight"] == "output"
    expected = "of output kind, as each sums over a growing size into a fixed one: "
    assert plan.notes()[1] == expected + "model.layers.*.self_attn.k_proj.weight, model.layers.*.self_attn.v_proj.weight"


def test_fixed_ranks_make_an_output_and_an_input_weight():
    """DeepSeek's family keeps the rank of its compressed keys and values: down to it is output kind, up from it input kind."""
    plan = plan_of("deepseek_v3", 256, kv_lora_rank=16)
    kinds = {own.tensor.removeprefix("model.layers.*.self_attn."): own.kind for own in plan.parameters}
    assert kinds["kv_a_proj_with_mqa.weight"] == "output"
    assert kinds["kv_b_proj.weight"] == "input"
    factors = {own.tensor: plan.factors("mup")[own.name] for own in plan.parameters}
    assert factors["model.layers.*.self_attn.kv_a_proj_with_mqa.weight"].lr == 0.25
    assert factors["model.layers.*.self_attn.kv_b_proj.weight"].lr == 1.0


def test_a_correction_bias_that_is_frozen_or_a_buffer_has_no_numbers():
    model = build("ernie4_5_moe", 64)
    frozen = [name for name, param in model.named_parameters() if not param.requires_grad]
    assert frozen
    assert not {own.name for own in plan_of("ernie4_5_moe").parameters} & set(frozen)
    assert any("e_score_correction_bias" in name for name, _ in build("deepseek_v3", 64).named_buffers())


@pytest.mark.parametrize(
    ("name", "knob"), [("granitemoe", "logits_scaling"), ("granitemoe", "embedding_multiplier"), ("cohere2_moe", "logit_scale")]
)
def test_a_knob_that_is_constant_stays_and_one_that_grows_is_refused(name, knob):
    constant = adopt(lambda width: build(name, width, **{knob: 3.0}), 128, 64, tokens())
    assert constant.initialise("mup").config.to_dict()[knob] == 3.0
    with pytest.raises(Refused, match=r"the model scales with the width itself; let `build` hold that number fixed"):
        adopt(lambda width: build(name, width, **{knob: width / 64 + 2}), 128, 64, tokens())


# ------------------------------------------------------------------------------------------------------------------- errors


class Small(nn.Module):
    """A model to break: each test changes one thing."""

    def __init__(self, width):
        super().__init__()
        self.embedding, self.body, self.head = (
            nn.Embedding(VOCABULARY, width),
            nn.Linear(width, width),
            nn.Linear(width, VOCABULARY, bias=False),
        )

    def middle(self, x):
        return self.body(x)

    def forward(self, batch):
        return self.head(self.middle(self.embedding(batch)))


class Unused(Small):
    def __init__(self, width):
        super().__init__(width)
        self.spare = nn.Linear(width, width)


class Elementwise(Small):
    def __init__(self, width):
        super().__init__(width)
        self.decay = nn.Parameter(torch.randn(width, 48))

    def middle(self, x):
        return super().middle(x) * self.decay.mean(1)


class TwoKinds(Small):
    def middle(self, x):
        return super().middle(x) @ self.body.weight


class CustomOperator(Small):
    def middle(self, x):
        return torch.ops.minimoe_test.scaled(x, self.body.weight) + self.body.bias


class Stack(Small):
    def __init__(self, width):
        super().__init__(width)
        self.experts = nn.Parameter(torch.randn(3, width, width))

    def middle(self, x):
        return torch.einsum("btd,edf->betf", super().middle(x), self.experts).sum(1)


class ScaledByWidth(Small):
    def middle(self, x):
        return super().middle(x) * math.sqrt(x.shape[-1])


class Merged(Small):
    def middle(self, x):
        return super().middle(x) @ (self.body.weight @ self.body.weight)


@torch.library.custom_op("minimoe_test::scaled", mutates_args=())
def _scaled(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight


@_scaled.register_fake
def _(x, weight):
    return x @ weight


_scaled.register_autograd(
    lambda ctx, grad: (grad @ ctx.weight.T, torch.zeros_like(ctx.weight)),
    setup_context=lambda ctx, inputs, output: ctx.__dict__.update(weight=inputs[1]),
)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Unused,
            r"spare.weight \(128, 128\): the forward pass does not use it: give a longer batch, freeze it, or name its role",
        ),
        (Elementwise, r"decay \(128, 48\): a matrix that is only used elementwise: name its role"),
        (TwoKinds, r"body.weight \(128, 128\): its products sum over different axes, so that it has two kinds"),
        (
            CustomOperator,
            r"body.weight \(128, 128\): it is used by the operator minimoe_test::scaled, which says nothing of its sums",
        ),
        (Stack, r"experts: stacks of matrices, and nothing chooses among them: name their roles"),
        (ScaledByWidth, r"the forward pass multiplies it by 11.31, .* \(of 8\): the model scales with the width itself"),
        (Merged, r"body.weight \(128, 128\): it is used by a product of two parameters"),
        (lambda width: Small(64), r"build makes a model of the same shape at both widths"),
        (lambda width: Small(width) if width == 64 else Unused(width), r"build makes models of other parameters: spare.bias"),
    ],
)
def test_what_cannot_be_known_is_an_error_that_names_the_parameter_and_the_remedy(model, message):
    with pytest.raises(Refused, match=message):
        adopt(model, 128, 64, tokens())


def test_experts_that_are_looked_up_and_then_multiplied_are_an_error():
    with pytest.raises(Refused, match=r"mlp.down_embed.weight \(16, 128\): its rows are looked up, and then multiplied"):
        plan_of("doge")


def test_the_librarys_own_width_multipliers_are_refused():
    with pytest.raises(Refused, match=r"model.embed_tokens.weight: the forward pass multiplies it by 11.31"):
        plan_of("afmoe", mup_enabled=True)


@pytest.mark.parametrize("table", ["sp", PARAMETRIZATIONS["mup"].replace("unembedding", lr=2)])
def test_a_tie_under_a_table_that_has_no_rule_for_it_is_an_error(table):
    plan = plan_of("ernie4_5_moe")
    with pytest.raises(Refused, match=r"model.embed_tokens.weight is tied, and .* has no rule for both of its uses"):
        plan.initialise(table)


@pytest.mark.parametrize(("table", "sizes"), [("completep", "depth"), ("dmft", "depth, expert_width, granularity, top_k")])
def test_a_table_for_other_sizes_than_the_width_is_an_error(table, sizes):
    """Its residual multipliers would be lost without a word."""
    plan = plan_of("mixtral")
    with pytest.raises(Refused, match=f"{table} has cells in {sizes}: a plan knows how the width grows, and no other size"):
        plan.initialise(table)


@pytest.mark.parametrize(
    ("model", "roles", "found"),
    [
        (Unused, {"spare.*": "bias"}, ("bias", "input")),
        (Unused, {"spare.weight": ("hidden", (1,)), "spare.bias": "bias"}, ("hidden", "hidden")),
        (Elementwise, {"decay": "gain"}, ("gain", "input")),
        (CustomOperator, {"body.weight": ("hidden", (0,))}, ("hidden", "hidden")),
    ],
)
def test_roles_can_be_given_by_hand(model, roles, found):
    plan = adopt(model, 128, 64, tokens(), roles=roles)
    pattern = next(iter(roles)).rstrip("*.")
    assert next((own.role, own.kind) for own in plan.parameters if own.name.startswith(pattern)) == found


def test_a_frozen_parameter_is_left_out():
    def frozen(width):
        model = Unused(width)
        model.spare.requires_grad_(False)
        return model

    assert all("spare" not in own.name for own in adopt(frozen, 128, 64, tokens()).parameters)


def test_experts_that_are_modules_are_found_by_the_rows_that_the_router_picks():
    class Mixture(Small):
        def __init__(self, width):
            super().__init__(width)
            self.router = nn.Linear(width, 2)
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(2)
            )

        def middle(self, x):
            x = super().middle(x).flatten(0, 1)
            gates, chosen = self.router(x).softmax(-1).topk(1)
            out = torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                rows = (chosen == number).any(-1).nonzero().squeeze(-1)
                out.index_add_(0, rows, gates[rows] * expert(x[rows]))
            return out.view(4, -1, x.shape[-1])

    roles = {own.name: own.role for own in adopt(Mixture, 128, 64, tokens()).parameters}
    assert roles["router.weight"] == "router"
    assert roles["body.weight"] == "hidden"
    for expert in range(2):
        assert roles[f"experts.{expert}.0.weight"] == "experts_up"
        assert roles[f"experts.{expert}.2.weight"] == "experts_down"


def test_folding_warns_where_it_is_not_exact():
    plan = plan_of("mixtral")
    plan.initialise("mup")
    with pytest.warns(UserWarning, match="clipping at a gradient norm of 1 is not exact"):
        plan.param_groups("mup", 1e-3, max_grad_norm=1.0)
    with pytest.warns(UserWarning, match="the rules are Adam's: under SGD these groups are wrong"):
        plan.param_groups("mup", 1e-3, optimizer=torch.optim.SGD)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda plan: plan.param_groups("mup", lr=0.0), r"lr=0.0: must be positive and finite"),
        (lambda plan: plan.param_groups("mup", lr=1.0, eps=-1), r"eps=-1: must be finite and not negative"),
        (lambda plan: plan.at(64).param_groups("mup", lr=1.0), r"there is no model yet: call initialise, or give model="),
        (lambda plan: plan.param_groups("sp", lr=1.0), r"initialised under 'mup', and these would be the groups of 'sp'"),
        (lambda plan: plan.check("mup", steps=9), r"batch='of 4 rows': 9 steps and a probe need at least 10"),
        (lambda plan: adopt(Small, 64, 64), r"width=64: must differ from base_width"),
        (lambda plan: adopt(Small, 0, 64), r"width=0: must be a positive integer"),
        (lambda plan: adopt(Small, 128, 64), r"batch=None: is needed: the model has no config.vocab_size"),
        (lambda plan: adopt(Small, 128, 64, tokens(), roles={"x": "bias"}), r"roles='x': no parameter has such a name"),
        (
            lambda plan: adopt(Small, 128, 64, tokens(), roles={"head.*": "tail"}),
            r"roles\['head.\*'\]='tail': must be one of embedding",
        ),
    ],
)
def test_bad_input(call, message):
    plan = plan_of("mixtral")
    plan.initialise("mup")
    with pytest.raises(ValueError, match=message):
        call(plan)


def test_a_build_that_makes_no_module_is_an_error():
    with pytest.raises(TypeError, match=r"build must return a torch.nn.Module, got int"):
        adopt(lambda width: width, 128, 64, tokens())


def test_a_plan_prints_its_tensors_its_reasons_and_its_notes():
    said = repr(plan_of("mixtral"))
    assert "model.layers.*.mlp.experts.gate_up_proj" in said
    assert "experts_up hidden (8, 512, 128)     128      2    0.7071 0.5" in said
    assert "router, unembedding: output, it sums over a growing fan_in" in said
    assert "multipliers are folded: exact under Adam and AdamW" in said
    assert "<table" in plan_of("mixtral")._repr_html_()
