"""Every touch of a Keras internal, and every backend named, in keras_tl.

Nothing else in the package reads an underscore attribute of a Keras object or names a backend. Each
function says what it touches and why no public route serves. All were checked with Keras 3.15.1 and
with the development version 3.16.0.dev2026102704, on TensorFlow 2.21.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras.src.backend import compute_output_spec
from keras.src.backend.common import global_state
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask
from keras.src.ops.function import Function
from keras.src.optimizers import base_optimizer
from keras.src.trainers import data_adapters

# Layers: structure, flags, and the context of a call.


def sublayers(layer: keras.Layer) -> list[keras.Layer]:
    """Returns the direct sublayers of any layer, in order (public only for a model: `layers`)."""
    return layer._flatten_layers(include_self=False, recursive=False)


def own_trainable_weights(layer: keras.Layer) -> list[keras.Variable]:
    """Returns the weights that the layer itself created to be trained, frozen now or not."""
    return list(layer._trainable_variables)


def own_state(layer: keras.Layer) -> list[keras.Variable]:
    """Returns the weights that the layer itself created never to be trained (statistics)."""
    return list(layer._non_trainable_variables)


def set_layer_flag(layer: keras.Layer, value: bool) -> None:
    """Sets `trainable` on one layer alone; the public setter overwrites all that is in it."""
    layer._trainable = value


def set_weight_flag(weight: keras.Variable, value: bool) -> None:
    """Sets `trainable` on a weight, such that gradients reach it from the next trace on.

    Keras initializes the weights of a model that `fit` builds after the layers' flags are set, so
    on TensorFlow those of a frozen layer are made as `tf.Variable(trainable=False)`, which a
    gradient tape never watches.
    """
    weight.trainable = value
    if value and keras.backend.backend() == "tensorflow" and not weight.value.trainable:
        weight.value._trainable = True


def outputs_in_graph(model: keras.Model, layer: keras.Layer) -> list[Any]:
    """Returns what the layer returns each time the graph of a Functional or Sequential calls it.

    `layer.output` is that of its first call, which may be in the graph of another model.
    """
    graph = getattr(model, "_functional", model)
    nodes = [node for depth in graph._nodes_by_depth.values() for node in depth]
    calls = [node.outputs for node in nodes if node.operation is layer]
    return [outputs[0] if len(outputs) == 1 else outputs for outputs in calls]


def called_in_inference_mode(layer: keras.Layer) -> list[keras.Layer]:
    """Returns the layers that the graph of a model always calls with `training=False`.

    The layer may be any; only Functional and Sequential models have a graph.
    """
    graph = getattr(layer, "_functional", layer)
    modes: dict[keras.Layer, list[Any]] = {}
    for depth in getattr(graph, "_nodes_by_depth", {}).values():
        for node in depth:
            if isinstance(node.operation, keras.Layer):
                training = node.arguments.kwargs.get("training")
                modes.setdefault(node.operation, []).append(training)
    return [layer for layer, given in modes.items() if all(mode is False for mode in given)]


def bottlenecks(layer: keras.Layer) -> list[keras.Layer] | None:
    """Returns the layers of a model's graph through whose output alone everything passes.

    None if the layer is no Functional or Sequential model, and so has no graph.
    """
    graph = getattr(layer, "_functional", layer)
    depths = getattr(graph, "_nodes_by_depth", None)
    if depths is None:
        return None
    depth_of = {id(node): depth for depth, nodes in depths.items() for node in nodes}
    spanned: set[int] = set()
    for depth, nodes in depths.items():
        for parent in (parent for node in nodes for parent in node.parent_nodes):
            spanned.update(range(depth + 1, depth_of.get(id(parent), depth)))
    return [
        nodes[0].operation
        for depth, nodes in depths.items()
        if len(nodes) == 1 and depth not in spanned
    ]


def seed_states(layer: keras.Layer) -> list[keras.Variable]:
    """Returns the states of the random generators that the layer itself holds."""
    return [generator.state for generator in layer._seed_generators]


def graph_outputs(model: keras.Model) -> Any | None:
    """Returns the symbolic outputs of a Functional or built Sequential, as they are nested.

    None if the model is neither, and so has no graph.
    """
    graph = getattr(model, "_functional", model)
    return getattr(graph, "_outputs_struct", None)


def graph_inputs(model: keras.Model) -> Any:
    """Returns the symbolic inputs of a Functional or built Sequential, as they are nested."""
    return getattr(model, "_functional", model)._inputs_struct


def cut_after(model: keras.Model, operations: Sequence[Any]) -> list[Any]:
    """Returns the symbolic tensors that go from the one side of a graph to the other.

    The one side is the given operations and all that leads to them. Inputs of the model that the
    other side uses are among the tensors.

    Args:
        model: A Functional or built Sequential model.
        operations: Operations of its graph.
    """
    graph = getattr(model, "_functional", model)
    nodes = [
        node for depth in sorted(graph._nodes_by_depth) for node in graph._nodes_by_depth[depth]
    ]
    given = {id(operation) for operation in operations}
    before: set[int] = set()
    for node in nodes:
        if id(node.operation) in given or id(node) in before:
            before.add(id(node))
            before.update(id(parent) for parent in node.parent_nodes)
    produced = {
        id(x) for node in nodes if id(node) in before or node.is_input for x in node.outputs
    }
    used = [x for node in reversed(nodes) if id(node) not in before for x in node.input_tensors]
    return list({id(x): x for x in [*used, *model.outputs] if id(x) in produced}.values())


def called_again(tensors: Sequence[Any], replacements: Sequence[Any], outputs: Any) -> Any:
    """Returns the outputs of the part of a graph after some tensors, called on others.

    The layers are the same; the calls are new. `keras.Model(tensors, outputs)` does so too, but
    gives no hand in the new inputs' names and masks.
    """
    part = Function(inputs=list(tensors), outputs=outputs)
    return part._run_through_graph(list(replacements), operation_fn=lambda operation: operation)


def operation_of(x: Any) -> Any:
    """Returns the operation that a symbolic tensor is an output of."""
    return x._keras_history.operation


def mask_of(x: Any) -> Any | None:
    """Returns the mask that a tensor carries, or None."""
    return get_keras_mask(x)


@contextlib.contextmanager
def call_context_kept() -> Iterator[None]:
    """Puts back the `training` value that the layers called after this one are to see.

    An explicit `training=` in an inner call is stored in the context that all layers of an outer
    call share, so a backbone called with `training=False` would switch off the Dropout of the head.
    """
    context = global_state.get_global_attribute("current_call_ctx")
    if context is None:
        yield
        return
    training = context.get_value("training")
    try:
        yield
    finally:
        context.set_value("training", training)


class HeldInInference:
    """A context in which BatchNormalization layers run in inference mode.

    They do so whatever `training` they are called with: if its own `trainable` flag is cleared, the
    layer does not look at it. The flag of the layer alone, so gamma and beta go on training.
    Counted, because threads may overlap.
    """

    _lock = threading.Lock()

    def __init__(self, layers: Sequence[keras.Layer]):
        self._layers = layers
        self._entered = 0
        self._held: list[keras.Layer] = []

    def __enter__(self) -> None:
        with self._lock:
            if self._entered == 0:
                self._held = [layer for layer in self._layers if layer.trainable]
                for layer in self._held:
                    set_layer_flag(layer, False)
            self._entered += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._entered -= 1
            if self._entered == 0:
                for layer in self._held:
                    set_layer_flag(layer, True)


def stop_gradient(x: Any) -> Any:
    """Returns `keras.ops.stop_gradient(x)` with the mask that `x` carries, if any."""
    stopped = keras.ops.stop_gradient(x)
    mask = get_keras_mask(x)
    if mask is not None:
        set_keras_mask(stopped, mask)
    return stopped


# Models: the compiled state that a switch renews.


def strategy_scope(model: keras.Model) -> contextlib.AbstractContextManager:
    """Returns the scope in which the model's variables live, for making more of them."""
    if keras.backend.backend() == "tensorflow":
        return model.distribute_strategy.scope()
    return contextlib.nullcontext()


_COMPILED = ("optimizer", "train_function", "test_function", "predict_function")


def compiled_state(model: keras.Model) -> dict[str, Any]:
    """Returns what `set_compiled_state` needs to put the optimizer and compiled functions back."""
    state = {name: getattr(model, name) for name in _COMPILED}
    return {
        **state,
        "compile_config": dict(model._compile_config.config),
        "compiled_flags": dict(model._compiled_trainable_state),
    }


def set_compiled_state(model: keras.Model, state: dict[str, Any]) -> None:
    """Puts back what `compiled_state` returned."""
    for name in _COMPILED:
        setattr(model, name, state[name])
    model._compile_config.config.update(state["compile_config"])
    model._compiled_trainable_state.update(state["compiled_flags"])


def install_optimizer(model: keras.Model, optimizer: keras.Optimizer) -> None:
    """Makes `optimizer` the model's, and the one that a saved model is loaded with.

    `compile` would do it too, but in a running `fit` it cancels `stop_training`, makes metrics that
    crash under `MirroredStrategy` and leaves no train function. The compile configuration holds the
    optimizer without the `LossScaleOptimizer` that `compile` puts around it; one that an overridden
    `compile` set aside is left alone.
    """
    config = model._compile_config.config
    if config.get("optimizer") in (model.optimizer, without_loss_scale(model.optimizer)):
        config["optimizer"] = without_loss_scale(optimizer)
    model.optimizer = optimizer


def renew_functions(model: keras.Model, *, keep_evaluation: bool) -> None:
    """Has the model's steps traced anew for the variables that are trainable now.

    `fit` reads `train_function` at each step, so it must not be None. JAX and torch must not keep
    evaluation functions (on JAX they would map values to the wrong variables); TensorFlow may,
    which spares a trace.
    """
    if not (keep_evaluation and keras.backend.backend() == "tensorflow"):
        model.test_function = None
        model.predict_function = None
    # What `compile` notes, and Keras means to hold against the flags when `fit` begins.
    flags = {layer: layer.trainable for layer in model._flatten_layers()}
    model._compiled_trainable_state.update(flags)
    model.make_train_function(force=True)


def compile_arguments(model: keras.Model) -> dict[str, Any]:
    """Returns what the model was compiled with, the objects themselves.

    `get_compile_config` returns them serialized, which custom losses do not survive.
    """
    arguments = dict(model._compile_config.config)
    return {**arguments, "optimizer": model.optimizer}


def optimizer_weights(optimizer: Any) -> list[Any] | None:
    """Returns the variables that an optimizer was built to update, or None before it is built."""
    inner = without_loss_scale(optimizer)
    return list(inner._trainable_variables) if getattr(inner, "built", False) else None


def averages(optimizer: Any) -> list[tuple[Any, keras.Variable]]:
    """Returns pairs of a variable and its moving average, which an optimizer may keep."""
    inner = without_loss_scale(optimizer)
    if isinstance(inner, keras.optimizers.MultiOptimizer):
        return [pair for one in inner._inner_optimizers for pair in averages(one)]
    kept = getattr(inner, "_model_variables_moving_average", [])
    return [pair for pair in zip(optimizer_weights(inner) or [], kept) if pair[1] is not None]


def continue_averages(old: Any, new: Any) -> None:
    """Has a new optimizer go on with the averages that an old one keeps of the same weights.

    Keras begins each average at the first step of its optimizer, which those of weights that have
    been averaged before must not do.

    Args:
        old: A built optimizer.
        new: A built optimizer. It stays as it is if either keeps no averages.
    """
    if not on_host(old.iterations):
        return
    kept = {id(variable): average for variable, average in averages(old)}
    new = without_loss_scale(new)
    several = isinstance(new, keras.optimizers.MultiOptimizer)
    for optimizer in new._inner_optimizers if several else [new]:
        known = [(kept.get(id(one)), average) for one, average in averages(optimizer)]
        for before, average in known:
            if before is not None:
                copy_value(before, average)
        begun = {id(average) for before, average in known if before is not None}
        if begun:
            optimizer._update_model_variables_moving_average = functools.partial(
                _update_averages, optimizer, begun
            )


def _update_averages(optimizer: Any, begun: set[int], variables: Sequence[Any]) -> None:
    first_step = keras.ops.equal(optimizer.iterations, 0)
    kept = optimizer._model_variables_moving_average
    for variable, average in zip(variables, kept, strict=True):
        if average is not None:
            momentum = keras.ops.cast(optimizer.ema_momentum, variable.dtype)
            if id(average) not in begun:
                momentum = keras.ops.where(first_step, keras.ops.zeros_like(momentum), momentum)
            average.assign(momentum * average + (1 - momentum) * variable)


def copy_optimizer_state(source: keras.Optimizer, target: keras.Optimizer) -> None:
    """Gives a built optimizer the step count of one of its class, and slots of the same variables.

    The learning rate is not copied, nor what optimizers inside it hold.
    """
    from_slots, to_slots = _slots(source), _slots(target)
    from_shared, to_shared = _shared_state(source, from_slots), _shared_state(target, to_slots)
    pairs = list(zip(from_shared, to_shared, strict=True))
    known = {source._var_key(v): index for index, v in enumerate(source._trainable_variables)}
    for index, variable in enumerate(target._trainable_variables):
        position = known.get(target._var_key(variable))
        if position is not None:
            pairs += [
                (slots[position], to_slots[name][index]) for name, slots in from_slots.items()
            ]
    for old, new in pairs:
        if new is not None:
            copy_value(old, new)


def copy_value(source: keras.Variable, target: keras.Variable) -> None:
    """Gives a variable the value of another: a copy, as JAX lets no two variables share one."""
    target.assign(keras.ops.copy(source))


def _slots(optimizer: keras.Optimizer) -> dict[str, list[Any]]:
    """The lists in which an optimizer keeps something for each variable, by attribute."""
    count = len(optimizer._trainable_variables)
    apart = (optimizer._variables, optimizer._trainable_variables)
    return {
        name: value
        for name, value in vars(optimizer).items()
        if isinstance(value, list)
        and len(value) == count
        and not any(value is one for one in apart)
        and all(one is None or isinstance(one, keras.Variable) for one in value)
    }


def _shared_state(optimizer: keras.Optimizer, slots: dict[str, list[Any]]) -> list[keras.Variable]:
    kept = {id(one) for values in slots.values() for one in values}
    kept.add(id(optimizer._learning_rate))
    return [variable for variable in optimizer._variables if id(variable) not in kept]


def scale_learning_rates(
    optimizer: keras.Optimizer, scale_of: Callable[[keras.Variable], float]
) -> None:
    """Has a built optimizer update each variable at a multiple of the learning rate.

    As if each rate had an optimizer of its own, at the cost of one. Backends that update several
    variables at once (torch) do so for those of one scale.
    """
    scales = [scale_of(variable) for variable in optimizer._trainable_variables]

    def scale(variable: Any) -> float:
        return scales[optimizer._get_variable_index(variable)]

    rate, update = optimizer._get_current_learning_rate, optimizer.update_step
    decay = optimizer._apply_weight_decay
    factor = 1.0

    def scaled_rate() -> Any:
        return rate() if factor == 1.0 else rate() * factor

    def scaled_update(gradient: Any, variable: Any, learning_rate: Any) -> None:
        update(gradient, variable, _scaled(learning_rate, scale(variable)))

    def scaled_decay(variables: Sequence[Any]) -> None:
        nonlocal factor
        for factor, members in _by_scale(variables):
            decay(members)
        factor = 1.0

    def _by_scale(variables: Sequence[Any]) -> list[tuple[float, list[Any]]]:
        groups: dict[float, list[Any]] = {}
        for variable in variables:
            groups.setdefault(scale(variable), []).append(variable)
        return list(groups.items())

    optimizer._get_current_learning_rate = scaled_rate
    optimizer._apply_weight_decay = scaled_decay
    if not hasattr(optimizer, "_parallel_update_step"):
        optimizer.update_step = scaled_update
        return
    together = optimizer._parallel_update_step

    def scaled_together(gradients: list[Any], variables: list[Any], learning_rate: Any) -> None:
        of = {id(v): gradient for v, gradient in zip(variables, gradients, strict=True)}
        for one, members in _by_scale(variables):
            together([of[id(v)] for v in members], members, _scaled(learning_rate, one))

    optimizer._parallel_update_step = scaled_together


def _scaled(learning_rate: Any, scale: float) -> Any:
    return learning_rate if scale == 1.0 else learning_rate * scale


def clip_by_global_norm(gradients: Sequence[Any], norm: float) -> list[Any]:
    """Returns gradients scaled such that the norm of all together is at most `norm`."""
    return base_optimizer.clip_by_global_norm(gradients, norm)


def initial_epoch(model: keras.Model) -> int | None:
    """Returns the epoch that a restoring callback has set for `fit` to begin with, if one has."""
    return model._initial_epoch


def set_initial_epoch(model: keras.Model, epoch: int | None) -> None:
    """Sets the epoch that `fit` begins with, when called in `on_train_begin`.

    As `BackupAndRestore` does it, which leaves it set: the next `fit` would begin there too.
    """
    model._initial_epoch = epoch


def has_own_train_step(model: keras.Model) -> bool:
    """Whether the model's step is not that of Keras, and so may train any weights."""
    return type(model).train_step is not keras.Model.train_step or "train_step" in vars(model)


def own_methods(model: keras.Model) -> list[str]:
    """Returns the names of the methods with which a model is trained and that are not Keras'.

    Args:
        model: A Functional or Sequential model, of a class of one's own or not.
    """
    base = next(one for one in type(model).__mro__ if one.__module__.startswith("keras."))
    names = ("call", "train_step", "test_step", "compute_loss", "compute_metrics")
    return [
        name
        for name in names
        if getattr(type(model), name) is not getattr(base, name) or name in vars(model)
    ]


def losses_of(model: keras.Model, inputs: Any) -> list[Any]:
    """Returns what a built model adds to the loss when it is called on symbolic inputs."""

    def call(x: Any) -> Any:
        values = model.trainable_variables, model.non_trainable_variables
        return model.stateless_call(*values, x, return_losses=True)[2]

    return compute_output_spec(call, inputs)


def flags_when_compiled(model: keras.Model) -> dict[keras.Layer, bool]:
    """Returns the `trainable` flags that the layers had when the model was compiled."""
    return dict(getattr(model, "_compiled_trainable_state", {}))


def without_loss_scale(optimizer: keras.Optimizer) -> keras.Optimizer:
    """Returns the optimizer inside a `LossScaleOptimizer`, or the optimizer itself."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer.inner_optimizer
    return optimizer


def copy_weight_decay_exclusions(source: keras.Optimizer, target: keras.Optimizer) -> None:
    """Copies what `exclude_from_weight_decay` was told, which no configuration carries."""
    for name in ("_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern"):
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))


# Values on their devices.


def replicas(weight: keras.Variable) -> list[Any]:
    """Returns the backend's variables behind a weight: one, or one for each replica."""
    if keras.backend.backend() == "tensorflow":
        return list(getattr(weight.value, "values", [weight.value]))
    return [weight.value]


def device_of(value: Any) -> str:
    """Returns the name of the device that the value is on, for `on_device`."""
    return value.device if keras.backend.backend() == "tensorflow" else ""


def on_device(name: str) -> contextlib.AbstractContextManager:
    """Returns a context in which operations run on that device."""
    return keras.device(name) if name else contextlib.nullcontext()


def on_host(value: Any) -> np.ndarray:
    """Returns a weight's or tensor's values as a NumPy array.

    In one dimension on the way: `convert_to_numpy` fails for a single bfloat16 number. What is
    spread over processes is fetched from them, so each must call this.
    """
    flat = keras.ops.convert_to_numpy(_whole(keras.ops.reshape(value, (-1,))))
    return np.array(flat).reshape(value.shape)


def _whole(value: Any) -> Any:
    """Returns a tensor, with the parts of it that only other processes hold."""
    if keras.backend.backend() != "jax" or value.is_fully_addressable or value.is_fully_replicated:
        return value
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(value, tiled=True)


def held_values(weight: keras.Variable) -> list[Any]:
    """Returns the values that the weight has now on each replica, and keeps them.

    A tensor read from a TensorFlow variable shares its memory until the variable changes, and is
    left with the old values then: nothing is copied before. JAX gives the memory of a weight away
    at each step and torch updates it in place, so there the values are copied to the host.
    """
    if keras.backend.backend() == "tensorflow":
        return [variable.read_value() for variable in replicas(weight)]
    return [on_host(weight)]


@functools.cache
def fused(function: Callable) -> Callable:
    """Returns the function such that its steps become one pass over memory, where XLA is.

    The same for the same function: TensorFlow keeps what it has compiled as long as the process
    lives.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True, autograph=False)
    return function


def compiled_reading(
    weights: Sequence[keras.Variable], function: Callable[[list[Any]], Any]
) -> Callable[[], Any]:
    """Returns a function without arguments for `function` of the weights' values at that time.

    It is compiled where the backend compiles. 64-bit integers are 64 bits wide in it on JAX too.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        variables = [variable for weight in weights for variable in replicas(weight)]
        return tf.function(
            lambda: function([variable.read_value() for variable in variables]), autograph=False
        )
    if keras.backend.backend() == "jax":
        import jax

        compiled = jax.jit(function)

        def read_and_compute() -> Any:
            with jax.enable_x64(True):
                return _whole(compiled([weight.value for weight in weights]))

        return read_and_compute
    return lambda: function([keras.ops.stop_gradient(weight.value) for weight in weights])


def random_state() -> Callable[[], None]:
    """Returns a function that puts all global random generators back to where they are now.

    Those of Python, NumPy and Keras, and that of the backend where it has one: TensorFlow draws the
    seeds of operations from a generator in its eager context.
    """
    python, legacy = random.getstate(), np.random.get_state()
    generator = global_state.get_global_attribute("global_seed_generator")
    seed = None if generator is None else on_host(generator.state)
    restore_backend = _backend_random_state()

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(legacy)
        global_state.set_global_attribute("global_seed_generator", generator)
        if generator is not None:
            generator.state.assign(seed)
        restore_backend()

    return restore


def _backend_random_state() -> Callable[[], None]:
    if keras.backend.backend() == "tensorflow":
        from tensorflow.python.eager import context

        generator = getattr(context.context(), "_rng", None)
        state = None if generator is None else generator.getstate()
        return lambda: None if generator is None else generator.setstate(state)
    if keras.backend.backend() == "torch":
        import torch

        state = torch.random.get_rng_state()
        return lambda: torch.random.set_rng_state(state)
    return lambda: None


# Processes that train one model together, each started by itself.


def _is_shared() -> bool:
    """Whether other processes take part in the training: `keras.distribution`, on JAX."""
    distribution = keras.distribution.distribution()
    if distribution is None or keras.backend.backend() != "jax":
        return False
    return distribution.device_mesh.backend_mesh.is_multi_process


def is_chief() -> bool:
    """Whether this process is the one that prints and writes, of those that train one model."""
    if not _is_shared():
        return True
    import jax

    return jax.process_index() == 0


def of_all(value: Any) -> np.ndarray:
    """Returns what each process calls this with, the chief's first. They wait for each other.

    Args:
        value: A number or NumPy array, of one dtype and shape in all processes.

    Returns:
        A NumPy array with the processes along a new first axis.
    """
    array = np.asarray(value)
    if not (_is_shared() and array.size):
        return array[np.newaxis]
    from jax.experimental import multihost_utils

    # As bytes: JAX would round 64-bit numbers.
    gathered = multihost_utils.process_allgather(np.frombuffer(array.tobytes(), "uint8"))
    return np.ascontiguousarray(gathered).view(array.dtype).reshape(-1, *array.shape)


def of_chief(value: Any) -> np.ndarray:
    """Returns what the chief calls this with, in all processes."""
    return of_all(value)[0]


def in_all(function: Callable[[], Any]) -> Any:
    """Returns what the function returns; raises in all processes if it raises in one.

    One that raises alone leaves the others waiting for it until JAX gives up, minutes later.
    """
    result, failure = None, None
    try:
        result = function()
    except ValueError as error:
        failure = error
    if of_all(failure is not None).any():
        raise failure or RuntimeError("Another process of this run has failed; see what it says.")
    return result


# Data: what `fit` takes, as batches.


def batches_of(
    x: Any, y: Any, sample_weight: Any, batch_size: int | None, steps: int | None
) -> tuple[Any, int | None]:
    """Returns a `tf.data.Dataset` of the batches that `fit` would see, and how many there are.

    Args:
        x: Whatever `fit` takes.
        y: Targets, if they are not in `x`.
        sample_weight: Weights, if they are not in `x`.
        batch_size: Int or None. For arrays; None is Keras' default.
        steps: Int or None. How many batches are used, of data that has no end.

    Returns:
        The data set and the number of its batches, None if that is not known.
    """
    adapter = data_adapters.get_data_adapter(x, y, sample_weight, batch_size, steps)
    dataset, count = _dataset_of(adapter), adapter.num_batches
    if steps is None:
        return dataset, count
    return dataset.take(steps), steps if count is None else min(steps, count)


def _dataset_of(adapter: Any) -> Any:
    """Returns the batches of a data adapter as a `tf.data.Dataset`.

    Of arrays one batch after the other: `get_tf_dataset` would copy all into memory first, even of
    a `numpy.memmap`.
    """
    is_arrays = isinstance(adapter, data_adapters.ArrayDataAdapter)
    first = next(iter(adapter.get_numpy_iterator()), None) if is_arrays else None
    if first is None:
        return adapter.get_tf_dataset()
    import tensorflow as tf

    first = keras.tree.lists_to_tuples(first)
    spec = keras.tree.map_structure(
        lambda array: tf.TensorSpec((None, *array.shape[1:]), array.dtype), first
    )
    return tf.data.Dataset.from_generator(
        lambda: map(keras.tree.lists_to_tuples, adapter.get_numpy_iterator()), output_signature=spec
    ).prefetch(1)


def predictions(model: keras.Model, batches: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Yields each batch of tensors, as `fit` takes it, and what the model returns for its inputs.

    As `predict` does it, which would hold the outputs of all batches. The outputs are NumPy arrays.
    """
    on_tensorflow = keras.backend.backend() == "tensorflow"
    for batch in batches:
        x = keras.utils.unpack_x_y_sample_weight(batch)[0]
        if not on_tensorflow:
            x = keras.tree.map_structure(lambda tensor: tensor.numpy(), x)
        yield batch, _predict(model, x)


def _predict(model: keras.Model, x: Any) -> Any:
    strategy = model.distribute_strategy if keras.backend.backend() == "tensorflow" else None
    if strategy is None or strategy.num_replicas_in_sync == 1:
        return model.predict_on_batch(x)
    count = strategy.num_replicas_in_sync

    def piece(context: Any) -> Any:
        def of(tensor: Any) -> Any:
            bounds = np.linspace(0, tensor.shape[0], count + 1).astype(int)
            replica = context.replica_id_in_sync_group
            return tensor[bounds[replica] : bounds[replica + 1]]

        return keras.tree.map_structure(of, x)

    # `predict_on_batch` would have each replica compute the whole batch.
    pieces = strategy.experimental_distribute_values_from_function(piece)
    model.make_predict_function()
    outputs = model.predict_function([(pieces,)])
    return keras.tree.map_structure(np.array, outputs)


# Callbacks: what is beside ours in the list given to `fit`.


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
