"""Files that are whole: whoever reads one sees the old file or the new one, and so does whoever comes after a kill."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

LONGEST = 200  # characters of a file's name in the name of its unfinished copy


def write_whole(path: str | os.PathLike, data: bytes) -> None:
    """Write a file in one step: beside its place, to the disk, then renamed. A kill may leave the unfinished copy.

    A file that is there keeps its mode, a new one gets what the umask says. Raises OSError.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    copy = unfinished(path)
    try:
        with open(copy, "xb") as file:
            if path.exists():
                shutil.copymode(path, copy)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(copy, path)
    except BaseException:
        copy.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def unfinished(path: Path) -> Path:
    """A new name beside the file."""
    return path.with_name(f"{path.name[:LONGEST]}.{secrets.token_hex(8)}")


def sync_folder(folder: Path) -> None:
    """Let a new file's name survive a power cut too, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
