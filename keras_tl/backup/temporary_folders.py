"""Folders that a process makes for a moment, under names that no other process uses."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator

_KINDS = ("probe", "writing", "removing")
_NAME = re.compile(rf"\.(?:{'|'.join(_KINDS)})-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{{32}}")
_DAY = 24 * 60 * 60

_in_use: set[str] = set()


class TemporaryFolders:
    """Temporary folders within a folder.

    Their names say which process has made them, so that what a killed process leaves can be told
    from what a living one is writing.

    Args:
        folder: Path of the folder.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder = folder

    @contextlib.contextmanager
    def new(self, kind: str) -> Iterator[pathlib.Path]:
        """A context with a new folder, which is removed with what is still in it.

        Args:
            kind: String. What it is for.

        Raises:
            OSError: If it cannot be made or removed.
        """
        path = self._folder / f".{kind}-{_host()}-{os.getpid()}-{uuid.uuid4().hex}"
        _in_use.add(path.name)
        try:
            path.mkdir()
            yield path
        finally:
            _in_use.discard(path.name)
            if path.exists():
                shutil.rmtree(path)

    def clear(self) -> None:
        """Removes what processes have left that are gone."""
        for path in self._folder.glob(".*-*"):
            if _is_left(path):
                shutil.rmtree(path, ignore_errors=True)


def _is_left(path: pathlib.Path) -> bool:
    name = _NAME.fullmatch(path.name)
    if name is None or path.name in _in_use:
        return False
    if name["host"] == _host() and not _is_alive(int(name["pid"])):
        return True
    try:
        return path.stat().st_mtime < time.time() - _DAY
    except OSError:
        return False


def _is_alive(pid: int) -> bool:
    """Whether a process of this machine runs, which is not this one, where that can be asked."""
    if pid == os.getpid():
        return False
    if os.name == "nt":
        return True  # There signal 0 is no question: it interrupts.
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _host() -> str:
    return re.sub(r"[^\w.]", "_", socket.gethostname()) or "host"
