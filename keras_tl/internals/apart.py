"""A model in one of several processes, computed by it alone.

Under `keras.distribution` on several processes, JAX has all of them run each step together, on one
batch that is spread over their devices. A process that has a batch of its own to compute needs the
weights for itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import keras

from keras_tl.internals.checked import SINCE_3_15, checked
from keras_tl.internals.models import compile_arguments
from keras_tl.internals.processes import process_count, whole_data


def spread_weights(weights: Iterable[keras.Variable]) -> list[str]:
    """Returns the paths of those of which this process does not hold all."""
    if process_count() == 1:
        return []
    return [one.path for one in weights if not one.value.is_fully_replicated]


@contextlib.contextmanager
def apart(model: keras.Model) -> Iterator[None]:
    """A context in which this process computes the model by itself, on all of its own devices.

    Whatever is assigned to variables there is undone at its end. In all processes it must make the
    model's metrics, or in none.

    Args:
        model: A built model, of which this process holds all values.
    """
    if process_count() == 1:
        yield
        return
    held = [(variable, *_held(variable)) for variable in _variables(model)]
    with whole_data():
        try:
            for variable, value, _ in held:
                _hold(variable, _own_copy(value), None)
            yield
        finally:
            for variable, value, layout in held:
                _hold(variable, value, layout)
    known = {id(variable) for variable, *_ in held}
    for variable in _variables(model):
        if id(variable) not in known:
            _spread(variable)


def _variables(model: keras.Model) -> list[keras.Variable]:
    """Returns the variables of a model and of its metrics, each once."""
    found = [*model.variables, *model.metrics_variables]
    if model.compiled:
        # Metrics belong to the model only once it has been called on data.
        arguments = compile_arguments(model)
        given = [arguments.get(name) for name in ("metrics", "weighted_metrics")]
        for metric in keras.tree.flatten(given):
            found += metric.variables if isinstance(metric, keras.Metric) else []
    return list({id(variable): variable for variable in found}.values())


def _own_copy(value: Any) -> Any:
    """Returns a copy, as steps on JAX give the memory of what they take away."""
    import jax

    own = jax.numpy.array(value.addressable_data(0), copy=True)
    devices = jax.local_devices()
    if len(devices) == 1:
        return own
    mesh = jax.sharding.Mesh(devices, ("batch",))
    return jax.device_put(own, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


@checked(SINCE_3_15)
def _held(variable: keras.Variable) -> tuple[Any, Any]:
    return variable._value, variable._layout


@checked(SINCE_3_15)
def _hold(variable: keras.Variable, value: Any, layout: Any) -> None:
    """Gives a variable a value where `assign` would spread it over all processes."""
    variable._value, variable._layout = value, layout


@checked(SINCE_3_15)
def _spread(variable: keras.Variable) -> None:
    """Lays a variable that was made apart out as if it had been made under the distribution."""
    import jax

    value = jax.device_get(variable._value)
    variable._initialize_layout()
    layout = getattr(variable._layout, "backend_layout", variable._layout)
    variable._value = jax.make_array_from_callback(value.shape, layout, lambda index: value[index])
