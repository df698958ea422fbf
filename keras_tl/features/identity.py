"""What recorded features depend on: the layers that made them, their weights, and the data."""

from __future__ import annotations

import hashlib
import json
import pathlib
import tempfile
from typing import Any

import keras

from keras_tl.backbone.selecting import flatten_layers, weights_of
from keras_tl.features.settings import ExtractionSettings
from keras_tl.features.source import Source
from keras_tl.features.splitting import SplitModel
from keras_tl.internals.own_fit import prepares_data, preparing_layers
from keras_tl.internals.values import on_host
from keras_tl.messages import some

# How far layers are frozen changes nothing in what they return in `fit`, once nothing of them is
# trained; names change with the order in which models are made.
_LEFT_OUT = {"trainable", "trainable_flags", "hand_frozen", "compile_config"}
# What is not shown in a message.
_BY_DIGEST = {"configuration", "weights", "preparation"}
# Where a configuration names layers.
_NAMING = {"keras_history", "input_layers", "output_layers"}


def identity_of(split: SplitModel, source: Source, settings: ExtractionSettings) -> dict[str, Any]:
    """Returns all that recorded features depend on but the samples, as JSON can hold it."""
    preparation = _preparation_digest(split.model)
    return {
        **({} if preparation is None else {"preparation": preparation}),
        "configuration": _configuration_digest(split.graph, source.inputs),
        "weights": [
            [weight.path, hashlib.sha256(on_host(weight).tobytes()).hexdigest()]
            for weight in weights_of(split.graph)
        ],
        **source.describe(),
        "dtype": settings.dtype,
        "views": settings.views,
        "training": settings.training,
    }


def digest_of(identity: dict[str, Any]) -> str:
    """Returns a short string that stands for an identity. Names of weights do not count."""
    weights = [digest for _, digest in identity["weights"]]
    content = json.dumps({**identity, "weights": weights}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def differences(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Says in what two identities differ."""
    found = []
    if recorded.get("configuration") != now["configuration"]:
        found.append("the layers up to the backbone's outputs")
    if recorded.get("preparation") != now.get("preparation"):
        found.append("how the model prepares data (settings, vocabulary or weights of what does)")
    before, after = recorded["weights"], now["weights"]
    changed = [new[0] for old, new in zip(before, after) if old[1] != new[1]]
    if len(before) != len(after):
        found.append(f"the number of weights (recorded {len(before)}, now {len(after)})")
    elif changed:
        found.append(f"the weights {some(changed)}")
    for name in [one for one in {**now, **recorded} if one not in _BY_DIGEST]:
        if recorded.get(name) != now.get(name):
            what = f"shape or dtype of the {name}" if name in ("inputs", "targets") else name
            was, is_now = _shown(recorded.get(name)), _shown(now.get(name))
            found.append(f"{what} (recorded {was}, now {is_now})")
    return found


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _configuration_digest(graph: keras.Model, inputs: Any) -> str:
    try:
        config: Any = graph.get_config()
    except NotImplementedError:
        config = [_config_of(layer) for layer in flatten_layers(graph)]
    names: dict[str, str] = {}
    _collect_names(config, names)
    # Data by name goes to inputs by their names, whatever their order.
    by_name = [x.name for x in graph.inputs] if isinstance(inputs, dict) else None
    content = json.dumps([_unnamed(config, names), by_name], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def _preparation_digest(model: keras.Model) -> str | None:
    """Returns what tells apart how models prepare data in their own `fit`, None if they do not."""
    if not prepares_data(model):
        return None
    preparing = preparing_layers(model)
    config: Any = [_config_of(layer) for layer in preparing]
    names: dict[str, str] = {}
    _collect_names(config, names)
    digest = hashlib.sha256(json.dumps(_unnamed(config, names), default=str).encode())
    for layer in flatten_layers(preparing):
        for part in [*_assets(layer), *[on_host(weight).tobytes() for weight in layer.weights]]:
            digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def _assets(layer: keras.Layer) -> list[bytes]:
    """Returns the files that Keras saves of a layer besides its weights, such as a vocabulary."""
    if not hasattr(layer, "save_assets"):
        return []
    with tempfile.TemporaryDirectory() as folder:
        layer.save_assets(folder)
        files = sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file())
        return [part for path in files for part in (path.name.encode(), path.read_bytes())]


def _config_of(layer: keras.Layer) -> Any:
    """The configuration of a layer; one of one's own without any is known by its class."""
    kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
    try:
        return {"class_name": kind, "config": layer.get_config()}
    except NotImplementedError:
        return kind


def _collect_names(config: Any, names: dict[str, str]) -> None:
    """Numbers the names of layers in the order in which they come."""
    if isinstance(config, dict):
        if _is_layer(config):
            names.setdefault(config["config"]["name"], f"#{len(names)}")
        for value in config.values():
            _collect_names(value, names)
    elif isinstance(config, (list, tuple)):
        for value in config:
            _collect_names(value, names)


def _is_layer(config: dict[str, Any]) -> bool:
    inner = config.get("config")
    is_policy = str(config.get("class_name")).endswith("Policy")
    return isinstance(inner, dict) and isinstance(inner.get("name"), str) and not is_policy


def _unnamed(config: Any, names: dict[str, str]) -> Any:
    """Returns a configuration with numbers in place of layers' names, where those stand."""
    if isinstance(config, (list, tuple)):
        return [_unnamed(value, names) for value in config]
    if not isinstance(config, dict):
        return config
    unnamed = {
        str(key): _renamed(value, names) if key in _NAMING else _unnamed(value, names)
        for key, value in config.items()
        if key not in _LEFT_OUT
    }
    if _is_layer(config):
        number = names[config["config"]["name"]]
        unnamed["config"]["name"] = number
        if "name" in unnamed:
            unnamed["name"] = number
    elif "layers" in unnamed:
        unnamed.pop("name", None)  # The model itself.
    return unnamed


def _renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {str(key): _renamed(one, names) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_renamed(one, names) for one in value]
    return names.get(value, value) if isinstance(value, str) else value
