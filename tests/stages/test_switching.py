import math

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_tl import (
    FrozenBackbone,
    UnfreezeAtConvergence,
    layerwise_learning_rates,
    renew_optimizer,
)
from keras_tl.arguments import check_learning_rate
from keras_tl.backbone import freezing
from keras_tl.internals.models import compiled_state
from keras_tl.internals.optimizers import moving_averages
from keras_tl.stages import switching
from tests import models, strategies
from tests.shared import as_bytes, examples, regression_data


def compiled_model(optimizer="adam", **compile_arguments):
    backbone = FrozenBackbone(models.functional(["dense", "batchnorm"]))
    model = models.functional_outer(backbone, [keras.layers.Dropout(0.5)])
    model.compile(optimizer, "mse", metrics=["mae"], **compile_arguments)
    return model, backbone


def config_but_rate(optimizer):
    config = optimizer.get_config()
    config.pop("learning_rate")
    return config


@given(optimizer=strategies.optimizers(), rate=st.sampled_from([1e-5, np.float32(1e-3), 1]))
@settings(max_examples=examples(100))
def test_renewed_optimizer_differs_in_learning_rate_alone(optimizer, rate):
    variable = keras.Variable([1.0])
    optimizer.build([variable])
    optimizer.apply([keras.ops.ones(1)])

    new = renew_optimizer(optimizer, rate, variables=[variable])

    assert type(new) is type(optimizer)
    assert config_but_rate(new) == config_but_rate(optimizer)
    assert float(new.learning_rate) == np.float32(rate)
    assert int(new.iterations) == 0
    assert new.built


def test_renewed_optimizer_keeps_its_rate_if_none_is_given():
    assert float(renew_optimizer(keras.optimizers.SGD(0.25)).learning_rate) == 0.25


def test_renewed_optimizer_takes_schedules_and_callables_in_place_of_either():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.5)
    for old in (keras.optimizers.SGD(0.1), keras.optimizers.SGD(schedule)):
        assert float(renew_optimizer(old, schedule).learning_rate) == 0.5
        assert float(renew_optimizer(old, lambda: 0.125).learning_rate) == 0.125
        assert float(renew_optimizer(old, 0.25).learning_rate) == 0.25


def test_a_schedule_that_is_kept_starts_again():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.5)
    old = keras.optimizers.SGD(schedule)
    variable = keras.Variable([1.0])
    old.build([variable])
    old.apply([keras.ops.ones(1)])

    assert float(old.learning_rate) == 0.25
    assert float(renew_optimizer(old).learning_rate) == 0.5


def test_weight_decay_exclusions_are_kept():
    kept, decayed = keras.Variable([1.0], name="kept"), keras.Variable([1.0], name="decayed")
    old = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    old.exclude_from_weight_decay(var_names=["kept"])

    new = renew_optimizer(old, 0.1, variables=[kept, decayed])
    new.apply([keras.ops.zeros(1), keras.ops.zeros(1)])

    assert float(kept[0]) == 1.0
    assert float(decayed[0]) < 1.0


def test_loss_scale_is_carried_over():
    variable = keras.Variable([1.0])
    old = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), dynamic_growth_steps=2)
    old.build([variable])
    # As after three steps without an overflow.
    old.dynamic_scale.assign(2.0**16)
    old.step_counter.assign(1)

    new = renew_optimizer(old, 0.2, variables=[variable])

    assert isinstance(new, keras.optimizers.LossScaleOptimizer)
    assert float(new.dynamic_scale) == float(old.dynamic_scale) == 2.0**16
    assert int(new.step_counter) == 1
    assert float(new.learning_rate) == np.float32(0.2)


def test_several_learning_rates_are_refused():
    optimizer = keras.optimizers.MultiOptimizer(lambda variable: keras.optimizers.SGD(0.1))
    with pytest.raises(ValueError, match="MultiOptimizer.*Pass `optimizer=`"):
        renew_optimizer(optimizer, 0.1)


@pytest.mark.parametrize("rate", [0, 0.0, -1e-3, math.nan, math.inf, "1e-3", True, [0.1]])
def test_refuses_what_is_no_learning_rate(rate):
    with pytest.raises(ValueError, match="`learning_rate` must be a finite number above 0"):
        check_learning_rate(rate)


def test_renewed_training_moves_what_is_trainable_now():
    model, backbone = compiled_model()
    x, y = regression_data()
    model.fit(x, y, verbose=0)
    before = as_bytes(backbone.weights)

    backbone.unfreeze()
    switching.renew_training(model, 1e-2)
    model.train_on_batch(x, y)

    changed = [a[0] for a, b in zip(before, as_bytes(backbone.weights)) if a != b]
    assert [path.split("/")[-1] for path in changed] == ["kernel", "bias"]


@pytest.mark.eager
@pytest.mark.parametrize("built", [False, True])
def test_an_optimizer_of_the_users_is_loss_scaled_as_compile_does(built):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model, backbone = compiled_model()
        optimizer = keras.optimizers.SGD(0.1)
        if built:
            optimizer.build([keras.Variable([1.0])])
        backbone.unfreeze()
        switching.renew_training(model, optimizer=optimizer)
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        assert isinstance(model.optimizer.inner_optimizer, keras.optimizers.SGD)
        model.fit(*regression_data(), verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")


def test_renewed_training_keeps_stop_training_and_metrics():
    model, _ = compiled_model()
    metrics = model.metrics
    model.stop_training = True
    switching.renew_training(model, 1e-2)
    assert model.stop_training
    assert all(a is b for a, b in zip(metrics, model.metrics))


@pytest.mark.eager
def test_saved_model_has_the_renewed_optimizer(tmp_path):
    model, backbone = compiled_model("sgd")
    model.fit(*regression_data(), verbose=0)
    backbone.unfreeze()
    switching.renew_training(model, optimizer=keras.optimizers.Adam(0.125))
    model.fit(*regression_data(), verbose=0)

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")

    assert isinstance(loaded.optimizer, keras.optimizers.Adam)
    assert float(loaded.optimizer.learning_rate) == 0.125
    assert as_bytes(loaded.optimizer.variables) == as_bytes(model.optimizer.variables)


def test_users_optimizer_is_scaled_as_the_one_before():
    model, _ = compiled_model()
    model.optimizer = keras.optimizers.LossScaleOptimizer(model.optimizer)
    switching.renew_training(model, optimizer=keras.optimizers.SGD(0.125))
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert float(model.optimizer.learning_rate) == 0.125


@pytest.mark.parametrize("failing", ["build", "make_train_function"])
def test_a_failed_switch_changes_nothing(failing, monkeypatch):
    model, backbone = compiled_model()
    x, y = regression_data()
    model.fit(x, y, validation_data=(x, y), verbose=0)
    compiled = compiled_state(model)
    flags = freezing.get_trainable_flags(model)
    weights = as_bytes(model.weights)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    target = keras.optimizers.Adam if failing == "build" else model
    monkeypatch.setattr(target, failing, fail)
    with pytest.raises(KeyboardInterrupt), switching.all_or_nothing(model, model.weights):
        for weight in model.weights:
            weight.assign(weight + 1)
        backbone.unfreeze()
        switching.renew_training(model, 1e-3)
    monkeypatch.undo()

    assert compiled_state(model) == compiled
    assert freezing.get_trainable_flags(model) == flags
    assert as_bytes(model.weights) == weights
    model.fit(x, y, verbose=0)


@given(kinds=strategies.layer_kinds())
@settings(max_examples=examples(5))
def test_regularization_loss_is_what_keras_adds_when_weights_become_trainable(kinds):
    backbone = models.functional(kinds)
    for layer in backbone.layers:
        if isinstance(layer, keras.layers.Dense):
            layer.kernel.regularizer = keras.regularizers.L2(0.5)
    model = models.functional_outer(FrozenBackbone(backbone))
    x, y = regression_data()
    model.compile("sgd", "mse", run_eagerly=True)
    frozen = model.evaluate(x, y, verbose=0)
    model.get_layer(index=1).unfreeze()
    unfrozen = model.evaluate(x, y, verbose=0)

    offset = switching.regularization_loss(model.trainable_weights)
    assert offset > 0
    assert math.isclose(unfrozen - frozen, offset, rel_tol=1e-5)


def test_exclusions_are_unknown_for_an_optimizer_without_any():
    assert not hasattr(renew_optimizer(keras.optimizers.SGD(0.1)), "_exclude_from_weight_decay")


class Averages(keras.callbacks.Callback):
    """Notes weights and their averages after each step."""

    def __init__(self):
        super().__init__()
        self.records = []

    def on_train_batch_end(self, batch, logs=None):
        pairs = moving_averages(self.model.optimizer)
        self.records.append({v.path: (np.array(v), np.array(average)) for v, average in pairs})


@pytest.mark.eager
@pytest.mark.parametrize("by_layer", [False, True])
def test_averages_of_weights_that_keep_training_go_on(by_layer):
    model, wrapper = compiled_model(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5))
    rate = layerwise_learning_rates(wrapper, 1e-2, 0.5) if by_layer else 1e-2
    records = Averages()
    switch = UnfreezeAtConvergence(rate, max_frozen_epochs=2, restore_best_weights=False, verbose=0)
    x, y = regression_data()
    fit = {"validation_data": (x, y), "callbacks": [switch, records], "verbose": 0}
    model.fit(x, y, batch_size=16, epochs=4, **fit)

    _, last_frozen, first_tuned, second_tuned = records.records
    assert len(last_frozen) == 2 < len(first_tuned)
    for path, (weight, average) in first_tuned.items():
        if path in last_frozen:
            expected = 0.5 * last_frozen[path][1] + 0.5 * weight
            assert not np.allclose(average, weight)
        else:
            expected = weight  # As at the first step of any optimizer.
        np.testing.assert_allclose(average, expected, rtol=1e-5)
        weight, average_then = second_tuned[path]
        np.testing.assert_allclose(average_then, 0.5 * average + 0.5 * weight, rtol=1e-5)
