"""The switch inside `fit` against the manual route, and the costs of a frozen stage, as ratios.

Run by hand: `python -m tests.benchmarks.switch`. MobileNetV2 at 96x96, random weights and images.
Every ratio is of two things timed in turn in one process; the table gives the median and range over
repeats.
"""

import time

import keras

from keras_tl import FrozenBackbone, UnfreezeAtConvergence
from keras_tl.backbone.changeable import changeable_weights
from keras_tl.stages.best_weights import Snapshot
from tests.benchmarks.timing import (
    BATCH,
    REPEATS,
    SHAPE,
    Clock,
    images,
    paired,
    print_table,
    seconds,
)


def model_on(wrap):
    """A binary classifier on MobileNetV2, wrapped or called as the guide does; and the backbone."""
    keras.utils.set_random_seed(0)
    base = keras.applications.MobileNetV2(SHAPE, include_top=False, weights=None)
    base.trainable = False
    backbone = FrozenBackbone(base) if wrap else base
    inputs = keras.Input(SHAPE)
    x = backbone(inputs) if wrap else backbone(inputs, training=False)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, keras.layers.Dense(1)(x))
    compiled(model, 1e-3)
    return model, backbone


def compiled(model, learning_rate):
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(learning_rate), loss, metrics=["accuracy"])


def switch_in_fit():
    """From the end of the last frozen epoch to the end of the first fine-tuning step."""
    (x, y), validation = images(2 * BATCH), images(BATCH)
    model, _ = model_on(wrap=True)
    clock = Clock()
    callback = UnfreezeAtConvergence(1e-5, max_frozen_epochs=2, verbose=0)
    callbacks = [callback, clock]
    model.fit(x, y, BATCH, epochs=3, validation_data=validation, callbacks=callbacks, verbose=0)
    return clock.step_ends[4] - clock.epoch_ends[1]


def switch_by_hand():
    """The same by hand: unfreeze, `compile`, and the first step of a new `fit`."""
    (x, y), validation = images(2 * BATCH), images(BATCH)
    model, backbone = model_on(wrap=True)
    model.fit(x, y, BATCH, epochs=2, validation_data=validation, verbose=0)
    start = time.perf_counter()
    backbone.unfreeze()
    compiled(model, 1e-5)
    clock = Clock()
    model.fit(x, y, BATCH, epochs=1, validation_data=validation, callbacks=[clock], verbose=0)
    return clock.step_ends[0] - start


def frozen_epoch_against_predict():
    """A frozen epoch of 1,024 images, and `predict` on them plus an epoch of the head alone."""
    x, y = images(1024)
    model, _ = model_on(wrap=True)
    features = keras.Model(model.input, model.layers[-2].output)
    head = keras.Sequential([keras.Input((1280,)), keras.layers.Dense(1)])
    compiled(head, 1e-3)
    recorded = features.predict(x, BATCH, verbose=0)

    def epoch(model, x):
        model.fit(x, y, batch_size=BATCH, verbose=0)

    epoch(model, x), epoch(head, recorded)
    for _ in range(REPEATS):
        whole = seconds(lambda: epoch(model, x))
        parts = seconds(lambda: features.predict(x, BATCH, verbose=0))
        parts += seconds(lambda: epoch(head, recorded))
        yield whole / parts


def first_step(wrap):
    x, y = images(BATCH)
    model, _ = model_on(wrap)
    return seconds(lambda: model.train_on_batch(x, y))


def bytes_copied():
    model, _ = model_on(wrap=True)
    whole = sum(weight.nbytes for weight in model.get_weights())
    return Snapshot(changeable_weights(model)).nbytes / whole


def main():
    rows = [
        ("switch in `fit` / by hand", "<= 0.65", paired(switch_in_fit, switch_by_hand)),
        ("frozen epoch / `predict` + head", "<= 1.1", list(frozen_epoch_against_predict())),
        (
            "first frozen step / plain nested model's",
            "<= 0.75",
            paired(lambda: first_step(True), lambda: first_step(False)),
        ),
        ("bytes copied per improvement / `get_weights()`", "<= 0.05", [bytes_copied()]),
    ]
    print_table(rows)


if __name__ == "__main__":
    main()
