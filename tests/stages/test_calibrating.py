"""A head that is too sure is calibrated before learning rates are tried, where those are judged."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tl import FreezeGuard, FrozenBackbone, UnfreezeAtConvergence, fine_tune
from keras_tl.internals.values import on_host
from keras_tl.stages import calibrating, training_state
from tests import models
from tests.shared import values_of
from tests.test_calibration import noisy_classes

pytestmark = pytest.mark.eager
X, Y = noisy_classes(3, samples=60)
RUN = {"validation_data": (X, Y), "epochs": 3, "shuffle": False, "verbose": 0}


def build(sureness=8.0, optimizer=None, **dense):
    """A classifier whose backbone returns its inputs, and whose head is as right as it can be."""
    keras.utils.set_random_seed(0)
    base = keras.Sequential([keras.Input((models.FEATURES,)), keras.layers.Dense(models.FEATURES)])
    base.set_weights([np.eye(models.FEATURES), np.zeros(models.FEATURES)])
    model = keras.Sequential([FrozenBackbone(base), keras.layers.Dense(3, name="last", **dense)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # No weight moves before the switch.
    model.compile(optimizer or keras.optimizers.SGD(0.0), loss, metrics=["accuracy"])
    model.build((None, models.FEATURES))
    model.get_layer("last").kernel.assign(sureness * np.eye(models.FEATURES, 3))
    return model


class AtSwitch(keras.callbacks.Callback):
    """Keeps the last layer's kernel as the first fine-tuning epoch begins."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            self.kernel = on_host(self.model.get_layer("last").kernel)


def switched(model, learning_rate="auto", **arguments):
    """Returns the kernel after a switch, what `fit` logged, and the callback."""
    callback = UnfreezeAtConvergence(
        learning_rate, **{"max_frozen_epochs": 1, "verbose": 0} | arguments
    )
    at = AtSwitch()
    history = model.fit(X, Y, callbacks=[callback, at, FreezeGuard(verbose=0)], **RUN).history
    return at.kernel, history, callback


def test_an_over_confident_head_is_divided_by_its_temperature(capsys):
    model = build()
    before = model.predict(X, verbose=0)
    kernel, history, callback = switched(model, verbose=1)
    temperature = 8 / kernel[0, 0]
    assert 2 < temperature < calibrating._MOST
    np.testing.assert_allclose(kernel, 8 / temperature * np.eye(models.FEATURES, 3), rtol=1e-6)
    np.testing.assert_array_equal((X @ kernel).argmax(1), before.argmax(1))
    said = capsys.readouterr().out
    assert f'calibrates "last", which was too sure: logits divided by {temperature:.3g}' in said
    assert callback.transitions[0].value == pytest.approx(history["val_loss"][0])


def test_where_no_rate_helps_the_calibrated_head_remains():
    kernel, *_ = switched(build())
    model = build()
    accuracy = model.evaluate(X, Y, verbose=0)[1]
    callback = UnfreezeAtConvergence("auto", max_frozen_epochs=1, verbose=0)
    backbone = model.layers[0].backbone.layers[-1]

    class Hurts(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            # On JAX, to read the model gives it the values that `fit` has.
            if self.model is not None and callback.stage:
                backbone.kernel.assign(np.zeros(backbone.kernel.shape))

    history = model.fit(X, Y, callbacks=[callback, Hurts()], **RUN).history
    loss, now = model.evaluate(X, Y, verbose=0)
    np.testing.assert_array_equal(on_host(model.get_layer("last").kernel), kernel)
    assert loss < min(history["val_loss"])
    assert now == accuracy
    assert callback.best_epoch == 0


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"learning_rate": 1e-30}, "a rate is given"),
        ({"monitor": "val_accuracy"}, "accuracy judges"),
    ],
)
def test_is_for_rates_that_the_validation_loss_judges(arguments, why):
    model = build()
    kernel, *_ = switched(model, **arguments)
    np.testing.assert_array_equal(kernel, 8 * np.eye(models.FEATURES, 3), err_msg=why)


HEADS = {
    "is as sure as it is right": {"sureness": 3.0},
    "is best at no sureness at all": {"sureness": 200.0},
    "is averaged": {"optimizer": keras.optimizers.SGD(0.0, use_ema=True)},
    "has a constraint": {"kernel_constraint": keras.constraints.MaxNorm(100)},
    "is no classifier": {"activation": "tanh"},
}


@pytest.mark.parametrize("name", HEADS)
def test_other_heads_stay_bit_for_bit(name):
    model = build(**HEADS[name])
    before = on_host(model.get_layer("last").kernel)
    kernel, *_ = switched(model)
    np.testing.assert_array_equal(kernel, before)


def test_to_look_changes_nothing(monkeypatch):
    runs = []
    for looks in (True, False):
        if not looks:
            monkeypatch.setattr(training_state, "calibrate", lambda *_, **__: None)
        model = build(sureness=3.0)
        runs.append((switched(model, warmup_steps=0)[1], values_of(model)))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("record", [True, False])
def test_fine_tune_does_as_fit_does(record):
    model, other = build(), build()
    _, history, _ = switched(model, warmup_steps=0)
    settings = {"learning_rate": "auto", "max_frozen_epochs": 1, "warmup_steps": 0}
    found = fine_tune(other, X, Y, record=record, **settings, **RUN).history
    assert found["val_loss"] == pytest.approx(history["val_loss"])
    np.testing.assert_allclose(
        on_host(other.get_layer("last").kernel), on_host(model.get_layer("last").kernel), rtol=1e-5
    )
    assert abs(on_host(other.get_layer("last").kernel)).max() < 7


def test_a_run_that_is_resumed_after_it_ends_with_the_same_weights(tmp_path):
    whole = build()
    switched(whole)
    stops = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, _: epoch and 1 / 0)
    kept = {"backup_dir": tmp_path}
    callback = UnfreezeAtConvergence("auto", max_frozen_epochs=1, verbose=0, **kept)
    with pytest.raises(ZeroDivisionError):
        build().fit(X, Y, callbacks=[callback, stops], **RUN)
    resumed = build()
    callback = UnfreezeAtConvergence("auto", max_frozen_epochs=1, verbose=0, **kept)
    resumed.fit(X, Y, callbacks=callback, **RUN)
    assert values_of(resumed) == values_of(whole)


def test_what_fails_in_it_is_warned_of_and_the_run_goes_on(monkeypatch):
    def fails(*_, **__):
        last = model.get_layer("last")
        last.kernel.assign(last.kernel / 2)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(calibrating, "scaled", fails)
    model = build()
    with pytest.warns(UserWarning, match="did not calibrate the head: RuntimeError: out of memory"):
        kernel, history, _ = switched(model)
    np.testing.assert_array_equal(kernel, 8 * np.eye(models.FEATURES, 3))
    assert history["stage"] == [0, 1, 1]


def test_a_layer_that_is_called_several_times_may_be_the_last():
    model = build()
    inputs = keras.Input((models.FEATURES,))
    model(inputs)
    last = model.get_layer("last")
    last(keras.Input((models.FEATURES,)))
    outer = keras.Model(inputs, last(model.layers[0](inputs)))
    outer.compile(keras.optimizers.SGD(0.0), model.loss)
    kernel, *_ = switched(outer)
    assert 0 < kernel[0, 0] < 4


def test_of_predictions_for_each_word_nothing_is_scaled():
    inputs = keras.Input((5, models.FEATURES))
    base = keras.layers.Dense(models.FEATURES)
    model = keras.Model(inputs, keras.layers.Dense(3, name="last")(FrozenBackbone(base)(inputs)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.0), loss)
    assert calibrating._layer_to_scale(model, model.trainable_weights) is None


def ordered(right_first):
    """Validation data that begins with the samples that the head gets right, or wrong."""
    order = np.argsort((X.argmax(1) != Y) == right_first, kind="stable")
    return X[order], Y[order]


def endless(x, y):
    """A data set without an end that does not say so."""
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(20).repeat().filter(lambda *_: True)


DATA = {
    "arrays": lambda x, y: (x, y),
    "a data set": lambda x, y: tf.data.Dataset.from_tensor_slices((x, y)).batch(20),
    "one without an end": endless,
}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("right_first", [True, False])
def test_the_loss_is_of_the_steps_that_fit_validates_on(data, right_first, capsys):
    model = build()
    held_out = DATA[data](*ordered(right_first))
    callback = UnfreezeAtConvergence("auto", max_frozen_epochs=1, interpolate=0.5)
    run = {"validation_steps": 1, "validation_batch_size": 20, "epochs": 3, "verbose": 0}
    history = model.fit(X, Y, validation_data=held_out, callbacks=callback, **run).history
    x, y = (part[:20] for part in ordered(right_first))
    said = capsys.readouterr().out
    loss = model.evaluate(x, y, verbose=0)[0]
    assert said.splitlines()[-1].endswith(f" -> {loss:.4g}.")
    assert ("calibrates" in said) != right_first
    if not right_first:
        assert f"val_loss {history['val_loss'][0]:.4g} ->" in said
        assert loss < history["val_loss"][0] / 2


class Sizes(keras.layers.Layer):
    """Notes how many samples are in the batches that are computed."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def call(self, x):
        self.seen(x.shape[0])
        return x


@pytest.mark.parametrize("run", [{"batch_size": 6}, {"batch_size": 6, "validation_batch_size": 4}])
@pytest.mark.parametrize("trains", [keras.Model.fit, fine_tune])
def test_batches_are_as_large_as_those_of_fit(run, trains):
    if trains is fine_tune and len(run) > 1:
        pytest.skip("`fine_tune` has one size for all batches")
    model, seen = build(), []
    sizes = Sizes(seen.append)
    model = keras.Sequential([keras.Input((models.FEATURES,)), sizes, *model.layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.0), loss, run_eagerly=True)
    seen.clear()
    unfreezing = {"max_frozen_epochs": 1, "interpolate": 0.5}
    settings = {**RUN, **run}
    if trains is fine_tune:
        fine_tune(model, X, Y, record=False, **unfreezing, **settings)
    else:
        callback = UnfreezeAtConvergence(verbose=0, **unfreezing)
        model.fit(X, Y, callbacks=callback, **settings)
    assert abs(on_host(model.get_layer("last").kernel)).max() < 8
    assert set(seen) <= {None, *run.values()}


def test_is_noted_of_the_epoch_whose_weights_are_calibrated():
    """With a `min_delta`, the stage's best epoch, which is restored, is not the best of all."""
    model = build(optimizer=keras.optimizers.SGD(1e-2))
    callback = UnfreezeAtConvergence("auto", max_frozen_epochs=3, min_delta=50.0, verbose=0)
    at = AtSwitch()
    run = {**RUN, "epochs": 4}
    found = []

    class AfterSwitch(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            best = callback._running.state.progress.best
            if epoch == 3:
                found.append((best.epoch, best.value, callback._running.state.calibration))

    history = model.fit(X, Y, callbacks=[callback, at, AfterSwitch()], **run).history
    assert history["val_loss"][2] < history["val_loss"][0]
    ((epoch, value, done),) = found
    assert done.before == pytest.approx(history["val_loss"][0], rel=1e-5)
    assert (epoch, value) == (0, done.after)


def test_nothing_is_calibrated_where_validation_measures_another_loss():
    model = build()

    class Other(keras.utils.PyDataset):
        """Each time it is read, it has other labels."""

        reads = 0

        def __len__(self):
            return 1

        def __getitem__(self, index):
            Other.reads += 1
            return X, np.roll(Y, Other.reads)

    run = {**RUN, "validation_data": Other()}
    callback = UnfreezeAtConvergence("auto", max_frozen_epochs=1, verbose=0)
    at = AtSwitch()
    model.fit(X, Y, callbacks=[callback, at], **run)
    np.testing.assert_array_equal(at.kernel, 8 * np.eye(models.FEATURES, 3))


def test_what_fails_while_interpolating_is_warned_of(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("out of memory")

    model = build()
    callback = UnfreezeAtConvergence("auto", max_frozen_epochs=1, interpolate=0.5, verbose=0)
    ends = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, _: monkeypatch.setattr(model, "evaluate", fails) if epoch else 0
    )
    with pytest.warns(UserWarning, match="could not measure .* RuntimeError: out of memory"):
        history = model.fit(X, Y, callbacks=[callback, ends], **{**RUN, "epochs": 2}).history
    assert len(history["loss"]) == 2


class Doubles(keras.Model):
    """Prepares data in its own `fit`, as a task of KerasHub does."""

    def preprocess_samples(self, x, y=None, sample_weight=None):
        return keras.utils.pack_x_y_sample_weight(2 * x, y, sample_weight)

    def _prepared(self, x, y):
        return tf.data.Dataset.from_tensor_slices((x, y)).batch(20).map(self.preprocess_samples)

    def fit(self, x=None, y=None, validation_data=None, batch_size=None, **settings):
        held_out = None if validation_data is None else self._prepared(*validation_data)
        return super().fit(self._prepared(x, y), validation_data=held_out, **settings)

    def evaluate(self, x=None, y=None, batch_size=None, sample_weight=None, **settings):
        if settings.get("_use_cached_eval_dataset"):
            return super().evaluate(x, y, **settings)
        return super().evaluate(self._prepared(x, y), **settings)

    def predict_on_batch(self, x):
        return super().predict_on_batch(self.preprocess_samples(x))


@pytest.mark.parametrize("trains", [keras.Model.fit, fine_tune])
def test_data_that_the_model_prepares_is_prepared_once(trains, capsys):
    plain = build()
    model = Doubles(plain.inputs, plain.outputs)
    model.compile(keras.optimizers.SGD(0.0), plain.loss)
    before = model.evaluate(X, Y, verbose=0)
    unfreezing = {"learning_rate": "auto", "max_frozen_epochs": 1, "interpolate": 0.5}
    if trains is fine_tune:
        fine_tune(model, X, Y, **unfreezing, **RUN | {"verbose": 1})
    else:
        callback = UnfreezeAtConvergence(**unfreezing)
        model.fit(X, Y, callbacks=[callback], **RUN)
    said = capsys.readouterr().out
    assert 'calibrates "last", which was too sure: logits divided by' in said
    assert f"val_loss {before:.4g} -> " in said
    assert f" -> {model.evaluate(X, Y, verbose=0):.4g}." in said
