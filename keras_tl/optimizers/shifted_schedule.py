"""A learning-rate schedule that starts at another step than its optimizer."""

from __future__ import annotations

from typing import Any

import keras

from keras_tl.internals.optimizers import schedule_of, steps_of


@keras.saving.register_keras_serializable(package="keras_tl")
class ShiftedSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule that is at its step 0 when its optimizer has made `first_step` steps.

    An optimizer that keeps its state keeps its step count, so a schedule that is new to it would
    start in its middle or at its end. The count cannot be reset, for Adam's bias correction reads
    it. `UnfreezeAtConvergence` gives such a schedule to the head.

    Args:
        schedule: A `LearningRateSchedule`.
        first_step: Int. Before this step the schedule stays at its first value. Below 0, the
            schedule started before its optimizer.

    Example:

    >>> schedule = ShiftedSchedule(keras.optimizers.schedules.PolynomialDecay(1.0, 4, 0), 100)
    >>> [round(float(schedule(step)), 4) for step in (0, 100, 102)]
    [1.0, 1.0, 0.5]
    """

    def __init__(self, schedule: keras.optimizers.schedules.LearningRateSchedule, first_step: int):
        super().__init__()
        self.schedule = schedule
        self.first_step = int(first_step)

    def __call__(self, step: Any) -> Any:
        return self.schedule(keras.ops.maximum(keras.ops.subtract(step, self.first_step), 0))

    def get_config(self) -> dict[str, Any]:
        schedule = keras.optimizers.schedules.serialize(self.schedule)
        return {"schedule": schedule, "first_step": self.first_step}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> ShiftedSchedule:
        schedule = keras.optimizers.schedules.deserialize(config["schedule"], custom_objects)
        return cls(schedule, config["first_step"])


def first_step_of(optimizer: keras.Optimizer) -> int:
    """Returns the step of an optimizer at which its schedule starts: 0 for one not shifted."""
    schedule = schedule_of(optimizer)
    return schedule.first_step if isinstance(schedule, ShiftedSchedule) else 0


def set_first_step(optimizer: keras.Optimizer, first_step: int) -> None:
    """Has an optimizer's schedule start at a step. Without a schedule, nothing happens."""
    schedule = schedule_of(optimizer)
    if isinstance(schedule, ShiftedSchedule):
        schedule = schedule.schedule
    if schedule is not None:
        optimizer.learning_rate = ShiftedSchedule(schedule, first_step) if first_step else schedule


def begin_schedule(optimizer: keras.Optimizer) -> None:
    """Has an optimizer's schedule start now, whatever step the optimizer has reached."""
    set_first_step(optimizer, steps_of(optimizer))


def continue_schedule(old: keras.Optimizer, new: keras.Optimizer) -> None:
    """Has the schedule that `new` took over from `old` continue, though its step count restarts."""
    done = steps_of(old) - steps_of(new)
    set_first_step(new, first_step_of(old) - done)
