"""What explain says of our models and of others', and what it refuses to guess."""

import pytest
import torch

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


def test_other_things_are_refused():
    with pytest.raises(TypeError, match=r"explain takes a Config or a MiniMoE, got str"):
        explain("mup")
    with pytest.raises(TypeError, match=r"got Linear; for other models there is adopt"):
        explain(torch.nn.Linear(3, 3))


def test_gains_and_shared_experts_are_explained():
    config = Config("mup", width=64, n_experts=8, top_k=2, n_shared=1, gains=True)
    rows = explain(config).set_index("name")
    gain, up, shared = (rows.loc[f"blocks.0.{name}"] for name in ("moe_norm.gain", "moe.up", "moe.shared_up"))
    assert (gain.ratio, gain.flops) == (1, 2 * 64)
    assert up.flops == 2 * 2 * 64 * 128  # two of eight matrices
    assert shared.flops == 2 * 64 * 128  # the whole of one
    assert up.kind == shared.kind == "hidden"


def test_the_active_width_grows_with_the_width():
    """Complete-muE's down projection: its multiplier, width over active width, stays; it is muP's hidden weight."""
    down = explain(Config("complete-mue", width=64, gates="renormalized sigmoid")).set_index("name").loc["blocks.0.moe.down"]
    assert "its output at init does not depend on width, an Adam step's effect on it does not depend on width" in down.why
    assert down.why.endswith(": as muP wants it")
