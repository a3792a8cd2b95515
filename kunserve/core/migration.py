"""Messages of a live migration: a running request goes from one whole instance to another, and its
KV is copied while it still decodes (Llumnix, OSDI 2024, section 4.2).

    front  --OfferBlocks, StopRequest------------------>  source
    front  <-BlocksOffered (of what is full, then the rest)--  source
    front  --PullBlocks, ActivateRequest--------------->  target
    front  <-BlocksPulled-------------------------------  target
    front  --EndMigration-->  both;   target  --MigrationEnded-->  front

All are values that carry the id of the migration, which is never reused: what belongs to one that
is over is dropped by whoever gets it. Blocks have permanent names and each whole instance uses its
own slot, so a request gets other blocks at its target: what travels is where the bytes lie.

`WithdrawRequests` and `RequestsWithdrawn` are for requests that wait: without KV nothing is copied.
"""

from __future__ import annotations

from dataclasses import dataclass

from kunserve.core.ids import BlockId, Epoch, GroupId, InstanceId, MigrationId, RequestId
from kunserve.core.request import Request


@dataclass(frozen=True)
class SourcePage:
    """Where a range page of the source lies: `physical_pages[l]` is the page behind layer l."""

    page: int
    physical_pages: tuple[int, ...]


@dataclass(frozen=True)
class SourceBlocks:
    """Consecutive blocks of a request's table, from entry `first` on, and the pages they are in."""

    first: int
    blocks: tuple[BlockId, ...]
    pages: tuple[SourcePage, ...]

    @property
    def end(self) -> int:
        """One past the last entry."""
        return self.first + len(self.blocks)


# ---------------------------------------------------------------- front to members


@dataclass(frozen=True)
class OfferBlocks:
    """To the source: where the full blocks of a running request lie, from entry `first` of its
    table on. It runs on. From the first offer on the source says when it leaves the running set."""

    instance: InstanceId
    migration: MigrationId
    group: GroupId
    epoch: Epoch
    request_id: RequestId
    first: int


@dataclass(frozen=True)
class StopRequest:
    """To the source: as soon as no step computes it, the request leaves the running set and keeps
    its blocks. Its tokens are reported first, then what it holds from entry `first` on."""

    instance: InstanceId
    migration: MigrationId
    group: GroupId
    epoch: Epoch
    first: int


@dataclass(frozen=True)
class PullBlocks:
    """To the target: set blocks aside until there are `reserved_blocks` in all, and copy `blocks`
    of instance `source` into those of the same entries."""

    instance: InstanceId
    migration: MigrationId
    group: GroupId
    epoch: Epoch
    source: InstanceId
    reserved_blocks: int
    blocks: SourceBlocks


@dataclass(frozen=True)
class ActivateRequest:
    """To the target: the lease. The request runs on here, with all tokens that the client has seen
    and with the KV of the first `computed_tokens` of them."""

    instance: InstanceId
    migration: MigrationId
    group: GroupId
    epoch: Epoch
    request: Request
    computed_tokens: int


@dataclass(frozen=True)
class EndMigration:
    """It is over. At the source the request is forgotten if it `has_moved`, else it runs on. The
    target gives back what it has set aside for it, when nothing is written there any more."""

    instance: InstanceId
    migration: MigrationId
    group: GroupId
    epoch: Epoch
    has_moved: bool


@dataclass(frozen=True)
class WithdrawRequests:
    """To an instance whose queue finds no room: give waiting requests back, by arrival, that need
    no more than `room_blocks` in all; none of `keep`."""

    instance: InstanceId
    group: GroupId
    epoch: Epoch
    room_blocks: int
    keep: tuple[RequestId, ...] = ()


MigrationOrder = (
    OfferBlocks | StopRequest | PullBlocks | ActivateRequest | EndMigration | WithdrawRequests
)
"""What the front tells members for migrations."""


# ---------------------------------------------------------------- members to front


@dataclass(frozen=True)
class BlocksOffered:
    """The KV of the first `computed_tokens` known tokens is there; `blocks` hold it from the entry
    asked for on: the full ones, or with `is_stopped`, when the request runs no more, all."""

    instance: InstanceId
    incarnation: int
    migration: MigrationId
    computed_tokens: int
    blocks: SourceBlocks
    is_stopped: bool = False


@dataclass(frozen=True)
class BlocksPulled:
    """All blocks that were asked for are here. What the source has written over since counts
    nothing: it says so when it is asked next."""

    instance: InstanceId
    incarnation: int
    migration: MigrationId


@dataclass(frozen=True)
class MigrationRefused:
    """This instance does not, or no longer, take part; nothing has changed here."""

    instance: InstanceId
    incarnation: int
    migration: MigrationId
    reason: str


@dataclass(frozen=True)
class MigrationEnded:
    """No byte is written for it any more; what was set aside is given back or in use."""

    instance: InstanceId
    incarnation: int
    migration: MigrationId


@dataclass(frozen=True)
class RequestsWithdrawn:
    """These requests are forgotten here; all of their tokens were reported before."""

    instance: InstanceId
    incarnation: int
    group: GroupId
    epoch: Epoch
    request_ids: tuple[RequestId, ...]


MigrationReport = (
    BlocksOffered | BlocksPulled | MigrationRefused | MigrationEnded | RequestsWithdrawn
)


# ---------------------------------------------------------------- what a migration did


@dataclass(frozen=True)
class MigrationRecord:
    """One migration that is over, for log and metrics. `outcome` is "done" or "cancelled", then
    `reason` says why. `stages`: of copying, the last one with the request stopped for
    `stopped_ns`."""

    id: MigrationId
    request_id: RequestId
    source: InstanceId
    target: InstanceId
    outcome: str
    reason: str
    stages: int
    moved_blocks: int
    moved_bytes: int
    elapsed_ns: int
    stopped_ns: int
