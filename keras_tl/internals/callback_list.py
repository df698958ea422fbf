"""What is beside a callback in the list given to `fit`."""

from __future__ import annotations

import inspect
from typing import Any

import keras

from keras_tl.internals.checked import SINCE_3_15, checked


@checked(SINCE_3_15)
def summary_writer(tensorboard: keras.callbacks.TensorBoard) -> Any:
    """Returns the `tf.summary` writer of a TensorBoard callback, which makes it when it is needed.

    Only with `update_freq` other than `"epoch"` is it the default writer while `fit` runs.
    """
    return tensorboard._train_writer


def callbacks_beside(callback: keras.callbacks.Callback) -> list[keras.callbacks.Callback]:
    """Returns the callbacks of the running `fit`, in their order, or `[callback]` where none runs.

    Keras gives a callback no way to see the list it is in; the list that called it is found on the
    stack.
    """
    frame = inspect.currentframe()
    while frame is not None:
        running = frame.f_locals.get("self")
        if isinstance(running, keras.callbacks.CallbackList) and callback in running.callbacks:
            return list(running.callbacks)
        frame = frame.f_back
    return [callback]
