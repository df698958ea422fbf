"""The parts without `fit`: a training loop of one's own gets the weights that `fit` gets."""

import keras
import pytest
import tensorflow as tf

from keras_tl import (
    ConvergenceMonitor,
    FrozenBackbone,
    UnfreezeAtConvergence,
    renew_optimizer,
)
from tests import models
from tests.shared import Recorder, only_on, regression_data, values_of

pytestmark = pytest.mark.covers("part: your own training loop")

X, Y = regression_data(24, seed=1)
VALIDATION = regression_data(16, seed=2)
EPOCHS, BATCH, PATIENCE, RATE = 8, 8, 1, 1e-3


def build():
    keras.utils.set_random_seed(3)
    wrapper = FrozenBackbone(models.functional(["dense", "batchnorm", "dense"]))
    return models.functional_outer(wrapper, [keras.layers.Dropout(0.5)]), wrapper


def mean_squared_error(model, x, y, training):
    return keras.ops.mean((model(x, training=training) - y) ** 2)


def train_step(model, optimizer, x, y):
    with tf.GradientTape() as tape:
        loss = mean_squared_error(model, x, y, training=True)
    gradients = tape.gradient(loss, model.trainable_variables)
    optimizer.apply(gradients, model.trainable_variables)


def loop(model, wrapper):
    """Trains as the callback does. Returns the weights at each epoch's end, and the switch."""
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    monitor = ConvergenceMonitor(patience=PATIENCE)
    step = tf.function(train_step)
    records, switched = [], None
    for epoch in range(EPOCHS):
        for start in range(0, len(X), BATCH):
            batch = slice(start, start + BATCH)
            step(model, optimizer, tf.constant(X[batch]), tf.constant(Y[batch]))
        records.append(values_of(model))
        value = float(mean_squared_error(model, *VALIDATION, training=False))
        if switched is None and monitor.update(epoch, value):
            switched = epoch + 1
            wrapper.unfreeze()
            optimizer = renew_optimizer(optimizer, RATE, variables=model.trainable_variables)
            step = tf.function(train_step)
    return records, switched


def fit(model):
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
    recorder = Recorder(values_of)
    callback = UnfreezeAtConvergence(RATE, patience=PATIENCE, restore_best_weights=False, verbose=0)
    model.fit(
        X,
        Y,
        batch_size=BATCH,
        epochs=EPOCHS,
        shuffle=False,
        validation_data=VALIDATION,
        callbacks=[recorder, callback],
        verbose=0,
    )
    return recorder.records, callback.transitions[0].epoch


@only_on("tensorflow", "The loop is one of TensorFlow's.")
def test_a_loop_with_two_stages_gets_the_weights_that_fit_gets():
    records, switched = loop(*build())
    expected, expected_switch = fit(build()[0])
    assert switched == expected_switch
    assert records == expected
