"""A callback that proves that frozen weights did not move, or says which did, when and why."""

from __future__ import annotations

import collections
import contextlib
import copy
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from keras_tl.backbone.changeable import constant_weights
from keras_tl.backbone.freezing import count_params
from keras_tl.backbone.selecting import (
    Choice,
    batchnorm_layers,
    check_choice,
    choose_layers,
    is_built,
    roots,
    weights_of,
)
from keras_tl.errors import (
    FrozenWeightsChangedError,
    Moment,
    StaleCompileError,
    WeightChange,
    describe_changes,
    describe_stale_compile,
)
from keras_tl.guard import diagnosis
from keras_tl.guard.diagnosis import STALE_COMPILE, Cause
from keras_tl.guard.watch import Change, WeightWatch
from keras_tl.messages import say, some

_ACTIONS = ("raise", "warn", "restore")


class FreezeGuard(keras.callbacks.Callback):
    """Watches the weights that must not change, and says which one did, when and why.

    It watches, bit for bit: the weights of all layers that are not trainable, weights that were
    frozen one by one, and the moving statistics of BatchNormalization layers in a `FrozenBackbone`
    or called with `training=False` in a Functional model, trainable or not. What changes by right
    (statistics in the head, seeds, metrics) is not watched. The set is read from the model at each
    epoch's start, so it follows `UnfreezeAtConvergence` and what is unfrozen between fits. Place it
    after `UnfreezeAtConvergence` in the list: before it, it learns of a switch an epoch late, and
    keeps the old values of what has been unfrozen until then.

    Before a step is lost, when `fit` and each epoch start, it also compares the optimizer with what
    is trainable: on TensorFlow, Keras keeps training a layer that was frozen after `compile`.

    A check is one pass over the weights on their device. It sees every change of one element of up
    to 32 bits, and misses any other with a probability below `2**-27`. To tell what has changed by
    how much, the old values are kept: on TensorFlow they take no memory until a weight changes, and
    then that of this weight; on JAX and torch they are a copy of the watched weights in the host's
    memory, whatever the `action`. An error takes the changed weights' size in float64, on the host.

    Args:
        layers: Which layers of the model are watched in addition, trainable or not, with all their
            weights: a selection, see `FrozenBackbone.unfreeze`; or a layer, or a list of layers.
            Defaults to `None`.
        exclude: Which layers are left out, in the same ways, with all their weights and whatever
            `layers` says: those that are frozen and moved on purpose, such as a teacher that
            averages what trains. That the optimizer trains no frozen weight is checked for them
            too. Defaults to `None`.
        check: `"epoch"`, `"batch"`, or an int n for every n batches. There is a check at each
            epoch's end and when `fit` ends in any case. On JAX, checking batches makes `fit` wait
            for each step. Defaults to `"epoch"`.
        action: `"raise"` a `FrozenWeightsChangedError`, or its subclass `StaleCompileError`;
            `"warn"`, once for each weight, and take the new value as the one to keep; or
            `"restore"`, which puts the old value back, counts it in `restored`, and warns, once for
            each weight. Defaults to `"raise"`.
        verbose: 0 or 1. Whether it says at the end of `fit` what it has watched. Defaults to `1`.

    Attributes:
        restored: Dictionary from weights' paths to how many times they were restored in this `fit`.

    Raises:
        ValueError: For an argument that is out of range, and if `layers` or `exclude` selects
            nothing.
        FrozenWeightsChangedError: With `action="raise"`. The model is left as it was found.
        StaleCompileError: The same, if the optimizer or train step was made for other weights than
            are trainable.

    Example:

    >>> import numpy as np
    >>> from keras_tl import FrozenBackbone
    >>> pretrained = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> model = keras.Sequential([FrozenBackbone(pretrained), keras.layers.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> x, y = np.ones((32, 8)), np.ones((32, 1))
    >>> history = model.fit(x, y, callbacks=[FreezeGuard()], verbose=0)
    FreezeGuard: all 2 weights that must not change (36 parameters) are as they were, bit for bit.

    In a training loop of your own, or around anything else:

    >>> with FreezeGuard(verbose=0).watching(model) as guard:
    ...     for _ in range(3):
    ...         loss = model.train_on_batch(x, y)
    ...         guard.check()
    """

    def __init__(
        self,
        *,
        layers: Choice | None = None,
        exclude: Choice | None = None,
        check: str | int = "epoch",
        action: str = "raise",
        verbose: int = 1,
    ):
        super().__init__()
        self._batches_between = _batches_between(check)
        if action not in _ACTIONS:
            raise ValueError(f"`action` must be one of {_ACTIONS}. Received: action={action!r}.")
        for argument, chosen in {"layers": layers, "exclude": exclude}.items():
            if chosen is not None:
                check_choice(chosen, argument)
        self.layers = layers
        self.exclude = exclude
        self.action = action
        self.verbose = verbose
        self.restored: collections.Counter[str] = collections.Counter()
        self._begin_life()

    def _begin_life(self) -> None:
        if self._batches_between:
            # As an attribute and not a method: Keras waits for each batch if the class has one.
            self.__dict__["on_train_batch_end"] = self._on_train_batch_end
        self._watch = WeightWatch([])
        self._now = self._clean = Moment(None, None, 0)
        self._optimizer: keras.Optimizer | None = None
        self._in_loop = False
        self._restart()

    def __repr__(self) -> str:
        return f"<FreezeGuard action={self.action!r} restored={sum(self.restored.values())}>"

    # A copy, or what is loaded from a pickle, has the arguments and results. It is for another run,
    # and often another model: with neither can it share values, or functions that are compiled.

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, **vars(keras.callbacks.Callback())}
        for of_a_run in ("on_train_batch_end", "_watch", "_optimizer", "_clean_optimizer"):
            state.pop(of_a_run, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin_life()

    def __deepcopy__(self, memo: dict[int, Any]) -> FreezeGuard:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        state = self.__getstate__()
        # A copied layer would be one of no model.
        chosen = {argument: state.pop(argument) for argument in ("layers", "exclude")}
        twin.__setstate__({**copy.deepcopy(state, memo), **chosen})
        return twin

    # Hooks, in the order in which `fit` calls them.

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        # Weights are watched from the first epoch's start on: until then callbacks load some.
        self._restart()
        self.restored.clear()
        self._excluded()  # Raises before anything is trained, if it selects nothing.
        self._check_compiled()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._now = Moment(epoch, -1, self._now.check)
        self._batch_checked = -1
        self._check_compiled()
        self._look()
        self._follow()
        self._all_clean()

    def _on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        type(self).on_train_batch_end(self, batch, logs)  # That of a subclass, if it has one.
        if batch - self._batch_checked >= self._batches_between:
            self._batch_checked = batch
            self._check_at(self._now.epoch, batch)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        steps = (self.params or {}).get("steps")
        self._check_at(epoch, None if steps is None else steps - 1)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if self._watching:
            self._check_at(self._now.epoch, self._now.batch)
            if self.verbose:
                say(self._summary())
        self._now = Moment(None, None, self._now.check)
        if not self._in_loop:
            self._stop()

    # Outside `fit`.

    @contextlib.contextmanager
    def watching(
        self, model: keras.Model, *, optimizer: keras.Optimizer | None = None
    ) -> Iterator[FreezeGuard]:
        """Returns a context in which the model's weights are watched.

        They are checked when it ends, unless by an exception, and whenever `check` is called.

        Args:
            model: The model to watch, compiled or not.
            optimizer: The optimizer of your training loop, for telling a side effect of it from
                other changes. Defaults to the compiled model's.

        Returns:
            A context manager, which gives the guard.

        Raises:
            FrozenWeightsChangedError: With `action="raise"`.

        Example:

        >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        >>> with FreezeGuard().watching(model):
        ...     _ = model.predict(keras.ops.ones((1, 2)), verbose=0)
        """
        roots(model)  # Raises of a class, which Keras on JAX would take for a model.
        self.set_model(model)
        self._restart()
        self.restored.clear()
        self._optimizer = optimizer
        self._in_loop = True
        try:
            self._follow()
            self._all_clean()
            yield self
            self.check()
        finally:
            self._in_loop = False
            self._optimizer = None
            self._stop()

    def check(self) -> None:
        """Checks the watched weights now.

        Raises:
            FrozenWeightsChangedError: With `action="raise"`, if one has changed.
            RuntimeError: If nothing is being watched.
        """
        if not self._watching:
            raise RuntimeError(
                "FreezeGuard has nothing to compare the weights with. Call `check()` inside "
                "`with guard.watching(model):`, or while `fit` runs with the guard among its "
                "callbacks."
            )
        self._check_at(self._now.epoch, self._now.batch)

    # What is watched.

    def _restart(self) -> None:
        self._now = self._clean = Moment(None, None, 0)
        self._watching = False
        self._all_built = False
        self._warned: set[int] = set()
        self._warned_of_compile = False
        self._batch_checked = -1
        self._clean_optimizer: weakref.ref[keras.Optimizer] | None = None

    def _stop(self) -> None:
        self._watching = False
        self._watch.end()

    def _weights_to_watch(self) -> list[keras.Variable]:
        left_out = {id(weight) for layer in self._excluded() for weight in weights_of(layer)}
        return [weight for weight in self._weights_to_keep() if id(weight) not in left_out]

    def _weights_to_keep(self) -> list[keras.Variable]:
        """What must not change, but for `exclude`."""
        weights = constant_weights(self.model)
        if self.layers is not None and is_built(self.model):
            for layer in choose_layers(self.model, self.layers, "layers"):
                weights += weights_of(layer)
        return list({id(weight): weight for weight in weights}.values())

    def _excluded(self) -> list[keras.Layer]:
        if self.exclude is None:
            return []
        try:
            layers = choose_layers(self.model, self.exclude, "exclude")
            if not any(weights_of(layer) for layer in layers):
                raise ValueError(
                    f"`exclude` selects {some([layer.name for layer in layers])} of the model "
                    f'"{self.model.name}", without a weight. Pass layers that have weights.'
                )
        except ValueError:
            if is_built(self.model):
                raise
            return []  # A subclassed model may make its layers, and their weights, when called.
        return layers

    def _follow(self) -> None:
        """Watches what must not change now; what has not been watched yet, from now on."""
        weights = self._weights_to_watch()
        self._all_built = is_built(self.model)
        if not _same(weights, self._watch.weights):
            self._watch = WeightWatch(weights)
        elif not self._watching:
            self._watch.begin()
        self._watching = True

    # Checking.

    def _check_compiled(self) -> None:
        mismatch = diagnosis.stale_compile(self.model)
        if not mismatch:
            return
        still_training = [weight.path for weight in mismatch.still_training]
        not_training = [weight.path for weight in mismatch.not_training]
        message = describe_stale_compile(still_training, not_training, STALE_COMPILE.remedy)
        if self.action == "raise":
            raise StaleCompileError(
                message, still_training=still_training, not_training=not_training
            )
        if not self._warned_of_compile:
            self._warned_of_compile = True
            warnings.warn(message, stacklevel=2)

    def _check_at(self, epoch: int | None, batch: int | None) -> None:
        self._now = Moment(epoch, batch, self._now.check + 1)
        if self._look() or not self._all_built:
            self._follow()
        self._all_clean()

    def _all_clean(self) -> None:
        self._clean = self._now
        optimizer = getattr(self.model, "optimizer", None)
        self._clean_optimizer = None if optimizer is None else weakref.ref(optimizer)

    def _look(self) -> bool:
        """Acts on weights that have changed and must not. Returns whether any has changed."""
        # On JAX, reading `model` writes what the running `fit` holds back into the weights.
        model = self.model
        changes = self._watch.changes() if self._watching else []
        if changes:
            # The set may be smaller by now: a later callback may have unfrozen layers.
            watched = {id(weight) for weight in self._weights_to_watch()}
            wrong = [change for change in changes if id(change.weight) in watched]
            if wrong:
                self._act(model, wrong)
        return bool(changes)

    def _act(self, model: keras.Model, changes: Sequence[Change]) -> None:
        own_loop = self._now.epoch is None
        optimizer = self._optimizer or getattr(model, "optimizer", None)
        causes = diagnosis.find_causes(
            model, changes, optimizer, own_loop=own_loop, renewed=self._renewed(model)
        )
        if self.action == "raise":
            raise self._error(changes, causes)
        if self.action == "restore":
            self._watch.restore(changes)
            self.restored.update(change.weight.path for change in changes)
        fresh = [
            (change, cause)
            for change, cause in zip(changes, causes, strict=True)
            if id(change.weight) not in self._warned
        ]
        if fresh:
            self._warned.update(id(change.weight) for change, _ in fresh)
            did = " They were restored." if self.action == "restore" else ""
            warnings.warn(f"{self._error(*zip(*fresh, strict=True))}{did}", stacklevel=2)
        if self.action == "warn":
            self._watch.begin()

    def _renewed(self, model: keras.Model) -> bool:
        """Whether there were steps since the last clean check, and a new optimizer."""
        before = None if self._clean_optimizer is None else self._clean_optimizer()
        return self._now.batch != -1 and before is not getattr(model, "optimizer", None)

    # Messages.

    def _error(
        self, changes: Sequence[Change], causes: Sequence[Cause]
    ) -> FrozenWeightsChangedError:
        records = [
            WeightChange(
                path=change.weight.path,
                cause=cause.name,
                remedy=cause.remedy,
                largest_change=change.largest,
                difference=change.difference,
                last_clean=self._clean,
                detected=self._now,
            )
            for change, cause in zip(changes, causes, strict=True)
        ]
        message = describe_changes(records)
        if STALE_COMPILE not in causes:
            return FrozenWeightsChangedError(message, records)
        mismatch = diagnosis.stale_compile(self.model)
        return StaleCompileError(
            message,
            records,
            still_training=[weight.path for weight in mismatch.still_training],
            not_training=[weight.path for weight in mismatch.not_training],
        )

    def _summary(self) -> str:
        return f"FreezeGuard{self._what_happened()}{self._what_is_left_out()}"

    def _what_happened(self) -> str:
        if self.restored:
            times = _times(self.restored.total())
            return f" restored {_weights(len(self.restored))}, {times} in all."
        if self._warned:
            return f": {_weights(len(self._warned))} changed that must not."
        # What another callback has unfrozen since the last epoch started may change by now.
        now = {id(weight) for weight in self._weights_to_watch()}
        weights = [weight for weight in self._watch.weights if id(weight) in now]
        if not weights:
            return ": nothing is frozen at the end. No weight changed while it was."
        return (
            f": all {len(weights)} weights that must not change ({count_params(weights):,} "
            f"parameters) are as they were, bit for bit.{self._why_frozen_still(weights)}"
        )

    def _why_frozen_still(self, weights: Sequence[keras.Variable]) -> str:
        """A sentence, if there are frozen weights only where all that can be is unfrozen."""
        layers = batchnorm_layers([self.model])
        held = {id(weight) for layer in layers for weight in layer.weights}
        if any(id(weight) not in held for weight in weights):
            return ""
        names = ", ".join(dict.fromkeys(weight.name for weight in weights))
        return f" They are BatchNormalization's ({names}), constant while the rest trains."

    def _what_is_left_out(self) -> str:
        layers = self._excluded()
        if not layers:
            return ""
        names = some([layer.name for layer in layers])
        watched = {id(weight) for weight in self._weights_to_watch()}
        left_out = [weight for weight in self._weights_to_keep() if id(weight) not in watched]
        return f" Not watched: {names} ({_weights(len(left_out))} that must not change otherwise)."


def _batches_between(check: Any) -> int:
    """Returns every how many batches to check, or 0 for not at batches."""
    if check == "epoch":
        return 0
    if check == "batch":
        return 1
    if isinstance(check, int) and not isinstance(check, bool) and check >= 1:
        return check
    raise ValueError(
        '`check` must be "epoch", "batch", or an int of at least 1, for every that many batches. '
        f"Received: check={check!r}."
    )


def _same(first: Sequence[keras.Variable], second: Sequence[keras.Variable]) -> bool:
    return [id(weight) for weight in first] == [id(weight) for weight in second]


def _weights(count: int) -> str:
    return "1 weight" if count == 1 else f"{count} weights"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
