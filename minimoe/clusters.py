"""The workers of a Dask cluster, as joblib's backend: checked before they get work, and watched while they have it."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import joblib

WAIT_FOR_WORKERS = 600  # seconds that a cluster has to bring up its first worker
WATCHED_EVERY = 0.5  # seconds


@contextmanager
def dask_workers(address: str | None) -> Iterator[None]:
    """joblib's configuration inside. address: of the scheduler; None: the current client's.

    Raises ValueError for a cluster that cannot be used. Warns when the scheduler is lost: joblib then does the rest here.
    """
    try:
        from distributed import Client, get_client
    except ImportError as error:
        raise ValueError("backend='dask' needs Dask: pip install 'minimoe[cluster]'") from error
    try:
        client = Client(address, set_as_default=False, timeout=10) if address else get_client()
    except (OSError, ValueError) as error:
        advice = "start one with `dask scheduler` and give its address, e.g. address='tcp://127.0.0.1:8786'"
        raise ValueError(f"no Dask scheduler at {address or 'hand'}: {advice}") from error
    with _watched(client):
        try:
            if max(client.nthreads().values(), default=1) > 1:  # torch's number of threads belongs to a whole process
                raise ValueError("a Dask worker has several threads: start workers with --nthreads 1, one for each core")
            settings = {"client": client, "wait_for_workers_timeout": WAIT_FOR_WORKERS}
            with joblib.parallel_config("dask", n_jobs=-1, **settings):
                yield
        finally:
            if address:
                client.close()


@contextmanager
def _watched(client) -> Iterator[None]:
    """Inside, a thread looks after the client's connection, and Dask does not print the traceback of losing it."""
    ended, log = threading.Event(), logging.getLogger("distributed.client")
    threading.Thread(target=_say_when_lost, args=(client, ended), daemon=True).start()
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        ended.set()
        log.setLevel(before)


def _say_when_lost(client, ended: threading.Event) -> None:
    address = client.scheduler.address
    while not ended.wait(WATCHED_EVERY):
        if client.status != "running":
            left = "the runs that are left are trained in this process, one after the other; Ctrl-C stops them"
            warnings.warn(f"the Dask scheduler at {address} does not answer any more: {left}", stacklevel=2)
            return
