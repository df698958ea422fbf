"""A learning rate that finds itself: it starts high, and goes down by thirds.

Each rate is a stage of its own, from the best weights so far, with a new optimizer. So a rate that
only hurts costs its epochs and nothing else, and the next one starts where it has started. Once a
rate has helped, two lower ones that do not end the run; after one, the next may yet improve on what
was luck, for with little data to validate on the best epoch of a high rate is often that. In the
last epochs of `fit` the rate falls, so that a run of few epochs also ends at a low one. No rate
depends on what a run has measured: a run that is resumed has the same ones.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras

from keras_tl.internals.optimizers import without_loss_scale
from keras_tl.optimizers.groups import newest_group

if TYPE_CHECKING:
    from keras_tl.stages.progress import Progress
    from keras_tl.stages.stage import Stage

AUTO = "auto"
# A third each time. Of Adam the last is 1e-5, the rate of the guide.
FACTORS = (1.0, 0.3, 0.1, 0.03, 0.01)
# A new optimizer's first steps are as large as its rate, whatever the gradients are.
WARMUP_STEPS = 30
# Lower ones are best in their first epochs, or not at all, so the usual patience will do.
PATIENT_RATES = 2
# Epochs at the end of `fit` in which the rate falls to nothing.
FALLING_EPOCHS = 20
_USUAL_RATE = 1e-3


def is_auto(learning_rate: Any) -> bool:
    """Whether a learning rate is to be found."""
    return isinstance(learning_rate, str) and learning_rate == AUTO


def first_rate(optimizer: keras.Optimizer) -> float:
    """Returns the learning rate to start with: the default of the optimizer's class.

    Args:
        optimizer: A `keras.optimizers.Optimizer`. Of parameter groups, the newest one counts.

    Example:

    >>> first_rate(keras.optimizers.Adam(0.5)), first_rate(keras.optimizers.SGD(0.5))
    (0.001, 0.01)
    """
    kind = type(without_loss_scale(newest_group(optimizer)))
    argument = inspect.signature(kind.__init__).parameters.get("learning_rate")
    default = getattr(argument, "default", None)
    return default if isinstance(default, float) and default > 0 else _USUAL_RATE


def with_rates(stages: Sequence[Stage], optimizer: keras.Optimizer) -> tuple[list[Stage], int]:
    """Returns stages with numbers for a rate that is to be found, and the first of these stages.

    Args:
        stages: List of `Stage`, of which the last may have the learning rate `"auto"`.
        optimizer: The optimizer that the rates are for.

    Returns:
        A tuple of a list of `Stage` and the number of the first one that looks for a rate, counted
        from 1; the number after the last where none does.

    Example:

    >>> from keras_tl import Stage
    >>> stages, first = with_rates([Stage("all", "auto")], keras.optimizers.Adam())
    >>> [f"{stage.learning_rate:.0e}" for stage in stages], first
    (['1e-03', '3e-04', '1e-04', '3e-05', '1e-05'], 1)
    """
    *others, last = stages
    if not is_auto(last.learning_rate):
        return list(stages), len(stages) + 1
    highest = first_rate(optimizer)
    rates = [float(f"{highest * factor:.6g}") for factor in FACTORS]
    found = [dataclasses.replace(last, learning_rate=rate) for rate in rates]
    return [*others, *found], len(stages)


def warmup_steps(given: int | None, finds_rate: bool) -> int:
    """Returns the steps of warm-up after a switch: as given, or enough for a rate to be found."""
    if given is not None:
        return given
    return WARMUP_STEPS if finds_rate else 0


def shorter_warm_up(warmup_steps: int, updates_left: int) -> int:
    """Returns the steps of warm-up of a rate that is tried, if `fit` ends soon.

    A fifth of what is left at most: else a short run would end in its warm-up.

    Args:
        warmup_steps: Int. The steps of the warm-up where there is time enough.
        updates_left: Int. How many updates `fit` still has.

    Example:

    >>> shorter_warm_up(30, 1000), shorter_warm_up(30, 35)
    (30, 7)
    """
    return min(warmup_steps, max(1, updates_left // 5))


def least_patience(warmup_steps: int, steps: int) -> int:
    """Returns for how many epochs without improvement each of the first rates is tried at least.

    That is twice the warm-up: epochs of few steps, in the middle of which a rate is still low, say
    little about it.

    Args:
        warmup_steps: Int. The steps of the warm-up.
        steps: Int. Steps in an epoch; 0 if that is not known.

    Example:

    >>> least_patience(30, 7), least_patience(30, 100)
    (9, 1)
    """
    return math.ceil(2 * warmup_steps / steps) if steps else 0


def highest_rate(first: float, epochs_left: int, of: int) -> float:
    """Returns the rate that falls from the highest to nothing in the last epochs of `fit`.

    Args:
        first: Float. The highest of the rates that are tried.
        epochs_left: Int. How many epochs there are, this one included.
        of: Int. How many there were when the first rate was.

    Example:

    >>> [highest_rate(1e-3, epochs, of=50) for epochs in (40, 20, 10, 1)]
    [0.002, 0.001, 0.0005, 5e-05]
    >>> [highest_rate(1e-3, epochs, of=4) for epochs in (4, 3, 2, 1)]
    [0.001, 0.00075, 0.0005, 0.00025]
    """
    return first * epochs_left / min(FALLING_EPOCHS, of)


def brings_nothing(progress: Progress, first: int) -> bool:
    """Whether this rate and the one before have not helped, after one that has.

    Args:
        progress: The `Progress` of the run.
        first: Int. The number of the first stage that looks for a rate.
    """
    return _improved_since(progress, first) and not _improved_since(progress, progress.stage - 1)


def only_hurts(progress: Progress, first: int) -> bool:
    """Whether no rate has helped yet."""
    return not _improved_since(progress, first)


def _improved_since(progress: Progress, stage: int) -> bool:
    """Whether the best epoch so far is of this stage or a later one."""
    if progress.best is None or progress.best.epoch is None:
        return False
    # A loaded model may be in the stage when the run starts.
    starts = [one.epoch for one in progress.transitions if one.stage <= stage]
    return progress.best.epoch >= max(starts, default=0)
