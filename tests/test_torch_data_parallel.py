"""Two processes that train one model on torch, as Keras 3.16 has it, in processes of their own."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap
from importlib import util

import keras
import numpy as np
import pytest

from tests.test_jax_distribution import free_port

_TRAINER = pathlib.Path(keras.__file__).parent / "src" / "backend" / "torch" / "trainer.py"

pytestmark = pytest.mark.skipif(
    util.find_spec("torch") is None or "ddp_model" not in _TRAINER.read_text(),
    reason="Keras wraps models in torch's DistributedDataParallel since 3.16.",
)

PROGRAM = """
    import json, sys
    import keras, numpy as np, tensorflow as tf

    address, process, path = sys.argv[1:]
    if address:
        keras.distribution.initialize(address, 2, int(process))
        keras.distribution.set_distribution(keras.distribution.DataParallel())

    from keras_tl import FreezeGuard, FrozenBackbone, UnfreezeAtConvergence, fine_tune
    from tests import models

    def build():
        keras.utils.set_random_seed(0)
        backbone = FrozenBackbone(models.functional(["dense", "dense"]))
        model = models.functional_outer(backbone)
        model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
        return model

    x = np.random.default_rng(0).normal(size=(24, models.FEATURES)).astype("float32")
    # In one batch, so that all processes together have the same one however Keras divides the data.
    data = tf.data.Dataset.from_tensor_slices((x, x[:, :1])).batch(len(x))
    settings = dict(learning_rate=0.1, max_frozen_epochs=2, fine_tune_patience=None, verbose=0)

    def by_callback(model):
        callbacks = [UnfreezeAtConvergence(**settings), FreezeGuard(verbose=0)]
        return model.fit(data, epochs=5, validation_data=data, callbacks=callbacks, verbose=0)

    def in_one_call(model):
        return fine_tune(model, data, epochs=5, validation_data=data, record=True, **settings)

    found = []
    for train in (by_callback, in_one_call):
        model = build()
        before = keras.ops.convert_to_numpy(model.weights[0])
        logs = train(model).history
        weights = [keras.ops.convert_to_numpy(weight) for weight in model.weights]
        found.append({
            "stage": logs["stage"],
            "val_loss": logs["val_loss"],
            "moved": float(abs(weights[0] - before).max()),
            "weights": [weight.tolist() for weight in weights],
        })
    with open(path, "w") as file:
        json.dump(found, file)
"""


def run(folder, processes):
    """Trains in some processes. Returns what came out, of each."""
    address = f"127.0.0.1:{free_port()}" if processes > 1 else ""
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), address]
    paths = [folder / f"{processes}-{process}.json" for process in range(processes)]
    started = [
        subprocess.Popen([*command, str(process), str(path)], env=environment)
        for process, path in enumerate(paths)
    ]
    try:
        assert [one.wait(200) for one in started] == [0] * processes
    finally:
        for one in started:
            one.kill()
    return [json.loads(path.read_text()) for path in paths]


def test_processes_fine_tune_one_backbone(tmp_path):
    (alone,) = run(tmp_path, 1)
    chief, other = run(tmp_path, 2)
    assert chief == other
    for result, expected in zip(chief, alone, strict=True):
        assert result["stage"] == expected["stage"] == [0, 0, 1, 1, 1]
        assert result["moved"] > 1e-3
        # A batch is summed up in two halves: some roundings of numbers of order one in ten steps.
        np.testing.assert_allclose(result["val_loss"], expected["val_loss"], rtol=0, atol=1e-5)
        for values, others in zip(result["weights"], expected["weights"], strict=True):
            np.testing.assert_allclose(values, others, rtol=0, atol=1e-5)
