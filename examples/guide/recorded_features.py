"""Recorded features: the frozen backbone runs once over the data, and the head trains on that.

While the backbone is frozen and nothing random comes before it, what it returns for a sample is the
same in every epoch. `FeatureCache` records it, in memory or in a folder, and `cache.head`, which
shares its layers with the model, trains on the record. `fine_tune` does the whole of it: the head
on recorded features, then everything from the data, guarded, as one run with one `History`; it is
what `fit` with `UnfreezeAtConvergence` does, bit for bit where the batches are of the same size and
no compiler joins backbone and head (else features differ by rounding, some 1e-6 of their size).

What is recorded is what `fit` would read. Augmentation before the backbone is refused, by name
(`views=k` records k random passes); so are data that changes on every read, subclassed models and,
in `fine_tune`, generators and `steps_per_epoch` below one pass: it then trains the head through the
backbone and says so. Features of another backbone (one bit of a weight is enough), or of other data
under the same `name`, are a `StaleCacheError`; `refresh=True` records anew. A change that neither
configuration, weights, one recorded sample nor the data shows goes unseen. An interrupted recording
continues after its last whole shard; damaged shards are found by checksums and recorded again.
`shard=(index, count)` records a part, and `dtype="float16"` halves the disk.

    python examples/guide/recorded_features.py
"""

import argparse
import os
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from keras_tl import (
    FeatureCache,
    FrozenBackbone,
    StaleCacheError,
    UnfreezeAtConvergence,
    fine_tune,
)

X = np.random.default_rng(0).normal(size=(96, 12, 12, 3)).astype("float32")
Y = X.mean(axis=(1, 2, 3))[:, None] * 20
TRAIN, VAL = (X[:64], Y[:64]), (X[64:], Y[64:])


def make_model(*before):
    """Returns a compiled model, with layers before the backbone."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Conv2D(8, 3, activation="relu"), keras.layers.BatchNormalization()]
    base = keras.Sequential([keras.Input((12, 12, 3)), *layers], name="base")
    head = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((12, 12, 3)), *before, FrozenBackbone(base), *head])
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    return model


def by_hand(folder):
    """The head alone, on features in a folder that the next run finds again."""
    model = make_model()
    cache = FeatureCache(model, cache_dir=folder)
    train = cache(*TRAIN, name="training", verbose=0)  # Arrays, tf.data, PyDataset, generators.
    val = cache(*VAL, name="validation", training=False, verbose=0)
    before = model.evaluate(*VAL, verbose=0)
    cache.head.fit(train, validation_data=val, epochs=5, shuffle=False, verbose=0)  # They are.
    after = model.evaluate(*VAL, verbose=0)
    assert after < before, "training the head trains the model"
    print(f"training on features of shape {tuple(train.element_spec[0].shape)[1:]}: ", end="")
    print(f"val_loss of the whole model {before:.3f} -> {after:.3f}")

    changed = make_model()
    kernel = changed.layers[0].backbone.layers[0].kernel
    kernel.assign(kernel * 2)
    try:
        FeatureCache(changed, cache_dir=folder)(*TRAIN, name="training", verbose=0)
    except StaleCacheError as error:
        print(f"another backbone: {str(error).splitlines()[0][:90]}...")
    else:
        raise AssertionError("These features are of another backbone.")


def in_one_call(folder):
    """`fine_tune` is what `fit` with the callback is."""
    settings = {"validation_data": VAL, "epochs": 6, "shuffle": False, "verbose": 0}
    model = make_model()
    history = fine_tune(model, *TRAIN, cache_dir=folder, max_frozen_epochs=3, **settings).history
    other = make_model()
    callback = UnfreezeAtConvergence(max_frozen_epochs=3, verbose=0)
    expected = other.fit(*TRAIN, callbacks=[callback], **settings).history
    assert history["stage"] == expected["stage"] == [0, 0, 0, 1, 1, 1]
    np.testing.assert_allclose(history["val_loss"], expected["val_loss"], rtol=1e-4)
    off = max(float(np.abs(a - b).max()) for a, b in zip(model.get_weights(), other.get_weights()))
    print(f"fine_tune and fit: the same stages; weights differ by at most {off:.1g}")


def not_recorded():
    """Augmentation before the backbone: each epoch is another, so nothing is recorded."""
    model = make_model(keras.layers.RandomFlip())
    try:
        FeatureCache(model)(*TRAIN, verbose=0)
    except ValueError as error:
        print(f"refused: {str(error).splitlines()[0][:100]}...")
    else:
        raise AssertionError("What is random cannot be recorded.")
    run = {"validation_data": VAL, "epochs": 4, "max_frozen_epochs": 2}
    history = fine_tune(model, *TRAIN, verbose=2, **run).history
    assert history["stage"] == [0, 0, 1, 1]
    fine_tune(make_model(keras.layers.RandomFlip()), *TRAIN, views=3, verbose=0, **run)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--small", action="store_true", help="the same: it is small as it is")
    parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        by_hand(os.path.join(folder, "by_hand"))
        in_one_call(os.path.join(folder, "in_one_call"))
    not_recorded()
    print("Recorded where an epoch is as the one before, and through the backbone where not.")


if __name__ == "__main__":
    main()
