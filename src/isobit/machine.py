"""What this process may use of the machine: cores and memory, within what its control group (a
container's limits) and its affinity leave it.

The folder ``root`` stands for ``/`` in tests.
"""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/")


def cores(root: Path = _ROOT) -> int:
    """Threads that can really run at once: the cores that may be used, and no more than a quota
    of processor time pays for. A thread beyond that would hold up all others."""
    if hasattr(os, "sched_getaffinity"):
        usable = len(os.sched_getaffinity(0))
    else:
        usable = os.cpu_count() or 1
    return max(1, int(min(usable, _quota(root))))


def total_memory(root: Path = _ROOT) -> float:
    """Bytes of memory that there are; infinite where the system does not tell."""
    try:
        physical: float = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        physical = math.inf
    return min(physical, *(limit for limit, _ in _memory_limits(root)), math.inf)


def free_memory(root: Path = _ROOT) -> float:
    """Bytes that can be had without taking any from others; what only caches files counts as free.
    Infinite where the system does not tell."""
    free = math.inf
    with suppress(OSError, ValueError):
        for line in (root / "proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) << 10
    return max(0, min(free, *(limit - used for limit, used in _memory_limits(root)), math.inf))


def _quota(root: Path) -> float:
    """Cores' worth of processor time; infinite without a quota."""
    least = math.inf
    for folder in _groups(root, "cpu"):
        quota = _numbers(folder / "cpu.max")  # version 2: quota and period, or max
        if not quota:
            quota = _numbers(folder / "cpu.cfs_quota_us") + _numbers(folder / "cpu.cfs_period_us")
        if len(quota) == 2 and min(quota) > 0:
            least = min(least, quota[0] / quota[1])
    return least


def _memory_limits(root: Path) -> Iterator[tuple[float, float]]:
    """Of each group that limits memory: how much, and how much is in use, without file caches."""
    for folder in _groups(root, "memory"):
        for limit, usage, cached in (
            ("memory.max", "memory.current", "file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
        ):
            most, used = _numbers(folder / limit), _numbers(folder / usage)
            if most and used:
                yield most[0], max(0, used[0] - _statistic(folder / "memory.stat", cached))


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control group and of those that it is in, of version 1 or 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounted = root / "sys/fs/cgroup"
    for line in lines:
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        top = mounted / names if names else mounted
        if names and not top.is_dir():
            top = mounted / controller
        inner = top / path.lstrip("/")
        # In a namespace of its own a group sees itself at the top, whatever its path says.
        yield from dict.fromkeys(
            f for f in (inner, *inner.parents) if f.is_dir() and f.is_relative_to(top)
        )


def _numbers(file: Path) -> list[int]:
    """The numbers of a file; none if it is not there, or says "max"."""
    try:
        return [int(word) for word in file.read_text("ascii").split()]
    except (OSError, ValueError):
        return []


def _statistic(file: Path, name: str) -> int:
    with suppress(OSError, ValueError):
        for line in file.read_text("ascii").splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0
