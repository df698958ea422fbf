"""Under MirroredStrategy, in a process of its own: collectives of two runs in one would collide."""

import os
import subprocess
import sys
import textwrap

import pytest

PREPARATION = """
    import numpy as np, keras, tensorflow as tf
    from keras_tl import FreezeGuard, FrozenBackbone, FrozenWeightsChangedError
    from keras_tl import StaleCompileError, UnfreezeAtConvergence
    from tests import models
    from tests.conftest import as_bytes, regression_data

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        wrapper = FrozenBackbone(models.functional(["dense", "batchnorm", "dense"]))
        model = models.functional_outer(wrapper)
        model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
    x, y = regression_data()
    fit = dict(batch_size=8, epochs=4, validation_data=(x, y), verbose=0)
"""

SWITCH = """
    before = dict(as_bytes(wrapper.weights))
    callback = UnfreezeAtConvergence(0.01, max_frozen_epochs=2, restore_best_weights=False)
    guard = FreezeGuard(check="batch")
    history = model.fit(x, y, callbacks=[callback, guard], **fit).history
    assert history["stage"] == [0, 0, 1, 1], history
    after = dict(as_bytes(wrapper.weights))
    moved = {path.split("/")[-1] for path in before if before[path] != after[path]}
    assert moved == {"kernel", "bias"}, moved
    assert model.optimizer._distribution_strategy.num_replicas_in_sync == 2
    print("done")
"""

GUARD = """
    kernel = wrapper.backbone.weights[0]
    replicas = kernel.value.values
    assert len(replicas) == 2
    before = as_bytes([kernel])

    def overwrite(epoch, logs):
        # On the second replica alone.
        replicas[1].assign_add(np.ones((4, 4), "float32"))

    fault = keras.callbacks.LambdaCallback(on_epoch_end=overwrite)
    try:
        model.fit(x, y, callbacks=[fault, FreezeGuard()], **fit)
    except FrozenWeightsChangedError as error:
        change, = error.changes
        assert (change.path, change.cause) == (kernel.path, "overwritten")
        assert round(change.largest_change, 5) == 1.0, change
    else:
        raise AssertionError("not seen")

    replicas[1].assign(replicas[0])
    guard = FreezeGuard(action="restore")
    model.fit(x, y, callbacks=[fault, guard], **fit)
    assert guard.restored == {kernel.path: 4}, guard.restored
    assert all(replica.numpy().tobytes() == before[0][1] for replica in replicas)

    wrapper.unfreeze()
    try:
        model.fit(x, y, callbacks=[FreezeGuard()], **fit)
    except StaleCompileError as error:
        assert len(error.not_training) == 4
    else:
        raise AssertionError("not seen")
    print("done")
"""


@pytest.mark.parametrize("script", [SWITCH, GUARD], ids=["switch", "guard"])
def test_under_mirrored_strategy(script):
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PREPARATION + script)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        timeout=300,
        check=False,
    )
    assert result.stdout.endswith("done\n"), result.stderr[-2000:]
