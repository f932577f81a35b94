"""The exercises' checks: a right answer passes, and each wrong answer is told what is wrong with it."""

import pytest
import torch
from torch import nn

from minimoe import PARAMETRIZATIONS, Config, MiniMoE, adopt, deep_mystery, depth, fan_in, mystery, read_sweep, shipped, width
from minimoe.exercises import (
    Wrong,
    check_allocation,
    check_budget,
    check_coordinates,
    check_deep_mended,
    check_gates,
    check_mended,
    check_missed,
    check_router_row,
    check_sign_step,
)


def blank(*_arguments): ...


def test_a_wrong_answer_shows_its_message_alone():
    assert Wrong("the sign")._render_traceback_() == ["Not yet: the sign"]
    assert issubclass(Wrong, AssertionError)  # so that a wrong answer fails a test run, too


@pytest.mark.parametrize("check", [check_sign_step, check_gates, check_coordinates, check_allocation])
def test_a_blank_is_told_to_be_filled_in(check):
    with pytest.raises(Wrong, match="`blank` returns nothing: fill in the blank"):
        check(blank)


def test_sign_step():
    assert check_sign_step(lambda W, gradient, lr: W - lr * gradient.sign()).startswith("Right")


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda W, gradient, lr: W - lr * gradient, "the step of SGD"),
        (lambda W, gradient, lr: W + lr * gradient.sign(), "the loss goes up"),
        (lambda W, gradient, lr: -lr * gradient.sign(), "the step alone"),
        (lambda W, gradient, lr: W - lr * gradient / gradient.abs(), r"where the gradient is \+0 the step is: yours \+nan"),
        (lambda W, gradient, lr: W - 2 * lr * gradient.sign(), "the step is: yours [+-]0.2, Adam's [+-]0.1"),
        (lambda W, gradient, lr: (W - lr * gradient.sign())[0], r"W has the shape \(4, 3\), your answer \(3,\)"),
        (lambda W, gradient, lr: W.sub_(lr * gradient.sign()), "changes W itself"),
    ],
)
def test_wrong_sign_steps(step, message):
    with pytest.raises(Wrong, match=message):
        check_sign_step(step)


def gates_of(values, logits, k):
    chosen = logits.topk(k).indices
    return torch.zeros_like(logits).scatter(1, chosen, values.gather(1, chosen))


def test_gates():
    assert check_gates(lambda logits, k: gates_of(torch.softmax(logits, -1), logits, k)).startswith("Right")


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        (lambda logits, k: torch.softmax(logits, -1), "2 experts are active for each token; yours has up to 8"),
        (lambda logits, k: torch.softmax(logits, -1).topk(k).values, "a gate for each of the 8 experts"),
        (lambda logits, k: gates_of(torch.softmax(logits, -1), -logits, k), "not the experts with the largest logits"),
        (
            lambda logits, k: torch.softmax(logits.masked_fill(logits < logits.topk(k).values[:, -1:], -1e9), -1),
            "comes before the choice",
        ),
        (lambda logits, k: gates_of(torch.sigmoid(logits), logits, k), "not with the values of the softmax"),
    ],
)
def test_wrong_gates(gates, message):
    with pytest.raises(Wrong, match=message):
        check_gates(gates)


def test_router_row():
    assert check_router_row(1 / fan_in**2, 1, 1 / fan_in).startswith("Right")
    with pytest.raises(Wrong, match="the multiplier is 1/fan_in: the task asks for 1"):
        check_router_row(1, 1 / fan_in, 1)
    with pytest.raises(Wrong, match=r"router: the update goes like n\^\+1, muP's like n\^\+0"):
        check_router_row(1 / fan_in**2, 1, 1)
    with pytest.raises(Wrong, match=r"router: the init goes like n\^\+0, muP's like n\^-0.5"):
        check_router_row(1 / fan_in, 1, 1 / fan_in)


def router_sizes(table, widths, what, tokens):
    """For each width the RMS of the first router's outputs: of the weight's change by an Adam step, or of its init."""
    sizes = []
    for n in widths:
        model = MiniMoE(Config(table, width=n))
        router, seen = model.blocks[0].moe, []
        before = router.router.detach().clone()
        router.register_forward_pre_hook(lambda _module, inputs, seen=seen: seen.append(inputs[0].detach()))
        optimizer = torch.optim.AdamW(model.param_groups(2**-10))
        logits = model(tokens[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        weight = router.router_multiplier * (router.router.detach() - before if what == "update" else before)
        sizes.append((seen[0] @ weight).square().mean().sqrt().item())
    return sizes


def test_coordinates(corpus):
    text = torch.from_numpy(corpus.train[: 16 * 65]).long().view(16, 65)
    assert check_coordinates(lambda table, widths: router_sizes(table, widths, "update", text)).startswith("Right")
    with pytest.raises(Wrong, match="under sp"):  # the weight at init
        check_coordinates(lambda table, widths: router_sizes(table, widths, "init", text))
    noise = torch.randint(96, (16, 65), generator=torch.Generator().manual_seed(0))
    with pytest.raises(Wrong, match="symbols drawn at random have too little in common: use text"):
        check_coordinates(lambda table, widths: router_sizes(table, widths, "update", noise))


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        (lambda table, widths: [1.0], "one number for each of the widths"),
        (lambda table, widths: [0.0] * 4, "are not sizes of an update"),
        (lambda table, widths: [1.0] * 4, r"under sp yours grows like n\^\+0.00, the law says n\^\+1"),
        (lambda table, widths: [float(n) for n in widths], r"under mup yours grows like n\^\+1.00, the law says n\^\+0"),
        (lambda table, widths: [n ** (1.0 if table == "sp" else -0.5) for n in widths], "the law of the logits at init"),
    ],
)
def test_wrong_coordinates(updates, message):
    with pytest.raises(Wrong, match=message):
        check_coordinates(updates)


@pytest.mark.parametrize("number", range(16))
def test_mended_mysteries(number):
    mups, broken = PARAMETRIZATIONS["mup"], mystery(number)
    (wrong,) = [
        (role, cell)
        for role in mups.roles
        for cell in ("init_var", "multiplier", "lr")
        if getattr(mups[role], cell) != getattr(broken[role], cell)
    ]
    right = getattr(mups[wrong[0]], wrong[1])
    assert check_mended(broken.replace(wrong[0], **{wrong[1]: right}), number) == f"Right: {wrong[0]}.{wrong[1]}."
    with pytest.raises(Wrong, match="as it was"):
        check_mended(broken, number)
    with pytest.raises(Wrong, match=r"goes like n\^.*muP's like|not as muP writes it"):
        check_mended(broken.replace(wrong[0], **{wrong[1]: right * width**3}), number)
    with pytest.raises(Wrong, match="one cell is wrong; yours changes 2"):
        check_mended(broken.replace(wrong[0], **{wrong[1]: right}).replace("router", eps=fan_in), number)


def test_the_deep_mystery():
    broken = deep_mystery()
    assert check_deep_mended(broken.replace("router", lr=1 / depth**0.5)) == "Right: router.lr = 1/depth^0.5."
    for table, said in (
        (..., r"give a table, as `deep_mystery\(\)\.replace"),
        (broken, "as it was"),
        (
            broken.replace("router", lr=1 / depth),
            r"router.lr is 1/depth in yours: the right cell, with another power of the depth",
        ),
        (broken.replace("attention", lr=1), "attention.lr is 1 in yours: this cell was right"),
        (broken.replace("router", lr=1 / depth**0.5, eps=1), "one cell is wrong; yours changes 2"),
    ):
        with pytest.raises(Wrong, match=said):
            check_deep_mended(table)


def test_mended_wants_a_table():
    with pytest.raises(Wrong, match=r"give a table, as `mystery\(3\)\.replace"):
        check_mended(..., 3)


@pytest.fixture(scope="module")
def mup_rows():
    frame = read_sweep(shipped("sweeps/transfer.jsonl"))
    return frame[frame.parametrization == "mup"]


def test_budget(mup_rows):
    def tune(run):
        return min((2.0**octave for octave in (-6, -5, -4.5, -4)), key=lambda lr: run(32, lr))

    assert check_budget(tune, mup_rows, 4).endswith("for a budget of 4 of 4.")
    with pytest.raises(Wrong, match="the budget is 3, and this run brings it to 4"):
        check_budget(tune, mup_rows, 3)


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        (blank, "fill in the blank"),
        (lambda run: run(256, 2.0**-5) and 2.0**-5, "the budget is 12, and this run brings it to 64"),
        (lambda run: run(48, 2.0**-5), "no run of width 48 at LR 0.03125: no such width"),
        (lambda run: run(32, 0.01), r"no run of width 32 at LR 0.01: there are 2\^-9"),
        (lambda run: 0.01, "is not on the grid of width 256"),
        (lambda run: 2.0**-9, r"LR 2\^-9 costs 0\.\d+ nats at width 256, for a budget of 0: more than 0.01"),
    ],
)
def test_wrong_budgets(tune, message, mup_rows):
    with pytest.raises(Wrong, match=message):
        check_budget(tune, mup_rows, 12)


def booked(before, after, first, second, weights=(0.5, 0.5), factor=-1):
    step = {name: after[name] - before[name] for name in before}
    return {name: factor * ((weights[0] * first[name] + weights[1] * second[name]) * step[name]).sum() for name in before}


def test_allocation():
    assert check_allocation(booked).startswith("Right")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 1}, "the sign"),
        ({"weights": (1, 0)}, "the gradient before the step alone"),
        ({"weights": (0, 1)}, "the gradient after the step alone"),
        ({"weights": (1, 1)}, "twice too much"),
        ({"weights": (0.3, 0.3)}, r"yours add up to .*, but the loss falls by"),
    ],
)
def test_wrong_allocations(changes, message):
    with pytest.raises(Wrong, match=message):
        check_allocation(lambda *given: booked(*given, **changes))


def test_an_allocation_for_every_tensor():
    with pytest.raises(Wrong, match="an allocation for each of up, down; yours has up"):
        check_allocation(lambda *given: {"up": booked(*given)["up"]})


class Stacked(nn.Module):
    """A router and a stack of experts that are bare parameters, between layers of torch."""

    def __init__(self, width):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(96, width), nn.RMSNorm(width)
        self.router = nn.Parameter(torch.randn(4, width))
        self.experts = nn.Parameter(torch.randn(4, width, width))
        self.head = nn.Linear(width, 96, bias=False)

    def forward(self, tokens):
        x = self.norm(self.embedding(tokens))
        gates, chosen = (x @ self.router.T).softmax(-1).topk(1)
        gates = torch.zeros(*x.shape[:-1], 4).scatter(-1, chosen, gates)
        return self.head(torch.einsum("btef,bte->btf", torch.einsum("btd,edf->btef", x, self.experts), gates))


@pytest.fixture(scope="module")
def stacked():
    tokens = torch.randint(96, (4, 32), generator=torch.Generator().manual_seed(0))
    return Stacked(32), adopt(Stacked, 32, 16, tokens)


def test_missed(stacked):
    assert check_missed(lambda module, plan: {"router", "experts"}, *stacked) == "Right: 2 parameters."


@pytest.mark.parametrize(
    ("missed", "message"),
    [
        (blank, "fill in the blank"),
        (lambda module, plan: ["experts"], "there are 2; yours are 1. What is left is of output kind"),
        (lambda module, plan: [], "there are 2; yours are 0. What is left is of hidden and output kind"),
        (lambda module, plan: [own.name for own in plan.parameters], "embedding.weight is of input kind"),
        (lambda module, plan: ["router", "experts", "head.weight"], "head.weight is the weight of an nn.Linear"),
        (lambda module, plan: plan.parameters, "is no parameter of the plan: give the names"),
    ],
)
def test_wrong_missed(missed, message, stacked):
    with pytest.raises(Wrong, match=message):
        check_missed(missed, *stacked)


def test_shipped_files_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped("sweeps/transfer.jsonl").is_file()
    with pytest.raises(FileNotFoundError, match=r"sweeps/none.jsonl is not in data/.*pip install --editable"):
        shipped("sweeps/none.jsonl")
    monkeypatch.setenv("MINIMOE_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="install minimoe from a checkout"):
        shipped("sweeps/transfer.jsonl")
