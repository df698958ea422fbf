"""A run that is killed while it fine-tunes, started again, and ends as if nothing had happened.

The program trains the same model twice in child processes: once undisturbed, and once killed with
SIGKILL in the middle of fine-tuning and started again with the same command. `backup_dir` is all it
takes: the second start resumes in the stage, at the epoch and with the optimizer that were backed
up. Both runs end with the same weights, bit for bit.

    python examples/resume.py
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import h5py
import keras
import numpy as np

from keras_tl import FrozenBackbone, UnfreezeAtConvergence

EPOCHS = 8


class KillAt(keras.callbacks.Callback):
    """Kills this process in the middle of an epoch, as a machine that is taken away would."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.now, batch) == (self.epoch, 2):
            print(f"epoch {self.now + 1}: killed after 3 steps", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder, kill_at):
    """Trains, or resumes, and writes the final weights into the folder."""
    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    x = random.normal(size=(256, 8)).astype("float32")
    y = x[:, :1] * x[:, 1:2]
    layers = [keras.layers.Dense(32, activation="tanh"), keras.layers.BatchNormalization()]
    backbone = FrozenBackbone(keras.Sequential([keras.Input((8,)), *layers], name="pretrained"))
    model = keras.Sequential([keras.Input((8,)), backbone, keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    callbacks = [
        UnfreezeAtConvergence(1e-3, max_frozen_epochs=3, backup_dir=folder / "backup"),
        KillAt(kill_at),
    ]
    # Data that `fit` shuffles may come in another order after a new start.
    fit = {"validation_split": 0.25, "shuffle": False, "callbacks": callbacks, "verbose": 0}
    model.fit(x, y, epochs=EPOCHS, **fit)
    model.save_weights(folder / "final.weights.h5")
    print(f"ended with loss {model.evaluate(x, y, verbose=0):.6f}")


def start(folder, kill_at, ends_with=0):
    """Starts the training in a process of its own, and waits for its end."""
    command = [sys.executable, __file__, "--folder", str(folder), "--kill-at", str(kill_at)]
    if subprocess.run(command, check=False).returncode != ends_with:
        sys.exit("The training did not end as it should.")


def final_weights(folder):
    """Returns the names and bytes of all arrays in the file of final weights."""
    found = {}

    def note(name, item):
        if isinstance(item, h5py.Dataset):
            found[name] = item[()].tobytes()

    with h5py.File(folder / "final.weights.h5") as file:
        file.visititems(note)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--folder", type=Path, help="train in this folder, in this process")
    parser.add_argument("--kill-at", type=int, default=-1, help="an epoch, counted from 0")
    parser.add_argument("--small", action="store_true", help="the same: it is small as it is")
    arguments = parser.parse_args()
    if arguments.folder:
        train(arguments.folder, arguments.kill_at)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folders = Path(scratch) / "undisturbed", Path(scratch) / "killed"
        for folder in folders:
            folder.mkdir()
        print("An undisturbed run:", flush=True)
        start(folders[0], kill_at=-1)
        print("\nThe same, killed in fine-tuning:", flush=True)
        start(folders[1], kill_at=5, ends_with=-signal.SIGKILL)
        print("\nStarted again:", flush=True)
        start(folders[1], kill_at=-1)
        first, second = (final_weights(folder) for folder in folders)
    if first != second:
        sys.exit("The weights differ.")
    print("\nThe final weights are equal, bit for bit.")


if __name__ == "__main__":
    main()
