"""Which running request moves where, and which queue is relieved: Llumnix's rules on what the front
knows (OSDI 2024, sections 4.3 and 4.4).

Llumnix gives every request a *virtual usage*: that of a running one is its memory, that of the
first in a queue is what it needs to start. An instance's *freeness* is

    (memory - sum of virtual usages) / running requests

the steps for which it can go on, in blocks per request here. A pair is formed of the instance of
least and the one of most freeness; the source gives its shortest requests away, as they cost least.
The same rule balances load and makes room for a head of queue that just does not fit.

Requests do not go to and fro: a move must leave the target with at least as much room as the source
has then, so each move brings the two closer and none can be undone by the same rule; and whoever
was moved is left alone for `REST_NS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kunserve.core.ids import GroupId, RequestId

CROWDED_SHARE = 0.7
"""An instance gives requests away only when so much of its memory is in (virtual) use: before,
balance wins nothing."""

IMBALANCE_SHARE = 0.2
"""So much of the memory must the rooms of two instances differ by, unless a head of queue waits."""

RESERVE_SHARE = 0.02
"""Of the memory of an instance that takes something in: for the growth of what it runs."""

LEAST_REMAINING_TOKENS = 8
"""A request that ends sooner than this is not worth a move."""

REST_NS = 5_000_000_000
"""A request that was moved is not moved again for so long, nor after a failure."""


@dataclass(frozen=True)
class InstanceRoom:
    """A whole instance as the rules see it, in blocks.

    `free_blocks` can be had now, less what is on its way there; negative when that is more.
    `head_blocks`: need of the first in its queue, 0 without; `queued_blocks`, of the whole queue.
    """

    group: GroupId
    total_blocks: int
    free_blocks: int
    head_blocks: int
    queued_blocks: int
    num_running: int

    @property
    def room_blocks(self) -> int:
        """Memory less the sum of virtual usages."""
        return self.free_blocks - self.head_blocks

    @property
    def spare_blocks(self) -> int:
        """What it can take in: room after its queue and a reserve."""
        reserve = int(RESERVE_SHARE * self.total_blocks) + 1
        return self.free_blocks - self.queued_blocks - reserve

    @property
    def freeness(self) -> float:
        """Blocks by which each running request may still grow."""
        return self.room_blocks / max(1, self.num_running)

    @property
    def is_blocked(self) -> bool:
        """The head of its queue finds no room."""
        return self.free_blocks < self.head_blocks

    @property
    def is_crowded(self) -> bool:
        """It may give requests away."""
        used = self.total_blocks - self.room_blocks
        return self.is_blocked or used >= CROWDED_SHARE * self.total_blocks


@dataclass(frozen=True)
class RunningRequest:
    """A request that may move: blocks of all its tokens now, and tokens that it may still get."""

    request_id: RequestId
    blocks: int
    remaining_tokens: int


@dataclass(frozen=True)
class Relief:
    """The queue of `group` may give back what needs no more than `room_blocks`."""

    group: GroupId
    room_blocks: int


def choose_relief(rooms: Sequence[InstanceRoom]) -> Relief | None:
    """The blocked queue with least room, if another instance can take something in right now.

    Nothing is taken to an instance that would only queue it: its spare room counts after its own
    queue.
    """
    blocked = [room for room in rooms if room.is_blocked]
    if not blocked:
        return None
    source = min(blocked, key=lambda room: (room.room_blocks, room.group))
    spare = max((r.spare_blocks for r in rooms if r is not source), default=0)
    return Relief(source.group, spare) if spare > 0 else None


def choose_pairs(rooms: Iterable[InstanceRoom]) -> list[tuple[InstanceRoom, InstanceRoom]]:
    """(source, target), the least free with the most free, then the next ones, as long as it
    pays."""
    ranked = sorted(rooms, key=lambda room: (room.freeness, room.group))
    pairs = []
    for index in range(len(ranked) // 2):
        source, target = ranked[index], ranked[-1 - index]
        if _pays(source, target):
            pairs.append((source, target))
    return pairs


def _pays(source: InstanceRoom, target: InstanceRoom) -> bool:
    if not source.is_crowded or target.spare_blocks <= 0:
        return False
    memory = min(source.total_blocks, target.total_blocks)
    needed = 1 if source.is_blocked else IMBALANCE_SHARE * memory
    return target.room_blocks - source.room_blocks >= needed


def choose_request(
    source: InstanceRoom, target: InstanceRoom, requests: Iterable[RunningRequest]
) -> RunningRequest | None:
    """The shortest request that helps, or None.

    It must fit the target, which has at least as much room as the source afterwards. When the head
    of the source's queue is blocked: the shortest that makes room for it, else, if several must go,
    the longest.
    """
    difference = target.room_blocks - source.room_blocks
    movable = sorted(
        (
            request
            for request in requests
            if request.remaining_tokens >= LEAST_REMAINING_TOKENS
            and 2 * request.blocks <= difference
            and request.blocks <= target.spare_blocks
        ),
        key=lambda request: (request.blocks, request.request_id),
    )
    if not movable:
        return None
    if not source.is_blocked:
        return movable[0]
    missing = source.head_blocks - source.free_blocks
    return next((request for request in movable if request.blocks >= missing), movable[-1])
