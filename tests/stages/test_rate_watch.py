"""A callback that undoes the learning rates of a switch is noticed by what it does, and named."""

import warnings

import keras
import numpy as np
import pytest

from keras_tl import FrozenBackbone, GroupOptimizer, UnfreezeAtConvergence
from tests import models
from tests.shared import SEVERAL_STEPS, regression_data

X, Y = regression_data(8)
schedules = keras.optimizers.schedules


class Cyclical(keras.callbacks.Callback):
    """Sets a rate of its own in a hook."""

    def __init__(self, hook="on_train_batch_begin", rate=lambda batch: 5e-3):
        super().__init__()

        def set_rate(index, logs=None):
            self.model.optimizer.learning_rate = rate(index)

        setattr(self, hook, set_rate)


class Logger(keras.callbacks.Callback):
    """Reads the rate at each step."""

    def on_train_batch_end(self, batch, logs=None):
        self.rate = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))


def build(optimizer=None, **compile_arguments):
    keras.utils.set_random_seed(0)
    model = models.functional_outer(FrozenBackbone(models.functional(["dense"])))
    optimizer = optimizer or keras.optimizers.SGD(0.01)
    model.compile(optimizer, "mse", **{"run_eagerly": True} | compile_arguments)
    return model


def ours(learning_rate=1e-5, **arguments):
    settings = {"monitor": "loss", "max_frozen_epochs": 1, "verbose": 0}
    return UnfreezeAtConvergence(learning_rate, **settings | arguments)


def fit(model, *callbacks, epochs=3):
    """Returns the warnings about learning rates, and the History."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = model.fit(X, Y, 1, epochs=epochs, callbacks=list(callbacks), verbose=0).history
    said = [str(one.message) for one in caught]
    return [one for one in said if "UnfreezeAtConvergence had set" in one], history


@pytest.mark.parametrize(
    ("hook", "order"),
    [
        pytest.param("on_train_batch_begin", "before", marks=pytest.mark.slow),
        ("on_train_batch_begin", "after"),
        ("on_batch_begin", "before"),
        pytest.param("on_train_batch_end", "after", marks=pytest.mark.slow),
        ("on_epoch_begin", "before"),
        pytest.param("on_epoch_begin", "after", marks=pytest.mark.slow),
    ],
)
def test_a_callback_that_sets_a_higher_rate_is_named_once(hook, order):
    other = Cyclical(hook)
    callbacks = [other, ours()] if order == "before" else [ours(), other]
    said, _ = fit(build(), Logger(), *callbacks, Logger())
    assert len(said) == 1
    # One before ours, at an epoch's begin, comes before the switch there.
    epoch = 3 if (hook, order) == ("on_epoch_begin", "before") else 2
    assert f"Cyclical has set the learning rate to 0.005 in epoch {epoch}, which" in said[0]
    assert "set to 1e-05" in said[0]


def test_at_an_epochs_end_it_is_noticed_before_the_next_steps():
    said, _ = fit(build(), ours(), Cyclical("on_epoch_end"))
    assert len(said) == 1
    assert said[0].startswith("Cyclical has set the learning rate to 0.005 in epoch 2")


def test_a_rate_that_is_low_at_each_epochs_end_is_noticed_in_its_steps():
    cycle = Cyclical(rate=lambda batch: 1e-2 if 2 <= batch < 6 else 1e-6)
    said, history = fit(build(), ours(), cycle)
    np.testing.assert_allclose(history["learning_rate"], 1e-6, rtol=1e-5)
    assert len(said) == 1
    assert said[0].startswith("Cyclical has set the learning rate to 0.01 in epoch 2")


def test_where_it_is_not_seen_who_did_it_all_that_could_are_named():
    class Once(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 4:
                self.model.optimizer.learning_rate = 1e-2

    said, _ = fit(build(), Logger(), Once(), ours())
    assert len(said) == 1
    assert said[0].startswith("One of Logger, Once has set the learning rate to 0.01 in epoch 2")


def test_what_no_callback_did_is_noticed_at_the_epochs_end():
    class OwnStep(keras.Model):
        def test_step(self, *arguments):
            self.optimizer.learning_rate = 0.1
            return super().test_step(*arguments)

    wrapper = FrozenBackbone(models.functional(["dense"]))
    inputs = keras.Input((4,))
    model = OwnStep(inputs, keras.layers.Dense(1)(wrapper(inputs)))
    model.compile("sgd", "mse", run_eagerly=True)
    with pytest.warns(UserWarning, match="Something that is no callback has set the learning rate"):
        model.fit(X, Y, epochs=3, validation_data=(X, Y), callbacks=[ours()], verbose=0)


@pytest.mark.parametrize(
    "fine",
    [
        lambda: Cyclical(rate=lambda batch: 1e-5 if batch % 2 else 1e-6),
        lambda: keras.callbacks.ReduceLROnPlateau("loss", patience=1, factor=0.5, min_delta=9.0),
        lambda: keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.5 * rate),
        Logger,
    ],
)
def test_what_lowers_or_keeps_it_is_fine(fine):
    assert fit(build(), fine(), ours(warmup_steps=5))[0] == []


def test_a_schedule_that_rises_is_no_callbacks_doing():
    rising = schedules.CosineDecay(1e-6, 10, warmup_target=1e-3, warmup_steps=20)
    said, history = fit(build(), Logger(), ours(rising, head_learning_rate=rising))
    assert history["learning_rate"][-1] > 5e-4
    assert said == []


def test_the_group_is_named():
    class OfTheHead(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if isinstance(self.model.optimizer, GroupOptimizer):
                self.model.optimizer.groups["head"].learning_rate = 0.5

    said, _ = fit(build(), OfTheHead(), ours(head_learning_rate=1e-3))
    assert len(said) == 1
    assert 'OfTheHead has set the learning rate of the group "head" to 0.5' in said[0]
    assert "set to 0.001" in said[0]


def test_in_a_resumed_run(tmp_path):
    class Killed(RuntimeError):
        pass

    def kill(epoch, logs):
        if epoch == 2:
            raise Killed

    with pytest.raises(Killed):
        kills = keras.callbacks.LambdaCallback(on_epoch_begin=kill)
        fit(build(), ours(backup_dir=tmp_path), kills)
    said, history = fit(build(), ours(backup_dir=tmp_path), Cyclical())
    assert history["stage"] == [1]
    assert len(said) == 1


@pytest.mark.parametrize(
    "compile_arguments",
    [{}, pytest.param({"steps_per_execution": 2}, marks=SEVERAL_STEPS)],
    ids=str,
)
def test_in_compiled_steps(compile_arguments):
    model = build(keras.optimizers.Adam(0.01), run_eagerly=False, **compile_arguments)
    said, _ = fit(model, Logger(), Cyclical(), ours())
    assert len(said) == 1
    assert said[0].startswith("Cyclical has set")
