"""Learning-rate warm-up: from zero to the full rate in a number of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_tl import internals


class WarmUp:
    """Raises the learning rates of fresh optimizers linearly from zero to what they are.

    At the step at which an optimizer has made n updates its rate is `n / steps` of the full one. If
    another callback sets the rate meanwhile, its word counts, and the warm-up is over.

    Args:
        optimizers: List of `keras.optimizers.Optimizer`, each with a number for a learning rate.
        steps: Int. How many steps the warm-up takes.
    """

    def __init__(self, optimizers: Sequence[keras.Optimizer], steps: int):
        self._steps = steps
        self._full = [(optimizer, learning_rate_of(optimizer)) for optimizer in optimizers]
        self._set: dict[int, float] = {}

    def before_step(self) -> bool:
        """Sets the rates for the next step. Returns whether the warm-up is over."""
        over = [self._raise(index) for index in range(len(self._full))]
        return all(over)

    def _raise(self, index: int) -> bool:
        """Sets the rate of one optimizer. Returns whether its warm-up is over."""
        optimizer, full = self._full[index]
        expected = np.dtype(keras.config.floatx()).type(self._set.get(index, full))
        if learning_rate_of(optimizer) != float(expected):
            return True
        done = int(internals.on_host(optimizer.iterations))
        self._set[index] = full * min(1.0, done / self._steps)
        optimizer.learning_rate = self._set[index]
        return done >= self._steps


def learning_rate_of(optimizer: keras.Optimizer) -> float:
    """Returns the learning rate that an optimizer has now."""
    return float(keras.ops.convert_to_numpy(optimizer.learning_rate))


def check_can_be_set(what: str, *rates: Any) -> None:
    """Raises a ValueError unless all learning rates are numbers.

    Args:
        what: String. Who needs that, for the message.
        *rates: Learning rates as a `Stage` takes them, optimizers, or None.
    """
    for rate in rates:
        if isinstance(rate, keras.Optimizer):
            rate = internals.without_loss_scale(rate).get_config()["learning_rate"]
            numbers = isinstance(rate, float)
        else:
            numbers = rate is None or isinstance(rate, (float, Mapping))
        if not numbers:
            raise ValueError(
                f"`{what}` needs learning rates that are numbers; a schedule or a function sets "
                "the rate at each step itself. Give the schedule a warm-up (`CosineDecay` has one) "
                f"or pass a number. Received: {rate!r}."
            )
