"""Host memory: one memfd whose pages are mapped with mmap(MAP_FIXED).

    memfd (physical)   | 0 | 1 | 2 | ... | num_pages - 1 |      file offset = page * page_bytes
    range (virtual)    | run of pages | hole | run | hole |guard|

A run is a MAP_SHARED mapping of the memfd; a hole is private anonymous memory without reserve, so
that a stray read gives zeros and not a signal (links.md, rule 1); the guard is one inaccessible
system page after each range, so that an overrun stops there and ranges never merge.

`remap` moves the kernel's page tables along with the pages (mremap with MREMAP_DONTUNMAP, Linux
5.13 for shared memory): what was touched at the source faults no more at the target. A fault is
5-20 us for 4 KiB, 20-30 ms for 64 MiB; moving the entries of 64 MiB takes 0.3 ms.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from kunserve.core.closing import Closing
from kunserve.device.arena.base import (
    ArenaError,
    ArenaOutOfMemoryError,
    ArenaUnavailableError,
    CompletionToken,
    MappedRun,
    MappingLimitError,
    PageSpan,
    VirtualRange,
    WorkInFlightError,
    merge_runs,
)

RESERVED_MAPPINGS = 8192
"""Of vm.max_map_count, left to everybody else: libraries, thread stacks, malloc, and the two
mappings more that one call may need on its way."""

logger = logging.getLogger(__name__)

_SYSTEM_PAGE_BYTES = mmap.PAGESIZE
_POISON_BYTE = 0xFF
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE

# What Python's mmap module lacks: Linux's values on x86 and Arm.
_NO_ACCESS = 0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value
_HOLE_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_MREMAP_MAYMOVE = 1
_MREMAP_FIXED = 2
_MREMAP_DONTUNMAP = 4

# ---------------------------------------------------------------- system calls

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_void_p,
]
_libc.munmap.restype = ctypes.c_int
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def _mmap(
    address: int | None, nbytes: int, protection: int, flags: int, fd: int = -1, offset: int = 0
) -> int:
    placed: int | None = _libc.mmap(address, nbytes, protection, flags, fd, offset)
    if placed is None or placed == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return placed


def _move_page_tables(source: int, target: int, nbytes: int) -> None:
    """Show at `target`, over what is there, the one mapping that `source` shows, with its page
    tables. The source stays mapped, with empty page tables: no other thread's memory can come to
    lie there, and a refusal in the middle of several moves takes nothing away from it."""
    flags = _MREMAP_MAYMOVE | _MREMAP_FIXED | _MREMAP_DONTUNMAP
    placed: int | None = _libc.mremap(source, nbytes, nbytes, flags, target)
    if placed is None or placed == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _munmap(address: int, nbytes: int) -> None:
    if _libc.munmap(address, nbytes):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


# ---------------------------------------------------------------- what the system allows


def default_mapping_limit() -> int:
    """vm.max_map_count less RESERVED_MAPPINGS, at least half of it."""
    allowed = int(Path("/proc/sys/vm/max_map_count").read_text())
    return max(allowed - RESERVED_MAPPINGS, allowed // 2)


def available_memory_bytes() -> int:
    """What the machine and our control group can still give before the kernel kills somebody."""
    available_bytes = _fields(Path("/proc/meminfo"))["MemAvailable:"] * 1024
    groups = Path("/proc/self/cgroup")  # not there on a kernel without control groups
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, group = line.split(":", 2)
        for folder in {group, "/"}:  # in a container, our own group may be seen as the root
            if controllers == "":
                headroom_bytes = _headroom_bytes(folder, "", "memory.max", "memory.current")
            elif "memory" in controllers.split(","):
                headroom_bytes = _headroom_bytes(
                    folder, "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
                )
            else:
                continue
            if headroom_bytes is not None:
                available_bytes = min(available_bytes, headroom_bytes)
    return available_bytes


def _headroom_bytes(group: str, controller: str, limit: str, usage: str) -> int | None:
    """What a control group's limit leaves; None where it has none."""
    folder = Path("/sys/fs/cgroup", controller, group.lstrip("/"))
    try:
        limit_bytes = int((folder / limit).read_text())
        used_bytes = int((folder / usage).read_text())
        cache_bytes = _fields(folder / "memory.stat").get("inactive_file", 0)
    except (OSError, ValueError):  # no such group, or its limit is "max"
        return None
    return limit_bytes - used_bytes + cache_bytes


def _fields(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines}


def _open_memory(nbytes: int) -> int:
    """A memfd of `nbytes`, all of them there: a page fault must never find memory gone."""
    available_bytes = available_memory_bytes()
    if nbytes > available_bytes:
        # The kernel would not refuse the memfd, it would kill a process.
        raise ArenaOutOfMemoryError(
            f"{nbytes} bytes of memory wanted, {available_bytes} available: lower the memory of "
            "each instance or their number"
        )
    fd = os.memfd_create("kunserve-arena", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.ENOMEM, errno.ENOSPC, errno.EFBIG):
            raise ArenaOutOfMemoryError(
                f"the system refused {nbytes} bytes of memory ({error.strerror}): lower the "
                "memory of each instance or their number"
            ) from error
        raise
    return fd


def _can_move_page_tables(fd: int) -> bool:
    """Whether `_move_page_tables` works here, tried on the first system page of `fd`."""
    source = _mmap(None, 2 * _SYSTEM_PAGE_BYTES, _NO_ACCESS, _HOLE_FLAGS)
    try:
        flags = mmap.MAP_SHARED | _MAP_FIXED
        _mmap(source, _SYSTEM_PAGE_BYTES, _READ_WRITE, flags, fd)
        _move_page_tables(source, source + _SYSTEM_PAGE_BYTES, _SYSTEM_PAGE_BYTES)
    except OSError as error:
        _say_it_faults(error.strerror)
        return False
    finally:
        _munmap(source, 2 * _SYSTEM_PAGE_BYTES)
    return True


@cache
def _say_it_faults(reason: str | None) -> None:
    """Once per process."""
    logger.warning(
        "this kernel moves no page tables of shared memory (mremap: %s; Linux 5.13 does): pages "
        "that change owner fault on first touch, 20-30 ms per 64 MiB",
        reason,
    )


# ---------------------------------------------------------------- model of the kernel's mappings


@dataclass(frozen=True)
class _Splice:
    """A change of a table: entries [low, high) become `runs`."""

    low: int
    high: int
    runs: tuple[MappedRun, ...]
    count_delta: int


class _MappingTable:
    """What each page of one range shows, and how many kernel mappings (VMAs) that takes.

    The kernel merges neighbours that continue each other in address and in file offset, and
    holes with holes: so do the entries here, and `count` is exact.

        runs      |0 1 2|     |7 8|3 4|   |9|        entries, sorted by offset
        range     0     3     6   8   10  12  13     7 mappings: 4 runs, 3 holes
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.count = 1
        self._offsets: list[int] = []
        self._runs: list[MappedRun] = []

    def runs(self, offset: int, count: int) -> tuple[MappedRun, ...]:
        """Entries inside [offset, offset + count), cut at its ends."""
        stop = offset + count
        low = max(0, bisect_right(self._offsets, offset) - 1)
        high = bisect_left(self._offsets, stop)
        cut = (_cut(run, offset, stop) for run in self._runs[low:high])
        return tuple(run for run in cut if run.count > 0)

    def plan(self, offset: int, count: int, shown: Iterable[MappedRun]) -> _Splice:
        """The change that makes [offset, offset + count) show `shown` and holes otherwise."""
        stop = offset + count
        # Neighbours that end or begin exactly at the edges take part: they may merge.
        low = bisect_left(self._offsets, offset)
        if low > 0 and self._runs[low - 1].stop >= offset:
            low -= 1
        high = bisect_right(self._offsets, stop)
        window = self._runs[low:high]
        before = [_cut(run, 0, offset) for run in window]
        behind = [_cut(run, stop, self.num_pages) for run in window]
        runs = merge_runs([*before, *shown, *behind])
        left = self._runs[low - 1].stop if low > 0 else 0
        right = self._offsets[high] if high < len(self._offsets) else self.num_pages
        delta = _count(runs, left, right) - _count(window, left, right)
        return _Splice(low, high, tuple(runs), delta)

    def apply(self, splice: _Splice) -> None:
        """Carry out a change planned on the table as it is now."""
        self._runs[splice.low : splice.high] = splice.runs
        self._offsets[splice.low : splice.high] = [run.offset for run in splice.runs]
        self.count += splice.count_delta


def _cut(run: MappedRun, offset: int, stop: int) -> MappedRun:
    """`run` inside [offset, stop); its count is 0 or less when nothing is left."""
    first, last = max(run.offset, offset), min(run.stop, stop)
    return MappedRun(first, run.start + first - run.offset, last - first)


def _count(runs: Sequence[MappedRun], left: int, right: int) -> int:
    """Mappings in [left, right): the runs and the holes around them."""
    edges = [left, *(edge for run in runs for edge in (run.offset, run.stop)), right]
    holes = sum(edges[i] < edges[i + 1] for i in range(0, len(edges), 2))
    return len(runs) + holes


# ---------------------------------------------------------------- arena


class HostArena(Closing):
    """The `Arena` of host memory (Linux). See `kunserve.device.arena.base` for the methods.

    Args:
        page_bytes: a multiple of the system's page.
        num_pages: physical pages; all of the memory is taken at once.
        mapping_limit: the most mappings to use, None for `default_mapping_limit()`.

    Raises:
        ArenaUnavailableError: not a Linux system.
        ArenaOutOfMemoryError: the memory or the address space is not there.
        ArenaError: the sizes make no sense.
    """

    name = "host"

    def __init__(
        self, page_bytes: int, num_pages: int, *, mapping_limit: int | None = None
    ) -> None:
        if not sys.platform.startswith("linux"):
            raise ArenaUnavailableError(f"the host arena needs Linux, this is {sys.platform}")
        if num_pages <= 0 or page_bytes <= 0 or page_bytes % _SYSTEM_PAGE_BYTES:
            raise ArenaError(
                f"{num_pages} pages of {page_bytes} bytes: at least one page of a multiple of "
                f"{_SYSTEM_PAGE_BYTES} bytes is needed"
            )
        self.page_bytes = page_bytes
        self.num_pages = num_pages
        self._limit = default_mapping_limit() if mapping_limit is None else mapping_limit
        self._tables: dict[VirtualRange, _MappingTable] = {}
        self._count = 0
        self.moves_page_tables = False
        self._fd = _open_memory(num_pages * page_bytes)
        try:
            self.identity = self.reserve(num_pages * page_bytes)
            self._show(self.identity, [MappedRun(0, 0, num_pages)])
            self.moves_page_tables = _can_move_page_tables(self._fd)
        except BaseException:
            self.close()
            raise

    # -- Arena

    @property
    def mapping_count(self) -> int:
        return self._count

    @property
    def mapping_limit(self) -> int:
        return self._limit

    def reserve(self, nbytes: int) -> VirtualRange:
        self._check_open()
        if nbytes <= 0:
            raise ArenaError(f"cannot reserve {nbytes} bytes")
        num_pages = -(-nbytes // self.page_bytes)
        range_bytes = num_pages * self.page_bytes
        self._check_limit(2)  # the hole and the guard
        try:
            address = _mmap(None, range_bytes + _SYSTEM_PAGE_BYTES, _NO_ACCESS, _HOLE_FLAGS)
        except OSError as error:
            _refuse_addresses(range_bytes, error)
        try:
            _mmap(address, range_bytes, _READ_WRITE, _HOLE_FLAGS | _MAP_FIXED)
        except OSError as error:
            _munmap(address, range_bytes + _SYSTEM_PAGE_BYTES)
            _refuse_addresses(range_bytes, error)
        reserved = VirtualRange(address, num_pages, self.page_bytes)
        self._tables[reserved] = _MappingTable(num_pages)
        self._count += 2
        return reserved

    def map(
        self, target: VirtualRange, page_offset: int, runs: PageSpan | Sequence[PageSpan]
    ) -> None:
        self._check_changeable(target)
        spans = runs if isinstance(runs, Sequence) else (runs,)
        shown: list[MappedRun] = []
        at = page_offset
        for span in spans:
            self._check_pages(span)
            shown.append(MappedRun(at, span.start, span.count))
            at += span.count
        if shown:
            self._check_holes(target, page_offset, at - page_offset)
            self._show(target, merge_runs(shown))

    def unmap(
        self,
        source: VirtualRange,
        page_offset: int,
        count: int,
        after: CompletionToken | None = None,
    ) -> None:
        self._check_changeable(source)
        self._check_done(after)
        self._check_mapped(source, page_offset, count)
        splice = self._tables[source].plan(page_offset, count, ())
        self._check_limit(splice.count_delta)
        self._put_hole(source, page_offset, count)
        self._apply(source, splice)

    def remap(
        self,
        source: VirtualRange,
        source_offset: int,
        target: VirtualRange,
        target_offset: int,
        count: int,
        after: CompletionToken | None = None,
    ) -> None:
        self._check_changeable(source)
        self._check_changeable(target)
        self._check_done(after)
        self._check_mapped(source, source_offset, count)
        self._check_holes(target, target_offset, count)
        gap = target_offset - source_offset
        moved = [
            MappedRun(run.offset + gap, run.start, run.count)
            for run in self.mapped_runs(source, source_offset, count)
        ]
        # The target comes first, so that a refusal leaves the source as it was. For that moment
        # both show the pages; the most that the second half can add is 2 (a hole inside a run).
        from_address = source.page_address(source_offset) if self.moves_page_tables else None
        self._show(target, moved, from_address, spare=2)
        splice = self._tables[source].plan(source_offset, count, ())
        self._put_hole(source, source_offset, count)
        self._apply(source, splice)

    def mapped_runs(
        self, source: VirtualRange, page_offset: int = 0, count: int | None = None
    ) -> tuple[MappedRun, ...]:
        self._check_open()
        table = self._table(source)
        count = table.num_pages - page_offset if count is None else count
        self._check_inside(source, page_offset, count)
        return table.runs(page_offset, count)

    def page_address(self, page: int, offset_bytes: int = 0) -> int:
        if not 0 <= page < self.num_pages or not 0 <= offset_bytes < self.page_bytes:
            raise ArenaError(
                f"no byte {offset_bytes} of page {page} among {self.num_pages} pages of "
                f"{self.page_bytes} bytes"
            )
        return self.identity.page_address(page) + offset_bytes

    def view(self, address: int, nbytes: int) -> NDArray[np.uint8]:
        self._check_open()
        if not any(
            reserved.address <= address and address + nbytes <= reserved.address + reserved.nbytes
            for reserved in self._tables
        ):
            raise ArenaError(f"{nbytes} bytes at {address:#x} are not inside one range")
        memory = memoryview((ctypes.c_uint8 * nbytes).from_address(address))
        return np.frombuffer(memory, dtype=np.uint8)

    def poison(self, run: PageSpan) -> None:
        self._check_open()
        self._check_pages(run)
        ctypes.memset(self.page_address(run.start), _POISON_BYTE, run.count * self.page_bytes)

    def close(self) -> None:
        for reserved in self._tables:
            _munmap(reserved.address, reserved.nbytes + _SYSTEM_PAGE_BYTES)
        self._tables.clear()
        self._count = 0
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # -- driver

    def _show(
        self,
        target: VirtualRange,
        shown: Sequence[MappedRun],
        from_address: int | None = None,
        spare: int = 0,
    ) -> None:
        """Map `shown`, which lie one after the other over a hole: all of them or none.

        Args:
            spare: mappings that must be left under the limit afterwards.
            from_address: where the same runs are mapped one after the other, if their page tables
                shall come from there; they stay mapped there.
        """
        first, count = shown[0].offset, shown[-1].stop - shown[0].offset
        splice = self._tables[target].plan(first, count, shown)
        self._check_limit(splice.count_delta + spare)
        try:
            for run in shown:
                address, nbytes = target.page_address(run.offset), run.count * self.page_bytes
                if from_address is not None:
                    # One run is one mapping, here and there: more than one mremap cannot move.
                    run_address = from_address + (run.offset - first) * self.page_bytes
                    _move_page_tables(run_address, address, nbytes)
                else:
                    flags = mmap.MAP_SHARED | _MAP_FIXED
                    file_offset = run.start * self.page_bytes
                    _mmap(address, nbytes, _READ_WRITE, flags, self._fd, file_offset)
        except OSError as error:
            self._put_hole(target, first, count)
            raise ArenaOutOfMemoryError(
                f"the system refused to map {count} pages ({error.strerror}) at "
                f"{self._count} of {self._limit} mappings"
            ) from error
        self._apply(target, splice)

    def _put_hole(self, source: VirtualRange, page_offset: int, count: int) -> None:
        _mmap(
            source.page_address(page_offset),
            count * self.page_bytes,
            _READ_WRITE,
            _HOLE_FLAGS | _MAP_FIXED,
        )

    def _apply(self, source: VirtualRange, splice: _Splice) -> None:
        self._tables[source].apply(splice)
        self._count += splice.count_delta

    # -- checks

    def _check_open(self) -> None:
        if self._fd < 0:
            raise ArenaError("the arena is closed")

    def _table(self, source: VirtualRange) -> _MappingTable:
        table = self._tables.get(source)
        if table is None:
            raise ArenaError(f"{source} was not reserved here")
        return table

    def _check_changeable(self, source: VirtualRange) -> None:
        self._check_open()
        self._table(source)
        if source == self.identity:
            raise ArenaError("the identity range never changes")

    def _check_inside(self, source: VirtualRange, page_offset: int, count: int) -> None:
        if page_offset < 0 or count <= 0 or page_offset + count > source.num_pages:
            raise ArenaError(
                f"pages [{page_offset}, {page_offset + count}) are not inside a range of "
                f"{source.num_pages} pages"
            )

    def _check_pages(self, run: PageSpan) -> None:
        if run.start < 0 or run.count <= 0 or run.start + run.count > self.num_pages:
            raise ArenaError(f"{run} is not inside 0..{self.num_pages}")

    def _check_holes(self, target: VirtualRange, page_offset: int, count: int) -> None:
        self._check_inside(target, page_offset, count)
        shown = self._tables[target].runs(page_offset, count)
        if shown:
            raise ArenaError(f"{shown[0]} is already mapped: unmap it first")

    def _check_mapped(self, source: VirtualRange, page_offset: int, count: int) -> None:
        self._check_inside(source, page_offset, count)
        mapped = sum(run.count for run in self._tables[source].runs(page_offset, count))
        if mapped != count:
            raise ArenaError(
                f"only {mapped} of {count} pages from page {page_offset} on are mapped"
            )

    def _check_done(self, after: CompletionToken | None) -> None:
        if after is not None and not after.done():
            raise WorkInFlightError("work on these pages has not ended: wait for it, then unmap")

    def _check_limit(self, added: int) -> None:
        if added > 0 and self._count + added > self._limit:
            raise MappingLimitError(
                f"{self._count} mappings in use, {added} more would pass the limit of "
                f"{self._limit}: raise vm.max_map_count or use bigger pages"
            )


def _refuse_addresses(nbytes: int, error: OSError) -> NoReturn:
    raise ArenaOutOfMemoryError(
        f"no {nbytes} bytes of address space ({error.strerror}): look at ulimit -v and "
        "vm.overcommit_memory (2 forbids reservations)"
    ) from error
