"""Whether it was EarlyStopping that stopped training, or another callback."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_tl.stages.observers import Observer

_Around = tuple[keras.callbacks.Callback, Observer, Observer]


class _StoppedEarly(int):
    """What `stop_training` is after a stop by EarlyStopping alone: true, and not `True`.

    Any other callback that stops training, before or after, sets `True`, and so is told apart. What
    EarlyStopping itself notes does not serve: its `stopped_epoch` is 0 before it has ever stopped,
    and says nothing of others.
    """


def observers(early_stopping: Sequence[keras.callbacks.Callback]) -> list[_Around]:
    """Returns the observers to place around EarlyStopping callbacks, for `stopped_early`."""
    around: list[_Around] = []
    for callback in early_stopping:
        before = _Before()
        around.append((callback, before, _After(before)))
    return around


def stopped_early(model: keras.Model, logs: Mapping[str, Any]) -> bool:
    """Returns whether EarlyStopping, and nothing else, has stopped training that had converged.

    EarlyStopping also stops where nothing improves since the loss is NaN. That is its own business:
    no stage can follow.
    """
    stopped = model.stop_training
    if isinstance(stopped, _StoppedEarly):
        model.stop_training = True
        return math.isfinite(logs.get("loss", 0.0))
    return False


class _Before(Observer):
    stopped: Any = False

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self.stopped = self.model.stop_training


class _After(Observer):
    def __init__(self, before: _Before):
        super().__init__()
        self._before = before

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        by_another = self._before.stopped and not isinstance(self._before.stopped, _StoppedEarly)
        if self.model.stop_training and not by_another:
            self.model.stop_training = _StoppedEarly(True)
