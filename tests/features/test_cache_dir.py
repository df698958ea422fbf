"""Features on disk: used again, never for another backbone or other data, and mended."""

import errno
import json
import os

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_tl
from keras_tl import FeatureCache, FrozenBackbone, StaleCacheError
from keras_tl.features import disk_store, extraction
from keras_tl.features.identity import differences
from keras_tl.features.source import Samples
from keras_tl.internals.values import on_host
from tests import models
from tests.features.conftest import contents
from tests.shared import examples, regression_data

pytestmark = pytest.mark.eager

X, Y = regression_data(22)
BATCH, SHARD_BATCHES = 2, 3
SHARDS = 4  # 11 batches.


def build(kinds=("dense", "batchnorm", "dense"), seed=0):
    keras.utils.set_random_seed(seed)
    return models.functional_outer(FrozenBackbone(models.functional(kinds)))


@pytest.fixture(scope="module")
def unchanged():
    model = build()
    return model, model.get_weights()


@pytest.fixture
def model(unchanged):
    """A model that all tests share, with its weights as they were."""
    model, weights = unchanged
    model.set_weights(weights)
    return model


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(extraction, "SHARD_BATCHES", SHARD_BATCHES)


def record(model, folder, x=X, y=Y, **settings):
    # By name: data without one is known by what it is, see test_unnamed.py.
    settings = {"batch_size": BATCH, "shuffle": False, "verbose": 0, "name": "0", **settings}
    return FeatureCache(model, cache_dir=folder)(x, y, **settings)


def shards_in(folder):
    return sorted(folder.rglob("*.shard-*"))


def test_a_later_cache_uses_what_was_recorded(model, tmp_path, batches_extracted):
    first = contents(record(model, tmp_path))
    assert len(batches_extracted) == 11
    assert len(shards_in(tmp_path)) == SHARDS
    batches_extracted.clear()
    assert contents(record(model, tmp_path)) == first
    assert batches_extracted == []


def test_names_that_count_up_in_a_process_do_not_matter(tmp_path, batches_extracted):
    first = contents(record(build(), tmp_path))
    batches_extracted.clear()
    assert contents(record(build(), tmp_path)) == first
    assert batches_extracted == []


# Two of them, in any order: test_unnamed.
@pytest.mark.slow
def test_several_data_sets_in_one_folder(model, tmp_path, batches_extracted):
    other = X[:8], Y[:8]
    for _ in range(2):
        cache = FeatureCache(model, cache_dir=tmp_path)
        train = cache(X, Y, batch_size=BATCH, verbose=0)
        held_out = cache(*other, batch_size=BATCH, verbose=0)
        again = cache(X, Y, batch_size=BATCH, verbose=0)
        assert [int(one.cardinality()) for one in (train, held_out, again)] == [11, 4, 11]
    assert len(batches_extracted) == 15
    assert sorted(os.listdir(tmp_path)) == ["0", "1"]
    assert int(record(model, tmp_path, name="named").cardinality()) == 11
    assert sorted(os.listdir(tmp_path)) == ["0", "1", "named"]


def _flip_one_bit(model):
    kernel = models.frozen_backbone_of(model).backbone.weights[0]
    raw = bytearray(on_host(kernel).tobytes())
    raw[5] ^= 1
    kernel.assign(np.frombuffer(bytes(raw), "float32").reshape(kernel.shape))
    return kernel.path


CHANGES = [
    ({"x": X + 1}, "Changed: the inputs"),
    ({"x": X.astype("int32")}, r"dtype of the inputs \(recorded float32\(4,\), now int32"),
    ({"y": Y + 1}, "Changed: the targets or sample weights"),
    ({"y": np.hstack([Y, Y])}, r"shape or dtype of the targets"),
    ({"x": X[:20], "y": Y[:20]}, r"the number of samples \(recorded 22, now 20\)"),
    ({"x": np.tile(X, (2, 1)), "y": np.tile(Y, (2, 1))}, r"\(recorded 22, now 44\)"),
]


@pytest.mark.parametrize(
    "changed, message, dataset",
    [
        (*CHANGES[0], False),
        (*CHANGES[2], True),
        *(
            pytest.param(*change, dataset, marks=pytest.mark.slow)
            for change in CHANGES
            for dataset in (False, True)
        ),
    ],
)
def test_other_data_is_an_error_that_names_what_changed(changed, message, dataset, model, tmp_path):
    def prepared(x, y):
        if not dataset:
            return {"x": x, "y": y}
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
        return {"x": data, "y": None, "batch_size": None}

    first = contents(record(model, tmp_path, **prepared(X, Y)))
    changed = prepared(**{"x": X, "y": Y, **changed})
    with pytest.raises(StaleCacheError, match=message) as raised:
        record(model, tmp_path, **changed)
    assert str(tmp_path) in str(raised.value)
    assert "`refresh=True`" in str(raised.value)
    assert contents(record(model, tmp_path, **prepared(X, Y))) == first
    refreshed = contents(record(model, tmp_path, **changed, refresh=True))
    assert refreshed == contents(record(model, tmp_path, **changed)) != first


def test_what_changed_is_said_in_words():
    recorded = {"configuration": "c", "weights": [], "inputs": ["float32(4,)"], "targets": []}
    now = {**recorded, "inputs": ["int32(4,)"], "targets": ["float32(2,)"]}
    assert differences(recorded, now) == [
        "shape or dtype of the inputs (recorded float32(4,), now int32(4,))",
        "shape or dtype of the targets (recorded none, now float32(2,))",
    ]
    fewer = Samples([20]).difference(Samples([12, 10]))
    assert fewer == "the number of samples (recorded 20, now 22)"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"dtype": "float16"}, r"dtype \(recorded None, now float16\)"),
        ({"views": 2}, r"views \(recorded None, now 2\)"),
        ({"training": False}, r"training \(recorded True, now False\)"),
    ],
)
def test_other_settings_are_an_error(settings, message, model, tmp_path):
    record(model, tmp_path)
    with pytest.raises(StaleCacheError, match=message):
        record(model, tmp_path, **settings)


def test_another_shape_of_the_inputs_is_an_error(tmp_path):
    base = keras.Sequential([keras.Input((None, 4)), keras.layers.GlobalAveragePooling1D()])
    model = keras.Sequential([FrozenBackbone(base), keras.layers.Dense(1)])
    model.build((None, None, 4))
    record(model, tmp_path, x=np.ones((22, 3, 4), "float32"))
    with pytest.raises(
        StaleCacheError, match=r"shape.*inputs \(recorded float32\(3, 4\), now float32\(5, 4\)"
    ):
        record(model, tmp_path, x=np.ones((22, 5, 4), "float32"))


def test_one_changed_bit_of_a_backbone_weight_is_an_error(model, tmp_path, batches_extracted):
    record(model, tmp_path)
    path = _flip_one_bit(model)
    with pytest.raises(StaleCacheError, match=f"Changed: the weights {path}"):
        record(model, tmp_path)
    batches_extracted.clear()
    record(model, tmp_path, refresh=True)
    assert len(batches_extracted) == 11
    record(model, tmp_path)
    assert len(batches_extracted) == 11


def test_a_change_in_the_head_is_no_matter(model, tmp_path, batches_extracted):
    record(model, tmp_path)
    model.get_layer("output").kernel.assign([[9.0]] * 4)
    batches_extracted.clear()
    record(model, tmp_path)
    assert batches_extracted == []


def test_another_backbone_is_an_error(tmp_path):
    def relu():
        base = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, activation=activation)])
        base.set_weights([np.ones((4, 4)), np.ones(4)])
        return models.functional_outer(FrozenBackbone(base))

    activation = "tanh"
    record(relu(), tmp_path)
    activation = "relu"
    with pytest.raises(StaleCacheError, match="Changed: the layers up to the backbone's outputs"):
        record(relu(), tmp_path)


def test_data_need_not_be_read_again(model, tmp_path):
    first = contents(record(model, tmp_path))
    assert contents(record(model, tmp_path, x=X + 1, check_data=False)) == first


def test_arrays_in_another_order_are_the_same_data_recorded_before(model, tmp_path):
    first = contents(record(model, tmp_path))
    assert contents(record(model, tmp_path, x=X[::-1].copy(), y=Y[::-1].copy())) == first


def test_features_of_a_newer_version_are_an_error(model, tmp_path, monkeypatch):
    monkeypatch.setattr(disk_store, "FORMAT", disk_store.FORMAT + 1)
    record(model, tmp_path)
    monkeypatch.undo()
    with pytest.raises(StaleCacheError, match=f"{keras_tl.__version__}.*Update keras_tl, or pass"):
        record(model, tmp_path)


def test_the_manifest_says_what_was_recorded(model, tmp_path):
    record(model, tmp_path)
    manifest = json.loads((tmp_path / "0" / "manifest.json").read_text())["content"]
    assert manifest["keras_tl"] == keras_tl.__version__
    assert manifest["identity"]["inputs"] == ["float32(4,)"]
    assert manifest["identity"]["targets"] == ["float32(1,)"]
    assert len(manifest["identity"]["weights"]) == len(models.frozen_backbone_of(model).weights)
    assert manifest["fields"] == [[[4], "float32", "float32"], [[1], "float32", "float32"]]


# Damage.


def truncated(path):
    os.truncate(path, path.stat().st_size - 1)


def emptied(path):
    os.truncate(path, 0)


def flipped(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 16
    path.write_bytes(raw)


def deleted(path):
    path.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        flipped,
        deleted,
        pytest.param(truncated, marks=pytest.mark.slow),
        pytest.param(emptied, marks=pytest.mark.slow),
    ],
)
def test_a_damaged_shard_alone_is_recorded_again(
    damage, model, tmp_path, batches_extracted, capsys
):
    first = contents(record(model, tmp_path))
    whole = {path: path.stat().st_mtime_ns for path in shards_in(tmp_path)}
    harmed = shards_in(tmp_path)[1]
    damage(harmed)
    batches_extracted.clear()
    assert contents(record(model, tmp_path)) == first
    assert len(batches_extracted) == SHARD_BATCHES
    again = {path: path.stat().st_mtime_ns for path in shards_in(tmp_path)}
    assert [path for path in whole if again[path] != whole[path]] == [harmed]
    said = capsys.readouterr().out
    assert (f"{harmed.name} is damaged" in said) == (damage is not deleted)


@settings(max_examples=examples(16))
@given(data=st.data())
def test_a_flipped_bit_anywhere_changes_no_feature(data, tmp_path_factory):
    folder, model, first = _recorded_once(tmp_path_factory)
    path = data.draw(st.sampled_from(sorted(folder.rglob("*.*"))))
    before = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(before) - 1))
    harmed = bytearray(before)
    harmed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(harmed)
    try:
        assert contents(record(model, folder)) == first
    finally:
        path.write_bytes(before)


_RECORDED = []


def _recorded_once(tmp_path_factory):
    if not _RECORDED:
        folder, model = tmp_path_factory.mktemp("features"), build()
        _RECORDED.extend([folder, model, contents(record(model, folder))])
    return _RECORDED


# Interruptions.


def test_an_interrupted_extraction_goes_on_after_the_last_whole_shard(
    model, tmp_path, batches_extracted
):
    class Interrupted(keras.utils.PyDataset):
        last = 8

        def __len__(self):
            return 11

        def __getitem__(self, index):
            if index > self.last:
                raise KeyboardInterrupt
            at = slice(2 * index, 2 * index + 2)
            return X[at], Y[at]

    settings = {"y": None, "batch_size": None}
    data = Interrupted()
    with pytest.raises(BaseException):  # noqa: B017
        record(model, tmp_path, data, **settings)
    done = len(shards_in(tmp_path))
    assert 1 <= done < SHARDS
    data.last = 10
    batches_extracted.clear()
    features = contents(record(model, tmp_path, data, **settings))
    assert len(batches_extracted) == 11 - done * SHARD_BATCHES
    assert features == contents(record(model, tmp_path / "other", data, **settings))


def test_resuming_with_other_data_is_an_error(model, tmp_path, monkeypatch):
    _fill_the_disk(monkeypatch, after=3)
    with pytest.raises(OSError):
        record(model, tmp_path)
    monkeypatch.undo()
    with pytest.raises(StaleCacheError, match="the inputs"):
        record(model, tmp_path, x=X + 1)
    monkeypatch.setattr(extraction, "SHARD_BATCHES", SHARD_BATCHES)
    with pytest.raises(StaleCacheError, match="the number of samples|the batch size"):
        record(model, tmp_path, batch_size=4)
    assert len(contents(record(model, tmp_path))) == 22


def _fill_the_disk(monkeypatch, after):
    calls, original = [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", full)


def test_a_full_disk_is_an_error_that_keeps_the_finished_shards(
    model, tmp_path, monkeypatch, batches_extracted
):
    _fill_the_disk(monkeypatch, after=3)  # The manifest and two shards.
    with pytest.raises(OSError, match="the disk is full.*finished before are kept") as raised:
        record(model, tmp_path)
    assert raised.value.errno == errno.ENOSPC
    assert len(shards_in(tmp_path)) == 2
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    batches_extracted.clear()
    monkeypatch.setattr(extraction, "SHARD_BATCHES", SHARD_BATCHES)
    assert len(contents(record(model, tmp_path))) == 22


def test_a_folder_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        record(model, tmp_path / "file")


# Parts.


# Parts of two processes: test_extraction_processes.
@pytest.mark.slow
def test_parts_by_several_workers_join_into_one_cache(tmp_path):
    # One after the other, each with a model of its own, as separate processes have.
    whole = contents(record(build(), None))
    for index in (2, 0, 1):
        part = record(build(), tmp_path / "parts", shard=(index, 3))
        assert contents(part) == _every_third(whole, index)
    assert contents(record(build(), tmp_path / "parts")) == whole


def _every_third(features, index):
    batches = [features[at : at + 2] for at in range(0, len(features), 2)]
    return [part for batch in batches[index::3] for part in batch]


def test_a_missing_part_is_named(model, tmp_path):
    record(model, tmp_path, shard=(1, 4))
    with pytest.raises(
        ValueError, match=r"in 4 parts, of which 0, 2, 3 are missing.*shard=\(0, 4\)"
    ):
        record(model, tmp_path)
    record(model, tmp_path, shard=(0, 4))
    record(model, tmp_path, shard=(3, 4))
    with pytest.raises(ValueError, match="of which 2 is missing or not finished"):
        record(model, tmp_path)


def test_parts_of_other_data_do_not_join(model, tmp_path):
    record(model, tmp_path, shard=(0, 2))
    record(model, tmp_path, x=X + 1, shard=(1, 2))
    with pytest.raises(StaleCacheError, match="the inputs"):
        record(model, tmp_path)


def test_a_part_without_batches(model, tmp_path):
    for index in range(3):
        record(model, tmp_path, x=X[:4], y=Y[:4], shard=(index, 3))
    assert len(contents(record(model, tmp_path, x=X[:4], y=Y[:4]))) == 4


def test_a_part_in_memory(model):
    whole = contents(record(model, None))
    assert contents(record(model, None, shard=(1, 3))) == _every_third(whole, 1)
