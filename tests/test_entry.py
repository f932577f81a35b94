"""The command line as a process: Ctrl-C at any moment, readers that go away, and words that make no sense."""

import os
import shlex
import signal
import subprocess
import sys
import time
import warnings

import pytest

from minimoe import __main__ as commands
from minimoe.entry import STOPPED, UNREAD, main

MINIMOE = [sys.executable, "-m", "minimoe"]
BIG = "9" * 400


def started(*arguments, **settings):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | settings
    return subprocess.Popen([*MINIMOE, *map(str, arguments)], **pipes)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return str(path)


@pytest.mark.parametrize("seconds", [0.25, 0.5, 0.8, 1.2, 1.7])
def test_ctrl_c_during_the_imports_is_one_line(seconds):
    process = started("explain", "--depth", 3000)
    time.sleep(seconds)  # half the imports take longer than the last of these
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == STOPPED == 130
    assert said == "\nminimoe: stopped\n"


@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_in_coords_is_one_line(jobs, text, tmp_path):
    small = ["--widths", 32, 64, "--corpus", text, "--context", 16, "--seeds", *range(30), "--jobs", jobs]
    figure = tmp_path / "coords.png"
    process = started("coords", *small, "--steps", 50, "--figure", figure, start_new_session=True)
    time.sleep(7)
    os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C goes to the workers too
    _, said = process.communicate(timeout=60)
    assert process.returncode == STOPPED
    assert said == "\nminimoe: stopped\n"
    assert not figure.exists()


@pytest.mark.parametrize("name", ["explain", "report", "train", "coords"])
def test_ctrl_c_in_any_command_says_stopped(name, monkeypatch, capsys):
    def stopped(_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, f"_{name}", stopped)
    assert main([name, *(["store"] if name == "report" else [])]) == STOPPED
    assert capsys.readouterr().err == "\nminimoe: stopped\n"


def test_a_reader_that_goes_away_is_no_error():
    process = started("explain", "--depth", 60)
    assert process.stdout.readline() == "mup\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == UNREAD == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        process = started("explain", stdout=full)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert said == "minimoe: the output or a file cannot be read or written: [Errno 28] No space left on device\n"


FAILURES = [
    (MemoryError(), "not enough memory: give smaller sizes or a smaller corpus", 2),
    (OSError(), "OSError", 2),
    (OverflowError("int too large"), "int too large", 2),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . not enough memory\nException raised from x at ../c10/y.cpp"),
     ". not enough memory", 2),
    (ValueError(f"width={BIG}: too large"), "width=999999999999... (400 digits): too large", 2),
    (AttributeError("no such thing"), "a fault of minimoe itself, AttributeError: no such thing "
     "(python -X dev -m minimoe shows where)", 1),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "code"), FAILURES)
def test_every_failure_is_one_line_with_words(error, message, code, monkeypatch, capsys):
    def fails(_options):
        raise error

    monkeypatch.setattr(commands, "_explain", fails)
    assert main(["explain"]) == code
    assert capsys.readouterr().err == f"minimoe: {message}\n"


def test_a_warning_is_one_line_too(monkeypatch, capsys):
    monkeypatch.setattr(commands, "_explain", lambda _options: warnings.warn("look out", stacklevel=1))
    assert main(["explain"]) == 0
    assert capsys.readouterr().err == "minimoe: warning: look out\n"


TINY = "--corpus {text} --steps 2 --context 16 --batch-size 2"
HOSTILE = [
    *((f"train --{name} {value}", name)
      for name in ("width", "depth", "n-experts", "top-k", "context", "expert-ratio", "base-width", "steps", "seed", "evals")
      for value in (BIG, "x", "1.5", "99999999999999999999", "-1")),
    *((f"train {TINY} --{name}={value}", name)
      for name in ("lr", "warmup", "clip", "eps", "z-weight") for value in ("x", "2^x", "nan", "-2^0.5", BIG)),
    *((f"train {TINY} --{name} {value}", name)
      for name in ("width", "depth", "n-experts", "expert-ratio", "batch-size", "steps", "eval-batches")
      for value in ("1600000000", "9223372036854775792")),
    ("train --device mps", "device"),
    ("train --device meta", "device"),
    ("sweep --depth 100000000", "depth"),
    (f"sweep --widths {BIG}", "--widths"),
    (f"sweep --seeds {BIG}", "--seeds"),
    ("sweep --lrs 1e-300:1e300:0.01", "--lrs"),
    ("sweep --lrs 2^-9:2^-3:0.001", "--lrs"),
    ("sweep --path width=a,b", "--path"),
    ("sweep --path nope=1", "--path"),
    ("sweep --by nope", "--by"),
    ("sweep --figure {folder}", "--figure"),
    ("sweep --figure {folder}/x.jsonl", "--figure"),
    ("sweep --figure {text}/x.png", "--figure"),
    ("demo --figure {folder}", "--figure"),
    ("report missing.jsonl --by nope", "--by"),
    ("report missing.jsonl --figure {folder}/", "--figure"),
    ("coords --along lr --sizes 1 2", "--along"),
    ("coords --along parametrization --sizes 1 2", "--along"),
    ("coords --along depth --sizes 1 100000000 --figure {folder}/c.png", "depth"),
    ("coords --csv {folder}", "--csv"),
    ("coords --figure {folder}", "--figure"),
    ("explain --depth 100000000", "depth"),
    ("explain --width 1600000000", "width"),
    ("explain --context 9000000000000000000", "context"),
    ("explain --n-experts 9223372036854775807", "n_experts"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "field"), HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_line_is_refused_at_once_with_the_fields_name(line, field, text, tmp_path, capsys, pydocs):
    words, start = shlex.split(line.format(text=text, folder=tmp_path)), time.perf_counter()
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    assert time.perf_counter() - start < 5
    said = capsys.readouterr().err
    assert code == 2
    assert said.startswith("minimoe: ")
    assert said.count("\n") == 1
    assert len(said) < 700
    assert field in said or field.replace("-", "_") in said


def test_a_figure_without_an_ending_is_a_png_and_is_said_to_be_one(text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--widths", "32", "64", "--lrs", "2^-8:2^-4:2", "--jobs", "1", "--corpus", text, "--parametrizations", "mup"]
    small += ["--context", "16", "--steps", "2", "--batch-size", "2", "--eval-batches", "1", "--depth", "1"]
    assert main(["sweep", *small, "--figure", "curves"]) == 0
    assert "figure: curves.png" in capsys.readouterr().out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_evals_beyond_the_steps_are_one_for_each_step(text, capsys):
    assert main(["train", *shlex.split(TINY.format(text=text)), "--width", "32", "--evals", "1000000000"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 + 1
