"""Features extracted by several workers of Ray, one of which dies on the way.

Each task records its share of the batches in one folder that all workers see, which on a cluster is
a shared file system. Ray starts a task whose worker has died once more, and the new worker
continues after the last whole file of the old one. A call without `shard` then joins the parts
without running the backbone, and the head trains on them.

    python -m pip install "keras_tl[ray]"
    python examples/extract_with_ray.py

MobileNetV2 has random weights and the images are random, so that nothing is downloaded.
"""

import argparse
import os
import pathlib
import signal
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import ray

from keras_tl import FeatureCache, FrozenBackbone

WORKERS = 2


class Images(keras.utils.PyDataset):
    """Batches of random images, each drawn when it is read: a worker reads its own only.

    Args:
        count: Int. How many batches there are.
        size: Int. Width and height of an image.
        killed_at: Int or None. The batch at which the process that reads it is killed.
    """

    def __init__(self, count, size, killed_at=None):
        super().__init__()
        self._count, self._size, self._killed_at = count, size, killed_at

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        if index == self._killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        random = np.random.default_rng(index)
        images = random.uniform(0, 255, size=(16, self._size, self._size, 3))
        return images.astype("float32"), random.integers(2, size=16)


def make_model(size, weights):
    """Returns a compiled classifier on a frozen MobileNetV2 with the weights in a file."""
    base = keras.applications.MobileNetV2(
        (size, size, 3), include_top=False, weights=None, pooling="avg", alpha=0.35
    )
    if weights.exists():
        base.load_weights(weights)
    else:
        base.save_weights(weights)
    scaled = keras.layers.Rescaling(1 / 127.5, offset=-1)
    layers = [keras.Input((size, size, 3)), scaled, FrozenBackbone(base), keras.layers.Dense(2)]
    model = keras.Sequential(layers)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    return model


@ray.remote(num_cpus=1, max_retries=1)
def extract(folder, index, count, size):
    """Records every `WORKERS`-th batch from `index` on. Returns whether a worker died of it."""
    folder = pathlib.Path(folder)
    once = folder / f"started {index}"
    again = once.exists()
    once.touch()
    # The first worker dies in the middle, once.
    killed_at = count // 2 if index == 0 and not again else None
    model = make_model(size, folder / "base.weights.h5")
    cache = FeatureCache(model, cache_dir=folder / "features")
    images = Images(count, size, killed_at)
    cache(images, shuffle=False, shard=(index, WORKERS), name="training", verbose=0)
    return again


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--small", action="store_true", help="fewer images, to try it out")
    small = parser.parse_args().small
    count, size = (16, 32) if small else (128, 96)
    keras.utils.set_random_seed(0)
    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model = make_model(size, folder / "base.weights.h5")  # Which the workers read.
        again = ray.get([extract.remote(name, one, count, size) for one in range(WORKERS)])
        print(f"parts whose first worker died: {[i for i, one in enumerate(again) if one]}")
        cache = FeatureCache(model, cache_dir=folder / "features")
        features = cache(Images(count, size), name="training", verbose=0)
        history = cache.head.fit(features, epochs=3, shuffle=False, verbose=2)
    ray.shutdown()
    print(f"epochs of the head on the features of all workers: {len(history.history['loss'])}")


if __name__ == "__main__":
    main()
