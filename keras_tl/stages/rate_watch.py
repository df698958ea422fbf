"""Which callback undoes the learning rates that a switch has set."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_tl.internals.optimizers import has_settable_rate, schedule_of, steps_of
from keras_tl.optimizers.groups import groups_of, learning_rate_of
from keras_tl.stages.observers import Observer

_TOLERANCE = 1.001
# The hooks in which a rate is set, each with the older names that its default calls.
_HOOKS: dict[str, tuple[str, ...]] = {
    "on_epoch_begin": (),
    "on_epoch_end": (),
    "on_train_batch_begin": ("on_batch_begin",),
    "on_train_batch_end": ("on_batch_end",),
    "on_test_begin": (),
    "on_test_end": (),
}


class RateWatch:
    """Warns once if something raises a learning rate above what a switch has set.

    A lower rate is fine: `ReduceLROnPlateau`, decays and warm-ups make it. A schedule that the
    switch has set is held against its own value at the optimizer's step.

    Who raises a rate is seen by observers around each callback that could: those that are not of
    Keras, and those of Keras that do what a user says. They look at each epoch's hook, and at the
    hooks of the steps 1, 2, 4, 8 and so on of an epoch, for reading a rate waits for the device. If
    a rate was raised between these, they look at every step until one changes it again. What they
    miss is seen at an epoch's end.

    Args:
        beside: The callbacks of the running `fit`.
    """

    def __init__(self, beside: Sequence[keras.callbacks.Callback]):
        self._suspects = [one for one in beside if _could_set_rates(one)]
        self._set: dict[str, Any] = {}
        self._raised: tuple[str, float, float] | None = None
        self.epoch = 0

    @property
    def active(self) -> bool:
        """Bool. Whether there are rates to watch."""
        return bool(self._set)

    @property
    def looks_at_every_step(self) -> bool:
        """Bool. Whether a rate was raised, and it is not known by whom."""
        return self._raised is not None

    def begin(self, rates: Mapping[str, Any]) -> None:
        """Watches the rates that a switch has set, as `rates_set` returned them right after it."""
        self._set = dict(rates)

    def follow_schedules(self, model: keras.Model) -> None:
        """Notes schedules that begin at another step than they did, after a resume."""
        for group, optimizer in _optimizers_of(model).items():
            if group in self._set and schedule_of(optimizer) is not None:
                self._set[group] = schedule_of(optimizer)

    def observers(self) -> list[tuple[keras.callbacks.Callback, Observer, Observer]]:
        """Returns the observers to place around the callbacks that could set a rate."""
        return [(one, *_observers(one, self)) for one in self._suspects]

    def rates(self, model: keras.Model) -> dict[str, float]:
        """Returns the rates that there are now, by parameter group, of those a switch has set."""
        optimizers = _optimizers_of(model)
        return {
            group: learning_rate_of(optimizers[group]) for group in self._set if group in optimizers
        }

    def check(self, model: keras.Model) -> None:
        """Warns if a rate is above what the switch has set, or was in the epoch that ends."""
        raised = self._raised or self._find_raised(model, self.rates(model))
        if raised is not None:
            self._warn(self._suspects, *raised)

    def check_call(
        self, model: keras.Model, called: keras.callbacks.Callback, before: Mapping[str, float]
    ) -> None:
        """Warns if a callback has set a rate above what the switch has set.

        Args:
            model: The model.
            called: The callback that was called.
            before: Dictionary of the rates before it was.
        """
        after = self.rates(model)
        raised = self._find_raised(model, after)
        # It was high before the call already: this callback is not the one.
        risen = raised is not None and raised[1] > before.get(raised[0], 0.0)
        changed = self._raised is not None and after != before
        self._raised = self._raised or raised
        if self._raised is not None and (risen or changed):
            self._warn([called], *self._raised)

    def _find_raised(
        self, model: keras.Model, rates: Mapping[str, float]
    ) -> tuple[str, float, float] | None:
        for group, rate in rates.items():
            limit = self._limit(model, group)
            if rate > _TOLERANCE * limit:
                return group, rate, limit
        return None

    def _warn(
        self,
        suspects: Sequence[keras.callbacks.Callback],
        group: str,
        rate: float,
        limit: float,
    ) -> None:
        self._set, self._raised = {}, None  # Said once a run, not at each epoch.
        _warn(suspects, group, rate, limit, self.epoch)

    def _limit(self, model: keras.Model, group: str) -> float:
        limit = self._set[group]
        if isinstance(limit, float):
            return limit
        steps = steps_of(_optimizers_of(model)[group])
        return float(keras.ops.convert_to_numpy(limit(steps)))


def rates_set(model: keras.Model) -> dict[str, Any]:
    """Returns a model's rates by parameter group: numbers and schedules, which can be watched."""
    rates = {group: _rate_set(one) for group, one in _optimizers_of(model).items()}
    return {group: rate for group, rate in rates.items() if rate is not None}


def _optimizers_of(model: keras.Model) -> dict[str, keras.Optimizer]:
    """Returns a model's optimizers by parameter group; a single one by ""."""
    return groups_of(model.optimizer, alone="")


def _rate_set(optimizer: keras.Optimizer) -> Any:
    """Returns a number, a schedule, or None for a function, whose next value is unknown."""
    schedule = schedule_of(optimizer)
    if schedule is not None:
        return schedule
    return learning_rate_of(optimizer) if has_settable_rate(optimizer) else None


class _Look(Observer):
    """An observer with just those hooks that the callback has, for each call takes time."""


def _observers(callback: keras.callbacks.Callback, watch: RateWatch) -> tuple[_Look, _Look]:
    before, after = _Look(), _Look()
    calls: Counter[tuple[int, str]] = Counter()
    seen: dict[str, float] | None = None

    def look_before(hook: str, index: Any = None, *_: Any, **__: Any) -> None:
        nonlocal seen
        seen = None
        if "_epoch_" in hook:
            watch.epoch = index
        call = watch.epoch, hook
        calls[call] += 1
        power_of_two = calls[call] & (calls[call] - 1) == 0
        looks = "_batch_" not in hook or power_of_two or watch.looks_at_every_step
        if watch.active and looks:
            seen = watch.rates(before.model)

    def look_after(*_: Any, **__: Any) -> None:
        if watch.active and seen is not None:
            watch.check_call(after.model, callback, seen)

    for hook in _HOOKS:
        if _overrides(callback, hook):
            setattr(before, hook, functools.partial(look_before, hook))
            setattr(after, hook, look_after)
    return before, after


def _overrides(callback: keras.callbacks.Callback, hook: str) -> bool:
    # A look around a hook that the callback does not have would cost each step for nothing.
    if hook == "on_train_batch_end" and getattr(callback, "async_safe", False):
        return False  # Keras calls it from another thread.
    default = keras.callbacks.Callback
    return any(
        getattr(getattr(callback, name, None), "__func__", None) is not getattr(default, name)
        for name in (hook, *_HOOKS[hook])
    )


def _could_set_rates(callback: keras.callbacks.Callback) -> bool:
    as_told = (keras.callbacks.LearningRateScheduler, keras.callbacks.LambdaCallback)
    # Those of Keras that lower rates by themselves are no suspects, and by module a subclass is.
    module = type(callback).__module__
    return isinstance(callback, as_told) or not module.startswith(("keras.", "keras_tl."))


def _warn(
    suspects: Sequence[keras.callbacks.Callback],
    group: str,
    rate: float,
    limit: float,
    epoch: int,
) -> None:
    names = [type(one).__name__ for one in suspects] or ["Something that is no callback"]
    who = names[0] if len(names) == 1 else f"One of {', '.join(names)}"
    what = f'the learning rate of the group "{group}"' if group else "the learning rate"
    advice = "Have it scale the rate that it finds, and not set one of its own"
    if isinstance(suspects[0] if suspects else None, keras.callbacks.LearningRateScheduler):
        advice = (
            "Have its schedule change the rate that it is given, as `lambda epoch, rate: 0.95 * "
            "rate` does"
        )
    warnings.warn(
        f"{who} has set {what} to {rate:.4g} in epoch {epoch + 1}, which UnfreezeAtConvergence had "
        f"set to {limit:.4g}. {advice}; or drop it, and pass a `LearningRateSchedule` to the "
        "optimizer and to `learning_rate`, which starts at the switch.",
        stacklevel=6,
    )
