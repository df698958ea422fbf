"""What is imported from inside Keras; checked with Keras 3.15.0 to 3.16.0.dev2026102704."""

from __future__ import annotations

from keras_tl.internals.checked import SINCE_3_15, UnsupportedKerasError

try:
    from keras.src.backend import compute_output_spec
    from keras.src.backend.common import global_state
    from keras.src.backend.common.masking import get_keras_mask, set_keras_mask
    from keras.src.backend.common.variables import AutocastScope
    from keras.src.ops.function import Function
    from keras.src.optimizers.base_optimizer import clip_by_global_norm
    from keras.src.trainers.data_adapters import ArrayDataAdapter, get_data_adapter
    from keras.src.trainers.data_adapters.array_slicing import train_validation_split
    from keras.src.utils.naming import to_snake_case
except ImportError as error:
    raise UnsupportedKerasError(error, SINCE_3_15) from error

__all__ = [
    "ArrayDataAdapter",
    "AutocastScope",
    "Function",
    "clip_by_global_norm",
    "compute_output_spec",
    "get_data_adapter",
    "get_keras_mask",
    "global_state",
    "set_keras_mask",
    "to_snake_case",
    "train_validation_split",
]
