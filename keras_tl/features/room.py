"""How many bytes there is room for, where no one has said it."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil

# Where nothing tells.
_MEMORY = 4 << 30
# The rest is for what else is going on.
_SHARE = 0.5


def room_in_memory() -> int:
    """Returns how many bytes of memory may be filled: half of what is free."""
    found = [_available(), *_limits()]
    return int(_SHARE * min((one for one in found if one is not None), default=_MEMORY))


def room_on_disk(folder: str | os.PathLike[str]) -> int:
    """Returns how many bytes a folder, which need not be there yet, may take: half of the disk."""
    path = pathlib.Path(folder).absolute()
    there = next(one for one in (path, *path.parents) if one.exists())
    return int(_SHARE * shutil.disk_usage(there).free)


def _available() -> int | None:
    """What the system has left, caches that it would give up included."""
    with contextlib.suppress(OSError, ValueError, StopIteration):  # Only Linux has that file.
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        line = next(one for one in lines if one.startswith("MemAvailable:"))
        return int(line.split()[1]) << 10
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows has no `sysconf`.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return None


def _limits() -> list[int]:
    """What the container that the process runs in leaves it, if it is in one that says so."""
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit.
        group = pathlib.Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        return [max(0, limit - int((group / "memory.current").read_text()))]
    return []
