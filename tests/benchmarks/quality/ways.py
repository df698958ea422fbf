"""Ways to transfer a pretrained network, each a function that returns a trained model."""

import functools
import math

import keras

from keras_tl import FrozenBackbone, GroupOptimizer, fine_tune

EPOCHS, PATIENCE, HEAD_RATE = 80, 4, 1e-2


def compiled(pair, x, backbone, optimizer):
    inputs = keras.Input(x.shape[1:], dtype=x.dtype.name)
    features = keras.layers.Dropout(0.2)(pair.pooling()(backbone(inputs)))
    model = keras.Model(inputs, keras.layers.Dense(pair.classes)(features))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def everything(pair, train, validation, rate, *, wrapped=False, pretrained=True, head_only=False):
    """Trains in one stage, with the best weights by validation loss in the end."""
    backbone = pair.backbone(pretrained)
    if wrapped or head_only:
        backbone = FrozenBackbone(backbone)
    if wrapped:
        backbone.unfreeze()
    model = compiled(pair, train[0], backbone, keras.optimizers.Adam(rate))
    stopping = keras.callbacks.EarlyStopping(patience=PATIENCE, restore_best_weights=True)
    settings = {"epochs": EPOCHS, "batch_size": pair.batch_size, "verbose": 0}
    model.fit(*train, validation_data=validation, callbacks=[stopping], **settings)
    return model


def ours(pair, train, validation, rate, *, optimizer=None, **settings):
    """Trains with `fine_tune`, as it is without any argument but the data and what is said."""
    backbone = FrozenBackbone(pair.backbone(True))
    model = compiled(pair, train[0], backbone, optimizer or keras.optimizers.Adam(HEAD_RATE))
    if rate is not None:
        settings["learning_rate"] = rate
    batches = {"batch_size": pair.batch_size, "verbose": 0}
    fine_tune(model, *train, validation_data=validation, **batches, **settings)
    return model


def cosine(pair, train, validation, rate, epochs=20):
    """Trains the same with one rate that rises and then falls to nothing, as many do."""
    steps = epochs * math.ceil(len(train[0]) / pair.batch_size)
    schedule = keras.optimizers.schedules.CosineDecay(
        rate / 100, steps * 4 // 5, warmup_target=rate, warmup_steps=steps // 5
    )
    return ours(pair, train, validation, schedule)


class OneCycle(keras.callbacks.Callback):
    """Raises the learning rates of all groups to their highest, and lowers them to nothing.

    Args:
        highest: Dictionary from names of groups to floats.
        steps: Int. The length of the cycle.
        warm_up: Float between 0 and 1. The part of it in which rates rise.
    """

    def __init__(self, highest, steps, warm_up):
        super().__init__()
        self._highest, self._steps, self._warm_up, self._step = highest, steps, warm_up, 0

    def on_train_batch_begin(self, batch, logs=None):
        done = self._step / self._steps
        rising = done < self._warm_up
        part = done / self._warm_up if rising else (1 - done) / (1 - self._warm_up)
        low = 0.2 if rising else 1e-5  # fastai's `div` of `fine_tune`, and its `div_final`.
        factor = low + (1 - low) * (1 - math.cos(math.pi * part)) / 2
        for name, optimizer in self.model.optimizer.groups.items():
            optimizer.learning_rate = self._highest[name] * factor
        self._step += 1


def fastai(pair, train, validation, rate, epochs=20):
    """fastai's `fine_tune(epochs, rate)` in Keras: groups, cycles, and no look at validation."""
    del validation
    backbone = pair.backbone(True)
    layers = [layer for layer in backbone.layers if layer.weights]
    half = len(layers) // 2
    parts = {"first": layers[:half], "second": layers[half:]} if half else {"first": layers}
    names = [*parts, "head"]

    def optimizer():
        groups = {name: keras.optimizers.AdamW(rate, beta_2=0.99) for name in names}
        return GroupOptimizer(groups, assign=parts)

    # BatchNormalization trains from the start there.
    for layer in backbone.layers:
        layer.trainable = isinstance(layer, keras.layers.BatchNormalization)
    model = compiled(pair, train[0], backbone, optimizer())
    steps = math.ceil(len(train[0]) / pair.batch_size)
    settings = {"batch_size": pair.batch_size, "verbose": 0}
    cycle = OneCycle(dict.fromkeys(names, rate), steps, 0.99)
    model.fit(*train, callbacks=[cycle], **settings)
    backbone.trainable = True
    model.compile(optimizer(), model.loss, metrics=["accuracy"])
    # From a hundredth of it for the first group to half of the rate for the head.
    steep = 100 ** (1 / (len(names) - 1))
    spread = {name: rate / 2 / steep**deep for deep, name in enumerate(reversed(names))}
    cycle = OneCycle(spread, epochs * steps, 0.3)
    model.fit(*train, epochs=epochs, callbacks=[cycle], **settings)
    return model


# By name, the function and its rates; None is the grid of the pair, (None,) is no argument.
WAYS = {
    "head only": (functools.partial(everything, head_only=True), (HEAD_RATE,)),
    "keras_tl": (ours, (None,)),
    "keras_tl, 20 epochs": (functools.partial(ours, epochs=20), (None,)),
    "keras_tl, 1e-5": (ours, (1e-5,)),
    "keras_tl, interpolate=0.5": (functools.partial(ours, interpolate=0.5), (None,)),
    "keras_tl, one frozen epoch": (functools.partial(ours, max_frozen_epochs=1), (None,)),
    'keras_tl, layers="scales"': (
        functools.partial(ours, layers="scales", train_batchnorm=True),
        (None,),
    ),
    "keras_tl, cosine decay": (cosine, None),
    "everything, FrozenBackbone": (functools.partial(everything, wrapped=True), None),
    "everything, plain": (everything, None),
    "fastai's recipe": (fastai, (1e-2, 2e-3)),
    "from scratch": (functools.partial(everything, pretrained=False), None),
}
