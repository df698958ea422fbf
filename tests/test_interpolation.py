"""Weights between two sets of weights, by themselves and at the end of a run."""

import keras
import numpy as np
import pytest

from keras_tl import FrozenBackbone, Stage, UnfreezeAtConvergence, fine_tune, interpolate_weights
from tests import models
from tests.shared import Recorder, Scripted, forget_compiled, regression_data, values_of

X, Y = regression_data()


def build(*head, plain=False):
    forget_compiled()
    keras.utils.set_random_seed(0)
    backbone = models.functional(["dense", "batchnorm", "dense"])
    model = models.functional_outer(backbone if plain else FrozenBackbone(backbone), list(head))
    model.compile(keras.optimizers.SGD(0.05), "mse")
    return model


def ending(scores, **arguments):
    settings = {"monitor": "score", "mode": "min", "patience": 1, "verbose": 0}
    callback = UnfreezeAtConvergence(**{"learning_rate": 0.05} | settings | arguments)
    return callback, Scripted("score", scores)


def fit(model, scores, *others, **arguments):
    callback, script = ending(scores, **arguments)
    epochs = len(scores)
    callbacks = [script, callback, *others]
    model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, callbacks=callbacks, verbose=0)
    return callback


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def arrays(model):
    return [np.array(keras.ops.convert_to_numpy(one)) for one in model.weights]


def check_halfway(model, one, other):
    for value, first, last in zip(arrays(model), one, other, strict=True):
        np.testing.assert_allclose(value, (first + last) / 2, rtol=1e-5, atol=1e-7)


# The function.


def test_weights_are_on_the_line():
    model = build()
    start = model.get_weights()
    end = [value + 2 * np.abs(value) if value.ndim > 1 else value for value in start]
    for fraction in (0.0, 0.25, 1.0):
        interpolate_weights(model, start, end, fraction)
        for value, first, last in zip(model.get_weights(), start, end, strict=True):
            np.testing.assert_allclose(value, first + fraction * (last - first), rtol=1e-6)
    assert same(model.get_weights(), end)
    interpolate_weights(model, start, end, 0.0)
    assert same(model.get_weights(), start)


def test_what_is_equal_stays_bit_for_bit():
    model = build()
    weights = model.get_weights()
    interpolate_weights(model, weights, weights, 1 / 3)
    assert same(model.get_weights(), weights)


def test_models_stand_for_their_weights():
    first, second, result = (build() for _ in range(3))
    second.layers[-1].bias.assign([4.0])
    interpolate_weights(result, first, second, 0.5)
    assert arrays(result)[-1].tolist() == [2.0]


def test_integers_are_those_of_the_end():
    class Counting(keras.layers.Layer):
        def build(self, input_shape):
            self.count = self.add_weight(
                shape=(2,), dtype="int32", initializer="zeros", trainable=False
            )
            self.scale = self.add_weight(shape=(2,), initializer="ones")

        def call(self, x):
            return x * self.scale[0]

    model = keras.Sequential([keras.Input((2,)), Counting()])
    interpolate_weights(model, [np.zeros(2), np.zeros(2, "int32")], [np.ones(2), np.full(2, 5)])
    values = {value.dtype.kind: value.tolist() for value in model.get_weights()}
    assert values == {"i": [5, 5], "f": [0.5, 0.5]}


def test_half_precision_is_kept():
    dense = keras.layers.Dense(1, dtype="bfloat16")
    model = keras.Sequential([keras.Input((2,)), dense])
    start = [keras.ops.convert_to_numpy(keras.ops.cast(one, "float32")) for one in model.weights]
    interpolate_weights(model, start, [value + 1 for value in start])
    bias = keras.ops.convert_to_numpy(keras.ops.cast(dense.bias, "float32"))
    assert bias.tolist() == [0.5]


def test_statistics_that_differ_are_refused_and_nothing_changes():
    model = build(keras.layers.BatchNormalization())
    start, before = model.get_weights(), model.get_weights()
    (norm,) = [one for one in model.layers if isinstance(one, keras.layers.BatchNormalization)]
    norm.moving_mean.assign(norm.moving_mean + 1.0)
    with pytest.raises(ValueError, match="moving statistics in .*moving_mean"):
        interpolate_weights(model, start, model)
    norm.moving_mean.assign(norm.moving_mean - 1.0)
    assert same(model.get_weights(), before)


@pytest.mark.parametrize("fraction", [-0.1, 1.5, True, "half", float("nan")])
def test_a_fraction_out_of_range_is_an_error(fraction):
    model = build()
    with pytest.raises(ValueError, match="`fraction` must be a number from 0"):
        interpolate_weights(model, model, model, fraction)


def test_weights_of_another_model_are_an_error():
    model = build()
    with pytest.raises(ValueError, match="`start` must have the weights of the model.*arrays for"):
        interpolate_weights(model, model.get_weights()[:-1], model)
    other = [np.zeros((*value.shape, 2)) for value in model.get_weights()]
    with pytest.raises(ValueError, match=r"`end` must have .*an array of shape"):
        interpolate_weights(model, model, other)


# The end of a run.


@pytest.mark.covers("part: interpolate")
@pytest.mark.eager
@pytest.mark.parametrize("plain", [False, True])
def test_a_run_ends_between_the_heads_best_and_the_best(plain):
    model, ends = build(plain=plain), Recorder(arrays)
    arguments = {"backbone": model.layers[1]} if plain else {}
    callback = fit(model, [5, 6, 4, 3, 4], ends, interpolate=0.5, **arguments)
    assert callback.best_epoch == 3
    assert not same(ends.records[0], ends.records[3])
    check_halfway(model, ends.records[0], ends.records[3])


@pytest.mark.eager
def test_layers_that_join_later_start_from_what_they_were():
    model, ends = build(), Recorder(arrays)
    stages = [Stage(1, 0.05, patience=1), Stage("all", 0.05, patience=1)]
    scores = [5, 6, 4, 4, 3, 2]
    callback = fit(model, scores, ends, learning_rate=None, stages=stages, interpolate=0.5)
    assert callback.best_epoch == 5
    check_halfway(model, ends.records[0], ends.records[5])


@pytest.mark.eager
def test_layers_that_are_frozen_again_are_between_too():
    model, ends = build(), Recorder(arrays)
    stages = [Stage("all", 0.05, patience=1), Stage(1, 0.05, patience=1)]
    callback = fit(model, [5, 6, 4, 4, 3], ends, learning_rate=None, stages=stages, interpolate=0.5)
    assert callback.best_epoch == 4
    check_halfway(model, ends.records[0], ends.records[4])


@pytest.mark.eager
def test_the_heads_best_stays_where_fine_tuning_only_hurt():
    model, ends = build(), Recorder(arrays)
    fit(model, [5, 6, 7, 7], ends, interpolate=0.5)
    assert same(arrays(model), ends.records[0])


def test_a_run_that_is_resumed_ends_between_the_same(tmp_path):
    whole = build()
    scores = [5, 6, 4, 3, 4]
    fit(whole, scores, interpolate=0.5)

    def interrupt(epoch, _):
        if epoch == 3:
            raise KeyboardInterrupt

    stops = keras.callbacks.LambdaCallback(on_epoch_begin=interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(build(), scores, stops, interpolate=0.5, backup_dir=tmp_path)
    resumed = build()
    fit(resumed, scores, interpolate=0.5, backup_dir=tmp_path)
    assert same(values_of(whole), values_of(resumed))


@pytest.mark.eager
def test_says_what_it_does_to_the_monitored_value(capsys):
    callback = UnfreezeAtConvergence(0.05, max_frozen_epochs=1, interpolate=0.5)
    model = build()
    fitted = model.fit(X, Y, validation_data=(X, Y), epochs=3, callbacks=[callback], verbose=0)
    (line,) = [one for one in capsys.readouterr().out.splitlines() if "interpolated" in one]
    before, after = line.rsplit("val_loss ", 1)[1].rstrip(".").split(" -> ")
    assert float(before) == pytest.approx(min(fitted.history["val_loss"]), rel=1e-3)
    assert float(after) == pytest.approx(model.evaluate(X, Y, verbose=0), rel=1e-3)


@pytest.mark.eager
def test_says_in_fine_tune_too(capsys):
    arguments = {"epochs": 3, "max_frozen_epochs": 1, "interpolate": 0.5, "learning_rate": 0.05}
    fine_tune(build(), X, Y, validation_data=(X, Y), verbose=2, **arguments)
    assert "0.5 of the way from the head's best weights to these: val_loss" in (
        capsys.readouterr().out
    )


@pytest.mark.eager
def test_a_head_whose_statistics_move_is_an_error_before_the_first_step():
    model = build(keras.layers.BatchNormalization())
    before = values_of(model)
    with pytest.raises(ValueError, match="These layers move theirs: batch_normalization"):
        fit(model, [5, 6], interpolate=0.5)
    assert same(before, values_of(model))


@pytest.mark.eager
def test_statistics_of_ones_own_layer_that_move_keep_the_best_weights():
    class Average(keras.layers.Layer):
        def build(self, input_shape):
            self.mean = self.add_weight(shape=(4,), initializer="zeros", trainable=False)

        def call(self, x, training=False):
            if training:
                self.mean.assign(0.9 * self.mean + 0.1 * keras.ops.mean(x, axis=0))
            return x

    model, ends = build(Average()), Recorder(arrays)
    with pytest.warns(UserWarning, match="did not interpolate: the statistics in .* have moved"):
        fit(model, [5, 6, 4, 3], ends, interpolate=0.5)
    assert same(arrays(model), ends.records[3])


@pytest.mark.eager
def test_a_run_without_a_switch_has_nothing_between():
    with pytest.warns(UserWarning) as warned:
        fit(build(), [5, 4], interpolate=0.5)
    assert any("no weights that fine-tuning started from" in str(one.message) for one in warned)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interpolate": 2}, "`interpolate` must be a number from 0"),
        ({"interpolate": 0.5, "restore_best_weights": False}, "needs `restore_best_weights`"),
    ],
)
def test_what_cannot_be_between_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        UnfreezeAtConvergence(**arguments)
