"""Under MirroredStrategy, in a process of its own: collectives of two runs in one would collide."""

import os
import subprocess
import sys
import textwrap

SCRIPT = """
    import numpy as np, keras, tensorflow as tf
    from keras_tl import FrozenBackbone, UnfreezeAtConvergence
    from tests import models
    from tests.conftest import as_bytes, regression_data

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        wrapper = FrozenBackbone(models.functional(["dense", "batchnorm", "dense"]))
        model = models.functional_outer(wrapper)
        model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
    x, y = regression_data()
    before = dict(as_bytes(wrapper.weights))
    callback = UnfreezeAtConvergence(0.01, max_frozen_epochs=2, restore_best_weights=False)
    fit = dict(batch_size=8, epochs=4, validation_data=(x, y), verbose=0)
    history = model.fit(x, y, callbacks=[callback], **fit).history
    assert history["stage"] == [0, 0, 1, 1], history
    after = dict(as_bytes(wrapper.weights))
    moved = {path.split("/")[-1] for path in before if before[path] != after[path]}
    assert moved == {"kernel", "bias"}, moved
    assert model.optimizer._distribution_strategy.num_replicas_in_sync == 2
    print("done")
"""


def test_switch_under_mirrored_strategy():
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        timeout=300,
        check=False,
    )
    assert result.stdout.endswith("done\n"), result.stderr[-2000:]
