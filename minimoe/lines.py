"""The lines of a run store: a cell as a line of JSON with a checksum, and the line checked and read again.

A line ends with the CRC-32 of all its bytes before: `{"format": 2, "key": ..., "crc": "1a2b3c4d"}`. A line whose checksum is
right is what was written. Lines from before the checksum have none: each of their values is checked instead.

What is wrong with a line is a ValueError or another of DAMAGE, which says what; `store` adds the file and the line's number.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import NamedTuple

from .config import Config, config_from_dict
from .parametrization import Parametrization, TwoTables
from .step import NEUTRAL, TrainOptions

LABELS = ("format", "key", "config", "lr", "steps", "options", "corpus", "corpus_digest")  # of every line, in their order
RESULTS = ("train_loss", "val_loss", "diverged", "seconds")  # of a line with a run's results, besides its history
LOSSES = ("train_loss", "val_loss")
LISTS = ("max_load", "idle_experts", "router_rms")  # a number per layer
RECORD = ("step", *LOSSES, *LISTS)
DAMAGE = (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError)

START = b'{"format": '  # of every line that this library writes
SEAL = b', "crc": "%08x"}'
SEAL_LENGTH = len(SEAL % 0)
HEAD = re.compile(rb'\{"format": (\d{1,9}), "key": "([^"\\]+)"')
SEED = re.compile(rb'"seed": (0|[1-9]\d{0,17}), ')


def _history_pattern() -> re.Pattern:
    """A history as we write it. To match its text takes a sixth of the time that parsing and checking it would take."""
    number = r"(?:-?(?:0|[1-9]\d{0,17}+)(?:\.\d++)?+(?:e(?:\+?[012]?\d?\d|-\d{1,3}+))?+|null)"  # no infinity: below 1e300
    numbers = rf"\[(?:{number}(?:, {number})*+)?+\]"
    values = {"step": r"[1-9]\d{0,17}+"} | dict.fromkeys(LOSSES, number) | dict.fromkeys(LISTS, numbers)
    record = r"\{" + ", ".join(f'"{name}": {values[name]}' for name in RECORD) + r"\}"
    return re.compile(rf"\[{record}(?:, {record})*+\]".encode())


HISTORY = _history_pattern()


class Head(NamedTuple):
    """What a line is looked up by."""

    key: str
    config: Config  # with seed 0
    has_results: bool


class History(Sequence):
    """A run's records (see `training.record`), read only: kept as JSON text, and read each time they are asked for.

    As dicts, the records of a large store would fill the memory.
    """

    __slots__ = ("_text",)

    def __init__(self, text: bytes):
        self._text = text

    def __len__(self) -> int:
        return len(self._records())

    def __getitem__(self, at):
        return self._records()[at]

    def __iter__(self):
        return iter(self._records())

    def __eq__(self, other) -> bool:
        return self._records() == list(other) if isinstance(other, History | list | tuple) else NotImplemented

    __hash__ = None

    def __repr__(self) -> str:
        return repr(self._records())

    def _records(self) -> list[dict]:
        records = json.loads(self._text)
        for record in records:
            record |= {name: _loss(record[name]) for name in LOSSES}
            record["router_rms"] = [math.nan if rms is None else rms for rms in record["router_rms"]]
        return records


def written(cell: dict) -> bytes:
    """The cell as a line, with its checksum and a newline. JSON has no infinity and no NaN: they become null."""
    ordered = {name: cell[name] for name in LABELS} | cell
    text = json.dumps(_without_infinities(ordered), allow_nan=False).encode()[:-1]
    return text + SEAL % zlib.crc32(text) + b"\n"


def is_torn(line: bytes) -> bool:
    """Whether this is the first part of a line of ours, perhaps none of it: writing the line was interrupted."""
    if line.endswith(b"\n") or not (line.startswith(START) or START.startswith(line)):
        return False
    try:
        json.JSONDecoder().raw_decode(line.decode(errors="replace"))
    except (ValueError, RecursionError):
        return True
    return False  # a whole line, perhaps with something after it


def format_of(line: bytes) -> int:
    """The format that the line says it has. Raises one of DAMAGE for a wrong checksum, or what is no cell at all."""
    _text_of(line)
    if found := HEAD.match(line):
        return int(found[1])
    cell = _parsed(line)
    if not {"key", "format"} <= set(cell):
        raise ValueError("it is not a run")
    return _checked(cell["format"], int, "format")


class Lines:
    """Reads the lines of one store. What many lines share, their configs and options, is checked and kept once."""

    def __init__(self):
        self.tables: dict[str, Parametrization] = {}  # by name: the first one of each
        self._configs: dict[bytes, tuple[Config, int]] = {}  # a config's text without seed -> it with seed 0, its seed
        self._options: dict[bytes, dict] = {}
        self._shared: dict = {}

    def head(self, line: bytes) -> Head:
        """What the line is looked up by. Only a line without a checksum, or with another layout, is read whole."""
        found = HEAD.match(line)
        if is_sealed(line) and found:
            text, config = _cut(line, b"config", b"lr")
            return Head(found[2].decode(), self._config(config)[0], b', "history": [' in text)
        cell = self.cell(line)
        return Head(cell["key"], cell["config"], "history" in cell)

    def cell(self, line: bytes) -> dict:
        """The line's cell: key, lr, steps, corpus and corpus_digest as they are written; config (with seed 0) and seed;
        options by name; and RESULTS and history, if the line has them. A loss that is null is infinite."""
        text = _text_of(line)
        try:
            return self._cell(text)
        except TwoTables:
            raise
        except DAMAGE:
            return self._cell(_in_our_layout(text))  # perhaps its fields only have another order

    def _cell(self, text: bytes) -> dict:
        text, config = _cut(text, b"config", b"lr")
        text, options = _cut(text, b"options", b"corpus")
        text, has_results, history = text.partition(b', "history": ')
        data = _parsed(text + b"}" if has_results else text)
        if {"config", "options", "history"} & set(data):
            raise ValueError("a field is there twice")
        _require(data, {*LABELS, *(RESULTS if has_results else ())} - {"config", "options"})
        cell = {
            "key": _checked(data["key"], str, "key"),
            "lr": _number(data["lr"], "lr"),
            "steps": _checked(data["steps"], int, "steps"),
            "corpus": self._one(_checked(data["corpus"], str, "corpus")),
            "corpus_digest": self._one(_checked(data["corpus_digest"], str, "corpus_digest")),
            "options": self._train_options(options),
        }
        cell["config"], cell["seed"] = self._config(config)
        if cell["lr"] <= 0 or cell["steps"] < 1:
            raise ValueError("lr and steps must be positive")
        if has_results:
            cell |= {name: _loss(data[name], name) for name in LOSSES}
            cell["diverged"] = _checked(data["diverged"], bool, "diverged")
            cell["seconds"] = _number(data["seconds"], "seconds")
            cell["history"] = _history(history[:-1])
        return cell

    def _config(self, text: bytes) -> tuple[Config, int]:
        """(the config with seed 0, its seed). Seeds are left out of the text: a store has many of them."""
        if found := SEED.search(text):
            text = text[: found.start()] + text[found.end() :]
        if text not in self._configs:
            data = _parsed(text)
            if found and "seed" in data:
                raise ValueError("seed is there twice")
            config = config_from_dict(data)
            table = self._known(config.parametrization)
            self._configs[text] = self._one(replace(config, seed=0, parametrization=table)), config.seed
        config, seed = self._configs[text]
        return config, int(found[1]) if found else seed

    def _known(self, table: Parametrization) -> Parametrization:
        """The table as it was first written under its name, so that cells are told apart by what their tables mean."""
        if not isinstance(table.name, str):
            raise TypeError(f"a table's name must be text, not {table.name!r}")
        known = self.tables.setdefault(table.name, table)
        if not known.same_rules(table):
            raise TwoTables(table.name)
        return known

    def _train_options(self, text: bytes) -> dict:
        """name -> value for every field of TrainOptions; one that the line lacks had its neutral value then."""
        if text not in self._options:
            _require(data := _parsed(text), ("batch_size", "betas"))  # which every version has had
            self._options[text] = asdict(TrainOptions(**NEUTRAL | data))
        return self._options[text]

    def _one(self, value):
        return self._shared.setdefault(value, value)


def is_sealed(line: bytes) -> bool:
    """Whether the line has a checksum, right or wrong."""
    return line[-SEAL_LENGTH:].startswith(SEAL[:10]) and line.endswith(b'"}')


def _text_of(line: bytes) -> bytes:
    """The line's JSON without its checksum. Raises ValueError if the checksum is another."""
    if not is_sealed(line):
        return line
    text = line[:-SEAL_LENGTH]
    if line[-SEAL_LENGTH:] != SEAL % zlib.crc32(text):
        raise ValueError("its checksum is wrong: something in it has changed")
    return text + b"}"


def _cut(text: bytes, name: bytes, following: bytes) -> tuple[bytes, bytes]:
    """(the text without the object under `name`, that object), where the field `following` comes next, as in our lines.

    Cutting a config is many times faster than parsing it. A piece of something else is no JSON, and is found out so.
    """
    before, _, after = text.partition(b', "%s": {' % name)
    inside, _, rest = after.partition(b'}, "%s": ' % following)
    return before + b', "%s": ' % following + rest, b"{" + inside + b"}"


def _in_our_layout(text: bytes) -> bytes:
    """The same cell with its fields in the order in which we write them."""
    cell = _parsed(text)
    names = (*LABELS, *RESULTS, "history") if "history" in cell else LABELS
    _require(cell, names)
    for name in ("config", "options"):
        _checked(cell[name], dict, name)
    for record in _checked(cell.get("history", []), list, "history"):
        _require(_checked(record, dict, "a record of history"), RECORD)
    if "history" in cell:
        cell["history"] = [{name: record[name] for name in RECORD} for record in cell["history"]]
    return json.dumps({name: cell[name] for name in names}).encode()


def _parsed(text: bytes) -> dict:
    """The JSON object. Raises one of DAMAGE for other JSON, a field twice, and numbers that are no number or too large."""
    value = _STRICT.decode(text.decode())
    if not isinstance(value, dict):
        raise ValueError("it is not a run")
    return value


def _once(pairs: list[tuple]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a field is there twice")
    return value


def _integer(text: str) -> int:
    if not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"{text[:20]}... is too large")
    return int(text)


def _float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


_STRICT = json.JSONDecoder(object_pairs_hook=_once, parse_int=_integer, parse_float=_float, parse_constant=_float)


def _require(cell: dict, names: Iterable[str]) -> None:
    if missing := set(names) - set(cell):
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")


def _checked(value, kind: type, name: str):
    """The value, which must be of exactly this type: JSON's true is no integer."""
    if type(value) is not kind:
        raise TypeError(f"{name}={str(value)[:40]!r}: must be {kind.__name__}")
    return value


def _number(value, name: str) -> float:
    if type(value) not in (int, float):
        raise TypeError(f"{name}={str(value)[:40]!r}: must be a number")
    return value


def _loss(value, name: str = "a loss") -> float:
    """The number; infinity for null."""
    return math.inf if value is None else _number(value, name)


def _history(text: bytes) -> History:
    """The history of this text. Raises ValueError unless it is a list of records as we write them."""
    if not HISTORY.fullmatch(text):
        about = f"{', '.join(RECORD[:3])}, and {', '.join(LISTS)} with a number per layer"
        raise ValueError(f"history: must be a list of records of {about}; a loss or an RMS may be null")
    return History(text)


def _without_infinities(value):
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_infinities(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(item) for item in value]
    return value
