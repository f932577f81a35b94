"""Values at the door: a wrong one is a ValueError or a TypeError that names the field, the value and what would be valid."""

from __future__ import annotations

import math
from numbers import Integral, Real

import numpy as np

LIMIT = 2**63  # of integers: what torch, numpy and JSON readers can hold
KINDS = {  # a field's annotation -> the type that it gets, the types that are taken for it, and what these are called
    "bool": (bool, (bool, np.bool_), "True or False"),
    "int": (int, Integral, "an integer"),
    "float": (float, Real, "a number"),
    "str": (str, str, "text"),
}
PAIR = "tuple[float, float]"


def typed(name: str, kind: str, value):
    """The value as the type that the annotation `kind` means, numpy's scalars included. Raises TypeError, or ValueError for a
    number that no float holds. A kind that is neither PAIR nor one of KINDS is not checked."""
    kind, _, other = kind.partition(" | ")
    if value is None and other == "None":
        return None
    if kind == PAIR:
        if not isinstance(value, list | tuple | np.ndarray) or getattr(value, "ndim", 1) != 1 or len(value) != 2:
            raise TypeError(f"{name}={shown(value)}: must be a pair of numbers")
        return tuple(typed(name, "float", number) for number in value)
    if kind not in KINDS or other not in ("", "None"):
        return value
    made, taken, called = KINDS[kind]
    if not isinstance(value, taken) or (isinstance(value, bool) and kind != "bool"):
        raise TypeError(f"{name}={shown(value)}: must be {called}")
    try:
        return made(value)
    except OverflowError:
        raise ValueError(f"{name}={shown(value)}: is too large") from None


def require(valid: bool, name: str, value, rule: str) -> None:
    """Raise ValueError, naming a field, its value and what would be valid, unless it is."""
    if not valid:
        raise ValueError(f"{name}={shown(value)}: {rule}")


def require_columns(frame, name: str, *columns: str) -> None:
    """Raise ValueError unless the frame has these columns, and rows."""
    require(len(frame) > 0, name, len(frame), "has no rows")
    missing = sorted(set(columns) - set(frame.columns))
    require(not missing, name, missing, "these columns are missing")


def whole(value, least: int) -> bool:
    """Whether the value is an integer, numpy's included, and at least so large."""
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= value < LIMIT


def finite(name: str, value) -> float:
    """The value as a float. Raises ValueError or TypeError unless it is a finite number."""
    require(math.isfinite(value := typed(name, "float", value)), name, value, "must be a finite number")
    return value


def not_negative(name: str, value) -> float:
    """The value as a float. Raises ValueError or TypeError unless it is finite and not negative."""
    require(0 <= (value := typed(name, "float", value)) < math.inf, name, value, "must be finite and not negative")
    return value


def positive(name: str, value) -> float:
    """The value as a float. Raises ValueError or TypeError unless it is positive and finite."""
    require(0 < (value := typed(name, "float", value)) < math.inf, name, value, "must be positive and finite")
    return value


def shown(value) -> str:
    """The value for a message. Python does not print integers of more than 4300 digits."""
    try:
        said = repr(value)
    except ValueError:
        said = f"a {type(value).__name__} too long to print"
    return said if len(said) < 300 else f"{said[:100]}..."
