"""What a model makes of data, asked without any trace in the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

from keras_tl.internals.checked import SINCE_3_15, checked
from keras_tl.internals.own_fit import keras_method


@checked(SINCE_3_15)
def evaluated(model: keras.Model, *, prepared: bool = False, **settings: Any) -> dict[str, Any]:
    """Returns what `evaluate` measures, by name; the model keeps its values where that fails.

    On JAX, `evaluate` takes the values out of the model's variables for its steps, and after an
    error in one they are nowhere.

    Args:
        model: A compiled model.
        prepared: Bool. Whether the data is what the model's own `fit` has made of what it got.
        **settings: Arguments of its `evaluate`.
    """
    evaluate = keras_method(model, "evaluate") if prepared else model.evaluate
    if keras.backend.backend() != "jax":
        return evaluate(**settings, return_dict=True, verbose=0)
    variables = [*model.variables, *model.metrics_variables]
    model.jax_state_sync()
    model._jax_state = None  # Of the last epoch of `fit`, which would pass for that of a step here.
    held = [variable._value for variable in variables]
    try:
        return evaluate(**settings, return_dict=True, verbose=0)
    except BaseException:
        model.jax_state_sync()  # If some steps were done, it has the values.
        for variable, value in zip(variables, held, strict=True):
            if variable._value is None:
                variable._value = value
        raise
    finally:
        model._jax_state, model._jax_state_synced = None, True


@contextlib.contextmanager
def without_activation(model: keras.Model, layer: keras.layers.Dense) -> Iterator[None]:
    """A context in which a model predicts what its last layer gives to the activation."""
    activation, compiled = layer.activation, model.predict_function
    layer.activation, model.predict_function = keras.activations.linear, None
    try:
        yield
    finally:
        # What was compiled before has the activation in it.
        layer.activation, model.predict_function = activation, compiled
