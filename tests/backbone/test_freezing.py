import keras
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_tl import FrozenBackbone
from keras_tl.backbone import freezing, paths, selecting
from keras_tl.backbone.changeable import changeable_weights
from tests import models, strategies
from tests.shared import examples


def flags(backbone):
    return freezing.get_trainable_flags(backbone)


@pytest.fixture
def backbone():
    layers = [
        keras.layers.Dense(4, name="a"),
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.Dense(4, name="b"),
    ]
    return keras.Sequential([keras.Input((4,)), *layers], name="base")


def trains_something(layer):
    return any(
        inner.weights
        and not selecting.is_batchnorm(inner)
        and not selecting.named_layers(inner)[1:]
        for _, inner in [("", layer), *selecting.named_layers(layer)]
        if not isinstance(inner, keras.Model)
    )


def trainable(backbone):
    return [w.path for w in backbone.trainable_weights]


def test_freeze_then_unfreeze_one_layer_changes_only_it(backbone):
    freezing.freeze(backbone)
    assert trainable(backbone) == []

    unfrozen = freezing.unfreeze(backbone, "b")

    assert [layer.name for layer in unfrozen] == ["b"]
    assert trainable(backbone) == ["base/b/kernel", "base/b/bias"]


def test_batchnorm_stays_frozen_unless_asked(backbone):
    freezing.freeze(backbone)
    freezing.unfreeze(backbone)
    assert trainable(backbone) == ["base/a/kernel", "base/a/bias", "base/b/kernel", "base/b/bias"]

    assert [layer.name for layer in freezing.unfreeze(backbone, train_batchnorm=True)] == ["norm"]
    assert "base/norm/gamma" in trainable(backbone)


def test_unfreezing_what_is_trainable_returns_nothing(backbone):
    assert freezing.unfreeze(backbone) == []


def test_selection_without_weights_to_train_is_an_error_and_changes_nothing(backbone):
    freezing.freeze(backbone)
    before = flags(backbone)

    with pytest.raises(ValueError, match="no weights to train.*train_batchnorm=True"):
        freezing.unfreeze(backbone, "norm")

    assert flags(backbone) == before


def test_kernel_frozen_by_lora_stays_frozen(backbone):
    backbone.get_layer("a").enable_lora(2)
    freezing.freeze(backbone)
    freezing.unfreeze(backbone)
    assert trainable(backbone)[:3] == [
        "base/a/bias",
        "base/a/lora_kernel_a",
        "base/a/lora_kernel_b",
    ]


def test_quantized_kernel_stays_frozen(backbone):
    backbone.get_layer("a").quantize("int8")
    freezing.freeze(backbone)
    freezing.unfreeze(backbone)
    assert "base/a/kernel" not in trainable(backbone)
    assert "base/b/kernel" in trainable(backbone)


def test_weights_of_a_container_freeze_and_thaw_with_it():
    class WithToken(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(4)

        def build(self, input_shape):
            self.token = self.add_weight(shape=(4,), name="token")
            self.dense.build(input_shape)

        def call(self, x):
            return self.dense(x) + self.token

    backbone = WithToken()
    backbone.build((None, 4))
    freezing.freeze(backbone)
    assert not backbone.token.trainable
    freezing.unfreeze(backbone)
    assert backbone.token.trainable


@given(kinds=strategies.layer_kinds(), data=st.data())
@settings(max_examples=examples(40))
def test_only_what_is_selected_changes(kinds, data):
    backbone = models.functional(kinds)
    freezing.freeze(backbone)
    layers = dict(selecting.named_layers(backbone))
    named = [name for name, layer in layers.items() if trains_something(layer)]
    earlier = data.draw(st.sampled_from(named))
    later = data.draw(st.sampled_from(named))
    freezing.unfreeze(backbone, [earlier])
    before = {id(w) for w in backbone.trainable_weights}

    freezing.unfreeze(backbone, [later])

    now = {id(w) for w in backbone.trainable_weights}
    assert before <= now
    assert now - before <= {id(w) for w in layers[later].weights}


@given(kinds=strategies.layer_kinds(), data=st.data())
@settings(max_examples=examples(40))
def test_flags_are_put_back_exactly(kinds, data):
    backbone = models.functional(kinds)
    for layer in selecting.flatten_layers(backbone):
        layer.trainable = data.draw(st.booleans())
    before = flags(backbone)
    trained = trainable(backbone)

    freezing.freeze(backbone)
    freezing.set_trainable_flags(backbone, before)

    assert flags(backbone) == before
    assert trainable(backbone) == trained


def test_flags_find_their_layers_and_weights_where_others_were_added(backbone):
    backbone.get_layer("a").bias.trainable = False
    before = flags(backbone)
    backbone.get_layer("a").enable_lora(2)
    backbone.get_layer("b").trainable = False

    assert freezing.set_trainable_flags(backbone, before) == []

    assert trainable(backbone) == [
        *("base/a/kernel", "base/a/lora_kernel_a", "base/a/lora_kernel_b"),
        *("base/norm/gamma", "base/norm/beta", "base/b/kernel", "base/b/bias"),
    ]


def test_flags_that_find_nothing_are_returned(backbone):
    backbone.get_layer("a").enable_lora(2)
    freezing.freeze(backbone)
    freezing.unfreeze(backbone, "a")
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="a")])
    freezing.freeze(other)

    lost = freezing.set_trainable_flags(other, flags(backbone))

    assert lost == ["a/lora_kernel_a", "a/lora_kernel_b"]
    assert [weight.name for weight in other.trainable_weights] == ["bias"]


def test_paths_of_a_model_made_again_are_the_same():
    first, second = models.Subclassed(["shared", "conv"]), models.Subclassed(["shared", "conv"])
    for one in (first, second):
        one(keras.ops.ones((1, 4)))
    assert [w.path for w in first.weights] != [w.path for w in second.weights]
    assert list(paths.weight_paths(first)) == list(paths.weight_paths(second))
    assert set(map(id, paths.layer_paths(first).values())) == set(
        map(id, selecting.flatten_layers(first))
    )


def test_changeable_weights_are_the_trainable_ones_and_live_statistics(backbone):
    changeable = {w.path for w in changeable_weights(backbone)}
    assert {"base/norm/moving_mean", "base/a/kernel"} <= changeable

    freezing.freeze(backbone, ["a", "norm"])

    assert [w.path for w in changeable_weights(backbone)] == [
        "base/b/kernel",
        "base/b/bias",
    ]


def test_statistics_held_in_inference_are_not_changeable(backbone):
    wrapper = FrozenBackbone(backbone)
    wrapper.unfreeze(train_batchnorm=True)
    changeable = {w.path for w in changeable_weights(wrapper)}
    assert "base/norm/moving_mean" not in changeable
    assert "base/norm/gamma" in changeable


def test_count_params(backbone):
    assert freezing.count_params(backbone.weights) == backbone.count_params()
