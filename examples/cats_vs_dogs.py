"""Cats and dogs: the end-to-end example of Keras' guide to transfer learning, in one `fit`.

Xception with ImageNet weights at 150x150, Microsoft's pictures of cats and dogs (40% to train on,
10% to validate, 10% to test, as in https://keras.io/guides/transfer_learning/), random flips and
rotations. The head trains to convergence with Adam(1e-3), then the whole network with Adam(1e-5),
until that stops helping. `FreezeGuard` proves that nothing moved that should not have.

    python examples/cats_vs_dogs.py            # downloads 84 MB of weights and 787 MB of pictures
    python examples/cats_vs_dogs.py --weights FILE --data-dir FOLDER
    python examples/cats_vs_dogs.py --small    # random weights and drawn pictures, to try it out
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from keras_tl import FreezeGuard, FrozenBackbone, UnfreezeAtConvergence

DATA = (
    "https://download.microsoft.com/download/3/E/1/3E1C3F21-ECDB-4869-8368-6DEB77B919BB/"
    "kagglecatsanddogs_5340.zip"
)
WEIGHTS = (
    "https://storage.googleapis.com/tensorflow/keras-applications/xception/"
    "xception_weights_tf_dim_ordering_tf_kernels_notop.h5"
)


def find_data(data_dir):
    """Returns the folder that has a folder of cats and one of dogs, downloaded if need be."""
    if data_dir is None:
        try:
            found = keras.utils.get_file("kagglecatsanddogs_5340.zip", DATA, extract=True)
        except Exception as error:  # noqa: BLE001  Keras raises no narrower one.
            sys.exit(
                f"The pictures cannot be downloaded here ({error}). Fetch\n  {DATA}\nunpack it, "
                "and pass the folder that has those of cats and dogs: --data-dir .../PetImages"
            )
        data_dir = next(Path(found).parent.rglob("PetImages"))
    folders = [one for one in Path(data_dir).iterdir() if one.name.lower()[:3] in ("cat", "dog")]
    if len(folders) != 2:
        sys.exit(f"{data_dir} must have a folder of cats and one of dogs, such as Cat and Dog.")
    return Path(data_dir), folders


def remove_broken(folders):
    """Removes files that are no JPEG or PNG, of which the data set has some."""
    for file in (file for folder in folders for file in folder.iterdir()):
        begin = file.read_bytes()[:10]
        if b"JFIF" not in begin and not begin.startswith(b"\x89PNG"):
            print(f"removing {file}, which is no picture")
            file.unlink()


def load(data_dir, size, batch_size):
    """Returns pictures to train on, to validate on and to test on, in batches."""
    first, rest = keras.utils.image_dataset_from_directory(
        data_dir,
        label_mode="binary",
        image_size=(size, size),
        batch_size=batch_size,
        validation_split=0.2,
        subset="both",
        seed=0,
        verbose=False,
    )
    # The guide uses 60% of the pictures: 40, 10 and 10.
    return first.take((len(first) + 1) // 2), rest.shard(2, 0), rest.shard(2, 1)


def make_backbone(weights, size):
    """Returns Xception without its head."""
    shape = (size, size, 3)
    try:
        return keras.applications.Xception(include_top=False, input_shape=shape, weights=weights)
    except Exception as error:
        if weights != "imagenet":
            raise
        sys.exit(
            f"The weights cannot be downloaded here ({error}). Fetch\n  {WEIGHTS}\nand pass the "
            "file: --weights xception_weights_tf_dim_ordering_tf_kernels_notop.h5"
        )


def make_model(base, size):
    """Returns the guide's model, with the backbone in a FrozenBackbone."""
    layers = [
        keras.layers.RandomFlip("horizontal"),
        keras.layers.RandomRotation(0.1),
        keras.layers.Rescaling(scale=1 / 127.5, offset=-1),
        FrozenBackbone(base),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dropout(0.2),
        keras.layers.Dense(1),
    ]
    model = keras.Sequential([keras.Input((size, size, 3)), *layers])
    model.compile(
        keras.optimizers.Adam(),
        keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=[keras.metrics.BinaryAccuracy(threshold=0.0)],
    )
    return model


def draw_pictures(folder, count=20, size=80):
    """Writes pictures to try it out with: cats are round, dogs are square."""
    random = np.random.default_rng(0)
    row, column = np.mgrid[:size, :size]
    for name in ("Cat", "Dog"):
        (folder / name).mkdir()
        for number in range(count):
            x, y = np.abs(row - random.integers(25, 55)), np.abs(column - random.integers(25, 55))
            inside = np.hypot(x, y) < 20 if name == "Cat" else np.maximum(x, y) < 18
            image = random.integers(0, 100, (size, size, 3)) + 150 * inside[..., np.newaxis]
            keras.utils.save_img(folder / name / f"{number}.jpg", image, scale=False)


def run(data_dir, weights, size, batch_size, epochs, patience, max_frozen_epochs=None):
    """Trains, and prints how well the model does on the pictures to test on."""
    data_dir, folders = find_data(data_dir)
    remove_broken(folders)
    base = make_backbone(weights, size)
    train, validation, test = load(data_dir, size, batch_size)
    model = make_model(base, size)
    callbacks = [
        UnfreezeAtConvergence(
            1e-5,
            patience=patience,
            fine_tune_patience=patience,
            max_frozen_epochs=max_frozen_epochs,
        ),
        FreezeGuard(),
    ]
    history = model.fit(
        train, validation_data=validation, epochs=epochs, callbacks=callbacks, verbose=2
    )
    measured = history.history["val_binary_accuracy"]
    frozen = [one for one, stage in zip(measured, history.history["stage"]) if stage == 0]
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
        run(arguments.data_dir, arguments.weights, size=150, batch_size=32, epochs=50, patience=3)
        return
    with tempfile.TemporaryDirectory() as folder:
        draw_pictures(Path(folder))
        small = {"size": 71, "batch_size": 4, "epochs": 3, "max_frozen_epochs": 2}
        run(folder, weights=None, patience=3, **small)


if __name__ == "__main__":
    main()
