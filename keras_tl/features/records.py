"""A sample as a record of fixed size: its features, targets and weights, one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import tensorflow as tf

from keras_tl.errors import UncacheableError

_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class Field:
    """One tensor of a sample.

    Attributes:
        shape: Tuple of ints, without the batch axis.
        dtype: String. The dtype that it is kept in.
        read_dtype: String. The dtype that it is read in.
    """

    shape: tuple[int, ...]
    dtype: str
    read_dtype: str

    def to_list(self) -> list[Any]:
        """Returns what JSON can hold."""
        return [list(self.shape), self.dtype, self.read_dtype]

    @classmethod
    def from_list(cls, data: Sequence[Any]) -> Field:
        """Returns what `to_list` was made of."""
        return cls(tuple(data[0]), data[1], data[2])


class Records:
    """Samples as structured arrays.

    Args:
        fields: List of `Field`.
    """

    def __init__(self, fields: Sequence[Field]):
        self.fields = list(fields)
        self.dtype = np.dtype(
            [(str(index), _raw(field.dtype), field.shape) for index, field in enumerate(fields)]
        )

    @classmethod
    def like(cls, batch: Sequence[np.ndarray], dtypes: Sequence[str | None]) -> Records:
        """Returns the records for samples like those of a batch.

        Args:
            batch: List of arrays.
            dtypes: For each, the dtype that it is kept in, if not its own.
        """
        return cls(
            [
                Field(array.shape[1:], dtype or array.dtype.name, array.dtype.name)
                for array, dtype in zip(batch, dtypes, strict=True)
            ]
        )

    def pack(self, batch: Sequence[np.ndarray]) -> np.ndarray:
        """Returns a batch of arrays as one structured array.

        Raises:
            UncacheableError: If shapes or dtypes are others than those of the first batch.
            ValueError: If a value is too large for its dtype.
        """
        packed = np.empty(len(batch[0]), self.dtype)
        for index, (array, field) in enumerate(zip(batch, self.fields, strict=True)):
            if (array.shape[1:], array.dtype.name) != (field.shape, field.read_dtype):
                raise UncacheableError(
                    f"All samples must have tensors of the same shape and dtype. The first batch "
                    f"has {field.read_dtype}{field.shape}; another one has "
                    f"{array.dtype.name}{array.shape[1:]}. Pad or resize the data, or pool in the "
                    "backbone."
                )
            packed[str(index)] = _narrowed(array, field.dtype)
        return packed

    @property
    def layout(self) -> list[tuple[tuple[int, ...], np.dtype]]:
        """For each field its shape and the dtype that it is kept in."""
        return [(field.shape, _dtype(field.dtype)) for field in self.fields]

    def split(self, packed: np.ndarray) -> list[np.ndarray]:
        """Returns the fields of a structured array, in the dtypes that they are kept in."""
        return [packed[str(index)].view(dtype) for index, (_, dtype) in enumerate(self.layout)]

    def decode(self, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Returns the fields of a batch in the dtypes that they are read in."""
        return [
            tf.ensure_shape(tf.cast(tensor, field.read_dtype), (None, *field.shape))
            for tensor, field in zip(tensors, self.fields, strict=True)
        ]


def _narrowed(array: np.ndarray, dtype: str) -> np.ndarray:
    if array.dtype.name == dtype:
        return array.view(_raw(dtype))
    with np.errstate(over="ignore"):
        narrow = array.astype(_dtype(dtype))
    if dtype == "float16" and np.isinf(narrow).any() and not np.isinf(array).any():
        raise ValueError(
            f"A feature of {np.abs(array).max():.4g} is too large for `dtype='float16'`, whose "
            "largest number is 65504. Pass `dtype='bfloat16'`, or leave `dtype` out."
        )
    return narrow.view(_raw(dtype))


def _dtype(name: str) -> np.dtype:
    return _DTYPES.get(name) or np.dtype(name)


def _raw(name: str) -> np.dtype:
    """The dtype as one that structured arrays know."""
    return np.dtype(np.uint16) if name in _DTYPES else np.dtype(name)
