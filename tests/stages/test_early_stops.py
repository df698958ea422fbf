"""Only a stop by EarlyStopping itself counts as convergence; any other ends training."""

import keras
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_tl import FrozenBackbone, UnfreezeAtConvergence
from tests import models
from tests.shared import Scripted, examples, regression_data

X, Y = regression_data(8)


class StopAt(keras.callbacks.Callback):
    """Stops training in a hook of an epoch, as those for time limits or broken runs do."""

    def __init__(self, epoch, hook="on_epoch_end"):
        super().__init__()
        self.epoch = 0

        def stop(*_, **__):
            if self.epoch == epoch:
                self.model.stop_training = True

        setattr(self, hook, stop)

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch


class OwnEarlyStopping(keras.callbacks.EarlyStopping):
    """Of a subclass that says something."""

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        self.said = self.model.stop_training


@pytest.fixture(scope="module")
def model():
    # Never trained by itself: the monitored values are scripted.
    wrapper = FrozenBackbone(models.functional(["dense"]))
    model = models.functional_outer(wrapper)
    model.compile("sgd", "mse", run_eagerly=True)
    return model


def fit(model, callbacks, values=(5, 4, 4, 3, 3, 3)):
    keras.utils.set_random_seed(0)
    model.layers[1].freeze()
    model.compile("sgd", "mse", run_eagerly=True)
    callbacks = [Scripted("score", values), *callbacks]
    return model.fit(X, Y, epochs=len(values), callbacks=callbacks, verbose=0).history


def early_stopping(patience=1, kind=keras.callbacks.EarlyStopping, **arguments):
    return kind("score", mode="min", patience=patience, **arguments)


def ours(**arguments):
    settings = {"monitor": "score", "mode": "min", "patience": 9, "verbose": 0}
    return UnfreezeAtConvergence(1e-3, **settings | arguments)


@pytest.mark.filterwarnings("ignore:UnfreezeAtConvergence. training ended with the backbone")
@pytest.mark.parametrize(
    "hook", ["on_epoch_end", pytest.param("on_train_batch_end", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("order", ["before", "after", "last"])
@pytest.mark.parametrize("epoch", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_another_callbacks_stop_ends_training(model, hook, order, epoch):
    other, stopping, own = StopAt(epoch, hook), early_stopping(), ours()
    lists = {
        "before": [other, stopping, own],
        "after": [stopping, other, own],
        "last": [stopping, own, other],
    }
    # In epoch 2 EarlyStopping stops as well.
    assert fit(model, lists[order])["stage"] == [0] * (epoch + 1)
    assert model.stop_training is True


@pytest.mark.parametrize("kind", [keras.callbacks.EarlyStopping, OwnEarlyStopping])
def test_early_stopping_counts_as_convergence(model, kind):
    own = ours()
    history = fit(model, [early_stopping(kind=kind), early_stopping(kind=kind), own])
    assert history["stage"] == [0, 0, 0, 1, 1]
    assert own.transitions[0].reason == "early_stopping"
    assert model.stop_training is True


def test_one_of_several_counts(model):
    own = ours()
    both = [early_stopping(8), early_stopping(), own]
    assert fit(model, both)["stage"] == [0, 0, 0, 1, 1]


def test_the_same_callbacks_serve_again_and_nothing_is_left_on_them(model):
    stopping, own = early_stopping(), ours()
    for _ in range(2):
        assert fit(model, [stopping, own])["stage"] == [0, 0, 0, 1, 1]
    assert not [name for name in vars(stopping) if name.startswith("on_")]


def test_nothing_is_left_in_a_list_of_the_users(model):
    callbacks = [Scripted("score", [5, 4, 4, 3, 3]), early_stopping(), ours()]
    listed = keras.callbacks.CallbackList(
        list(callbacks), add_history=True, model=model, epochs=5, verbose=0, steps=1
    )
    for _ in range(2):
        model.layers[1].freeze()
        model.compile("sgd", "mse", run_eagerly=True)
        history = model.fit(X, Y, epochs=5, callbacks=listed, verbose=0).history
        assert history["stage"][-5:] == [0, 0, 0, 1, 1]
        assert listed.callbacks[:3] == callbacks
        assert len(listed.callbacks) == 4


@pytest.mark.filterwarnings("ignore:UnfreezeAtConvergence. training ended with the backbone")
@given(data=st.data())
@settings(max_examples=examples(10))
def test_training_goes_on_exactly_if_all_stops_are_early_ones(model, data):
    """For any callbacks in any order: the first stop of another callback is the last epoch."""
    values = data.draw(st.lists(st.integers(0, 3), min_size=5, max_size=5))
    patience = data.draw(st.integers(1, 3))
    at = data.draw(st.none() | st.integers(0, 4))
    callbacks = [early_stopping(patience), early_stopping(data.draw(st.integers(1, 9)))]
    if at is not None:
        callbacks.append(StopAt(at, data.draw(st.sampled_from(["on_epoch_end", "on_batch_end"]))))
    callbacks = data.draw(st.permutations(callbacks))
    alone = ours()
    history = fit(model, [*callbacks, alone], values)

    early = [one.epoch - 1 for one in alone.transitions]
    if at is not None and at < len(history["stage"]):
        assert len(history["stage"]) == at + 1
    elif not early:
        assert len(history["stage"]) == len(values)
    assert early == [] or at is None or early[0] < at
