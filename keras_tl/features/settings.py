"""How features are extracted, as the parts of an extraction hand it on."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ExtractionSettings:
    """How features are extracted.

    Attributes:
        dtype: String or None. The dtype that features are kept in, if not their own.
        views: Int or None. How many random passes over the data are recorded; None for one that
            nothing random may be in.
        training: Bool. Whether layers are called as in `fit`, or as in `evaluate`.
        verbose: 0, 1 or 2, as `Progbar` takes it.
    """

    dtype: str | None
    views: int | None
    training: bool
    verbose: int

    @property
    def passes(self) -> int:
        """Int. How many passes over the data are recorded."""
        return self.views or 1

    @property
    def random(self) -> bool:
        """Bool. Whether each pass may give other features."""
        return self.views is not None
