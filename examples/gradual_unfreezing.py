"""Gradual unfreezing on handwritten digits: the backbone joins block by block, from its output on.

A small convolutional network is pretrained on the digits 0 to 4 and transferred to 5 to 9. Three
schedules are tried: all at once, one block after the other with learning rates that fall
(`Stage.by_depth`), and one written by hand, whose last stage gives deeper blocks lower rates. For
each the program prints its switches and the accuracy on held-out digits. It needs scikit-learn.

    python examples/gradual_unfreezing.py
    python examples/gradual_unfreezing.py --pictures .    # draws each run (needs matplotlib)
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from sklearn.datasets import load_digits

from keras_tl import (
    FrozenBackbone,
    Stage,
    UnfreezeAtConvergence,
    layerwise_learning_rates,
    plot_stages,
    plot_trainable,
)


def load():
    """Returns images and labels of the digits 0 to 4, and of 5 to 9."""
    digits = load_digits()
    images = (digits.images / 16.0).astype("float32")[..., np.newaxis]
    low = digits.target < 5
    return (images[low], digits.target[low]), (images[~low], digits.target[~low] - 5)


def make_backbone():
    """Returns a small network in three blocks, which are read from the names of its layers."""
    layers = [keras.Input((8, 8, 1))]
    for block in (1, 2, 3):
        layers += [
            keras.layers.Conv2D(16 * block, 3, padding="same", name=f"block{block}_conv"),
            keras.layers.BatchNormalization(name=f"block{block}_norm"),
            keras.layers.ReLU(name=f"block{block}_relu"),
        ]
    return keras.Sequential([*layers, keras.layers.GlobalAveragePooling2D()], name="digits")


def classifier(backbone):
    """Returns a compiled classifier of five digits."""
    model = keras.Sequential([keras.Input((8, 8, 1)), backbone, keras.layers.Dense(5)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-2), loss, metrics=["accuracy"])
    return model


def schedules(backbone, limit):
    """Returns the stages of each way to unfreeze, with a limit to the epochs of each, or None."""
    rates = layerwise_learning_rates(backbone, 1e-3, decay=0.3)
    by_hand = [
        Stage("block3_.*", 3e-3, epochs=3),
        Stage("block[23]_.*", 1e-3, patience=1, epochs=limit),
        Stage("all", rates, epochs=limit),
    ]
    return {
        "all at once": [Stage("all", 1e-3, epochs=limit)],
        "block by block": Stage.by_depth(backbone, 3, 3e-3, decay=0.5, epochs=limit),
        "by hand": by_hand,
    }


def run(name, source, data, limit, pictures):
    """Trains with one schedule, and prints its switches and the accuracy."""
    train, validation, test = data
    keras.utils.set_random_seed(0)
    pretrained = make_backbone()
    pretrained.set_weights(source.get_weights())
    backbone = FrozenBackbone(pretrained)
    model = classifier(backbone)
    callback = UnfreezeAtConvergence(
        stages=schedules(backbone, limit)[name],
        patience=1,
        max_frozen_epochs=limit,
        fine_tune_patience=3,
    )
    print(f"\n{name}")
    fit = {"validation_data": validation, "callbacks": [callback], "verbose": 0}
    model.fit(*train, batch_size=10, epochs=60, **fit)
    if pictures:
        file = name.replace(" ", "_")
        plot_stages(callback).savefig(pictures / f"{file}.png")
        plot_trainable(model).savefig(pictures / f"{file}_trainable.png")
    accuracy = model.evaluate(*test, batch_size=len(test[1]), verbose=0)[1]
    print(f"accuracy on held-out digits: {accuracy:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="a folder to draw in")
    parser.add_argument("--small", action="store_true", help="fewer epochs, to try it out")
    arguments = parser.parse_args()
    if arguments.pictures:
        arguments.pictures.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(0)
    low, (images, labels) = load()
    source = make_backbone()
    classifier(source).fit(*low, batch_size=32, epochs=4 if arguments.small else 10, verbose=0)
    parts = np.split(np.random.default_rng(0).permutation(len(labels)), [50, 200])
    data = [(images[part], labels[part]) for part in parts]
    limit = 3 if arguments.small else None
    for name in schedules(source, limit):
        run(name, source, data, limit, arguments.pictures)


if __name__ == "__main__":
    main()
