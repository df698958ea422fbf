"""Features of data without a name: found again by what the data is, in any order of calls."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tl import FeatureCache, StaleCacheError
from tests import models
from tests.features.conftest import contents
from tests.shared import regression_data

pytestmark = [pytest.mark.eager, pytest.mark.usefixtures("small_shards")]

X, Y = regression_data(12)
HELD_OUT = X[:8] + 1, Y[:8]


def cache_of(model, folder):
    cache = FeatureCache(model, cache_dir=folder)
    return lambda x, y=None, **settings: contents(
        cache(x, y, **{"batch_size": 2, "shuffle": False, "verbose": 0, **settings})
    )


def arrays(x, y):
    return x, y


def shuffled(x, y):
    return (tf.data.Dataset.from_tensor_slices((x, y)).shuffle(12).batch(2),)


@pytest.mark.parametrize(
    "kind, check_data",
    [
        (arrays, False),
        (shuffled, True),
        pytest.param(arrays, True, marks=pytest.mark.slow),
        pytest.param(shuffled, False, marks=pytest.mark.slow),
    ],
)
def test_the_order_of_calls_does_not_matter(kind, check_data, model, tmp_path, batches_extracted):
    size = {} if kind is arrays else {"batch_size": None}
    train, held_out = kind(X, Y), kind(*HELD_OUT)
    cache = cache_of(model, tmp_path)
    features = [sorted(cache(*data, **size)) for data in (train, held_out)]
    batches_extracted.clear()
    for order in itertools.permutations([0, 1]):
        later = cache_of(model, tmp_path)
        for number in order:
            data = kind(X, Y) if number == 0 else kind(*HELD_OUT)
            assert sorted(later(*data, **size, check_data=check_data)) == features[number]
    assert batches_extracted == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_other_data_first_gets_a_folder_of_its_own(model, tmp_path, batches_extracted, capsys):
    train = cache_of(model, tmp_path)(X, Y, verbose=2)
    assert "no features of this data" not in capsys.readouterr().out
    cache_of(model, tmp_path)(*HELD_OUT, verbose=2)
    assert "has no features of this data yet. They are recorded in '1'" in capsys.readouterr().out
    batches_extracted.clear()
    assert cache_of(model, tmp_path)(X, Y) == train
    assert batches_extracted == []


def test_equal_data_in_another_object_is_the_same(model, tmp_path, batches_extracted):
    cache = cache_of(model, tmp_path)
    assert cache(X, Y) == cache(X.copy(), Y.copy())
    assert len(batches_extracted) == 6


def test_data_that_changes_is_other_data(model, tmp_path):
    cache, x = cache_of(model, tmp_path), X.copy()
    before = cache(x, Y)
    x += 1
    assert cache(x, Y) == cache_of(model, None)(X + 1, Y)
    assert cache(X, Y) == before


def test_the_same_data_with_another_backbone_is_an_error(model, tmp_path):
    cache_of(model, tmp_path)(*HELD_OUT)
    cache_of(model, tmp_path)(X, Y)
    kernel = models.frozen_backbone_of(model).backbone.weights[0]
    value = keras.ops.convert_to_numpy(kernel)
    try:
        kernel.assign(value + 1)
        for data in ((X, Y), HELD_OUT):
            with pytest.raises(StaleCacheError, match="Changed: the weights"):
                cache_of(model, tmp_path)(*data)
    finally:
        kernel.assign(value)


def test_an_interrupted_extraction_goes_on_in_its_folder(model, tmp_path, batches_extracted):
    train = cache_of(model, tmp_path)(X, Y)
    held_out = cache_of(model, tmp_path)(*HELD_OUT)
    for number in range(2):
        (tmp_path / str(number) / "part-0000-of-0001.json").unlink()
        max((tmp_path / str(number)).glob("*.shard-*")).unlink()
    batches_extracted.clear()
    assert cache_of(model, tmp_path)(*HELD_OUT) == held_out
    assert cache_of(model, tmp_path)(X, Y) == train
    assert len(batches_extracted) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


NOISE = np.random.default_rng(0)


def augmented(x, y):
    def samples():
        yield from zip(x + NOISE.normal(size=x.shape), y)

    spec = (tf.TensorSpec(x.shape[1:], "float32"), tf.TensorSpec(y.shape[1:], "float32"))
    return tf.data.Dataset.from_generator(samples, output_signature=spec).batch(2)


def interrupt(folder):
    """Leaves the first shard of the first pass, as a process that is killed does."""
    for path in folder.glob("part-*"):
        if not path.name.endswith("view-000.shard-000000"):
            path.unlink()


@pytest.mark.parametrize(
    "name, targets",
    [
        (None, True),
        pytest.param("named", True, marks=pytest.mark.slow),
        ("named", False),
        pytest.param(None, False, marks=pytest.mark.slow),
    ],
)
def test_interrupted_views_of_augmented_data_go_on(
    name, targets, model, tmp_path, batches_extracted
):
    def record():
        data = augmented(X, Y) if targets else augmented(X, Y).map(lambda x, y: x)
        cache = FeatureCache(model, cache_dir=tmp_path)
        return cache(data, views=2, name=name, verbose=0)

    record()
    (folder,) = tmp_path.iterdir()
    interrupt(folder)
    batches_extracted.clear()
    record()
    assert len(batches_extracted) == 12 - 2
    assert list(tmp_path.iterdir()) == [folder]
    batches_extracted.clear()
    if name is None and targets:
        cache_of(model, tmp_path)(augmented(X, Y + 1), batch_size=None, views=2)
        assert len(list(tmp_path.iterdir())) == 2


def test_an_interrupted_extraction_of_shuffled_data_is_an_error_not_a_folder(model, tmp_path):
    cache_of(model, tmp_path)(*shuffled(X, Y), batch_size=None)
    interrupt(tmp_path / "0")
    with pytest.raises(StaleCacheError):
        cache_of(model, tmp_path)(*shuffled(X, Y), batch_size=None)
    cache_of(model, tmp_path)(*HELD_OUT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


@pytest.mark.parametrize("on_disk", [pytest.param(False, marks=pytest.mark.slow), True])
def test_batches_without_samples_and_fields_without_numbers(on_disk, model, tmp_path):
    def batches():
        for begin, end in [(0, 2), (2, 2), (2, 6)]:
            yield X[begin:end], {"y": Y[begin:end], "none": np.zeros((end - begin, 0), "float32")}

    vector = tf.TensorSpec((None, 1), "float32")
    spec = (tf.TensorSpec((None, 4), "float32"), {"y": vector, "none": tf.TensorSpec((None, 0))})
    data = tf.data.Dataset.from_generator(batches, output_signature=spec)
    features = FeatureCache(model, cache_dir=tmp_path if on_disk else None)(
        data, shuffle=False, verbose=0
    )
    assert [len(y["y"]) for _, y in features] == [2, 0, 4]
    assert np.concatenate([y["y"] for _, y in features]).tobytes() == Y[:6].tobytes()


def test_parts_without_a_name_join(model, tmp_path):
    whole = cache_of(model, None)(X, Y)
    cache_of(model, tmp_path)(*HELD_OUT)
    for part in (1, 0):
        cache_of(model, tmp_path)(X, Y, shard=(part, 2))
    assert cache_of(model, tmp_path)(X, Y) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_generators_are_known_by_the_order_of_calls(model, tmp_path, batches_extracted):
    def batches(x, y):
        return (pair for pair in [(x[:4], y[:4]), (x[4:], y[4:])])

    for _ in range(2):
        cache = cache_of(model, tmp_path)
        cache(batches(X, Y), batch_size=None)
        cache(batches(*HELD_OUT), batch_size=None)
    assert len(batches_extracted) == 4
    with pytest.raises(StaleCacheError, match="`name`"):
        cache_of(model, tmp_path)(batches(*HELD_OUT), batch_size=None)


def test_a_folder_is_the_same_after_a_change_of_directory(
    model, tmp_path, monkeypatch, batches_extracted
):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "first")
    cache = cache_of(model, "features")
    monkeypatch.chdir(tmp_path / "second")
    features = cache(X, Y)
    assert not list((tmp_path / "second").iterdir())
    monkeypatch.chdir(tmp_path / "first")
    batches_extracted.clear()
    assert cache_of(model, "features")(X, Y) == features
    assert batches_extracted == []
    assert np.frombuffer(features[0], "float32").shape == (8,)


@pytest.mark.parametrize("check_data", [pytest.param(True, marks=pytest.mark.slow), False])
def test_the_same_data_for_fit_and_for_evaluate_has_a_folder_for_each(check_data, model, tmp_path):
    for _ in range(2):
        cache = cache_of(model, tmp_path)
        for training in (True, False):
            cache(X, Y, training=training, check_data=check_data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
