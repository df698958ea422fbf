"""What is beside a callback in the list given to `fit`."""

from __future__ import annotations

import inspect

import keras


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
