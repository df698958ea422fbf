"""Groups and learning rates: who learns how fast, and how to find a rate.

A `GroupOptimizer` is Keras' `MultiOptimizer` with names: each group of variables has an optimizer
of its own, and trains bit for bit as if that were alone. `layerwise_learning_rates` gives deeper
blocks lower rates, all with one optimizer; a dictionary of your own from names of layers to floats
will do as well. `head_learning_rate` lets the head keep its optimizer's state and its rate when the
backbone joins. `find_learning_rate` is the range test, for this stage or the next, and leaves the
model as it was, bit for bit (only a `tf.data.Dataset` that shuffles moves on to its next order).
With "auto", fine-tuning finds its rate within the run, from the optimizer's default down by thirds,
each from the best weights so far: it needs many `epochs`. With `interpolate=0.5` the run ends
halfway between the head's best weights and the fine-tuned ones, which is often better on data from
elsewhere. A schedule that is given for a stage starts at that stage's switch.

    python examples/guide/groups_and_rates.py
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from keras_tl import (
    FrozenBackbone,
    GroupOptimizer,
    UnfreezeAtConvergence,
    find_learning_rate,
    interpolate_weights,
    layerwise_learning_rates,
)

X = np.random.default_rng(0).normal(size=(128, 8)).astype("float32")
Y = X[:, :1] * X[:, 1:2] + X[:, 2:3]
RUN = {"validation_split": 0.25, "shuffle": False, "verbose": 0}


def make(optimizer=None):
    """Returns a frozen backbone of three blocks, and a compiled model on it."""
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Dense(16, activation="tanh", name=f"block{block}_dense") for block in (1, 2, 3)
    ]
    backbone = FrozenBackbone(keras.Sequential([keras.Input((8,)), *layers], name="base"))
    model = keras.Sequential([keras.Input((8,)), backbone, keras.layers.Dense(1, name="head")])
    if optimizer is None:
        optimizer = keras.optimizers.Adam(1e-2)
    model.compile(
        optimizer if isinstance(optimizer, keras.Optimizer) else optimizer(backbone), "mse"
    )
    return backbone, model


def groups():
    """Two optimizers of different classes; what is unfrozen joins the group that `assign` says."""

    def optimizer(backbone):
        by_group = {"backbone": keras.optimizers.SGD(1e-4), "head": keras.optimizers.AdamW(1e-2)}
        return GroupOptimizer(by_group, assign={"backbone": backbone})

    _, model = make(optimizer)
    callback = UnfreezeAtConvergence(max_frozen_epochs=2, verbose=0)
    history = model.fit(X, Y, epochs=4, callbacks=[callback], **RUN).history
    np.testing.assert_allclose(history["learning_rate_head"], [1e-2] * 4, rtol=1e-6)
    np.testing.assert_allclose(history["learning_rate_backbone"], [0, 0, 1e-4, 1e-4], rtol=1e-6)
    before = float(model.optimizer.groups["backbone"].learning_rate)
    model.optimizer.learning_rate = 1e-3  # That of the last group; all are scaled alike.
    after = float(model.optimizer.groups["backbone"].learning_rate)
    print(f"groups: the head's rate a tenth, and so the backbone's: {before:.1g} -> {after:.1g}")


def rates_by_layer():
    """Deeper blocks learn slower, beside a head that keeps its own rate."""
    backbone, model = make()
    rates = layerwise_learning_rates(backbone, 1e-3, decay=0.5)
    print("rates by layer: " + ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items()))
    callback = UnfreezeAtConvergence(rates, head_learning_rate=1e-2, max_frozen_epochs=2, verbose=0)
    model.fit(X, Y, epochs=4, callbacks=[callback], **RUN)
    found = callback.transitions[0].group_learning_rates
    np.testing.assert_allclose(found["backbone"], (2.5e-4, 1e-3), rtol=1e-6)
    np.testing.assert_allclose(found["head"], (1e-2, 1e-2), rtol=1e-6)


def range_test():
    """Suggestions for this stage and for the next one."""
    _, model = make()
    before = [one.tobytes() for one in model.get_weights()]
    now = find_learning_rate(model, X, Y, batch_size=128, verbose=0)
    then = find_learning_rate(model, X, Y, layers="all", batch_size=128, verbose=0)
    assert [one.tobytes() for one in model.get_weights()] == before
    print(f"range test, the head: {now}\nrange test, everything: {then}")


def found_in_the_run(epochs):
    """`"auto"`: falling rates, each from the best weights so far."""
    _, model = make()
    callback = UnfreezeAtConvergence("auto", max_frozen_epochs=5, fine_tune_patience=2, verbose=0)
    history = model.fit(X, Y, epochs=epochs, callbacks=[callback], **RUN).history
    tried = [f"{one.learning_rate_after:.2g}" for one in callback.transitions]
    best = callback.best_epoch
    print(f"auto: tried {', '.join(tried)}; best val_loss {history['val_loss'][best]:.3f}", end="")
    print(f" in stage {history['stage'][best]}")


def interpolated():
    """Weights between two sets of weights."""
    _, model = make()
    head = model.get_weights()
    callback = UnfreezeAtConvergence(1e-2, max_frozen_epochs=3, interpolate=0.5, verbose=1)
    model.fit(X, Y, epochs=8, callbacks=[callback], **RUN)
    end = model.get_weights()
    interpolate_weights(model, head, end, 0.25)
    for weight, first, last in zip(model.get_weights(), head, end, strict=True):
        np.testing.assert_allclose(weight, 0.75 * first + 0.25 * last, rtol=1e-5, atol=1e-6)


def a_schedule():
    """A schedule for fine-tuning starts at the switch, whatever was trained before."""
    _, model = make()
    schedule = keras.optimizers.schedules.CosineDecay(1e-3, decay_steps=9)  # Three epochs.
    callback = UnfreezeAtConvergence(schedule, max_frozen_epochs=3, verbose=0)
    history = model.fit(X, Y, epochs=6, callbacks=[callback], **RUN).history
    rates = [f"{rate:.2g}" for rate in history["learning_rate"]]
    print(f"a schedule from the switch on: {', '.join(rates)}")
    assert history["learning_rate"][-1] < 1e-5


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--small", action="store_true", help="fewer epochs, to try it out")
    small = parser.parse_args().small
    groups()
    rates_by_layer()
    range_test()
    found_in_the_run(epochs=20 if small else 100)
    interpolated()
    a_schedule()
    print("Groups, rates by layer, and three ways to come to a rate.")


if __name__ == "__main__":
    main()
