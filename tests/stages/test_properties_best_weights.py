"""Invariant 5: with `restore_best_weights`, what remains is the best of the whole run."""

import warnings

import keras
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_tl import FrozenBackbone, Stage, UnfreezeAtConvergence
from keras_tl.stages import switching
from tests import models, strategies
from tests.shared import examples, regression_data

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
    stages=st.lists(st.sampled_from(["all", 1]), min_size=1, max_size=3),
    stage_epochs=st.integers(1, 2),
)
@settings(max_examples=examples(15))
def test_final_value_is_the_best_in_the_history(
    kinds, outer, optimizer, learning_rate, monitor, regularized, stages, stage_epochs, **settings
):
    wrapper = FrozenBackbone(models.functional(kinds))
    for weight in wrapper.backbone.weights if regularized else ():
        if weight.name == "kernel":
            weight.regularizer = keras.regularizers.L2(0.5)
    model = outer(wrapper, [keras.layers.Dropout(0.5)])
    model.compile(optimizer, "mse", metrics=["mae"], run_eagerly=True)
    if len(stages) == 1:
        settings |= {"learning_rate": learning_rate, "layers": stages[0]}
    else:
        schedule = [Stage(layers, learning_rate, epochs=stage_epochs) for layers in stages]
        settings |= {"stages": schedule}
    callback = UnfreezeAtConvergence(monitor=monitor, verbose=0, **settings)
    counted = []

    class Counted(keras.callbacks.Callback):
        """Notes at each epoch's begin which regularizers count; the callback is before it."""

        def on_epoch_begin(self, epoch, logs=None):
            counted.append(list(wrapper.trainable_weights))

        def on_epoch_end(self, epoch, logs=None):
            # What all of them would add to the loss of these weights, if they counted.
            counting = {id(weight) for weight in counted[-1]}
            others = [weight for weight in wrapper.weights if id(weight) not in counting]
            totals.append(switching.regularization_loss(others))

    totals = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = model.fit(
            X,
            Y,
            epochs=6,
            batch_size=16,
            validation_data=VALIDATION,
            callbacks=[callback, Counted()],
            verbose=0,
        ).history

    # Comparable are values with all regularizers counted, whatever trained when.
    if monitor == "val_mae":
        totals = [0.0] * len(totals)
    values = [value + total for value, total in zip(history[monitor], totals, strict=True)]
    evaluated = model.evaluate(*VALIDATION, batch_size=16, verbose=0, return_dict=True)
    final = evaluated[monitor.removeprefix("val_")]
    if monitor != "val_mae":
        counting = {id(weight) for weight in wrapper.trainable_weights}
        others = [weight for weight in wrapper.weights if id(weight) not in counting]
        final += switching.regularization_loss(others)
    # The offsets are sums in float32, in another order than the loss is summed in.
    bound = 1e-5 * abs(final) if any(totals) else 0.0
    assert abs(final - min(values)) <= bound
