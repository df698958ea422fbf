"""Beside other callbacks, KerasTuner, scikit-learn and loggers.

Callbacks that judge by themselves come before `UnfreezeAtConvergence`: an `EarlyStopping` there
that stops a stage (not the last) counts as convergence, and starts over in the next; a stop by any
other callback ends training. Those that write records come after it: then `CSVLogger`,
`TensorBoard`, MLflow's and Weights & Biases' callbacks get `stage` and the learning rates. What
would work against it (a `LearningRateScheduler` that writes the head's rate back, `EarlyStopping`
after it, `BackupAndRestore`) is warned of by name. The table of all is in `examples/README.md`.

KerasTuner copies callbacks for each trial: pass a backbone by name or function, and
`backup_dir="runs/{trial}"` for a folder of each; the one you hold has no `transitions`.
scikit-learn clones an estimator, and Keras' wrapper loses its `fit_kwargs` then: pass callbacks to
`fit`, or as `params`; the wrapper of scikeras keeps them. With MLflow it is

    with mlflow.start_run():
        callbacks = [UnfreezeAtConvergence(), mlflow.keras.MlflowCallback()]
        model.fit(x, y, validation_data=val, epochs=50, callbacks=callbacks)

and `wandb.integration.keras.WandbMetricsLogger()` goes in the same place. What is not installed is
left out here.

    python -m pip install keras-tuner scikit-learn
    python examples/guide/beside_other_tools.py
"""

import argparse
import csv
import os
import tempfile
from importlib.util import find_spec

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from keras_tl import FrozenBackbone, UnfreezeAtConvergence

X = np.random.default_rng(0).normal(size=(48, 4)).astype("float32")
Y = X[:, :1]


def build(hp=None, **of_scikit_learn):
    """Returns a compiled model, as a tuner and scikit-learn ask for it."""
    base = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, activation="tanh")])
    model = keras.Sequential([keras.Input((4,)), FrozenBackbone(base), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(hp.Float("rate", 1e-3, 1e-1) if hp else 1e-2), "mse")
    return model


def switch(**settings):
    """Returns the callback, which switches after two epochs at the latest."""
    return UnfreezeAtConvergence(1e-3, max_frozen_epochs=2, verbose=0, **settings)


def other_callbacks(folder):
    """EarlyStopping before, a log after: each epoch has its stage."""
    path = os.path.join(folder, "log.csv")
    callbacks = [
        keras.callbacks.EarlyStopping(patience=5),
        switch(),
        keras.callbacks.CSVLogger(path),
    ]
    build().fit(X, Y, validation_split=0.25, epochs=4, callbacks=callbacks, verbose=0)
    with open(path) as file:
        stages = [row["stage"] for row in csv.DictReader(file)]
    assert stages == ["0", "0", "1", "1"]
    print(f"CSVLogger after it: stages {', '.join(stages)}")


def tuner(folder):
    """Each trial is a run with a backup of its own."""
    import keras_tuner

    search = keras_tuner.RandomSearch(build, "val_loss", max_trials=2, directory=folder)
    callback = switch(backup_dir=os.path.join(folder, "runs", "{trial}"))
    val = (X[32:], Y[32:])
    search.search(X[:32], Y[:32], validation_data=val, epochs=4, callbacks=[callback], verbose=0)
    trials = list(search.oracle.trials.values())
    assert [one.status for one in trials] == ["COMPLETED", "COMPLETED"]
    assert callback.transitions == [], "each trial has a copy"
    print(f"KerasTuner: {len(trials)} trials")


def scikit_learn():
    """Cross-validation: each fold is a run."""
    from sklearn.model_selection import cross_validate

    estimator = keras.wrappers.SKLearnRegressor(build)
    fitting = {"callbacks": [switch()], "validation_split": 0.25, "epochs": 4, "verbose": 0}
    scores = cross_validate(estimator, X, Y, params=fitting, cv=2, error_score="raise")
    assert len(scores["test_score"]) == 2
    print(f"scikit-learn: {len(scores['test_score'])} folds")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--small", action="store_true", help="the same: it is small as it is")
    parser.parse_args()
    keras.utils.set_random_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        other_callbacks(folder)
        if find_spec("keras_tuner"):
            tuner(folder)
    if find_spec("sklearn"):
        scikit_learn()
    print("Each of them sees one `fit`, with the switch in it.")


if __name__ == "__main__":
    main()
