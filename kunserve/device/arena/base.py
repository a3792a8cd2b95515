"""The memory arena: physical pages that can be mapped at any virtual address of the process.

    virtual   layer 0 slab        layer 0 KV, slot 0, slot 1, ...       identity
              |p p p p|           |p p . . . .|p . . . . .|  ...        |0 1 2 ... num_pages - 1|
    p: a physical page, .: a hole (reads as zeros, is never written)

A `VirtualRange` is reserved once and keeps its address for the life of the arena; mapping changes
only what lies behind it. The identity range maps every page once, in order, for ever: transfers
address (page, offset) through it. Source: paper mechanism 3; rules of holes: links.md, rule 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kunserve.core.errors import KunserveError


class ArenaError(KunserveError):
    """The arena was asked for something that its mappings do not allow: a defect of the caller."""


class ArenaUnavailableError(ArenaError):
    """This build or this machine has no such backend."""


class ArenaOutOfMemoryError(ArenaError):
    """Physical memory or address space is not there. Nothing was changed."""


class MappingLimitError(ArenaError):
    """The call would leave more mappings than the system allows. Nothing was changed."""


class WorkInFlightError(ArenaError):
    """Pages may not be unmapped while work on them has not ended. Nothing was changed."""


class PageSpan(Protocol):
    """Contiguous physical pages [start, start + count); `kunserve.policy.pages.PageRun` is one."""

    @property
    def start(self) -> int: ...

    @property
    def count(self) -> int: ...


class CompletionToken(Protocol):
    """Work on pages that must end before they are unmapped (a step, a transfer)."""

    def done(self) -> bool:
        """True once no part of the work can touch the pages any more."""
        ...

    def wait(self) -> None:
        """Block until done. The arena never calls it: who unmaps decides where to wait."""
        ...


@dataclass(frozen=True)
class VirtualRange:
    """Reserved virtual addresses [address, address + nbytes), counted in pages from its start."""

    address: int
    num_pages: int
    page_bytes: int

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.num_pages * self.page_bytes

    def page_address(self, page_offset: int) -> int:
        """Address of the page that lies `page_offset` pages into the range."""
        return self.address + page_offset * self.page_bytes


@dataclass(frozen=True)
class MappedRun:
    """Pages [offset, offset + count) of a range show physical pages [start, start + count)."""

    offset: int
    start: int
    count: int

    @property
    def stop(self) -> int:
        """First page of the range after the run."""
        return self.offset + self.count


def merge_runs(runs: Iterable[MappedRun]) -> list[MappedRun]:
    """`runs`, ordered by offset, without empty ones and each as long as it can be."""
    merged: list[MappedRun] = []
    for run in runs:
        if run.count <= 0:
            continue
        last = merged[-1] if merged else None
        if last and last.stop == run.offset and last.start + last.count == run.start:
            merged[-1] = MappedRun(last.offset, last.start, last.count + run.count)
        else:
            merged.append(run)
    return merged


class Arena(Protocol):
    """Physical memory of one instance. All sizes in pages of `page_bytes`, unless named bytes.

    Calls come from one thread at a time; reads and writes of mapped memory from any. Every method
    raises ArenaError after `close`.
    """

    name: str
    page_bytes: int
    num_pages: int
    identity: VirtualRange
    moves_page_tables: bool
    """Whether `remap` keeps pages present: no fault at the target for what was touched at the
    source. Where it is False, they fault on first touch, as after `map`."""

    @property
    def mapping_count(self) -> int:
        """Kernel mappings that the arena uses now; 0 where the device has no such limit."""
        ...

    @property
    def mapping_limit(self) -> int:
        """The most that `mapping_count` may become."""
        ...

    def reserve(self, nbytes: int) -> VirtualRange:
        """Reserve at least `nbytes` of addresses, in whole pages, as one hole.

        Raises:
            ArenaOutOfMemoryError: no such stretch of address space.
            MappingLimitError: see the class.
        """
        ...

    def map(
        self, target: VirtualRange, page_offset: int, runs: PageSpan | Sequence[PageSpan]
    ) -> None:
        """Show `runs`, one after the other, from page `page_offset` of `target` on. One driver
        call per run; runs that continue each other are one.

        Raises:
            ArenaError: the pages of the range are not all holes, or a run has no such pages.
            ArenaOutOfMemoryError: the driver refused; the range is holes again.
            MappingLimitError: see the class.
        """
        ...

    def unmap(
        self,
        source: VirtualRange,
        page_offset: int,
        count: int,
        after: CompletionToken | None = None,
    ) -> None:
        """Put the hole back over `count` mapped pages. Their bytes stay in the physical pages.

        Raises:
            WorkInFlightError: `after` is not done yet; wait for it first.
            ArenaError: the pages are not all mapped.
            MappingLimitError: a hole inside a run splits it: this can cost mappings, too.
        """
        ...

    def remap(
        self,
        source: VirtualRange,
        source_offset: int,
        target: VirtualRange,
        target_offset: int,
        count: int,
        after: CompletionToken | None = None,
    ) -> None:
        """Move `count` mapped pages to holes of `target`, in order, without a copy. Several runs
        may be moved at once.

        Raises:
            WorkInFlightError, ArenaError, ArenaOutOfMemoryError, MappingLimitError: as `unmap` and
                `map`. The source is unchanged then.
        """
        ...

    def mapped_runs(
        self, source: VirtualRange, page_offset: int = 0, count: int | None = None
    ) -> tuple[MappedRun, ...]:
        """What pages [page_offset, page_offset + count) of `source` show, in order, holes left
        out, runs as long as they can be. `count` None: to the end of the range."""
        ...

    def page_address(self, page: int, offset_bytes: int = 0) -> int:
        """Address of byte `offset_bytes` of physical `page` in the identity range."""
        ...

    def view(self, address: int, nbytes: int) -> NDArray[np.uint8]:
        """The bytes at `address` as an array, without a copy. It must not outlive the arena.

        Raises:
            ArenaError: [address, address + nbytes) is not inside one range of the arena.
        """
        ...

    def poison(self, run: PageSpan) -> None:
        """Fill physical pages with 0xFF: NaN in every float format."""
        ...

    def close(self) -> None:
        """Give back all memory and addresses. May be called twice."""
        ...

    def __enter__(self) -> Arena: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
