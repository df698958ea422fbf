"""Feature extraction: run the frozen backbone once, and train the head on what it returned.

MobileNetV2 at 96x96 (random weights, so that nothing is downloaded) and random images: what counts
here is the time. The program trains the head for an epoch through the backbone, then records the
features and trains it for an epoch on them, and prints both times. After that, `fine_tune` does the
whole of transfer learning in one call: it records features itself, and fine-tunes from the images.

    python examples/cached_features.py
"""

import argparse
import os
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from keras_tl import FeatureCache, FrozenBackbone, fine_tune

SHAPE = (96, 96, 3)


def images(count, seed):
    """Returns random images and labels."""
    random = np.random.default_rng(seed)
    return random.normal(size=(count, *SHAPE)).astype("float32"), random.integers(2, size=count)


def make_model(alpha):
    """Returns a compiled classifier on a frozen MobileNetV2."""
    base = keras.applications.MobileNetV2(
        SHAPE, include_top=False, weights=None, pooling="avg", alpha=alpha
    )
    head = [keras.layers.Dropout(0.2), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input(SHAPE), FrozenBackbone(base), *head])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    return model


def seconds_of_an_epoch(model, *data, **arguments):
    """Returns how long an epoch takes, after one that compiles."""
    for _ in range(2):
        start = time.perf_counter()
        model.fit(*data, verbose=0, **arguments)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--small", action="store_true", help="fewer images, to try it out")
    small = parser.parse_args().small
    keras.utils.set_random_seed(0)
    (x, y), validation = images(128 if small else 2048, 0), images(32 if small else 256, 1)
    model = make_model(alpha=0.35 if small else 1.0)

    through = seconds_of_an_epoch(model, x, y, batch_size=32)
    print(f"an epoch of the head through the backbone: {through:.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        cache = FeatureCache(model, cache_dir=folder)
        features = cache(x, y, batch_size=32)  # A `tf.data.Dataset` of features and labels.
        print(f"recording the features: {time.perf_counter() - start:.2f} s")
        recorded = seconds_of_an_epoch(cache.head, features, shuffle=False)
        print(f"an epoch of the head on features: {recorded:.3f} s ({through / recorded:.0f}x)")

        print("\nAll of it in one call:")
        epochs = 4 if small else 20
        settings = {"epochs": epochs, "max_frozen_epochs": epochs // 2, "batch_size": 32}
        history = fine_tune(
            model, x, y, validation_data=validation, cache_dir=folder, verbose=2, **settings
        )
    print(f"stages of the epochs: {history.history['stage']}")


if __name__ == "__main__":
    main()
