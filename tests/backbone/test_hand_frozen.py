"""What was frozen by hand, or by LoRA, before something else froze the rest."""

import keras
import numpy as np
import pytest

from keras_tl import FrozenBackbone, UnfreezeAtConvergence
from keras_tl.backbone import freezing
from keras_tl.backbone.hand_frozen import frozen_by_hand
from keras_tl.backbone.model_backbones import Backbones
from tests import models

LAYERS = keras.layers


def nested():
    """Layers a, inner/b, inner/c, norm and d."""
    inner = keras.Sequential(
        [keras.Input((4,)), LAYERS.Dense(4, name="b"), LAYERS.Dense(4, name="c")], name="inner"
    )
    layers = [LAYERS.Dense(4, name="a"), inner, LAYERS.BatchNormalization(name="norm")]
    return keras.Sequential([keras.Input((4,)), *layers, LAYERS.Dense(4, name="d")], name="base")


def training(layer):
    """The names of the layers in which a kernel or gamma trains."""
    return [w.path.split("/")[-2] for w in layer.trainable_weights if w.name in ("kernel", "gamma")]


@pytest.mark.parametrize(
    ("frozen", "selection", "expected"),
    [
        # Nothing names a layer.
        (["a", "b"], "all", "cd"),
        (["a", "b"], 1, "d"),
        (["d"], 1, "c"),
        (["d"], 2, "bc"),
        (["a", "b"], ".*", "cd"),
        (["a", "b"], lambda layer: True, "cd"),
        (["a", "b"], lambda layer: bool(layer.weights), "cd"),
        # A layer is named.
        (["a", "b"], "a", "a"),
        (["a", "b"], ["a", "d"], "ad"),
        (["a", "b"], ["a", "inner", "inner/b", "d"], "abcd"),
        (["a", "b"], lambda layer: layer.name == "b", "b"),
        # A layer brings what is in it, but not a part that was frozen by itself.
        (["a", "b"], "inner", "c"),
        (["a", "b"], "inner.*", "c"),
        (["a", "b"], "inner/.*", "bc"),
        (["b", "c"], "inner", "bc"),
        (["b", "c"], "all", "ad"),
        # Frozen as a whole, it says nothing; nor does a BatchNormalization.
        (["a", "b", "c", "d"], "all", "abcd"),
        (["norm"], "all", "abcd"),
    ],
)
def test_whole_layers_stay_frozen_unless_they_are_named(frozen, selection, expected):
    base = nested()
    layers = {layer.name: layer for layer in [*base.layers, *base.get_layer("inner").layers]}
    for name in frozen:
        layers[name].trainable = False
    wrapper = FrozenBackbone(base)

    wrapper.unfreeze(selection)

    assert training(wrapper) == list(expected)


def test_batchnorm_that_was_frozen_trains_when_asked():
    base = nested()
    base.get_layer("norm").trainable = False
    wrapper = FrozenBackbone(base)
    wrapper.unfreeze(train_batchnorm=True)
    assert training(wrapper) == ["a", "b", "c", "norm", "d"]


def test_layers_that_train_in_a_frozen_model_do_not_train():
    base = nested()
    base.trainable = False
    base.get_layer("d").trainable = True
    assert not base.trainable_weights
    assert frozen_by_hand(base).layers == ()


def test_selection_of_what_was_frozen_is_an_error_that_says_so():
    base = nested()
    base.get_layer("d").kernel.trainable = False
    base.get_layer("d").bias.trainable = False
    with pytest.raises(ValueError, match="frozen by hand stay frozen"):
        FrozenBackbone(base).unfreeze("d")


def test_weight_stays_frozen_where_lora_adds_weights_later():
    base = nested()
    base.get_layer("d").bias.trainable = False
    wrapper = FrozenBackbone(base)
    base.get_layer("a").enable_lora(2)

    wrapper.unfreeze()

    frozen = [w.path for w in base.weights if not w.trainable and "norm" not in w.path]
    assert frozen == ["base/a/kernel", "base/d/bias"]


def test_weight_stays_frozen_where_another_is_quantized_later():
    base = nested()
    base.get_layer("d").bias.trainable = False
    wrapper = FrozenBackbone(base)
    base.get_layer("a").quantize("int8")
    wrapper.unfreeze(lambda layer: layer.name in "ad")
    assert [w.path for w in wrapper.trainable_weights] == ["base/a/bias", "base/d/kernel"]


@pytest.mark.parametrize("how", ["keras", "config"])
def test_what_was_frozen_survives_saving(how, tmp_path):
    base = nested()
    base.get_layer("d").bias.trainable = False
    base.get_layer("a").trainable = False
    wrapper = FrozenBackbone(base)
    base.get_layer("inner").get_layer("b").enable_lora(2)
    model = models.functional_outer(wrapper)
    wrapper.unfreeze("inner")
    if how == "keras":
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    else:
        loaded = keras.Model.from_config(model.get_config())
    loaded = models.frozen_backbone_of(loaded)
    assert [w.name for w in loaded.trainable_weights] == [w.name for w in wrapper.trainable_weights]

    loaded.unfreeze()

    assert training(loaded) == ["c", "d"]
    assert not loaded.backbone.get_layer("d").bias.trainable


def test_frozen_part_of_a_model_that_is_not_built_survives_saving(tmp_path):
    base = models.Subclassed(["dense", "dense"])
    base(keras.ops.ones((1, 4)))
    base.stack[0].trainable = False
    model = models.functional_outer(FrozenBackbone(base))
    model.save(tmp_path / "model.keras")
    loaded = models.frozen_backbone_of(keras.saving.load_model(tmp_path / "model.keras"))
    loaded.unfreeze()
    assert [w.trainable for w in loaded.weights] == [False, False, True, True]


class LoRABackbone(keras.Model):
    """Freezes what is around the layers with LoRA, as KerasHub's backbones do, and forgets it."""

    def __init__(self, **kwargs):
        inputs = keras.Input((4,))
        x = LAYERS.Dense(4, name="a")(inputs)
        super().__init__(inputs, LAYERS.Dense(4, name="query")(x), **kwargs)

    def enable_lora(self, rank):
        for layer in self.layers:
            layer.trainable = False
        query = self.get_layer("query")
        query.trainable = True
        query.enable_lora(rank)
        self._lora_enabled_layers = [1]

    def get_config(self):
        return {"name": self.name}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


LORA = ["bias", "lora_kernel_a", "lora_kernel_b"]


@pytest.mark.parametrize("when", ["before", "after", "before, then frozen as a whole"])
@pytest.mark.parametrize("selection", ["all", 1, ".*", "query"])
def test_unfreezing_does_not_undo_lora_of_a_backbone(when, selection):
    base = LoRABackbone()
    if when != "after":
        base.enable_lora(2)
    if "then" in when:
        base.trainable = False
    wrapper = FrozenBackbone(base)
    if when == "after":
        base.enable_lora(2)

    wrapper.unfreeze(selection)

    assert [w.name for w in wrapper.trainable_weights] == LORA
    wrapper.unfreeze("a")
    assert "kernel" in [w.name for w in wrapper.trainable_weights]


def test_what_trains_beside_lora_when_wrapped_goes_on():
    base = LoRABackbone()
    base.enable_lora(2)
    base.get_layer("a").trainable = True
    wrapper = FrozenBackbone(base)
    wrapper.unfreeze()
    assert [w.name for w in wrapper.trainable_weights] == ["kernel", "bias", *LORA]


def test_plain_backbone_with_lora():
    base = LoRABackbone()
    base.enable_lora(2)
    backbones = Backbones(models.functional_outer(base), base)
    assert backbones.untouched()
    backbones.freeze()
    backbones.unfreeze("all", train_batchnorm=False)
    assert [w.name for w in base.trainable_weights] == LORA


def test_plain_backbone_with_a_weight_frozen_by_hand_is_frozen_at_first():
    base = models.sequential_of(keras.layers.Dense(4), keras.layers.Dense(4))
    model = models.functional_outer(base)
    base.layers[0].kernel.trainable = False
    model.compile(keras.optimizers.SGD(0.01), "mse")
    ours = UnfreezeAtConvergence(backbone=base, monitor="loss", max_frozen_epochs=1, verbose=0)
    x, y = np.ones((4, 4)), np.ones((4, 1))
    kernel = keras.ops.convert_to_numpy(base.layers[0].kernel)
    history = model.fit(x, y, epochs=3, callbacks=[ours], verbose=0).history
    assert history["stage"] == [0, 1, 1]
    np.testing.assert_array_equal(base.layers[0].kernel, kernel)
    assert [w.path.split("/")[-1] for w in base.trainable_weights] == ["bias", "kernel", "bias"]


def test_backbone_that_forgets_lora_is_loaded_and_says_what_is_missing(tmp_path):
    wrapper = FrozenBackbone(LoRABackbone())
    wrapper.backbone.enable_lora(2)
    model = models.functional_outer(wrapper)
    wrapper.unfreeze()
    wrapper.backbone.get_layer("query").lora_kernel_b.assign(keras.ops.ones((2, 4)))
    model.save(tmp_path / "model.keras")

    with pytest.warns(UserWarning, match="not in the one.*: query/lora_kernel_a, query/lora_ker"):
        loaded = keras.saving.load_model(
            tmp_path / "model.keras", custom_objects={"LoRABackbone": LoRABackbone}
        )

    x = keras.ops.ones((2, 4))
    difference = keras.ops.convert_to_numpy(model(x) - loaded(x))
    assert abs(difference).max() < 1e-6
    trained = models.frozen_backbone_of(loaded).trainable_weights
    assert [w.name for w in trained] == ["bias"]


def test_configuration_of_version_0_1():
    base = nested()
    base.get_layer("d").bias.trainable = False
    wrapper = FrozenBackbone(base)
    wrapper.unfreeze("d")
    config = wrapper.get_config()
    config["hand_frozen"] = [11]  # Positions in `weights`, and flags in the order of layers.
    flags = freezing.get_trainable_flags(base)
    config["trainable_flags"] = {
        "layers": list(flags.layers.values()),
        "weights": list(flags.weights.values()),
    }

    loaded = FrozenBackbone.from_config(config)

    assert [w.path.split("/")[-2:] for w in loaded.trainable_weights] == [["d", "kernel"]]
    loaded.unfreeze()
    assert not loaded.backbone.get_layer("d").bias.trainable


def test_configuration_of_version_0_1_whose_positions_do_not_fit():
    wrapper = FrozenBackbone(nested())
    wrapper.unfreeze("d")
    config = wrapper.get_config()
    layers = list(config["trainable_flags"]["layers"].values())
    config["trainable_flags"] = {"layers": layers, "weights": [True] * 3}
    with pytest.warns(UserWarning, match="told by position only"):
        loaded = FrozenBackbone.from_config(config)
    assert training(loaded) == ["d"]


def test_two_backbones_of_which_one_has_the_layer_frozen_by_hand():
    def tower(name):
        layers = [LAYERS.Dense(4, name="a"), LAYERS.Dense(4, name="d")]
        return keras.Sequential([keras.Input((4,)), *layers], name=name)

    first, second = tower("first"), tower("second")
    for weight in first.get_layer("d").weights:
        weight.trainable = False
    inputs = keras.Input((4,))
    outputs = LAYERS.add([FrozenBackbone(first)(inputs), FrozenBackbone(second)(inputs)])
    backbones = Backbones(keras.Model(inputs, outputs), None)

    backbones.unfreeze("d", train_batchnorm=False)

    assert not first.trainable_weights
    assert [w.path for w in second.trainable_weights] == ["second/d/kernel", "second/d/bias"]
    with pytest.raises(ValueError, match='`layers=3`: .*"first" has 2 layers'):
        backbones.unfreeze(3, train_batchnorm=False)


def test_a_number_of_layers_is_meant_for_each_of_two_backbones():
    inputs = keras.Input((4,))
    one, two = (
        FrozenBackbone(keras.Sequential([keras.Input((4,)), *layers], name=name))(inputs)
        for name, layers in [
            ("small", [LAYERS.Dense(4)]),
            ("large", [LAYERS.Dense(4), LAYERS.Dense(4)]),
        ]
    )
    model = keras.Model(inputs, LAYERS.add([one, two]))
    backbones = Backbones(model, None)
    with pytest.raises(ValueError, match='`layers=2`: .*"small" has 1 layer'):
        backbones.unfreeze(2, train_batchnorm=False)
    assert not model.trainable_weights
