"""Learning-rate warm-up: from zero to the full rate in a number of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import keras
import numpy as np

from keras_tl.internals.values import on_host


class WarmUp:
    """Raises the learning rates of fresh optimizers linearly from zero to what they are.

    At the step at which an optimizer has made n updates its rate is `n / steps` of the full one. If
    another callback sets the rate meanwhile, that rate is kept, and the warm-up is over.

    Args:
        optimizers: List of `keras.optimizers.Optimizer`, each with a number for a learning rate.
            Those that have made updates already are left alone.
        steps: Int. How many steps the warm-up takes.
    """

    def __init__(self, optimizers: Sequence[keras.Optimizer], steps: int):
        self._optimizers = optimizers
        self._steps = steps
        # By index: the full rate, and the one that was set last.
        self._full: dict[int, float] = {}
        self._set: dict[int, float] = {}
        for index, optimizer in enumerate(optimizers):
            if optimizer.built and _updates(optimizer) == 0:
                self._full[index] = self._set[index] = learning_rate_of(optimizer)

    def before_step(self) -> bool:
        """Sets the rates for the next step. Returns whether the warm-up is over."""
        for index in [*self._full]:
            if self._was_set(index):
                done = min(1.0, _updates(self._optimizers[index]) / self._steps)
                self._set_rate(index, done * self._full[index])
                if done < 1.0:
                    continue
            del self._full[index]
        return not self._full

    def finish(self) -> None:
        """Sets the full rates."""
        for index, full in self._full.items():
            if self._was_set(index):
                self._set_rate(index, full)

    def get_state(self) -> dict[str, float]:
        """Returns the full rates by index, as JSON can hold them, for `set_state`."""
        return {str(index): full for index, full in self._full.items() if self._was_set(index)}

    def set_state(self, state: Mapping[str, float]) -> None:
        """Goes on from what `get_state` returned, with the rates that the optimizers have."""
        self._full = {int(index): full for index, full in state.items()}
        self._set = {index: learning_rate_of(self._optimizers[index]) for index in self._full}

    def _was_set(self, index: int) -> bool:
        """Whether the rate is still the one that was set here."""
        expected = np.dtype(keras.config.floatx()).type(self._set[index])
        return learning_rate_of(self._optimizers[index]) == float(expected)

    def _set_rate(self, index: int, rate: float) -> None:
        self._set[index] = rate
        self._optimizers[index].learning_rate = rate


def _updates(optimizer: keras.Optimizer) -> int:
    return int(on_host(optimizer.iterations))


def learning_rate_of(optimizer: keras.Optimizer) -> float:
    """Returns the learning rate that an optimizer has now."""
    return float(keras.ops.convert_to_numpy(optimizer.learning_rate))
