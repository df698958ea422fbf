"""Learning-rate warm-up: from zero to the full rate in a number of steps."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence

import keras
import numpy as np

from keras_tl.internals.values import on_host
from keras_tl.optimizers.groups import learning_rate_of

# By optimizer that has the rate of a step now: its full rate, and that one. With the optimizer and
# not with a warm-up, for what cuts an epoch short leaves it to whoever trains the model next.
_FULL: weakref.WeakKeyDictionary[keras.Optimizer, tuple[float, float]] = weakref.WeakKeyDictionary()


class WarmUp:
    """Raises the learning rates of fresh optimizers linearly from zero to what they are.

    At the step at which an optimizer has made n updates its rate is `n / steps` of the full one.
    Between epochs it has the full one, so that this is what other callbacks read, scale and save;
    what they make of it is what the warm-up goes on to. If another callback sets a rate between the
    steps of an epoch, that rate is kept, and the warm-up is over.

    Args:
        optimizers: List of `keras.optimizers.Optimizer`, each with a number for a learning rate.
            Those that have made updates already are left alone.
        steps: Int. How many steps the warm-up takes.

    Attributes:
        steps: Int. How many steps it takes.
    """

    def __init__(self, optimizers: Sequence[keras.Optimizer], steps: int):
        self._optimizers = optimizers
        self.steps = steps
        self._rising = [
            index for index, one in enumerate(optimizers) if one.built and _updates(one) == 0
        ]

    def before_step(self) -> bool:
        """Sets the rates for the next step. Returns whether the warm-up is over."""
        self.pause()
        for index in [*self._rising]:
            optimizer = self._optimizers[index]
            done = _updates(optimizer) / self.steps
            if done >= 1.0:
                self._rising.remove(index)
                continue
            full = learning_rate_of(optimizer)
            _FULL[optimizer] = full, done * full
            optimizer.learning_rate = done * full
        return not self._rising

    def pause(self) -> None:
        """Sets the full rates, until the next step."""
        for index in [*self._rising]:
            if not give_full_rates([self._optimizers[index]]):
                self._rising.remove(index)

    def get_state(self) -> dict[str, float]:
        """Returns the full rates by index, as JSON can hold them, for `set_state`."""
        return {str(index): learning_rate_of(self._optimizers[index]) for index in self._rising}

    def set_state(self, state: Mapping[str, float]) -> None:
        """Continues from what `get_state` returned."""
        self._rising = [int(index) for index in state]
        for index in self._rising:
            # An older backup has the rate of a step among the optimizer's variables.
            self._optimizers[index].learning_rate = state[str(index)]


def give_full_rates(optimizers: Iterable[keras.Optimizer]) -> bool:
    """Sets the full rates of optimizers that have the rate of a step.

    Args:
        optimizers: Iterable of `keras.optimizers.Optimizer`.

    Returns:
        Whether each has its full rate now: not where something else has set another one.
    """
    whole = True
    for optimizer in optimizers:
        full, of_step = _FULL.pop(optimizer, (None, None))
        if full is None:
            continue
        # The optimizer holds it in `floatx`, which rounds it.
        expected = np.dtype(keras.config.floatx()).type(of_step)
        if learning_rate_of(optimizer) == float(expected):
            optimizer.learning_rate = full
        else:
            whole = False
    return whole


def _updates(optimizer: keras.Optimizer) -> int:
    # Not steps: with gradient accumulation, only an update uses the rate.
    return int(on_host(optimizer.iterations))
