"""What is said: messages as Keras prints them, names in short, tables of text."""

from __future__ import annotations

import difflib
import functools
import html
import inspect
import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

import keras

from keras_tl.internals.processes import is_chief

_logger = logging.getLogger("keras_tl")
_NAMES_SHOWN = 3


def say(message: str) -> None:
    """Prints the message, or logs it where Keras' interactive logging is switched off.

    Of several processes that train one model, only the first does.
    """
    if not is_chief():
        return
    if keras.config.is_interactive_logging_enabled():
        print(message, flush=True)
    else:
        _logger.info(message)


def some(names: Sequence[str]) -> str:
    """Returns the first few names, and how many more there are."""
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def did_you_mean(asked: str, names: Sequence[str]) -> str:
    """Returns a hint at the names that are like the one that was asked for, with a space before.

    Example:

    >>> did_you_mean("val_acc", ["loss", "val_accuracy"])
    ' Did you mean "val_accuracy"?'
    >>> did_you_mean("lr", ["layers", "learning_rate"])
    ' Did you mean "learning_rate"?'
    """
    initials = [name for name in names if asked == "".join(word[:1] for word in name.split("_"))]
    alike = difflib.get_close_matches(asked, names, n=3, cutoff=0.5)
    close = dict.fromkeys(initials or alike)
    return " Did you mean " + ", ".join(f'"{name}"' for name in close) + "?" if close else ""


def how_to_get_a_model(value: Any) -> str:
    """Returns a hint for what is no model but may stand for one, with a space before.

    Example:

    >>> how_to_get_a_model(keras.applications.Xception)
    ' Call it, and pass what it returns: `Xception(...)`.'
    """
    if isinstance(value, (str, os.PathLike)):
        load = f"keras.saving.load_model({os.fspath(value)!r})"
        return f" Of a file, pass the model that is in it: `{load}`."
    makes = isinstance(value, (type, functools.partial)) or inspect.isroutine(value)
    if callable(value) and not makes and not isinstance(value, keras.Layer):
        return (
            " What another framework has made becomes a layer of Keras in a "
            "`keras.layers.TorchModuleWrapper`, `TFSMLayer` or `JaxLayer`."
        )
    return how_to_call(value)


def how_to_call(value: Any) -> str:
    """Returns a hint for a class or a function in place of what it makes, with a space before."""
    if callable(value) and not isinstance(value, keras.Layer):
        name = getattr(value, "__name__", type(value).__name__)
        return f" Call it, and pass what it returns: `{name}(...)`."
    return ""


def bytes_in_words(count: float) -> str:
    """Returns a number of bytes as people write it."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def format_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()
) -> list[str]:
    """Returns the lines of a table of text with aligned columns.

    Args:
        header: The columns' titles.
        rows: The rows, each with a string for every column.
        right: The positions of the columns that are aligned to the right.

    Returns:
        A list of lines.

    Example:

    >>> format_table(["a", "b"], [["long", "1"], ["x", "22"]], right=[1])
    ['a      b', 'long   1', 'x     22']
    """
    table = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def html_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()
) -> str:
    """Returns the same table for a notebook.

    Args:
        header: The columns' titles.
        rows: The rows, each with a string for every column.
        right: The positions of the columns that are aligned to the right.

    Returns:
        A string of HTML.

    Example:

    >>> html_table(["a"], [["<b>"]], right=[0])
    '<table><tr><th>a</th></tr><tr><td style="text-align: right">&lt;b&gt;</td></tr></table>'
    """

    def cells(row: Sequence[str]) -> str:
        return "".join(
            f'<td style="text-align: {"right" if column in right else "left"}">'
            f"{html.escape(cell)}</td>"
            for column, cell in enumerate(row)
        )

    titles = "".join(f"<th>{html.escape(title)}</th>" for title in header)
    lines = "".join(f"<tr>{cells(row)}</tr>" for row in rows)
    return f"<table><tr>{titles}</tr>{lines}</table>"
