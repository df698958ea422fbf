"""Each way to train that `compile` and optimizers offer, with and without a switch in `fit`.

Without one, `fit` is bit for bit what it is without the callback; with one, what the steps done by
hand give: `fit`, unfreeze, `compile` anew, `fit`.
"""

import contextlib
import dataclasses
from collections.abc import Callable

import keras
import numpy as np
import pytest

from keras_tl import FrozenBackbone, UnfreezeAtConvergence
from keras_tl.internals.optimizers import moving_averages
from keras_tl.internals.values import on_host
from tests import models
from tests.shared import (
    SEVERAL_STEPS,
    Recorder,
    as_bytes,
    forget_compiled,
    regression_data,
    values_of,
)

X, Y = regression_data(16)
BATCH = 4
HEAD_RATE, RATE = 1e-2, 1e-3


def adam(learning_rate, model):
    return keras.optimizers.Adam(learning_rate)


@dataclasses.dataclass
class Mode:
    """How a model is made and compiled."""

    compile: dict = dataclasses.field(default_factory=dict)
    optimizer: Callable = adam
    policy: str = "float32"
    prepare: Callable = lambda base: None


# One before the switch. Where each step takes as long as the first, there is one after it.
def epochs_of(request):
    return 2 if request.node.get_closest_marker("eager") else 3


def accumulating(learning_rate, model):
    return keras.optimizers.SGD(learning_rate, gradient_accumulation_steps=2)


def clipped(learning_rate, model):
    return keras.optimizers.Adam(learning_rate, global_clipnorm=0.1)


def decayed(learning_rate, model):
    optimizer = keras.optimizers.AdamW(learning_rate, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


def averaged(learning_rate, model):
    return keras.optimizers.SGD(learning_rate, use_ema=True, ema_overwrite_frequency=2)


def loss_scaled(learning_rate, model):
    """Scales as `compile` does, but grows the scale soon enough for a test to see it."""
    optimizer = keras.optimizers.SGD(learning_rate)
    old = model.optimizer if model.compiled else None
    scale = float(keras.ops.convert_to_numpy(old.dynamic_scale)) if old else 16.0
    new = keras.optimizers.LossScaleOptimizer(
        optimizer, initial_scale=scale, dynamic_growth_steps=3
    )
    if old:
        new.build(model.trainable_variables)
        new.step_counter.assign(keras.ops.convert_to_numpy(old.step_counter))
    return new


def with_lora(base):
    base.layers[1].enable_lora(2)


def quantized(base):
    base.layers[1].quantize("int8")


MODES = {
    "plain": Mode(),
    "mixed_float16": Mode(policy="mixed_float16", optimizer=loss_scaled),
    "mixed_bfloat16": Mode(policy="mixed_bfloat16"),
    "jit_compile=True": Mode({"jit_compile": True}),
    "run_eagerly=True": Mode({"run_eagerly": True}),
    "steps_per_execution=1": Mode({"steps_per_execution": 1}),
    "steps_per_execution=4": Mode({"steps_per_execution": 4}),
    "steps_per_execution above an epoch": Mode({"steps_per_execution": 100}),
    "gradient_accumulation_steps": Mode(optimizer=accumulating),
    "global_clipnorm": Mode(optimizer=clipped),
    "weight_decay with exclusions": Mode(optimizer=decayed),
    "LoRA": Mode(prepare=with_lora),
    "int8 layers": Mode(prepare=quantized),
}
NEEDS = {
    "steps_per_execution=4": [SEVERAL_STEPS],
    "steps_per_execution above an epoch": [SEVERAL_STEPS],
}


# What is compiled is the point of these only: on TensorFlow the others are traced in the slow run.
# A plain step that is compiled: test_properties_manual_route; one in half precision:
# test_training_modes.
COMPILED = {"jit_compile=True", "steps_per_execution=4"}


def each(modes, slow=()):
    """The modes as the ordinary run has them; those that it does not trace are there twice."""

    def param(name, suffix, *marks):
        covers = pytest.mark.covers(f"mode: {name}")
        return pytest.param(
            modes[name], id=name + suffix, marks=[covers, *NEEDS.get(name, []), *marks]
        )

    params = []
    for name in modes:
        ordinary = [pytest.mark.slow] if name in slow else []
        if name in COMPILED:
            params.append(param(name, "", *ordinary))
        else:
            params.append(param(name, "", pytest.mark.eager, *ordinary))
            params.append(param(name, ", compiled", pytest.mark.slow))
    return params


@contextlib.contextmanager
def made(mode):
    """A compiled model and its FrozenBackbone; the same each time."""
    forget_compiled()
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(mode.policy)
    try:
        keras.utils.set_random_seed(0)
        base = models.functional(["dense", "batchnorm", "dense"])
        mode.prepare(base)
        wrapper = FrozenBackbone(base)
        model = models.functional_outer(wrapper)
        model.compile(mode.optimizer(HEAD_RATE, model), "mse", metrics=["mae"], **mode.compile)
        yield model, wrapper
    finally:
        keras.config.set_dtype_policy(before)


def fit(model, epochs, *callbacks, initial_epoch=0):
    return model.fit(
        X,
        Y,
        batch_size=BATCH,
        validation_batch_size=len(X),
        epochs=epochs,
        initial_epoch=initial_epoch,
        validation_data=(X, Y),
        shuffle=False,
        callbacks=list(callbacks),
        verbose=0,
    )


def unfreezer(frozen_epochs):
    return UnfreezeAtConvergence(
        RATE, max_frozen_epochs=frozen_epochs, restore_best_weights=False, verbose=0
    )


def state_of(model):
    return values_of(model), [
        np.asarray(on_host(variable)).tobytes() for variable in model.optimizer.variables
    ]


@pytest.mark.parametrize(
    "mode", each({**MODES, "use_ema": Mode(optimizer=averaged)}, slow=set(MODES))
)
def test_without_a_switch(mode):
    with made(mode) as (model, _):
        fit(model, 3)
        expected = state_of(model)
    with made(mode) as (model, wrapper):
        frozen, before = as_bytes(wrapper.weights), values_of(model)
        with pytest.warns(UserWarning, match="still frozen"):
            fit(model, 3, unfreezer(None))
        assert state_of(model) == expected
        assert as_bytes(wrapper.weights) == frozen
        assert values_of(model) != before


@pytest.mark.parametrize("mode", each(MODES))
def test_over_a_switch(mode, request):
    epochs = epochs_of(request)
    by_hand, in_one = Recorder(state_of), Recorder(state_of)
    with made(mode) as (model, wrapper):
        fit(model, 1, by_hand)
        frozen = as_bytes(wrapper.weights)
        wrapper.unfreeze()
        optimizer = mode.optimizer(RATE, model)
        model.compile(optimizer, "mse", metrics=["mae"], **mode.compile)
        fit(model, epochs, by_hand, initial_epoch=1)
    with made(mode) as (model, wrapper):
        statistics = as_bytes(models.statistics(wrapper))
        fit(model, epochs, in_one, unfreezer(1))
        assert as_bytes(models.statistics(wrapper)) == statistics
        tuned = as_bytes(wrapper.weights)
    assert in_one.records == by_hand.records
    moved = [path for (path, old), (_, new) in zip(frozen, tuned) if old != new]
    assert sum(path.endswith("bias") for path in moved) == 2


@pytest.mark.eager
@pytest.mark.covers("mode: use_ema")
def test_averages_are_what_remains_after_a_switch():
    with made(Mode(optimizer=averaged)) as (model, _):
        fit(model, 4, unfreezer(2))
        pairs = moving_averages(model.optimizer)
        assert len(pairs) == len(model.trainable_weights) == 6
        assert all(np.array_equal(np.array(v), np.array(average)) for v, average in pairs)


@pytest.mark.eager
@pytest.mark.covers("mode: mixed_float16")
def test_the_loss_scale_grows_on_over_the_switch():
    scales = Recorder(lambda model: float(on_host(model.optimizer.dynamic_scale)))
    with made(MODES["mixed_float16"]) as (model, _):
        fit(model, 4, scales, unfreezer(2))
    assert scales.records == sorted(scales.records)
    assert scales.records[0] < scales.records[-1] > 16.0


@pytest.mark.eager
@pytest.mark.covers("mode: int8 layers")
def test_an_int8_kernel_stays_int8_and_frozen_and_the_switch_says_so(capsys):
    with made(MODES["int8 layers"]) as (model, wrapper):
        kernel = wrapper.backbone.layers[1]._kernel
        before = as_bytes([kernel])
        callback = unfreezer(1)
        callback.verbose = 1
        fit(model, 2, callback)
    assert (kernel.dtype, kernel.trainable, as_bytes([kernel])) == ("int8", False, before)
    assert callback.transitions[0].cannot_train == (kernel.path,)
    assert "cannot train" in capsys.readouterr().out


@pytest.mark.eager
@pytest.mark.covers("mode: LoRA")
def test_a_kernel_under_lora_stays_frozen_and_the_switch_says_so():
    with made(MODES["LoRA"]) as (model, wrapper):
        layer = wrapper.backbone.layers[1]
        before, factor = as_bytes([layer._kernel]), as_bytes([layer.lora_kernel_b])
        callback = unfreezer(1)
        fit(model, 2, callback)
    assert as_bytes([layer._kernel]) == before
    assert as_bytes([layer.lora_kernel_b]) != factor
    assert callback.transitions[0].cannot_train == (layer._kernel.path,)
