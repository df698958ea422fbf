"""What recorded features depend on: the layers that made them, their weights, and the data."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import keras

from keras_tl import internals
from keras_tl.features.source import Source
from keras_tl.features.splitting import SplitModel
from keras_tl.messages import some

# How far layers are frozen changes nothing in what they return in `fit`, once nothing of them is
# trained; names change with the order in which models are made.
_LEFT_OUT = {"trainable", "trainable_flags", "hand_frozen"}


def identity_of(
    split: SplitModel, source: Source, *, dtype: str | None, views: int, training: bool
) -> dict[str, Any]:
    """Returns all that recorded features depend on but the samples, as JSON can hold it."""
    return {
        "configuration": _configuration_digest(split.graph),
        "weights": [
            [weight.path, hashlib.sha256(internals.on_host(weight).tobytes()).hexdigest()]
            for weight in split.graph.weights
        ],
        **source.describe(),
        "dtype": dtype,
        "views": views,
        "training": training,
    }


def digest_of(identity: dict[str, Any]) -> str:
    """Returns a short string that stands for an identity. Names of weights do not count."""
    weights = [digest for _, digest in identity["weights"]]
    content = json.dumps({**identity, "weights": weights}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def differences(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Says in what two identities differ."""
    found = []
    if recorded["configuration"] != now["configuration"]:
        found.append("the layers up to the backbone's outputs")
    before, after = recorded["weights"], now["weights"]
    changed = [new[0] for old, new in zip(before, after) if old[1] != new[1]]
    if len(before) != len(after):
        found.append(f"the number of weights (recorded {len(before)}, now {len(after)})")
    elif changed:
        found.append(f"the weights {some(changed)}")
    for name in ("inputs", "targets", "dtype", "views", "training"):
        if recorded[name] != now[name]:
            what = f"shape or dtype of the {name}" if name in ("inputs", "targets") else name
            found.append(f"{what} (recorded {_shown(recorded[name])}, now {_shown(now[name])})")
    return found


def _shown(value: Any) -> str:
    return ", ".join(value) or "none" if isinstance(value, list) else str(value)


def _configuration_digest(graph: keras.Model) -> str:
    try:
        config: Any = graph.get_config()
    except NotImplementedError:
        # A layer of one's own without a configuration is known by its class and its weights.
        config = [type(layer).__qualname__ for layer in graph.layers]
    names: dict[str, str] = {}
    _collect_names(config, names)
    content = json.dumps(_without_names(config, names), sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def _collect_names(config: Any, names: dict[str, str]) -> None:
    if isinstance(config, dict):
        if isinstance(config.get("name"), str):
            names.setdefault(config["name"], f"#{len(names)}")
        for value in config.values():
            _collect_names(value, names)
    elif isinstance(config, (list, tuple)):
        for value in config:
            _collect_names(value, names)


def _without_names(config: Any, names: dict[str, str]) -> Any:
    if isinstance(config, dict):
        return {
            names.get(key, key) if isinstance(key, str) else str(key): _without_names(value, names)
            for key, value in config.items()
            if key not in _LEFT_OUT
        }
    if isinstance(config, (list, tuple)):
        return [_without_names(value, names) for value in config]
    return names.get(config, config) if isinstance(config, str) else config
