"""What of a model trains, as data and as a table."""

import keras
import numpy as np
import pytest

from keras_tl import FrozenBackbone, trainable_report
from tests import models
from tests.shared import regression_data

pytestmark = pytest.mark.eager


def build():
    wrapper = FrozenBackbone(models.functional(["dense", "batchnorm"]), name="backbone")
    model = models.functional_outer(wrapper, [keras.layers.BatchNormalization(name="norm")])
    model.compile("adam", "mse")
    return model, wrapper


def rows(model, **arguments):
    return {row.name.split("/")[-1]: row for row in trainable_report(model, **arguments).layers}


def fit(model):
    x, y = regression_data()
    model.fit(x, y, verbose=0)


def test_counts_are_those_of_the_weights():
    model, _ = build()
    row = rows(model)["backbone"]
    assert (row.trainable, row.frozen, row.nbytes, row.dtypes) == (0, 36, 144, ("float32",))
    head = rows(model)["norm"]
    assert (head.trainable, head.frozen) == (8, 8)
    total = trainable_report(model).total
    assert total.trainable == sum(np.size(w) for w in model.trainable_weights)
    assert total.trainable + total.frozen == model.count_params()


def test_inference_mode():
    model, wrapper = build()
    modes = {name: row.inference_mode for name, row in rows(model).items()}
    assert modes == {"backbone": "all", "norm": "none", "output": "none"}
    wrapper.inference_mode = "batchnorm"
    wrapper.unfreeze()
    assert rows(model)["backbone"].inference_mode == "batchnorm"
    model.get_layer("norm").trainable = False
    assert rows(model)["norm"].inference_mode == "all"


def test_a_plain_frozen_backbone_holds_batchnorm_only():
    base = models.functional(["dense", "batchnorm"])
    base.trainable = False
    model = models.functional_outer(base)
    assert rows(model)[base.name].inference_mode == "batchnorm"


def test_nested_layers():
    model, wrapper = build()
    names = [row.name for row in trainable_report(model, expand_nested=True).layers]
    dense, norm = wrapper.backbone.layers[1:]
    inner = f"backbone/{wrapper.backbone.name}"
    assert names == [f"{inner}/{dense.name}", f"{inner}/{norm.name}", "norm", "output"]


def test_compiled_state():
    model, wrapper = build()
    assert {row.compiled for row in rows(model).values()} == {None}
    fit(model)
    assert {row.compiled for row in rows(model).values()} == {True}
    wrapper.unfreeze()
    assert {name: row.compiled for name, row in rows(model).items()} == {
        "backbone": False,
        "norm": True,
        "output": True,
    }
    model.compile("adam", "mse")
    assert trainable_report(model).total.compiled is None


def test_shared_layers_count_once_in_the_total():
    shared = keras.layers.Dense(4)
    model = models.functional_outer(
        keras.Sequential([keras.Input((4,)), shared]), [keras.Sequential([shared])]
    )
    report = trainable_report(model)
    assert sum(row.trainable for row in report.layers) == 45
    assert report.total.trainable == model.count_params() == 25


def test_several_dtypes():
    layers = [keras.layers.Dense(2, dtype="float16"), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    total = trainable_report(model).total
    assert (total.dtypes, total.nbytes) == (("float16", "float32"), 10 * 2 + 3 * 4)


def test_the_table():
    model, wrapper = build()
    fit(model)
    wrapper.unfreeze()
    lines = str(trainable_report(model)).splitlines()
    assert lines[0].split() == [
        *("layer", "trainable", "frozen", "dtype", "bytes", "inference", "mode", "compiled")
    ]
    assert lines[1].split() == ["backbone", "20", "16", "float32", "144", "all", "STALE"]
    assert all(line.index("float32") == lines[0].index("dtype") for line in lines[1:])
