"""The run store: one finished run is one JSON line, appended and synced to disk before anything else is done.

A cell of a grid that is the same run as one in the store (see `sweeps.run_key`) adds a short line without results, so
that reading the store gives back every row of every sweep. A file is only ever appended to, under a lock, so that several
sweeps may write one store at the same time. A last line that was torn by a power cut is cut off with a warning; a damaged
line elsewhere is an error that names it.
"""

from __future__ import annotations

import json
import math
import os
import threading
import warnings
from pathlib import Path

from filelock import FileLock

from .config import config_from_dict, config_to_dict

FORMAT = 2  # raise it when a change of the code changes what a run's numbers are: older lines then count as other runs


class StoreError(OSError):
    """The store could not be written while a sweep was running; `frame` holds every run that had finished."""

    frame = None  # the data frame that `sweep` would have returned, as far as it had come


LABELS = {"key", "format", "config", "lr", "steps", "options", "corpus", "corpus_digest"}
RESULTS = {"train_loss", "val_loss", "diverged", "seconds", "history"}


class RunStore:
    """A JSON-lines file. Every line is a cell: `format`, `key` (its run's identity) and its labels; one cell of each run
    carries the results too, `history` among them."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._lock = FileLock(f"{self.path}.lock")
        self._reading = threading.Lock()
        self._read, self._lines = 0, 0  # how far the file has been read
        self._runs: dict[str, dict] = {}
        self._cells: dict[str, dict] = {}

    def prepare(self) -> None:
        """Make the folder and the file, and cut off a torn last line. Raises OSError naming the path if that fails."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock, open(self.path, "a+b") as file:
                _cut_torn_line(file, self.path)
            _sync_folder(self.path.parent)
        except (OSError, NotImplementedError) as error:  # the second: a file system without locks
            raise OSError(f"the run store {self.path} cannot be written: {error}") from error

    def append(self, cell: dict) -> None:
        """Add one line and wait until it is on the disk. Raises StoreError naming the path if it cannot be written."""
        line = json.dumps(_without_infinities(cell), allow_nan=False).encode() + b"\n"
        try:
            with self._lock, open(self.path, "a+b") as file:
                _cut_torn_line(file, self.path)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StoreError(f"the run store {self.path} cannot be written any more: {error}") from error

    def load(self) -> tuple[dict[str, dict], list[dict]]:
        """(key -> the line with the run's results, every distinct cell in order), without lines of another format.

        Called again, it reads only what has been added. Raises ValueError naming a damaged line by its number.
        """
        with self._reading:
            self._read_on()
            return dict(self._runs), [cell for cell in self._cells.values() if cell["key"] in self._runs]

    def knows(self, cell: dict) -> bool:
        """Whether the file has a line for this cell. Raises as `load` does."""
        with self._reading:
            self._read_on()
            return label(cell) in self._cells

    def _read_on(self) -> None:
        for line in self._new_lines():
            self._lines += 1
            cell = _parsed(line, self._lines, self.path)
            if cell["format"] == FORMAT:
                if "history" in cell:
                    self._runs.setdefault(cell["key"], cell)
                self._cells.setdefault(label(cell), cell)

    def _new_lines(self) -> list[bytes]:
        """The whole lines since the last call: of the last one, another sweep may just be writing the first half."""
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        return whole.splitlines()


def _sync_folder(folder: Path) -> None:
    """Let a new file's name survive a power cut too, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def label(cell: dict) -> str:
    """What tells two cells of one store apart. A line from before a field of Config was added means that field's default."""
    config = config_to_dict(config_from_dict(cell["config"]))
    return json.dumps([cell["key"], config, cell["lr"], cell["corpus"]], sort_keys=True)


def _parsed(line: bytes, number: int, path: Path) -> dict:
    try:
        cell = json.loads(line)
        if not isinstance(cell, dict) or not {"key", "format"} <= set(cell):
            raise ValueError("it is not a run")
        missing = LABELS | (RESULTS if "history" in cell else set())
        if cell["format"] == FORMAT and not missing <= set(cell):
            raise ValueError(f"it lacks {', '.join(sorted(missing - set(cell)))}")
        if cell["format"] == FORMAT:
            config_from_dict(cell["config"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}, line {number} is damaged ({error}): mend or delete that line") from error
    return cell


def _cut_torn_line(file, path: Path) -> None:
    """Cut off a last line without its newline: the machine stopped while it was written. The caller holds the lock."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
    warnings.warn(f"{path}: the last line was torn and has been cut off; its run will be trained again", stacklevel=4)


def _without_infinities(value):
    """JSON has no infinity and no NaN: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_infinities(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(item) for item in value]
    return value
