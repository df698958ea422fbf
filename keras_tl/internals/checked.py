"""With which versions of Keras each touch of its inside was checked, and what says so later."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import keras

# The oldest and the newest that the tests run with; on TensorFlow 2.16 to 2.21.
SINCE_3_15 = "3.15.0 to 3.16.0.dev2026102704"

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class UnsupportedKerasError(RuntimeError):
    """This version of Keras lacks an internal part that keras_tl needs.

    Example:

    >>> from keras_tl import UnsupportedKerasError
    >>> try:
    ...     raise UnsupportedKerasError("'Layer' has no '_sublayers'", "3.15.0 to 3.15.1")
    ... except UnsupportedKerasError as error:
    ...     print(str(error)[-79:])
    checked with Keras 3.15.0 to 3.15.1: install one of these, or a newer keras_tl.
    """

    def __init__(self, lacks: object, versions: str):
        super().__init__(
            f"This version of keras_tl cannot work with Keras {keras.__version__}, which lacks an "
            f"internal part that it needs ({lacks}). It was checked with Keras {versions}: install "
            "one of these, or a newer keras_tl."
        )


def checked(
    versions: str,
) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Decorates a function that touches Keras' internals: a missing one is an error that says so.

    An AttributeError of anything that the function calls, such as the user's model, stays what it
    is.

    Args:
        versions: String. The versions of Keras that the function was checked with.

    Example:

    >>> @checked("3.15.0 to 3.15.1")
    ... def sublayers(layer):
    ...     return layer._sublayers_of_the_future
    >>> try:
    ...     sublayers(keras.layers.Dense(1))
    ... except UnsupportedKerasError as error:
    ...     print(str(error)[-79:])
    checked with Keras 3.15.0 to 3.15.1: install one of these, or a newer keras_tl.
    """

    def decorate(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        @functools.wraps(function)
        def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            try:
                return function(*args, **kwargs)
            except AttributeError as error:
                if _raised_here(error):
                    raise UnsupportedKerasError(error, versions) from error
                raise

        return call

    return decorate


def _raised_here(error: AttributeError) -> bool:
    """Whether it is an attribute that the function itself looked for, of an object of Keras."""
    outer = error.__traceback__
    deeper = outer.tb_next.tb_next if outer is not None and outer.tb_next is not None else None
    while deeper is not None and deeper.tb_frame.f_code.co_name in _LOOKUPS:
        deeper = deeper.tb_next
    of_none = error.obj is None and error.name is not None
    return deeper is None and not of_none


# On torch, layers are modules that look attributes up themselves.
_LOOKUPS = ("__getattr__", "__getattribute__")
