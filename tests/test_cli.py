"""The command line, end to end at a tiny size, and its one-line errors."""

import json
import re
import subprocess
import sys

import pandas as pd
import pytest

from minimoe.__main__ import main
from minimoe.flags import numbers

TINY = ["--depth", "1", "--n-experts", "4", "--context", "16", "--steps", "6", "--batch-size", "2", "--eval-batches", "1"]


def test_a_tiny_sweep_end_to_end(tmp_path, text, capsys):
    store, figure = str(tmp_path / "runs.jsonl"), tmp_path / "figures" / "curves.png"
    grid = ["--widths", "32", "64", "--lrs", "2^-8:2^-4:2", "--jobs", "1", "--corpus", text, "--store", store]
    assert main(["sweep", *grid, *TINY, "--figure", str(figure)]) == 0
    out = capsys.readouterr().out
    assert "drift (octaves)" in out
    assert "mup: from width 32 to 64 the best LR moves by" in out
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert main(["report", store, "--where", "steps=6"]) == 0
    again = capsys.readouterr().out
    assert again.split("figure")[0].strip() == out.split("figure")[0].strip()


def test_train_save_and_sample(tmp_path, text, capsys):
    model = str(tmp_path / "model.pt")
    assert main(["train", "--width", "32", "--lr", "2^-6", "--corpus", text, "--save", model, *TINY]) == 0
    assert "validation loss" in capsys.readouterr().out
    assert main(["sample", model, "--corpus", text, "--prompt", "the ", "--length", "20"]) == 0
    written = capsys.readouterr().out
    assert written.startswith("the ")
    assert len(written) == len("the ") + 20 + 1


def test_explain_prints_table_and_tensors(capsys):
    assert main(["explain", "--width", "128", "--parametrization", "simplep", "mup"]) == 0
    out = capsys.readouterr().out
    assert "1/fan_in" in out
    router = next(line for line in out.splitlines() if line.startswith("blocks.1.moe.router"))
    assert router.count("*") == 4  # init std and multiplier, in both
    assert "not as muP wants it" in out  # SimpleP's router


def test_coords_prints_exponents_and_names_the_wrong_cell(tmp_path, text, capsys):
    figure, csv = tmp_path / "coords.png", tmp_path / "coords.csv"
    small = [
        "--widths",
        "32",
        "64",
        "128",
        "--steps",
        "2",
        "--seeds",
        "0",
        "1",
        "--jobs",
        "1",
        "--corpus",
        text,
        "--context",
        "16",
    ]
    outputs = ["--figure", str(figure), "--csv", str(csv)]
    assert main(["coords", "--parametrization", "mup", "simplep", *small, *outputs]) == 0
    out = capsys.readouterr().out
    assert "mup: every init, update and allocation keeps muP's desiderata" in out
    assert "simplep: router.lr is too large by width^+" in out
    assert figure.stat().st_size > 10_000
    assert set(pd.read_csv(csv).parametrization) == {"mup", "simplep"}


def test_coords_along_any_size(tmp_path, text, capsys):
    small = ["--seeds", "0", "--steps", "1", "--corpus", str(text), "--context", "16", "--jobs", "1"]
    small += ["--figure", str(tmp_path / "coords.png")]
    assert main(["coords", "--along", "depth", "--sizes", "1", "2", "--widths", "32", *small]) == 0
    said = capsys.readouterr().out
    assert "mup: exponents in the depth" in said
    assert re.search(r"sum +router +[-+.\d]+ \(\+0\.5\)", said)
    assert main(["coords", "--along", "n-experts", "--sizes", "4", "8", "--widths", "32", *small]) == 0
    assert "mup: exponents in the n_experts" in capsys.readouterr().out
    assert main(["coords", "--path", "width=32,64", "depth=1,2", *small]) == 0
    assert "mup: exponents in the width" in capsys.readouterr().out
    assert main(["coords", "--along", "width", "--sizes", "32", "64", "--n-experts", "4", *small]) == 0
    assert "the allocations add up to" in capsys.readouterr().out


def test_coords_over_granularities_shows_the_experts_share_of_the_learning(tmp_path, text, capsys):
    small = ["--widths", "32", "--granularity", "1", "2", "4", "--base-granularity", "1", "--seeds", "0", "--steps", "1"]
    outputs = ["--figure", str(tmp_path / "coords.png"), "--corpus", str(text), "--context", "16", "--jobs", "1"]
    assert main(["coords", *small, *outputs]) == 0
    said = capsys.readouterr().out
    assert "mup: exponents in the granularity" in said
    assert re.search(r"tensor +init +update +allocation", said)
    assert re.search(
        r"0 +up +[-+.\d]+ \(\+0\.0\) +[-+.\d]+ \(\+0\.0\) +[-+.\d]+ \(-0\.5\)", said
    )  # through initial outer weights
    assert (tmp_path / "coords.png").stat().st_size > 10_000


@pytest.mark.parametrize("command", [[], ["demo"], ["train"], ["sweep"], ["report"], ["coords"], ["explain"], ["sample"]])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([*command, "--help"])
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert "usage" in out
    if command == ["train"]:  # each flag says what its field's comment says
        assert "experts that serve one token" in " ".join(out.split())
        assert "largest gradient norm" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--width", "40"], "width=40: must be a multiple of head_size=16"),
        (["train", "--top-k", "9"], "top_k=9: must be at most n_experts=8"),
        (["train", "--lr", "-1"], "lr=-1.0: must be positive and finite"),
        (["train", "--parametrization", "np"], "unknown parametrization 'np'; known: sp, simplep, mup"),
        (["train", "--corpus", "missing.txt"], "no corpus 'missing.txt'"),
        (["train", "--gates", "renormalized", "--top-k", "1"], "no task gradient would reach the router"),
        (["sweep", "--widths", "32", "--parametrizations", "np"], "unknown parametrization"),
        (["sweep", "--warmup", "2"], "warmup=2.0"),
        (["report", "missing.jsonl"], "no run store at missing.jsonl"),
        (["sample", "missing.pt"], "missing.pt"),
        (["explain", "--granularity", "3"], "granularity=3"),
        (["coords", "--figure", "README.md/coords.png"], "README.md"),
        (["explain", "--lr", "0"], "lr=0.0: must be positive and finite"),
        (["coords", "--widths", "64"], "a slope over the width needs at least two"),
        (["train", "--device", "tpu"], "device='tpu' is not available here"),
        (["train", "--save", "."], "--save . cannot be written: Is a directory"),
        (["train", "--save", ""], "--save='': must name a file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys, pydocs):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("minimoe: ")
    assert error.count("\n") == 1


WORDS = ["sweep --lrs ten", "sweep --lrs 1:2:0", "sweep --lrs 0:1", "sweep --lrs 2^-8:inf", "sweep --lrs 2^-3:2^-8",
         "train --width x", "train --lr 2^99999", "train --lr 0^-1", "nonsense", ""]  # fmt: skip


@pytest.mark.parametrize("words", WORDS)
def test_bad_words_are_one_line_too(words, capsys):
    with pytest.raises(SystemExit) as done:
        main(words.split())
    assert done.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("minimoe: ")
    assert error.count("\n") == 1


def test_lrs_are_numbers_and_ranges_of_octaves():
    assert numbers("0.01") == (0.01,)
    assert numbers("2^-6.5") == (2**-6.5,)
    assert numbers("2^-8:2^-5") == (2**-8, 2**-7, 2**-6, 2**-5)
    assert numbers("2^-6:2^-5:0.5") == pytest.approx((2**-6, 2**-5.5, 2**-5))


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "minimoe", "explain", "--width", "30"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "minimoe: width=30: must be a multiple of head_size=16\n"


def test_any_option_with_several_values_is_an_axis(tmp_path, text, capsys):
    small = ["--context", "16", "--steps", "2", "--eval-batches", "1", "--lrs", "2^-8:2^-4:2", "--jobs", "1"]
    small += ["--corpus", text, "--parametrizations", "mup", "--store", str(tmp_path / "runs.jsonl")]
    assert main(["sweep", "--widths", "32", "--depth", "1", "2", *small]) == 0
    assert "from depth 1 to 2 the best LR moves by" in capsys.readouterr().out
    assert main(["sweep", "--widths", "32", "--batch-size", "2", "4", *small]) == 0
    assert "from batch_size 2 to 4 the best LR moves by" in capsys.readouterr().out
    path = ["--path", "width=32,64", "n-experts=4,8"]
    assert main(["sweep", *path, *small]) == 0
    assert "from width 32 to 64 the best LR moves by" in capsys.readouterr().out
    assert main(["sweep", *path, "--n-experts", "4", *small]) == 2
    assert "n_experts: give it on the path or by itself, not both" in capsys.readouterr().err


def test_two_axes_are_trained_and_the_report_is_left_to_the_reader(tmp_path, text, capsys):
    small = ["--context", "16", "--steps", "2", "3", "--batch-size", "2", "--eval-batches", "1", "--lrs", "2^-6", "--jobs", "1"]
    store = str(tmp_path / "runs.jsonl")
    grid = ["--widths", "32", "64", "--parametrizations", "mup", "--corpus", text, "--store", store]
    assert main(["sweep", *grid, *small]) == 0
    assert f"minimoe report {store} --by width --where steps=..." in capsys.readouterr().out
    assert main(["report", store, "--by", "steps", "--where", "width=32"]) == 0
    assert "from steps 2 to 3" in capsys.readouterr().out


@pytest.fixture
def own_model(tmp_path, monkeypatch):
    """A module in the current folder, with a function that makes a model at a width."""
    text = """
from torch import nn
class Model(nn.Sequential):
    def __init__(self, width):
        super().__init__(nn.Embedding(10, width), nn.Linear(width, width), nn.Linear(width, 10, bias=False))
        self.config = type("Config", (), {"vocab_size": 10})()
build, number = Model, 3
"""
    (tmp_path / "own_model_of_a_test.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    return "own_model_of_a_test:build"


def test_explain_shows_what_a_table_makes_of_a_model_of_yours(own_model, capsys):
    assert main(["explain", own_model, "--width", "64", "--base-width", "16", "--parametrization", "simplep", "mup"]) == 0
    out = capsys.readouterr().out
    assert "simplep:" in out
    assert re.search(r"2.weight +unembedding +output +\(10, 64\) +64 +4 +0.25 +0.25", out)
    assert "multipliers are folded" in out


def test_explain_writes_json_for_other_trainers(own_model, capsys):
    assert main(["explain", own_model, "--width", "64", "--base-width", "16", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["0.weight", "1.weight", "1.bias", "2.weight"]
    assert rows[3]["lr"] == 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["own_model_of_a_test:build"], "--width and --base-width"),
        (["own_model_of_a_test:build", "--width", "64"], "--width and --base-width=(64, None): are both needed"),
        (["--json"], "--json=True: is for a model of yours"),
        (["own_model_of_a_test", "--width", "64", "--base-width", "16"], "must be MODULE:FUNCTION"),
        (["own_model_of_a_test:make", "--width", "64", "--base-width", "16"], "has no attribute 'make'"),
        (["own_model_of_a_test:number", "--width", "64", "--base-width", "16"], "names no function"),
        (["no_such_module:build", "--width", "64", "--base-width", "16"], "No module named 'no_such_module'"),
    ],
)
def test_explain_of_a_model_that_is_not_there(own_model, arguments, message, capsys):
    assert main(["explain", *arguments]) == 2
    assert message in capsys.readouterr().err
