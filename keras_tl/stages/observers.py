"""Small callbacks placed around others, which see what each of them does."""

from __future__ import annotations

from collections.abc import Iterable

import keras

from keras_tl.internals.callback_list import running_list


class Observer(keras.callbacks.Callback):
    """A callback that Keras calls right before or right after another one."""


def place(
    ours: keras.callbacks.Callback,
    around: Iterable[tuple[keras.callbacks.Callback, Observer, Observer]],
) -> None:
    """Places observers in the list of callbacks that calls ours, for the rest of a `fit`.

    The list of a `fit` is Keras' own, and gone with it: nothing is left on a callback that a user
    holds, whatever ends training. Where hooks are called by hand, there is no list, and no
    observer.

    Args:
        ours: A callback.
        around: Tuples of a callback beside it, the observer before and the one after it.
    """
    running = running_list(ours)
    if running is None:
        return
    callbacks = _others(running)
    for observed, before, after in around:
        for observer in (before, after):
            observer.set_model(ours.model)
        # By identity: a callback may define equality, and positions shift as observers join.
        position = next(index for index, one in enumerate(callbacks) if one is observed)
        callbacks[position : position + 1] = [before, observed, after]
    # Another list, for Keras is going through this one now.
    running.callbacks = callbacks


def remove(ours: keras.callbacks.Callback) -> None:
    """Takes all observers out again, of a list that the user may go on with."""
    running = running_list(ours)
    if running is not None:
        running.callbacks = _others(running)


def _others(running: keras.callbacks.CallbackList) -> list[keras.callbacks.Callback]:
    return [one for one in running.callbacks if not isinstance(one, Observer)]
