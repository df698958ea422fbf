"""A process that extracts features: `python -m tests.features.extraction_process FOLDER ...`.

Further arguments: `shard=INDEX/COUNT`; `kill=FUNCTION:CALL`, for a process that kills itself at
that call of a function of `os`; `slow`. It prints a digest of the features.
"""

import hashlib
import os
import sys
import time

import keras

from keras_tl import FeatureCache, FrozenBackbone
from keras_tl.features import extraction
from tests import models
from tests.conftest import regression_data
from tests.killed_run import kill_at

extraction.SHARD_BATCHES = 2
X, Y = regression_data(60)


class Slowly(keras.utils.PyDataset):
    def __init__(self, pause):
        super().__init__()
        self.pause = pause

    def __len__(self):
        return 20

    def __getitem__(self, index):
        time.sleep(self.pause)
        at = slice(3 * index, 3 * index + 3)
        return X[at], Y[at]


def main(folder, *arguments):
    settings = dict(one.split("=") for one in arguments if "=" in one)
    if "kill" in settings:
        name, call = settings["kill"].split(":")
        kill_at(os, name, int(call))
    shard = settings.get("shard")
    keras.utils.set_random_seed(0)
    model = models.functional_outer(FrozenBackbone(models.functional(["dense", "batchnorm"])))
    print("begins", flush=True)
    data = Slowly(0.02 if "slow" in arguments else 0.0)
    features = FeatureCache(model, cache_dir=folder)(
        data, shuffle=False, shard=shard and tuple(map(int, shard.split("/"))), verbose=0
    )
    parts = [part.numpy().tobytes() for batch in features for part in batch]
    print(hashlib.sha256(b"".join(parts)).hexdigest())


if __name__ == "__main__":
    main(*sys.argv[1:])
