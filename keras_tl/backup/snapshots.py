"""Snapshots of a training run in a folder, of which the newest is always whole.

A snapshot is a folder of its own, `epoch-000012`, with `state.json` and `state.weights.h5`: numbers
and strings, and arrays, nothing that runs. It is written under another name, flushed to the disk
and then renamed, in one step. So a process that is killed at any moment leaves the snapshot before
it, or this one. The one before is kept too, and used if this one turns out to be damaged.

What a file says is not trusted: anything that reading it raises is a reason not to use the
snapshot. Several processes may meet in one folder: each writes under names of its own, and none
replaces or deletes a snapshot that another has made since it looked.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import h5py
import numpy as np

from keras_tl.backup.temporary_folders import TemporaryFolders
from keras_tl.version import __version__

FORMAT = 2
"""1, of keras_tl 0.1, does not say which run a snapshot is of."""

_STATE, _ARRAYS = "state.json", "state.weights.h5"
_KEPT = 2
# What damaged or hostile bytes set off in those who read them, a RecursionError among them.
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class OtherRunError(ValueError):
    """The snapshots are of another run, so the older ones are of no use either."""


class FolderInUseError(OSError):
    """Another process has made a snapshot in the folder, which must not be replaced."""


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
        # Of a relative path, a `chdir` would make another folder.
        self.folder = pathlib.Path(os.path.abspath(folder))
        self._writer = uuid.uuid4().hex
        self._temporary = TemporaryFolders(self.folder)
        self._known: set[tuple[str, str | None]] = set()
        if not writes:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._temporary.new("probe"):
                pass
            self._temporary.clear()
        except OSError as error:
            raise ValueError(
                f"`backup_dir={os.fspath(folder)!r}` cannot be written to: {error}. Pass a folder "
                "on a disk with space, in which you may create files."
            ) from error
        self._known = {(path.name, _writer_of(path)) for path in self._snapshots()}

    def save(
        self, epoch: int, state: Mapping[str, Any], arrays: Mapping[str, Sequence[np.ndarray]]
    ) -> None:
        """Makes a snapshot the current one.

        Args:
            epoch: Int. How many epochs are done.
            state: What JSON can hold.
            arrays: Dictionary from names to lists of arrays of any shapes and dtypes.

        Raises:
            FolderInUseError: If another process has made a snapshot in the meantime.
            OSError: If it cannot be written. The current snapshot is then the one before.
        """
        self._temporary.clear()
        with self._temporary.new("writing") as aside:
            _write_arrays(aside / _ARRAYS, arrays)
            content = {"arrays": _digest(aside / _ARRAYS), "epoch": epoch, **state}
            written = {"format": FORMAT, "keras_tl": __version__, "writer": self._writer}
            written |= {"content": content, "digest": _digest_of(content)}
            (aside / _STATE).write_text(json.dumps(written), encoding="utf-8")
            # Before the name: a power cut could keep that, and lose what is in the files.
            for path in (aside / _ARRAYS, aside / _STATE):
                _flush(path)
            _flush_folder(aside)
            # As late as can be. What another makes after it has files in it, and `rename` puts
            # nothing in the place of a folder with files.
            self._check_unchanged()
            target = self.folder / f"epoch-{epoch:06d}"
            if target.exists():
                self._remove(target)
            aside.rename(target)
        _flush_folder(self.folder)
        # Only now: until the new name is on the disk, an old snapshot may be all there is.
        for old in self._snapshots()[_KEPT:]:
            self._remove(old)

    def load(
        self,
        refuse: Callable[[dict[str, Any], dict[str, list[np.ndarray]]], str | None],
        *,
        before: int | None = None,
    ) -> tuple[dict[str, Any], dict[str, list[np.ndarray]], list[str]] | None:
        """Returns the newest snapshot that can be used.

        Args:
            refuse: Function from a state and arrays to why they cannot be used, or None. Whatever
                it raises is a reason too, but for an `OtherRunError`.
            before: Int or None. Only snapshots with fewer epochs count.

        Returns:
            The state, the arrays, and why newer snapshots were not used; or None if there is none.

        Raises:
            OtherRunError: If `refuse` raises it.
            ValueError: If there are snapshots, and none can be used.
        """
        reasons: list[str] = []
        for path in self._snapshots():
            if before is not None and _epoch_of(path) >= before:
                continue
            try:
                state, arrays = _read(path)
                reason = refuse(state, arrays)
            except OtherRunError:  # The older ones are of that run too.
                raise
            except _DAMAGE as error:
                reason = _said(error)
            if reason is None:
                return state, arrays, reasons
            reasons.append(f"{path.name}: {reason}")
        if not reasons:
            return None
        raise ValueError(
            f"`backup_dir={os.fspath(self.folder)!r}` has no snapshot to resume from. "
            f"{' '.join(reasons)} To start over, delete the folder or pass another."
        )

    def __bool__(self) -> bool:
        """Whether there are snapshots."""
        return bool(self._snapshots())

    def delete(self) -> None:
        """Removes the snapshots, and the folder if nothing else is in it.

        Those that another process has made in the meantime stay.

        Raises:
            OSError: If they cannot be removed.
        """
        for path in self._snapshots():
            if not self._is_of_another(path):
                self._remove(path)
        self._temporary.clear()
        try:
            self.folder.rmdir()
        except OSError:
            pass

    def _check_unchanged(self) -> None:
        for path in self._snapshots():
            if self._is_of_another(path):
                raise FolderInUseError(
                    f"another process has made {path.name} in {str(self.folder)!r} since this run "
                    "has begun. Give each run a `backup_dir` of its own"
                )

    def _is_of_another(self, path: pathlib.Path) -> bool:
        """Whether another process has made a snapshot since this one looked."""
        writer = _writer_of(path)
        return writer not in (None, self._writer) and (path.name, writer) not in self._known

    def _remove(self, path: pathlib.Path) -> None:
        """Removes a snapshot: first its name, so that a half of it is never taken for one."""
        with self._temporary.new("removing") as gone:
            path.rename(gone / path.name)

    def _snapshots(self) -> list[pathlib.Path]:
        """The newest first."""
        return sorted(self.folder.glob("epoch-" + "[0-9]" * 6), reverse=True)


def _epoch_of(path: pathlib.Path) -> int:
    return int(path.name.removeprefix("epoch-"))


def _writer_of(path: pathlib.Path) -> str | None:
    """Returns which process has made a snapshot, None if that cannot be read."""
    try:
        writer = json.loads((path / _STATE).read_text(encoding="utf-8"))["writer"]
    except _DAMAGE:
        return None
    return writer if isinstance(writer, str) else None


def _said(error: Exception) -> str:
    """Returns what an error says, and its class where that is no sentence."""
    said = str(error)
    plain = isinstance(error, (OSError, ValueError)) and said
    said = said if plain else f"{type(error).__name__} ({said})"
    return said if said.endswith(".") else f"{said}."


def _read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, list[np.ndarray]]]:
    written = json.loads((path / _STATE).read_text(encoding="utf-8"))
    if not isinstance(written, dict) or not {"format", "content", "digest"} <= set(written):
        raise ValueError(f"{_STATE} is not that of a snapshot.")
    if not isinstance(written["format"], int) or written["format"] > FORMAT:
        raise ValueError(
            f"it was written by keras_tl {written.get('keras_tl')}, in a format that this version, "
            f"{__version__}, does not know."
        )
    content = written["content"]
    if written["digest"] != _digest_of(content):
        raise ValueError(f"{_STATE} is damaged.")
    if not isinstance(content, dict) or content.get("epoch") != _epoch_of(path):
        raise ValueError(f"{_STATE} is not that of this epoch.")
    if content.get("arrays") != _digest(path / _ARRAYS):
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
            name: [_array(dataset) for _, dataset in _members(group, h5py.Dataset)]
            for name, group in _members(file, h5py.Group)
        }


def _members(group: h5py.Group, kind: type) -> Iterator[tuple[str, Any]]:
    """Yields what is in a group, and follows no link out of it."""
    for name in sorted(group):
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise ValueError(f"{_ARRAYS} has a link to elsewhere, {name!r}.")
        member = group[name]
        if not isinstance(member, kind):
            raise ValueError(f"{_ARRAYS} has no {kind.__name__.lower()} {name!r}.")
        yield name, member


def _array(dataset: h5py.Dataset) -> np.ndarray:
    size = math.prod(dataset.shape or ()) * dataset.dtype.itemsize
    held = dataset.id.get_storage_size()
    # A few bytes can claim an array of terabytes, or name another file as its place.
    if dataset.shape is None or dataset.external or dataset.is_virtual or held != size:
        raise ValueError(
            f"{_ARRAYS} says that {dataset.name} has {size} bytes, and holds {held} of them."
        )
    value = dataset[()]
    dtype = np.dtype(str(dataset.attrs["dtype"]))
    if value.dtype != dtype:
        value = np.frombuffer(value.tobytes(), dtype)
    return np.asarray(value).reshape(tuple(dataset.attrs["shape"]))


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _flush(path: pathlib.Path) -> None:
    # Windows flushes only what is open for writing.
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(path: pathlib.Path) -> None:
    """Flushes which names are in a folder, where the system can: Windows opens no folder."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
