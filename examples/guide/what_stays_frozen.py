"""What stays frozen: which layers a `FrozenBackbone` unfreezes, and `FreezeGuard`, which proves it.

A `FrozenBackbone` starts frozen and runs in inference mode; `unfreeze` takes "all", a number, a
regular expression, names or a function, and leaves BatchNormalization and what you froze by hand as
they are. What is unfrozen survives saving, cloning and copying. The wrapper hides nothing: it takes
the backbone's call arguments, passes gradients to its inputs, and leaves the loss and metrics of a
compiled backbone out (but for one inside a plain layer, such as `TimeDistributed(compiled_model)`,
which takes over the outer loss as in any Keras model: a warning names it). With the
`inference_mode` "batchnorm" only BatchNormalization is held there, and the backbone's own Dropout
works once something is unfrozen. `FreezeGuard` watches whatever must not change, and names the
weight, the moment and the cause if it does. `unwrap` returns the model without keras_tl.

    python examples/guide/what_stays_frozen.py
"""

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from keras_tl import (
    FreezeGuard,
    FrozenBackbone,
    FrozenWeightsChangedError,
    StaleCompileError,
    trainable_report,
    unwrap,
)

X, Y = np.random.default_rng(0).normal(size=(32, 8)).astype("float32"), np.ones((32, 1), "float32")


def make_base():
    """Returns a network of three blocks."""
    layers = []
    for block in (1, 2, 3):
        layers.append(keras.layers.Dense(8, activation="relu", name=f"block{block}_dense"))
        layers.append(keras.layers.BatchNormalization(name=f"block{block}_norm"))
    return keras.Sequential([keras.Input((8,)), *layers], name="base")


def make_model(backbone):
    """Returns a compiled model on a backbone."""
    model = keras.Sequential([keras.Input((8,)), backbone, keras.layers.Dense(1, name="head")])
    model.compile("adam", "mse")
    return model


def names(layers):
    """Returns the names of layers."""
    return [layer.name for layer in layers]


def selections():
    """Each way to say which layers are unfrozen."""
    backbone = FrozenBackbone(make_base())
    assert names(backbone.unfreeze()) == ["block1_dense", "block2_dense", "block3_dense"]
    for layers, chosen in {
        1: ["block3_dense"],  # Layers nearest the output that have weights to train.
        "block[12]_.*": ["block1_dense", "block2_dense"],  # Whole names; nested: outer/inner.
        ("block2_dense",): ["block2_dense"],
        (lambda layer: layer.name.startswith("block3")): ["block3_dense"],
    }.items():
        backbone.freeze()
        layers = list(layers) if isinstance(layers, tuple) else layers
        assert names(backbone.unfreeze(layers)) == chosen
    backbone.unfreeze("block3_norm", train_batchnorm=True)
    assert len(backbone.trainable_weights) == 4, "gamma and beta train; statistics never move"
    try:
        backbone.unfreeze("blok3.*")
    except ValueError as error:
        print(f"a selection that matches nothing: {str(error).split('. Pass')[0]}")


def frozen_by_hand():
    """Layers that you froze in a backbone of which others train stay frozen unless named."""
    base = make_base()
    base.get_layer("block1_dense").trainable = False
    backbone = FrozenBackbone(base)
    assert names(backbone.unfreeze()) == ["block2_dense", "block3_dense"]
    assert names(backbone.unfreeze("block1_dense")) == ["block1_dense"]
    base = make_base()
    base.trainable = False  # As a whole: that says nothing, and is unfrozen as a whole.
    assert len(FrozenBackbone(base).unfreeze()) == 3
    print("layers frozen by hand stay frozen until they are named")


def guarded():
    """What moves a frozen weight is an error that names it."""
    base = make_base()
    model = make_model(FrozenBackbone(base))

    def load_old_weights(epoch, logs):
        base.get_layer("block1_dense").kernel.assign(np.zeros((8, 8)))

    moves = keras.callbacks.LambdaCallback(on_epoch_end=load_old_weights)
    try:
        model.fit(X, Y, epochs=2, callbacks=[moves, FreezeGuard()], verbose=0)
    except FrozenWeightsChangedError as error:
        print(f"\n{error}\n")
    else:
        raise AssertionError("A frozen weight was changed.")
    backbone = FrozenBackbone(make_base())
    model = make_model(backbone)
    model.fit(X, Y, verbose=0)
    backbone.unfreeze()
    try:
        model.fit(X, Y, callbacks=[FreezeGuard()], verbose=0)
    except StaleCompileError as error:
        print(f"`trainable` changed, and no `compile` since: {str(error).splitlines()[0]}\n")
    else:
        raise AssertionError("The compiled state was stale.")
    # Around anything but `fit`. `layers` adds what else is watched, `exclude` leaves layers out
    # that are moved on purpose; `check="batch"` finds the batch; `action="restore"` puts it back.
    with FreezeGuard(verbose=0).watching(model) as guard:
        model.evaluate(X, Y, verbose=0)
        guard.check()


def saved_and_loaded():
    """A partly unfrozen model is saved, loaded and unwrapped, and trains the same layers."""
    backbone = FrozenBackbone(make_base())
    backbone.unfreeze("block3_.*")
    model = make_model(backbone)
    model.fit(X, Y, verbose=0)
    expected = model.predict(X, verbose=0)
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "model.keras")
        loaded = keras.models.load_model(Path(folder) / "model.keras")
        unwrap(model).save(Path(folder) / "plain.keras")
        plain = keras.models.load_model(Path(folder) / "plain.keras")
    for other in (loaded, plain, keras.models.clone_model(model)):
        assert len(other.trainable_weights) == 4
    assert np.array_equal(loaded.predict(X, verbose=0), expected)
    assert np.array_equal(plain.predict(X, verbose=0), expected)
    # Weights saved without the wrapper load into it; the other way round Keras has no hook.
    unwrapped = make_model(make_base())
    unwrapped.set_weights(model.get_weights())
    # `flatten=True` makes the backbone's layers part of the model's own graph, as Grad-CAM wants.
    assert "block3_dense" in names(unwrap(model, flatten=True).layers)
    print(trainable_report(model))
    print("\nSaved, loaded and unwrapped, the model predicts the same, bit for bit.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--small", action="store_true", help="the same: it is small as it is")
    parser.parse_args()
    keras.utils.set_random_seed(0)
    selections()
    frozen_by_hand()
    guarded()
    saved_and_loaded()


if __name__ == "__main__":
    main()
