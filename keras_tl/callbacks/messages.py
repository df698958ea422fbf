"""Saying what a callback does, as Keras says things."""

from __future__ import annotations

import logging

import keras

_logger = logging.getLogger("keras_tl")


def say(message: str) -> None:
    """Prints the message, or logs it where Keras' interactive logging is switched off."""
    if keras.config.is_interactive_logging_enabled():
        print(message, flush=True)
    else:
        _logger.info(message)
