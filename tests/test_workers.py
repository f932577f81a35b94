"""Worker processes: they end with the process that started them, and a cluster that loses its scheduler says so."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import pytest

from kills import GRID, TINY, assert_same, wait_until
from minimoe import sweep, sweeps
from test_durability import cluster, uninterrupted, workers_of  # noqa: F401 (fixtures)

SWEEP = """
from minimoe import TrainOptions, make_corpus, sweep
corpus = make_corpus("words", "the quick brown fox jumps over the lazy dog. " * 200)
if {kind!r} == "sweep":
    sweep((64,), ("mup",), (0.01,), range(20), 3000, corpus, n_jobs=2, progress=False)
else:
    from minimoe import coordinate_check
    coordinate_check("mup", (32, 64), 3000, range(20), corpus=corpus, n_jobs=2)
"""


def processes():
    """(number, parent's number, command line) of every process that runs."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            if state != "Z":
                yield int(folder.name), int(parent), (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()


def workers_of_process(pid):
    """The processes of joblib's that are children of this one."""
    return [child for child, parent, words in processes() if parent == pid and "popen_loky" in words]


def alive(pid):
    return pid in {child for child, _, _ in processes()}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", ["sweep", "check"])
def test_workers_end_within_ten_seconds_of_their_killed_parent(kind):
    parent = subprocess.Popen([sys.executable, "-c", SWEEP.format(kind=kind)])
    try:
        wait_until(lambda: len(workers_of_process(parent.pid)) >= 2)
        workers = workers_of_process(parent.pid)
        time.sleep(4)  # they are at work
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not any(map(alive, workers)), seconds=10)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_cluster_that_loses_its_scheduler_says_so_and_the_sweep_goes_on(corpus, tmp_path, cluster, uninterrupted):  # noqa: F811
    address, _ = cluster
    wait_until(lambda: workers_of(address) == 2)
    store, original, killed = tmp_path / "runs.jsonl", sweeps.RunStore.append, []
    scheduler = json.loads((tmp_path / "scheduler.json").read_text())["address"]
    (pid,) = [child for child, _, words in processes() if "dask scheduler" in words and str(tmp_path) in words]

    def append(self, cell):
        original(self, cell)
        if "history" in cell and not killed:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    grid = GRID | TINY | {"steps": 40, "corpus": corpus}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        patch.setattr(sweeps.RunStore, "append", append)
        frame, stopped = frame_or_words(grid | {"store": store, "backend": "dask", "address": address})
    said = [stopped, *(str(warning.message) for warning in warned)]
    lost = f"the Dask scheduler at {scheduler} does not answer any more: the runs that are left"
    died = r"the Dask scheduler died; \d+ of 18 runs are in .*: the same call goes on"  # while it passed on a result
    assert any(re.match(f"{lost}|{died}", words) for words in said)
    assert_same(sweep(**grid, store=store) if frame is None else frame, sweep(**grid))


def frame_or_words(grid):
    """(the sweep's frame, or None; "", or why it stopped)"""
    try:
        return sweep(**grid), ""
    except RuntimeError as error:
        return None, str(error)
