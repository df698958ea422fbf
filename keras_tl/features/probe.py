"""One sample and its features, kept to see that the same backbone still makes them.

What tells backbones apart, configuration and weights, does not hold all that layers can depend on:
the body of a function, a vocabulary, an attribute of a layer of one's own.
"""

from __future__ import annotations

import base64
import dataclasses
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tl.backbone.selecting import flatten_layers
from keras_tl.internals.batches import predictions
from keras_tl.internals.layers import rounds_coarsely

# Of the largest number in a feature. Rounding differs between machines and compilers, in deep
# networks by some 1e-5 in float32.
_TOLERANCE, _TOLERANCE_OF_HALF = 1e-3, 5e-2


@dataclasses.dataclass(frozen=True)
class Probe:
    """A sample and its features.

    Attributes:
        inputs: Tensors of a batch of one, nested as the model takes them.
        features: Dictionary from names to arrays.
    """

    inputs: Any
    features: dict[str, Any]

    def to_list(self) -> list[Any]:
        """Returns what JSON can hold."""
        flat = keras.tree.flatten(self.inputs)
        return [[_packed(x) for x in flat], {k: _packed(v) for k, v in self.features.items()}]

    @classmethod
    def from_list(cls, data: list[Any]) -> Probe:
        """Returns what `to_list` was made of, with the inputs as a flat list.

        Raises:
            ValueError: If the data is not what `to_list` returns.
        """
        inputs, features = data
        return cls(
            [_unpacked(one) for one in inputs],
            {str(name): _unpacked(one).numpy() for name, one in features.items()},
        )

    def differs(self, extractor: keras.Model, spec: Any) -> bool:
        """Whether a model returns other features for the sample than those kept.

        Args:
            extractor: A model from inputs to a dictionary of features.
            spec: `tf.TypeSpec`s of its inputs, nested as it takes them.
        """
        flat, specs = keras.tree.flatten(self.inputs), keras.tree.flatten(spec)
        if len(flat) != len(specs) or not all(
            one.dtype == x.dtype and one.shape[1:].is_compatible_with(x.shape[1:])
            for one, x in zip(specs, flat)
        ):
            return True
        inputs = keras.tree.pack_sequence_as(spec, flat)
        ((_, now),) = predictions(extractor, [(inputs,)])
        # By their order: names change with that in which models are made.
        before = list(self.features.values())
        coarse = rounds_coarsely(flatten_layers(extractor))
        return len(before) != len(now) or not same_features(
            dict(zip(now, before)), now, coarse=coarse
        )


def same_features(some: dict[str, Any], others: dict[str, Any], *, coarse: bool = False) -> bool:
    """Whether features are the same but for rounding; see `same_array`."""
    return all(
        same_array(np.asarray(some[name]), np.asarray(others[name]), coarse=coarse) for name in some
    )


def same_array(one: np.ndarray, other: np.ndarray, *, coarse: bool = False) -> bool:
    """Whether two arrays are the same but for rounding.

    Args:
        one: An array.
        other: Another.
        coarse: Bool. Whether they may be computed in half precision, whatever their own dtype is.
    """
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    half = coarse or one.dtype.name in ("float16", "bfloat16")
    one, other = one.astype("float64"), other.astype("float64")
    scale = np.max(np.abs(one), initial=0.0, where=np.isfinite(one))
    tolerance = scale * (_TOLERANCE_OF_HALF if half else _TOLERANCE)
    return np.allclose(one, other, rtol=0.0, atol=tolerance, equal_nan=True)


def _unpacked(packed: Any) -> tf.Tensor:
    dtype, raw = packed
    try:
        tensor = tf.io.parse_tensor(base64.b64decode(raw, validate=True), dtype)
    except tf.errors.OpError as error:
        raise ValueError("the sample that is kept in it cannot be read") from error
    if not tensor.shape.rank or tensor.shape[0] != 1:
        raise ValueError("the sample that is kept in it is not one")
    return tensor


def _packed(x: Any) -> list[str]:
    tensor = tf.convert_to_tensor(x)
    raw = tf.io.serialize_tensor(tensor).numpy()
    return [tensor.dtype.name, base64.b64encode(raw).decode()]
