"""What TensorBoard gets besides the logs: how much trains, and the switches as text."""

from __future__ import annotations

from collections.abc import Iterable

import keras

from keras_tl.backbone.freezing import count_params
from keras_tl.internals.callback_list import summary_writer


def write_parameters(
    beside: Iterable[keras.callbacks.Callback], epoch: int, model: keras.Model
) -> None:
    """Writes how many parameters train as the scalar `epoch_trainable_parameters`."""
    for one in _tensorboards(beside):
        trainable = count_params(model.trainable_weights)
        with summary_writer(one).as_default():
            one.summary.scalar("epoch_trainable_parameters", trainable, step=epoch)


def write_switch(beside: Iterable[keras.callbacks.Callback], epoch: int, block: str) -> None:
    """Writes what is said of a switch as the text `switch`."""
    for one in _tensorboards(beside):
        with summary_writer(one).as_default():
            # Indented, it is a block of code in the Markdown that TensorBoard reads.
            text = "\n".join(f"    {line}" for line in block.splitlines())
            one.summary.text("switch", text, step=epoch)


def _tensorboards(
    callbacks: Iterable[keras.callbacks.Callback],
) -> list[keras.callbacks.TensorBoard]:
    return [one for one in callbacks if isinstance(one, keras.callbacks.TensorBoard)]
