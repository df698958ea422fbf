"""Several devices in one machine: the same `fit`, whose switch all of them make together.

On TensorFlow it is `tf.distribute.MirroredStrategy`, on JAX `keras.distribution.DataParallel`, or
`ModelParallel` for a model that is too large for one device. This program makes two devices out of
one CPU. Several machines need JAX (`examples/multi_host.py`);
`tf.distribute.MultiWorkerMirroredStrategy` does not work with Keras 3 at all
(https://github.com/keras-team/keras/issues/20585).

Every batch is split over the devices, and `ModelParallel` splits the weights too; each process also
keeps the best weights (and `FreezeGuard` the frozen ones) whole in host memory. All processes
decide by the first one's monitored value, so they switch at the same epoch; their weights are equal
bit for bit, and those of one device but for rounding. The first process alone prints and writes
`backup_dir`, which must be on a disk that all share. Pass a batched `tf.data.Dataset` in the same
order everywhere (shuffle with a seed), whose batches all devices can share evenly. If a process is
killed the others end with an error, by JAX's defaults after up to 100 seconds (300 if it ended with
an error); start all again and they continue from the backup. Recorded features are for one process,
whose parts (`shard=`) can come from several. Tested on CPU devices, and two processes on loopback.

    python examples/guide/several_devices.py
    KERAS_BACKEND=jax python examples/guide/several_devices.py
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"  # Two devices for JAX.

import contextlib

import keras
import numpy as np
import tensorflow as tf

from keras_tl import FreezeGuard, FrozenBackbone, UnfreezeAtConvergence


def two_devices():
    """Returns a context in which models are made for two devices."""
    if keras.backend.backend() == "jax":
        keras.distribution.set_distribution(keras.distribution.DataParallel())
        return contextlib.nullcontext()
    cpu = tf.config.list_physical_devices("CPU")[0]
    halves = [tf.config.LogicalDeviceConfiguration() for _ in range(2)]
    tf.config.set_logical_device_configuration(cpu, halves)
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--small", action="store_true", help="the same: it is small as it is")
    parser.parse_args()
    if keras.backend.backend() == "torch":
        print("Keras trains on several devices on TensorFlow and JAX. stages [0, 0, 1, 1]: not run")
        return
    devices = two_devices()  # Before TensorFlow makes the first tensor.
    x = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
    data = tf.data.Dataset.from_tensor_slices((x, x[:, :1])).batch(16, drop_remainder=True)
    with devices:
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Dense(8, activation="tanh"), keras.layers.BatchNormalization()]
        backbone = FrozenBackbone(keras.Sequential([keras.Input((8,)), *layers], name="base"))
        model = keras.Sequential([keras.Input((8,)), backbone, keras.layers.Dense(1)])
        model.compile(keras.optimizers.Adam(1e-2), "mse")
    callbacks = [UnfreezeAtConvergence(1e-3, max_frozen_epochs=2), FreezeGuard()]
    history = model.fit(
        data, validation_data=data, epochs=4, callbacks=callbacks, shuffle=False, verbose=0
    ).history
    assert history["stage"] == [0, 0, 1, 1]
    print(f"two devices, one `fit`: stages {history['stage']}")


if __name__ == "__main__":
    main()
