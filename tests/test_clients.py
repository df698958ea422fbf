"""Beside KerasTuner and scikit-learn, which copy callbacks and run `fit` many times."""

import keras
import numpy as np
import pytest

from keras_tl import FreezeGuard, FrozenBackbone, UnfreezeAtConvergence
from tests.shared import only_on

pytestmark = [
    pytest.mark.clients,
    pytest.mark.eager,
    only_on("tensorflow", "They call `fit` alike on every backend."),
]

_random = np.random.default_rng(0)
X = _random.normal(size=(48, 4)).astype("float32")
Y = (X[:, 0] > 0).astype("int32")


def build(dropout=0.1, outputs=1):
    base = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)], name="base")
    layers = [FrozenBackbone(base), keras.layers.Dropout(dropout)]
    model = keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(outputs, "sigmoid")])
    model.compile(keras.optimizers.Adam(1e-2), "binary_crossentropy", metrics=["accuracy"])
    return model


class DiesOnce(keras.callbacks.Callback):
    died = False

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2 and not DiesOnce.died:
            DiesOnce.died = True
            raise RuntimeError("out of memory")


@pytest.mark.covers("beside: KerasTuner")
def test_each_trial_of_a_search_has_a_backup_of_its_own(tmp_path, capsys):
    tuner_of = pytest.importorskip("keras_tuner")
    DiesOnce.died = False
    tuner = tuner_of.GridSearch(
        lambda hp: build(hp.Choice("dropout", [0.1, 0.2])),
        "val_loss",
        max_retries_per_trial=1,
        directory=tmp_path / "search",
    )
    switch = UnfreezeAtConvergence(max_frozen_epochs=1, backup_dir=tmp_path / "runs" / "{trial}")
    arguments = {"epochs": 4, "validation_data": (X, Y), "verbose": 0}
    tuner.search(X, Y, callbacks=[switch, FreezeGuard(), DiesOnce()], **arguments)

    trials = tuner.oracle.trials
    assert [trial.status for trial in trials.values()] == ["COMPLETED"] * 2
    first = next(iter(trials))
    said = capsys.readouterr().out
    assert f"resumes after epoch 2, in stage 1, from {str(tmp_path / 'runs' / first)!r}" in said
    assert said.count("resumes after") == 1  # The other trial has a run of its own.
    assert switch.transitions == []  # A copy of it ran.


def test_a_trial_is_needed_for_a_folder_by_trial(tmp_path):
    switch = UnfreezeAtConvergence(max_frozen_epochs=1, backup_dir=tmp_path / "{trial}", verbose=0)
    with pytest.raises(ValueError, match="`{trial}` in `backup_dir` is the trial of a KerasTuner"):
        build().fit(X, Y, validation_data=(X, Y), callbacks=[switch], verbose=0)


@pytest.mark.covers("beside: scikit-learn, by keras.wrappers")
def test_cross_validation_with_the_wrapper_of_keras():
    sklearn = pytest.importorskip("sklearn.model_selection")
    switch = UnfreezeAtConvergence(max_frozen_epochs=1, backbone="base", verbose=0)
    estimator = keras.wrappers.SKLearnClassifier(lambda X, y: build(outputs=2))
    # Not as `fit_kwargs`, which the wrapper loses where scikit-learn clones it.
    fitting = {"callbacks": [switch], "epochs": 2, "validation_split": 0.25, "verbose": 0}
    found = sklearn.cross_validate(
        estimator, X, Y, cv=2, params=fitting, return_estimator=True, error_score="raise"
    )
    for fitted in found["estimator"]:
        assert fitted.history_.history["stage"] == [0, 1]
    assert len(switch.transitions) == 1  # Of the last fold.


@pytest.mark.covers("beside: scikit-learn, by scikeras")
def test_scikeras_fits_copies():
    wrappers = pytest.importorskip("scikeras.wrappers")
    base = pytest.importorskip("sklearn.base")
    switch = UnfreezeAtConvergence(max_frozen_epochs=1, verbose=0)
    fitting = {"callbacks": [switch], "epochs": 2, "validation_split": 0.25, "verbose": 0}
    fitted = base.clone(wrappers.KerasClassifier(build, **fitting)).fit(X, Y)
    assert fitted.history_["stage"] == [0, 1]
