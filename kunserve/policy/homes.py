"""Homes: which part of a merged group's KV each request moves to before the group is split again
(design section 3, restore 1-2).

A home is what one of the split's targets will hold. Requests are packed into homes first, blocks
counted as they will lie there: a block that two requests of one home share counts once, one that
is shared across homes once in each, and every request may grow by a block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from kunserve.core.errors import KunserveError
from kunserve.core.ids import BlockId

HomeOf = Callable[[BlockId], int | None]
"""The home in whose pages a block lies, or None."""


class CompactionRefusedError(KunserveError):
    """The group cannot be split now: its requests do not fit the homes, or pages are still on
    their way. Nothing has changed; try again when requests have ended."""


def assign_homes(
    tables: Sequence[Sequence[BlockId]], capacities: Sequence[int], home_of: HomeOf
) -> tuple[int, ...]:
    """A home for each block table: where most of its blocks lie already if that fits, else by
    first-fit-decreasing bin packing.

    Args:
        tables: block tables of all running requests.
        capacities: blocks of each home.
        home_of: where the blocks lie now.

    Raises:
        CompactionRefusedError: they do not fit.
    """
    try:
        return _pack(tables, capacities, [_main_home(table, home_of) for table in tables])
    except CompactionRefusedError:
        return _pack(tables, capacities, [0] * len(tables))


def _main_home(table: Sequence[BlockId], home_of: HomeOf) -> int:
    counts = Counter(home for block in table if (home := home_of(block)) is not None)
    return max(sorted(counts), key=counts.__getitem__, default=0)


def _pack(
    tables: Sequence[Sequence[BlockId]], capacities: Sequence[int], preferred: Sequence[int]
) -> tuple[int, ...]:
    """First fit from the preferred home on, largest table first."""
    contents: list[set[BlockId]] = [set() for _ in capacities]
    growth = [0] * len(capacities)
    assigned = [0] * len(tables)
    for index in sorted(range(len(tables)), key=lambda index: -len(tables[index])):
        table = set(tables[index])
        others = (home for home in range(len(capacities)) if home != preferred[index])
        for home in (preferred[index], *others):
            needed = len(contents[home] | table) + growth[home] + 1
            if needed <= capacities[home]:
                break
        else:
            raise CompactionRefusedError(
                f"a request with {len(table)} blocks fits none of the homes of "
                f"{', '.join(map(str, capacities))} blocks: "
                f"{', '.join(str(len(content)) for content in contents)} are taken"
            )
        contents[home] |= table
        growth[home] += 1
        assigned[index] = home
    return tuple(assigned)


class Compaction:
    """What has been copied where, while blocks move to their homes.

    A block that several requests of a home share is copied there once: who comes later takes the
    copy, as long as it is in use. Sources that are gone need no care, because only requests that
    held them from the start ask for their copy.
    """

    def __init__(self, num_homes: int) -> None:
        self.num_homes = num_homes
        self.moved_blocks = 0
        self._copies: dict[tuple[int, BlockId], BlockId] = {}
        self._origins: dict[BlockId, tuple[int, BlockId]] = {}

    def copy_of(self, home: int, source: BlockId) -> BlockId | None:
        """The block of `home` that has the content of `source`, if there is one."""
        return self._copies.get((home, source))

    def note_copy(self, home: int, source: BlockId, target: BlockId) -> None:
        """`target`, in use in `home`, has the content of `source`."""
        self._copies[home, source] = target
        self._origins[target] = (home, source)

    def forget(self, targets: Iterable[BlockId]) -> None:
        """These blocks lost their last reference."""
        for target in targets:
            origin = self._origins.pop(target, None)
            if origin is not None:
                del self._copies[origin]
