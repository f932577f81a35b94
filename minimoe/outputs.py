"""Files that a command writes, checked before its work begins: what is said to be written is what is there."""

from __future__ import annotations

import os
from pathlib import Path

from matplotlib.backend_bases import FigureCanvasBase


def figure_file(name: str | None) -> Path | None:
    """The file for `--figure NAME`, with ".png" where the name has no ending; None without a name. Makes its folder.

    Raises ValueError for an ending that is no picture's, OSError for a folder, or a file that cannot be written.
    """
    if not name:
        return None
    if os.path.isdir(name) or name.endswith(("/", os.sep)):
        raise IsADirectoryError(f"--figure {name}: it is a folder; give a file in it, such as {Path(name) / 'curves.png'}")
    path = Path(name) if Path(name).suffix or os.path.exists(name) else Path(f"{name}.png")
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in kinds:
        raise ValueError(f"--figure {name}: its ending must be one of {', '.join(sorted(kinds))}")
    return writable_file("--figure", path)


def writable_file(flag: str, path: str | os.PathLike | None) -> Path | None:
    """The file that a flag names, or None. Makes its folder; raises OSError, naming the flag, if it cannot be written."""
    if not path:
        return None
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(f"{flag} {path} is a device: give a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.exists()
        with open(path, "ab"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise OSError(f"{flag} {path} cannot be written: {error.strerror or error}") from error
    return path
