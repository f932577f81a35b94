"""The flags of the command line: a flag for every field of Config and TrainOptions, and what their words mean."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Sequence

from .config import Config
from .grids import STEPS
from .step import TrainOptions

EPILOG = """\
examples:
  minimoe demo                                             the picture: loss against learning rate, a curve per width
  minimoe explain --width 512 --parametrization simplep mup    what each rule does to each tensor
  minimoe explain mymodel:build --width 512 --base-width 64    the same for a model of yours, which build(width) makes
  minimoe coords --parametrization simplep                 which tensors grow with width, and the cell that is to blame
  minimoe sweep --widths 32 64 --lrs 2^-8:2^-4 --seeds 0 1 --store runs/my.jsonl
  minimoe report runs/my.jsonl --figure my.png             optimum, drift and regret of what is in a store
  minimoe train --width 128 --lr 2^-6 --steps 2000 --save model.pt
  minimoe sample model.pt --prompt "Return the "
"""

MOST_LRS = 1000  # of one range: more are a mistyped step, and would be counted out for minutes


class Misread(argparse.ArgumentTypeError, ValueError):
    """A word that cannot be read: argparse prints the message after the flag's name."""


def integer(text: str) -> int:
    """An integer that the rest of the library can hold. Raises Misread."""
    try:
        value = int(text) if len(text) < 40 else 2**63
    except ValueError as error:
        raise Misread(f"{_quoted(text)} is not an integer") from error
    if not -(2**63) <= value < 2**63:
        raise Misread(f"{_quoted(text)} is not an integer below 2^63")
    return value


def number(text: str) -> float:
    """0.01, 1e-2 or 2^-6.5. Raises Misread."""
    base, power, exponent = text.partition("^")
    try:
        value = float(base) ** float(exponent) if power else float(base)
        if isinstance(value, float):  # a root of a negative number is complex
            return value
    except (ArithmeticError, ValueError):
        pass
    raise Misread(f"{_quoted(text)} is not a number such as 0.01 or 2^-6.5")


def _quoted(text: str) -> str:
    """The word in quotes, of a long one its beginning."""
    return repr(text if len(text) < 60 else f"{text[:20]}... ({len(text)} characters)")


def numbers(text: str) -> tuple[float, ...]:
    """A number, or the octaves low:high[:step]. Raises Misread."""
    low, *rest = text.split(":")
    if not rest:
        return (number(low),)
    first, last, step = number(low), number(rest[0]), number(rest[1]) if len(rest) > 1 else 1.0
    if not (0 < first <= last < math.inf and 0.01 <= step < math.inf and len(rest) <= 2):
        raise Misread(f"{_quoted(text)}: a range is low:high or low:high:octaves, with 0 < low <= high and octaves >= 0.01")
    count = int((math.log2(last) - math.log2(first)) / step + 1e-9) + 1
    if count > MOST_LRS:
        raise Misread(f"{_quoted(text)} is a range of {count} learning rates: at most {MOST_LRS}")
    return tuple(first * 2 ** (i * step) for i in range(count))


def add_argument(parser: argparse.ArgumentParser, function: Callable, name: str, about: str, **settings) -> None:
    """A flag for an argument of a function, whose default it takes; several values where the default has several."""
    default = inspect.signature(function).parameters[name].default
    if isinstance(default, tuple):
        settings = {"nargs": "+"} | settings
    parser.add_argument(f"--{name}", default=default, help=f"{about} (default {_shown(default)})", **settings)


def _shown(value) -> str:
    """A default as one would write it on the command line: 2^-6 and not 0.015625."""
    if isinstance(value, tuple):
        return " ".join(map(_shown, value))
    octave = math.log2(value) if isinstance(value, float) and value > 0 else math.nan
    return f"2^{octave:g}" if octave.is_integer() else str(value)


def _field_help(kind: type) -> dict[str, str]:
    """name -> the comment that stands beside it in the dataclass's source, and its default."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(kind), flags=re.MULTILINE))
    defaults = {f.name: f.default for f in dataclasses.fields(kind)}
    return {name: f"{comments.get(name, '')} (default {default})" for name, default in defaults.items()}


def path_field(text: str) -> tuple[str, list]:
    """width=32,64 -> the field and its values. Raises Misread."""
    name, _, values = text.partition("=")
    kinds = {f.name: _kind(f) for f in (*dataclasses.fields(Config), *dataclasses.fields(TrainOptions))} | {"steps": integer}
    name = name.replace("-", "_")
    if name not in kinds or not values:
        raise Misread(f"{_quoted(text)}: a path is FIELD=VALUE,VALUE, the field one of {', '.join(kinds)}")
    return name, [kinds[name](value) for value in values.split(",")]


def size_field(text: str) -> str:
    """n-experts -> n_experts."""
    return text.replace("-", "_")


def require_one_of(name: str, value: str | None, known: Sequence[str]) -> None:
    """Raise ValueError, before any work, unless the flag's value is a known one, or was not given."""
    if value is not None and value not in known:
        raise ValueError(f"{name} {value}: must be one of {', '.join(known)}")


def _kind(f: dataclasses.Field) -> type:
    """What reads the words for a field."""
    return {"int": integer, "int | None": integer, "float": number, "float | None": number}.get(f.type, str)


def _metavar(kind: Callable) -> str:
    """What stands for the value in the help."""
    return {integer: "INT", number: "FLOAT"}.get(kind, "STR")


def add_path(parser: argparse.ArgumentParser) -> None:
    """`--path FIELD=A,B ...`."""
    about = "sizes that grow together, e.g. width=32,64,128 n_experts=4,8,16"
    parser.add_argument("--path", type=path_field, nargs="+", default=[], metavar="FIELD=A,B", help=about)


def add_config(parser: argparse.ArgumentParser, without: tuple[str, ...] = (), several: bool = False) -> None:
    """A flag for every field of Config, with several values if so wanted; the checks and the messages are Config's own."""
    group, about = parser.add_argument_group("model"), _field_help(Config)
    for f in dataclasses.fields(Config):
        if f.name in (*without, "seed", "vocab_size"):
            continue
        name = f"--{f.name.replace('_', '-')}"
        if f.type == "bool":
            group.add_argument(name, action="store_true", default=None, help=about[f.name])
        else:
            kind, values = _kind(f), {"nargs": "+"} if several and not f.name.startswith("base_") else {}
            group.add_argument(name, type=kind, help=about[f.name], metavar=_metavar(kind), **values)


def config_fields(options: argparse.Namespace, without: tuple[str, ...] = ()) -> dict:
    """The fields of Config that the command line gives."""
    given = ((f.name, getattr(options, f.name, None)) for f in dataclasses.fields(Config) if f.name not in ("seed", *without))
    return {name: value for name, value in given if value is not None}


def add_training(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Flags for the corpus, the device, the number of steps and every field of TrainOptions."""
    group = parser.add_argument_group("training")
    group.add_argument("--corpus", default="pydocs", help="pydocs, shakespeare or a UTF-8 text file (default pydocs)")
    values = {"nargs": "+"} if several else {}
    usual = None if several else STEPS  # a grid has its own default
    group.add_argument("--steps", type=integer, default=usual, help=f"optimiser steps (default {STEPS})", **values)
    group.add_argument("--device", help="cpu or cuda (default: a GPU when there is one)")
    about = _field_help(TrainOptions)
    for f in dataclasses.fields(TrainOptions):
        kind = number if f.name == "betas" else _kind(f)
        shape = {"nargs": 2} if f.name == "betas" else values
        name = f"--{f.name.replace('_', '-')}"
        group.add_argument(name, type=kind, help=about[f.name], metavar=_metavar(kind), **shape)


def train_fields(options: argparse.Namespace) -> dict:
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(TrainOptions)}
    return {name: value for name, value in given.items() if value is not None}
