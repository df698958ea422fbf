"""Options that were tried and are not part of keras_tl, each as a way of its own."""

import re

import keras
import numpy as np
import tensorflow as tf

from tests.benchmarks.quality.ways import HEAD_RATE, everything, ours

# By path, the weights as the first optimizer has found them: each rate has an optimizer of its own.
_starts: dict[str, np.ndarray] = {}


class _Epochs(keras.callbacks.Callback):
    """Keeps the weights of each epoch in which more than the head trains."""

    def __init__(self):
        super().__init__()
        self.found = []
        self._head = None

    def on_epoch_end(self, epoch, logs=None):
        count = len(self.model.trainable_weights)
        self._head = self._head or count
        if count > self._head:
            self.found.append((logs["val_loss"], self.model.get_weights()))


def soup(pair, train, validation, rate, epochs=8):
    """Averages the best epochs of fine-tuning, as long as the validation loss falls.

    The greedy soup of Wortsman et al. (2022), of one run. It starts from the weights that keras_tl
    ends with.
    """
    kept = _Epochs()
    model = ours(pair, train, validation, rate, callbacks=[kept])
    average, count = model.get_weights(), 1
    lowest = model.evaluate(*validation, verbose=0)[0]
    # The first of them is what the model has.
    for _, weights in sorted(kept.found, key=lambda one: one[0])[1:epochs]:
        tried = [a + (w - a) / (count + 1) for a, w in zip(average, weights, strict=True)]
        model.set_weights(tried)
        loss = model.evaluate(*validation, verbose=0)[0]
        if loss <= lowest:
            average, count, lowest = tried, count + 1, loss
    model.set_weights(average)
    return model


@keras.saving.register_keras_serializable(package="keras_tl_quality")
class TowardsStart(keras.optimizers.Adam):
    """Adam that decays weights towards what they were at first, as L2-SP does (Li et al. 2018).

    The decay is decoupled, so losses stay comparable: in each step a weight goes back by
    `pull * learning_rate` of its way. The head's own layer does not.

    Args:
        learning_rate: Float.
        pull: Float.
    """

    def __init__(self, learning_rate=1e-3, pull=10.0, **settings):
        super().__init__(learning_rate, **settings)
        self.pull = pull

    def build(self, variables):
        super().build(variables)
        for one in variables:
            _starts.setdefault(one.path, keras.ops.convert_to_numpy(one))

    def apply(self, grads, trainable_variables=None):
        super().apply(grads, trainable_variables)
        for one in trainable_variables or self._trainable_variables:
            if not one.path.startswith("dense"):
                gone = one - _starts[one.path]
                one.assign(one - keras.ops.cast(self.learning_rate, one.dtype) * self.pull * gone)

    def get_config(self):
        return {**super().get_config(), "pull": self.pull}


def near_the_start(pair, train, validation, rate):
    """Trains with `fine_tune`, where weights of the backbone are pulled back to the pretrained."""
    _starts.clear()
    return ours(pair, train, validation, rate, optimizer=TowardsStart(HEAD_RATE))


def _part_of(layer):
    """Returns the name of the block, or whatever else, that a layer is in."""
    return re.match(r"block\d+|[a-z]*", layer).group()


def _relative_gradients(model, backbone, x, y, batch_size):
    """Returns the gradients' norm by the weights' norm, on average over each part's layers."""
    backbone.unfreeze()
    weights = backbone.trainable_weights
    squares = np.zeros(len(weights))
    for start in range(0, len(x), batch_size):
        with tf.GradientTape() as tape:
            outputs = model(x[start : start + batch_size], training=False)
            loss = model.loss(y[start : start + batch_size], outputs)
        gradients = tape.gradient(loss, [weight.value for weight in weights])
        squares += [float(tf.reduce_sum(tf.square(one))) for one in gradients]
    backbone.freeze()
    by_part = {}
    for weight, square in zip(weights, squares, strict=True):
        norm = np.linalg.norm(np.ravel(weight))
        part = _part_of(weight.path.split("/")[-2])
        by_part.setdefault(part, []).append(square**0.5 / norm)
    return {part: np.mean(found) for part, found in by_part.items()}


def surgical(pair, train, validation, rate):
    """Fine-tunes the half of the blocks whose gradients are largest, after a head was trained.

    By relative gradient norm, as Lee et al. (2023) do. A head of its own is trained for that.
    """
    head = everything(pair, train, validation, HEAD_RATE, head_only=True)
    wrapper = next(layer for layer in head.layers if hasattr(layer, "unfreeze"))
    relative = _relative_gradients(head, wrapper, *train, pair.batch_size)
    largest = sorted(relative, key=relative.get)[len(relative) // 2 :]

    def among_them(layer):
        return _part_of(layer.name) in largest

    return ours(pair, train, validation, rate, layers=among_them)


OPTIONS = {
    "keras_tl, greedy soup": (soup, (None,)),
    "keras_tl, L2-SP": (near_the_start, (None,)),
    "keras_tl, surgical": (surgical, (None,)),
}
