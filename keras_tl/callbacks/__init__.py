"""Callbacks of keras_tl."""

from keras_tl.callbacks.freeze_guard import FreezeGuard
from keras_tl.callbacks.unfreeze_at_convergence import UnfreezeAtConvergence

__all__ = ["FreezeGuard", "UnfreezeAtConvergence"]
