"""How much memory this machine has left, and what is too large for it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def free_memory() -> int | None:
    """The bytes that this process could still get; None where the system does not say."""
    with suppress(OSError, ValueError, KeyError):
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        known = {words[0]: 1024 * int(words[1]) for words in lines}
        return min([known["MemAvailable:"] + known["SwapFree:"], *_limits()])
    return None


def _limits() -> list[int]:
    """What a container allows its processes, if it limits them."""
    with suppress(OSError, ValueError):  # "max" is no number: no limit
        return [int(Path("/sys/fs/cgroup/memory.max").read_text())]
    return []


def require_room(kind: str, path: str | os.PathLike, copies: int) -> None:
    """Raise ValueError if memory cannot hold so many copies of the file."""
    size, free = os.path.getsize(path), free_memory()
    if free is not None and copies * size > free:
        need = f"reading its {gigabytes(size)} takes {gigabytes(copies * size)} of memory"
        raise ValueError(f"{kind} {os.path.basename(path)!r} is too large: {need}, and {gigabytes(free)} are free")


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
