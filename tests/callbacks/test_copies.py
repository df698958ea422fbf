"""Copies of an UnfreezeAtConvergence, as KerasTuner and scikit-learn make them."""

import copy
import pickle

import keras
import pytest

from keras_tl import (
    FrozenBackbone,
    Stage,
    UnfreezeAtConvergence,
    layerwise_learning_rates,
)
from tests import models
from tests.shared import regression_data

pytestmark = pytest.mark.eager

X, Y = regression_data()


def build(wrap=True):
    base = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)], name="base")
    model = keras.Sequential(
        [keras.Input((4,)), FrozenBackbone(base) if wrap else base, keras.layers.Dense(1)]
    )
    model.compile("adam", "mse")
    return model, base


def fit(model, callback):
    return model.fit(X, Y, epochs=2, verbose=0, callbacks=[callback]).history["stage"]


def switch(**arguments):
    return UnfreezeAtConvergence(
        **{"monitor": "loss", "max_frozen_epochs": 1, "verbose": 0} | arguments
    )


def by_pickle(callback):
    return pickle.loads(pickle.dumps(callback))


COPIES = pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, copy.copy])


class Own(UnfreezeAtConvergence):
    """A subclass with state of its own."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        self.seen.append(epoch)


@COPIES
def test_a_copy_of_a_used_callback_is_a_new_one_with_its_settings(copied, tmp_path):
    model, _ = build()
    callback = Own(
        monitor="loss", max_frozen_epochs=1, warmup_steps=2, backup_dir=tmp_path, verbose=0
    )
    fit(model, callback)
    callback.patience = 7

    new = copied(callback)

    assert vars(new).keys() == vars(Own()).keys()
    assert (new.patience, new.warmup_steps, new.backup_dir) == (7, 2, str(tmp_path))
    assert (new.stage, new.transitions, new.best_epoch, new.decided) == (0, [], None, False)
    assert new.seen == [0, 1]
    assert new.model is None
    assert callback.stage == 1
    assert fit(build()[0], new) == [0, 1]


@COPIES
def test_a_copy_finds_the_layer_that_it_was_given(copied):
    model, base = build(wrap=False)
    assert fit(model, copied(switch(backbone=base))) == [0, 1]
    assert base.trainable


def test_a_deep_copy_is_of_the_copied_layers_if_they_are_copied_with_it():
    _, base = build(wrap=False)
    new_base, new = copy.deepcopy([base, switch(backbone=[base])])
    assert new.backbone == [new_base]
    assert new_base is not base


def test_a_pickled_callback_finds_its_layers_in_a_model_that_is_made_again():
    _, base = build(wrap=False)
    model, same = build(wrap=False)
    assert fit(model, by_pickle(switch(backbone=[base]))) == [0, 1]
    assert same.trainable


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle])
def test_rates_by_layer_survive_a_copy(copied):
    model, base = build()
    stages = [Stage("all", layerwise_learning_rates(base, 1e-3, decay=0.5))]
    assert fit(model, copied(switch(stages=stages))) == [0, 1]


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle])
def test_an_optimizer_survives_a_copy(copied):
    model, _ = build()
    callback = switch(optimizer=keras.optimizers.SGD(0.25))
    fit(model, callback)
    other, _ = build()
    assert fit(other, copied(callback)) == [0, 1]
    assert float(other.optimizer.learning_rate) == 0.25


# Hooks of a subclass.


@pytest.mark.parametrize("calls_super", [False, True])
@pytest.mark.parametrize("hook", ["on_train_batch_begin", "on_batch_begin"])
def test_a_subclass_and_the_warm_up_both_see_each_step(hook, calls_super):
    seen = []

    def own_hook(self, batch, logs=None):
        if calls_super:
            getattr(UnfreezeAtConvergence, hook)(self, batch, logs)
        seen.append(float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)))

    own = type("Own", (UnfreezeAtConvergence,), {hook: own_hook})
    model = models.functional_outer(FrozenBackbone(models.functional(["dense"])))
    model.compile(keras.optimizers.SGD(0.5), "mse")
    callback = own(0.25, monitor="loss", max_frozen_epochs=1, warmup_steps=2, verbose=0)
    model.fit(X, Y, batch_size=4, epochs=2, verbose=0, shuffle=False, callbacks=[callback])
    assert seen == [0.5, 0.5, 0.5, 0.5, 0.0, 0.125, 0.25, 0.25]


def test_without_a_warm_up_jax_need_not_wait_for_each_step():
    callback = switch()
    asynchronous = keras.callbacks.CallbackList([callback, switch(warmup_steps=2)])._async_train
    assert asynchronous == (keras.backend.backend() != "tensorflow")
    assert "on_train_batch_begin" not in vars(callback)
