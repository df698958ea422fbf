"""How far BatchNormalization statistics move while a backbone is fine-tuned, by recipe.

Run by hand: `python -m tests.benchmarks.drift`. A small network, with Keras' default momentum, is
pretrained on scikit-learn's digits 0 to 4, and transferred to 5 to 9: a head on the frozen backbone
for two epochs, and two epochs of fine-tuning. The change is the largest of any moving mean, in
standard deviations (from the moving variance before).
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from keras_tl import FrozenBackbone, UnfreezeAtConvergence

SEEDS = range(5)
FIT = {"batch_size": 32, "verbose": 0}
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def make_backbone():
    layers = []
    for filters in (16, 32, 64):
        layers.append(keras.layers.Conv2D(filters, 3, padding="same", use_bias=False))
        layers += [keras.layers.BatchNormalization(), keras.layers.ReLU()]
    return keras.Sequential(
        [keras.Input((8, 8, 1)), *layers, keras.layers.GlobalAveragePooling2D()]
    )


def statistics(base):
    norms = [one for one in base.layers if isinstance(one, keras.layers.BatchNormalization)]
    return [(np.array(one.moving_mean), np.array(one.moving_variance)) for one in norms]


def guide(base, x, y):
    """The official guide's: `training=False` in a Functional model, unfreeze, `compile`, `fit`."""
    base.trainable = False
    inputs = keras.Input((8, 8, 1))
    model = keras.Model(inputs, keras.layers.Dense(5)(base(inputs, training=False)))
    model.compile(keras.optimizers.Adam(1e-2), LOSS)
    model.fit(x, y, epochs=2, **FIT)
    base.trainable = True
    model.compile(keras.optimizers.Adam(1e-5), LOSS)
    model.fit(x, y, epochs=2, **FIT)


def with_keras_tl(base, x, y):
    inputs = keras.Input((8, 8, 1))
    model = keras.Model(inputs, keras.layers.Dense(5)(FrozenBackbone(base)(inputs)))
    model.compile(keras.optimizers.Adam(1e-2), LOSS)
    unfreeze = UnfreezeAtConvergence(
        1e-5, monitor="loss", max_frozen_epochs=2, restore_best_weights=False, verbose=0
    )
    model.fit(x, y, epochs=4, callbacks=[unfreeze], **FIT)


def drift(recipe, seed, low, high):
    keras.utils.set_random_seed(seed)
    base = make_backbone()
    source = keras.Sequential([base, keras.layers.Dense(5)])
    source.compile(keras.optimizers.Adam(1e-2), LOSS)
    source.fit(*low, epochs=20, **FIT)
    before = statistics(base)
    recipe(base, *high)
    moved = zip(before, statistics(base), strict=True)
    return max(np.abs((a - b) / np.sqrt(variance)).max() for (b, variance), (a, _) in moved)


def main():
    from examples import digits  # Which needs scikit-learn.

    low, high = digits.load()
    print(
        "| recipe | largest change of a moving mean, median | range over 5 seeds |\n|---|---|---|"
    )
    ways = {
        "`training=False` in a Functional model, as in the guide": guide,
        "`FrozenBackbone`": with_keras_tl,
    }
    for name, recipe in ways.items():
        found = [drift(recipe, seed, low, high) for seed in SEEDS]
        spread = f"{min(found):.3g} to {max(found):.3g}"
        print(f"| {name} | {np.median(found):.3g} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
