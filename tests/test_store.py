"""The run store: what it refuses, what it keeps, and how little of it a sweep reads."""

import json
import os
import threading

import pandas as pd
import pytest

from minimoe import PARAMETRIZATIONS, TrainOptions, lines, read_sweep, sweep, sweeps
from minimoe.lines import History, Lines, written
from minimoe.store import LineError, RunStore, StoreError, stored_cells

TINY = {"steps": 4, "depth": 1, "n_experts": 4, "context": 16, "n_jobs": 1, "progress": False,
        "options": TrainOptions(batch_size=2, evals=2, eval_batches=1)}  # fmt: skip
LRS = (0.01, 0.02, 0.03)


@pytest.fixture(scope="session")
def original(corpus, tmp_path_factory):
    """The bytes of a store with three runs, a line each, in the order of LRS."""
    path = tmp_path_factory.mktemp("store") / "runs.jsonl"
    sweep((32,), "mup", LRS, corpus=corpus, store=path, **TINY)
    return b"".join(sorted(path.read_bytes().splitlines(keepends=True), key=lambda line: json.loads(line)["lr"]))


@pytest.fixture
def store(original, tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_bytes(original)
    return path


def again(store, corpus, **changes):
    return sweep(**{"widths": (32,), "parametrizations": "mup", "lrs": LRS, "corpus": corpus, "store": store} | TINY | changes)


def cell_of(line):
    """The cell as plain JSON, without its checksum, to be changed and written again as lines once were."""
    cell = json.loads(line)
    del cell["crc"]
    return cell


def old_line(cell):
    return json.dumps(cell).encode() + b"\n"


# One file, several names and several sweeps


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_file_is_locked_under_all_its_names(store, original, tmp_path, link):
    link(store, tmp_path / "other.jsonl")
    first, second = RunStore(store), RunStore(tmp_path / "other.jsonl")
    first.prepare()
    second.prepare()
    cell = json.loads(original.splitlines()[0]) | {"corpus": "another"}
    del cell["crc"]
    appending = threading.Thread(target=second.append, args=(cell,))
    with first._locked():
        appending.start()
        appending.join(0.3)
        assert appending.is_alive()
        assert store.read_bytes() == original
    appending.join()
    assert store.read_bytes() == original + written(cell)


ONE = PARAMETRIZATIONS["mup"].replace("router", name="mine", lr=2)
TWO = PARAMETRIZATIONS["mup"].replace("router", name="mine", lr=3)


def test_two_tables_of_one_name_meet_when_the_second_sweep_writes(corpus, store, monkeypatch):
    original = sweeps.finished_runs

    def overtaken(*job):
        monkeypatch.setattr(sweeps, "finished_runs", original)
        again(store, corpus, parametrizations=TWO, lrs=0.01)
        return original(*job)

    monkeypatch.setattr(sweeps, "finished_runs", overtaken)
    with pytest.raises(LineError, match=r"runs.jsonl, line 4: two different tables are called 'mine'") as caught:
        again(store, corpus, parametrizations=ONE, lrs=0.01)
    assert len(caught.value.frame) == 1, "what was trained is not lost"
    assert len(read_sweep(store)) == 4, "the store can still be read"


def test_two_tables_of_one_name_in_a_store_are_named_by_the_line(corpus, store, tmp_path):
    again(store, corpus, parametrizations=ONE, lrs=0.01)
    again(tmp_path / "other.jsonl", corpus, parametrizations=TWO, lrs=0.01)
    store.write_bytes(store.read_bytes() + (tmp_path / "other.jsonl").read_bytes())
    for use in (lambda: again(store, corpus), lambda: read_sweep(store)):
        with pytest.raises(LineError, match=r"runs.jsonl, line 5: two different tables are called 'mine': .* another name"):
            use()


def test_a_sweep_with_another_table_of_a_name_is_refused_before_training(corpus, store, monkeypatch):
    again(store, corpus, parametrizations=ONE, lrs=0.01)
    monkeypatch.setattr(sweeps, "finished_runs", pytest.fail)
    with pytest.raises(LineError, match=r"runs.jsonl, line 4: two different tables are called 'mine'"):
        again(store, corpus, parametrizations=TWO, lrs=0.01)


def changed(path, how, original):
    if how == "deleted":
        path.unlink()
    elif how == "renamed or moved away":
        path.rename(path.with_name("elsewhere"))
    else:
        path.write_bytes(original[:100])


@pytest.mark.parametrize(("how", "n_jobs"), [("deleted", 1), ("renamed or moved away", 1), ("truncated", 1), ("deleted", 2)])
def test_a_store_that_is_taken_away_in_mid_sweep_is_said_and_loses_nothing(corpus, store, original, monkeypatch, how, n_jobs):
    append = RunStore.append

    def taken_away(self, cell):
        append(self, cell)
        if self.trained() >= {cell["key"]} and cell["lr"] == 0.04:
            changed(store, how, original)

    monkeypatch.setattr(RunStore, "append", taken_away)
    with pytest.raises(StoreError, match=rf"the run store .*runs.jsonl was {how}.* put it back") as caught:
        again(store, corpus, lrs=(*LRS, 0.04, 0.05, 0.06), n_jobs=n_jobs)
    assert {*LRS, 0.04} <= {*caught.value.frame.lr}  # what had finished; others' turn may come first, or not at all
    assert store.exists() == (how == "truncated")


# Older lines


def test_lines_without_a_checksum_read_as_before(corpus, store, original, monkeypatch):
    expected = read_sweep(store)
    store.write_bytes(b"".join(old_line(cell_of(line)) for line in original.splitlines()))
    pd.testing.assert_frame_equal(read_sweep(store), expected)
    monkeypatch.setattr(sweeps, "finished_runs", pytest.fail)
    assert again(store, corpus).key.tolist() == expected.key.tolist()


def test_fields_of_an_older_version_mean_the_same_cell(corpus, store, original):
    expected, cells = read_sweep(store), [cell_of(line) for line in original.splitlines()]
    for cell in cells:
        cell["config"] |= {"balance_times_k": True, "balance_weight": cell["config"]["balance_weight"] / 2}  # top_k is 2
        del cell["options"]["base_steps"], cell["config"]["base_depth"]
    store.write_bytes(b"".join(map(old_line, cells)))
    pd.testing.assert_frame_equal(read_sweep(store), expected)
    before = store.read_bytes()
    again(store, corpus)
    assert store.read_bytes() == before, "no second line for a cell"


def test_lines_of_an_older_format_are_called_so(store, original):
    store.write_bytes(original.replace(b'{"format": 2', b'{"format": 1'))
    with pytest.raises(LineError, match=r"line 1 is damaged \(its checksum is wrong"):
        read_sweep(store)
    cells = [cell_of(line) | {"format": 1} for line in original.splitlines()]
    store.write_bytes(b"".join(old_line({"format": 1, "key": cell["key"]}) for cell in cells))
    with pytest.raises(ValueError, match=r"holds no runs of format 2, only lines of format 1: an older version wrote them"):
        read_sweep(store)
    store.write_bytes(store.read_bytes() + original)
    assert len(read_sweep(store)) == 3


# How much is read


def test_a_small_sweep_builds_only_what_it_needs(corpus, tmp_path, original, monkeypatch):
    """200 lines, of which a sweep wants two runs."""
    store, cell = tmp_path / "large.jsonl", cell_of(original.splitlines()[0])
    others = (written({**cell, "key": f"{i:032x}", "lr": 1 + i / 7, "config": cell["config"] | {"seed": i}}) for i in range(197))
    store.write_bytes(b"".join(others) + original)
    built, checked, cell_read, parsed = [], [], Lines.cell, lines.config_from_dict
    monkeypatch.setattr(Lines, "cell", lambda self, line: built.append(line) or cell_read(self, line))
    monkeypatch.setattr(lines, "config_from_dict", lambda data: checked.append(data) or parsed(data))
    assert len(again(store, corpus, lrs=LRS[:2])) == 2
    assert {line for line in built if b'"history"' in line} == {*original.splitlines()[:2]}
    assert len(checked) == 1, "a config is checked once, whatever the seed and the LR"


def test_a_stored_history_is_its_records(corpus, store, original):
    fresh, stored = sweep((32,), "mup", LRS, corpus=corpus, **TINY), read_sweep(store)
    for one, two in zip(fresh.history, stored.history, strict=True):
        assert isinstance(two, History)
        assert one == two
        assert two == one
        assert [*two] == one
        assert two[-1] == one[-1]
        assert two[:1] == one[:1]
        assert len(two) == len(one)
        assert repr(two) == repr(one)
    assert stored.history[0] != stored.history[1]
    runs, cells = stored_cells(store)
    assert [cell["key"] for cell in cells] == [*runs]


def test_a_store_of_a_published_table_that_was_edited_since_is_not_called_damaged(store, monkeypatch):
    monkeypatch.setitem(PARAMETRIZATIONS, "mup", PARAMETRIZATIONS["mup"].replace("router", name="mup", lr=2))
    with pytest.raises(LineError, match=r"runs.jsonl, line 1: two different tables are called 'mup'"):
        read_sweep(store)
