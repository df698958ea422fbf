"""One process that records and trains under `keras.distribution` on JAX.

`python -m tests.features.distributed_process FOLDER SETTINGS PROCESS` does the jobs in SETTINGS
(JSON), one after the other, and writes what came out to FOLDER/result-PROCESS.json.
"""

import contextlib
import json
import os
import pathlib
import sys

import jax
import keras
import numpy as np
import tensorflow as tf

from keras_tl import FeatureCache, FreezeGuard, FrozenBackbone, UnfreezeAtConvergence, fine_tune
from keras_tl.features import stage_records
from keras_tl.internals.processes import of_all
from keras_tl.internals.values import on_host
from tests import models
from tests.distributed_run import build, distribution, join

SAMPLES, BATCH, EPOCHS = 24, 8, 5

# A stage in which some of the backbone stays frozen is recorded as well.
UNFREEZING = {
    "learning_rate": 0.05,
    "layers": 1,
    "max_frozen_epochs": 2,
    "fine_tune_patience": None,
}


def samples(seed=0, count=SAMPLES):
    x = np.random.default_rng(seed).normal(size=(count, models.FEATURES)).astype("float32")
    return x, x[:, :1] * x[:, 1:2]


def batches(*arrays, size=BATCH):
    arrays = arrays or samples()
    whole = len(arrays[0]) % size == 0
    return tf.data.Dataset.from_tensor_slices(arrays).batch(size, drop_remainder=whole)


def own_batches():
    """The share of each batch that Keras would give this process."""
    size = BATCH // jax.process_count()
    return batches(size=size).shard(jax.process_count(), jax.process_index())


def outcome(model, history):
    return {
        "weights": [on_host(weight).tolist() for weight in model.weights],
        "val_loss": history.history["val_loss"],
        "stage": history.history["stage"],
    }


def tuned(data, **settings):
    """What `fine_tune` does with data, and where each stage was trained."""
    model, said = build(), []
    with replaced(stage_records.StageRecords, "of", noting(said)):
        history = fine_tune(
            model,
            data,
            validation_data=data,
            epochs=EPOCHS,
            shuffle=False,
            verbose=0,
            **{**UNFREEZING, **settings},
        )
    return {**outcome(model, history), "recorded": said}


def noting(said):
    original = stage_records.StageRecords.of

    def of(records, stage, **settings):
        training = original(records, stage, **settings)
        said.append([stage, training is not None])
        return training

    return of


@contextlib.contextmanager
def replaced(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def error_of(function):
    """The error that a function raises, in words; weights must not have trained before."""
    model = build()
    before = [on_host(weight) for weight in model.weights]
    try:
        function(model)
    except ValueError as error:
        assert all(map(np.array_equal, before, [on_host(weight) for weight in model.weights]))
        return f"{type(error).__name__}: {error}"
    return None


def features_of(dataset):
    return [np.asarray(batch[0]).tolist() for batch in dataset]


class Changes:
    """The files in a folder that this process makes, renames, opens and removes."""

    def __init__(self):
        self.folder, self.paths = None, []
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        if self.folder and event in ("open", "os.rename", "os.remove"):
            paths = [one for one in arguments[:2] if isinstance(one, (str, os.PathLike))]
            inside = [os.fspath(one) for one in paths if self.folder in os.fspath(one)]
            self.paths += [[event, os.path.basename(one)] for one in inside]

    @contextlib.contextmanager
    def of(self, folder):
        self.folder, self.paths = str(folder), []
        try:
            yield self.paths
        finally:
            self.folder = None


class Jobs:
    """What a process can be asked to do. Each returns what JSON can hold."""

    def __init__(self, folder):
        self.folder, self.changes = folder, Changes()

    def fit(self):
        model = build()
        switch = UnfreezeAtConvergence(**UNFREEZING, verbose=0)
        history = model.fit(
            batches(),
            validation_data=batches(),
            epochs=EPOCHS,
            callbacks=[switch, FreezeGuard(verbose=0)],
            verbose=0,
        )
        return outcome(model, history)

    def in_memory(self):
        return tuned(batches(), record=True)

    def on_disk(self):
        with self.changes.of(self.folder / "cache") as paths:
            return {
                **tuned(batches(), record=True, cache_dir=self.folder / "cache"),
                "files": paths,
            }

    def head(self):
        """A head by hand, in random orders of all data: features are of all processes."""
        cache = FeatureCache(build())
        features = cache(batches(), verbose=0)
        history = cache.head.fit(features, epochs=2, verbose=0)
        in_order = cache(batches(), shuffle=False, verbose=0)
        one_batch = cache(batches(*samples(1, BATCH)), verbose=0)
        return {
            "loss": history.history["loss"],
            "features": features_of(in_order),
            "one batch": np.sort(np.concatenate(features_of(one_batch)), axis=0).tolist(),
        }

    def views(self):
        """Random features of two batches that are the same."""
        noise = keras.layers.GaussianNoise(1.0)
        backbone = FrozenBackbone(models.functional(["dense"]))
        model = models.sequential_of(noise, backbone, keras.layers.Dense(1))
        model.compile("sgd", "mse")
        data = batches(np.ones((2 * BATCH, models.FEATURES), "float32"), np.ones((2 * BATCH, 1)))
        return features_of(FeatureCache(model)(data, views=1, shuffle=False, verbose=0))

    def alone(self):
        """The features as the backbone itself returns them."""
        backbone = models.frozen_backbone_of(build())
        return [on_host(backbone(x)).tolist() for x, _ in batches().as_numpy_iterator()]

    def resumed(self):
        """A recording of which one process's part is lost."""
        folder = self.folder / "resumed"
        cache = FeatureCache(build(), cache_dir=folder)
        first = features_of(cache(batches(), shuffle=False, verbose=0))
        kept = next(folder.rglob("part-0000-of-0002.view*"))
        number = kept.stat().st_ino
        of_all(0)
        if jax.process_index() == 0:
            for path in folder.rglob("part-0001*"):
                path.unlink()
            (kept.parent / ".part-0001-of-0002.view-000.shard-000000.other.tmp").touch()
        of_all(0)
        again = features_of(cache(batches(), shuffle=False, verbose=0))
        return {"same": first == again, "kept": kept.stat().st_ino == number}

    def own_data(self):
        keras.distribution.set_distribution(
            keras.distribution.DataParallel(auto_shard_dataset=False)
        )
        folder = self.folder / "own"
        result = tuned(own_batches(), record=True, cache_dir=folder)
        return {**result, "folders": sorted(path.name for path in folder.iterdir())}

    def spread_weights(self):
        """Of each Dense layer, each device has a half."""
        keras.distribution.set_distribution(distribution((1, 2)))
        return tuned(batches(), record=True)

    def little_room(self):
        """One process has room for features, and the other has none."""
        room = 10**9 * (1 - jax.process_index())
        with replaced(stage_records, "room_in_memory", lambda: room):
            return tuned(batches(), record=True)

    def random_for_one(self):
        """Each process has data of its own, which in one is random."""
        keras.distribution.set_distribution(
            keras.distribution.DataParallel(auto_shard_dataset=False)
        )
        draw = np.random.default_rng(0)  # Which goes on from epoch to epoch.

        def noisy(x, y):
            noise = tf.numpy_function(lambda: draw.normal(scale=1e-3), [], tf.float64)
            return x + tf.cast(noise, x.dtype), y

        own = own_batches()
        return tuned(own.map(noisy) if jax.process_index() == 1 else own, record=True)

    def errors(self):
        x, y = samples()
        other = batches(*samples(seed=jax.process_index()))
        elsewhere = self.folder / f"not-shared-{jax.process_index()}"
        return {
            "other data": error_of(lambda model: fine_tune(model, other, verbose=0)),
            "not shared": error_of(
                lambda model: fine_tune(model, batches(), cache_dir=elsewhere, verbose=0)
            ),
            "arrays": error_of(lambda model: fine_tune(model, x, y, verbose=0)),
            "shard": error_of(
                lambda model: FeatureCache(model)(batches(), shard=(0, 2), verbose=0)
            ),
            "rest": error_of(lambda model: fine_tune(model, batches(x[:20], y[:20]), verbose=0)),
        }

    def uneven(self):
        x, y = samples()
        return error_of(lambda model: fine_tune(model, x[:11], y[:11], batch_size=8, verbose=0))


def main(folder, settings, process):
    folder, settings = pathlib.Path(folder), json.loads(settings)
    if settings["processes"] > 1:
        join({**settings, "dies": None}, int(process))
    jobs, results = Jobs(folder), {}
    for name in settings["jobs"]:
        layout = keras.distribution.DataParallel() if settings["distributed"] else None
        keras.distribution.set_distribution(layout)
        results[name] = getattr(jobs, name)()
    (folder / f"result-{process}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
