"""What a model's own `fit` does to its data before Keras' `fit` gets it.

Models of some libraries, such as the tasks of KerasHub, take raw images or strings: their `fit`,
`evaluate` and `predict` pass the data through `preprocess_samples`, the method to override, and go
on with those of Keras. No library is named here: the hook and what `fit` hands on are all that
counts.
"""

from __future__ import annotations

import inspect
from typing import Any

import keras

from keras_tl.internals.checked import SINCE_3_15, checked
from keras_tl.internals.graphs import operations_in_graph
from keras_tl.internals.layers import sublayers

_HOOK = "preprocess_samples"
# What a class that brings the hook overrides to call it. More than that may do anything.
_METHODS = ("fit", "evaluate", "predict", "__call__")
# What `fit` may hand on changed: data, and what says how much there is of it.
_DATA = (
    *("self", "x", "y", "sample_weight", "validation_data", "batch_size"),
    *("steps_per_epoch", "validation_steps", "validation_batch_size"),
)


def prepares_data(model: keras.Layer) -> bool:
    """Whether it is a model of which `fit` prepares data by the hook."""
    return isinstance(model, keras.Model) and callable(getattr(model, _HOOK, None))


def only_prepares(model: keras.Model, method: str) -> bool:
    """Whether a method that is not Keras' comes from the class that brings the hook.

    Args:
        model: The model.
        method: String. The method's name.
    """
    if method not in _METHODS or method in vars(model) or not prepares_data(model):
        return False
    classes = type(model).__mro__
    bringing = [one for one in classes if _HOOK in vars(one)][-1:]
    return bringing == [one for one in classes if method in vars(one)][:1]


def keras_method(model: keras.Model, name: str) -> Any:
    """Returns a method as Keras has it, which takes data that is prepared already."""
    if not prepares_data(model):
        return getattr(model, name)
    return getattr(keras.Model, name).__get__(model)


def preparing_layers(model: keras.Layer) -> list[keras.Layer]:
    """Returns the layers that a model keeps to prepare data: those that are not in its graph."""
    called = operations_in_graph(model) if prepares_data(model) else None
    if called is None:
        return []
    known = {id(operation) for operation in called}
    # On torch, KerasHub's tasks set them such that neither Keras nor torch sees a sublayer.
    held = [*sublayers(model), *[x for x in vars(model).values() if isinstance(x, keras.Layer)]]
    different = {id(one): one for one in held}.values()
    return [one for one in different if known.isdisjoint(map(id, [one, *_below(one)]))]


def _below(layer: keras.Layer) -> list[keras.Layer]:
    return [below for one in sublayers(layer) for below in (one, *_below(one))]


@checked(SINCE_3_15)
def handed_on(model: keras.Model, **arguments: Any) -> dict[str, Any]:
    """Returns the arguments with which a model's own `fit` calls that of Keras. Nothing is trained.

    For the call, a class stands between the model's own classes and `keras.Model`: only this model
    is changed, and not Keras, in which another thread may train.

    Args:
        model: The model.
        **arguments: Arguments of its `fit`.

    Raises:
        ValueError: If it does more than to change data and call Keras' `fit` with it.
        Exception: What its `fit` raises.
    """
    signature = inspect.signature(keras.Model.fit)
    expected = signature.bind(model, **arguments)
    expected.apply_defaults()
    history = keras.callbacks.History()
    calls: list[dict[str, Any]] = []

    class Between(keras.Model):
        def fit(self, *args: Any, **kwargs: Any) -> Any:
            call = signature.bind(self, *args, **kwargs)
            call.apply_defaults()
            calls.append(call.arguments)
            return history

        @checked(SINCE_3_15)
        def _assert_compile_called(self, method_name: str | None = None) -> None:
            # With this Keras' `fit` begins, also one that is not called through `super()`.
            if method_name == "fit":
                raise ValueError("it calls the `fit` of Keras otherwise than as `super().fit`")
            super()._assert_compile_called(method_name)

    own = type(model)
    # Not by `setattr`, which layers override. The names of the two are seen in messages alone.
    object.__setattr__(model, "__class__", type(own.__name__, (own, Between), {}))
    try:
        returned = model.fit(**arguments)
    finally:
        object.__setattr__(model, "__class__", own)
    if len(calls) != 1 or returned is not history:
        raise ValueError("it does not call the `fit` of Keras just once and return its result")
    others = expected.arguments.keys() - {*_DATA}
    changed = [name for name in others if calls[0][name] != expected.arguments[name]]
    if changed:
        raise ValueError(f"it also changes {', '.join(sorted(changed))}")
    return {name: calls[0][name] for name in _DATA}
