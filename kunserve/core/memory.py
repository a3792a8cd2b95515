"""Pages as the vocabulary of messages: which ones, never how they are mapped.

Two kinds of page numbers, both of one instance and `page_bytes` long:

    physical page   0 .. num_pages - 1        what an instance owns (`PageRun.start` of its arena)
    range page      slot * slot_pages + i     where KV lies in every layer's virtual range; the same
                                              on all members: block id // blocks_per_page
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kunserve.core.layout import Part


@dataclass(frozen=True, order=True)
class PageRun:
    """Contiguous pages [start, start + count), physical or of a range."""

    start: int
    count: int

    @property
    def stop(self) -> int:
        """First page after the run."""
        return self.start + self.count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))


def runs_of(pages: Iterable[int]) -> tuple[PageRun, ...]:
    """The fewest runs that hold exactly `pages`, ascending. Repeated pages count once."""
    runs: list[PageRun] = []
    for page in sorted(set(pages)):
        if runs and runs[-1].stop == page:
            runs[-1] = PageRun(runs[-1].start, runs[-1].count + 1)
        else:
            runs.append(PageRun(page, 1))
    return tuple(runs)


def pages_of(runs: Iterable[PageRun]) -> list[int]:
    """All pages of `runs`, in their order."""
    return [page for run in runs for page in run]


@dataclass(frozen=True)
class KvExtent:
    """Range pages [range_page, range_page + count) of `layer` lie in physical pages
    [physical_page, physical_page + count)."""

    layer: int
    range_page: int
    physical_page: int
    count: int


@dataclass(frozen=True)
class PartRuns:
    """The physical pages of a held part, in the order of its slab."""

    part: Part
    runs: tuple[PageRun, ...]
