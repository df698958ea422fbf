"""Reading records by their position, in memory or on disk.

TensorFlow never lets go of a function that a data set calls, so a reader outlives its data set. Its
files do not: they are closed at the end of each epoch, and however many data sets are read at once,
no more than `_OPEN_FILES` are open.
"""

from __future__ import annotations

import collections
import math
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import BinaryIO

import numpy as np

from keras_tl.errors import StaleCacheError
from keras_tl.features.records import Records
from keras_tl.features.store import Shard
from keras_tl.internals.from_generator import ALIGNMENT, aligned

_OPEN_FILES = 128
_KEPT = 8


class RecordReader:
    """Reads records by their position, from one pass after the other.

    Args:
        records: The `Records`.
        shards: List of `Shard`, those of a pass after each other.

    Attributes:
        records: The `Records`.
    """

    def __init__(self, records: Records, shards: Sequence[Shard]):
        self.records = records
        self._buffers = _Buffers()
        self._in_memory: list[np.ndarray] | None = None
        self._shards: list[Shard] = []
        if shards and isinstance(shards[0].source, list):
            batches = [batch for shard in shards for batch in shard.source]
            self._in_memory = [np.concatenate(field) for field in zip(*map(records.split, batches))]
            return
        self._shards = list(shards)
        self._ends = np.cumsum([shard.samples.count for shard in shards], dtype=np.int64)

    def read(self, positions: np.ndarray) -> list[np.ndarray]:
        """Returns the records at these positions, as an array for each field."""
        arrays = [
            self._buffers.take((len(positions), *shape), dtype)
            for shape, dtype in self.records.layout
        ]
        if self._in_memory is not None:
            for values, array in zip(self._in_memory, arrays, strict=True):
                np.take(values, positions, axis=0, out=array)
            return arrays
        # Shards without samples end where they start; on the right of an end is the next with some.
        shards = np.searchsorted(self._ends, positions, side="right")
        starts = np.concatenate([[0], self._ends])[shards]
        rows = zip(*map(_bytes_of_rows, arrays))
        # A file that another thread's batch pushes out of the pool must not close in between.
        with _open_files.lock:
            for shard, index, row in zip(shards.tolist(), (positions - starts).tolist(), rows):
                self._read_record(shard, index, row)
        return arrays

    def release(self) -> None:
        """Lets go of records in memory, which the data set would keep. None are read after it."""
        if self._in_memory is not None:
            # Copies, as a slice would keep all of the array.
            self._in_memory = [np.copy(values[:0]) for values in self._in_memory]

    def _read_record(self, shard: int, index: int, fields: Sequence[memoryview]) -> None:
        file = self._file(shard)
        offset = len(self._shards[shard].header)
        file.seek(offset + index * self.records.dtype.itemsize)
        for field in fields:
            _fill(file, field)

    def close(self) -> None:
        """Closes the files. What is read after it opens them again."""
        _open_files.close(self)

    def _file(self, shard: int) -> BinaryIO:
        return _open_files.get((self, shard), lambda: self._opened(self._shards[shard]))

    def _opened(self, shard: Shard) -> BinaryIO:
        file = shard.source.open("rb", buffering=0)
        # The header has the digest of the records, so a shard that was replaced has another.
        if file.read(len(shard.header)) != shard.header:
            file.close()
            raise StaleCacheError(
                f"{shard.source.name} was recorded again while it was in use. Call the cache again."
            )
        return file


class _OpenFiles:
    """The files that are open, of all readers, those used last at the end.

    Attributes:
        lock: Held while a file is read, so that none is closed meanwhile.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._files: collections.OrderedDict[tuple[RecordReader, int], BinaryIO]
        self._files = collections.OrderedDict()

    def get(self, key: tuple[RecordReader, int], opened: Callable[[], BinaryIO]) -> BinaryIO:
        """Returns a file, opened now if it is not."""
        file = self._files.get(key)
        if file is None:
            while len(self._files) >= _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            file = self._files[key] = opened()
        else:
            self._files.move_to_end(key)
        return file

    def close(self, reader: RecordReader) -> None:
        """Closes the files of a reader."""
        with self.lock:
            for key in [key for key in self._files if key[0] is reader]:
                self._files.pop(key).close()


_open_files = _OpenFiles()


class _Buffers:
    """Memory for arrays, reused once an array is released.

    TensorFlow uses an aligned array as it is, without a copy, and keeps it until the tensor is
    gone. New memory for each batch cost more than reading the batch: 0.7 ms for 1.5 MB.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}

    def take(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """Returns an array, whatever is in it."""
        size = math.prod(shape) * dtype.itemsize
        free = self._free.setdefault(size, [])
        memory = free.pop() if free else np.empty(size + ALIGNMENT, np.uint8)
        array = aligned(memory, size).view(dtype).reshape(shape)
        weakref.finalize(array, _put_back, free, memory).atexit = False
        return array


def _put_back(free: list[np.ndarray], memory: np.ndarray) -> None:
    if len(free) < _KEPT:
        free.append(memory)


def _bytes_of_rows(array: np.ndarray) -> list[memoryview]:
    raw = memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    size = len(raw) // max(1, len(array))
    return [raw[row * size : (row + 1) * size] for row in range(len(array))]


def _fill(file: BinaryIO, view: memoryview) -> None:
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise OSError(f"{file.name} has become shorter since it was checked.")
        view = view[count:]
