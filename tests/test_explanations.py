"""What explain says of our models and of others', and what it refuses to guess."""

import pytest
import torch
from torch import nn

from minimoe import PARAMETRIZATIONS, Config, MiniMoE, explain, fan_in, side_by_side
from minimoe.explanations import marked

KINDS = {"embedding": "input", "unembedding": "output", "attention": "hidden", "experts_up": "hidden",
         "experts_down": "hidden", "router": "output"}  # fmt: skip


@pytest.mark.parametrize("table", PARAMETRIZATIONS)
def test_kinds_follow_from_shapes_and_not_from_the_table(table):
    rows = explain(Config(table, width=64))
    assert dict(zip(rows.role, rows.kind, strict=True)) == KINDS


def test_numbers_of_one_tensor_by_hand():
    rows = explain(Config("mup", width=128, base_width=32), lr=0.01).set_index("name")
    up = rows.loc["blocks.1.moe.up"]
    assert up["shape"] == (8, 128, 256)
    assert (up.fan_in, up.ratio, up.multiplier, up.lr) == (128, 4, 1, 0.25)
    assert up.init_std == pytest.approx(128**-0.5)
    assert up.effective_lr == pytest.approx(0.0025)
    router = rows.loc["blocks.0.moe.router"]
    assert (router.multiplier, router.lr, router.effective_lr) == (0.25, 1, 0.01)


def test_a_model_explains_itself_like_its_config():
    config = Config("simplep", width=64)
    assert explain(MiniMoE(config)).equals(explain(config))


def test_reasons_say_what_the_table_does_wrong():
    why = explain(Config("simplep", width=64)).set_index("role").why
    assert (
        "effect on it grows like width^1, its share of the loss's first fall grows like width^0.5: not as"
        in why["router"].iloc[0]
    )
    assert "as muP wants it" in why["unembedding"]
    assert "not as" not in why["unembedding"]
    broken = PARAMETRIZATIONS["mup"].replace("attention", init_var=1)
    assert "at init grows like width^0.5" in explain(Config(broken)).set_index("role").why["attention"].iloc[0]
    big_head = explain(Config(PARAMETRIZATIONS["mup"].replace("unembedding", init_var=fan_in))).set_index("role").why
    assert "first fall grows like width^0.5: not as muP wants it" in big_head["experts_up"].iloc[0]
    assert "not as" not in big_head["unembedding"]  # whose own numbers are as they may be: the others feel it
    small_head = explain(Config(PARAMETRIZATIONS["mup"].replace("unembedding", init_var=1 / fan_in))).why
    assert not small_head.str.contains("not as").any()  # late, and not wrong


def test_it_prints_numbers_and_then_reasons_once():
    rows = explain(Config("mup", width=64))
    text, html = repr(rows), rows._repr_html_()
    for shown in (text, html):
        assert "blocks.1.attention.o" in shown
        assert shown.count("into outputs that grow in number") == 1  # attention and experts share it
    assert type(rows[rows.kind == "hidden"]).__name__ == "DataFrame"


def test_side_by_side_marks_the_differences():
    table = side_by_side(Config(width=512), ["simplep", "mup"])
    differing = table[table["differs", ""] != ""]
    assert set(differing.index) == {"blocks.0.moe.router", "blocks.1.moe.router"}
    assert set(differing["differs", ""]) == {"init_std, multiplier"}
    lines = marked(table).splitlines()
    assert [line for line in lines if "*" in line] == [line for line in lines if "router" in line]


class Peer(nn.Module):
    """A model as others write them: (out, in) layers, a stack of experts, a bare positional table."""

    def __init__(self, width, experts=4, tie=False):
        super().__init__()
        self.tokens = nn.Embedding(50, width)
        self.positions = nn.Parameter(torch.zeros(16, width))
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2)
        self.convolution = nn.Conv1d(width, width, 3)
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(2))
        self.up = nn.Parameter(torch.zeros(experts, width, 2 * width))
        self.head = nn.Linear(width, 50)
        if tie:
            self.head.weight = self.tokens.weight


AXES = {"positions": 0, "up": 1}


def test_a_foreign_module_by_the_layout_of_its_layers():
    rows = explain(Peer(64), lambda: Peer(16), fan_in=AXES).set_index("name")
    assert rows.kind.to_dict() == {
        "positions": "input",
        "up": "hidden",
        "tokens.weight": "input",
        "norm.weight": "input",
        "norm.bias": "input",
        "attention.in_proj_weight": "hidden",
        "attention.in_proj_bias": "input",
        "attention.out_proj.weight": "hidden",
        "attention.out_proj.bias": "input",
        "convolution.weight": "hidden",
        "convolution.bias": "input",
        "router.weight": "output",
        "experts.0.weight": "hidden",
        "experts.0.bias": "input",
        "experts.1.weight": "hidden",
        "experts.1.bias": "input",
        "head.weight": "output",
        "head.bias": "fixed",
    }
    for name in ("up", "experts.0.weight", "attention.in_proj_weight", "convolution.weight"):
        assert rows.loc[name, ["ratio", "init_std", "multiplier", "lr"]].tolist() == [4, 0.5, 1, 0.25]
    for name in ("router.weight", "head.weight"):
        assert rows.loc[name, ["ratio", "init_std", "multiplier", "lr"]].tolist() == [4, 1, 0.25, 1]
    for name in ("tokens.weight", "positions", "norm.bias", "head.bias"):
        assert rows.loc[name, ["ratio", "init_std", "multiplier", "lr"]].tolist() == [1, 1, 1, 1]
    assert rows.fan_in["convolution.weight"] == 3 * 64


def test_our_own_model_read_as_a_foreign_one_gets_the_same_kinds_and_numbers():
    config = Config("mup", width=128)
    ours = explain(config).set_index("name")

    class Wrapped(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.model = MiniMoE(config)

    theirs = (
        explain(Wrapped(config), lambda: Wrapped(config.base)).set_index("name").rename(lambda name: name.removeprefix("model."))
    )
    for column in ("kind", "ratio", "multiplier", "lr", "effective_lr"):
        assert theirs[column].to_dict() == ours[column].to_dict()


def test_stacked_weights_that_sum_over_two_axes():
    class Heads(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.out = nn.Parameter(torch.zeros(width // 8, 8, width))  # (heads, head size, width)

    rows = explain(Heads(64), lambda: Heads(16), fan_in={"out": (0, 1)})
    assert rows.loc[0, ["kind", "fan_in", "ratio"]].tolist() == ["hidden", 64, 4]


@pytest.mark.parametrize(
    ("module", "build", "fan_in", "message"),
    [
        (Peer(32), lambda: Peer(16), {}, r"positions \(16, 32\): a parameter of Peer, whose layout is not known: name the axis"),
        (Peer(32), lambda: Peer(16), {"positions": 0}, r"up \(4, 32, 64\): a parameter of Peer"),
        (Peer(32), lambda: Peer(16, experts=2), AXES, r"up \(4, 32, 64\): its axis 0 grows: a stack of experts must not"),
        (Peer(32, tie=True), lambda: Peer(16, tie=True), AXES, r"tokens.weight \(50, 32\): it is tied and has two kinds"),
        (Peer(32), lambda: Peer(32), AXES, "a model of the same shape"),
        (Peer(32), lambda: nn.Linear(3, 3), AXES, "a model of other parameters"),
        (Peer(32), lambda: Peer(16), {**AXES, "down": 0}, "fan_in names 'down', which no parameter matches"),
        (Peer(32), lambda: Peer(16), {**AXES, "up": 5}, r"up \(4, 32, 64\): fan_in=\(5,\): it has 3 axes"),
        (Peer(32), None, AXES, "explain needs build"),
        (nn.Linear(16, 8), lambda: nn.Linear(8, 16), None, "one axis grows where another shrinks"),
    ],
)
def test_what_is_ambiguous_is_an_error(module, build, fan_in, message):
    with pytest.raises(ValueError, match=message):
        explain(module, build, fan_in=fan_in)


def test_a_tied_matrix_is_explained_where_the_caller_says_how_it_is_used():
    rows = explain(Peer(32, tie=True), lambda: Peer(16, tie=True), fan_in={**AXES, "tokens.weight": 1, "head.weight": 1})
    assert rows.set_index("name").kind["tokens.weight"] == "output"


def test_other_things_are_refused():
    with pytest.raises(TypeError, match=r"explain takes a Config or .*, got str"):
        explain("mup")
    with pytest.raises(ValueError, match="a Config says all itself"):
        explain(Config(), lambda: None)


def test_an_explanation_is_applied_with_its_multipliers_folded():
    torch.manual_seed(0)
    module, base = Peer(64), Peer(16)
    for peer in (module, base):
        for param in (peer.positions, peer.up):
            nn.init.normal_(param, std=0.3)
    rows = explain(module, lambda: base, fan_in=AXES)
    stds = {name: param.std(correction=0).item() for name, param in base.named_parameters()}
    assert rows.initialise(module) is module
    groups = rows.param_groups(module, lr=0.1, eps=1e-8, weight_decay=0.01)
    of = {name: group for group in groups for name in group["names"]}
    assert set(of) == set(dict(module.named_parameters()))
    assert sum(len(group["params"]) for group in groups) == len(of)
    # four times as wide: (std over the base's, LR, eps, decay) of an input, a hidden and an output weight
    expected = {"tokens.weight": (1, 1, 1, 1), "positions": (1, 1, 1, 1), "attention.out_proj.weight": (1 / 2, 1 / 4, 1, 1),
                "up": (1 / 2, 1 / 4, 1, 1), "head.weight": (1 / 4, 1 / 4, 4, 4),
                "router.weight": (1 / 4, 1 / 4, 4, 4)}  # fmt: skip
    for name, (std, lr, eps, decay) in expected.items():
        assert module.get_parameter(name).std(correction=0).item() == pytest.approx(std * stds[name], rel=1e-4), name
        assert of[name]["lr"] == pytest.approx(0.1 * lr), name
        assert of[name]["eps"] == pytest.approx(1e-8 * eps), name
        assert of[name]["weight_decay"] == pytest.approx(0.01 * decay), name
    assert torch.equal(module.norm.weight, torch.ones(64))
    assert torch.equal(module.norm.bias, torch.zeros(64))
    torch.optim.AdamW(groups)


def test_what_cannot_be_applied_says_so():
    with pytest.raises(ValueError, match="this explains a Config"):
        explain(Config()).param_groups(MiniMoE(Config()), lr=0.1)
    with pytest.raises(ValueError, match=r"lr=0: must be positive"):
        explain(Peer(64), lambda: Peer(16), fan_in=AXES).param_groups(Peer(64), lr=0)
