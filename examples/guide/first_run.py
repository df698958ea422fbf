"""A first run: what `UnfreezeAtConvergence` prints, what `History` holds, and a picture of it.

A small network is pretrained on scikit-learn's handwritten digits 0 to 4 and transferred to 5 to 9,
of which 50 have labels. In one `fit` the head trains until `val_loss` has stopped improving, then
the whole network at a lower rate. The callback says what it waits for and what it does; `History`
has the stage and the learning rate of each epoch; `plot_stages` draws them.

    python examples/guide/first_run.py
    python examples/guide/first_run.py --picture run.png    # needs matplotlib
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from sklearn.datasets import load_digits

from keras_tl import FreezeGuard, FrozenBackbone, UnfreezeAtConvergence, plot_stages


def load():
    """Returns images and labels of the digits 0 to 4, and of 5 to 9."""
    digits = load_digits()
    images = (digits.images / 16.0).astype("float32")[..., np.newaxis]
    low = digits.target < 5
    return (images[low], digits.target[low]), (images[~low], digits.target[~low] - 5)


def make_backbone():
    """Returns a small convolutional network with BatchNormalization."""
    layers = [keras.Input((8, 8, 1))]
    for block in (1, 2, 3):
        layers.append(keras.layers.Conv2D(16 * block, 3, padding="same", name=f"block{block}"))
        layers += [keras.layers.BatchNormalization(), keras.layers.ReLU()]
    return keras.Sequential([*layers, keras.layers.GlobalAveragePooling2D()], name="digits")


def classifier(backbone):
    """Returns a compiled classifier of five digits."""
    model = keras.Sequential([keras.Input((8, 8, 1)), backbone, keras.layers.Dense(5)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-2), loss, metrics=["accuracy"])
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--picture", help="a file to draw the run in")
    parser.add_argument("--small", action="store_true", help="the same: it is small as it is")
    picture = parser.parse_args().picture
    keras.utils.set_random_seed(0)
    low, (images, labels) = load()
    base = make_backbone()
    pretrained = classifier(base)
    pretrained.optimizer.learning_rate = 1e-2
    pretrained.fit(*low, epochs=8, verbose=0)

    order = np.random.default_rng(0).permutation(len(labels))
    train, val, test = ((images[part], labels[part]) for part in np.split(order, [50, 250]))
    model = classifier(FrozenBackbone(base))
    callback = UnfreezeAtConvergence(3e-3, patience=3, min_delta=0.03)
    history = model.fit(
        *train,
        validation_data=val,
        epochs=80,
        batch_size=10,
        callbacks=[callback, FreezeGuard()],
        verbose=2,
    ).history

    (switch,) = callback.transitions
    accuracy = np.array(history["val_accuracy"])
    frozen = np.array(history["stage"]) == 0
    print(f"the switch as data: epoch {switch.epoch}, {switch.reason}, best {switch.value:.4f}")
    print(f"best val_accuracy: {accuracy[frozen].max():.3f} frozen, {accuracy.max():.3f} at all")
    print(f"accuracy on held-out digits: {model.evaluate(*test, verbose=0)[1]:.3f}")
    if picture:
        plot_stages(callback).savefig(picture)


if __name__ == "__main__":
    main()
