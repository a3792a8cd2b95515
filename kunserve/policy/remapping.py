"""Which pages go where when pages change owner: as many as possible straight from where they are
shown to where they are wanted, because such pages keep their page tables and fault no more.

    dropped slab   |0 1 2 3 4 5 6 7|    given KV   |8 9|    free   |10 11 12|
    wanted KV      |. . . . . .|  |. . . .|  |.|
                    0 1 2 3 4 5    6 7 8 9    10                 moved: 0-9, mapped: 10

Slabs come first: their pages have all been touched. Source: paper mechanism 3.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from kunserve.core.errors import AccountingError
from kunserve.core.layout import Part
from kunserve.core.memory import KvExtent, PageRun

LayerRun = tuple[int, PageRun]
"""Range pages of one layer."""

Place = Part | int | None
"""Where pages are shown: a part's slab, a layer's KV range, or nowhere."""


@dataclass(frozen=True)
class ShownRun:
    """Physical pages `run` and where they are shown, one after the other from page `at` on."""

    place: Place
    at: int
    run: PageRun


@dataclass(frozen=True)
class Choice:
    """`moves`: pages of `[0]` become KV `[1]`, which are as many. `left`: pages that stay over, of
    those that are shown somewhere."""

    moves: tuple[tuple[ShownRun, KvExtent], ...]
    left: tuple[ShownRun, ...]

    @property
    def moved_pages(self) -> int:
        """Pages that go straight from one place to another."""
        return sum(to.count for source, to in self.moves if source.place is not None)


def choose_pages(wanted: Sequence[LayerRun], sources: Sequence[Sequence[ShownRun]]) -> Choice:
    """Pages for all of `wanted`, from the first class of `sources` as long as it has any.

    Each piece costs a mapping and a driver call. So the longest wanted run is served first, from
    the shortest source that holds all of it, else from the longest.

    Raises:
        AccountingError: `sources` have fewer pages than are wanted.
    """
    lacking = sorted(wanted, key=lambda place: -place[1].count)
    moves: list[tuple[ShownRun, KvExtent]] = []
    left: list[ShownRun] = []
    for shown in sources:
        there = sorted(shown, key=_by_length)
        unserved: list[LayerRun] = []
        for layer, run in lacking:
            at = run.start
            while at < run.stop and there:
                used = _take(there, run.stop - at)
                moves.append((used, KvExtent(layer, at, used.run.start, used.run.count)))
                at += used.run.count
            if at < run.stop:
                unserved.append((layer, PageRun(at, run.stop - at)))
        lacking = unserved
        left += [rest for rest in there if rest.place is not None]
    if lacking:
        missing = sum(run.count for _, run in lacking)
        raise AccountingError(f"{missing} pages are wanted that neither are free nor become free")
    return Choice(tuple(moves), tuple(left))


def _length(shown: ShownRun) -> int:
    return shown.run.count


def _by_length(shown: ShownRun) -> tuple[int, int]:
    # Of several longest ones the lowest comes first: neighbours may become one mapping.
    return shown.run.count, -shown.run.start


def _take(there: list[ShownRun], count: int) -> ShownRun:
    """Take `count` pages, or fewer, off one of `there`, which is sorted by length."""
    position = bisect_left(there, count, key=_length)
    if position == len(there):
        return there.pop()
    found = there.pop(position)
    start, rest = found.run.start, found.run.count - count
    if rest:
        tail = ShownRun(found.place, found.at + count, PageRun(start + count, rest))
        insort(there, tail, key=_by_length)
    return ShownRun(found.place, found.at, PageRun(start, count))
