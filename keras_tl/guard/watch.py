"""Remembering the values of weights, and finding those that are no longer what they were."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import keras
import numpy as np

from keras_tl.guard.fingerprints import Fingerprints
from keras_tl.internals.values import held_values, on_host, replicas


@dataclasses.dataclass(frozen=True)
class Change:
    """A weight that is not what it was, with its values on the host.

    Attributes:
        weight: The `keras.Variable`.
        before: NumPy array of the weight's shape: what it was.
        after: NumPy array of the same shape: what it is.
    """

    weight: keras.Variable
    before: np.ndarray
    after: np.ndarray

    @property
    def difference(self) -> np.ndarray:
        """Float64 array of the weight's shape: `after - before`, 0 where no bit has changed."""
        changed = _bits(self.before) != _bits(self.after)
        with np.errstate(invalid="ignore", over="ignore"):
            difference = self.after.astype("float64") - self.before.astype("float64")
        return np.where(changed.any(axis=-1), difference, 0.0)

    @property
    def largest(self) -> float:
        """Float. The largest absolute difference; NaN if a number became NaN or stopped being."""
        return float(np.abs(self.difference).max())


class WeightWatch:
    """Knows which of some weights have changed since it was made, bit for bit.

    Looking costs one pass over the weights where they are; see `Fingerprints`. On TensorFlow their
    old values take no memory until a weight changes, and then that of this weight. On JAX and torch
    they are copied to the host's memory.

    Args:
        weights: A list of `keras.Variable` of any shape and dtype.

    Example:

    >>> layer = keras.layers.Dense(2)
    >>> layer.build((None, 3))
    >>> watch = WeightWatch(layer.weights)
    >>> _ = layer.bias.assign([0.0, 0.5])
    >>> [(change.weight.name, change.largest) for change in watch.changes()]
    [('bias', 0.5)]
    """

    def __init__(self, weights: Iterable[keras.Variable]):
        self._fingerprints = Fingerprints(weights)
        self.weights = self._fingerprints.weights
        self.begin()

    def begin(self) -> None:
        """Keeps the values that the weights have now as those to compare with."""
        self._held = {id(weight): held_values(weight) for weight in self.weights}
        self._expected = self._fingerprints.compute()

    def end(self) -> None:
        """Lets go of the old values."""
        self._held = {}

    def changes(self) -> list[Change]:
        """Returns the weights that have changed, in their order."""
        now = self._fingerprints.compute()
        suspects = self._fingerprints.suspects(self._expected, now)
        changes = [self._change_of(weight) for weight in suspects]
        return [change for change in changes if change is not None]

    def restore(self, changes: Iterable[Change]) -> None:
        """Gives weights the values back that they had."""
        for change in changes:
            change.weight.assign(change.before)

    def _change_of(self, weight: keras.Variable) -> Change | None:
        """Compares the weight with what was kept of it, on each replica.

        A suspect need not have changed: small weights share a fingerprint.
        """
        for before, after in zip(self._held[id(weight)], replicas(weight), strict=True):
            change = Change(weight, on_host(before), on_host(after))
            # Not the numbers: NaN differs from itself, and 0.0 equals -0.0.
            if (_bits(change.before) != _bits(change.after)).any():
                return change
        return None


def _bits(array: np.ndarray) -> np.ndarray:
    """Returns the bytes of each element, along a last axis."""
    array = np.ascontiguousarray(array)
    return array.reshape(-1).view("uint8").reshape(*array.shape, array.itemsize)
