"""Worker processes on this machine: they leave Ctrl-C to the process that started them, and end when it has ended."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import joblib

WATCHED_EVERY = 2  # seconds


def finished(jobs: Iterable, n_jobs: int) -> Iterator:
    """The results of joblib's delayed jobs as they finish, each job in one of n_jobs processes of one thread."""
    with local_workers(n_jobs):
        yield from results_of(joblib.Parallel(n_jobs, batch_size=1, pre_dispatch="n_jobs", return_as="generator_unordered"), jobs)


def results_of(pool: joblib.Parallel, jobs: Iterable) -> Iterator:
    """The same results, from a pool that is stopped when nobody wants more of them."""
    with _ctrl_c_ignored_by_children():
        results = pool(jobs)
    try:
        for result in results:  # noqa: UP028 (`yield from` would close the pool outside of the filter below)
            yield result
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # joblib's advice on a generator that is closed early
            results.close()


@contextmanager
def local_workers(n_jobs: int) -> Iterator[None]:
    """joblib's configuration inside: so many processes of this machine."""
    settings = {"inner_max_num_threads": 1, "initializer": end_with, "initargs": (os.getpid(),)}
    with warnings.catch_warnings(), joblib.parallel_config("loky", n_jobs=n_jobs, **settings):
        warnings.filterwarnings("ignore", "A worker stopped while some jobs")  # a wide model is no memory leak
        yield


def end_with(parent: int) -> None:
    """Let this process end soon after its parent: a killed parent cannot tell it to."""
    if hasattr(os, "fork"):  # on Windows a process keeps its parent's number
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCHED_EVERY)
    os._exit(1)


@contextmanager
def _ctrl_c_ignored_by_children() -> Iterator[None]:
    """Processes started inside leave Ctrl-C to this one, which answers it with one line."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
