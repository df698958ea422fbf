"""Tables of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


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
