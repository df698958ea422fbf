"""What is beside a callback in the list given to `fit`."""

from __future__ import annotations

import inspect
import types
from typing import Any

import keras

from keras_tl.internals.batches import samples_in_batch
from keras_tl.internals.checked import SINCE_3_15, checked


@checked(SINCE_3_15)
def summary_writer(tensorboard: keras.callbacks.TensorBoard) -> Any:
    """Returns the `tf.summary` writer of a TensorBoard callback, which makes it when it is needed.

    Only with `update_freq` other than `"epoch"` is it the default writer while `fit` runs.
    """
    return tensorboard._train_writer


def callbacks_beside(callback: keras.callbacks.Callback) -> list[keras.callbacks.Callback]:
    """Returns the callbacks of the running `fit`, in order, or `[callback]` where none runs."""
    running = running_list(callback)
    return [callback] if running is None else list(running.callbacks)


def running_list(callback: keras.callbacks.Callback) -> keras.callbacks.CallbackList | None:
    """Returns the list of callbacks that is calling a callback, or None where none is.

    Keras gives a callback no way to see the list it is in; it is found on the stack.
    """
    frame = _list_frame(callback)
    return None if frame is None else frame.f_locals["self"]


_DATA = ("x", "y", "sample_weight", "validation_data", "class_weight")
_SIZES = ("batch_size", "validation_batch_size", "validation_steps")


def data_of_fit(callback: keras.callbacks.Callback) -> dict[str, Any]:
    """Returns what the running `fit` trains and validates with, by argument; nothing without one.

    What it does not have is left out. With the data are the sizes by which it is validated on, and
    whether it is `prepared`, by the model's own `fit` if that does so.

    Keras passes a callback no more than the number of steps; `fit` itself is found on the stack. Of
    an overridden `fit` without these arguments, nothing is seen. Joint fits, which are one to the
    callbacks, start in a method of their list, which has the arguments.
    """
    running = _arguments_of_fit(callback)
    found = {name: running[name] for name in _DATA + _SIZES if running.get(name) is not None}
    if not any(name in found for name in _DATA):
        return {}
    # The list that starts joint fits has them as the user gave them, and Keras' `fit` gets them
    # from a model's own.
    as_given = isinstance(running["self"], keras.callbacks.CallbackList)
    return {**found, "prepared": not as_given}


def batch_size_of_fit(callback: keras.callbacks.Callback) -> int | None:
    """Returns how many samples are in a batch of the running `fit`, None where that is not known.

    Joint fits say it among the `params` of their callbacks.
    """
    if "batch_size" in (callback.params or {}):
        return callback.params["batch_size"]
    running = _arguments_of_fit(callback)
    return samples_in_batch(running.get("x"), running.get("batch_size"))


def _arguments_of_fit(callback: keras.callbacks.Callback) -> dict[str, Any]:
    """Returns the names in the running `fit`, or in the method of a list that starts joint fits."""
    frame = _list_frame(callback)
    while frame is not None:
        running = frame.f_locals
        owner = running.get("self")
        if isinstance(owner, keras.callbacks.CallbackList):
            owner = owner.model
        if owner is callback.model and "validation_data" in running:
            return running
        frame = frame.f_back
    return {}


def _list_frame(callback: keras.callbacks.Callback) -> types.FrameType | None:
    """Returns the frame of the list that calls the callback."""
    # By what is in the list, not by the first list: a callback may run a `fit` of its own, and that
    # of an outer `fit` is on the stack too. Outwards, so the innermost list that has it is found.
    frame = inspect.currentframe()
    while frame is not None:
        running = frame.f_locals.get("self")
        if isinstance(running, keras.callbacks.CallbackList) and any(
            one is callback for one in running.callbacks
        ):
            return frame
        frame = frame.f_back
    return None
