"""Small files of JSON with a checksum, which are read without trust in what is in them."""

from __future__ import annotations

import json
import pathlib
import struct
import zlib
from typing import Any

# What reading a file can raise that holds anything at all: also JSON that is nested a hundred
# thousand deep, and sizes that no memory has.
BROKEN = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
    struct.error,
)


def sealed(content: dict[str, Any]) -> bytes:
    """Returns the bytes of a file."""
    return json.dumps({"checksum": _checksum_of(content), "content": content}).encode()


def unsealed(path: pathlib.Path) -> dict[str, Any]:
    """Returns what `sealed` was given.

    Raises:
        FileNotFoundError: If there is no such file.
        Exception: Any of `BROKEN`, if it is not whole.
    """
    written = json.loads(path.read_text(encoding="utf-8"))
    if written["checksum"] != _checksum_of(written["content"]):
        raise ValueError("its checksum is wrong")
    if not isinstance(written["content"], dict):
        raise ValueError("it holds something else")
    return written["content"]


def reason(error: Exception) -> str:
    """Says why a file is not whole, from one of `BROKEN`."""
    if isinstance(error, (ValueError, OSError)) and not isinstance(error, UnicodeError):
        return str(error)
    return f"it is not what keras_tl writes: {type(error).__name__} {error}".rstrip()


def is_count(value: Any) -> bool:
    """Whether a value from a file is an int of at least 0."""
    return type(value) is int and value >= 0


def _checksum_of(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
