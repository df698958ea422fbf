"""The data to extract features of: whatever `fit` takes, as batches, and what tells it apart."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tl.errors import UncacheableError
from keras_tl.internals.batches import batches_of


class Source:
    """Batches of inputs, with targets and sample weights if there are any.

    Args:
        x: Arrays, a `tf.data.Dataset`, a `PyDataset` or a generator, as `fit` takes them.
        y: Targets, if they are not in `x`.
        sample_weight: Weights, if they are not in `x`.
        batch_size: Int or None. For arrays.
        steps: Int or None. How many batches are used, of data that has no end.

    Attributes:
        batches: Int or None. How many batches there are, if that is known.
        repeatable: Bool. Whether the data can be read more than once.
        fixed: Bool. Whether it is arrays, which are the same each time.
        first: The first batch of those that `samples` has read, None before.
        agrees: Bool. Whether the model itself gave for a batch what its head gives for it.
        close: Function that ends what reads the data now, to be called in the end.
        spec: `tf.TypeSpec`s of a batch, nested as it is.

    Raises:
        UncacheableError: If a part of the data is not a dense tensor.
        ValueError: If the data has no end, and `steps` is None.
    """

    def __init__(
        self, x: Any, y: Any, sample_weight: Any, *, batch_size: int | None, steps: int | None
    ):
        if y is not None and any(one is None for one in keras.tree.flatten(y)):
            raise UncacheableError(
                "Some of the targets are None, of which nothing can be recorded. Leave them out, "
                "or train through the backbone."
            )
        self._dataset, self.batches, self.close = batches_of(x, y, sample_weight, batch_size, steps)
        if self.batches is None and _has_no_end(x, self._dataset):
            raise ValueError("The data has no end. Pass `steps`, the number of batches to record.")
        self.repeatable = not inspect.isgenerator(x)
        self.fixed = all(hasattr(array, "shape") for array in keras.tree.flatten(x))
        self.first: Any = None
        self.agrees = False
        self.spec = self._dataset.element_spec
        for spec in tf.nest.flatten(self.spec):
            if not isinstance(spec, tf.TensorSpec):
                raise UncacheableError(
                    f"Features are recorded with dense tensors only. The data has {spec}. Turn it "
                    "into a dense tensor first."
                )

    @property
    def inputs(self) -> Any:
        """`tf.TypeSpec`s of the inputs, nested as they are."""
        return keras.utils.unpack_x_y_sample_weight(self.spec)[0]

    def describe(self) -> dict[str, list[str]]:
        """Returns shapes and dtypes of a sample's inputs, and of what else there is."""
        x, y, weight = keras.utils.unpack_x_y_sample_weight(self.spec)
        return {"inputs": _described(x), "targets": _described((y, weight))}

    def part(self, index: int, count: int) -> tf.data.Dataset:
        """Returns a `tf.data.Dataset` of every `count`-th batch from the one of that index on."""
        # By batches, so that those of all parts together are the batches of one recording.
        return self._dataset if count == 1 else self._dataset.shard(count, index)

    def watched(self, index: int, count: int, passes: list[Samples]) -> Iterator[Any]:
        """Yields the batches of a part, and reads the others too, to tell the whole pass apart.

        For processes that each read all of the data: whether they saw the same in the same order.

        Args:
            index: Int. Which part.
            count: Int. Of how many.
            passes: List that gets the `Samples` of the pass at its end.
        """
        whole = Samples()
        for number, batch in enumerate(self._dataset):
            self.first = batch if self.first is None else self.first
            whole.add(Samples.of(batch))
            if number % count == index:
                yield batch
        passes.append(whole)

    def samples(self, index: int, count: int, *, batches: int | None = None) -> Samples:
        """Reads a part of the data, or its first batches, and returns what tells it apart."""
        samples = Samples()
        for batch in self.part(index, count).take(-1 if batches is None else batches):
            # Kept for checks by value: some data can be read only once.
            self.first = batch if self.first is None else self.first
            samples.add(Samples.of(batch))
        return samples

    def same(self, recorded: Samples, now: Samples, *, random: bool) -> bool:
        """Whether what was recorded of some batches is of the same batches of this data.

        Args:
            recorded: What tells the recorded samples apart.
            now: What tells those apart that are read now.
            random: Bool. Whether inputs may be others each time: they are not compared.
        """
        if not random:
            return recorded == now
        has_targets = bool(self.describe()["targets"])
        return recorded.batches == now.batches and (
            not has_targets or recorded.targets == now.targets
        )


def _has_no_end(x: Any, dataset: tf.data.Dataset) -> bool:
    """Whether data of which the number of batches is not known is certain to have no end."""
    endless = dataset.cardinality() == tf.data.INFINITE_CARDINALITY
    return endless or isinstance(x, keras.utils.PyDataset)


@dataclasses.dataclass
class Samples:
    """What tells samples apart: sums over fingerprints of 64 bits, one for each sample.

    Equal for the same samples in another order, but for `ordered`.

    Attributes:
        batches: List of ints. How many samples there are in each batch.
        inputs: Int. The sum over the inputs' fingerprints, modulo 2**64.
        targets: Int. The sum over those of targets and sample weights.
        pairs: Int. The sum over those of the inputs with their targets and sample weights.
        ordered: String. A digest of all of them in their order.
    """

    batches: list[int] = dataclasses.field(default_factory=list)
    inputs: int = 0
    targets: int = 0
    pairs: int = 0
    ordered: str = ""

    @classmethod
    def of(cls, batch: Any) -> Samples:
        """Returns what tells the samples of a batch apart."""
        x, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
        with tf.device("CPU:0"):  # Fingerprints have no kernel for a GPU.
            inputs = _fingerprints(tf.nest.flatten(x))
            rest = [one for one in tf.nest.flatten((y, weight)) if one is not None]
            targets = _fingerprints(rest) if rest else inputs
            pairs = _fingerprints([inputs, targets]) if rest else inputs
        return cls(
            [int(inputs.shape[0])],
            _sum(inputs.numpy()),
            _sum(targets.numpy()),
            _sum(pairs.numpy()),
            _digest(pairs.numpy().tobytes()),
        )

    def add(self, others: Samples) -> None:
        """Takes in the samples of further batches."""
        self.batches += others.batches
        self.inputs = (self.inputs + others.inputs) % 2**64
        self.targets = (self.targets + others.targets) % 2**64
        self.pairs = (self.pairs + others.pairs) % 2**64
        self.ordered = _digest((self.ordered + others.ordered).encode())

    @property
    def count(self) -> int:
        """Int. The number of samples."""
        return sum(self.batches)

    def difference(self, now: Samples, *, inputs: bool = True, targets: bool = True) -> str | None:
        """Says what differs between these samples and others, but for their order.

        Args:
            now: The others.
            inputs: Bool. Whether inputs are compared.
            targets: Bool. Whether targets and sample weights are compared.
        """
        if self.count != now.count:
            return f"the number of samples (recorded {self.count}, now {now.count})"
        if inputs and self.inputs != now.inputs:
            return "the inputs"
        if targets and self.targets != now.targets:
            return "the targets or sample weights"
        if inputs and targets and self.pairs != now.pairs:
            return "the targets or sample weights (which go with other inputs)"
        return None


def _described(part: Any) -> list[str]:
    specs = [spec for spec in tf.nest.flatten(part) if spec is not None]
    return [f"{spec.dtype.name}{spec.shape[1:]}" for spec in specs]


def _fingerprints(tensors: list[tf.Tensor]) -> tf.Tensor:
    """Returns 8 bytes for each sample."""
    each = [tf.fingerprint(_rows(tensor)) for tensor in tensors]
    return each[0] if len(each) == 1 else tf.fingerprint(tf.concat(each, axis=1))


def _rows(tensor: tf.Tensor) -> tf.Tensor:
    samples = tf.shape(tensor)[0]
    return tf.reshape(tensor, (samples, tf.size(tensor) // tf.maximum(samples, 1)))


def _sum(fingerprints: np.ndarray) -> int:
    return int(np.sum(fingerprints.view(np.uint64), dtype=np.uint64))


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()
