"""Where to cut a chain of calls into segments whose activations are computed again when needed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence


def cheapest_cuts(returned: Sequence[float], carried: Sequence[float]) -> list[int]:
    """Returns the cuts of a chain of calls with which its backward pass holds the least at a time.

    What goes from a segment to the next is kept, and what is in a segment is held while its
    gradients are computed: so the need is all that is carried over cuts and the largest segment.

    Args:
        returned: How much each call returns.
        carried: How much of what calls return is used both before and after each place: of the
            place before the first call, before the second one, and so on.

    Returns:
        List of ints: the places of the cuts. It is empty where no cut saves anything.

    Example:

    >>> cheapest_cuts([8, 8, 1, 8, 8], [0, 8, 8, 1, 8])
    [3]
    """
    total = sum(returned)
    limits = itertools.takewhile(
        lambda limit: limit > max(returned, default=total) / 2,
        (total / 2 ** (step / 2) for step in range(1, 40)),
    )
    tries = [[], *(list(_cuts_within(limit, returned, carried)) for limit in limits)]
    return min(tries, key=lambda cuts: least_need(cuts, returned, carried))


def segments(start: int, end: int, cuts: Sequence[int]) -> list[tuple[int, int]]:
    """Returns the pairs of where segments start and end.

    Example:

    >>> segments(2, 9, [4, 7])
    [(2, 4), (4, 7), (7, 9)]
    """
    return list(itertools.pairwise([start, *cuts, end]))


def least_need(cuts: Sequence[int], returned: Sequence[float], carried: Sequence[float]) -> float:
    """Returns what a backward pass holds at a time, of a chain that is cut; see `cheapest_cuts`."""
    parts = segments(0, len(returned), cuts)
    largest = max((sum(returned[start:end]) for start, end in parts), default=0)
    return sum(carried[place] for place in cuts) + largest


def _cuts_within(
    limit: float, returned: Sequence[float], carried: Sequence[float]
) -> Iterator[int]:
    """Cuts where little is carried, such that no segment of several calls returns more."""
    start = 0
    for end in range(1, len(returned)):
        if end > start + 1 and sum(returned[start : end + 1]) > limit:
            # Not too close to the last cut, or there would be many.
            places = range(end, (start + end) // 2, -1)
            start = min(places, key=carried.__getitem__)
            yield start
