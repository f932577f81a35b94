"""Sweeps: the frame, shared runs, the store, resuming."""

import json
import math

import pandas as pd
import pytest

from minimoe import PARAMETRIZATIONS, TrainOptions, fan_in, read_sweep, sweep, sweeps, width
from minimoe.model import Config
from minimoe.sweeps import run_key

TINY = {"steps": 6, "depth": 1, "n_experts": 4, "context": 16, "n_jobs": 1, "progress": False,
        "options": TrainOptions(batch_size=2, eval_batches=1)}  # fmt: skip
NEEDED = ["parametrization", "width", "depth", "n_experts", "top_k", "granularity", "lr", "seed", "steps", "train_loss",
          "val_loss", "diverged", "seconds", "corpus"]  # fmt: skip


@pytest.fixture
def trained(monkeypatch):
    """The keys of the runs that were really trained."""
    keys = []
    original = sweeps._run_row
    monkeypatch.setattr(sweeps, "_run_row", lambda key, *rest: keys.append(key) or original(key, *rest))
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
    assert len(store.read_text().splitlines()) == count == 4
    again = sweep((32, 64), lrs=(0.01,), corpus=corpus, store=store, **TINY)
    assert len(trained) == count
    same(first, again, but=[])
    sweep((32, 64), lrs=(0.01, 0.02), corpus=corpus, store=store, **TINY)
    assert len(trained) == 2 * count


def test_a_stopped_sweep_goes_on_and_gives_the_same_frame(corpus, tmp_path, monkeypatch):
    whole = sweep((32, 64), lrs=(0.01, 0.02), corpus=corpus, **TINY)
    store = tmp_path / "runs.jsonl"
    original, calls = sweeps._run_row, []

    def interrupted(*job):
        calls.append(job)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*job)

    monkeypatch.setattr(sweeps, "_run_row", interrupted)
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
    assert line["corpus_digest"] == corpus.digest
    assert line["config"]["width"] == 64
    assert line["config"]["parametrization"]["rules"]["router"]["multiplier"] == [1.0, {"fan_in": -1.0}]
    assert {"torch", "python", "minimoe"} <= set(line["versions"])
    assert {"step", "train_loss", "val_loss", "max_load", "idle_experts", "router_rms"} == set(line["history"][0])


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.02},
        {"steps": 7},
        {"corpus_digest": "other"},
        {"options": TrainOptions(batch_size=3)},
        {"config": Config(width=64, seed=1)},
        {"config": Config(width=64, renormalize=True)},
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
        ({"widths": ()}, "widths is empty"),
        ({"lrs": []}, "lrs is empty"),
        ({"seeds": ()}, "seeds is empty"),
        ({"parametrizations": ()}, "parametrizations is empty"),
        ({"lrs": (0.1, -1)}, "lr=-1.0: must be positive and finite"),
        ({"lrs": (math.nan,)}, "lr=nan"),
        ({"widths": (30,)}, "width=30: must be a multiple of head_size=16"),
        ({"parametrizations": ("mup", "np")}, "unknown parametrization 'np'; known: sp"),
        ({"context": 10**6}, "too short for context"),
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
