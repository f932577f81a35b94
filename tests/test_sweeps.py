"""Sweeps: the frame, shared runs, the store, resuming."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from minimoe import PARAMETRIZATIONS, TrainOptions, fan_in, identity, read_sweep, sweep, sweeps, training, transfer_report, width
from minimoe import store as store_module
from minimoe.model import Config
from minimoe.sweeps import run_key

TINY = {"steps": 6, "depth": 1, "n_experts": 4, "context": 16, "n_jobs": 1, "progress": False,
        "options": TrainOptions(batch_size=2, eval_batches=1)}  # fmt: skip
NEEDED = ["parametrization", "width", "depth", "n_experts", "top_k", "granularity", "lr", "seed", "steps", "train_loss",
          "val_loss", "diverged", "seconds", "corpus"]  # fmt: skip


EPS_TWICE = PARAMETRIZATIONS["mup"]
for role in EPS_TWICE.roles:
    EPS_TWICE = EPS_TWICE.replace(role, eps=2)


@pytest.fixture
def trained(monkeypatch):
    """The keys of the runs that were really trained."""
    keys = []
    original = sweeps.finished_runs
    monkeypatch.setattr(
        sweeps, "finished_runs", lambda cells, *rest: keys.extend(cell["key"] for cell in cells) or original(cells, *rest)
    )
    return keys


def same(one, two, but="seconds"):
    pd.testing.assert_frame_equal(one.drop(columns=but), two.drop(columns=but))


def test_one_row_per_cell_and_base_runs_trained_once(corpus, trained):
    frame = sweep((32, 64), ("sp", "simplep", "mup"), (0.01, 0.02), (0, 1), corpus=corpus, **TINY)
    assert len(frame) == 2 * 3 * 2 * 2
    assert set(NEEDED) <= set(frame.columns)
    assert len(trained) == len(set(trained)) == 4 + 3 * 4  # at the base width the three parametrizations are one run
    base = frame[frame.width == 32]
    for _, shared in base.groupby(["lr", "seed"]):
        assert set(shared.parametrization) == {"sp", "simplep", "mup"}
        assert shared.val_loss.nunique() == 1
    assert frame[frame.width == 64].groupby(["lr", "seed"]).val_loss.nunique().eq(3).all()
    assert all(len(history) == 6 for history in frame.history)


def test_runs_are_shared_by_their_numbers_and_never_by_their_width(corpus, trained):
    edited = PARAMETRIZATIONS["mup"].replace("router", lr=2)
    sweep((32,), ("mup", edited), (0.01,), corpus=corpus, **TINY)
    assert len(trained) == 2  # at the base width too, a coefficient other than 1 is another run
    trained.clear()
    spelled = PARAMETRIZATIONS["mup"].replace("attention", lr=1 / width)  # fan_in = width there: the same numbers
    frame = sweep((64,), ("mup", spelled), (0.01,), corpus=corpus, **TINY)
    assert len(trained) == 1
    assert set(frame.parametrization) == {"mup", "mup[attention.lr=1/width]"}


def test_a_second_sweep_skips_what_the_store_has(corpus, tmp_path, trained):
    store = tmp_path / "deep" / "runs.jsonl"
    first = sweep((32, 64), lrs=(0.01,), corpus=corpus, store=store, **TINY)
    count = len(trained)
    assert sum('"history"' in line for line in store.read_text().splitlines()) == count == 4
    again = sweep((32, 64), lrs=(0.01,), corpus=corpus, store=store, **TINY)
    assert len(trained) == count
    same(first, again, but=[])
    sweep((32, 64), lrs=(0.01, 0.02), corpus=corpus, store=store, **TINY)
    assert len(trained) == 2 * count


def test_parts_of_several_runs_lose_nothing_either(corpus, tmp_path, monkeypatch):
    """As on a GPU, where many runs finish together: a store that fails at the second still hands back all of them."""
    monkeypatch.setattr(training, "planned_size", lambda *_: 6)
    original = store_module.RunStore.append
    monkeypatch.setattr(
        store_module.RunStore, "append", lambda self, cell: original(self, cell) if not runs_in(self.path) else fail()
    )

    def fail():
        raise store_module.StoreError("the disk is full")

    store = tmp_path / "runs.jsonl"
    with pytest.raises(store_module.StoreError) as caught:
        sweep((64,), ("sp", "mup"), (0.01, 0.02, 0.03), corpus=corpus, store=store, **TINY)
    assert len(runs_in(store)) == 1
    assert len(caught.value.frame) == 6


def test_a_line_with_the_fields_of_an_older_version_is_the_same_cell(corpus, tmp_path):
    store = tmp_path / "runs.jsonl"
    small = {"n_jobs": 1, "progress": False, "context": 16, "store": store}
    sweep((32,), ("mup",), (2**-6,), (0,), 2, corpus, **small)
    cell = json.loads(store.read_text())
    cell["config"]["balance_times_k"] = False  # which older lines have
    del cell["options"]["base_steps"], cell["config"]["z_weight"], cell["crc"]  # which they may lack
    store.write_text(json.dumps(cell) + "\n")
    sweep((32,), ("mup",), (2**-6,), (0,), 2, corpus, **small)
    assert json.loads(store.read_text()) == cell, "no second line"


def test_labels_are_in_the_store_as_soon_as_their_run(corpus, tmp_path, monkeypatch):
    original = sweeps.finished_runs

    def stopped(cells, *rest):
        if cells[0]["config"]["width"] == 32:
            return original(cells, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeps, "finished_runs", stopped)
    monkeypatch.setattr(sweeps, "_cost", lambda cell: -cell["config"]["width"])
    with pytest.raises(KeyboardInterrupt):
        sweep((32, 64), lrs=(0.01,), corpus=corpus, store=tmp_path / "runs.jsonl", **TINY)
    assert set(read_sweep(tmp_path / "runs.jsonl").parametrization) == {"sp", "simplep", "mup"}


def test_a_stopped_sweep_goes_on_and_gives_the_same_frame(corpus, tmp_path, monkeypatch):
    whole = sweep((32, 64), lrs=(0.01, 0.02), corpus=corpus, **TINY)
    store = tmp_path / "runs.jsonl"
    original, calls = sweeps.finished_runs, []

    def interrupted(*job):
        calls.append(job)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*job)

    monkeypatch.setattr(sweeps, "finished_runs", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"3 of 8 runs are in .*runs.jsonl: the same call goes on from there"):
        sweep((32, 64), lrs=(0.01, 0.02), corpus=corpus, store=store, **TINY)
    assert len(store.read_text().splitlines()) == 3
    same(whole, sweep((32, 64), lrs=(0.01, 0.02), corpus=corpus, store=store, **TINY))
    assert len(calls) == 4 + 5


def test_processes_give_the_same_frame_as_one(corpus, tmp_path):
    fields = TINY | {"n_jobs": 2}
    one = sweep((32, 64), lrs=(0.01,), corpus=corpus, **TINY)
    edited = PARAMETRIZATIONS["sp"].replace("router", lr=1 / fan_in)
    two = sweep((32, 64), ("sp", "simplep", "mup", edited), lrs=(0.01,), corpus=corpus, **fields)
    same(one, two[two.parametrization != edited.name].reset_index(drop=True))


def test_the_frame_can_be_read_back_from_the_store(corpus, tmp_path):
    store = tmp_path / "runs.jsonl"
    edited = PARAMETRIZATIONS["simplep"].replace("router", lr=1 / fan_in)
    frame = sweep((32, 64), ("sp", "mup", edited), (0.01, 0.02), corpus=corpus, store=store, **TINY)
    order = ["parametrization", "width", "lr", "seed"]
    back = read_sweep(store)
    pd.testing.assert_frame_equal(
        frame.sort_values(order, ignore_index=True), back.sort_values(order, ignore_index=True), check_like=True
    )


def test_a_diverged_run_is_a_row_and_null_in_the_store(corpus, tmp_path):
    store = tmp_path / "runs.jsonl"
    frame = sweep((32,), ("mup",), (0.01, 1e30), corpus=corpus, store=store, **TINY)
    assert frame.diverged.tolist() == [False, True]
    assert frame.val_loss[1] == frame.train_loss[1] == math.inf
    assert math.isfinite(frame.val_loss[0])
    lines = [json.loads(line, parse_constant=pytest.fail) for line in store.read_text().splitlines()]
    assert sorted(line["val_loss"] is None for line in lines) == [False, True]
    same(frame, sweep((32,), ("mup",), (0.01, 1e30), corpus=corpus, store=store, **TINY))


def test_a_run_records_what_it_was(corpus, tmp_path):
    store = tmp_path / "runs.jsonl"
    sweep((64,), ("mup",), (0.01,), corpus=corpus, store=store, **TINY)
    (line,) = map(json.loads, store.read_text().splitlines())
    assert line["options"]["batch_size"] == 2
    assert line["corpus_digest"] == corpus.digest
    assert line["config"]["width"] == 64
    assert line["config"]["parametrization"]["rules"]["router"]["multiplier"] == [1.0, {"fan_in": -1.0}]
    assert {"torch", "python", "minimoe"} <= set(line["versions"])
    assert line["steps"] == 6
    assert {"step", "train_loss", "val_loss", "max_load", "idle_experts", "router_rms"} == set(line["history"][0])


def test_the_store_gives_back_every_row_of_every_sweep_and_no_other(corpus, tmp_path, trained):
    store = tmp_path / "runs.jsonl"
    first = sweep((32,), ("sp", "simplep", "mup"), (0.01,), corpus=corpus, store=store, **TINY)
    assert len(trained) == 1
    second = sweep((32,), ("sp",), (0.01, 0.02), (0, 1), corpus=corpus, store=store, **TINY)
    back = read_sweep(store)
    asked = {(r.parametrization, r.lr, r.seed) for frame in (first, second) for r in frame.itertuples()}
    assert sorted(asked) == sorted((r.parametrization, r.lr, r.seed) for r in back.itertuples())
    assert set(transfer_report(back).parametrization) == {"sp", "simplep", "mup"}


def test_two_tables_of_one_name_cannot_meet_in_a_store(corpus, tmp_path):
    one = PARAMETRIZATIONS["mup"].replace("router", name="mine", lr=1 / fan_in)
    two = PARAMETRIZATIONS["mup"].replace("router", name="mine", lr=2)
    sweep((64,), one, 0.01, corpus=corpus, store=tmp_path / "runs.jsonl", **TINY)
    with pytest.raises(ValueError, match="two different tables are called 'mine'"):
        sweep((64,), two, 0.01, corpus=corpus, store=tmp_path / "runs.jsonl", **TINY)


def test_numpy_grids_and_repeated_values(corpus):
    frame = sweep(np.array([32, 32]), "mup", np.array([0.01]), np.arange(2), corpus=corpus, **TINY | {"steps": np.int64(3)})
    assert frame[["width", "seed", "steps"]].to_numpy().tolist() == [[32, 0, 3], [32, 1, 3]]


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"config": Config(width=64, balance_weight=1)}, {"config": Config(width=64, balance_weight=1.0)}),
        ({"options": TrainOptions(weight_decay=0)}, {"options": TrainOptions(weight_decay=0.0)}),
        ({"options": TrainOptions(data_seed=0)}, {"options": TrainOptions()}),
        (
            {"config": Config(EPS_TWICE, width=64)},
            {"config": Config("mup", width=64), "options": TrainOptions(eps=2e-8)},
        ),
    ],
)
def test_what_training_cannot_tell_apart_is_one_run(one, two):
    usual = {"config": Config(width=64), "lr": 0.01, "steps": 6, "options": TrainOptions(), "corpus_digest": "text"}
    assert run_key(**usual | one) == run_key(**usual | two)


def runs_in(store):
    return [json.loads(line)["key"] for line in store.read_text().splitlines() if '"history"' in line]


def test_a_torn_last_line_is_cut_off_and_its_run_trained_again(corpus, tmp_path, trained):
    store = tmp_path / "runs.jsonl"
    first = sweep((32,), "mup", (0.01, 0.02), corpus=corpus, store=store, **TINY)
    store.write_bytes(store.read_bytes()[:-40])
    trained.clear()
    with pytest.warns(UserWarning, match=r"runs.jsonl: the last line was torn"):
        again = sweep((32,), "mup", (0.01, 0.02), corpus=corpus, store=store, **TINY)
    assert len(trained) == 1
    same(first, again)
    assert len(runs_in(store)) == 2


def test_a_damaged_line_is_named_by_its_number(corpus, tmp_path):
    store = tmp_path / "runs.jsonl"
    sweep((32,), "mup", (0.01, 0.02, 0.03), corpus=corpus, store=store, **TINY)
    lines = store.read_bytes().splitlines(keepends=True)
    cut = {"key": "k", "format": store_module.FORMAT, "history": []}
    wrong = {**json.loads(lines[1]), "config": {"width": 30}}
    for damage in (
        lines[1][:-30] + b"\n",
        b"[]\n",
        b'{"key": 1}\n',
        json.dumps(cut).encode() + b"\n",
        json.dumps(wrong).encode() + b"\n",
    ):
        store.write_bytes(lines[0] + damage + lines[2])
        with pytest.raises(ValueError, match=r"runs.jsonl, line 2 is damaged"):
            sweep((32,), "mup", (0.01,), corpus=corpus, store=store, **TINY)
        with pytest.raises(ValueError, match="line 2 is damaged"):
            read_sweep(store)


def test_a_store_that_cannot_be_written_is_an_error_before_training(corpus, tmp_path, trained):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"the run store .*file/runs.jsonl cannot be written"):
        sweep((32,), "mup", 0.01, corpus=corpus, store=tmp_path / "file" / "runs.jsonl", **TINY)
    assert not trained


def test_lines_of_another_format_are_other_runs(corpus, tmp_path, trained, monkeypatch):
    store = tmp_path / "runs.jsonl"
    for version in (store_module.FORMAT, store_module.FORMAT + 1):
        for module in (sweeps, store_module, identity):
            monkeypatch.setattr(module, "FORMAT", version)
        sweep((32,), "mup", 0.01, corpus=corpus, store=store, **TINY)
    assert len(trained) == len(set(trained)) == 2


SCRIPT = """
import sys
from minimoe import TrainOptions, sweep
if __name__ == "__main__":
    sweep((32, 64), ("sp", "mup"), (0.01, 0.02, 0.03), corpus=sys.argv[1], store=sys.argv[2], steps=60, depth=1, n_experts=4,
          context=16, n_jobs=int(sys.argv[3]), progress=False, options=TrainOptions(batch_size=8, eval_batches=1))
"""


@pytest.fixture
def started(tmp_path):
    """Start the same sweep in a process group of its own, on a store; returns the process."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 300)
    (tmp_path / "script.py").write_text(SCRIPT)

    def start(store, n_jobs):
        command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "text.txt"), str(store), str(n_jobs)]

        def hear_ctrl_c():  # a shell's background job, as CI may be, passes on that it does not
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hear_ctrl_c)

    return start


def wait_for_a_run(store, process):
    while process.poll() is None and not (store.exists() and store.read_bytes().count(b"\n")):
        time.sleep(0.01)


def test_a_killed_sweep_goes_on_and_gives_the_same_frame(tmp_path, started):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    assert started(whole, 2).wait() == 0
    process = started(broken, 2)
    wait_for_a_run(broken, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = runs_in(broken)
    assert 1 <= len(kept) < 9  # 3 at the base width, 2 x 3 at width 64
    assert started(broken, 1).wait() == 0
    assert runs_in(broken)[: len(kept)] == kept
    assert sorted(runs_in(broken)) == sorted(runs_in(whole))  # each once
    order = ["parametrization", "width", "lr"]
    one, two = (read_sweep(store).sort_values(order, ignore_index=True) for store in (whole, broken))
    same(one, two)


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_ctrl_c_ends_in_one_line_that_says_how_to_go_on(tmp_path, started, n_jobs):
    process = started(tmp_path / "runs.jsonl", n_jobs)
    wait_for_a_run(tmp_path / "runs.jsonl", process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    error = process.communicate()[1]
    assert process.returncode != 0
    assert error.strip().splitlines()[-1].startswith("KeyboardInterrupt: sweep stopped; ")
    assert "the same call goes on from there" in error
    assert error.count("Traceback") == 1  # of the script itself


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.02},
        {"steps": 7},
        {"corpus_digest": "other"},
        {"options": TrainOptions(batch_size=3)},
        {"config": Config(width=64, seed=1)},
        {"config": Config(width=64, gates="renormalized")},
        {"config": Config(width=64, base_width=64)},
        {"config": Config("sp", width=64)},
    ],
)
def test_whatever_changes_a_run_changes_its_identity(change):
    usual = {"config": Config(width=64), "lr": 0.01, "steps": 6, "options": TrainOptions(), "corpus_digest": "text"}
    assert run_key(**usual) == run_key(**usual)
    assert run_key(**usual) != run_key(**usual | change)


def test_vocabulary_comes_from_the_corpus(tmp_path):
    (tmp_path / "abc.txt").write_text("abcabcaabbcc" * 100)
    frame = sweep((32,), "mup", 0.01, corpus=tmp_path / "abc.txt", **TINY)
    assert frame.vocab_size.tolist() == [3]
    assert frame.corpus.tolist() == ["abc.txt"]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"widths": ()}, "width is empty"),
        ({"lrs": []}, "lrs is empty"),
        ({"seeds": ()}, "seeds is empty"),
        ({"parametrizations": ()}, "parametrizations is empty"),
        ({"lrs": (0.1, -1)}, "lr=-1.0: must be positive and finite"),
        ({"lrs": (math.nan,)}, "lr=nan"),
        ({"widths": (30,)}, "width=30: must be a multiple of head_size=16"),
        ({"parametrizations": ("mup", "np")}, "unknown parametrization 'np'; known: sp"),
        ({"context": 10**6}, "too short for context"),
        ({"n_jobs": 0}, "n_jobs=0: must be a positive integer"),
        ({"address": "tcp://host:1"}, "goes with backend='dask'"),
    ],
)
def test_bad_grids_are_refused_before_any_training(corpus, trained, tmp_path, grid, message):
    store = tmp_path / "runs.jsonl"
    with pytest.raises(ValueError, match=message):
        sweep(**{"widths": (32,), "lrs": (0.01,), "corpus": corpus, "store": store} | TINY | grid)
    assert not trained
    assert not store.exists()


def test_unknown_fields_and_borrowed_names_are_refused(corpus):
    with pytest.raises(TypeError, match=r"unknown field 'n_expert': Config has .*n_experts"):
        sweep((32,), corpus=corpus, n_expert=4)
    with pytest.raises(TypeError, match="'seed': give seeds instead"):
        sweep((32,), corpus=corpus, seed=4)
    one = PARAMETRIZATIONS["mup"].replace("router", name="mine", lr=1 / fan_in)
    two = PARAMETRIZATIONS["mup"].replace("router", name="mine", lr=2)
    with pytest.raises(ValueError, match="two different tables are called 'mine'"):
        sweep((32,), (one, two), corpus=corpus)
