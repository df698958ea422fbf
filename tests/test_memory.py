"""How much memory training takes."""

import keras
import pytest
import tensorflow as tf

from keras_tl import FrozenBackbone, Stage, UnfreezeAtConvergence, fine_tune, memory_report
from tests import models
from tests.shared import regression_data

LAYERS = keras.layers
pytestmark = pytest.mark.eager


def build(backbone=None, **arguments):
    backbone = backbone or models.sequential_of(LAYERS.Dense(8), LAYERS.Dense(4))
    wrapper = FrozenBackbone(backbone, **arguments)
    model = models.functional_outer(wrapper)
    model.compile("adam", "mse")
    return model, wrapper


def compiled_anew(model):
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    return memory_report(model, batch_size=10)


def test_counts_variables_exactly():
    model, wrapper = build()
    weights = 4 * (4 * 8 + 8 + 8 * 4 + 4 + 4 + 1)
    assert memory_report(model).optimizer is None
    frozen = compiled_anew(model)
    assert (frozen.weights, frozen.gradients) == (weights, 4 * 5)
    scalars = 4 + keras.ops.convert_to_numpy(model.optimizer.iterations).itemsize
    assert frozen.optimizer == 2 * 4 * 5 + scalars
    wrapper.unfreeze("all")
    thawed = compiled_anew(model)
    assert (thawed.weights, thawed.gradients) == (weights, weights)
    assert thawed.optimizer == 2 * weights + scalars


def test_activations_count_from_the_first_layer_that_trains():
    model, wrapper = build()
    assert compiled_anew(model).activations == 10 * 4 * 1
    wrapper.unfreeze(1)
    assert compiled_anew(model).activations == 10 * 4 * (4 + 1)
    wrapper.unfreeze(2)
    assert compiled_anew(model).activations == 10 * 4 * (8 + 4 + 1)


def test_activations_in_half_precision_take_half():
    layers = [LAYERS.Dense(4, dtype="mixed_bfloat16") for _ in range(2)]
    model, wrapper = build(models.sequential_of(*layers))
    wrapper.unfreeze("all")
    assert compiled_anew(model).activations == 10 * (2 * 4 + 2 * 4 + 4)


def test_a_rematerialized_backbone_keeps_less():
    def activations(rematerialize):
        chain = models.sequential_of(*[LAYERS.Dense(4) for _ in range(16)])
        model, wrapper = build(chain, rematerialize=rematerialize)
        wrapper.unfreeze("all")
        return compiled_anew(model).activations

    assert activations(False) == 10 * 4 * (16 * 4 + 1)
    # What three cuts carry, and one segment of four.
    assert activations(True) == 10 * 4 * ((3 + 4) * 4 + 1)


@pytest.mark.parametrize(
    "backbone",
    [
        lambda: models.Subclassed(["dense"]),
        lambda: keras.Model(
            x := keras.Input((None, 4)), LAYERS.GlobalAveragePooling1D()(LAYERS.Dense(4)(x))
        ),
    ],
    ids=["subclassed", "unknown length"],
)
def test_activations_that_cannot_be_told_are_left_out(backbone):
    backbone = backbone()
    wrapper = FrozenBackbone(backbone)
    x = keras.Input((4,) if isinstance(backbone, models.Subclassed) else (None, 4))
    model = keras.Model(x, LAYERS.Dense(1)(wrapper(x)))
    assert compiled_anew(model).activations == 10 * 4
    wrapper.unfreeze("all")
    report = compiled_anew(model)
    assert report.activations is None
    assert str(report).endswith("activations (unknown)")


def test_layers_of_layers_count_as_many():
    inputs = keras.Input((3, 4))
    block = LAYERS.Bidirectional(LAYERS.LSTM(2, return_sequences=True))
    model = keras.Model(inputs, LAYERS.Dense(1)(block(inputs)))
    alone = 10 * 4 * (3 * 4 + 3)
    assert memory_report(model, batch_size=10).activations > alone


def test_what_the_device_has_is_said(monkeypatch):
    model, _ = build()
    monkeypatch.setattr("keras_tl.memory.device_memory", lambda: 16 * 2**30)
    assert str(memory_report(model, batch_size=4)).endswith("the device has 16 GiB")


def test_a_batch_of_none_is_an_error():
    with pytest.raises(ValueError, match="`batch_size` must be"):
        memory_report(build()[0], batch_size=0)


def arrays(x, y):
    return {"x": x, "y": y, "batch_size": 8}


def dataset(x, y):
    return {"x": tf.data.Dataset.from_tensor_slices((x, y)).batch(8).prefetch(1)}


def test_joint_fits_know_the_samples_in_a_batch(capsys):
    model, _ = build()
    x, y = regression_data(samples=15)
    settings = {"max_frozen_epochs": 1, "epochs": 3, "record": True, "verbose": 2}
    fine_tune(
        model, **arrays(x, y), stages=[Stage(1, 1e-3, epochs=1), Stage("all", 1e-3)], **settings
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if "  memory " in line]
    assert [line.split()[-3:] for line in lines] == [
        ["about", "160", "bytes"],
        ["about", "416", "bytes"],
    ]


@pytest.mark.parametrize("data", [arrays, dataset])
def test_the_switch_says_what_the_next_stage_needs(data, capsys):
    model, _ = build()
    x, y = regression_data(samples=15)
    callback = UnfreezeAtConvergence(max_frozen_epochs=1)
    model.fit(**data(x, y), validation_data=(x, y), epochs=2, callbacks=[callback], verbose=0)
    line = f"  memory         {memory_report(model, batch_size=8)}\n"
    assert line in capsys.readouterr().out
    assert "activations about 416 bytes" in line
