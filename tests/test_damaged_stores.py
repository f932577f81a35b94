"""Damaged stores: nothing wrong in a line goes unsaid, and no file that is no store is touched."""

import copy
import json
import math
import random

import pandas as pd
import pytest

from minimoe import TrainOptions, read_sweep, sweep, sweeps
from minimoe.lines import DAMAGE, Lines, format_of
from minimoe.store import FORMAT, LineError, RunStore

TINY = {"steps": 4, "depth": 1, "n_experts": 4, "context": 16, "n_jobs": 1, "progress": False,
        "options": TrainOptions(batch_size=2, evals=2, eval_batches=1)}  # fmt: skip
LRS = (0.01, 0.02, 0.03)


@pytest.fixture(scope="session")
def original(corpus, tmp_path_factory):
    """The bytes of a store with three runs, a line each."""
    path = tmp_path_factory.mktemp("store") / "runs.jsonl"
    sweep((32,), "mup", LRS, corpus=corpus, store=path, **TINY)
    return path.read_bytes()


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


# What is no store


NO_STORES = [b"My thesis\nchapter 1", b"one line", b"\x00\x01\xff\n\x80", b"[1, 2]\n", b'{"a": 1}\n', b'{"a": 1', b"\n",
             b'{"format": "x", "key": 1}\n', b"\xef\xbb\xbf" + b'{"format": 2, "key": "k"}\n', b"{" * 100_000]  # fmt: skip


@pytest.mark.parametrize("content", NO_STORES)
def test_a_file_that_is_no_store_is_refused_and_left_as_it_is(corpus, tmp_path, content):
    path = tmp_path / "thesis.txt"
    path.write_bytes(content)
    for use in (lambda: again(path, corpus), lambda: read_sweep(path), RunStore(path).prepare):
        with pytest.raises(ValueError, match=r"thesis.txt.*line 1"):
            use()
    assert path.read_bytes() == content
    assert [*tmp_path.iterdir()] == [path]


def test_a_folder_is_no_store(corpus, tmp_path):
    with pytest.raises(OSError, match=r"the run store .* cannot be written: .* is not a file"):
        again(tmp_path, corpus)


def test_an_empty_file_is_a_new_store(corpus, tmp_path):
    (tmp_path / "runs.jsonl").touch()
    assert len(again(tmp_path / "runs.jsonl", corpus)) == len(read_sweep(tmp_path / "runs.jsonl")) == 3


# The last line


@pytest.mark.parametrize("kept", [1, 5, 11, 30, 1000])
def test_a_first_line_that_was_torn_is_cut_off(corpus, store, original, kept):
    store.write_bytes(original[:kept])
    with pytest.warns(UserWarning, match="the last line was torn"):
        assert len(again(store, corpus)) == 3
    assert len(read_sweep(store)) == 3


def test_a_whole_last_line_without_its_newline_is_a_row(corpus, store, original, monkeypatch):
    expected = read_sweep(store)
    store.write_bytes(original[:-1])
    pd.testing.assert_frame_equal(read_sweep(store), expected)
    assert store.read_bytes() == original[:-1], "reading changes nothing"
    with monkeypatch.context() as patch:
        patch.setattr(sweeps, "finished_runs", pytest.fail)
        again(store, corpus)
    assert store.read_bytes() == original
    again(store, corpus, lrs=(*LRS, 0.04))
    assert store.read_bytes().startswith(original)
    assert len(read_sweep(store)) == 4


def test_a_last_line_with_something_after_it_is_damaged_and_not_torn(corpus, store, original):
    store.write_bytes(original[:-1] + b"J")  # the newline with one other bit
    for use in (lambda: again(store, corpus), lambda: read_sweep(store)):
        with pytest.raises(LineError, match="line 3 is damaged"):
            use()
    assert store.read_bytes() == original[:-1] + b"J"


def test_a_torn_last_line_is_left_out_by_a_reader_who_says_so(store, original):
    store.write_bytes(original[:-40])
    with pytest.warns(UserWarning, match="line 3: the last line is not whole"):
        assert len(read_sweep(store)) == 2
    assert store.read_bytes() == original[:-40]


# Damage


def test_no_flipped_bit_of_a_line_changes_what_is_read(original):
    """Every bit; those that make a newline are in the next test."""
    line = original.splitlines()[1]
    right, silent = Lines().cell(line), 0
    for at in range(8 * len(line)):
        flipped = bytearray(line)
        flipped[at // 8] ^= 1 << at % 8
        if b"\n" in flipped:
            continue
        try:
            read = format_of(bytes(flipped)), Lines().cell(bytes(flipped))
        except DAMAGE:
            continue
        silent += 1
        assert read == (FORMAT, right)
    assert silent < 100  # in the name of the checksum itself


def test_no_flipped_bit_of_a_store_changes_its_frame(store, original):
    expected, draw = read_sweep(store), random.Random(0)
    to_newline = [8 * at + (byte ^ 10).bit_length() - 1 for at, byte in enumerate(original) if (byte ^ 10).bit_count() == 1]
    newlines = [8 * at + bit for at, byte in enumerate(original) if byte == 10 for bit in range(8)]
    refused = 0
    for at in [*newlines, *draw.sample(to_newline, min(20, len(to_newline))), *draw.sample(range(8 * len(original)), 150)]:
        flipped = bytearray(original)
        flipped[at // 8] ^= 1 << at % 8
        store.write_bytes(flipped)
        try:
            frame = read_sweep(store)
        except LineError:
            refused += 1
            continue
        pd.testing.assert_frame_equal(frame, expected)
    assert refused > 150


def put(*where):
    """A change: the last argument in the place that the others say."""
    *path, last, value = where

    def change(cell):
        for name in path:
            cell = cell[name]
        cell[last] = value

    return change


def without(*where):
    *path, last = where

    def change(cell):
        for name in path:
            cell = cell[name]
        del cell[last]

    return change


WRONG = [None, True, "text", -1, 1.5, [], {}, [[None]], {"a": {"b": None}}, 10**400, math.nan, math.inf]
SAME = {"lr": (1.5,), "train_loss": (None, -1, 1.5), "val_loss": (None, -1, 1.5), "seconds": (-1, 1.5), "diverged": (True,),
        "key": ("text",), "corpus": ("text",), "corpus_digest": ("text",)}  # fmt: skip
LABELS = ("format", "key", "config", "lr", "steps", "options", "corpus", "corpus_digest")
RESULTS = ("train_loss", "val_loss", "diverged", "seconds", "history")
VALUES = [(f"{name}={str(v)[:30]}", put(name, v)) for name in (*LABELS, *RESULTS) for v in WRONG if v not in SAME.get(name, ())
          and not (name == "format" and v == -1)]  # fmt: skip
VALUES = [case for case in VALUES if case[0] != "diverged=1.5"] + [("diverged=1.5", put("diverged", 1.5))]
LACKING = [(f"no {name}", without(name)) for name in (*LABELS, *RESULTS) if name != "history"]
NESTED = [
    *(
        (f"config.{name}={value}", put("config", name, value))
        for name in ("width", "seed", "n_experts")
        for value in ("a", 1.5, -1)
    ),
    ("config.seed", put("config", "seed", 2**63)),
    ("config.unknown", put("config", "unknown", 1)),
    ("parametrization=null", put("config", "parametrization", None)),
    ("rules=null", put("config", "parametrization", "rules", None)),
    ("rules=[]", put("config", "parametrization", "rules", [])),
    ("name=5", put("config", "parametrization", "name", 5)),
    ("a cell is null", put("config", "parametrization", "rules", "router", "lr", None)),
    ("a power is text", put("config", "parametrization", "rules", "router", "lr", [1.0, {"fan_in": "x"}])),
    ("a coefficient is text", put("config", "parametrization", "rules", "router", "lr", ["x", {}])),
    ("betas=null", put("options", "betas", None)),
    ("batch_size=text", put("options", "batch_size", "x")),
    ("unknown option", put("options", "unknown", 1)),
    ("no record", put("history", [])),
    ("a record is null", put("history", 0, None)),
    ("a record is a list", put("history", 0, [])),
    ("step=null", put("history", 0, "step", None)),
    ("step=1.5", put("history", 0, "step", 1.5)),
    ("a loss is text", put("history", 1, "val_loss", "x")),
    ("a loss is true", put("history", 1, "val_loss", True)),
    ("a list is null", put("history", 1, "max_load", None)),
    ("a list has text", put("history", 1, "router_rms", ["x"])),
    ("a list has lists", put("history", 1, "idle_experts", [[1]])),
    ("a record lacks a field", without("history", 0, "router_rms")),
]


def replaced(old, new):
    return lambda line: line.replace(old, new, 1)


RAW = [
    ("empty", lambda _: b""),
    ("cut", lambda line: line[:-30]),
    ("not UTF-8", replaced(b'"corpus": "', b'"corpus": "\xff')),
    ("BOM", lambda line: b"\xef\xbb\xbf" + line),
    ("NUL", lambda line: line[:50] + b"\x00" + line[50:]),
    ("1e999", replaced(b'"seconds": ', b'"seconds": 1e999, "s": ')),
    ("1e999 in history", replaced(b'"step": 2, "train_loss": ', b'"step": 2, "train_loss": 1e999, "s": ')),
    ("NaN in history", replaced(b'"step": 2, "train_loss": ', b'"step": 2, "train_loss": NaN, "s": ')),
    ("5000 digits", replaced(b'"steps": ', b'"steps": ' + b"1" * 5000)),
    ("a field twice", replaced(b'"lr": 0.0', b'"lr": 5.0, "lr": 0.0')),
    ("a config twice", replaced(b', "lr": 0.0', b', "config": {}, "lr": 0.0')),
    ("a seed twice", replaced(b'"seed": 0, ', b'"seed": 0, "seed": 1, ')),
    ("a result twice", replaced(b'"val_loss": ', b'"val_loss": 1.0, "val_loss": ')),
    ("a record's field twice", replaced(b'"step": 2, ', b'"step": 1, "step": 2, ')),
    ("deep lists", lambda _: b"[" * 100_000 + b"]" * 100_000),
    ("deep in a config", replaced(b'"width": ', b'"x": ' + b"[" * 50_000 + b"]" * 50_000 + b', "width": ')),
    ("two lines in one", lambda line: line + line),
    ("a list", lambda _: b"[]"),
    ("a number", lambda _: b"5"),
]
CASES = [(name, lambda line, change=change: on_cell(line, change)) for name, change in (*VALUES, *LACKING, *NESTED)] + RAW


def on_cell(line, change):
    cell = copy.deepcopy(json.loads(line))
    change(cell)
    return old_line(cell).strip()


@pytest.mark.parametrize("damage", [case[1] for case in CASES], ids=[case[0] for case in CASES])
def test_whatever_is_wrong_is_an_error_that_names_file_and_line(corpus, store, original, damage):
    lines = original.splitlines()
    lines[1] = damage(old_line(cell_of(lines[1])).strip())
    store.write_bytes(b"\n".join(lines) + b"\n")
    before = store.read_bytes()
    for use in (lambda: read_sweep(store), lambda: again(store, corpus)):
        with pytest.raises(ValueError, match=r"runs.jsonl, line 2 is damaged \(.*\): mend or delete that line"):
            use()
    assert store.read_bytes() == before


def test_the_same_fields_in_another_layout_are_the_same_row(store, original):
    expected, lines = read_sweep(store), original.splitlines()
    cell = cell_of(lines[1])
    lines[1] = json.dumps(dict(sorted(cell.items())), separators=(",", ":")).encode()
    store.write_bytes(b"\r\n".join(lines) + b"\r\n")
    pd.testing.assert_frame_equal(read_sweep(store), expected)
