"""Snapshots of a training run in a folder, of which the newest is always whole.

A snapshot is a folder of its own, `epoch-000012`, with `state.json` and `state.weights.h5`: numbers
and strings, and arrays, nothing that runs. It is written under another name, flushed to the disk
and then renamed, in one step. So a process that is killed at any moment leaves the snapshot before
it, or this one. The one before is kept too, and used if this one turns out to be damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import h5py
import numpy as np

from keras_tl.version import __version__

FORMAT = 1

_STATE, _ARRAYS = "state.json", "state.weights.h5"
_KEPT = 2


class Backup:
    """The snapshots of one run.

    Args:
        folder: Path of the folder, which is made if it is not there.
        writes: Bool. Whether snapshots are made and deleted, and not only loaded. Defaults to
            `True`.

    Raises:
        ValueError: If nothing can be written there.
    """

    def __init__(self, folder: str | os.PathLike[str], *, writes: bool = True):
        self.folder = pathlib.Path(folder)
        if not writes:
            return
        probe = self.folder / ".probe"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ValueError(
                f"`backup_dir={os.fspath(folder)!r}` cannot be written to: {error}. Pass a folder "
                "on a disk with space, in which you may create files."
            ) from error

    def save(
        self, epoch: int, state: Mapping[str, Any], arrays: Mapping[str, Sequence[np.ndarray]]
    ) -> None:
        """Makes a snapshot the current one.

        Args:
            epoch: Int. How many epochs are done.
            state: What JSON can hold.
            arrays: Dictionary from names to lists of arrays of any shapes and dtypes.

        Raises:
            OSError: If it cannot be written. The current snapshot is then the one before.
        """
        aside = self.folder / ".writing"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        _write_arrays(aside / _ARRAYS, arrays)
        content = {"arrays": _digest(aside / _ARRAYS), "epoch": epoch, **state}
        written = {"format": FORMAT, "keras_tl": __version__, "content": content}
        written["digest"] = _digest_of(content)
        (aside / _STATE).write_text(json.dumps(written), encoding="utf-8")
        for path in (aside / _ARRAYS, aside / _STATE, aside):
            _flush(path)
        target = self.folder / f"epoch-{epoch:06d}"
        if target.exists():
            _remove(target)
        aside.rename(target)
        _flush(self.folder)
        for old in self._snapshots()[_KEPT:]:
            _remove(old)

    def load(
        self, refuse: Callable[[dict[str, Any]], str | None]
    ) -> tuple[dict[str, Any], dict[str, list[np.ndarray]], list[str]] | None:
        """Returns the newest snapshot that can be used.

        Args:
            refuse: Function from a state to why it cannot be used, or None.

        Returns:
            The state, the arrays, and why newer snapshots were not used; or None if there is none.

        Raises:
            ValueError: If there are snapshots, and none can be used.
        """
        reasons: list[str] = []
        for path in self._snapshots():
            try:
                state, arrays = _read(path)
                reason = refuse(state)
            except (OSError, KeyError, ValueError, TypeError) as error:
                reason = str(error)
            if reason is None:
                return state, arrays, reasons
            reasons.append(f"{path.name}: {reason}")
        if not reasons:
            return None
        raise ValueError(
            f"`backup_dir={os.fspath(self.folder)!r}` has no snapshot to go on from. "
            f"{' '.join(reasons)} To start over, delete the folder or pass another."
        )

    def delete(self) -> None:
        """Removes the snapshots, and the folder if nothing else is in it."""
        for path in [*self._snapshots(), self.folder / ".writing"]:
            _remove(path)
        try:
            self.folder.rmdir()
        except OSError:
            pass

    def _snapshots(self) -> list[pathlib.Path]:
        """The newest first."""
        return sorted(self.folder.glob("epoch-" + "[0-9]" * 6), reverse=True)


def _read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, list[np.ndarray]]]:
    written = json.loads((path / _STATE).read_text(encoding="utf-8"))
    if written["format"] > FORMAT:
        raise ValueError(
            f"it was written by keras_tl {written['keras_tl']}, in a format that this version, "
            f"{__version__}, does not know."
        )
    content = written["content"]
    if written["digest"] != _digest_of(content):
        raise ValueError(f"{_STATE} is damaged.")
    if content["arrays"] != _digest(path / _ARRAYS):
        raise ValueError(f"{_ARRAYS} is damaged.")
    return content, _read_arrays(path / _ARRAYS)


def _write_arrays(path: pathlib.Path, arrays: Mapping[str, Sequence[np.ndarray]]) -> None:
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            group = file.create_group(name)
            for index, value in enumerate(values):
                # Types that HDF5 does not know (bfloat16) are kept as bytes.
                known = value.dtype.kind in "biuf"
                raw = value if known else np.frombuffer(value.tobytes(), np.uint8)
                dataset = group.create_dataset(f"{index:06d}", data=raw)
                dataset.attrs["dtype"] = value.dtype.name
                dataset.attrs["shape"] = value.shape


def _read_arrays(path: pathlib.Path) -> dict[str, list[np.ndarray]]:
    with h5py.File(path, "r") as file:
        return {
            name: [_array(group[index]) for index in sorted(group)] for name, group in file.items()
        }


def _array(dataset: h5py.Dataset) -> np.ndarray:
    value = dataset[()]
    dtype = np.dtype(str(dataset.attrs["dtype"]))
    if value.dtype != dtype:
        value = np.frombuffer(value.tobytes(), dtype)
    return np.asarray(value).reshape(tuple(dataset.attrs["shape"]))


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _flush(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: pathlib.Path) -> None:
    """Removes a snapshot: first its name, so that a half of it is never taken for one."""
    if path.exists():
        gone = path.with_name(".removing")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone)
