"""Cats and dogs: the end-to-end example of Keras' guide to transfer learning, in one `fit`.

Xception with ImageNet weights at 150x150, Microsoft's pictures of cats and dogs (40% to train on,
10% to validate, 10% to test, as in https://keras.io/guides/transfer_learning/), random flips and
rotations. The head trains to convergence with Adam(1e-3), then the whole network with Adam(1e-5),
until that stops helping. `FreezeGuard` proves that nothing moved that should not have.

    python examples/cats_vs_dogs.py            # downloads 84 MB of weights and 787 MB of pictures
    python examples/cats_vs_dogs.py --weights FILE --data-dir FOLDER
    python examples/cats_vs_dogs.py --small    # random weights and drawn pictures, to try it out

Files that cannot be read as pictures, of which there are some, are left out.
"""

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from keras_tl import FreezeGuard, FrozenBackbone, UnfreezeAtConvergence

# Keras says so in the first epoch: it cannot know how many pictures are left out.
warnings.filterwarnings("ignore", "Your input ran out of data")

DATA = (
    "https://download.microsoft.com/download/3/E/1/3E1C3F21-ECDB-4869-8368-6DEB77B919BB/"
    "kagglecatsanddogs_5340.zip"
)
WEIGHTS = (
    "https://storage.googleapis.com/tensorflow/keras-applications/xception/"
    "xception_weights_tf_dim_ordering_tf_kernels_notop.h5"
)


def find_data():
    """Returns the folder of the data set, downloaded if need be."""
    try:
        return Path(keras.utils.get_file(DATA.rsplit("/", 1)[1], DATA, extract=True)) / "PetImages"
    except Exception as error:  # noqa: BLE001  Keras raises no narrower one.
        sys.exit(
            f"The pictures cannot be downloaded here: {error}\nFetch\n  {DATA}\nunpack it, and "
            "pass the folder that has the folders Cat and Dog: --data-dir .../PetImages"
        )


def load(data_dir, size, batch_size):
    """Returns pictures to train on, to validate on and to test on, in batches."""
    names = sorted(one.name for one in Path(data_dir).iterdir() if one.is_dir())
    if names not in (["Cat", "Dog"], ["cats", "dogs"]):
        sys.exit(f"{data_dir} must have two folders, Cat and Dog (or cats and dogs), no others.")
    first, rest = keras.utils.image_dataset_from_directory(
        data_dir,
        label_mode="binary",
        image_size=(size, size),
        batch_size=None,
        validation_split=0.2,
        subset="both",
        seed=0,
        verbose=False,
    )
    # The guide uses 60% of the pictures: 40, 10 and 10.
    parts = first.take(len(first) // 2), rest.shard(2, 0), rest.shard(2, 1)
    return [part.ignore_errors().batch(batch_size).prefetch(2) for part in parts]


def make_backbone(weights, size):
    """Returns Xception without its head."""
    shape = (size, size, 3)
    try:
        return keras.applications.Xception(include_top=False, input_shape=shape, weights=weights)
    except Exception as error:
        if weights != "imagenet":
            raise
        sys.exit(
            f"The weights cannot be downloaded here: {error}\nFetch\n  {WEIGHTS}\nand pass the "
            "file: --weights xception_weights_tf_dim_ordering_tf_kernels_notop.h5"
        )


def make_model(base):
    """Returns the guide's model, with the backbone in a FrozenBackbone."""
    model = keras.Sequential(
        [
            keras.Input(base.input_shape[1:]),
            keras.layers.RandomFlip("horizontal"),
            keras.layers.RandomRotation(0.1),
            keras.layers.Rescaling(scale=1 / 127.5, offset=-1),
            FrozenBackbone(base),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dropout(0.2),
            keras.layers.Dense(1),
        ]
    )
    model.compile(
        keras.optimizers.Adam(),
        keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=[keras.metrics.BinaryAccuracy(threshold=0.0)],
    )
    return model


def draw_pictures(folder, count=20, size=80):
    """Writes pictures to try it out with: cats are round, dogs are square, one is broken."""
    random = np.random.default_rng(0)
    row, column = np.mgrid[:size, :size]
    for name in ("Cat", "Dog"):
        (folder / name).mkdir()
        for number in range(count):
            x, y = np.abs(row - random.integers(25, 55)), np.abs(column - random.integers(25, 55))
            inside = np.hypot(x, y) < 20 if name == "Cat" else np.maximum(x, y) < 18
            image = random.integers(0, 100, (size, size, 3)) + 150 * inside[..., np.newaxis]
            keras.utils.save_img(folder / name / f"{number}.jpg", image, scale=False)
    (folder / "Cat" / "broken.jpg").touch()


def run(model, data, epochs, **settings):
    """Trains, and prints how well the model does."""
    train, validation, test = data
    unfreeze = UnfreezeAtConvergence(1e-5, patience=3, fine_tune_patience=3, **settings)
    fit = {"epochs": epochs, "callbacks": [unfreeze, FreezeGuard()], "verbose": 2}
    logs = model.fit(train, validation_data=validation, shuffle=False, **fit).history
    measured = logs["val_binary_accuracy"]
    frozen = [one for one, stage in zip(measured, logs["stage"]) if stage == 0]
    print(f"best accuracy on validation: {max(frozen):.4f} frozen, {max(measured):.4f} at all")
    print(f"accuracy on test: {model.evaluate(test, verbose=0)[1]:.4f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--weights", default="imagenet", help="a file with Xception's weights")
    parser.add_argument("--data-dir", type=Path, help="a folder with folders of cats and dogs")
    parser.add_argument("--small", action="store_true", help="random weights, drawn pictures")
    arguments = parser.parse_args()
    keras.utils.set_random_seed(0)
    if not arguments.small:
        data = load(arguments.data_dir or find_data(), size=150, batch_size=32)
        run(make_model(make_backbone(arguments.weights, size=150)), data, epochs=50)
        return
    with tempfile.TemporaryDirectory() as folder:
        draw_pictures(Path(folder))
        data = load(folder, size=71, batch_size=4)
        run(make_model(make_backbone(None, size=71)), data, epochs=3, max_frozen_epochs=2)


if __name__ == "__main__":
    main()
