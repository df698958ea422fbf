"""Layers of keras_tl."""

from keras_tl.layers.frozen_backbone import FrozenBackbone

__all__ = ["FrozenBackbone"]
