"""State that layers hold and Keras does not list among their weights."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import keras

from keras_tl.internals.checked import SINCE_3_15, checked

# By the layer or torch module that holds a value: the same variable as long as that lives.
_KNOWN: weakref.WeakKeyDictionary[Any, dict[Any, keras.Variable]] = weakref.WeakKeyDictionary()


def unlisted_state(layer: keras.Layer) -> list[keras.Variable]:
    """Returns the state that a layer itself holds and Keras does not list, as variables.

    On torch these are buffers, such as the statistics of a `torch.nn.BatchNorm2d` in a
    `TorchModuleWrapper`: they move in training even where `trainable` is cleared. On TensorFlow
    they are variables that a layer did not make by `add_weight`, such as those of a SavedModel
    that it has loaded.

    Args:
        layer: The layer. What its sublayers hold is not in it.

    Returns:
        A list of `keras.Variable`, which share their values with what the layer holds.
    """
    variables = []
    for owner, key, name, value in _found(layer):
        known = _KNOWN.setdefault(owner, {})
        if key not in known:
            known[key] = _variable(layer, name, value, weakref.ref(owner), key)
        variables.append(known[key])
    return variables


def _found(layer: keras.Layer) -> Iterator[tuple[Any, Any, str, Any]]:
    """Yields what holds a value, what tells it from others there, its name, and itself."""
    if keras.backend.backend() == "torch":
        for name, module in _modules_in(layer, ""):
            for key, value in module.named_buffers(recurse=False):
                yield module, key, f"{name}{key}", value
    elif keras.backend.backend() == "tensorflow":
        listed = {id(one.value) for one in layer.variables}
        for value in _variables_in(layer, {}):
            if id(value) not in listed:
                yield layer, id(value), value.name.removesuffix(":0"), value


def _modules_in(module: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yields a torch module and those in it that are not Keras layers, with names."""
    yield name, module
    for key, child in module.named_children():
        if not isinstance(child, keras.Layer):
            yield from _modules_in(child, f"{name}{key}.")


def _variables_in(one: Any, seen: dict[int, Any]) -> Iterator[Any]:
    """Yields the variables of TensorFlow that an object keeps outside of Keras' own."""
    import tensorflow as tf

    for child in _held_by(one):
        of_keras = isinstance(child, (keras.Layer, keras.Variable, keras.Optimizer))
        if of_keras or id(child) in seen:
            continue
        seen[id(child)] = child  # Kept, so that nothing else gets its id.
        if isinstance(child, tf.Variable):
            yield child
        else:
            yield from _variables_in(child, seen)


def _held_by(one: Any) -> list[Any]:
    """Returns what an object of TensorFlow holds by attributes, or in a list or dictionary."""
    import tensorflow as tf

    # TensorFlow refuses to look into those that were changed other than by appending.
    if isinstance(one, (list, tuple, dict)):
        values = list(one.values()) if isinstance(one, dict) else list(one)
        # A vocabulary may have very many words.
        of_data = values and isinstance(values[0], (str, bytes, int, float))
        return [] if of_data else values
    if not isinstance(one, tf.__internal__.tracking.Trackable):
        return []
    held = list(tf.train.TrackableView.children(one).values())
    if isinstance(one, keras.Layer):
        # Keras has lists and dictionaries of its own, into which TensorFlow does not look.
        held += [some for some in vars(one).values() if isinstance(some, (list, dict)) and some]
    return held


@checked(SINCE_3_15)
def _variable(
    layer: keras.Layer, name: str, value: Any, owner: weakref.ref[Any], key: Any
) -> keras.Variable:
    kind = _Buffer if keras.backend.backend() == "torch" else keras.Variable
    dtype = keras.backend.standardize_dtype(value.dtype)
    settings = {"trainable": False, "autocast": False, "dtype": dtype}
    # Keras makes a variable of TensorFlow, or the memory of a tensor of torch, its own value.
    variable = kind(value, name=name.replace("/", "_"), **settings)
    variable._path = f"{layer.path or layer.name}/{variable.name}"
    if isinstance(variable, _Buffer):
        variable.place = owner, key
    return variable


class _Buffer(keras.Variable):  # type: ignore[misc]
    """A buffer of a torch module, which may put another tensor in its place."""

    place: tuple[weakref.ref[Any], str] | None = None

    @property
    def value(self) -> Any:
        if self.place is None:
            return self._value
        module, name = self.place
        return getattr(module(), name)
