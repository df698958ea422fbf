"""Processes that train one model together, each started by itself: `keras.distribution`, on JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np


def _is_shared() -> bool:
    """Whether other processes take part in the training: `keras.distribution`, on JAX."""
    distribution = keras.distribution.distribution()
    if distribution is None or keras.backend.backend() != "jax":
        return False
    return distribution.device_mesh.backend_mesh.is_multi_process


def is_chief() -> bool:
    """Whether this process is the one that prints and writes, of those that train one model."""
    if not _is_shared():
        return True
    import jax

    return jax.process_index() == 0


def process_count() -> int:
    """Returns how many processes train one model."""
    if not _is_shared():
        return 1
    import jax

    return jax.process_count()


def of_all(value: Any) -> np.ndarray:
    """Returns what each process calls this with, the chief's first. They wait for each other.

    Args:
        value: A number or NumPy array, of one dtype and shape in all processes.

    Returns:
        A NumPy array with the processes along a new first axis.
    """
    array = np.asarray(value)
    if not (_is_shared() and array.size):
        return array[np.newaxis]
    from jax.experimental import multihost_utils

    # As bytes: JAX would round 64-bit numbers.
    gathered = multihost_utils.process_allgather(np.frombuffer(array.tobytes(), "uint8"))
    return np.ascontiguousarray(gathered).view(array.dtype).reshape(-1, *array.shape)


def of_chief(value: Any) -> np.ndarray:
    """Returns what the chief calls this with, in all processes."""
    return of_all(value)[0]


def in_all(function: Callable[[], Any]) -> Any:
    """Returns what the function returns; raises in all processes if it raises in one.

    One that raises alone leaves the others waiting for it until JAX gives up, minutes later.
    """
    result, failure = None, None
    try:
        result = function()
    except ValueError as error:
        failure = error
    if of_all(failure is not None).any():
        raise failure or RuntimeError("Another process of this run has failed; see what it says.")
    return result
