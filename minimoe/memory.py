"""How much memory this machine has left."""

from __future__ import annotations

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


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
