"""Has a weight changed? Fingerprints of weights, computed on the device that they are on.

The bits of a weight are read as 32-bit words (narrower numbers are widened), in blocks of 32 rows
of 64 words, the last block filled up with zeros. With random keys q and p, column l of a
fingerprint is, modulo 2**64, a sum over blocks g and rows m of the words x:

    F[l] = sum_g p[g] * S[g, l]        S[g, l] = sum_m q[m, l] * x[g, m, l]

Each q is one of the 2**32 - 1 integers from -(2**31) to 2**31 - 1 but 0; each p is one of the 2**63
odd integers below 2**64.

**A change within one word is always seen**, and so every change of one element of up to 32 bits.
The word changes by d with 0 < |d| < 2**32, and S by q * d, with 0 < |q * d| < 2**64: S changes. An
odd p has an inverse, so F changes.

**Any other change is missed with a probability below 2**-27** (7.5e-9), whatever the change, as
long as it does not depend on the keys. Take a column in which words change, and one such block; let
its S change by D. For fixed other keys, F stays as it was only if p * D has one certain value. If
2**v is the largest power of 2 that divides D, at most 2**v of the 2**63 odd p give that value; if
D = 0, all may. And D is rarely divided by a large 2**t: of one word in it that changes by d, which
2**31 divides at most, only one residue of q modulo 2**(t - 31) will do, so P(2**t divides D) is at
most 2**(31 - t) + 2**-32, and P(D = 0) at most 2**-32 (both times 1 + 2**-31, for the 0 left out).
The probability of a miss is therefore at most P(D = 0) + 2**-63 + sum_t P(2**t divides D) *
2**(t - 64), for t from 1 to 63. The terms up to t = 31 add up to less than 2**-32, the 32 others to
less than 2**-28 + 2**-32. Keys are drawn anew for every set of weights, from the operating system's
entropy.

References:
- Carter and Wegman, 1979, "Universal classes of hash functions"
- Lemire and Kaser, 2014, "Strongly universal string hashing is fast"
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_tl.internals.processes import of_chief
from keras_tl.internals.values import (
    compiled_reading,
    device_of,
    fused,
    itemsize,
    on_device,
    replicas,
)

_ROWS = 32
_COLUMNS = 64
_BLOCK = _ROWS * _COLUMNS
# Weights with fewer blocks are put together and fingerprinted as one: fewer calls are faster.
_BLOCKS_ALONE = 32


class Fingerprints:
    """Fingerprints of a set of weights, all computed in one compiled call where the weights are.

    Nothing but the fingerprints (512 bytes for each large weight, and for the small ones together)
    comes to the host. On the device the call needs memory for the small weights once more, and for
    a sixteenth of the largest one.

    Args:
        weights: A list of `keras.Variable` of any shape and dtype.

    Example:

    >>> layer = keras.layers.Dense(2)
    >>> layer.build((None, 3))
    >>> fingerprints = Fingerprints(layer.weights)
    >>> before = fingerprints.compute()
    >>> _ = layer.bias.assign([0.0, -0.0])
    >>> [weight.name for weight in fingerprints.suspects(before, fingerprints.compute())]
    ['kernel', 'bias']
    """

    def __init__(self, weights: Iterable[keras.Variable]):
        self.weights = [weight for weight in weights if math.prod(weight.shape)]
        self._parts = _parts(self.weights)
        random = np.random.default_rng()  # Not Keras' seeds, which training draws from.
        keys = random.integers(-(2**31), 2**31 - 1, (_ROWS, _COLUMNS), dtype="int32")
        blocks = max((part.blocks for part in self._parts), default=0)
        # Odd numbers have inverses modulo 2**64: no change of one block is multiplied away.
        odd = 1 | random.integers(-(2**63), 2**63 - 1, blocks, dtype="int64", endpoint=True)
        if self._parts:
            # Processes that share a model must run one program, and so have the same keys in it.
            # Without 0, which would hide what it is multiplied with.
            self._row_keys = of_chief(keys + (keys >= 0))
            self._block_keys = of_chief(odd)
            self._fold = fused(_fold)
            self._compute = compiled_reading(self.weights, self._fold_parts)

    def compute(self) -> np.ndarray:
        """Returns the fingerprints of the values that the weights have now.

        Returns:
            An int64 array of shape `(parts, 64)`.
        """
        if not self._parts:
            return np.zeros((0, _COLUMNS), "int64")
        return np.asarray(ops.convert_to_numpy(self._compute()))

    def suspects(self, before: np.ndarray, after: np.ndarray) -> list[keras.Variable]:
        """Returns the weights that may have changed between two calls of `compute`.

        Args:
            before: What `compute` returned.
            after: What it returned later.

        Returns:
            The list of weights, in their order: large ones that have changed, and all small ones
            that are fingerprinted together with one that has.
        """
        # A change is missed by the chance above; of small weights all those put together count.
        differs = (before != after).any(axis=1)
        parts = [part for part, differ in zip(self._parts, differs, strict=True) if differ]
        suspected = {span.weight for part in parts for span in part.spans}
        return [self.weights[index] for index in sorted(suspected)]

    def _fold_parts(self, values: list[Any]) -> Any:
        """Returns the fingerprints of all parts, from the values on all replicas."""
        folded = []
        for part in self._parts:
            with on_device(part.device):
                pieces = [
                    ops.reshape(values[span.value], (-1,))[span.start : span.stop]
                    for span in part.spans
                ]
                joined = pieces[0] if len(pieces) == 1 else ops.concatenate(pieces)
                block_keys = self._block_keys[: part.blocks]
                folded.append(self._fold(joined, self._row_keys, block_keys))
        return ops.stack(folded)


def _fold(elements: Any, row_keys: Any, block_keys: Any) -> Any:
    """Returns the 64 numbers that the module's docstring calls F."""
    words = _words(elements)
    blocks = block_keys.shape[0]
    rest = blocks * _BLOCK - words.shape[0]
    if rest:
        words = ops.pad(words, [[0, rest]])
    words = ops.reshape(words, (blocks, _ROWS, _COLUMNS))
    products = ops.cast(words, "int64") * ops.cast(row_keys, "int64")
    return ops.sum(ops.sum(products, axis=1) * ops.expand_dims(block_keys, 1), axis=0)


def _words(elements: Any) -> Any:
    """Returns the bits of a one-dimensional tensor, as integers of at most 32 bits."""
    dtype = keras.backend.standardize_dtype(elements.dtype)
    if dtype == "bool":
        return ops.cast(elements, "int8")
    return ops.view(elements, f"int{min(8 * itemsize(dtype), 32)}")


@dataclasses.dataclass(frozen=True)
class _Span:
    """Elements `start` to `stop` of the value of one weight on one replica."""

    weight: int
    value: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class _Part:
    """What is fingerprinted as one: most of a large weight, or many small spans."""

    device: str
    spans: tuple[_Span, ...]
    blocks: int


def _parts(weights: list[keras.Variable]) -> list[_Part]:
    parts = []
    small: dict[tuple[str, str], list[_Span]] = {}
    values = [(index, value) for index, w in enumerate(weights) for value in replicas(w)]
    for position, (index, value) in enumerate(values):
        device = device_of(value)
        dtype = weights[index].dtype
        count, in_block = math.prod(weights[index].shape), _elements_in_block(dtype)
        blocks = count // in_block
        whole = blocks * in_block if blocks >= _BLOCKS_ALONE else 0
        if whole:
            parts.append(_Part(device, (_Span(index, position, 0, whole),), blocks))
        if whole < count:
            small.setdefault((device, dtype), []).append(_Span(index, position, whole, count))
    for (device, dtype), spans in small.items():
        count = sum(span.stop - span.start for span in spans)
        parts.append(_Part(device, tuple(spans), math.ceil(count / _elements_in_block(dtype))))
    return parts


def _elements_in_block(dtype: str) -> int:
    return _BLOCK * 4 // max(itemsize(dtype), 4)
