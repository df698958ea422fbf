"""Invariant 5: with `restore_best_weights`, what remains is the best of the whole run."""

import warnings

import keras
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_tl import FrozenBackbone, UnfreezeAtConvergence, switching
from tests import models, strategies
from tests.conftest import regression_data

X, Y = regression_data(16, seed=1)
VALIDATION = regression_data(16, seed=2)


@given(
    kinds=strategies.layer_kinds(max_size=3),
    outer=strategies.outer_models,
    optimizer=strategies.optimizers(),
    learning_rate=st.sampled_from([1e-4, 1e-1]),
    monitor=st.sampled_from(["val_loss", "val_mae"]),
    patience=st.integers(0, 2),
    fine_tune_patience=st.sampled_from([None, 1]),
    min_delta=st.sampled_from([0.0, 0.1]),
    start_from_epoch=st.integers(0, 2),
    max_frozen_epochs=st.sampled_from([None, 2]),
    regularized=st.booleans(),
)
@settings(max_examples=20)
def test_final_value_is_the_best_in_the_history(
    kinds, outer, optimizer, learning_rate, monitor, regularized, **settings
):
    wrapper = FrozenBackbone(models.functional(kinds))
    for weight in wrapper.backbone.weights if regularized else ():
        if weight.name == "kernel":
            weight.regularizer = keras.regularizers.L2(0.5)
    model = outer(wrapper, [keras.layers.Dropout(0.5)])
    model.compile(optimizer, "mse", metrics=["mae"], run_eagerly=True)
    callback = UnfreezeAtConvergence(learning_rate, monitor=monitor, verbose=0, **settings)
    offsets = []

    class Offset(keras.callbacks.Callback):
        """Notes what regularizers of the unfrozen layers add, at the first batch after a switch."""

        def on_epoch_begin(self, epoch, logs=None):
            if callback.stage == 1 and not offsets:
                offsets.append(switching.regularization_loss(wrapper.trainable_weights))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = model.fit(
            X,
            Y,
            epochs=6,
            batch_size=8,
            validation_data=VALIDATION,
            callbacks=[callback, Offset()],
            verbose=0,
        ).history

    offset = offsets[0] if offsets and monitor != "val_mae" else 0.0
    values = [v + offset * (s == 0) for v, s in zip(history[monitor], history["stage"])]
    best = values.index(min(values))
    evaluated = model.evaluate(*VALIDATION, batch_size=8, verbose=0, return_dict=True)
    final = evaluated[monitor.removeprefix("val_")]
    # The offset is a sum in float32, in another order than the loss is summed in.
    assert abs(final - values[best]) <= (1e-5 * abs(final) if offset else 0.0)
