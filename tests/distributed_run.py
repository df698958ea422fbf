"""One process of runs on JAX: `python -m tests.distributed_run FOLDER SETTINGS PROCESS`.

SETTINGS is JSON, as `Run` in `test_jax_distribution` makes it. What came out is written to
FOLDER/result-PROCESS.json; what keras_tl says is all that is printed.
"""

import hashlib
import json
import os
import pathlib
import signal
import sys
import time

import keras
import numpy as np
import tensorflow as tf

from keras_tl import (
    FreezeGuard,
    FrozenBackbone,
    Stage,
    UnfreezeAtConvergence,
)
from keras_tl.backup import snapshots as backups
from keras_tl.internals.values import on_host
from tests import models

SAMPLES, BATCH, EPOCHS = 24, 8, 9
LEARNING_RATE, EPSILON = 0.3, 0.1
# In which epoch a process dies, after the switch.
DIES_IN = 6
# How long the others wait for one that has died, in seconds.
PATIENCE = 10


def schedule(name):
    """How the backbone is unfrozen: arguments of the callback."""
    converged = {"learning_rate": 0.05, "min_delta": 0.02, "patience": 1}
    stages = [Stage(1, 0.1, epochs=2), Stage("all", 0.05)]
    return {
        "one rate": converged,
        "groups": {**converged, "head_learning_rate": 0.1},
        "stages": {"stages": stages, "max_frozen_epochs": 2},
    }[name]


def join(settings, process):
    """Becomes one of several processes."""
    address, processes = settings["address"], settings["processes"]
    if settings["dies"] is None:
        keras.distribution.initialize(address, processes, process)
        return
    import jax

    # What Keras calls, which has no setting for this. JAX would wait for 100 and 300 seconds.
    jax.distributed.initialize(
        address,
        processes,
        process,
        heartbeat_timeout_seconds=PATIENCE,
        shutdown_timeout_seconds=PATIENCE,
    )


def distribution(layout):
    """Returns nothing, or what distributes the data, or over a mesh of devices the model too."""
    if layout is None:
        return None
    if layout == "data":
        return keras.distribution.DataParallel()
    layouts = keras.distribution.LayoutMap(
        keras.distribution.DeviceMesh(tuple(layout), ("batch", "model"))
    )
    # And the optimizer's slots, in whose names these are.
    layouts[".*dense.*kernel.*"] = (None, "model")
    layouts[".*dense.*bias.*"] = ("model",)
    return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")


class Misled(keras.callbacks.Callback):
    """Has all processes but the first see a `val_loss` that goes on falling."""

    def on_epoch_end(self, epoch, logs=None):
        import jax

        logs["measured"] = logs["val_loss"]
        logs["val_loss"] -= jax.process_index() * epoch


class Dies(keras.callbacks.Callback):
    """Ends the process in the middle of an epoch: a "kill", or an error."""

    def __init__(self, how):
        super().__init__()
        self.how, self.epoch = how, None

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == (DIES_IN, 1):
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("It dies.")


def changes_in(folder):
    """Returns a list that gets how this process makes, renames and removes what is in a folder."""
    events = []

    def hook(event, arguments):
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if changes and os.fspath(arguments[0]).startswith(str(folder)):
            events.append(event)

    sys.addaudithook(hook)
    return events


def delete_late():
    """Has backups be deleted some time after the other processes have gone on."""
    delete = backups.Backup.delete

    def late(backup):
        time.sleep(2)
        delete(backup)

    backups.Backup.delete = late


def build():
    """A model with statistics of the whole batch, and random masks."""
    keras.utils.set_random_seed(0)
    backbone = FrozenBackbone(models.functional(["dense", "batchnorm", "dense"]))
    head = [keras.layers.BatchNormalization(momentum=0.5), keras.layers.Dropout(0.3)]
    model = models.functional_outer(backbone, head)
    # With Keras' epsilon of 1e-7 a gradient that is nothing but rounding counts as a large one.
    model.compile(keras.optimizers.Adam(LEARNING_RATE, epsilon=EPSILON), "mse")
    return model


def batches():
    """Inputs and targets, in the same order always."""
    random = np.random.default_rng(0)
    x = random.normal(size=(SAMPLES, models.FEATURES)).astype("float32")
    return tf.data.Dataset.from_tensor_slices((x, x[:, :1] * x[:, 1:2])).batch(BATCH)


def run(schedule_name, layout, backup, fits, callbacks):
    """Trains as these say, with one `fit` or more. Returns what came out."""
    keras.distribution.set_distribution(distribution(layout))
    model = build()
    # To the last epoch, in which a process that dies has died and resumed.
    settings = schedule(schedule_name) | {"fine_tune_patience": None}
    ours = UnfreezeAtConvergence(**settings, backup_dir=backup)
    for _ in range(fits):
        fit = model.fit(
            batches(),
            epochs=EPOCHS,
            validation_data=batches(),
            callbacks=[Misled(), *callbacks, ours, FreezeGuard()],
            shuffle=False,
            verbose=0,
        )
    weights = [on_host(weight) for weight in model.weights]
    return {
        "digest": hashlib.sha256(b"".join(value.tobytes() for value in weights)).hexdigest(),
        "weights": [value.tolist() for value in weights],
        "spread": [w.path for w in model.weights if not w.value.sharding.is_fully_replicated],
        "devices": len(model.weights[0].value.sharding.device_set),
        "measured": fit.history["measured"],
        "stage": fit.history["stage"],
        "transitions": [[one.epoch, one.stage, one.reason, one.value] for one in ours.transitions],
    }


def main(folder, settings, process):
    folder, settings, process = pathlib.Path(folder), json.loads(settings), int(process)
    if settings["processes"] > 1:
        join(settings, process)
    backup = folder / settings["backups"][process] if settings["backups"] else None
    victim, how = settings["dies"] or (None, None)
    callbacks = [Dies(how)] if process == victim else []
    if settings["fits"] > 1:
        delete_late()
    changes = changes_in(backup)
    results = [run(*one, backup, settings["fits"], callbacks) for one in settings["runs"]]
    (folder / f"result-{process}.json").write_text(
        json.dumps({"runs": results, "changes": changes})
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
