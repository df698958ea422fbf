"""What a process does that extracts features, for tests that kill it or run several at once."""

import hashlib
import os
import time

import keras

from keras_tl import FeatureCache, FrozenBackbone
from keras_tl.features import extraction
from tests import models
from tests.killed_run import kill_at
from tests.shared import regression_data

X, Y = regression_data(30)


class Slowly(keras.utils.PyDataset):
    def __init__(self, pause):
        super().__init__()
        self.pause = pause

    def __len__(self):
        return 10

    def __getitem__(self, index):
        time.sleep(self.pause)
        at = slice(3 * index, 3 * index + 3)
        return X[at], Y[at]


def main(results, folder, *, shard=None, kill=None, slow=False):
    """Extracts features, and sends "starts" and then a digest of them.

    Args:
        results: The end of a pipe to send on.
        folder: The `cache_dir`.
        shard: As in `FeatureCache`.
        kill: The name of a function of `os` and a number: that call of it kills the process.
        slow: Whether the data takes its time.
    """
    extraction.SHARD_BATCHES = 2
    if kill is not None:
        kill_at(os, *kill)
    keras.utils.set_random_seed(0)
    model = models.functional_outer(FrozenBackbone(models.functional(["dense", "batchnorm"])))
    # As the tests of this folder do: what is compiled is not the point.
    model.compile("sgd", "mse", run_eagerly=True)
    results.send("starts")
    features = FeatureCache(model, cache_dir=folder)(
        Slowly(0.02 if slow else 0.0), shuffle=False, shard=shard, verbose=0
    )
    parts = [part.numpy().tobytes() for batch in features for part in batch]
    results.send(hashlib.sha256(b"".join(parts)).hexdigest())
