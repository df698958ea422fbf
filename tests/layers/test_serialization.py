import copy

import keras
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_tl import FrozenBackbone
from tests import models, strategies
from tests.shared import examples, regression_data, values_of

pytestmark = pytest.mark.covers("part: FrozenBackbone")


def put_in_stage(wrapper, stage):
    if stage == "half":
        wrapper.unfreeze(1)
    if stage == "all":
        wrapper.unfreeze(train_batchnorm=True)


def roundtrip(model, how, folder):
    if how == "keras":
        model.save(folder / "model.keras")
        return keras.models.load_model(folder / "model.keras")
    if how == "weights":
        model.save_weights(folder / "model.weights.h5")
        other = keras.models.clone_model(model)
        other.load_weights(folder / "model.weights.h5")
        return other
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "config":
        other = type(model).from_config(model.get_config())
    if how == "clone":
        other = keras.models.clone_model(model)
    other.set_weights(model.get_weights())
    return other


def trainable_mask(model):
    trainable = {id(w) for w in model.trainable_weights}
    return [id(w) in trainable for w in model.weights]


@pytest.mark.parametrize("how", ["keras", "weights", "config", "clone", "deepcopy"])
@given(
    kinds=strategies.layer_kinds(max_size=3),
    build=st.sampled_from([models.functional, models.sequential, models.Subclassed]),
    stage=st.sampled_from(["frozen", "half", "all"]),
)
@settings(max_examples=examples(8))
def test_outputs_and_what_is_trainable_survive(tmp_path_factory, how, kinds, build, stage):
    wrapper = FrozenBackbone(build(kinds))
    model = models.functional_outer(wrapper, [keras.layers.BatchNormalization()])
    put_in_stage(wrapper, stage)
    x, _ = regression_data()
    expected = keras.ops.convert_to_numpy(model(x)).tobytes()

    other = roundtrip(model, how, tmp_path_factory.mktemp("saved"))

    assert keras.ops.convert_to_numpy(other(x)).tobytes() == expected
    assert trainable_mask(other) == trainable_mask(model)
    assert [w.trainable for w in other.weights] == [w.trainable for w in model.weights]


def test_training_goes_on_after_loading_as_without(tmp_path):
    wrapper = FrozenBackbone(models.functional(["dense", "batchnorm", "dense"]))
    model = models.functional_outer(wrapper)
    wrapper.unfreeze(1)
    model.compile("adam", "mse")
    x, y = regression_data()
    model.fit(x, y, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")

    model.fit(x, y, shuffle=False, verbose=0)
    loaded.fit(x, y, shuffle=False, verbose=0)

    assert values_of(loaded) == values_of(model)


@pytest.mark.parametrize("how", ["keras", "config"])
def test_output_layers_and_inference_mode_survive(how, tmp_path):
    base = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(4, name="a"), keras.layers.Dense(4, name="b")]
    )
    wrapper = FrozenBackbone(base, output_layers="a", inference_mode="batchnorm", name="features")
    model = models.functional_outer(wrapper)
    loaded = roundtrip(model, how, tmp_path).get_layer("features")
    assert (loaded.output_layers, loaded.inference_mode) == ("a", "batchnorm")
    assert values_of(loaded) == values_of(wrapper)


def test_weight_frozen_by_hand_stays_frozen_after_loading(tmp_path):
    base = models.functional(["dense"])
    base.layers[1].kernel.trainable = False
    model = models.functional_outer(FrozenBackbone(base))
    loaded = models.frozen_backbone_of(roundtrip(model, "keras", tmp_path))
    loaded.unfreeze()
    assert [w.trainable for w in loaded.weights] == [False, True]


def test_kernel_frozen_by_lora_stays_frozen_after_loading(tmp_path):
    base = models.functional(["dense"])
    base.layers[1].enable_lora(2)
    model = models.functional_outer(FrozenBackbone(base))
    model(regression_data()[0])
    loaded = models.frozen_backbone_of(roundtrip(model, "keras", tmp_path))
    loaded.unfreeze()
    trained = [w.path.split("/")[-1] for w in loaded.trainable_weights]
    assert trained[:3] == ["bias", "lora_kernel_a", "lora_kernel_b"]


def test_layer_alone_can_be_copied():
    wrapper = FrozenBackbone(models.functional(["dense", "batchnorm"]))
    wrapper.unfreeze()
    other = copy.deepcopy(wrapper)
    assert values_of(other) == values_of(wrapper)
    assert len(other.trainable_weights) == 2


def test_configuration_is_not_changed_by_using_it():
    config = FrozenBackbone(models.functional(["dense"])).get_config()
    before = copy.deepcopy(config)
    FrozenBackbone.from_config(config)
    assert config == before


class Plain(keras.Model):
    """Holds its backbone, and a layer of the backbone's class, as attributes."""

    def __init__(self, backbone, wrap):
        super().__init__()
        self.features = FrozenBackbone(backbone) if wrap else backbone
        self.top = models.functional(["dense"])

    def call(self, x):
        return self.top(self.features(x))


def between_siblings(wrap, name):
    """A model whose backbone stands between two models of its class."""
    backbone = models.functional(["dense", "batchnorm", "nested"])
    if name is not None:
        backbone.name = name
    inputs = keras.Input((4,))
    x = models.functional(["dense"])(inputs)
    x = FrozenBackbone(backbone)(x) if wrap else backbone(x)
    return keras.Model(inputs, models.functional(["dense"])(models.make_layer("dense")(x)))


def alone(wrap, name):
    backbone = models.functional(["dense", "batchnorm"])
    return models.functional_outer(FrozenBackbone(backbone) if wrap else backbone)


def two_backbones(wrap, name):
    first, second = (models.functional(["dense"]) for _ in range(2))
    first.name, second.name = "first", "second"
    inputs = keras.Input((4,))
    x = inputs
    for backbone in (first, second):
        x = FrozenBackbone(backbone)(x) if wrap else backbone(x)
        x = models.functional(["dense", "layernorm"])(x)
    return keras.Model(inputs, x)


def held_as_attribute(wrap, name):
    model = Plain(models.functional(["dense", "batchnorm"]), wrap)
    model(regression_data()[0])
    return model


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (alone, None),
        (between_siblings, "base"),
        (two_backbones, None),
        (held_as_attribute, None),
    ],
)
def test_loads_weights_that_were_saved_without_the_wrapper(make, name, tmp_path):
    plain, wrapped = make(False, name), make(True, name)
    for weight in plain.weights:
        weight.assign(keras.random.uniform(weight.shape, seed=len(weight.path)))
    plain.save_weights(tmp_path / "plain.weights.h5")

    wrapped.load_weights(tmp_path / "plain.weights.h5")

    assert values_of(wrapped) == values_of(plain)


def test_does_not_guess_which_of_several_the_backbone_is(tmp_path):
    between_siblings(False, None).save_weights(tmp_path / "plain.weights.h5")
    with pytest.raises(ValueError, match="could not be loaded"):
        between_siblings(True, None).load_weights(tmp_path / "plain.weights.h5")
