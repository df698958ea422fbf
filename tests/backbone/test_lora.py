"""The selection "lora": the weights that `enable_lora` adds, and no others."""

import warnings

import keras
import pytest

from keras_tl import FrozenBackbone, Stage, UnfreezeAtConvergence
from keras_tl.backbone import freezing
from keras_tl.backbone.model_backbones import Backbones
from tests.shared import as_bytes, regression_data

LAYERS = keras.layers
LORA = ["b/lora_kernel_a", "b/lora_kernel_b"]


@keras.saving.register_keras_serializable(package="tests")
class Adapted(keras.Model):
    """A backbone as KerasHub has it: `enable_lora` freezes all around the layers with LoRA."""

    def __init__(self, **kwargs):
        inputs = keras.Input((4,))
        x = LAYERS.Dense(4, name="a")(inputs)
        x = LAYERS.Dense(4, name="b")(x)
        super().__init__(inputs, LAYERS.LayerNormalization(name="norm")(x), **kwargs)

    def enable_lora(self, rank):
        self.trainable = True
        self._lora_enabled_layers = [1]
        for layer in self.layers:
            layer.trainable = layer.name == "b"
        self.get_layer("b").enable_lora(rank)

    def get_config(self):
        return {"name": self.name}


@keras.saving.register_keras_serializable(package="tests")
class Task(keras.Model):
    """A task as KerasHub has it, made of its backbone's input."""

    def __init__(self, backbone, **kwargs):
        x = backbone.input
        super().__init__(x, LAYERS.Dense(1, name="head")(backbone(x)), **kwargs)
        self.backbone = backbone

    def get_config(self):
        return {"backbone": keras.saving.serialize_keras_object(self.backbone), "name": self.name}

    @classmethod
    def from_config(cls, config):
        backbone = keras.saving.deserialize_keras_object(config["backbone"])
        return cls(backbone, name=config["name"])


def training(layer):
    return ["/".join(weight.path.split("/")[-2:]) for weight in layer.trainable_weights]


def test_selects_the_added_weights_alone():
    base = Adapted()
    wrapper = FrozenBackbone(base)
    base.enable_lora(2)
    wrapper.freeze()

    assert [layer.name for layer in wrapper.unfreeze("lora")] == ["b"]
    assert training(wrapper) == LORA

    wrapper.unfreeze("b")
    assert training(wrapper) == ["b/bias", *LORA]
    wrapper.freeze("lora")
    assert training(wrapper) == ["b/bias"]


def test_a_backbone_without_lora_is_told_how_to_enable_it():
    with pytest.raises(ValueError, match="no layer of the backbone .* has LoRA weights. Call `ena"):
        FrozenBackbone(Adapted()).unfreeze("lora")


@pytest.mark.covers('part: layers="lora"')
@pytest.mark.parametrize(
    "wrap",
    [
        "no",
        "through",
        *[pytest.param(when, marks=pytest.mark.slow) for when in ("before", "after")],
    ],
)
@pytest.mark.eager
def test_head_first_then_lora_then_everything(wrap, tmp_path):
    base = Adapted()
    backbone = FrozenBackbone(base) if wrap in ("after", "through") else base
    if wrap == "through":
        backbone.enable_lora(2)
        assert backbone.trainable_weights == base.trainable_weights == []
    else:
        base.enable_lora(2)
    task = Task(FrozenBackbone(base) if wrap == "before" else backbone)
    if wrap == "after":
        backbone.freeze()
    task.compile(keras.optimizers.SGD(0.1), "mse")
    x, y = regression_data()
    trained = []
    record = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: trained.append(training(task))
    )
    stages = [Stage("lora", 0.1, epochs=1), Stage("all", 0.1, epochs=1)]
    callback = UnfreezeAtConvergence(
        stages=stages, max_frozen_epochs=1, restore_best_weights=False, verbose=0
    )
    kernel = as_bytes([base.get_layer("b")._kernel])

    history = task.fit(
        x, y, validation_data=(x, y), epochs=3, callbacks=[callback, record], verbose=0
    )

    head = ["head/kernel", "head/bias"]
    everything = ["a/kernel", "a/bias", "b/bias", *LORA, "norm/gamma", "norm/beta"]
    assert history.history["stage"] == [0, 1, 2]
    assert [sorted(names) for names in trained] == [
        sorted(head + more) for more in ([], LORA, everything)
    ]
    assert as_bytes([base.get_layer("b")._kernel]) == kernel
    expected = task.predict(x, verbose=0)
    task.save(tmp_path / "task.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # What LoRA trained is in the kernels now.
        loaded = keras.saving.load_model(tmp_path / "task.keras")
    assert abs(loaded.predict(x, verbose=0) - expected).max() < 1e-5
    task.save_weights(tmp_path / "task.weights.h5")
    for weight in task.weights:
        weight.assign(weight * 2)
    task.load_weights(tmp_path / "task.weights.h5")
    assert abs(task.predict(x, verbose=0) - expected).max() < 1e-5


def test_all_alone_leaves_what_lora_froze():
    base = Adapted()
    base.enable_lora(2)
    freezing.unfreeze(base, "all")
    assert training(base) == ["b/bias", *LORA]


def test_all_beyond_lora_leaves_what_was_frozen_by_hand():
    base = Adapted()
    base.get_layer("a").trainable = False
    backbone = FrozenBackbone(base)
    backbone.enable_lora(2)
    backbones = Backbones(Task(backbone), None, beyond_lora=True)
    backbones.unfreeze("all", False)
    assert sorted(training(base)) == sorted(["b/bias", *LORA, "norm/gamma", "norm/beta"])


def test_a_stage_of_lora_is_not_taken_for_frozen_by_hand():
    task = Task(Adapted())
    task.backbone.enable_lora(2)
    freezing.freeze(task.backbone)
    freezing.unfreeze(task.backbone, "lora")
    backbones = Backbones(task, None, beyond_lora=True)
    backbones.unfreeze("all", False)
    assert "b/bias" in training(task)
