"""Sketches of arrays: a few numbers by which data is known again.

Each row is projected on fixed irregular weights; of the projections the mean and the mean square
are kept. They are the same for rows in another order, and differ for other rows. They are compared
with a tolerance, since preprocessing may round otherwise on another machine.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import keras
import numpy as np

_TOLERANCE = 1e-5
_ELEMENTS_AT_ONCE = 1 << 22
# Of an array in a file no more is read than this, rows at even distances.
_BYTES_OF_A_FILE = 1 << 28


def sketch(array: Any) -> dict[str, Any]:
    """Returns what an array is known by, as JSON can hold it.

    Args:
        array: A NumPy array, tensor or data frame with rows along its first axis.

    Example:

    >>> one = sketch(np.arange(6.0).reshape(3, 2))
    >>> alike(one, sketch(np.array([[4.0, 5.0], [0.0, 1.0], [2.0, 3.0]])))
    True
    >>> alike(one, sketch(np.arange(1.0, 7.0).reshape(3, 2)))
    False
    """
    known: dict[str, Any] = {"shape": [int(side) for side in array.shape]}
    if hasattr(array, "dtype"):
        known["dtype"] = str(array.dtype)
    try:
        known["moments"] = _moments(array)
    except (AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError):
        # Data of any library comes here. What cannot be read is known by its shape.
        known["moments"] = None
    return known


def alike(was: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two sketches are of the same rows, in any order."""
    if was["shape"] != now["shape"] or was["moments"] is None or now["moments"] is None:
        return was["shape"] == now["shape"]
    (mean, square), (other, other_square) = was["moments"], now["moments"]
    size = math.sqrt(max(square, other_square))
    return abs(mean - other) <= _TOLERANCE * size and math.isclose(
        square, other_square, rel_tol=2 * _TOLERANCE
    )


def _moments(array: Any) -> list[float]:
    if not array.shape:
        array = np.asarray(array)[np.newaxis]
    count, total, square = 0, 0.0, 0.0
    step = max(1, _ELEMENTS_AT_ONCE // max(1, math.prod(array.shape[1:])))
    rows = _read_rows(array)
    for start in range(0, rows.shape[0], step):
        projections = _projections(_on_host(rows[start : start + step]))
        count += len(projections)
        total += float(projections.sum())
        square += float(np.square(projections).sum())
    return [total / max(count, 1), square / max(count, 1)]


def _read_rows(array: Any) -> Any:
    if isinstance(array, np.memmap) and array.nbytes > _BYTES_OF_A_FILE:
        return array[:: math.ceil(array.nbytes / _BYTES_OF_A_FILE)]
    return array


def _projections(rows: np.ndarray) -> np.ndarray:
    flat = rows.reshape(len(rows), -1)
    if flat.dtype.kind in "OSU":
        flat = np.vectorize(_number_of, otypes=[np.float32])(flat)
    with np.errstate(all="ignore"):
        found = flat.astype(np.float32, copy=False) @ _weights(flat.shape[1])
    return np.nan_to_num(found.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)


def _weights(count: int) -> np.ndarray:
    """Numbers between -1 and 1 without a pattern, the same ones always."""
    numbers = np.sin(np.arange(1, count + 1) * 12.9898) * 43758.5453
    return (2 * (numbers - np.floor(numbers)) - 1).astype(np.float32)


def _number_of(text: Any) -> float:
    """Returns a number for a text; of a path only the name counts, as folders may move."""
    text = text if isinstance(text, bytes) else str(text).encode()
    return zlib.crc32(text.replace(b"\\", b"/").rsplit(b"/", 1)[-1]) / 2**32


def _on_host(rows: Any) -> np.ndarray:
    try:
        return np.asarray(rows)
    except (RuntimeError, TypeError):  # A tensor of torch that is on a GPU or has a gradient.
        return np.asarray(keras.ops.convert_to_numpy(rows))
