"""Invariant 4: one `fit` is, bit for bit, what the steps done by hand give."""

import keras
import pytest
import tensorflow as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keras_tl import FrozenBackbone, Stage, UnfreezeAtConvergence
from tests import models, strategies
from tests.shared import Recorder, examples, regression_data, seeded_dropout, values_of

EPOCHS = 6
X, Y = regression_data(24, seed=1)
VALIDATION = regression_data(16, seed=2)
FIT = {
    "validation_data": VALIDATION,
    "validation_batch_size": 16,
    "epochs": EPOCHS,
    "verbose": 0,
}


def arrays():
    return {"x": X, "y": Y, "batch_size": 8, "shuffle": False}


def pipeline():
    data = tf.data.Dataset.from_tensor_slices((X, Y)).map(lambda x, y: (2 * x, y))
    return {"x": data.batch(8).prefetch(1)}


def build(kinds, outer, seed, optimizer, run_eagerly, regularized):
    keras.utils.set_random_seed(seed)
    wrapper = FrozenBackbone(models.functional(kinds))
    if regularized:
        for weight in wrapper.backbone.weights:
            if weight.name == "kernel":
                weight.regularizer = keras.regularizers.L2(0.1)
    model = outer(wrapper, [keras.layers.BatchNormalization(), seeded_dropout(0.5)])
    model(X)
    # A configuration and not an optimizer, of which each route needs one of its own.
    optimizer = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    model.compile(optimizer, "mse", metrics=["mae"], run_eagerly=run_eagerly)
    return model, wrapper


def by_hand(model, wrapper, data, stages, *, patience, min_delta, start_from_epoch):
    recorder = Recorder(values_of)
    fit = FIT | data
    history = []
    done = 0
    for number in range(len(stages) + 1):
        stopping = keras.callbacks.EarlyStopping(
            patience=patience,
            min_delta=min_delta,
            start_from_epoch=start_from_epoch,
            restore_best_weights=True,
        )
        last = number == len(stages)
        callbacks = [recorder] if last else [recorder, stopping]
        part = model.fit(callbacks=callbacks, initial_epoch=done, **fit)
        done += len(part.epoch)
        history.append(part.history)
        if last or done == EPOCHS:
            break
        layers, learning_rate = stages[number]
        wrapper.freeze()
        wrapper.unfreeze(layers)
        config = model.optimizer.get_config() | {"learning_rate": learning_rate}
        optimizer = type(model.optimizer).from_config(config)
        model.compile(optimizer, "mse", metrics=["mae"], run_eagerly=model.run_eagerly)
    joined = {key: [value for part in history for value in part[key]] for key in history[0]}
    return joined, recorder.records


def in_one_fit(model, data, stages, **settings):
    recorder = Recorder(values_of)
    if len(stages) == 1:
        (layers, learning_rate), *_ = stages
        settings |= {"layers": layers, "learning_rate": learning_rate}
    else:
        settings |= {"stages": [Stage(*stage) for stage in stages]}
    callback = UnfreezeAtConvergence(fine_tune_patience=None, verbose=0, **settings)
    fit = FIT | data
    history = model.fit(callbacks=[recorder, callback], **fit)
    return history.history, recorder.records, callback


@given(
    kinds=strategies.layer_kinds(max_size=3),
    outer=strategies.outer_models,
    seed=st.integers(0, 1000),
    optimizer=strategies.optimizers(),
    data=st.sampled_from([arrays, pipeline]),
    run_eagerly=st.sampled_from([True, True, False]),
    regularized=st.booleans(),
    stages=st.lists(
        st.tuples(st.sampled_from(["all", 1]), st.sampled_from([1e-5, 1e-2])),
        min_size=1,
        max_size=3,
    ),
    patience=st.integers(0, 2),
    min_delta=st.sampled_from([0.0, 0.05]),
    start_from_epoch=st.integers(0, 1),
)
@example(  # Regularizers of weights that are frozen again stop counting.
    kinds=["dense", "dense"],
    outer=models.functional_outer,
    seed=0,
    optimizer=keras.optimizers.SGD(0.1, momentum=0.9),
    data=arrays,
    run_eagerly=False,
    regularized=True,
    stages=[("all", 1e-2), (1, 1e-2)],
    patience=0,
    min_delta=0.05,
    start_from_epoch=0,
)
@settings(max_examples=examples(8))
def test_one_fit_is_the_manual_route(
    kinds, outer, seed, optimizer, data, run_eagerly, regularized, stages, **callback
):
    made = (kinds, outer, seed, optimizer, run_eagerly, regularized)
    model, wrapper = build(*made)
    expected, weights_by_hand = by_hand(model, wrapper, data(), stages, **callback)
    model, _ = build(*made)
    history, weights, _ = in_one_fit(model, data(), stages, **callback)

    assert {key: history[key] for key in expected} == expected
    assert weights == weights_by_hand


@pytest.mark.slow
def test_the_property_above_compares_all_stages():
    """Guards it: with such settings there are switches, with epochs to train after them."""
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    for stages in ([("all", 1e-2)], [(1, 1e-2), ("all", 1e-2)]):
        model, _ = build(["dense", "dense"], models.functional_outer, 0, optimizer, True, False)
        history, weights, _ = in_one_fit(model, arrays(), stages, patience=0)
        assert set(history["stage"]) == set(range(len(stages) + 1))
        assert len(weights) == EPOCHS
