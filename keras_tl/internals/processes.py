"""Processes that train one model together, each started by itself: `keras.distribution`, on JAX."""

from __future__ import annotations

import contextlib
import contextvars
import json
import socket
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

# Whether this process does something by itself for a while, of several that train together.
_apart = contextvars.ContextVar("apart", default=False)


def _is_shared() -> bool:
    """Whether other processes take part in the training: `keras.distribution`, on JAX."""
    distribution = keras.distribution.distribution()
    if distribution is None or keras.backend.backend() != "jax":
        return False
    return distribution.device_mesh.backend_mesh.is_multi_process


def is_chief() -> bool:
    """Whether this process is the one that prints and writes, of those that train one model."""
    return process_index() == 0


def process_index() -> int:
    """Returns which of the processes that train one model this is, 0 for the chief."""
    if not (_is_shared() or _apart.get()):
        return 0
    import jax

    return jax.process_index()


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


def gathered(content: bytes) -> list[bytes]:
    """Returns what each process calls this with, the chief's first. They wait for each other."""
    sizes = of_all(len(content))
    padded = np.zeros(max(1, *sizes), "uint8")
    padded[: len(content)] = np.frombuffer(content, "uint8")
    return [row[:size].tobytes() for row, size in zip(of_all(padded), sizes, strict=True)]


def agreed(function: Callable[[], Any], *kinds: type[Exception]) -> Any:
    """Returns what the function returns; if it raises in one process, all raise.

    Args:
        function: Function without arguments in which no process waits for another.
        *kinds: Errors that are raised as such in all processes, so that those that catch one go on
            in the same way. Of another one, the others are told in a RuntimeError.
    """
    if process_count() == 1:
        return function()
    result, failure = None, None
    try:
        result = function()
    except Exception as error:  # noqa: BLE001  Whatever it is, the others must not wait.
        failure = error
    kinds = (*kinds, RuntimeError)
    failures = [json.loads(one) for one in gathered(json.dumps(_told(failure, kinds)).encode())]
    first = next((index for index, one in enumerate(failures) if one is not None), None)
    if first is None:
        return result
    kind, message = failures[first]
    if failure is not None and isinstance(failure, kinds[kind]):
        raise failure
    raise kinds[kind](f"In process {first}: {message}") from failure


def _told(failure: Exception | None, kinds: tuple[type[Exception], ...]) -> Any:
    """Returns what the other processes are told of an error, as JSON can hold it."""
    if failure is None:
        return None
    kind = next((i for i, one in enumerate(kinds) if isinstance(failure, one)), len(kinds) - 1)
    named = "" if isinstance(failure, kinds[kind]) else f"{type(failure).__name__}: "
    return kind, f"{named}{failure}"


def processes_here() -> int:
    """Returns how many of the processes share the memory of this machine."""
    here = zlib.crc32(socket.gethostname().encode())
    return int(np.sum(of_all(here) == here))


def replica_count() -> int:
    """Returns in how many pieces `keras.distribution` divides each batch, 1 without it."""
    distribution = keras.distribution.distribution()
    if distribution is None or keras.backend.backend() != "jax":
        return 1
    return distribution.num_model_replicas


def divides_data() -> bool:
    """Whether each process is given the same data, of which Keras takes its share."""
    return process_count() > 1 and keras.distribution.distribution().auto_shard_dataset


@contextlib.contextmanager
def whole_data() -> Iterator[None]:
    """A context in which data is read as it is given, and processes do not know of each other.

    Keras hands each process its share of the data otherwise.
    """
    distribution = keras.distribution.distribution()
    if process_count() == 1:
        yield
        return
    token = _apart.set(True)
    keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(distribution)
        _apart.reset(token)
