"""Whether features are worth recording, and where: what is spared against what is kept and read.

What counts is multiplications, as they can be told from shapes before anything runs. A byte that is
read takes the time of some multiplications, and one more than the model's inputs have takes much
more: feature maps larger than the images are not recorded unless most of the model is spared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras

from keras_tl.features.cuts import Cut, Shapes, cuts
from keras_tl.features.unrolled import Unrolled, size_of
from keras_tl.internals.values import itemsize
from keras_tl.messages import bytes_in_words

# What a byte of a record costs that replaces a byte of the inputs, and one that there was not.
_PER_BYTE, _PER_BYTE_MORE = 100, 1000
# A pass backward takes about as long as two forward.
_BACKWARD = 2
# Of the time of an epoch. Less is lost again in what starts and ends.
_LEAST_SPARED = 0.05


@dataclasses.dataclass(frozen=True)
class Terms:
    """What a record is judged by.

    Attributes:
        always: Bool. Whether to record whatever it brings.
        epochs: Int. How many epochs may be trained on it.
        samples: Int or None. How many samples are recorded, of all data; None if it is not known.
        views: Int. How many passes are recorded.
        max_bytes: Int. How many bytes may be kept.
        item_bytes: Int or None. The size of a number that features are kept in, None for their own.
    """

    always: bool
    epochs: int
    samples: int | None
    views: int
    max_bytes: int
    item_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is recorded, and why.

    Attributes:
        cut: The `Cut` to record at, or None.
        why: String. The reason, in the words of a message.
    """

    cut: Cut | None
    why: str


def deepest(unrolled: Unrolled) -> Cut | None:
    """Returns the cut that spares the most, None if nothing with weights can be spared.

    Random layers are before it only if no weights come before them.
    """
    shapes = unrolled.shapes(())
    for random in (False, True):
        found = [cut for cut in cuts(unrolled, shapes, random=random) if cut.has_weights]
        if found:
            return max(found, key=lambda cut: _net(cut, shapes, None, more=0))
    return None


def judge(unrolled: Unrolled, inputs: Any, terms: Terms, *, random: bool) -> Verdict:
    """Says where to record features, if it is worth it.

    Args:
        unrolled: The `Unrolled` model, as it is going to be trained.
        inputs: Shapes and dtypes of the data's inputs.
        terms: The `Terms`.
        random: Bool. Whether layers before the cut may be random.
    """
    shapes = unrolled.shapes(inputs)
    found = [cut for cut in cuts(unrolled, shapes, random=random) if cut.has_weights]
    if not found:
        return Verdict(None, "no weights come before all that trains or is random")
    more = 0 if terms.always else _PER_BYTE_MORE - _PER_BYTE
    order = sorted(found, key=lambda cut: _net(cut, shapes, terms, more=more), reverse=True)
    if not terms.always:
        order = [cut for cut in order if _pays(cut, shapes, terms)]
    if not order:
        return Verdict(None, _why_not(found, shapes, terms))
    fitting = [cut for cut in order if _all_bytes(cut, shapes, terms) <= terms.max_bytes]
    if not fitting:
        return Verdict(None, _too_many(order[0], shapes, terms))
    return Verdict(fitting[0], _what(fitting[0], shapes, terms))


def bytes_of(tensors: Sequence[Any], shapes: Shapes, item_bytes: int | None) -> int:
    """Returns how many bytes tensors have for one sample."""
    total = 0
    for x in tensors:
        dtype = keras.backend.standardize_dtype(x.dtype)
        own = itemsize(dtype)
        kept = min(own, item_bytes or own) if "float" in dtype else own
        total += kept * size_of(shapes[id(x)])
    return total


def _bytes(cut: Cut, shapes: Shapes, terms: Terms | None) -> int:
    return bytes_of(cut.tensors, shapes, None if terms is None else terms.item_bytes)


def _all_bytes(cut: Cut, shapes: Shapes, terms: Terms) -> int:
    return _bytes(cut, shapes, terms) * (terms.samples or 0) * terms.views


def _input_bytes(cut: Cut, shapes: Shapes) -> int:
    return bytes_of(cut.unrolled.inputs, shapes, None)


def _net(cut: Cut, shapes: Shapes, terms: Terms | None, *, more: int) -> float:
    """Returns what a cut spares for one sample in one epoch, less what reading it takes."""
    count = _bytes(cut, shapes, terms)
    beyond = max(0, count - _input_bytes(cut, shapes))
    return cut.multiplications - _PER_BYTE * count - more * beyond


def _epoch(cut: Cut) -> float:
    """Returns what a sample takes in an epoch through the whole model."""
    return cut.of_all + _BACKWARD * (cut.of_all - cut.multiplications)


def _pays(cut: Cut, shapes: Shapes, terms: Terms) -> bool:
    """Whether a record spares more than making it takes, over all epochs."""
    net = _net(cut, shapes, terms, more=_PER_BYTE_MORE - _PER_BYTE)
    once = cut.multiplications + _PER_BYTE * _bytes(cut, shapes, terms)
    least = _LEAST_SPARED * _epoch(cut)
    return terms.epochs * (net - least) > terms.views * once


def _share(cut: Cut) -> str:
    """Says how much of an epoch's arithmetic a cut spares."""
    return f"{cut.multiplications / _epoch(cut):.0%}"


def _what(cut: Cut, shapes: Shapes, terms: Terms) -> str:
    size = bytes_in_words(_bytes(cut, shapes, terms))
    total = bytes_in_words(_all_bytes(cut, shapes, terms))
    spared = _share(cut)
    return (
        f"what comes after {cut.name}, {size} a sample and {total} in all: an epoch on it spares "
        f"about {spared} of the arithmetic"
    )


def _too_many(cut: Cut, shapes: Shapes, terms: Terms) -> str:
    return (
        f"what comes after {cut.name} takes {bytes_in_words(_all_bytes(cut, shapes, terms))}, and "
        f"{bytes_in_words(terms.max_bytes)} may be kept (`max_bytes`)"
    )


def _why_not(found: Sequence[Cut], shapes: Shapes, terms: Terms) -> str:
    cut = max(found, key=lambda one: _net(one, shapes, terms, more=0))
    size, given = _bytes(cut, shapes, terms), _input_bytes(cut, shapes)
    spared = f"about {_share(cut)} of the arithmetic of an epoch"
    if terms.epochs <= terms.views:
        return f"{terms.epochs} epochs at most are too few to make up for recording"
    if size > given:
        return (
            f"what comes after {cut.name} is larger than the input ({bytes_in_words(size)} a "
            f"sample, not {bytes_in_words(given)}), and would spare {spared}"
        )
    return f"what is frozen up to {cut.name} is {spared}, too little to record it"
