"""Host memory to which preempted requests are swapped (`--policy swap`, as InferCept and vLLM do).

A victim's KV is copied to host memory while other requests go on computing, and back before it
resumes, instead of being computed again:

    running --send_out--> leaving --finish--> swapped --bring_in--> coming --finish--> running
                          blocks              host blocks           blocks
                          + host blocks       (in the queue)        + host blocks

A request that is leaving or coming is in no plan, so that nothing writes what is copied out, and
nothing reads what is not all there yet. A block has one owner until the copy has ended: those of a
leaving request are free only then. So whoever needs room has to wait for a copy, unless the victim
went early enough:

    The scheduler swaps the latest arrival out as soon as the others' next `SWAP_AHEAD_TOKENS`
    tokens have no blocks: one for the step being formed, one for the step after it. The copy lasts
    less than a step, so that its blocks are free when they are needed.

    Nobody is admitted while a victim is leaving: the room is not for later arrivals. A swapped
    request comes back, in its turn by arrival, when one block is left for each running request, so
    for as many steps as a block has tokens it is not swapped out again.

A victim that does not fit the host memory is computed again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from kunserve.core.actions import CopyKv
from kunserve.core.errors import AccountingError
from kunserve.core.ids import BlockId, HostBlock, RequestId

SWAP_AHEAD_TOKENS = 2
"""Of each running request: for so many tokens there should be blocks, or a victim goes."""


@dataclass(frozen=True)
class SwapCopy:
    """A copy under way. `freed_blocks`: of the KVCache, when a request that leaves is out."""

    request_id: RequestId
    to_host: bool
    freed_blocks: int = 0


@dataclass(frozen=True)
class SwapCounts:
    """Totals. `copied_blocks` in both directions; `refused`: victims that did not fit."""

    swapped_out: int = 0
    swapped_in: int = 0
    copied_blocks: int = 0
    refused: int = 0


class SwapSpace:
    """Which request has which host blocks, and the copies under way. O(log blocks) per block.

    The lowest free blocks are taken first: memory is touched up to the most that was ever in use.

    Args:
        num_blocks: of host memory, each for all layers of one KV block; 0 for none.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._free = [HostBlock(index) for index in range(num_blocks)]  # a heap
        self._copies: dict[int, SwapCopy] = {}
        self._orders: list[CopyKv] = []
        self._next_transfer = 0
        self._swapped_out = 0
        self._swapped_in = 0
        self._copied_blocks = 0
        self._refused = 0

    # ------------------------------------------------------------ what the scheduler asks

    @property
    def is_used(self) -> bool:
        """False without host memory: all victims are computed again."""
        return self._num_blocks > 0

    @property
    def free_blocks(self) -> int:
        """Host blocks that nobody has."""
        return len(self._free)

    @property
    def is_copying(self) -> bool:
        """True while a request leaves or comes."""
        return bool(self._copies)

    @property
    def is_sending_out(self) -> bool:
        """True while a request leaves."""
        return any(copy.to_host for copy in self._copies.values())

    @property
    def freed_blocks(self) -> int:
        """Blocks of the KVCache that will be free when all who leave are out."""
        return sum(copy.freed_blocks for copy in self._copies.values())

    @property
    def counts(self) -> SwapCounts:
        """What was done so far."""
        return SwapCounts(self._swapped_out, self._swapped_in, self._copied_blocks, self._refused)

    # ------------------------------------------------------------ copies

    def send_out(
        self, request_id: RequestId, blocks: Sequence[BlockId], freed_blocks: int
    ) -> tuple[HostBlock, ...]:
        """Begin to copy `blocks` to host blocks, which are given back in their order.

        Raises:
            AccountingError: as many are not free; see `free_blocks`.
        """
        if len(blocks) > len(self._free):
            raise AccountingError(
                f"{len(blocks)} host blocks asked for, {len(self._free)} are free"
            )
        taken = tuple(heappop(self._free) for _ in blocks)
        self._begin(SwapCopy(request_id, True, freed_blocks), blocks, taken)
        return taken

    def bring_in(
        self, request_id: RequestId, blocks: Sequence[BlockId], host_blocks: Sequence[HostBlock]
    ) -> None:
        """Begin to copy `host_blocks` to `blocks`, one by one."""
        self._begin(SwapCopy(request_id, False), blocks, tuple(host_blocks))

    def _begin(
        self, copy: SwapCopy, blocks: Sequence[BlockId], host_blocks: tuple[HostBlock, ...]
    ) -> None:
        if not blocks or len(blocks) != len(host_blocks):
            raise AccountingError(
                f"{len(blocks)} blocks are copied, {len(host_blocks)} on the host"
            )
        transfer, self._next_transfer = self._next_transfer, self._next_transfer + 1
        self._copies[transfer] = copy
        self._orders.append(CopyKv(transfer, copy.to_host, tuple(blocks), host_blocks))
        self._copied_blocks += len(blocks)

    def take_orders(self) -> list[CopyKv]:
        """Copies begun since the last call, for the world to make."""
        orders, self._orders = self._orders, []
        return orders

    def finish(self, transfer: int) -> SwapCopy:
        """A copy has ended. What it was for has blocks and host blocks still.

        Raises:
            AccountingError: it is not under way.
        """
        copy = self._copies.pop(transfer, None)
        if copy is None:
            raise AccountingError(f"copy {transfer} has ended, but was not under way")
        if copy.to_host:
            self._swapped_out += 1
        else:
            self._swapped_in += 1
        return copy

    def refuse(self) -> None:
        """Count a victim that is computed again because it does not fit."""
        self._refused += 1

    def release(self, host_blocks: Iterable[HostBlock]) -> None:
        """Give host blocks back; no copy may be using them."""
        for block in host_blocks:
            heappush(self._free, block)

    # ------------------------------------------------------------ laws

    def check(
        self, holders: Iterable[Sequence[HostBlock]], swapping: Collection[RequestId]
    ) -> None:
        """Check that every host block is free or has one holder, and who is copied. O(blocks).

        Args:
            holders: the host blocks of each request.
            swapping: who is leaving or coming.

        Raises:
            AccountingError: a law is broken.
        """
        held = [block for blocks in holders for block in blocks]
        if sorted([*held, *self._free]) != list(range(self._num_blocks)):
            raise AccountingError("a host block has two holders, or none and is not free")
        if sorted(copy.request_id for copy in self._copies.values()) != sorted(swapping):
            raise AccountingError("a request is said to be swapped now, but is not, or otherwise")
