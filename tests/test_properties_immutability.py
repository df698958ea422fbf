"""Invariants 1, 2 and 7: what is frozen stays so bit for bit, and the head never notices."""

import keras
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_tl import FrozenBackbone, UnfreezeAtConvergence
from tests import models, strategies
from tests.shared import as_bytes, examples, regression_data, seeded_dropout, values_of

eagerly = st.sampled_from([True, True, True, False])


def train(model, optimizer, loss, epochs, run_eagerly, *callbacks):
    x, y = regression_data()
    model.compile(optimizer, loss, run_eagerly=run_eagerly)
    model.fit(
        x,
        y,
        batch_size=8,
        epochs=epochs,
        validation_data=(x, y),
        validation_batch_size=len(x),
        callbacks=list(callbacks),
        verbose=0,
    )


def head():
    return [keras.layers.BatchNormalization(), seeded_dropout(0.5)]


@given(
    make_backbone=strategies.backbone_makers(),
    outer=strategies.outer_models,
    optimizer=strategies.optimizers(),
    loss=strategies.losses,
    epochs=st.integers(1, 3),
    run_eagerly=eagerly,
    inference_mode=st.sampled_from(["always", "batchnorm"]),
)
@settings(max_examples=examples(10))
def test_weights_of_a_frozen_backbone_are_constant(
    make_backbone, outer, optimizer, loss, epochs, run_eagerly, inference_mode
):
    wrapper = FrozenBackbone(make_backbone(), inference_mode=inference_mode)
    model = outer(wrapper, head())
    x, _ = regression_data()
    model(x)
    before = as_bytes(wrapper.weights)
    others = as_bytes(model.trainable_weights)

    train(model, optimizer, loss, epochs, run_eagerly)

    assert as_bytes(wrapper.weights) == before
    assert as_bytes(model.trainable_weights) != others


@given(
    make_backbone=strategies.backbone_makers(),
    outer=strategies.outer_models,
    optimizer=strategies.optimizers(),
    run_eagerly=eagerly,
    inference_mode=st.sampled_from(["always", "batchnorm"]),
    train_batchnorm=st.booleans(),
    layers=st.sampled_from(["all", 1, 2]),
)
@settings(max_examples=examples(10))
def test_in_a_partly_unfrozen_backbone_only_what_is_trainable_moves(
    make_backbone, outer, optimizer, run_eagerly, inference_mode, train_batchnorm, layers
):
    wrapper = FrozenBackbone(make_backbone(), inference_mode=inference_mode)
    model = outer(wrapper, head())
    x, _ = regression_data()
    model(x)
    wrapper.unfreeze(layers, train_batchnorm=train_batchnorm)
    trainable = {id(w) for w in wrapper.trainable_weights}
    frozen = [w for w in wrapper.weights if id(w) not in trainable]
    before = as_bytes(frozen)

    train(model, optimizer, "mse", 2, run_eagerly)

    assert as_bytes(frozen) == before
    assert set(map(id, models.statistics(wrapper))) <= set(map(id, frozen))


@given(
    make_backbone=strategies.backbone_makers(),
    outer=strategies.outer_models,
    optimizer=strategies.optimizers(),
    run_eagerly=eagerly,
    inference_mode=st.sampled_from(["always", "batchnorm"]),
    train_batchnorm=st.booleans(),
    restore_best_weights=st.booleans(),
)
@settings(max_examples=examples(8))
def test_statistics_are_constant_over_a_switch(
    make_backbone,
    outer,
    optimizer,
    run_eagerly,
    inference_mode,
    train_batchnorm,
    restore_best_weights,
):
    wrapper = FrozenBackbone(make_backbone(), inference_mode=inference_mode)
    model = outer(wrapper, head())
    x, _ = regression_data()
    model(x)
    before = as_bytes(models.statistics(wrapper))
    callback = UnfreezeAtConvergence(
        1e-2,
        max_frozen_epochs=1,
        train_batchnorm=train_batchnorm,
        restore_best_weights=restore_best_weights,
        verbose=0,
    )

    train(model, optimizer, "mse", 3, run_eagerly, callback)

    assert callback.stage == 1
    assert as_bytes(models.statistics(wrapper)) == before


@given(
    kinds=strategies.layer_kinds(),
    outer=strategies.outer_models,
    optimizer=st.sampled_from(["sgd", "adam"]),
    seed=st.integers(0, 100),
)
@settings(max_examples=examples(8))
def test_the_head_trains_as_on_the_backbones_outputs(kinds, outer, optimizer, seed):
    # Eagerly: compiled, TensorFlow fuses kernels, which rounds the outputs in other ways.
    x, y = regression_data()

    def build(wrap):
        keras.utils.set_random_seed(seed)
        backbone = models.functional(kinds)
        layer = FrozenBackbone(backbone) if wrap else keras.layers.Identity()
        keras.utils.set_random_seed(seed)
        model = outer(layer, head())
        model(x)
        model.compile(optimizer, "mse", run_eagerly=True)
        return model, backbone

    wrapped, backbone = build(True)
    alone, _ = build(False)
    features = backbone(x, training=False)
    wrapped.fit(x, y, epochs=2, shuffle=False, batch_size=16, verbose=0)
    alone.fit(features, y, epochs=2, shuffle=False, batch_size=16, verbose=0)

    assert values_of(wrapped)[len(backbone.weights) :] == values_of(alone)
