"""What FeatureCache gives for every kind of data, and the head that it makes."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tl import FeatureCache, FrozenBackbone
from keras_tl.features.unrolled import Unrolled
from tests import models
from tests.shared import as_bytes, regression_data, values_of

pytestmark = [pytest.mark.covers("part: FeatureCache"), pytest.mark.eager]

X, Y = regression_data(20)
WEIGHTS = np.linspace(0.1, 1, 20).astype("float32")


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        at = slice(4 * index, 4 * index + 4)
        return X[at], Y[at], WEIGHTS[at]


def generator():
    while True:
        for index in range(5):
            yield Batches()[index]


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    wrapper = FrozenBackbone(models.functional(["dense", "batchnorm", "dropout", "dense"]))
    model = models.functional_outer(wrapper, [keras.layers.Dropout(0.5)])
    model.compile("sgd", "mse", metrics=["mae"])
    return model


@pytest.fixture(scope="module")
def features_of_x(model):
    return np.asarray(models.frozen_backbone_of(model)(X))


def elements(dataset):
    """The samples of a data set: for each part of an element, one array."""
    batches = [keras.tree.flatten(batch) for batch in dataset]
    return [np.concatenate(parts) for parts in zip(*batches, strict=True)]


KINDS = {
    "arrays": lambda: ((X, Y, WEIGHTS), {"batch_size": 4}),
    "tf.data": lambda: ((tf.data.Dataset.from_tensor_slices((X, Y, WEIGHTS)).batch(4),), {}),
    "PyDataset": lambda: ((Batches(),), {}),
    "generator": lambda: ((generator(),), {"steps": 5}),
}


@pytest.mark.parametrize(
    "kind, on_disk",
    [
        ("arrays", False),
        ("tf.data", True),
        ("PyDataset", True),
        ("generator", True),
        *(
            pytest.param(kind, on_disk, marks=pytest.mark.slow)
            for kind in KINDS
            for on_disk in (False, True)
        ),
    ],
)
def test_features_with_targets_and_weights_of(kind, on_disk, model, features_of_x, tmp_path):
    cache = FeatureCache(model, cache_dir=tmp_path if on_disk else None)
    data, settings = KINDS[kind]()
    dataset = cache(*data, **settings, shuffle=False, verbose=0)
    assert [len(y) for _, y, _ in dataset] == [4] * 5
    features, y, weights = elements(dataset)
    np.testing.assert_allclose(features, features_of_x, rtol=1e-5, atol=1e-6)
    assert y.tobytes() == Y.tobytes()
    assert weights.tobytes() == WEIGHTS.tobytes()


def test_the_head_shares_layers_and_optimizer(model):
    head = FeatureCache(model).head
    assert [id(one) for one in head.trainable_weights] == [
        id(one) for one in model.trainable_weights
    ]
    assert head.optimizer is model.optimizer
    assert head.layers[1:] == model.layers[2:]


def test_the_head_evaluates_to_what_the_model_does(model):
    cache = FeatureCache(model)
    expected = model.evaluate(X, Y, batch_size=4, return_dict=True, verbose=0)
    features = cache(X, Y, batch_size=4, shuffle=False, verbose=0)
    assert cache.head.evaluate(features, return_dict=True, verbose=0) == expected


def test_predict_alone_needs_no_targets(model, features_of_x):
    cache = FeatureCache(model)
    dataset = cache(X, shuffle=False, verbose=0)
    assert isinstance(dataset.element_spec, tf.TensorSpec)
    predicted = cache.head.predict(dataset, verbose=0)
    np.testing.assert_allclose(predicted, model.predict(X, verbose=0), rtol=1e-5, atol=1e-6)


def test_shuffles_all_samples_anew_in_each_epoch(model):
    dataset = FeatureCache(model)(X, np.arange(20), batch_size=4, verbose=0)
    first, second = (np.concatenate([y for _, y in dataset]) for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first.tolist() != second.tolist() != list(range(20))


def test_the_seed_decides_the_orders(model):
    cache = FeatureCache(model)

    def order(seed):
        dataset = cache(X, np.arange(20), seed=seed, verbose=0)
        return [np.concatenate([y for _, y in dataset]).tolist() for _ in range(2)]

    assert order(1) == order(1) != order(2)
    keras.utils.set_random_seed(3)
    one = order(None)
    keras.utils.set_random_seed(3)
    assert order(None) == one


@pytest.mark.parametrize(
    "batch_size, sizes",
    [
        (8, [8, 8, 4]),
        (64, [20]),
        pytest.param(20, [20], marks=pytest.mark.slow),
        pytest.param(1, [1] * 20, marks=pytest.mark.slow),
    ],
)
def test_batches_can_have_another_size(batch_size, sizes, model):
    cache = FeatureCache(model)
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(6)
    dataset = cache(data, batch_size=batch_size, shuffle=False, verbose=0)
    assert [len(y) for _, y in dataset] == sizes
    assert int(dataset.cardinality()) == len(sizes)
    assert np.concatenate([y for _, y in dataset]).tobytes() == Y.tobytes()


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_data_without_samples(on_disk, model, tmp_path):
    cache = FeatureCache(model, cache_dir=tmp_path if on_disk else None)
    data = tf.data.Dataset.from_tensor_slices((X[:0], Y[:0])).batch(4)
    dataset = cache(data, verbose=0)
    assert list(dataset) == []
    assert dataset.element_spec[0].shape[1:] == (models.FEATURES,)


def test_inputs_and_outputs_by_name_and_one_that_bypasses_the_backbone():
    image, extra = keras.Input((4,), name="image"), keras.Input((3,), name="extra")
    wrapper = FrozenBackbone(models.functional(["dense"]))
    joined = keras.layers.Concatenate()([wrapper(image), extra])
    outputs = {
        "one": keras.layers.Dense(1, name="one")(joined),
        "two": keras.layers.Dense(2, name="two")(joined),
    }
    model = keras.Model({"image": image, "extra": extra}, outputs)
    model.compile("sgd", {"one": "mse", "two": "mae"}, loss_weights={"one": 2.0, "two": 0.5})
    x = {"image": X, "extra": X[:, :3]}
    y = {"one": Y, "two": np.hstack([Y, Y])}
    weights = {"one": WEIGHTS, "two": WEIGHTS[::-1].copy()}

    cache = FeatureCache(model)
    dataset = cache(x, y, weights, batch_size=4, shuffle=False, verbose=0)

    features, targets, sample_weights = dataset.element_spec
    assert set(features) == {wrapper.name, "extra"}
    assert set(targets) == set(sample_weights) == {"one", "two"}
    expected = model.evaluate(
        x, y, sample_weight=weights, batch_size=4, return_dict=True, verbose=0
    )
    assert cache.head.evaluate(dataset, return_dict=True, verbose=0) == expected

    narrowed = cache(x, shuffle=False, batch_size=20, dtype="float16", verbose=0)
    (features,) = narrowed
    np.testing.assert_array_equal(features["extra"], x["extra"])  # Only features are narrowed.


def test_features_of_several_layers():
    base = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(4, name="low"), keras.layers.Dense(5, name="high")]
    )
    inputs = keras.Input((4,))
    low, high = FrozenBackbone(base, output_layers=["low", "high"])(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Concatenate()([low, high])))
    cache = FeatureCache(model)
    dataset = cache(X, shuffle=False, batch_size=20, verbose=0)
    assert [spec.shape[1] for spec in dataset.element_spec.values()] == [4, 5]
    predicted = cache.head.predict(dataset, verbose=0)
    assert predicted.tobytes() == model.predict(X, batch_size=20, verbose=0).tobytes()


def test_masks_are_recorded():
    tokens = np.array([[1, 2, 0, 0], [3, 0, 0, 0], [1, 1, 1, 1]])
    base = keras.Sequential([keras.Input((4,)), keras.layers.Embedding(5, 3, mask_zero=True)])
    model = keras.Sequential(
        [keras.Input((4,)), FrozenBackbone(base), keras.layers.LSTM(2), keras.layers.Dense(1)]
    )
    cache = FeatureCache(model)
    dataset = cache(tokens, shuffle=False, verbose=0)
    assert [name.endswith("_mask") for name in dataset.element_spec] == [False, True]
    predicted = cache.head.predict(dataset, verbose=0)
    assert predicted.tobytes() == model.predict(tokens, verbose=0).tobytes()


def test_a_backbone_called_twice():
    left, right = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    wrapper = FrozenBackbone(models.functional(["dense"]))
    difference = keras.layers.Subtract()([wrapper(left), wrapper(right)])
    model = keras.Model([left, right], keras.layers.Dense(1)(difference))
    cache = FeatureCache(model)
    dataset = cache([X, X[::-1].copy()], shuffle=False, batch_size=20, verbose=0)
    assert len(dataset.element_spec) == 2
    predicted = cache.head.predict(dataset, verbose=0)
    expected = model.predict([X, X[::-1].copy()], batch_size=20, verbose=0)
    assert predicted.tobytes() == expected.tobytes()


def test_a_plain_backbone():
    base = models.functional(["dense", "batchnorm"])
    base.trainable = False
    model = models.functional_outer(base)
    model.compile("sgd", "mse")
    before = as_bytes(base.weights)
    cache = FeatureCache(model, backbone=base)
    cache.head.fit(cache(X, Y, verbose=0), verbose=0)
    assert as_bytes(base.weights) == before


@pytest.mark.parametrize("dtype", [pytest.param("float16", marks=pytest.mark.slow), "bfloat16"])
def test_half_the_size_on_disk(dtype, model, features_of_x, tmp_path):
    def size(folder):
        return sum(path.stat().st_size for path in folder.rglob("*shard*"))

    FeatureCache(model, cache_dir=tmp_path / "whole")(X, verbose=0)
    cache = FeatureCache(model, cache_dir=tmp_path / "half")
    dataset = cache(X, dtype=dtype, shuffle=False, verbose=0)
    header = 400
    assert size(tmp_path / "whole") - size(tmp_path / "half") >= features_of_x.nbytes / 2 - header
    assert dataset.element_spec.dtype == tf.float32
    (features,) = elements(dataset)
    rounding = {"float16": 2**-11, "bfloat16": 2**-8}[dtype]
    np.testing.assert_allclose(features, features_of_x, rtol=rounding * 1.01, atol=1e-6)


def test_a_feature_that_float16_cannot_hold(model):
    with pytest.raises(ValueError, match="too large for `dtype='float16'`.*bfloat16"):
        FeatureCache(_scaled(1e6))(X, dtype="float16", verbose=0)


def _scaled(factor):
    base = keras.Sequential([keras.Input((4,)), keras.layers.Rescaling(factor)])
    return keras.Sequential([FrozenBackbone(base), keras.layers.Dense(1)])


def test_mixed_precision_keeps_half_precision_features():
    with_policy = {"dtype": "mixed_float16"}
    base = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, **with_policy)])
    model = keras.Sequential(
        [keras.Input((4,)), FrozenBackbone(base, **with_policy), keras.layers.Dense(1)]
    )
    model.compile("sgd", "mse")
    cache = FeatureCache(model)
    dataset = cache(X, Y, shuffle=False, batch_size=20, verbose=0)
    assert dataset.element_spec[0].dtype == tf.float16
    cache.head.fit(dataset, verbose=0)
    predicted = cache.head.predict(dataset, verbose=0)
    assert predicted.tobytes() == model.predict(X, batch_size=20, verbose=0).tobytes()


def test_training_the_head_trains_the_model(model):
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    copy.compile("sgd", "mse")
    before = values_of(copy)
    cache = FeatureCache(copy)
    cache.head.fit(cache(X, Y, verbose=0), verbose=0)
    assert values_of(copy) != before


def test_there_is_a_progress_bar_with_rate_and_time_left(model, capsys):
    cache = FeatureCache(model)
    cache(X, batch_size=4)
    printed = capsys.readouterr().out
    assert "5/5" in printed
    assert "ms/batch" in printed
    assert "samples_per_second" in printed
    cache(X, batch_size=4, verbose=0)
    assert capsys.readouterr().out == ""
    cache(X, batch_size=4, verbose=2)
    line = capsys.readouterr().out
    assert line.startswith("5/5")
    assert line.index("\n") == len(line) - 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dtype": "int8"}, "`dtype` must be one of .*float16.*Received: dtype='int8'"),
        ({"views": 0}, "views"),
        ({"shard": 3}, r"`shard` must be a tuple `\(index, count\)`"),
        ({"shard": (2, 2)}, "from 0 to count - 1"),
        ({"name": "../up"}, "`name` is that of a folder"),
    ],
)
def test_arguments_out_of_range(arguments, message, model):
    with pytest.raises(ValueError, match=message):
        FeatureCache(model)(X, **arguments)


def test_a_subclassed_model_cannot_be_split():
    model = models.SubclassedOuter(FrozenBackbone(models.functional(["dense"])))
    with pytest.raises(
        ValueError, match="only a Functional or a built Sequential model has a graph"
    ):
        FeatureCache(model)


def test_a_backbone_that_trains(model):
    wrapper = FrozenBackbone(models.functional(["dense"]))
    trained = models.functional_outer(wrapper)
    cache = FeatureCache(trained)
    wrapper.unfreeze()
    with pytest.raises(ValueError, match="is not frozen.*Freeze it and compile the model again"):
        cache(X)
    with pytest.raises(ValueError, match="is not frozen"):
        FeatureCache(trained)


def test_weights_before_the_backbone_that_train():
    inputs = keras.Input((4,))
    x = keras.layers.Dense(4, name="adapter")(inputs)
    x = FrozenBackbone(models.functional(["dense"]))(x)
    model = keras.Model(inputs, keras.layers.Dense(1)(x))
    with pytest.raises(ValueError, match="adapter/kernel.*come before the outputs of the backbone"):
        FeatureCache(model)


def test_a_model_with_a_step_of_its_own():
    class Own(keras.Model):
        def train_step(self, data):
            return super().train_step(data)

    inputs = keras.Input((4,))
    x = FrozenBackbone(models.functional(["dense"]))(inputs)
    model = Own(inputs, keras.layers.Dense(1)(x))
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="its own train_step"):
        FeatureCache(model)


def test_samples_of_different_shapes(model):
    base = keras.Sequential([keras.Input((None, 4)), keras.layers.Dense(3)])
    flexible = keras.Sequential(
        [FrozenBackbone(base), keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(1)]
    )
    flexible.build((None, None, 4))

    def batches():
        for length in (2, 3):
            yield np.ones((5, length, 4), "float32")

    spec = tf.TensorSpec((None, None, 4))
    data = tf.data.Dataset.from_generator(batches, output_signature=spec)
    with pytest.raises(ValueError, match="same shape and dtype.*Pad or resize"):
        FeatureCache(flexible)(data, verbose=0)


def test_strings_as_targets(model):
    data = tf.data.Dataset.from_tensors((X, np.array(["a"] * 20)))
    with pytest.raises(ValueError, match="Strings cannot be recorded.*Encode"):
        FeatureCache(model)(data, verbose=0)


class NeedsSizes(keras.layers.Layer):
    """A layer that returns as much as it is given, and looks at how much that is."""

    def call(self, x):
        if x.shape[1] != 6:
            raise TypeError(f"This many are not allowed: {x.shape[1]}.")
        return x

    def compute_output_shape(self, shape):
        return shape


def test_shapes_that_cannot_be_known_are_an_error_that_says_what_to_do():
    inputs = keras.Input((None, 2))
    base = keras.Model(inputs, NeedsSizes()(keras.layers.Dense(3)(inputs)))
    outer = keras.Input((None, 2))
    pooled = keras.layers.GlobalAveragePooling1D()(FrozenBackbone(base)(outer))
    model = keras.Model(outer, keras.layers.Dense(1)(pooled))
    with pytest.raises(ValueError, match="sizes that its inputs leave open. Give its inputs whole"):
        FeatureCache(model)


class Tied(keras.layers.Layer):
    """A head that has a layer of the backbone in it, as that of a masked language model."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding, self.own = embedding, keras.layers.Dense(4)

    def call(self, x):
        return self.embedding(self.own(x))

    def compute_output_shape(self, shape):
        return (*shape[:-1], 4)


def test_a_head_with_a_layer_of_the_backbone_is_the_head():
    embedding = keras.layers.Dense(4)
    inputs = keras.Input((4,))
    base = keras.Model(inputs, keras.layers.Dense(4)(embedding(inputs)))
    outer = keras.Input((4,))
    model = keras.Model(outer, Tied(embedding)(FrozenBackbone(base)(outer)))
    model.compile("sgd", "mse")
    cache = FeatureCache(model)
    assert [one.path for one in cache.head.trainable_weights] == [
        one.path for one in model.trainable_weights
    ]
    x = np.ones((8, 4), "float32")
    features = cache(x, x, verbose=0)
    expected = model.evaluate(x, x, verbose=0)
    assert cache.head.evaluate(features, verbose=0) == pytest.approx(expected, rel=1e-6)


def test_a_nested_model_of_several_inputs_is_looked_into():
    def inputs():
        return {name: keras.Input((2,), name=name) for name in ("left", "right")}

    inner, outer = inputs(), inputs()
    x = keras.layers.Concatenate()([*inner.values()])
    for name in ("first", "second"):
        x = keras.layers.Dense(3, name=name)(x)
    model = keras.Model(outer, keras.layers.Dense(1)(keras.Model(inner, x)(outer)))
    names = [step.call.operation.name for step in Unrolled(model).steps]
    assert names[-3:-1] == ["first", "second"]
