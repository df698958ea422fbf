"""What a backup costs, as a ratio to Keras' BackupAndRestore.

Run by hand: `python -m tests.benchmarks.backup`. MobileNetV2 at 96x96, random weights and images:
how long `on_epoch_end` takes to write, in one `fit` with both kinds in turn.
"""

import pathlib
import tempfile

import keras

from keras_tl import FrozenBackbone, UnfreezeAtConvergence
from tests.benchmarks.timing import BATCH, REPEATS, SHAPE, images, print_table, seconds


class Ours(UnfreezeAtConvergence):
    """Ours, with a clock around the writing."""

    def _save(self, backup, epoch):
        self.taken.append(seconds(lambda: super(Ours, self)._save(backup, epoch)))


class Theirs(keras.callbacks.Callback):
    """What Keras' callback writes, with a clock around it."""

    def __init__(self, folder):
        super().__init__()
        self.other = keras.callbacks.BackupAndRestore(folder, delete_checkpoint=False)
        self.taken = []

    def on_epoch_end(self, epoch, logs=None):
        self.other.set_model(self.model)
        self.taken.append(seconds(lambda: self.other.on_epoch_end(epoch, logs)))


def ratios(frozen_epochs):
    keras.utils.set_random_seed(0)
    base = keras.applications.MobileNetV2(SHAPE, include_top=False, weights=None, pooling="avg")
    model = keras.Sequential([keras.Input(SHAPE), FrozenBackbone(base), keras.layers.Dense(1)])
    model.compile("adam", keras.losses.BinaryCrossentropy(from_logits=True))
    x, y = images(BATCH)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        theirs = Theirs(folder / "theirs")
        ours = Ours(
            max_frozen_epochs=frozen_epochs, monitor="loss", backup_dir=folder / "ours", verbose=0
        )
        ours.taken = []
        epochs = frozen_epochs + REPEATS + 1
        model.fit(x, y, BATCH, epochs=epochs, callbacks=[ours, theirs], verbose=0)
    pairs = list(zip(ours.taken, theirs.taken, strict=True))
    frozen, fine_tuned = pairs[1:frozen_epochs], pairs[frozen_epochs + 1 :]
    return [[one / other for one, other in part] for part in (frozen, fine_tuned)]


def main():
    frozen, fine_tuned = ratios(REPEATS + 1)
    print_table(
        [
            ("backup of a frozen epoch / BackupAndRestore", "", frozen),
            ("backup of a fine-tuned epoch / BackupAndRestore", "", fine_tuned),
        ]
    )


if __name__ == "__main__":
    main()
