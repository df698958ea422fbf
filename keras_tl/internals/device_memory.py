"""How much memory a device has."""

from __future__ import annotations

import keras


def device_memory() -> int | None:
    """Returns the bytes of memory that the first accelerator has, None where that is not known.

    TensorFlow tells what is in use, and not how much there is; of the CPU, nothing is told.
    """
    if keras.backend.backend() == "jax":
        import jax

        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
        return None if limit is None else int(limit)
    if keras.backend.backend() == "torch":
        import torch

        return int(torch.cuda.mem_get_info()[1]) if torch.cuda.is_available() else None
    return None
