"""Files that are there whole or not at all, also on Windows, where a file may be in use."""

from __future__ import annotations

import errno
import filecmp
import os
import pathlib
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

_ON_WINDOWS = os.name == "nt"
_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8)


def put(folder: pathlib.Path, name: str, pieces: Sequence[Any]) -> None:
    """Writes a file in one step: under another name, flushed to the disk, and then renamed.

    Args:
        folder: Path, made if it is not there.
        name: String. The file's name.
        pieces: List of bytes.

    Raises:
        OSError: If it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{name}.{uuid.uuid4().hex}.tmp"
    try:
        with aside.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        _patiently(os.replace, aside, folder / name)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and (folder / name).exists():
            return  # Another process has finished the same part, and cleared up.
        if isinstance(error, PermissionError) and _same_content(aside, folder / name):
            aside.unlink(missing_ok=True)
            return  # Another process has written the same, and has it open.
        aside.unlink(missing_ok=True)
        what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        raise OSError(
            error.errno,
            f"{name} could not be written: {what}. The shards that were finished before are "
            "kept; make room and call the cache again to continue after them",
            str(folder),
        ) from error


def remove(folder: pathlib.Path, *patterns: str) -> None:
    """Removes the files that match, those of the first pattern first.

    Raises:
        OSError: If a file cannot be removed.
    """
    for pattern in patterns:
        for path in folder.glob(pattern):
            try:
                _patiently(path.unlink, True)
            except PermissionError as error:
                raise OSError(
                    error.errno,
                    f"{path.name} could not be removed: {error.strerror}. On Windows that is "
                    "so while a file is read. End the epochs and processes that read these "
                    "features first",
                    str(folder),
                ) from error


def _patiently(change: Callable[..., Any], *arguments: Any) -> None:
    """Changes a file, which on Windows fails while it is open, if only to a virus scanner."""
    for pause in _PAUSES if _ON_WINDOWS else ():
        try:
            change(*arguments)
        except PermissionError:
            time.sleep(pause)
        else:
            return
    change(*arguments)


def _same_content(some: pathlib.Path, other: pathlib.Path) -> bool:
    try:
        return filecmp.cmp(some, other, shallow=False)
    except OSError:
        return False
