"""What recorded features save, as ratios to training through the frozen backbone.

Run by hand: `python -m tests.benchmarks.features`. MobileNetV2 at 96x96, random weights, 2,048
random images, on the processor's cores that the process may use; times of each pair in turn, in one
process. The head is a Dense layer on the last feature map, pooled.
"""

import pathlib
import tempfile

import keras
import numpy as np

from keras_tl import FeatureCache, FrozenBackbone
from tests.benchmarks.timing import BATCH, REPEATS, SHAPE, images, print_table, seconds

SAMPLES = 2048
EPOCHS = 10


def model_of():
    keras.utils.set_random_seed(0)
    base = keras.applications.MobileNetV2(SHAPE, include_top=False, weights=None)
    pooling = keras.layers.GlobalAveragePooling2D()
    model = keras.Sequential(
        [keras.Input(SHAPE), FrozenBackbone(base), pooling, keras.layers.Dense(1)]
    )
    model.compile("adam", keras.losses.BinaryCrossentropy(from_logits=True))
    return model


def epoch(model, *data, **settings):
    return lambda: model.fit(*data, shuffle=True, verbose=0, **settings)


def in_turn(*calls):
    """Returns the seconds that each call takes, `REPEATS` times, after one that traces."""
    for call in calls:
        call()
    return zip(*[[seconds(call) for call in calls] for _ in range(REPEATS)], strict=True)


def ratios(x, y, folder):
    model = model_of()
    cache = FeatureCache(model, cache_dir=folder / "features")
    features = cache(x, y, batch_size=BATCH, name="measured", verbose=0)
    in_memory = np.concatenate(
        [
            batch.numpy()
            for batch, _ in cache(x, y, name="measured", shuffle=False, batch_size=BATCH, verbose=0)
        ]
    )
    extract = lambda: cache(x, y, batch_size=BATCH, name="measured", refresh=True, verbose=0)
    through, disk, memory, extraction, predict = in_turn(
        epoch(model, x, y, batch_size=BATCH),
        epoch(cache.head, features),
        epoch(cache.head, in_memory, y, batch_size=BATCH),
        extract,
        lambda: model.predict(x, batch_size=BATCH, verbose=0),
    )
    print(*[f"{np.median(s):.3f}" for s in (through, disk, memory, extraction, predict)])
    ten = [
        (e + EPOCHS * d) / (EPOCHS * t) for e, d, t in zip(extraction, disk, through, strict=True)
    ]
    return [
        ("head epoch through the backbone / on features from disk", ">= 25", _over(through, disk)),
        ("head epoch on features from disk / on NumPy arrays", "<= 1.3", _over(disk, memory)),
        (f"extraction and {EPOCHS} head epochs / {EPOCHS} through the backbone", "<= 0.15", ten),
        ("extraction to disk / predict", "<= 1.1", _over(extraction, predict)),
    ]


def _over(some, others):
    return [one / other for one, other in zip(some, others, strict=True)]


def main():
    with tempfile.TemporaryDirectory() as folder:
        print_table(ratios(*images(SAMPLES), pathlib.Path(folder)))


if __name__ == "__main__":
    main()
