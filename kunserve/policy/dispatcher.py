"""Dispatch by memory load, after Llumnix (paper, mechanism 9): the group with the most free
KVCache after its queued demand. Prefix affinity breaks ties, never more: a warm cache does not
outweigh a queue."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from kunserve.core.ids import GroupId

TIE_FRACTION = 0.02
"""Groups whose free memory differs by less than this share of the capacity count as equal."""


@dataclass(frozen=True)
class GroupSnapshot:
    """A group as dispatch sees it. `free_blocks` can be had now, by eviction too; `queued_blocks`
    includes leases that are still on the way."""

    group: GroupId
    total_blocks: int
    free_blocks: int
    queued_blocks: int
    num_requests: int
    prefix_blocks: int

    @property
    def headroom_blocks(self) -> int:
        """Free KVCache after queued demand. Negative under overload."""
        return self.free_blocks - self.queued_blocks


def choose_group(groups: Sequence[GroupSnapshot], needed_blocks: int) -> GroupId:
    """Pick the group for a request that needs `needed_blocks` now.

    Among the groups within a margin of the most headroom: the longest cached prefix, then the
    fewest requests, then the lowest id. The margin is a small share of the capacity; among groups
    that have room for the request now it is at least the request itself, so that the next one
    with the same prefix may follow it. `groups` must not be empty.
    """
    with_room = [group for group in groups if group.headroom_blocks >= needed_blocks]
    candidates = with_room or groups
    best = max(group.headroom_blocks for group in candidates)
    least_margin = needed_blocks if with_room else 0
    ties = [
        group
        for group in candidates
        if best - group.headroom_blocks <= max(least_margin, int(group.total_blocks * TIE_FRACTION))
    ]
    chosen = min(ties, key=lambda g: (-g.prefix_blocks, g.num_requests, g.group))
    return chosen.group


class PrefixIndex:
    """Which block hashes were lately sent to a group: a guess at its prefix cache, LRU-bounded.

    The group's own cache decides; a wrong guess costs a recomputed prefix and nothing else.
    """

    def __init__(self, capacity_blocks: int) -> None:
        self._capacity = capacity_blocks
        self._hashes: OrderedDict[bytes, None] = OrderedDict()

    def prefix_blocks(self, hashes: Sequence[bytes]) -> int:
        """Length of the longest known prefix of a chain of block hashes."""
        for count, block_hash in enumerate(hashes):
            if block_hash not in self._hashes:
                return count
        return len(hashes)

    def insert(self, hashes: Sequence[bytes]) -> None:
        """Remember a chain, its first block last, so that ends are forgotten before heads."""
        for block_hash in reversed(hashes):
            self._hashes[block_hash] = None
            self._hashes.move_to_end(block_hash)
        while len(self._hashes) > self._capacity:
            self._hashes.popitem(last=False)
