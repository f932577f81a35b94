"""Conditions on a frame's rows, as `minimoe report --where` takes them."""

import pandas as pd
import pytest

from minimoe import TrainOptions, sweep
from minimoe.__main__ import main
from minimoe.conditions import rows_where


@pytest.fixture(scope="module")
def rows():
    return pd.DataFrame(
        {"forced_balance": [True, False, False], "steps": [4, 4, 8], "lr": [2**-6, 2**-7, 2**-7], "corpus": ["a", "b", "a"],
         "clip": [None, 0.5, 1.0], "data_seed": [None] * 3, "betas": [(0.9, 0.95)] * 3, "history": [[], [], []]}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("condition", "expected"),
    [("forced_balance=False", [1, 2]), ("forced_balance=True", [0]), ("forced_balance=false", [1, 2]), ("steps=4", [0, 1]),
     ("lr=2^-7", [1, 2]), ("lr=0.015625", [0]), ("corpus=a", [0, 2]),
     ("clip=None", [0]), ("clip=0.5", [1]), ("data_seed=None", [0, 1, 2]),
     ("betas=(0.9, 0.95)", [0, 1, 2])],
)  # fmt: skip
def test_a_condition_is_read_by_its_column(rows, condition, expected):
    assert rows_where(rows, condition).index.tolist() == expected


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("forced_balance=maybe", "forced_balance must be True or False"),
        ("forced_balance=", "forced_balance must be True or False"),
        ("steps=4.5", "steps must be an integer"),
        ("steps=many", "steps must be an integer"),
        ("lr=2^x", "lr must be a number"),
        ("steps=5", "no row has it; steps is 4, 8"),
        ("corpus=c", "no row has it; corpus is a, b"),
        ("clip=7", "no row has it; clip is None, 0.5, 1.0"),
        ("steps", "steps must be an integer"),
        ("stepz=4", "write COLUMN=VALUE; the columns are forced_balance, steps"),
        ("history=1", "write COLUMN=VALUE; the columns are"),
    ],
)
def test_a_bad_condition_is_named(rows, condition, message):
    with pytest.raises(ValueError) as caught:
        rows_where(rows, condition)
    assert str(caught.value).startswith(f"--where {condition}: {message}")


def test_the_report_takes_several_conditions(corpus, tmp_path, capsys):
    store, tiny = str(tmp_path / "runs.jsonl"), {"depth": 1, "n_experts": 4, "context": 16, "n_jobs": 1, "progress": False}
    options, widths, lrs, reports = TrainOptions(batch_size=2, eval_batches=1), (32, 64), (0.01, 0.02, 0.03), []
    for forced_balance in (False, True):
        sweep(widths, "mup", lrs, steps=4, corpus=corpus, store=store, options=options, forced_balance=forced_balance, **tiny)
        alone = str(tmp_path / f"{forced_balance}.jsonl")
        sweep(widths, "mup", lrs, steps=4, corpus=corpus, store=alone, options=options, forced_balance=forced_balance, **tiny)
        assert main(["report", alone]) == 0
        reports.append(capsys.readouterr().out)
    assert reports[0] != reports[1]
    for forced_balance, report in zip((False, True), reports, strict=True):
        assert main(["report", store, "--where", f"forced_balance={forced_balance}", "n_experts=4"]) == 0
        assert capsys.readouterr().out == report
    assert main(["report", store, "--where", "forced_balance=perhaps"]) == 2
    assert capsys.readouterr().err == "minimoe: --where forced_balance=perhaps: forced_balance must be True or False\n"
