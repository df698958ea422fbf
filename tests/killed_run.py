"""A run that can be killed and started again: `python -m tests.killed_run FOLDER [WHERE:CALL]`.

It trains with a backup in FOLDER and writes what came out to FOLDER/result.json. WHERE:CALL has it
kill itself at that call of one of the functions below.
"""

import hashlib
import json
import os
import pathlib
import signal
import sys

import keras

from keras_tl import (
    FreezeGuard,
    FrozenBackbone,
    Stage,
    UnfreezeAtConvergence,
)
from keras_tl.backup import snapshots as backup
from keras_tl.backup import temporary_folders
from keras_tl.stages import switching
from tests import models
from tests.shared import regression_data, values_of

PLACES = {
    "write": (backup.os, "fsync"),
    "rename": (backup.pathlib.Path, "rename"),
    "remove": (temporary_folders.shutil, "rmtree"),
    "switch": (switching, "renew_training"),
    "restore": (switching, "restore_training"),
    "batch": (keras.callbacks.CallbackList, "on_train_batch_end"),
}
EPOCHS = 8


def kill_at(owner, name, call):
    """Has the process kill itself in the middle of the call-th call of a function."""
    function, calls = getattr(owner, name), []

    def killing(*arguments, **keywords):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)

    setattr(owner, name, killing)


def main(folder, place=None):
    if place is not None:
        where, call = place.split(":")
        kill_at(*PLACES[where], int(call))
    folder = pathlib.Path(folder)
    keras.utils.set_random_seed(0)
    wrapper = FrozenBackbone(models.functional(["dense", "batchnorm", "dense"]))
    model = models.functional_outer(wrapper, [keras.layers.Dropout(0.3)])
    model.compile(keras.optimizers.Adam(0.02), "mse", run_eagerly=True)
    head = {"head_learning_rate": 1e-2, "epochs": 2}
    ours = UnfreezeAtConvergence(
        stages=[Stage(1, 1e-2, **head), Stage("all", 5e-3, **head), Stage("all", 1e-3)],
        max_frozen_epochs=2,
        warmup_steps=5,
        backup_dir=folder / "backup",
        verbose=0,
    )
    x, y = regression_data(24)
    print("begins", flush=True)
    history = model.fit(
        x,
        y,
        batch_size=8,
        epochs=EPOCHS,
        shuffle=False,
        validation_data=(x, y),
        callbacks=[ours, FreezeGuard(verbose=0)],
        verbose=0,
    ).history
    result = {
        "weights": hashlib.sha256(b"".join(values_of(model))).hexdigest(),
        "history": history,
        "transitions": [[one.epoch, one.stage, one.value] for one in ours.transitions],
    }
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
