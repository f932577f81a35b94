"""The benchmarks run: the GPU's command from end to end at toy sizes, and the others' parts. No time is asserted."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minimoe import read_sweep

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def command(*arguments):
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, "-W", "ignore", *map(str, arguments)]
    return subprocess.run(line, check=True, capture_output=True, text=True, env=settings).stdout


def gpu_day(folder, *arguments):
    paths = ("--results", folder / "results.md", "--records", folder / "gpu.jsonl", "--sweeps", folder)
    return command(BENCHMARKS / "gpu.py", *arguments, *paths)


def test_the_gpus_day_runs_at_toy_sizes_and_does_nothing_twice(tmp_path):
    (tmp_path / "results.md").write_text("# Results\n")
    assert "left: nothing" in gpu_day(tmp_path, "--all", "--tiny", "--device", "cpu")
    results = (tmp_path / "results.md").read_text()
    assert results.startswith("# Results\n")
    assert all(title in results for title in ("The step:", "Runs at once:", "Granularity:", "Number of experts:", "--all"))
    records = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert {record["kind"] for record in records} == {"step", "runs", "granularity", "experts"}
    granularity = read_sweep(tmp_path / "gpu_granularity.jsonl")
    assert set(granularity.dtype) == {"bfloat16"}
    assert set(granularity.granularity) == {1, 2}
    experts = read_sweep(tmp_path / "gpu_expert_count.jsonl")
    assert {(row.n_experts, row.top_k) for row in experts.itertuples()} == {(4, 2), (4, 1), (8, 2)}
    files = {path: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".lock"}
    assert "0 parts done" in gpu_day(tmp_path, "--all", "--tiny", "--device", "cpu")
    assert files == {path: path.read_bytes() for path in files}


def test_a_budget_that_is_too_small_leaves_everything_and_says_so(tmp_path):
    said = gpu_day(tmp_path, "--tiny", "--device", "cpu", "--minutes", "0")
    assert said.startswith("0 parts done")
    assert "width 32, float32, compiled" in said
    assert not (tmp_path / "results.md").exists()


def test_without_a_gpu_nothing_is_measured(tmp_path):
    assert gpu_day(tmp_path, "--all") == "no GPU here: nothing measured\n"
    assert not list(tmp_path.iterdir())


def test_the_users_loop_and_the_sweep_both_run(monkeypatch):
    """The two programs that benchmarks/sweep.py times, as short as they can be."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import sweep

    for script in (sweep.LOOP, sweep.SWEEP):
        command("-c", script.format(width=32, steps=1))


def test_memory_is_measured_by_a_process_for_each_number_of_experts(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import memory

    step, weights = map(float, command("-c", memory.CHILD, 8, 2).split())
    assert step > 0
    assert weights == pytest.approx(4.3, abs=0.5)


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.name)
def test_a_benchmark_uses_public_names_only(path):
    source = path.read_text()
    scripts = [
        node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    programs = [source, *(text for text in scripts if "import torch" in text or ("from minimoe" in text and "\n" in text))]
    for program in programs:
        for node in ast.walk(ast.parse(program)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("minimoe"):
                assert not [name.name for name in node.names if name.name.startswith("_")]
