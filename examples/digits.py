"""Transfer learning on scikit-learn's handwritten digits, in a minute, without a download.

A small convolutional network is pretrained on the digits 0 to 4. It is then transferred to the
digits 5 to 9, of which only a few have labels, in six ways:

- head only: a new head is trained on the frozen backbone;
- keras_tl: the same, and then the backbone is fine-tuned, in one `fit`;
- gradual unfreezing: the backbone is unfrozen block by block, from its output to its input;
- discriminative rates: it is unfrozen at once, and deeper blocks learn slower;
- no frozen stage: backbone and new head are fine-tuned together from the first epoch;
- from scratch: the same network without what was learnt from 0 to 4.

The table gives the accuracy on held-out digits, as mean and standard deviation over the seeds: two,
or as many as `--seeds` says. It is what came out.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from sklearn.datasets import load_digits

from keras_tl import (
    FrozenBackbone,
    Stage,
    UnfreezeAtConvergence,
    layerwise_learning_rates,
)

LABELLED, VALIDATION = 15, 100
EPOCHS, PATIENCE = 50, 4
HEAD_RATE, FINE_RATE = 3e-2, 3e-3


def load():
    """Returns images and labels of the digits 0 to 4, and of 5 to 9."""
    digits = load_digits()
    images = (digits.images / 16.0).astype("float32")[..., np.newaxis]
    low = digits.target < 5
    return (images[low], digits.target[low]), (images[~low], digits.target[~low] - 5)


def make_backbone():
    """Returns a small convolutional network with BatchNormalization."""
    layers = []
    for filters in (16, 32, 64):
        layers += [
            keras.layers.Conv2D(filters, 3, padding="same", use_bias=False),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
        ]
    return keras.Sequential(
        [keras.Input((8, 8, 1)), *layers, keras.layers.GlobalAveragePooling2D()]
    )


def compiled(backbone, learning_rate):
    """Returns a classifier of five digits on the backbone."""
    model = keras.Sequential([keras.Input((8, 8, 1)), backbone, keras.layers.Dense(5)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(learning_rate), loss, metrics=["accuracy"])
    return model


def stop_early():
    """Returns Keras' own callback for the routes without keras_tl."""
    return keras.callbacks.EarlyStopping(patience=PATIENCE, restore_best_weights=True)


def unfreeze(*learning_rate, **arguments):
    """Returns the callback that makes the difference."""
    return UnfreezeAtConvergence(
        *learning_rate,
        patience=PATIENCE,
        max_frozen_epochs=EPOCHS // 2,
        fine_tune_patience=PATIENCE,
        verbose=0,
        **arguments,
    )


def unfreeze_gradually(backbone):
    """Returns the same with a stage for each of the three blocks, each slower than the last."""
    return unfreeze(stages=Stage.by_depth(backbone, 3, FINE_RATE, decay=0.5))


def unfreeze_by_layer(backbone):
    """Returns the same with a lower learning rate for each deeper block."""
    return unfreeze(layerwise_learning_rates(backbone, FINE_RATE, decay=0.5))


def split(images, labels, seed):
    """Returns the few labelled digits, those to validate on, and the held-out rest."""
    order = np.random.default_rng(seed).permutation(len(labels))
    parts = np.split(order, [LABELLED, LABELLED + VALIDATION])
    return [(images[part], labels[part]) for part in parts]


def transfer(backbone, learning_rate, callback, data):
    """Trains on the labelled digits. Returns the accuracy on the held-out ones."""
    train, validation, test = data
    model = compiled(backbone, learning_rate)
    model.fit(
        *train,
        batch_size=5,
        epochs=EPOCHS,
        validation_data=validation,
        validation_batch_size=VALIDATION,
        callbacks=[callback],
        verbose=0,
    )
    return model.evaluate(*test, batch_size=len(test[1]), verbose=0)[1]


def run(seed, low, high):
    """Returns the accuracy of each way, for one seed."""
    keras.utils.set_random_seed(seed)
    source = make_backbone()
    compiled(source, HEAD_RATE).fit(*low, batch_size=32, epochs=8, verbose=0)

    def pretrained():
        backbone = make_backbone()
        backbone.set_weights(source.get_weights())
        return backbone

    def frozen(callback):
        backbone = FrozenBackbone(pretrained())
        return backbone, HEAD_RATE, callback(backbone)

    ways = {
        "head only": frozen(lambda backbone: stop_early()),
        "keras_tl": frozen(lambda backbone: unfreeze(FINE_RATE)),
        "gradual unfreezing": frozen(unfreeze_gradually),
        "discriminative rates": frozen(unfreeze_by_layer),
        "no frozen stage": (pretrained(), FINE_RATE, stop_early()),
        "from scratch": (make_backbone(), HEAD_RATE, stop_early()),
    }
    data = split(*high, seed)
    accuracies = {}
    for name, way in ways.items():
        keras.utils.set_random_seed(seed)
        accuracies[name] = transfer(*way, data)
    return accuracies


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--seeds", type=int, default=2, help="how many seeds to average over")
    seeds = range(parser.parse_args().seeds)
    low, high = load()
    print(
        f"Transfer to the digits 5 to 9 with {LABELLED} labels, {VALIDATION} more to validate on."
    )
    results = []
    for seed in seeds:
        results.append(run(seed, low, high))
        print(f"seed {seed}: " + ", ".join(f"{k} {v:.3f}" for k, v in results[-1].items()))
    print(f"\n| {'way':20} | accuracy | spread |\n|{'-' * 22}|----------|--------|")
    for name in results[0]:
        accuracies = [result[name] for result in results]
        print(f"| {name:20} | {np.mean(accuracies):8.3f} | {np.std(accuracies):6.3f} |")


if __name__ == "__main__":
    main()
