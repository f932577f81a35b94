"""Sweeps of adopted models: the same numbers as the loop by hand, resumed, and readable by the reports."""

import json
import math

import pytest
import torch
from torch import nn

from minimoe import (
    AS_IT_IS,
    PARAMETRIZATIONS,
    TrainOptions,
    adopt,
    adopted_sweep,
    fan_in,
    lr_curves,
    read_adopted,
    transfer_report,
)
from minimoe.causal import next_token_loss
from minimoe.step import lr_factor
from minimoe.training import TextData, windows

OPTIONS = TrainOptions(batch_size=4, evals=2, eval_batches=2)
GRID = {"widths": (16, 32), "tables": (AS_IT_IS, "mup"), "lrs": (2.0**-9, 2.0**-7, 2.0**-5), "seeds": (0, 1), "steps": 6}


class Network(nn.Module):
    """The next character from the character before: an embedding, one hidden layer, a readout."""

    def __init__(self, width):
        super().__init__()
        self.embedding, self.hidden, self.head = (
            nn.Embedding(96, width),
            nn.Linear(width, width),
            nn.Linear(width, 96, bias=False),
        )

    def forward(self, tokens):
        return self.head(torch.relu(self.hidden(self.embedding(tokens))))


@pytest.fixture(scope="module")
def plan():
    return adopt(Network, 32, 16, torch.randint(96, (4, 64), generator=torch.Generator().manual_seed(0)))


def swept(plan, corpus, **changes):
    return adopted_sweep(plan, corpus=corpus, options=OPTIONS, **GRID | changes)


def test_a_cell_is_the_loop_by_hand(plan, corpus):
    frame = swept(plan, corpus, widths=(32,), tables=("mup",), lrs=(2.0**-7,), seeds=(1,))
    wide = plan.at(32)
    model = wide.initialise("mup", seed=1)
    optimizer = torch.optim.AdamW(wide.param_groups("mup", 2.0**-7, 1e-8, 0.0, (0.9, 0.95)), fused=True)
    peaks = [group["lr"] for group in optimizer.param_groups]
    data = TextData(corpus, torch.device("cpu"))
    order, losses = data.order([1], 6, 4, 64), []
    for step in range(6):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * lr_factor(step, 6, OPTIONS)
        batch = windows(data.train, order[step], 64)[0]
        loss = next_token_loss(model(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert frame.train_loss[0] == losses[-1]
    assert [record["step"] for record in frame.history[0]] == [3, 6]
    assert frame.history[0][-1]["train_loss"] == math.fsum(losses[3:]) / 3
    assert frame.val_loss[0] == frame.history[0][-1]["val_loss"]


def test_every_cell_has_its_row_and_the_base_is_trained_once(plan, corpus, tmp_path):
    store = tmp_path / "runs" / "network.jsonl"
    frame = swept(plan, corpus, store=store)
    assert len(frame) == 2 * 2 * 3 * 2
    lines = store.read_text().splitlines()
    assert len(lines) == 3 * 2 + 2 * 3 * 2  # the base width once, the other under two tables
    base = frame[frame.width == 16].set_index(["parametrization", "lr", "seed"]).val_loss
    assert base["as it is"].equals(base["mup"])
    report = transfer_report(frame)
    assert list(zip(report.parametrization, report.width, strict=True)) == [
        ("as it is", 16), ("as it is", 32), ("mup", 16), ("mup", 32),
    ]  # fmt: skip
    lr_curves(frame)
    read = read_adopted(store, 16)
    order = ["parametrization", "width", "lr", "seed"]
    expected = frame.sort_values(order).val_loss.tolist()
    assert read.sort_values(order).val_loss.tolist() == expected


def test_a_table_with_a_coefficient_has_a_base_of_its_own(plan, corpus, tmp_path):
    double, store = PARAMETRIZATIONS["mup"].replace("attention", "double", lr=2 / fan_in), tmp_path / "store.jsonl"
    frame = swept(plan, corpus, tables=("mup", double), lrs=(2.0**-7,), seeds=(0,), store=store)
    base = frame[frame.width == 16].set_index("parametrization").val_loss
    assert base["mup"] != base["double"]
    read = read_adopted(store, 16).set_index(["parametrization", "width"]).val_loss
    assert read.to_dict() == frame.set_index(["parametrization", "width"]).val_loss.to_dict()


def test_a_stopped_sweep_goes_on_where_it_was(plan, corpus, tmp_path, monkeypatch):
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    swept(plan, corpus, store=whole)
    part.write_text("".join(line + "\n" for line in whole.read_text().splitlines()[:7]))
    trained = []
    from minimoe import adopted_sweeps

    original = adopted_sweeps._trained
    monkeypatch.setattr(adopted_sweeps, "_trained", lambda *args: trained.append(args) or original(*args))
    swept(plan, corpus, store=part)
    assert len(trained) == 18 - 7
    without_time = [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in part.open()]
    assert without_time == [
        {name: value for name, value in json.loads(line).items() if name != "seconds"} for line in whole.open()
    ]


def test_processes_give_the_same_numbers(plan, corpus):
    one, two = (swept(plan, corpus, lrs=(2.0**-7,), n_jobs=jobs) for jobs in (1, 2))
    assert one.drop(columns="seconds").equals(two.drop(columns="seconds"))


def test_a_run_that_diverges_is_a_row_with_an_infinite_loss(plan, corpus):
    frame = swept(plan, corpus, widths=(32,), tables=("mup",), lrs=(1e30,), seeds=(0,))
    assert frame.diverged[0]
    assert math.isinf(frame.val_loss[0])


def test_bad_input_and_a_store_of_something_else(plan, corpus, tmp_path):
    store = tmp_path / "store.jsonl"
    for changes, message in (
        ({"widths": ()}, r"widths=\(\): is empty"),
        ({"lrs": (0.0,)}, r"lrs=\(0.0,\): must be positive and finite"),
        ({"steps": 0}, r"steps=0: must be a positive integer"),
    ):
        with pytest.raises(ValueError, match=message):
            swept(plan, corpus, **changes)
    swept(plan, corpus, lrs=(2.0**-7,), seeds=(0,), store=store)
    with pytest.raises(ValueError, match=r"store.jsonl holds runs of other settings \({'steps': 6}\)"):
        swept(plan, corpus, lrs=(2.0**-7,), seeds=(0,), steps=7, store=store)
    store.write_text("a thesis\n")
    with pytest.raises(ValueError, match=r"store.jsonl, line 1: it is no run of adopted_sweep"):
        swept(plan, corpus, store=store)
    assert store.read_text() == "a thesis\n"
