"""The values of variables, on their devices."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np


def itemsize(dtype: str) -> int:
    """Returns how many bytes an element of that dtype takes."""
    bits = re.search(r"\d+", dtype)
    return 1 if bits is None else int(bits[0]) // 8


def replicas(weight: keras.Variable) -> list[Any]:
    """Returns the backend's variables behind a weight: one, or one for each replica."""
    if keras.backend.backend() == "tensorflow":
        # Under a distribution strategy the value is one variable for each replica, in `values`.
        return list(getattr(weight.value, "values", [weight.value]))
    return [weight.value]


def device_of(value: Any) -> str:
    """Returns the name of the device that the value is on, for `on_device`."""
    return value.device if keras.backend.backend() == "tensorflow" else ""


def on_device(name: str) -> contextlib.AbstractContextManager:
    """Returns a context in which operations run on that device."""
    return keras.device(name) if name else contextlib.nullcontext()


def on_host(value: Any) -> np.ndarray:
    """Returns a weight's or tensor's values as a NumPy array.

    In one dimension on the way: `convert_to_numpy` fails for a single bfloat16 number. What is
    spread over processes is fetched from them, so each must call this.
    """
    flat = keras.ops.convert_to_numpy(_whole(keras.ops.reshape(value, (-1,))))
    return np.array(flat).reshape(value.shape)


def _whole(value: Any) -> Any:
    """Returns a tensor, with the parts of it that only other processes hold."""
    if keras.backend.backend() != "jax" or value.is_fully_addressable or value.is_fully_replicated:
        return value
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(value, tiled=True)


def copy_value(source: keras.Variable, target: keras.Variable) -> None:
    """Gives a variable the value of another: a copy, as JAX lets no two variables share one."""
    target.assign(keras.ops.copy(source))


def held_values(weight: keras.Variable) -> list[Any]:
    """Returns the values that the weight has now on each replica, and keeps them.

    A tensor read from a TensorFlow variable shares its memory until the variable changes, and is
    left with the old values then: nothing is copied before. JAX gives the memory of a weight away
    at each step and torch updates it in place, so there the values are copied to the host.
    """
    if keras.backend.backend() == "tensorflow":
        return [variable.read_value() for variable in replicas(weight)]
    return [on_host(weight)]


@functools.cache
def fused(function: Callable) -> Callable:
    """Returns the function such that its steps become one pass over memory, where XLA is.

    The same for the same function: TensorFlow keeps what it has compiled as long as the process
    lives.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True, autograph=False)
    return function


def compiled_reading(
    weights: Sequence[keras.Variable], function: Callable[[list[Any]], Any]
) -> Callable[[], Any]:
    """Returns a function without arguments for `function` of the weights' values at that time.

    It is compiled where the backend compiles. 64-bit integers are 64 bits wide in it on JAX too.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        variables = [variable for weight in weights for variable in replicas(weight)]
        return tf.function(
            lambda: function([variable.read_value() for variable in variables]), autograph=False
        )
    if keras.backend.backend() == "jax":
        import jax

        compiled = jax.jit(function)

        def read_and_compute() -> Any:
            with jax.enable_x64(True):
                return _whole(compiled([weight.value for weight in weights]))

        return read_and_compute
    return lambda: function([keras.ops.stop_gradient(weight.value) for weight in weights])
