"""What the features in a folder were recorded with, as its manifest holds it."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from keras_tl.features.probe import Probe
from keras_tl.features.records import Field, Records
from keras_tl.features.sealed import is_count, unsealed

FILE = "manifest.json"

# A shard is held in memory while it is written, so a file does not decide how large it gets.
_MOST_BATCHES = 1024
# Numbers and nothing that could point into memory.
_KINDS = "biufc"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What features were recorded with.

    Attributes:
        identity: All that they depend on but the samples.
        records: The layout of the `Records`.
        batches_per_shard: Int.
        probe: A `Probe` or None.
    """

    identity: dict[str, Any]
    records: Records
    batches_per_shard: int
    probe: Probe | None

    def to_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold."""
        return {
            "identity": self.identity,
            "fields": [field.to_list() for field in self.records.fields],
            "batches_per_shard": self.batches_per_shard,
            "probe": None if self.probe is None else self.probe.to_list(),
        }

    @classmethod
    def of(cls, folder: pathlib.Path) -> Manifest:
        """Returns the manifest of a folder.

        Raises:
            Exception: Any of `sealed.BROKEN`, if there is none that is whole.
        """
        return cls.from_dict(unsealed(folder / FILE))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Manifest:
        """Returns what `to_dict` was made of.

        Raises:
            Exception: Any of `sealed.BROKEN`, if it is none.
        """
        identity, batches = data["identity"], data["batches_per_shard"]
        weights = identity["weights"]
        if not all(isinstance(one, str) for pair in weights for one in pair):
            raise ValueError("its weights are no names and digests")
        if not all(len(pair) == 2 for pair in weights):
            raise ValueError("its weights are no names and digests")
        if not is_count(batches) or not 1 <= batches <= _MOST_BATCHES:
            raise ValueError(f"its shards have {batches} batches")
        probe = data["probe"]
        return cls(
            identity,
            records_of(data["fields"]),
            batches,
            None if probe is None else Probe.from_list(probe),
        )


def records_of(fields: Any) -> Records:
    """Returns the layout that a file says.

    Raises:
        Exception: Any of `sealed.BROKEN`, if it says none.
    """
    records = Records([Field.from_list(field) for field in fields])
    for field, (_, dtype) in zip(records.fields, records.layout, strict=True):
        known = dtype.kind in _KINDS or field.dtype == "bfloat16"
        if not known or not all(map(is_count, field.shape)):
            raise ValueError(f"its records have a field {field}")
    return records
