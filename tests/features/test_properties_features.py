"""Training the head on recorded features is training the model with its backbone frozen."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keras_tl import FeatureCache, FrozenBackbone
from tests import models, strategies
from tests.shared import examples, slow_on, values_of

HEADS = {
    "none": (),
    "dropout": (lambda: keras.layers.Dropout(0.5),),
    "batchnorm": (lambda: keras.layers.BatchNormalization(momentum=0.5),),
    "both": (lambda: keras.layers.BatchNormalization(), lambda: keras.layers.Dropout(0.3)),
}


def build(kinds, head, optimizer, **settings):
    keras.utils.set_random_seed(0)
    wrapper = FrozenBackbone(models.functional(kinds))
    model = models.functional_outer(wrapper, [make() for make in HEADS[head]])
    # A configuration and not an optimizer, of which each way needs one of its own.
    optimizer = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    model.compile(optimizer, "mse", metrics=["mae"], **settings)
    return model


def samples_of(count):
    random = np.random.default_rng(count)
    x = random.normal(size=(count, models.FEATURES)).astype("float32")
    return x, x[:, :1] ** 2, random.random(count, "float32")


def trained_both_ways(model, other, data, folder, batch_size, extraction_batch_size=None):
    """Trains one through its backbone, the other on features. Returns both histories."""
    keras.utils.set_random_seed(1)
    fit = {"epochs": 2, "shuffle": False, "verbose": 0}
    x, y, weights = data
    through = model.fit(x, y, sample_weight=weights, batch_size=batch_size, **fit)
    cache = FeatureCache(other, cache_dir=folder)
    recorded = {"shuffle": False, "verbose": 0}
    cache(*data, batch_size=extraction_batch_size or batch_size, name="features", **recorded)
    features = cache(*data, batch_size=batch_size, name="features", **recorded)
    keras.utils.set_random_seed(1)
    return through.history, cache.head.fit(features, **fit).history


@settings(max_examples=examples(8))
@given(
    kinds=strategies.layer_kinds(),
    head=st.sampled_from(sorted(HEADS)),
    optimizer=strategies.optimizers(),
    run_eagerly=st.sampled_from([True, True, False]),
    count=st.integers(1, 20),
    batch_size=st.integers(1, 8),
)
@example(
    # Steps that are compiled, the rest of a batch, and a head that draws random numbers.
    kinds=["batchnorm"],
    head="both",
    optimizer=keras.optimizers.Adam(0.01),
    run_eagerly=False,
    count=9,
    batch_size=4,
)
def test_the_same_weights_bit_for_bit(
    kinds, head, optimizer, run_eagerly, count, batch_size, tmp_path_factory
):
    model, other = (build(kinds, head, optimizer, run_eagerly=run_eagerly) for _ in range(2))
    folder = tmp_path_factory.mktemp("features")
    through, on_features = trained_both_ways(model, other, samples_of(count), folder, batch_size)
    assert values_of(other) == values_of(model)
    assert on_features == through


@pytest.mark.parametrize(
    "compiled, extraction_batch_size",
    [
        pytest.param({}, 7, marks=pytest.mark.slow),
        pytest.param({"jit_compile": True}, 4, marks=pytest.mark.slow),
        # Both differences at once.
        pytest.param({"jit_compile": True}, 7, marks=slow_on("torch")),
    ],
)
def test_within_rounding_where_arithmetic_is_grouped_in_another_way(
    compiled, extraction_batch_size, tmp_path
):
    # Matrix products of other batch sizes are summed in another order, and XLA compiles backbone
    # and head into one function, or each into its own: errors of some units in the last place of
    # the features, which training carries on.
    optimizer = keras.optimizers.SGD(0.01)
    model, other = (build(["dense"], "batchnorm", optimizer, **compiled) for _ in range(2))
    trained_both_ways(model, other, samples_of(20), tmp_path, 4, extraction_batch_size)
    for one, same in zip(model.weights, other.weights, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(same), rtol=1e-4, atol=1e-6)


# The structure of data.

LEAVES = st.sampled_from([(), (1,), (2, 3)])
DTYPES = st.sampled_from(["float32", "int32", "uint8", "bool", "float16"])


@st.composite
def structures(draw):
    """Targets of a sample: one tensor, or several by name or in a tuple."""
    one = st.tuples(LEAVES, DTYPES)
    kind = draw(st.sampled_from(["one", "dict", "tuple"]))
    if kind == "one":
        return draw(one)
    if kind == "dict":
        return draw(st.dictionaries(st.sampled_from("abc"), one, min_size=1))
    return list(draw(st.lists(one, min_size=2, max_size=3)))


def filled(structure, count):
    if isinstance(structure, dict):
        return {name: filled(one, count) for name, one in structure.items()}
    if isinstance(structure, list):
        return tuple(filled(one, count) for one in structure)
    shape, dtype = structure
    size = count * int(np.prod(shape))
    return (np.arange(size) % 200).reshape(count, *shape).astype(dtype)


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    left, right = keras.Input((4,), name="left"), keras.Input((2,), name="right")
    base = FrozenBackbone(models.functional(["dense"]))
    joined = keras.layers.Concatenate()([base(left), right])
    return keras.Model({"left": left, "right": right}, keras.layers.Dense(1)(joined))


@pytest.mark.eager
@settings(max_examples=examples(20))
@given(
    targets=structures(),
    weighted=st.booleans(),
    count=st.integers(0, 12),
    batch_size=st.integers(1, 6),
    new_batch_size=st.none() | st.integers(1, 13),
    shuffle=st.booleans(),
    on_disk=st.booleans(),
    views=st.sampled_from([None, 1, 3]),
)
def test_any_structure_of_targets_comes_back_as_it_was(
    model, tmp_path_factory, targets, weighted, count, batch_size, new_batch_size, shuffle, on_disk,
    views,
):  # fmt: skip
    left, _, weights = samples_of(count)
    x = {"left": left, "right": left[:, 2:]}
    y = filled(targets, count)
    number = np.arange(count)
    data = (x, (y, number), weights) if weighted else (x, (y, number))
    batches = tf.data.Dataset.from_tensor_slices(data).batch(batch_size)
    cache = FeatureCache(model, cache_dir=tmp_path_factory.mktemp("cache") if on_disk else None)
    dataset = cache(batches, batch_size=new_batch_size, shuffle=shuffle, views=views, verbose=0)

    for _ in range(2):
        found = list(dataset.unbatch().as_numpy_iterator())
        order = [int(sample[1][1]) for sample in found]
        assert sorted(order) == list(range(count))
        assert shuffle or order == list(range(count))
        for at, sample in zip(order, found, strict=True):
            expected = _sample(data, at)
            assert sample[0]["right"].tobytes() == expected[0]["right"].tobytes()
            keras.tree.map_structure(_assert_same, sample[1:], expected[1:])
    sizes = [len(keras.tree.flatten(batch)[0]) for batch in dataset]
    assert sum(sizes) == count
    assert len(set(sizes[:-1])) <= 1
    assert int(dataset.cardinality()) == len(sizes)


def _sample(data, at):
    return keras.tree.map_structure(lambda array: array[at], data)


def _assert_same(one, other):
    one, other = np.asarray(one), np.asarray(other)
    assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


# Graphs.


@st.composite
def graphs(draw):
    """What to call on what: the first calls are on inputs; one of them is the backbone."""
    inputs = draw(st.integers(1, 3))
    steps = []
    for number in range(draw(st.integers(1, 6))):
        known = inputs + number
        kind = draw(st.sampled_from(["dense", "add", "dropout"]))
        steps.append((kind, draw(st.integers(0, known - 1)), draw(st.integers(0, known - 1))))
    at = draw(st.integers(0, inputs - 1))
    uses = draw(st.integers(0, len(steps)))
    return inputs, steps, at, uses


def make_graph(inputs, steps, at, uses):
    given_inputs = [keras.Input((4,), name=f"input_{number}") for number in range(inputs)]
    tensors = list(given_inputs)
    for kind, one, other in steps:
        if kind == "add":
            tensors.append(keras.layers.Add()([tensors[one], tensors[other]]))
        else:
            layer = keras.layers.Dense(4) if kind == "dense" else keras.layers.Dropout(0.5)
            tensors.append(layer(tensors[one]))
    features = FrozenBackbone(models.functional(["dense"]))(given_inputs[at])
    joined = keras.layers.Add()([features, tensors[inputs - 1 + uses]])
    last = keras.layers.Dense(2)(joined)
    return keras.Model(given_inputs, [last, tensors[-1]])


@pytest.mark.eager
@settings(max_examples=examples(20))
@given(graph=graphs())
def test_any_graph_is_split_in_two_that_make_the_same(graph):
    keras.utils.set_random_seed(0)
    model = make_graph(*graph)
    # Not as a graph, in which TensorFlow fuses an Add with the matrix product before it.
    model.compile("sgd", "mse", run_eagerly=True)
    x = [np.random.rand(6, 4).astype("float32") for _ in model.inputs]
    cache = FeatureCache(model)
    # The optimizer knows trained weights by their order.
    assert [id(one) for one in cache.head.trainable_variables] == [
        id(one) for one in model.trainable_variables
    ]
    features = cache(x, batch_size=6, shuffle=False, training=False, verbose=0)
    expected = model.predict(x, batch_size=6, verbose=0)
    found = cache.head.predict(features, verbose=0)
    assert [one.tobytes() for one in found] == [one.tobytes() for one in expected]
