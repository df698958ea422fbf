"""What is passed in place of a model: a file, a class, a function."""

import pathlib
import re

import keras
import pytest

from keras_tl import (
    FeatureCache,
    FreezeGuard,
    Stage,
    find_learning_rate,
    fine_tune,
    interpolate_weights,
    layerwise_learning_rates,
    memory_report,
    scale_temperature,
    trainable_report,
    unwrap,
)
from tests.shared import regression_data

X, Y = regression_data()
LOAD = "Of a file, pass the model that is in it: `keras.saving.load_model('base.keras')`."
IN_PLACE_OF_A_MODEL = [
    ("base.keras", f"Received: 'base.keras' (of type str). {LOAD}"),
    (pathlib.PurePosixPath("base.keras"), f"(of type PurePosixPath). {LOAD}"),
    (keras.applications.Xception, "Call it, and pass what it returns: `Xception(...)`."),
    (keras.Sequential, "(of type type). Call it, and pass what it returns: `Sequential(...)`."),
    (None, "Received: None (of type NoneType)."),
]


@pytest.mark.parametrize(
    "function",
    [
        FeatureCache,
        unwrap,
        lambda model: fine_tune(model, X, Y),
        lambda model: find_learning_rate(model, X, Y),
        lambda model: scale_temperature(model, X, Y),
        lambda model: interpolate_weights(model, [], []),
        memory_report,
    ],
    ids=[
        "FeatureCache",
        "unwrap",
        "fine_tune",
        "find_learning_rate",
        "scale_temperature",
        "interpolate_weights",
        "memory_report",
    ],
)
@pytest.mark.parametrize(("given", "words"), IN_PLACE_OF_A_MODEL)
def test_what_is_no_model_is_refused_with_how_to_get_one(function, given, words, request):
    name = request.node.callspec.id.rsplit("-", maxsplit=1)[-1]
    with pytest.raises(ValueError, match=f"`{name}` takes a `keras.Model`") as error:
        function(given)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "function",
    [
        trainable_report,
        lambda layers: Stage.by_depth(layers, 2, 1e-4),
        lambda layers: layerwise_learning_rates(layers, 1e-4, 0.5),
        lambda layers: FreezeGuard().watching(layers).__enter__(),
    ],
    ids=["trainable_report", "by_depth", "layerwise_learning_rates", "watching"],
)
@pytest.mark.parametrize(("given", "words"), IN_PLACE_OF_A_MODEL)
def test_what_is_no_layer_is_refused_with_how_to_get_one(function, given, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        function(given)
