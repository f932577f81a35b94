"""The run store: one finished run is one JSON line, appended and synced to disk before anything else is done.

A cell of a grid that is the same run as one in the store (see `identity.run_key`) adds a short line without results, so
that reading the store gives back every row of every sweep. `lines` says what a line is. A file is only ever appended to,
under a lock, so that several sweeps may write one store at the same time. A last line that was torn by a power cut is cut
off with a warning; a damaged line elsewhere is an error that names it; a file that is no store is left as it is.
"""

from __future__ import annotations

import json
import os
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, KeysView
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from filelock import FileLock

from .files import sync_folder
from .lines import DAMAGE, START, Lines, format_of, is_torn, written
from .locks import locked_beside, locked_file
from .parametrization import Parametrization, TwoTables

FORMAT = 2  # raise it when a change of the code changes what a run's numbers are: older lines then count as other runs
BLOCK = 1 << 16  # bytes


class StoreError(OSError):
    """The store could not be used any more while a sweep was running; `frame` holds every run that had finished."""

    frame = None  # the data frame that `sweep` would have returned, as far as it had come


class LineError(ValueError):
    """A line of the store is damaged, or has a table that does not go with the others; the message names file and line."""

    frame = None  # as in StoreError, where a sweep was running

    def __init__(self, path: Path, number: int, reason: Exception):
        if isinstance(reason, TwoTables):
            said = f"{path}, line {number}: {reason}"
        else:
            said = f"{path}, line {number} is damaged ({_short(reason)}): mend or delete that line"
        super().__init__(said)


class Place(NamedTuple):
    """Where a line is in the file."""

    number: int  # from 1
    start: int  # in bytes


class RunStore:
    """A JSON-lines file. Every line is a cell: `format`, `key` (its run's identity) and its labels; one cell of each run
    carries the results too, `history` among them. Of each line it remembers the place: a cell is read when it is wanted."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)  # as the user calls it
        self._real = Path(os.path.realpath(path))  # one lock for all the names of a file
        self._lock = FileLock(f"{self._real}.lock")
        self._reading = threading.RLock()
        self._file: BinaryIO | None = None  # kept open, which tells a deleted file from a renamed one
        self._next = Place(1, 0)  # how far the file has been read
        self._lines = Lines()
        self._places: dict[str, list[Place]] = {}  # by key
        self._runs: dict[str, Place] = {}  # by key: the first line with results
        self._tables: dict[str, int] = {}  # by name: the number of the first line with it

    def prepare(self) -> None:
        """Make the folder and the file; cut off a torn last line, and end a whole one.

        Raises OSError if that cannot be done, and ValueError for a file that is no store, of which no byte changes.
        """
        try:
            require_store(self.path)
            self._real.parent.mkdir(parents=True, exist_ok=True)
            open(self._real, "ab").close()
            self._file = open(self._real, "rb")  # noqa: SIM115 (closed with the store)
            weakref.finalize(self, self._file.close)
            with self._locked():
                pass
            sync_folder(self._real.parent)
        except (OSError, NotImplementedError) as error:  # the second: a file system without locks
            raise OSError(f"the run store {self.path} cannot be written: {error}") from error

    def append(self, cell: dict) -> None:
        """Add one line and wait until it is on the disk.

        Raises StoreError if the file cannot be written or is not what it was, and LineError if another sweep has written a
        damaged line, or another table of the same name.
        """
        if self._file is None:
            self.prepare()
        line = written(cell)
        try:
            with self._locked() as file, self._reading:
                self._read_on()
                self._own(line)
                file.seek(0, os.SEEK_END)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except StoreError:
            raise
        except OSError as error:
            self._require_same_file()  # its folder may be gone
            raise StoreError(f"the run store {self.path} cannot be written any more: {error}") from error

    def trained(self) -> KeysView[str]:
        """The keys of the runs that the file has. Raises LineError naming a damaged line, StoreError as `append`."""
        with self._reading:
            self._read_on()
            return dict(self._runs).keys()

    def runs(self, keys: Iterable[str]) -> dict[str, dict]:
        """key -> the cell with the run's results (see `Lines.cell`), for those that the file has. Raises as `trained`."""
        with self._reading:
            self._read_on()
            return {key: self._cell(self._runs[key]) for key in keys if key in self._runs}

    def knows(self, cell: dict) -> bool:
        """Whether the file has a line for this cell. Raises as `trained`."""
        with self._reading:
            self._read_on()
            mine = label(self._own(written(cell)))
            return any(label(self._cell(place)) == mine for place in self._places.get(cell["key"], ()))

    def require_names(self, tables: Iterable[Parametrization]) -> None:
        """Raise LineError if the file has another table under the name of one of these."""
        with self._reading:
            self._read_on()
            for table in tables:
                known = self._lines.tables.get(table.name, table)
                if not known.same_rules(table):
                    raise self._two_tables(table.name)

    def _two_tables(self, name: str) -> LineError:
        return LineError(self.path, self._tables[name], TwoTables(name))

    def _own(self, line: bytes) -> dict:
        """The cell of a line that is to be written. Raises LineError if the file has another table of its table's name."""
        try:
            return self._lines.cell(line.strip())
        except TwoTables:
            name = Lines().cell(line.strip())["config"].parametrization.name
            raise self._two_tables(name) from None

    def _cell(self, place: Place) -> dict:
        with self._opened() as file, _named(self.path, place.number):
            file.seek(place.start)
            return self._lines.cell(file.readline().strip())

    def _read_on(self) -> None:
        """Remember the lines that have been added: of the last one, another sweep may just be writing the first half."""
        if self._file is None:
            self.prepare()
        self._require_same_file()
        with self._opened() as file:
            number, start = self._next
            file.seek(start)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                with _named(self.path, number):
                    self._remember(line.strip(), Place(number, start))
                number, start = number + 1, start + len(line)
                self._next = Place(number, start)

    def _opened(self) -> BinaryIO:
        """The file, to be read without what a buffer holds from before."""
        return open(self._file.fileno(), "rb", closefd=False)

    def _remember(self, line: bytes, place: Place) -> None:
        if format_of(line) != FORMAT:
            return
        head = self._lines.head(line)
        self._places.setdefault(head.key, []).append(place)
        self._tables.setdefault(head.config.parametrization.name, place.number)
        if head.has_results:
            self._runs.setdefault(head.key, place)

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """The file, open for writing and locked under all its names, its last line whole."""
        with locked_beside(self._lock), open(self._real, "r+b") as file, locked_file(file):
            self._require_same_file()
            _mend_last_line(file, self.path)
            yield file

    def _require_same_file(self) -> None:
        """Raise StoreError if the file has been deleted, renamed or truncated since it was opened."""
        mine, there = os.fstat(self._file.fileno()), _status(self._real)
        if there is None or not os.path.samestat(mine, there):
            happened = "renamed or moved away" if mine.st_nlink else "deleted"
        elif mine.st_size < self._next.start:
            happened = "truncated"
        else:
            return
        advice = "put it back, and the same call goes on from what it holds"
        raise StoreError(f"the run store {self.path} was {happened} while it was in use: {advice}")


def stored_cells(path: str | os.PathLike) -> tuple[dict[str, dict], list[dict]]:
    """(key -> the cell with the run's results, every distinct cell that has a run, in order), without changing the file.

    For a cell see `Lines.cell`. Lines of another format are left out, and so is, with a warning, a torn last line. Raises
    LineError for a damaged line or two tables under one name, ValueError for a store without runs.
    """
    require_store(path := Path(path))
    lines, runs, formats = Lines(), {}, set()
    cells: dict[str, list[dict]] = {}
    ordered = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if is_torn(line):
                warnings.warn(f"{path}, line {number}: the last line is not whole, and is left out", stacklevel=3)
                break
            with _named(path, number):
                formats.add(form := format_of(line := line.strip()))
                if form != FORMAT:
                    continue
                cell = lines.cell(line)
            if "history" in cell:
                runs.setdefault(cell["key"], cell)
            alike = cells.setdefault(cell["key"], [])
            if label(cell) not in map(label, alike):
                alike.append(cell)
                ordered.append(cell)
    if not runs:
        others = f", only lines of format {', '.join(map(str, sorted(formats - {FORMAT})))}" if formats - {FORMAT} else ""
        older = ": an older version wrote them, and its runs are to be trained again" if others and max(formats) < FORMAT else ""
        raise ValueError(f"{path} holds no runs of format {FORMAT}{others}{older}")
    return runs, [cell for cell in ordered if cell["key"] in runs]


def label(cell: dict) -> tuple:
    """What tells two cells of one key apart, for cells that one `Lines` has read: what the config means, LR and corpus."""
    return cell["config"], cell["seed"], cell["lr"], cell["corpus"]


def require_store(path: Path) -> None:
    """Raise ValueError for a file that is there and does not begin as a run store, OSError for a folder or a device."""
    if _status(path) is None:
        return
    if not path.is_file():
        raise OSError(f"{path} is not a file")
    with open(path, "rb") as file:
        start = file.read(len(START))
        if start and not start.startswith(b"{"):
            raise ValueError(f"{path} is no run store (line 1 is no JSON object): give another path. The file is as it was")
        first = start + file.readline()
    if not is_torn(first):
        with _named(path, 1):
            format_of(first.strip())


class _named:
    """Inside, what is wrong with a line is a LineError, which names the line."""

    def __init__(self, path: Path, number: int):
        self.path, self.number = path, number

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, DAMAGE):
            raise LineError(self.path, self.number, error) from error


def _short(reason: Exception) -> str:
    said = str(reason) if not isinstance(reason, RecursionError) else "it is nested too deeply"
    return said if len(said) < 200 else f"{said[:200]}..."


def _status(path: Path) -> os.stat_result | None:
    """The file's status; None if there is no such file."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _mend_last_line(file: BinaryIO, path: Path) -> None:
    """End a whole last line that lacks its newline, and cut off a torn one. The caller holds the lock.

    Raises LineError, and changes nothing, where the last line is neither.
    """
    start = _start_of_last_line(file)
    file.seek(start)
    line = file.read()
    if not line:
        return
    if is_torn(line):
        file.truncate(start)
        warnings.warn(f"{path}: the last line was torn and has been cut off; its run will be trained again", stacklevel=5)
        return
    file.seek(0)
    number = sum(1 for _ in file)
    with _named(path, number):
        format_of(line.strip())
        json.loads(line)
    file.seek(0, os.SEEK_END)
    file.write(b"\n")
    file.flush()


def _start_of_last_line(file: BinaryIO) -> int:
    """Where the bytes after the last newline begin."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - BLOCK)
        file.seek(start)
        if (found := file.read(end - start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0
