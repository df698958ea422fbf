"""Resuming: a run with a `backup_dir` that is started again continues where it was.

After each epoch the whole state of the run becomes the current backup in one step: weights,
optimizer, stage, counters, best weights, seeds of the model. The same script, started again after
it was interrupted or killed, continues with the next epoch, in its stage, with its learning rates,
and ends with the same weights, bit for bit, given the same order of the data (that which `fit`
shuffles may come in another). The backup before is kept too, and used if the newest is damaged. It
is JSON and HDF5, no code. When training has ended the backup is deleted, unless
`delete_checkpoint=False`.

A backup knows its run, so give each run a folder of its own, and draw splits with a seed. More
`epochs`, `verbose` and other callbacks may change; another model, setting, seed, fold of the data,
number of processes or backend is an error that says what differs. Another checkpoint is one where
both runs set a seed, and a warning otherwise. Asked for fewer `epochs` than are done, `fit` warns,
trains nothing, gives the model the weights of that run, and keeps the backup. Of generators and
`PyDataset` it knows the number of steps only. Other callbacks' state is not in it: an
`EarlyStopping` beside it starts over. Keras' `BackupAndRestore` cannot do this: it resumes such a
run frozen again, at the head's rate. `examples/resume.py` kills the process instead.

    python examples/guide/resuming.py
"""

import argparse
import os
import tempfile
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from keras_tl import FrozenBackbone, UnfreezeAtConvergence

X = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
Y = X[:, :1] * X[:, 1:2]


class Interruption(Exception):
    """What an interruption raises here."""


class Interrupt(keras.callbacks.Callback):
    """Interrupts training in the middle of an epoch."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.now == self.epoch:
            raise Interruption


def train(backup_dir, *beside, learning_rate=1e-3, epochs=8, seed=0):
    """Trains, or resumes: what a script does from its first line on. Returns weights and stages."""
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Dense(16, activation="tanh"), keras.layers.BatchNormalization()]
    backbone = FrozenBackbone(keras.Sequential([keras.Input((8,)), *layers], name="base"))
    model = keras.Sequential([keras.Input((8,)), backbone, keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    callback = UnfreezeAtConvergence(learning_rate, max_frozen_epochs=3, backup_dir=backup_dir)
    fit = {"validation_split": 0.25, "shuffle": False, "verbose": 0}
    history = model.fit(X, Y, epochs=epochs, callbacks=[*beside, callback], **fit).history
    return [keras.ops.convert_to_numpy(one).tobytes() for one in model.weights], history


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--small", action="store_true", help="the same: it is small as it is")
    parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        undisturbed, _ = train(f"{folder}/one")

        backup = f"{folder}/two"
        try:
            train(backup, Interrupt(epoch=5))
        except Interruption:
            print("Interrupted in epoch 6, in fine-tuning.\n")

        for changed in ({"learning_rate": 1e-4}, {"seed": 1}):
            try:
                train(backup, **changed)
            except ValueError as error:
                print(f"{changed}: {str(error).splitlines()[0][:150]}...\n")
            else:
                raise AssertionError("That is another run.")

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(backup, epochs=2)
        (said,) = [str(one.message) for one in caught if "epochs done" in str(one.message)]
        print(f"fewer epochs: {said}\n")

        resumed, history = train(backup)
        assert len(history["loss"]) == 3, "epochs 6 to 8"
        assert resumed == undisturbed
        assert not os.path.exists(backup), "the backup of a run that has ended is deleted"
    print("Resumed, it ended with the same weights, bit for bit.")


if __name__ == "__main__":
    main()
