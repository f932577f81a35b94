"""Conditions on a frame's rows, as the command line writes them: `forced_balance=False`, `lr=2^-6`, `data_seed=None`."""

from __future__ import annotations

import pandas as pd

from .flags import number

SHOWN = 12  # values that an error lists


def rows_where(frame: pd.DataFrame, condition: str) -> pd.DataFrame:
    """The rows that meet a condition COLUMN=VALUE, the value read by the column's type; None is a missing value.

    Raises ValueError naming the condition, if there is no such column, if the value is not of its type, or if no row has it.
    """
    name, _, value = condition.partition("=")
    columns = [column for column in frame.columns if column != "history"]
    if name not in columns:
        raise ValueError(f"--where {condition}: write COLUMN=VALUE; the columns are {', '.join(columns)}")
    column = frame[name]
    try:
        rows = frame[_meeting(column, value)]
    except (ValueError, OverflowError) as error:
        raise ValueError(f"--where {condition}: {name} must be {_kind(column)}") from error
    if rows.empty:
        raise ValueError(f"--where {condition}: no row has it; {name} is {_values(column)}")
    return rows


def _meeting(column: pd.Series, value: str) -> pd.Series:
    """For each row, whether it has the value."""
    if value == "None":
        return column.isna()
    if pd.api.types.is_bool_dtype(column):
        return column == (["false", "true"].index(value.lower()) == 1)
    if pd.api.types.is_integer_dtype(column):
        return column == int(value)
    if pd.api.types.is_float_dtype(column):
        return column == number(value)
    return column.astype(str) == value


def _kind(column: pd.Series) -> str:
    if pd.api.types.is_bool_dtype(column):
        return "True or False"
    return "an integer" if pd.api.types.is_integer_dtype(column) else "a number"


def _values(column: pd.Series) -> str:
    """The different values of the column, for an error."""
    there = [*dict.fromkeys("None" if missing else str(v) for v, missing in zip(column, column.isna(), strict=True))]
    more = f" and {len(there) - SHOWN} more" if len(there) > SHOWN else ""
    return ", ".join(there[:SHOWN]) + more
