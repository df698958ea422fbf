"""The run in Keras, with keras_tl and by hand: `python -m tests.benchmarks.peers.keras_ways fit`.

On the backend that Keras is set to (`KERAS_BACKEND`).
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras

from keras_tl import FrozenBackbone, UnfreezeAtConvergence, fine_tune
from tests.benchmarks.peers.task import CLASSES, print_measured


def backbone_of(task):
    backbone = keras.Sequential([keras.Input((task.size, task.size, 3))], name="backbone")
    for filters, stride in task.convolutions:
        backbone.add(keras.layers.Conv2D(filters, 3, stride, activation="relu"))
    backbone.add(keras.layers.GlobalAveragePooling2D())
    return backbone


def compiled(model, optimizer):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    return model


def model_on(backbone, task):
    head = keras.layers.Dense(CLASSES, name="head")
    model = keras.Sequential([keras.Input((task.size, task.size, 3)), backbone, head])
    return compiled(model, keras.optimizers.Adam(task.head_rate))


class TrainedEachEpoch(keras.callbacks.Callback):
    """Counts the numbers that train."""

    def __init__(self, model):
        super().__init__()
        self.whole, self.counts = model, []

    def on_epoch_end(self, epoch, logs=None):
        shapes = [weight.shape for weight in self.whole.trainable_variables]
        self.counts.append(sum(int(keras.ops.prod(shape)) for shape in shapes))


def switching(task):
    """Returns the arguments with which the switch is after the task's epochs, and nothing stops."""
    return {
        "learning_rate": task.backbone_rate,
        "head_learning_rate": task.head_rate,
        "monitor": "loss",
        "patience": task.epochs,
        "max_frozen_epochs": task.epochs,
        "fine_tune_patience": None,
        "verbose": 0,
    }


def with_fit(task, images, labels):
    """`fit` with `UnfreezeAtConvergence`. Returns what trained, as all ways here."""
    keras.utils.set_random_seed(0)
    model = model_on(FrozenBackbone(backbone_of(task)), task)
    trained = TrainedEachEpoch(model)
    callbacks = [UnfreezeAtConvergence(**switching(task)), trained]
    model.fit(images, labels, task.batch, 2 * task.epochs, callbacks=callbacks, verbose=0)
    return trained.counts


def with_fine_tune(task, images, labels):
    keras.utils.set_random_seed(0)
    model = model_on(FrozenBackbone(backbone_of(task)), task)
    trained = TrainedEachEpoch(model)
    fine_tune(
        model,
        images,
        labels,
        batch_size=task.batch,
        epochs=2 * task.epochs,
        callbacks=[trained],
        **switching(task),
    )
    return trained.counts


def by_hand(task, images, labels):
    """Two `fit`s, as in Keras' guide, with `compile` between them."""
    keras.utils.set_random_seed(0)
    backbone = backbone_of(task)
    backbone.trainable = False
    model = model_on(backbone, task)
    trained = TrainedEachEpoch(model)

    def train():
        model.fit(images, labels, task.batch, task.epochs, callbacks=[trained], verbose=0)

    train()
    backbone.trainable = True
    rates = keras.optimizers.OptimizerMap(keras.optimizers.Adam(task.backbone_rate))
    rates["head/.*"] = keras.optimizers.Adam(task.head_rate)
    compiled(model, keras.optimizers.MultiOptimizer(rates))
    train()
    return trained.counts


WAYS = {"fit": with_fit, "fine_tune": with_fine_tune, "by_hand": by_hand}

if __name__ == "__main__":
    print_measured(WAYS[sys.argv[1]])
