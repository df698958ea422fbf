"""Checks of arguments that several callbacks, layers and functions take.

Each raises a ValueError that says what was received and what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_tl.internals.optimizers import without_loss_scale
from keras_tl.messages import how_to_get_a_model

if TYPE_CHECKING:
    from keras_tl.optimizers.learning_rates import LearningRate


def check_model(model: Any, function: str) -> None:
    """Raises a ValueError unless `model` is a Keras model.

    Args:
        model: What a function was given.
        function: String. The function, for the message.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"`{function}` takes a `keras.Model`. Received: {model!r} (of type "
            f"{type(model).__name__}).{how_to_get_a_model(model)}"
        )


def check_count(name: str, value: int, at_least: int = 0) -> None:
    """Raises a ValueError unless `value` is an int of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < at_least:
        raise ValueError(
            f"`{name}` must be an int of at least {at_least}. Received: {name}={value!r}."
        )


def check_min_delta(value: float) -> None:
    """Raises a ValueError unless `value` is a finite number."""
    if not _is_number(value) or not np.isfinite(value):
        raise ValueError(f"`min_delta` must be a finite number. Received: min_delta={value!r}.")


def check_monitor(monitor: str, mode: str) -> None:
    """Raises a ValueError unless these can be the arguments of the callbacks that monitor."""
    if not isinstance(monitor, str):
        raise ValueError(f"`monitor` must be a name in the logs. Received: monitor={monitor!r}.")
    if mode not in ("auto", "min", "max"):
        raise ValueError(f'`mode` must be "auto", "min" or "max". Received: mode={mode!r}.')


def check_learning_rate(learning_rate: Any, argument: str = "learning_rate") -> LearningRate:
    """Returns the learning rate as an optimizer takes it: numbers as a Python float.

    Raises:
        ValueError: If it is a number that is not finite and above 0, or not a number, schedule or
            callable.
    """
    if isinstance(learning_rate, keras.optimizers.schedules.LearningRateSchedule) or callable(
        learning_rate
    ):
        return learning_rate
    if _is_number(learning_rate) and math.isfinite(learning_rate) and learning_rate > 0:
        return float(learning_rate)
    raise ValueError(
        f"`{argument}` must be a finite number above 0, a `LearningRateSchedule` or a callable "
        f"without arguments. Received: {argument}={learning_rate!r}."
    )


def check_number(learning_rate: Any, argument: str) -> float:
    """Returns a learning rate that must be a number, as a Python float."""
    rate = check_learning_rate(learning_rate, argument)
    if isinstance(rate, float):
        return rate
    raise ValueError(
        f"`{argument}` must be a number here. For a rate that changes, use the callback "
        f"`LearningRateScheduler`, which scales all alike. Received: {argument}={learning_rate!r}."
    )


def check_can_be_set(what: str, *rates: Any) -> None:
    """Raises a ValueError unless all learning rates are numbers.

    Args:
        what: String. Who needs that, for the message.
        *rates: Learning rates as a `Stage` takes them, optimizers, or None.
    """
    for rate in rates:
        if isinstance(rate, keras.Optimizer):
            rate = without_loss_scale(rate).get_config()["learning_rate"]
            numbers = isinstance(rate, float)
        else:
            # A name stands for numbers that are found later.
            numbers = rate is None or isinstance(rate, (float, Mapping, str))
        if not numbers:
            raise ValueError(
                f"`{what}` needs learning rates that are numbers; a schedule or a function sets "
                "the rate at each step itself. Give the schedule a warm-up (`CosineDecay` has one) "
                f"or pass a number. Received: {rate!r}."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
