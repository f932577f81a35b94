"""Locks that do not wait in silence: after a second they say for what, and what can never be locked is an error."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

from filelock import FileLock, Timeout

try:
    import fcntl
except ImportError:  # Windows: there the lock beside the file is the only one
    fcntl = None

SILENCE = 1.0  # seconds of waiting before it is said
PAUSE = 0.05  # seconds between two attempts


@contextmanager
def locked_beside(lock: FileLock) -> Iterator[None]:
    """Inside, the lock is held. Raises OSError if its file cannot be made."""
    try:
        lock.acquire(timeout=SILENCE)
    except Timeout:
        if not os.path.lexists(lock.lock_file):  # nobody holds a lock that is not there
            raise OSError(f"its lock {lock.lock_file} cannot be made") from None
        _say(lock.lock_file)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def locked_file(file: BinaryIO) -> Iterator[None]:
    """Inside, a lock on the file itself is held, which its hard links share."""
    if fcntl is None:
        yield
        return
    _wait(lambda: _try_to_lock(file), file.name)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _try_to_lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait(attempt: Callable[[], bool], name: str) -> None:
    """Try until it works."""
    start, said = time.monotonic(), False
    while not attempt():
        if not said and time.monotonic() - start > SILENCE:
            _say(name)
            said = True
        time.sleep(PAUSE)


def _say(name: str) -> None:
    # With the time, because Python shows a warning of the same words only once.
    warnings.warn(f"since {time.strftime('%H:%M:%S')} waiting for {name}, which another process has locked", stacklevel=6)
