"""Optimizers of keras_tl."""

from keras_tl.optimizers.group_optimizer import GroupOptimizer

__all__ = ["GroupOptimizer"]
