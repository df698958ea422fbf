"""The two stages of transfer learning in a training loop of one's own, with TensorFlow.

The parts that `UnfreezeAtConvergence` is made of work without `fit`: `ConvergenceMonitor` says when
the head has converged, `FrozenBackbone.unfreeze` changes what trains, `renew_optimizer` makes an
optimizer for it, and `FreezeGuard.watching` proves that nothing moved that should not. A small
network, pretrained on the handwritten digits 0 to 4, is transferred to 5 to 9. The program prints
the losses of both stages and the accuracy on held-out digits. It needs scikit-learn.

    python examples/custom_training_loop.py
"""

import argparse
import os

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

from keras_tl import (
    ConvergenceMonitor,
    FreezeGuard,
    FrozenBackbone,
    renew_optimizer,
)

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def load():
    """Returns images and labels of the digits 0 to 4, and of 5 to 9."""
    digits = load_digits()
    images = (digits.images / 16.0).astype("float32")[..., np.newaxis]
    low = digits.target < 5
    return (images[low], digits.target[low]), (images[~low], digits.target[~low] - 5)


def make_backbone():
    """Returns a small convolutional network with BatchNormalization."""
    layers = [keras.Input((8, 8, 1))]
    for filters in (16, 32):
        layers.append(keras.layers.Conv2D(filters, 3, padding="same", use_bias=False))
        layers += [keras.layers.BatchNormalization(momentum=0.9), keras.layers.ReLU()]
    return keras.Sequential([*layers, keras.layers.GlobalAveragePooling2D()])


def pretrained_backbone(images, labels, epochs):
    """Returns a backbone that has learnt to tell the given digits apart."""
    backbone = make_backbone()
    model = keras.Sequential([backbone, keras.layers.Dense(5)])
    model.compile(keras.optimizers.Adam(1e-2), LOSS)
    model.fit(images, labels, epochs=epochs, verbose=0)
    return backbone


def make_train_step(model, optimizer):
    """Returns a compiled step for the weights that are trainable now."""

    @tf.function
    def train_step(images, labels):
        with tf.GradientTape() as tape:
            loss = LOSS(labels, model(images, training=True))
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    return train_step


def train_stage(model, optimizer, data, validation, epochs):
    """Trains what is trainable until it has converged, guarded."""
    train_step = make_train_step(model, optimizer)
    monitor = ConvergenceMonitor(patience=2)
    images, labels = validation
    with FreezeGuard().watching(model):
        for epoch in range(epochs):
            losses = [float(train_step(*batch)) for batch in data]
            loss = float(LOSS(labels, model(images, training=False)))
            if epoch % 10 == 0:
                print(f"epoch {epoch + 1:3}: loss {np.mean(losses):.4f}, validation {loss:.4f}")
            if monitor.update(epoch, loss):
                break
    print(f"epoch {epoch + 1:3}: loss {np.mean(losses):.4f}, validation {loss:.4f}: end of stage")
    print("what must not change has not changed, bit for bit")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--small", action="store_true", help="fewer epochs, to try it out")
    small = parser.parse_args().small
    keras.utils.set_random_seed(0)
    low, (images, labels) = load()
    backbone = FrozenBackbone(pretrained_backbone(*low, epochs=2 if small else 10))
    model = keras.Sequential([keras.Input((8, 8, 1)), backbone, keras.layers.Dense(5)])
    train_part, validation, test = (
        (images[part], labels[part])
        for part in np.split(np.random.default_rng(0).permutation(len(labels)), [60, 200])
    )
    data = tf.data.Dataset.from_tensor_slices(train_part).shuffle(60, seed=0).batch(10)
    epochs = 15 if small else 100
    optimizer = keras.optimizers.Adam(3e-2)
    train_stage(model, optimizer, data, validation, epochs)

    layers = backbone.unfreeze()
    print(f"{len(layers)} layers join")
    optimizer = renew_optimizer(optimizer, 3e-4, variables=model.trainable_variables)
    train_stage(model, optimizer, data, validation, epochs)

    predicted = keras.ops.argmax(model(test[0], training=False), axis=-1)
    accuracy = np.mean(keras.ops.convert_to_numpy(predicted) == test[1])
    print(f"accuracy on held-out digits: {accuracy:.3f}")


if __name__ == "__main__":
    main()
