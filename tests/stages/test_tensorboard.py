"""What TensorBoard shows of a run, read back from its event files."""

import keras
import pytest
import tensorflow as tf

from keras_tl import FrozenBackbone, UnfreezeAtConvergence
from tests import models
from tests.shared import regression_data

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

X, Y = regression_data()


def events_of(folder):
    events = accumulator.EventAccumulator(str(folder / "train"), {accumulator.TENSORS: 0})
    events.Reload()
    return events


def values(events, tag):
    return [float(tf.make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)]


@pytest.mark.eager
@pytest.mark.parametrize("update_freq", [pytest.param("epoch", marks=pytest.mark.slow), 1])
def test_shows_stages_rates_parameters_and_the_switch(tmp_path, update_freq):
    model = models.functional_outer(FrozenBackbone(models.functional(["dense", "batchnorm"])))
    model.compile(keras.optimizers.Adam(0.01), "mse")
    unfreezing = UnfreezeAtConvergence(
        1e-3,
        head_learning_rate=5e-3,
        max_frozen_epochs=2,
        restore_best_weights=False,
        verbose=0,
    )
    board = keras.callbacks.TensorBoard(tmp_path, write_graph=False, update_freq=update_freq)
    fit = {"validation_data": (X, Y), "callbacks": [unfreezing, board], "verbose": 0}
    model.fit(X, Y, epochs=3, **fit)

    events = events_of(tmp_path)
    assert values(events, "epoch_stage") == [0, 0, 1]
    assert values(events, "epoch_learning_rate_head") == pytest.approx([0.01, 0.01, 5e-3])
    assert values(events, "epoch_learning_rate_backbone") == pytest.approx([0, 0, 1e-3])
    assert values(events, "epoch_trainable_parameters") == [5, 5, 25]
    (switch,) = events.Tensors("switch")
    assert switch.step == 2
    assert b"UnfreezeAtConvergence unfreezes" in switch.tensor_proto.string_val[0]
    assert b"5 -> 25 trainable" in switch.tensor_proto.string_val[0]
