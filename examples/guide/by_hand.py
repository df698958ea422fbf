"""The same run by hand and with keras_tl: equal bit for bit, and how many lines each takes.

By hand, done right, a frozen stage and fine-tuning are two fits. Between them the backbone is
unfrozen but for its BatchNormalization layers, which are looked for in nested models too, and the
model is compiled again; the histories are joined afterwards. That is still without the best weights
of both stages compared (L2 of an unfrozen backbone makes their losses incomparable), without
resuming (`BackupAndRestore` resumes such a run frozen, at the head's rate), and without proof of
what stayed frozen. And it cannot be put into a callback of one's own: `compile` in `fit` is a
TypeError on the next batch, or cancels an `EarlyStopping`.

    python examples/guide/by_hand.py
"""

import argparse
import inspect
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from keras_tl import UnfreezeAtConvergence

EPOCHS = 40


def make_data():
    """Returns inputs and targets, to train on and to validate on."""
    x = np.random.default_rng(0).normal(size=(160, 6)).astype("float32")
    y = (x[:, :1] * x[:, 1:2] + 0.3 * x[:, 2:3]).astype("float32")
    return (x[:96], y[:96]), (x[96:], y[96:])


def make_base():
    """Returns a network with BatchNormalization."""
    norm, dense = keras.layers.BatchNormalization, keras.layers.Dense
    layers = [dense(16, activation="tanh"), norm(), dense(16, activation="tanh")]
    return keras.Sequential([keras.Input((6,)), *layers])


def make_model(base):
    """Returns a compiled model on the base, which is frozen."""
    base.trainable = False
    model = keras.Sequential([keras.Input((6,)), base, keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(3e-2), "mse")
    return model


def by_hand(model, base, train, val):
    """Trains in two fits."""
    stop = keras.callbacks.EarlyStopping(patience=3, restore_best_weights=True)
    settings = {"validation_data": val, "epochs": EPOCHS, "shuffle": False, "verbose": 0}
    first = model.fit(*train, callbacks=[stop], **settings)
    base.trainable = True
    for layer in base.layers:  # And in models nested in it, of which there are none here.
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False
    model.compile(keras.optimizers.Adam(3e-3), "mse")
    done = len(first.epoch)
    second = model.fit(*train, callbacks=[stop], initial_epoch=done, **settings)
    return {name: first.history[name] + second.history[name] for name in first.history}


def with_keras_tl(model, base, train, val):
    """Trains in one fit."""
    callback = UnfreezeAtConvergence(3e-3, patience=3, backbone=base, verbose=0)
    settings = {"validation_data": val, "epochs": EPOCHS, "shuffle": False, "verbose": 0}
    return model.fit(*train, callbacks=[callback], **settings).history


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--small", action="store_true", help="the same: it is small as it is")
    parser.parse_args()
    histories, weights = [], []
    for way in (by_hand, with_keras_tl):
        keras.utils.set_random_seed(0)
        base = make_base()
        model = make_model(base)
        histories.append(way(model, base, *make_data()))
        weights.append([keras.ops.convert_to_numpy(one).tobytes() for one in model.weights])
        lines = len(inspect.getsource(way).splitlines()) - 2  # But for `def` and docstring.
        print(f"{way.__name__}: {lines} lines, {len(histories[-1]['loss'])} epochs")
    # By hand there is no `stage` and no `learning_rate` in the history.
    assert all(histories[0][name] == histories[1][name] for name in histories[0])
    assert weights[0] == weights[1]
    print(f"stages: {sorted(set(histories[1]['stage']))}")
    print("Losses of all epochs and final weights are equal, bit for bit.")


if __name__ == "__main__":
    main()
