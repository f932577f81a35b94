"""Nothing is lost: kills at random moments, sweeps side by side, a disk that fills, a cluster that loses a worker."""

import json
import os
import random
import resource
import signal
import subprocess
import sys

import pytest

from kills import (
    GRID,
    ORDER,
    RUNS,
    TINY,
    assert_same,
    fresh_processes,
    keys_in,
    killed_until_done,
    measured_seconds,
    started,
    wait_until,
)
from minimoe import read_sweep, sweep, sweeps
from minimoe.store import StoreError


@pytest.fixture(scope="module")
def uninterrupted(corpus):
    return sweep(**GRID, **TINY, corpus=corpus)


@pytest.fixture(scope="module")
def fresh():
    return fresh_processes()


def test_killed_many_times_at_random_moments(corpus, tmp_path, fresh, uninterrupted):
    """As many kills as it takes, each at a random moment after a run has begun. tools/kills.py does it for longer."""
    whole = min(measured_seconds(fresh, tmp_path / name, corpus) for name in ("warm", "timed"))
    assert killed_until_done(fresh, tmp_path, corpus, random.Random(0), whole / 8, uninterrupted) >= 5


def test_two_sweeps_write_one_store_at_the_same_time(corpus, tmp_path, fresh, uninterrupted):
    store, logs = tmp_path / "runs.jsonl", [tmp_path / "one", tmp_path / "two"]
    processes = [started(fresh, log, store, corpus) for log in logs]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    begun = [log.read_text().splitlines() for log in logs]
    assert set(begun[0]) | set(begun[1]) == set(keys_in(store))
    assert_same(read_sweep(store), uninterrupted)  # nothing lost, nothing interleaved, duplicates collapsed


def test_a_run_that_comes_into_the_store_meanwhile_is_skipped(corpus, tmp_path, monkeypatch):
    """A second sweep finishes the whole grid while the first trains its first run."""
    store, original, begun = tmp_path / "runs.jsonl", sweeps.finished_runs, []

    def overtaken(cells, *rest):
        begun.append(cells[0]["key"])
        if len(begun) == 1:
            monkeypatch.setattr(sweeps, "finished_runs", original)
            sweep(**GRID, **TINY, corpus=corpus, store=store)
            monkeypatch.setattr(sweeps, "finished_runs", overtaken)
        return original(cells, *rest)

    monkeypatch.setattr(sweeps, "finished_runs", overtaken)
    frame = sweep(**GRID, **TINY, corpus=corpus, store=store)
    assert len(begun) == 1
    assert len(frame) == 24


def full_disk(store, corpus, queue):
    """The sweep on a disk that takes some 20 kB: the operating system's own limit on a file's size."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        sweep(**GRID, **TINY, corpus=corpus, store=store)
    except StoreError as error:
        queue.put((str(error), error.frame[[*ORDER, "val_loss"]].to_dict("records")))


@pytest.mark.filterwarnings("ignore:.*the last line was torn")
def test_a_disk_that_fills_stops_the_sweep_and_loses_nothing(corpus, tmp_path, fresh, uninterrupted):
    store, queue = tmp_path / "runs.jsonl", fresh.Queue()
    process = fresh.Process(target=full_disk, args=(store, corpus, queue))
    process.start()
    message, carried = queue.get(timeout=60)
    process.join()
    assert str(store) in message
    assert "cannot be written any more" in message
    expected = uninterrupted.set_index(ORDER).val_loss
    assert {expected[tuple(row[name] for name in ORDER)] == row["val_loss"] for row in carried} == {True}
    kept = [line for line in store.read_bytes().split(b"\n")[:-1] if b'"history"' in line]
    assert len({json.loads(line)["key"] for line in kept}) + 1 == len({row["val_loss"] for row in carried})  # one unsaved
    sweep(**GRID, **TINY, corpus=corpus, store=store)  # there is room again
    assert_same(read_sweep(store), uninterrupted)


@pytest.fixture
def cluster(tmp_path):
    """A real scheduler and two worker processes on this machine: (address, workers)."""
    pytest.importorskip("distributed")
    file = tmp_path / "scheduler.json"
    base = [sys.executable, "-m", "dask"]
    common = ["--scheduler-file", str(file), "--no-dashboard"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": tmp_path}
    scheduler = subprocess.Popen([*base, "scheduler", "--host", "127.0.0.1", "--port", "0", *common], **quiet)
    worker = [*base, "worker", "--nthreads", "1", "--no-nanny", "--host", "127.0.0.1", *common]
    workers = [subprocess.Popen(worker, **quiet) for _ in range(2)]
    wait_until(file.exists)
    yield json.loads(file.read_text())["address"], workers
    for process in (*workers, scheduler):
        process.kill()
        process.wait()


def workers_of(address):
    from distributed import Client

    with Client(address, set_as_default=False) as client:
        return len(client.scheduler_info()["workers"])


def test_a_cluster_that_loses_a_worker_delivers_every_run_once(corpus, tmp_path, cluster, uninterrupted):
    address, workers = cluster
    wait_until(lambda: workers_of(address) == 2)
    store = tmp_path / "runs.jsonl"
    killed = []
    original = sweeps.RunStore.append

    def append(self, cell):
        original(self, cell)
        if "history" in cell and len(keys_in(store)) == 4:
            os.kill(workers[0].pid, signal.SIGKILL)
            killed.append(cell["key"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps.RunStore, "append", append)
        frame = sweep(**GRID, **TINY, corpus=corpus, store=store, backend="dask", address=address)
    assert len(killed) == 1
    assert workers[0].wait(timeout=10) == -signal.SIGKILL
    assert len(keys_in(store)) == len(set(keys_in(store))) == RUNS
    assert_same(frame, uninterrupted)


def test_a_cluster_that_is_not_there_is_one_clear_error(corpus):
    with pytest.raises(ValueError, match=r"no Dask scheduler at tcp://127.0.0.1:1: start one with `dask scheduler`"):
        sweep(**GRID, **TINY, corpus=corpus, backend="dask", address="tcp://127.0.0.1:1")
    with pytest.raises(ValueError, match="backend='slurm': must be loky"):
        sweep(**GRID, **TINY, corpus=corpus, backend="slurm")


def test_the_current_client_is_the_default_and_threads_are_refused(corpus, tmp_path):
    """As with dask-jobqueue: a cluster object, a client on it, and no address."""
    distributed = pytest.importorskip("distributed")
    quiet = {"dashboard_address": None, "processes": False, "n_workers": 1, "silence_logs": 50}
    small = {"widths": (32,), "parametrizations": ("mup",), "lrs": (0.01, 0.02), "corpus": corpus, "backend": "dask"}
    with distributed.LocalCluster(threads_per_worker=1, **quiet) as cluster, distributed.Client(cluster):
        frame = sweep(**small, **TINY)
    assert frame.val_loss.tolist() == sweep(**small | {"backend": "loky"}, **TINY).val_loss.tolist()
    two_threads = distributed.LocalCluster(threads_per_worker=2, **quiet)
    refused = pytest.raises(ValueError, match="several threads: start workers with --nthreads 1")
    with two_threads as cluster, distributed.Client(cluster), refused:
        sweep(**small, **TINY)
