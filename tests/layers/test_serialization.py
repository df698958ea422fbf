import copy

import keras
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_tl import FrozenBackbone
from tests import models, strategies
from tests.conftest import examples, regression_data, values_of

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
