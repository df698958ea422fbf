"""Transfer learning on several machines: one `fit`, whose backbone all unfreeze at one epoch.

`python examples/multi_host.py` shows it on one machine. It starts two processes, which talk over
loopback as two machines do over a network. On machines of your own, start it once on each, with the
address of the first one:

    python examples/multi_host.py --coordinator 10.0.0.1:1234 --processes 2 --process 0
    python examples/multi_host.py --coordinator 10.0.0.1:1234 --processes 2 --process 1

It needs JAX (`python -m pip install jax`), which is how Keras 3 trains on several machines. A small
network is pretrained to tell stripes of one set of directions apart, and transferred to another set
with few labels. Each process computes its share of every batch. The first process prints the
switch, and the accuracy on held-out images.

With `--backup-dir`, a folder on a disk that all machines share, the first process also keeps the
state of the run there. If a process dies, the others end with an error; start all of them again,
with the same arguments, and they resume where the backup was made.
"""

import argparse
import os
import socket
import subprocess
import sys
import warnings

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import keras
import numpy as np
import tensorflow as tf

from keras_tl import FreezeGuard, FrozenBackbone, UnfreezeAtConvergence

# Keras says so in the first epoch: it cannot tell how many batches a share has.
warnings.filterwarnings("ignore", "Your input ran out of data")

CLASSES, SIZE = 6, 12
# Of all processes together: a multiple of the number of all their devices.
BATCH = 48
# After how many seconds a process that has died ends the others.
PATIENCE = 30


def stripes(samples, first_angle, seed):
    """Returns noisy images of stripes in six directions, and which direction it is."""
    random = np.random.default_rng(seed)
    labels = random.integers(CLASSES, size=samples)
    angle = (first_angle + labels * np.pi / CLASSES)[:, None, None]
    wave = random.uniform(0.6, 1.2, (samples, 1, 1))
    phase = random.uniform(0, 2 * np.pi, (samples, 1, 1))
    row, column = np.mgrid[:SIZE, :SIZE]
    images = np.sin(wave * (column * np.cos(angle) + row * np.sin(angle)) + phase)
    images += random.normal(scale=1.0, size=images.shape)
    return images[..., np.newaxis].astype("float32"), labels


def batches(images, labels, shuffle=False):
    """Returns the batches of all processes: Keras hands each its share.

    They must come in the same order to all, so a seed is a must. Every batch must be whole.
    """
    data = tf.data.Dataset.from_tensor_slices((images, labels))
    if shuffle:
        data = data.shuffle(len(labels), seed=0)
    return data.batch(BATCH, drop_remainder=True)


def make_backbone():
    """Returns a small convolutional network with BatchNormalization."""
    layers = []
    for filters in (8, 16):
        layers += [
            keras.layers.Conv2D(filters, 3, padding="same", use_bias=False),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
            keras.layers.MaxPooling2D(),
        ]
    return keras.Sequential([keras.Input((SIZE, SIZE, 1)), *layers, keras.layers.Flatten()])


def compiled(backbone, learning_rate):
    """Returns a classifier on the backbone."""
    model = keras.Sequential([keras.Input((SIZE, SIZE, 1)), backbone, keras.layers.Dense(CLASSES)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(learning_rate), loss, metrics=["accuracy"])
    return model


def join(coordinator, processes, process):
    """Becomes one of the processes, and has Keras spread every batch over their devices.

    `keras.distribution.initialize` calls the same function of JAX, but with no setting for how long
    to wait for a process that has died, and then it is 100 seconds, or 300 after an error.
    """
    jax.distributed.initialize(
        coordinator,
        processes,
        process,
        heartbeat_timeout_seconds=PATIENCE,
        shutdown_timeout_seconds=PATIENCE,
    )
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    # All processes start from the same weights.
    keras.utils.set_random_seed(0)


def train(backup_dir):
    """Trains as one of the processes."""
    backbone = make_backbone()
    source = batches(*stripes(1920, 0.0, seed=1), shuffle=True)
    compiled(backbone, 1e-2).fit(source, epochs=5, shuffle=False, verbose=0)

    model = compiled(FrozenBackbone(backbone), 1e-2)
    fine_tuning = UnfreezeAtConvergence(
        1e-3, min_delta=0.02, patience=2, fine_tune_patience=3, backup_dir=backup_dir
    )
    model.fit(
        batches(*stripes(192, np.pi / CLASSES / 2, seed=2), shuffle=True),
        epochs=50,
        validation_data=batches(*stripes(480, np.pi / CLASSES / 2, seed=3)),
        callbacks=[fine_tuning, FreezeGuard()],
        shuffle=False,
        verbose=0,
    )
    test = batches(*stripes(1920, np.pi / CLASSES / 2, seed=4))
    accuracy = model.evaluate(test, verbose=0, return_dict=True)["accuracy"]
    if jax.process_index() == 0:
        spread = f"processes: {jax.process_count()}, devices: {jax.device_count()}"
        print(f"Accuracy on held-out images: {accuracy:.3f} ({spread}).", flush=True)


def start_here(processes, backup_dir):
    """Starts all processes on this machine. Returns whether they have ended well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, __file__, "--coordinator", coordinator, "--processes", processes]
    command += [] if backup_dir is None else ["--backup-dir", backup_dir]
    started = [
        subprocess.Popen([*map(str, command), "--process", str(process)])
        for process in range(processes)
    ]
    codes = [process.wait() for process in started]
    return not any(codes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="how many there are in all")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="the address of the first one")
    parser.add_argument("--process", type=int, help="which one this is, counted from 0")
    parser.add_argument("--backup-dir", help="a folder on a disk that all machines share")
    arguments = parser.parse_args()
    if (arguments.coordinator is None) != (arguments.process is None):
        parser.error("pass both --coordinator and --process, or none to start all here")
    if arguments.coordinator is None:
        sys.exit(0 if start_here(arguments.processes, arguments.backup_dir) else 1)
    join(arguments.coordinator, arguments.processes, arguments.process)
    train(arguments.backup_dir)


if __name__ == "__main__":
    main()
