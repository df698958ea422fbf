"""The head goes on with its optimizer's state while the backbone joins with its own rate."""

import keras
import numpy as np
import pytest

from keras_tl import (
    FreezeGuard,
    FrozenBackbone,
    GroupOptimizer,
    UnfreezeAtConvergence,
)
from keras_tl.internals.optimizers import without_loss_scale
from keras_tl.optimizers import group_optimizer
from tests import models
from tests.shared import Recorder, as_bytes, regression_data

# Every optimizer that Keras ships; no_change is a rate so low that no float32 weight moves.
OPTIMIZERS = [
    lambda: keras.optimizers.SGD(0.01, momentum=0.9),
    lambda: keras.optimizers.RMSprop(0.01),
    lambda: keras.optimizers.Adam(0.01),
    lambda: keras.optimizers.AdamW(0.01),
    lambda: keras.optimizers.Adadelta(0.01),
    lambda: keras.optimizers.Adagrad(0.01),
    lambda: keras.optimizers.Adamax(0.01),
    lambda: keras.optimizers.Nadam(0.01),
    lambda: keras.optimizers.Ftrl(0.01),
    lambda: keras.optimizers.Lion(0.01),
    lambda: keras.optimizers.Adafactor(0.01),
    lambda: keras.optimizers.Lamb(0.01),
    lambda: keras.optimizers.Muon(0.01),
    lambda: keras.optimizers.ScheduleFreeAdamW(0.01),
    lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.5),
    lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=3),
    lambda: keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)),
]


# The others in the slow run: averages, accumulation and a schedule, all of Adam.
ORDINARY = {14, 15, 16}


def build(optimizer, **compile_arguments):
    keras.utils.set_random_seed(0)
    wrapper = FrozenBackbone(models.functional(["dense", "batchnorm", "dense"]))
    model = models.functional_outer(wrapper, [keras.layers.Dense(4, activation="relu")])
    model.compile(optimizer, "mse", **compile_arguments)
    return model, wrapper


def fit(model, *callbacks, epochs=4):
    x, y = regression_data()
    return model.fit(
        x,
        y,
        batch_size=8,
        validation_batch_size=len(x),
        epochs=epochs,
        shuffle=False,
        validation_data=(x, y),
        callbacks=list(callbacks),
        verbose=0,
    ).history


def switch(learning_rate=1e-3, head_learning_rate=0.01, **arguments):
    return UnfreezeAtConvergence(
        learning_rate,
        head_learning_rate=head_learning_rate,
        max_frozen_epochs=2,
        restore_best_weights=False,
        verbose=0,
        **arguments,
    )


@pytest.mark.eager
@pytest.mark.parametrize(
    "index",
    [
        pytest.param(index, marks=() if index in ORDINARY else pytest.mark.slow)
        for index in range(len(OPTIMIZERS))
    ],
)
def test_the_head_goes_on_bit_for_bit(index):
    # The backbone joins, at a rate so low that none of its weights move. Eagerly: compiled,
    # TensorFlow fuses the head's kernels with others, which rounds in other ways.
    make = OPTIMIZERS[index]
    rate = make().get_config()["learning_rate"]
    # A schedule given to the head begins at the switch: where the compiled one is after 4 steps.
    head_rate = keras.optimizers.schedules.ExponentialDecay(0.1 * 0.5**2, 2, 0.5)
    alone, _ = build(make(), run_eagerly=True)
    fit(alone)
    still = keras.optimizers.SGD(1e-30)
    model, wrapper = build(make(), run_eagerly=True)
    callback = UnfreezeAtConvergence(
        optimizer=still,
        head_learning_rate=rate if isinstance(rate, float) else head_rate,
        max_frozen_epochs=2,
        restore_best_weights=False,
        verbose=0,
    )
    fit(model, callback)

    assert isinstance(model.optimizer, GroupOptimizer)
    count = len(wrapper.weights)
    assert [b for _, b in as_bytes(model.weights[count:])] == [
        b for _, b in as_bytes(alone.weights[count:])
    ]
    head = model.optimizer.groups["head"]
    assert int(head._iterations) == int(alone.optimizer._iterations) == 8


@pytest.mark.eager
def test_the_backbone_joins_with_its_rate():
    model, wrapper = build(keras.optimizers.Adam(0.01))
    dense = wrapper.backbone.layers[1]
    kernels = Recorder(lambda _: np.array(dense.kernel))
    history = fit(model, switch(1e-3, 5e-3), kernels)

    assert [group.name for group in model.optimizer.groups.values()] == ["head", "backbone"]
    names = [model.optimizer.group_of(v) for v in model.trainable_variables]
    assert names == ["backbone"] * 4 + ["head"] * 4
    rates = {key: values for key, values in history.items() if key.startswith("learning_rate")}
    np.testing.assert_allclose(rates.pop("learning_rate"), [0.01, 0.01, 1e-3, 1e-3], rtol=1e-6)
    np.testing.assert_allclose(rates.pop("learning_rate_head"), [0.01, 0.01, 5e-3, 5e-3], rtol=1e-6)
    np.testing.assert_allclose(
        rates.pop("learning_rate_backbone"), [0.0, 0.0, 1e-3, 1e-3], rtol=1e-6
    )
    assert rates == {}
    first, second, third, _ = kernels.records
    assert np.array_equal(first, second)
    assert not np.array_equal(second, third)


@pytest.mark.eager
def test_the_backbone_starts_without_state():
    model, _ = build(keras.optimizers.Adam(0.01))
    iterations = Recorder(
        lambda model: (
            [int(one.iterations) for one in model.optimizer.groups.values()]
            if isinstance(model.optimizer, GroupOptimizer)
            else [int(model.optimizer.iterations)]
        )
    )
    fit(model, switch(), iterations)
    assert iterations.records == [[2], [4], [6, 2], [8, 4]]
    assert int(model.optimizer.iterations) == 8


@pytest.mark.eager
def test_another_optimizer_for_the_backbone():
    model, _ = build(keras.optimizers.Adam(0.01))
    callback = UnfreezeAtConvergence(
        optimizer=keras.optimizers.SGD(1e-4),
        head_learning_rate=5e-3,
        max_frozen_epochs=1,
        verbose=0,
    )
    fit(model, callback, epochs=2)
    kinds = [type(one) for one in model.optimizer.groups.values()]
    assert issubclass(kinds[0], keras.optimizers.Adam)
    assert issubclass(kinds[1], keras.optimizers.SGD)
    fit(model, callback, epochs=1)
    assert callback.stage == 1


@pytest.mark.slow
@pytest.mark.eager
def test_mixed_precision_keeps_the_loss_scale():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model, _ = build(keras.optimizers.Adam(0.01))
        counters = Recorder(lambda model: int(model.optimizer.step_counter))
        fit(model, switch(), counters)
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        assert isinstance(without_loss_scale(model.optimizer), GroupOptimizer)
        assert counters.records == [2, 4, 6, 8]
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.eager
def test_a_loaded_model_goes_on_with_its_groups(tmp_path):
    model, _ = build(keras.optimizers.Adam(0.01))
    fit(model, switch())
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    fit(model, epochs=1)
    callback = switch()
    history = fit(loaded, callback, FreezeGuard(verbose=0), epochs=1)
    assert callback.stage == 1
    assert history["stage"] == [1]
    assert [b for _, b in as_bytes(loaded.weights)] == [b for _, b in as_bytes(model.weights)]


@pytest.mark.eager
def test_a_plateau_callback_scales_both_groups():
    model, _ = build(keras.optimizers.Adam(0.01))
    plateau = keras.callbacks.ReduceLROnPlateau(min_delta=1e9, patience=1, factor=0.5)
    fit(model, switch(1e-3, 1e-2), plateau, epochs=4)
    rates = [float(one.learning_rate) for one in model.optimizer.groups.values()]
    np.testing.assert_allclose(rates[0] / rates[1], 10, rtol=1e-5)


@pytest.mark.eager
def test_a_failing_switch_keeps_the_optimizer(monkeypatch):
    model, wrapper = build(keras.optimizers.Adam(0.01))
    before = model.optimizer

    def fail(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(group_optimizer, "copy_optimizer_state", fail)
    with pytest.raises(RuntimeError, match="no"):
        fit(model, switch())
    assert model.optimizer is before
    assert not wrapper.trainable_weights
    fit(model, epochs=1)


@pytest.mark.eager
def test_groups_compiled_by_the_user_are_refused():
    groups = {"all": keras.optimizers.Adam(0.01)}
    model, _ = build(GroupOptimizer(groups))
    before = as_bytes(model.weights)
    with pytest.raises(ValueError, match="compiled with the GroupOptimizer"):
        fit(model, switch())
    assert as_bytes(model.weights) == before


@pytest.mark.eager
@pytest.mark.parametrize("rate", [0.0, -1.0, "1e-3", float("nan")])
def test_the_heads_rate_must_be_one(rate):
    with pytest.raises(ValueError, match="`head_learning_rate` must be a finite number"):
        UnfreezeAtConvergence(head_learning_rate=rate)
