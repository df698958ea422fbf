"""What keeping features in 16 bits does to the head's accuracy, on scikit-learn's digits.

Run by hand: `python -m tests.benchmarks.feature_dtypes`. A small network is pretrained on the
digits 0 to 4; a head on its features is trained on all the digits 5 to 9 but the held-out third, of
which the table has the accuracy over 10 seeds.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from keras_tl import FeatureCache, FrozenBackbone

SEEDS = range(10)
DTYPES = (None, "float16", "bfloat16")


def accuracies(digits, seed, low, images, labels):
    keras.utils.set_random_seed(seed)
    backbone = digits.make_backbone()
    digits.compiled(backbone, digits.HEAD_RATE).fit(*low, batch_size=32, epochs=8, verbose=0)
    order = np.random.default_rng(seed).permutation(len(labels))
    train, test = order[len(order) // 3 :], order[: len(order) // 3]
    found = []
    for dtype in DTYPES:
        keras.utils.set_random_seed(seed)
        cache = FeatureCache(digits.compiled(FrozenBackbone(backbone), digits.HEAD_RATE))
        features = cache(images[train], labels[train], dtype=dtype, verbose=0)
        cache.head.fit(features, epochs=20, shuffle=False, verbose=0)
        held_out = cache(images[test], labels[test], verbose=0)
        found.append(cache.head.evaluate(held_out, verbose=0)[1])
    return found


def main():
    from examples import digits  # Which needs scikit-learn.

    low, high = digits.load()
    runs = np.array([accuracies(digits, seed, low, *high) for seed in SEEDS])
    print("| features kept in | accuracy | spread | largest difference to float32 in a run |")
    print("|---|---|---|---|")
    for dtype, found in zip(DTYPES, runs.T, strict=True):
        largest = np.abs(found - runs[:, 0]).max()
        name = dtype or "float32"
        print(f"| {name} | {found.mean():.4f} | {found.std():.4f} | {largest:.4f} |")


if __name__ == "__main__":
    main()
