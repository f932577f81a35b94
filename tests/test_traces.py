"""What the operators of a forward pass say of each parameter: against torch's own layers, transformers' marks, and our roles."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from architectures import FAMILIES, OTHERS, build, tokens
from minimoe import Config, MiniMoE
from minimoe.modules import uses
from minimoe.roles_by_use import adopted
from minimoe.traces import traced


def trace_of(model, batch, forward=None):
    return traced(model, forward or (lambda: model(input_ids=batch, use_cache=False).logits))


def axes(trace, name):
    return {use.axes for use in trace.uses[name] if use.how == "product"}


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_traced_axes_are_the_librarys_own(name):
    torch.manual_seed(0)
    model = build(name, 64)
    trace = trace_of(model, tokens())
    marked = 0
    for path, part in model.named_modules():
        if hasattr(part, "is_transposed") and hasattr(part, "down_proj"):
            inner = "gate_up_proj" if hasattr(part, "gate_up_proj") else "up_proj"
            for leaf in (inner, "down_proj"):
                axis = 1 if part.is_transposed else 2  # (E, in, out), or (E, out, in)
                assert axes(trace, f"{path}.{leaf}") == {(axis,)}, leaf
                marked += 1
    unmarked = ("llama4_text", "jetmoe")
    assert marked or name in unmarked
    names = {id(param): name for name, param in model.named_parameters()}
    readout, embedding = names[id(model.get_output_embeddings().weight)], names[id(model.get_input_embeddings().weight)]
    assert trace.readouts == {readout}
    assert axes(trace, readout) == {(1,)}
    assert "lookup" in {use.how for use in trace.uses[embedding]}
    assert trace.routers


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_the_roles_are_the_same_however_the_experts_are_computed(name, how, dtype):
    found = {}
    for implementation, precision in (("eager", torch.float32), (how, dtype)):
        models = []
        for width in (64, 128):
            torch.manual_seed(0)
            model = build(name, width).to(precision)
            model.set_experts_implementation(implementation)
            models.append(model)
        traces = [trace_of(model, tokens()) for model in models]
        found[implementation, precision] = adopted(models[1], models[0], traces, {})
    assert found["eager", torch.float32] == found[how, dtype]


@pytest.mark.parametrize(
    "fields",
    [{}, {"activation": "swiglu", "gates": "renormalized"}, {"n_experts": 1, "top_k": 1}, {"gates": "sigmoid", "bias_rate": 0.1}],
)
def test_minimoe_traced_equals_its_declared_roles(fields):
    models = [MiniMoE(Config(width=width, base_width=32, **fields)) for width in (32, 64)]
    text = torch.randint(96, (2, 48), generator=torch.Generator().manual_seed(0))
    traces = [trace_of(model, text, lambda model=model: model(text).logits) for model in models]
    for own in adopted(models[1], models[0], traces, {"positions": ("embedding", None)}):
        role = models[0].get_parameter(own.name).role
        assert own.role == role.name
        if own.role != "embedding":  # its rows are looked up: nothing is summed
            assert own.axes == tuple(axis % len(own.shape) for axis in role.fan_in_axes)
            assert own.ratio == models[1].get_parameter(own.name).role.ratios["fan_in"]


def test_square_matrices_are_told_apart_by_their_strides():
    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(10, 8), nn.Linear(8, 10)
            self.left, self.right = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
            self.stack = nn.Parameter(torch.randn(8, 8, 8))

        def forward(self, batch):
            x = self.embedding(batch) @ self.left
            x = F.linear(x, self.right)
            return self.head(torch.einsum("btd,edf->btef", x, self.stack).sum(2))

    model = Square()
    trace = trace_of(model, None, lambda: model(torch.arange(6)[None]))
    assert axes(trace, "left") == {(0,)}
    assert axes(trace, "right") == {(1,)}
    assert axes(trace, "stack") == {(1,)}
    assert axes(trace, "head.weight") == {(1,)}


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Conv1d(6, 12, 3), (1, 2)), (nn.Conv1d(6, 6, 3, groups=6), (1, 2)), (nn.ConvTranspose1d(6, 12, 3), (0, 2))],
)
def test_convolutions_sum_over_channels_and_kernel(layer, shape):
    trace = trace_of(layer, None, lambda: layer(torch.randn(2, 6, 9)))
    (use,) = trace.uses["weight"]
    assert (use.how, use.axes) == ("convolution", shape)
    assert trace.uses["bias"][0].how == "elementwise"


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text", "jetmoe", "lfm2_moe"])
@pytest.mark.parametrize("how", ["eager", "grouped_mm"])
def test_what_a_use_makes_of_its_own_weight_is_what_the_model_made(name, how):
    """The functions that `uses` returns, fed with the weights themselves: linear, and equal to the layers' own outputs."""
    torch.manual_seed(0)
    model = build(name, 64)
    if name not in ("llama4_text", "jetmoe"):
        model.set_experts_implementation(how)
    batch, seen = tokens(2, 16), {}
    layers = {path: part for path, part in model.named_modules() if type(part).forward is nn.Linear.forward}

    def see(part, inputs, out):
        seen.setdefault(part, []).append(out.clone())

    hooks = [part.register_forward_hook(see) for part in layers.values()]
    found = uses(model, lambda: model(input_ids=batch, use_cache=False))
    for hook in hooks:
        hook.remove()
    names = {id(param): name for name, param in model.named_parameters()}
    for part in layers.values():
        own = names[id(part.weight)]
        made = [use.output(part.weight) for use in found.get(f"{own} (readout)", found.get(own))]
        for ours, theirs in zip(made, seen[part], strict=True):
            bias = 0 if part.bias is None else part.bias
            torch.testing.assert_close(ours.view(theirs.shape), theirs - bias, rtol=1e-5, atol=1e-6)
    for tensor, own in found.items():
        weight = model.get_parameter(tensor.removesuffix(" (readout)"))
        for use in own:
            once = use.output(weight.detach())
            torch.testing.assert_close(use.output(3 * weight.detach()), 3 * once, rtol=1e-5, atol=1e-5)
    matrices = {name for name, param in model.named_parameters() if param.ndim > 1 and not name.endswith("_bias")}
    assert matrices <= {name.removesuffix(" (readout)") for name in found}


def test_a_model_is_left_as_it_was():
    model = build("mixtral", 64)
    model.train()
    before = {name: param.clone() for name, param in model.named_parameters()}
    trace_of(model, tokens())
    assert model.training
    assert all(torch.equal(param, before[name]) and param.grad is None for name, param in model.named_parameters())
