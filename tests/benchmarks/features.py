"""What recorded features save, as ratios to training through the frozen backbone.

Run by hand: `python -m tests.benchmarks.features`. MobileNetV2 at 96x96, random weights, 2,048
random images, on the processor's cores that the process may use; times of each pair in turn, in one
process. The head is a Dense layer on the last feature map, pooled.
"""

import pathlib
import subprocess
import sys
import tempfile

import keras
import numpy as np
import tensorflow as tf

from keras_tl import FeatureCache, FrozenBackbone
from tests.benchmarks.timing import BATCH, SHAPE, images, print_table, seconds

SAMPLES = 2048
EPOCHS = 10
REPEATS = 9
BUFFER = 512


def model_of():
    keras.utils.set_random_seed(0)
    base = keras.applications.MobileNetV2(SHAPE, include_top=False, weights=None)
    pooling = keras.layers.GlobalAveragePooling2D()
    model = keras.Sequential(
        [keras.Input(SHAPE), FrozenBackbone(base), pooling, keras.layers.Dense(1)]
    )
    model.compile("adam", keras.losses.BinaryCrossentropy(from_logits=True))
    return model


def in_turn(*calls):
    """Returns the seconds that each call takes, `REPEATS` times, after one that traces."""
    for call in calls:
        call()
    return zip(*[[seconds(call) for call in calls] for _ in range(REPEATS)], strict=True)


def over(some, others):
    return [one / other for one, other in zip(some, others, strict=True)]


def workflow(model, x, y, folder):
    """Ratios of the ways to train a head, in one run."""
    cache = FeatureCache(model, cache_dir=folder)

    def record(**settings):
        return cache(x, y, batch_size=BATCH, name="features", verbose=0, **settings)

    def epoch(model, *data, **settings):
        return lambda: model.fit(*data, verbose=0, **settings)

    from_disk = record()
    in_memory = np.concatenate([batch.numpy() for batch, _ in record(shuffle=False)])
    through, disk, memory, extraction, predict = map(
        list,
        in_turn(
            epoch(model, x, y, batch_size=BATCH),
            epoch(cache.head, from_disk, shuffle=False),
            epoch(cache.head, in_memory, y, batch_size=BATCH),
            lambda: record(refresh=True),
            lambda: model.predict(x, batch_size=BATCH, verbose=0),
        ),
    )
    whole = [e + EPOCHS * d for e, d in zip(extraction, disk, strict=True)]
    return [
        ("head epoch through the backbone / on features from disk", ">= 25", over(through, disk)),
        ("head epoch on features from disk / on NumPy arrays", "<= 1.3", over(disk, memory)),
        (
            f"extraction and {EPOCHS} head epochs / {EPOCHS} through the backbone",
            "<= 0.15",
            [one / EPOCHS for one in over(whole, through)],
        ),
        ("extraction to disk / `predict`", "<= 1.1", over(extraction, predict)),
    ]


def formats(model, x, y, folder):
    """Ratios of head epochs on formats of `tf.data` to those on records."""
    cache = FeatureCache(model, cache_dir=folder)
    records = cache(x, y, batch_size=BATCH, name="records", verbose=0)
    samples = cache(x, y, name="records", shuffle=False, verbose=0).unbatch()
    spec = samples.element_spec

    def serialized(features, target):
        return tf.stack([tf.io.serialize_tensor(features), tf.io.serialize_tensor(target)])

    def parsed(serial):
        tensors = [tf.io.parse_tensor(serial[i], one.dtype) for i, one in enumerate(spec)]
        return tuple(tf.ensure_shape(t, one.shape) for t, one in zip(tensors, spec, strict=True))

    file = str(folder / "features.tfrecord")
    with tf.io.TFRecordWriter(file) as writer:
        for sample in samples:
            writer.write(tf.io.serialize_tensor(serialized(*sample)).numpy())
    saved = str(folder / "saved")
    samples.save(saved)
    one_file = tf.data.TFRecordDataset(file)
    one_file = one_file.map(
        lambda raw: parsed(tf.io.parse_tensor(raw, tf.string)), num_parallel_calls=tf.data.AUTOTUNE
    )
    rows = []
    timed = {
        "TFRecord": one_file,
        "`Dataset.save`": tf.data.Dataset.load(saved),
    }
    batched = {
        f"{name}, {how}": data.batch(BATCH).prefetch(2)
        for name, plain in timed.items()
        for how, data in (
            ("in order", plain),
            (f"shuffling {BUFFER} of {SAMPLES}", plain.shuffle(BUFFER)),
            ("shuffling all", plain.shuffle(SAMPLES)),
        )
    }
    heads = [
        lambda data=data: cache.head.fit(data, shuffle=False, verbose=0)
        for data in (records, *batched.values())
    ]
    ours, *others = map(list, in_turn(*heads))
    for name, times in zip(batched, others, strict=True):
        rows.append((f"head epoch on {name} / on records, shuffling all", "", over(times, ours)))
    return rows


def extract(times):
    """Extracts features of a data set that is never in memory, and prints the peak memory."""
    model = keras.Sequential([FrozenBackbone(keras.layers.AveragePooling2D(2))])
    model.build((None, *SHAPE))
    image = np.zeros(SHAPE, "float32")

    def batches():
        for number in range(16 * times):
            yield np.full((BATCH, *SHAPE), number, "float32") + image

    data = tf.data.Dataset.from_generator(
        batches, output_signature=tf.TensorSpec((None, *SHAPE), tf.float32)
    )
    with tempfile.TemporaryDirectory() as folder:
        features = FeatureCache(model, cache_dir=folder)(data, verbose=0)
        for _ in features:
            pass
        size = sum(path.stat().st_size for path in pathlib.Path(folder).rglob("*"))
    status = pathlib.Path("/proc/self/status").read_text()
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    print(size / 2**20, int(peak) / 2**10)


def memory():
    print("\n| data | features on disk | peak resident size |\n|---|---|---|")
    for times in (1, 2, 4, 8, 64):
        command = [sys.executable, "-m", "tests.benchmarks.features", str(times)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        size, peak = map(float, run.stdout.split()[-2:])
        print(f"| {times}x | {size:.0f} MiB | {peak:.0f} MiB |", flush=True)


def main():
    model = model_of()
    x, y = images(SAMPLES)
    with tempfile.TemporaryDirectory() as folder:
        print_table(workflow(model, x, y, pathlib.Path(folder)))
        print_table(formats(model, x, y, pathlib.Path(folder)))
    memory()


if __name__ == "__main__":
    extract(int(sys.argv[1])) if sys.argv[1:] else main()
