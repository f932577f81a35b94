"""Kill sweeps, and savings of a model, at random moments, and look whether anything is lost: `python tools/kills.py --times 200`.

Each sweep goes on with the store that the killed one left. When a grid is done, its store is compared with an uninterrupted
sweep, and another grid begins. tests/test_durability.py does this until one grid is done; tests/test_saved.py kills ten savings.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from pathlib import Path

import pandas as pd

from minimoe import Config, MiniMoE, TrainOptions, make_corpus, read_sweep, sweep, sweeps

GRID = {"widths": (32, 64), "parametrizations": ("sp", "mup"), "lrs": (0.005, 0.01, 0.02), "seeds": (0, 1)}
RUNS = 18  # 6 at the base width, 2 x 6 at width 64
TINY = {"steps": 12, "depth": 1, "n_experts": 4, "context": 16, "n_jobs": 1, "progress": False, "device": "cpu",
        "options": TrainOptions(batch_size=4, eval_batches=1)}  # fmt: skip
ORDER = ["parametrization", "width", "lr", "seed"]
PATIENCE = 60  # seconds in which a sweep must begin a run


def keys_in(store: Path) -> list[str]:
    """The keys of the finished runs, as the file has them: one that is there twice is there twice."""
    lines = store.read_bytes().split(b"\n")[:-1] if store.exists() else []  # the last one may be half a line
    return [json.loads(line)["key"] for line in lines if b'"history"' in line]


def assert_same(one: pd.DataFrame, two: pd.DataFrame) -> None:
    one, two = (frame.sort_values(ORDER, ignore_index=True).drop(columns="seconds") for frame in (one, two))
    pd.testing.assert_frame_equal(one, two)


def logged_sweep(log, store, corpus) -> None:
    """The sweep, writing down the key of each run whose training it begins."""
    original = sweeps.finished_runs

    def logging(cells, *rest):
        with open(log, "a") as file:
            file.write("".join(cell["key"] + "\n" for cell in cells))
        return original(cells, *rest)

    sweeps.finished_runs = logging
    sweep(**GRID, **TINY, corpus=corpus, store=store)


def fresh_processes():
    """Processes forked from a clean one that has imported the package: they start at once, and hold nobody's threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["minimoe.sweeps", "minimoe.model", "torch._dynamo"])  # which torch.optim would import, slowly
    return context


def started(context, *arguments):
    process = context.Process(target=logged_sweep, args=arguments)
    process.start()
    return process


def wait_until(condition, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def measured_seconds(context, folder: Path, corpus) -> float:
    """How long the whole sweep takes here, now."""
    folder.mkdir()
    start = time.perf_counter()
    process = started(context, folder / "timing.log", folder / "timing.jsonl", corpus)
    process.join()
    assert process.exitcode == 0
    return time.perf_counter() - start


def begun(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def killed_until_done(context, folder: Path, corpus, draw: random.Random, longest: float, uninterrupted: pd.DataFrame) -> int:
    """One grid, its sweep killed at a random moment after a run has begun, up to `longest` seconds, again and again.

    The number of kills. Raises AssertionError if a finished run is trained again, or a number is another one.
    """
    folder.mkdir(exist_ok=True)
    store, log, kills = folder / "runs.jsonl", folder / "log", 0
    while True:
        done, seen = set(keys_in(store)), len(begun(log))
        process = started(context, log, store, corpus)
        wait_until(lambda seen=seen, process=process: not process.is_alive() or len(begun(log)) > seen)
        process.join(draw.uniform(0, longest))
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
        assert not done & set(begun(log)[seen:]), "a finished run was trained again"
        if process.exitcode == 0:
            break
        assert process.exitcode == -9, "the sweep ended by itself"
    assert len(keys_in(store)) == len(set(keys_in(store))) == RUNS
    assert_same(read_sweep(store), uninterrupted)
    return kills


def saving(path: Path, begun: Path) -> None:
    """Save two models over each other, without end."""
    models = two_models()
    begun.touch()
    while True:
        for model in models:
            model.save(path)


def two_models() -> list[MiniMoE]:
    return [MiniMoE(Config(width=64, depth=2, seed=seed)) for seed in (1, 2)]


def killed_while_saving(context, path: Path, draw: random.Random, times: int) -> list[int]:
    """How often the file held the first and the second model after a kill. Raises ValueError if it held neither, whole."""
    models, found = two_models(), [0, 0]
    models[0].save(path)
    for _ in range(times):
        marker = path.with_name("begun")
        marker.unlink(missing_ok=True)
        process = context.Process(target=saving, args=(path, marker))
        process.start()
        wait_until(marker.exists)
        process.join(draw.uniform(0, 0.2))
        process.kill()
        process.join()
        found[MiniMoE.load(path).config.seed - 1] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=200, help="kills, at least (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    options = parser.parse_args()
    corpus = make_corpus("words", "the quick brown fox jumps over the lazy dog. " * 400)
    uninterrupted, context, draw = sweep(**GRID, **TINY, corpus=corpus), fresh_processes(), random.Random(options.seed)
    kills, grids, start = 0, 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        whole = min(measured_seconds(context, Path(folder, name), corpus) for name in ("warm", "timed"))
        while kills < options.times:
            kills += killed_until_done(context, Path(folder, str(grids)), corpus, draw, whole / 8, uninterrupted)
            grids += 1
            print(f"{kills} kills, {grids} grids of {RUNS} runs, nothing lost, {time.perf_counter() - start:.0f} s", flush=True)
        start = time.perf_counter()
        first, second = killed_while_saving(context, Path(folder, "model.pt"), draw, options.times)
        print(f"{first + second} savings killed, a whole model each time ({first} the first, {second} the second), ", end="")
        print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
