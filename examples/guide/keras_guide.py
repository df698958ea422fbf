"""Keras' guide to transfer learning, cell by cell: what each does, and what keras_tl adds to it.

The cells are those of https://keras.io/guides/transfer_learning/, in its order and under its
headings: trainable weights, freezing, recursion, the workflow, feature extraction, fine-tuning,
BatchNormalization, a training loop of one's own. Each is a function that asserts what the guide
says of it, on a small network in place of Xception, and prints a line. The guide's end-to-end
example is `examples/cats_vs_dogs.py`.

    python examples/guide/keras_guide.py
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from keras_tl import (
    ConvergenceMonitor,
    FreezeGuard,
    FrozenBackbone,
    UnfreezeAtConvergence,
    fine_tune,
    renew_optimizer,
    trainable_report,
)

SHAPE = (12, 12, 3)


def data(count=64):
    """Returns random images, and whether each is bright."""
    x = np.random.default_rng(0).uniform(0, 255, (count, *SHAPE)).astype("float32")
    return x, (x.mean(axis=(1, 2, 3)) > 127.5).astype("float32")[:, None]


def make_base():
    """Returns what stands in for Xception: layers with BatchNormalization, and Dropout."""
    layers = [keras.layers.Conv2D(4, 3, name="block1"), keras.layers.BatchNormalization()]
    layers += [keras.layers.ReLU(), keras.layers.Dropout(0.2), keras.layers.Conv2D(4, 3)]
    return keras.Sequential([keras.Input(SHAPE), *layers], name="base")


def make_model(backbone):
    """Returns the guide's model: pixels are scaled, the backbone, pooling, Dropout, a head."""
    inputs = keras.Input(SHAPE)
    x = keras.layers.Rescaling(scale=1 / 127.5, offset=-1)(inputs)
    x = backbone(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dropout(0.2)(x)
    model = keras.Model(inputs, keras.layers.Dense(1)(x))
    model.compile(keras.optimizers.Adam(), keras.losses.BinaryCrossentropy(from_logits=True))
    return model


def values(weights):
    """Returns copies of weights."""
    return [np.array(keras.ops.convert_to_numpy(weight)) for weight in weights]


def same(before, weights):
    """Returns whether weights are as they were, bit for bit."""
    return all(np.array_equal(a, b) for a, b in zip(before, values(weights), strict=True))


def the_three_attributes():
    """The Dense layer has 2 trainable weights, BatchNormalization 2 and 2 that are not."""
    dense, norm = keras.layers.Dense(3), keras.layers.BatchNormalization()
    for layer in (dense, norm):
        layer.build((None, 4))
    assert (len(dense.trainable_weights), len(dense.non_trainable_weights)) == (2, 0)
    assert (len(norm.trainable_weights), len(norm.non_trainable_weights)) == (2, 2)
    # In a FrozenBackbone none trains until something is unfrozen.
    assert len(FrozenBackbone(dense).trainable_weights) == 0
    assert len(FrozenBackbone(norm).non_trainable_weights) == 4
    print("weights: all, trainable and not, of a layer and of a FrozenBackbone")


def a_frozen_layer_does_not_change():
    """Training leaves the weights of a frozen layer as they are."""
    layer1, layer2 = keras.layers.Dense(3, activation="relu"), keras.layers.Dense(1)
    model = keras.Sequential([keras.Input((3,)), FrozenBackbone(layer1), layer2])
    model.compile("adam", "mse")
    before = values(layer1.weights)
    model.fit(np.ones((2, 3)), np.ones((2, 1)), callbacks=[FreezeGuard(verbose=0)], verbose=0)
    assert same(before, layer1.weights)
    print("training: a frozen layer has not changed, and FreezeGuard says so too")


def trainable_is_recursive():
    """Setting `trainable` on a model sets it on all layers in it, and on a FrozenBackbone too."""
    inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3), keras.layers.Dense(3)])
    outer = keras.Sequential([keras.Input((3,)), inner, keras.layers.Dense(1)])
    outer.trainable = False
    assert not inner.trainable
    assert not inner.layers[0].trainable
    wrapper = FrozenBackbone(inner)
    wrapper.trainable = True
    assert inner.layers[0].trainable
    print("recursion: `trainable` reaches every layer inside")


def the_workflow():
    """A head on a frozen base; then the base is unfrozen, and all of it trains at a low rate.

    In the guide these are two fits, with `compile` and a guessed number of epochs between them.
    """
    base = make_base()
    model = make_model(FrozenBackbone(base))
    x, y = data()
    callbacks = [
        UnfreezeAtConvergence(1e-5, max_frozen_epochs=2, verbose=0),
        FreezeGuard(verbose=0),
    ]
    history = model.fit(
        x, y, validation_split=0.25, epochs=4, callbacks=callbacks, verbose=0
    ).history
    assert history["stage"] == [0, 0, 1, 1]
    np.testing.assert_allclose(history["learning_rate"], [1e-3, 1e-3, 1e-5, 1e-5])
    print("workflow: two epochs of the head at 1e-3 and two of everything at 1e-5, in one `fit`")


def feature_extraction():
    """The guide's other workflow: run the base once, and train the head on its outputs."""
    model = make_model(FrozenBackbone(make_base()))
    x, y = data()
    run = {"validation_split": 0.25, "epochs": 4, "max_frozen_epochs": 2, "verbose": 0}
    assert fine_tune(model, x, y, **run).history["stage"] == [0, 0, 1, 1]
    print("feature extraction: `fine_tune` records what the base returns, then trains all of it")


def fine_tuning():
    """Unfreezing between two fits, as in the guide, needs `compile`: else the old set trains."""
    backbone = FrozenBackbone(make_base())
    model = make_model(backbone)
    model.fit(*data(), verbose=0)
    assert trainable_report(model).total.compiled
    unfrozen = [layer.name for layer in backbone.unfreeze()]
    assert unfrozen[0] == "block1"
    assert not any("batch_normalization" in name for name in unfrozen)
    assert trainable_report(model).total.compiled is False, "the optimizer trains the head alone"
    model.compile(keras.optimizers.Adam(1e-5), keras.losses.BinaryCrossentropy(from_logits=True))
    model.fit(*data(), verbose=0)
    assert trainable_report(model).total.compiled
    print("fine-tuning: without `compile` the report says that what was compiled is stale")


def statistics_of_batch_normalization():
    """The guide's `training=False` does not hold statistics in `fit`; a FrozenBackbone does."""
    moved = {}
    for name, wrap in {"as in the guide": None, "FrozenBackbone": FrozenBackbone}.items():
        base = make_base()
        backbone = wrap(base) if wrap else lambda x, base=base: base(x, training=False)
        model = make_model(backbone)
        base.trainable = True
        model.compile(keras.optimizers.Adam(1e-5), "mse")
        before = values(base.layers[1].non_trainable_weights)
        model.fit(*data(), verbose=0)
        after = values(base.layers[1].non_trainable_weights)
        moved[name] = max(float(np.abs(a - b).max()) for a, b in zip(before, after))
    assert moved["FrozenBackbone"] == 0
    print(
        "BatchNormalization: the largest change of a statistic in an epoch of fine-tuning is "
        + " and ".join(f"{change:.3g} ({name})" for name, change in moved.items())
    )


def a_training_loop_of_ones_own():
    """Only trainable weights are updated; when the head has converged, the rest joins."""
    import tensorflow as tf

    backbone = FrozenBackbone(make_base())
    model = make_model(backbone)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    optimizer = keras.optimizers.Adam()
    batches = tf.data.Dataset.from_tensor_slices(data()).batch(32)

    def make_step(optimizer):
        @tf.function  # Traced again for each optimizer, for the weights that are trainable then.
        def step(x, y):
            with tf.GradientTape() as tape:
                value = loss(y, model(x, training=True))
            weights = model.trainable_weights
            optimizer.apply(tape.gradient(value, weights), weights)
            return value

        return step

    step, monitor, joined = make_step(optimizer), ConvergenceMonitor(patience=1, min_delta=1), 0
    with FreezeGuard(verbose=0).watching(model):
        for epoch in range(4):
            value = np.mean([float(step(x, y)) for x, y in batches])
            if not joined and monitor.update(epoch, value):
                joined = len(backbone.unfreeze())
                optimizer = renew_optimizer(optimizer, 1e-5, variables=model.trainable_weights)
                step = make_step(optimizer)
    assert joined == 2
    print(f"a loop of one's own: {joined} layers joined when the head had converged")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--small", action="store_true", help="the same: it is small as it is")
    parser.parse_args()
    keras.utils.set_random_seed(0)
    the_three_attributes()
    a_frozen_layer_does_not_change()
    trainable_is_recursive()
    the_workflow()
    feature_extraction()
    fine_tuning()
    statistics_of_batch_normalization()
    if keras.backend.backend() == "tensorflow":
        a_training_loop_of_ones_own()
    print("The guide's cells hold with keras_tl.")


if __name__ == "__main__":
    main()
