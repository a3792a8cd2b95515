"""What a member asks its world to do, in order (design section 2). Plain values.

    for action in member.turn(now_ns):
        world.perform(action)

The world answers later: `Member.computed`, `Member.pulled`, `Member.part_ready`,
`Member.copied`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kunserve.core.ids import BlockId, Epoch, GroupId, HostBlock, InstanceId, TransitionId
from kunserve.core.layout import LayerRange, Part
from kunserve.core.step import BlockMove, Chunk, StepPlan, StepResult
from kunserve.core.transition import PeerAddress, PeerMessage

Payload = Any
"""Hidden rows, as the world has them: the member only hands them on."""


@dataclass(frozen=True)
class SendFront:
    """Send a message to the front."""

    message: Any


@dataclass(frozen=True)
class SendPeer:
    """Send a message to another instance, with hidden rows or without."""

    target: InstanceId
    message: PeerMessage
    payload: Payload = None


@dataclass(frozen=True)
class RunFirst:
    """The leader's moves, embedding and layers; in a group of one stage, the whole step."""

    plan: StepPlan


@dataclass(frozen=True)
class RunStage:
    """A later stage's moves and layers. `fence`: see `StageInput`."""

    group: GroupId
    epoch: Epoch
    step: int
    chunks: tuple[Chunk, ...]
    moves: tuple[BlockMove, ...]
    payload: Payload
    fence: TransitionId = TransitionId(-1)


@dataclass(frozen=True)
class RunHead:
    """The leader's head and sampling, on rows that came around the ring."""

    plan: StepPlan
    payload: Payload


Work = RunFirst | RunStage | RunHead


@dataclass(frozen=True)
class Compute:
    """Start one piece of work. The last one has been answered by `Member.computed`."""

    work: Work


@dataclass(frozen=True)
class CancelCompute:
    """Cancel the work under way between layers; it is answered as soon as that is so."""


@dataclass(frozen=True)
class Configure:
    """Compute other layers from now on; no work is under way."""

    layers: LayerRange


@dataclass(frozen=True)
class PageCopy:
    """Blocks [first_block, first_block + num_blocks) of a physical page here, from one of the peer
    where they begin `shift_blocks` later."""

    local_page: int
    remote_page: int
    first_block: int
    num_blocks: int
    shift_blocks: int = 0

    @property
    def remote_first_block(self) -> int:
        """The first block at the peer."""
        return self.first_block + self.shift_blocks


@dataclass(frozen=True)
class Pull:
    """Copy pages of a peer; answered by `Member.pulled`. Weights yield to KV."""

    transfer: int
    peer: InstanceId
    copies: tuple[PageCopy, ...]
    is_weights: bool = False


@dataclass(frozen=True)
class CancelPulls:
    """Pulls not begun end with an error at once; those begun end when no byte is written any
    more."""


@dataclass(frozen=True)
class LoadPart:
    """Read a part from the file into its slab; answered by `Member.part_ready`."""

    transfer: int
    part: Part


@dataclass(frozen=True)
class CheckPart:
    """Compare the checksum of a part that was pulled; answered by `Member.part_ready`."""

    transfer: int
    part: Part


@dataclass(frozen=True)
class CopyKv:
    """Copy KV of `blocks`, one by one and in every layer, to `host_blocks`, or without `to_host`
    from there; answered by `Member.copied`. Beside the work under way, which uses other blocks."""

    transfer: int
    to_host: bool
    blocks: tuple[BlockId, ...]
    host_blocks: tuple[HostBlock, ...]


@dataclass(frozen=True)
class Connect:
    """Open links to these instances, close those to all others."""

    peers: tuple[PeerAddress, ...]


Action = (
    SendFront
    | SendPeer
    | Compute
    | CancelCompute
    | Configure
    | Pull
    | CancelPulls
    | LoadPart
    | CheckPart
    | CopyKv
    | Connect
)


@dataclass(frozen=True)
class Computed:
    """The answer to `Compute`. `result`: a finished or cancelled step; `payload`: rows for the next
    stage. A later stage that was cancelled has neither."""

    work: Work
    result: StepResult | None = None
    payload: Payload = None
