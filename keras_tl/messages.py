"""Saying what is done, as Keras says things."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import keras

from keras_tl.internals.processes import is_chief

_logger = logging.getLogger("keras_tl")
_NAMES_SHOWN = 3


def say(message: str) -> None:
    """Prints the message, or logs it where Keras' interactive logging is switched off.

    Of several processes that train one model, only the first does.
    """
    if not is_chief():
        return
    if keras.config.is_interactive_logging_enabled():
        print(message, flush=True)
    else:
        _logger.info(message)


def some(names: Sequence[str]) -> str:
    """Returns the first few names, and how many more there are."""
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
