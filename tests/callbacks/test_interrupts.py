"""Ctrl-C, and one callback object in many places."""

import hashlib
import pickle
import subprocess
import sys
import textwrap
import threading

import keras
import numpy as np
import pytest

from keras_tl import (
    FreezeGuard,
    FrozenBackbone,
    Stage,
    UnfreezeAtConvergence,
)
from tests import models
from tests.shared import as_bytes, regression_data, values_of

X, Y = regression_data()
EPOCHS = 4


def build():
    keras.utils.set_random_seed(0)
    wrapper = FrozenBackbone(models.functional(["dense", "batchnorm", "dense"]))
    model = models.functional_outer(wrapper, [keras.layers.Dropout(0.3)])
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "mse")
    return model, wrapper


def ours(**arguments):
    return UnfreezeAtConvergence(1e-3, **{"max_frozen_epochs": 2, "verbose": 0} | arguments)


def fit(model, *callbacks, epochs=EPOCHS):
    return model.fit(
        X,
        Y,
        batch_size=8,
        validation_batch_size=len(X),
        epochs=epochs,
        shuffle=False,
        validation_data=(X, Y),
        callbacks=list(callbacks),
        verbose=0,
    ).history


@pytest.mark.eager
@pytest.mark.parametrize(
    "hook",
    [
        "on_epoch_begin",
        pytest.param("on_train_batch_begin", marks=pytest.mark.slow),
        "on_train_batch_end",
    ],
)
@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_ctrl_c_leaves_the_model_as_it_was_trained(hook, stage):
    model, wrapper = build()
    callback = ours()
    left = []

    def interrupt(*_, **__):
        if callback.stage == stage and len(seen) > 2 * (2 * stage + 1):
            # On JAX the values are with the model only after the callback's property was read.
            left.append(as_bytes(stops.model.weights))
            raise KeyboardInterrupt
        seen.append(hook)

    seen = []
    stops = keras.callbacks.Callback()
    setattr(stops, hook, interrupt)
    if hook == "on_epoch_begin":
        seen = [None] * 10 if stage else [None] * 3
    with pytest.raises(KeyboardInterrupt):
        fit(model, callback, stops)
    assert as_bytes(model.weights) == left[0]
    assert bool(wrapper.trainable_weights) == bool(stage)

    assert np.isfinite(model.evaluate(X, Y, verbose=0))
    assert np.isfinite(model.predict(X, verbose=0)).all()
    history = fit(model, ours(), FreezeGuard(verbose=0))
    assert len(history["loss"]) == EPOCHS
    assert history["stage"][0] == stage


@pytest.mark.eager
@pytest.mark.parametrize("new", [False, True])
def test_a_warm_up_that_was_interrupted_is_over_in_the_next_fit(new):
    model, _ = build()
    callback = ours(warmup_steps=100)

    def interrupt(batch, logs=None):
        if callback.stage == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, callback, keras.callbacks.LambdaCallback(on_train_batch_end=interrupt))
    assert float(model.optimizer.learning_rate) < 1e-4
    history = fit(model, ours() if new else callback, epochs=1)
    assert history["stage"] == [1]
    np.testing.assert_allclose(history["learning_rate"], [1e-3], rtol=1e-6)


@pytest.mark.eager
def test_one_callback_for_several_models():
    callback = ours()
    expected = build()[0]
    fit(expected, ours())
    for _ in range(2):
        model, _ = build()
        fit(model, callback)
        assert values_of(model) == values_of(expected)
        assert len(callback.transitions) == 1


@pytest.mark.slow
def test_fits_in_threads():
    models_and_errors = []

    def train():
        try:
            model = trained.pop()
            fit(model, ours(), FreezeGuard(verbose=0))
            models_and_errors.append(model)
        except BaseException as error:
            models_and_errors.append(error)
            raise

    trained = [build()[0] for _ in range(2)]
    threads = [threading.Thread(target=train) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert all(isinstance(one, keras.Model) for one in models_and_errors)
    for model in models_and_errors:
        assert models.frozen_backbone_of(model).trainable_weights


CHILD = """
    import hashlib, pickle, sys
    from tests.callbacks import test_interrupts as here
    with open(sys.argv[1], "rb") as file:
        callback = pickle.load(file)
    model, _ = here.build()
    here.fit(model, callback)
    print(hashlib.sha256(b"".join(here.values_of(model))).hexdigest())
"""


@pytest.mark.slow
def test_pickled_into_a_child_process_it_does_the_same(tmp_path):
    callback = UnfreezeAtConvergence(
        stages=[Stage(1, 1e-3, epochs=1), Stage("all", 1e-4)],
        warmup_steps=2,
        max_frozen_epochs=1,
        verbose=0,
    )
    (tmp_path / "callback.pickle").write_bytes(pickle.dumps(callback))
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path / "callback.pickle")],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    model, _ = build()
    fit(model, callback)
    assert output.split()[-1] == hashlib.sha256(b"".join(values_of(model))).hexdigest()


SCRIPT = """
    import sys, pickle
    import keras, keras_tl, numpy as np
    model = keras.saving.load_model(sys.argv[1])
    assert type(model.optimizer).__name__ == "GroupOptimizer", model.optimizer
    names = [weight.path.split("/")[-1] for weight in model.trainable_weights]
    assert len(names) == 6, names
    np.save(sys.argv[2], model.predict(np.ones((3, 4)), verbose=0))
"""


@pytest.mark.slow
@pytest.mark.eager
def test_a_file_needs_nothing_but_keras_tl(tmp_path):
    model, _ = build()
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "last.keras")
    callback = ours(head_learning_rate=1e-3, restore_best_weights=False)
    fit(model, callback, checkpoint)
    paths = [str(tmp_path / "last.keras"), str(tmp_path / "predicted.npy")]
    subprocess.run([sys.executable, "-c", textwrap.dedent(SCRIPT), *paths], check=True, timeout=120)
    expected = model.predict(np.ones((3, 4)), verbose=0)
    assert np.array_equal(np.load(paths[1]), expected)
