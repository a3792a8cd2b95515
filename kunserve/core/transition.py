"""Messages of a transition between layouts (design section 4), and what travels on a group's ring.

    front  --Compact-Prepare-Gather-Fence-Remap-Adopt-Finish-->  members
    front  <-Compacted-Prepared-Gathered-Fenced-Remapped-Adopted-MoveProgress-Finished--  members
    member --PagesPulled--> source of the pages, leader of the group          (exchange)
    stage  --StageInput--> next stage,  last stage --StageOutput--> leader    (ring)

All are values. Those of a transition carry its id, which is never reused: what was meant for one
that is over is dropped by whoever gets it. Page numbers: see `kunserve.core.memory`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kunserve.core.ids import BlockId, Epoch, GroupId, InstanceId, RequestId, TransitionId
from kunserve.core.layout import Group, Part
from kunserve.core.memory import KvExtent, PageRun, PartRuns
from kunserve.core.request import Request
from kunserve.core.step import BlockMove, Chunk

# ---------------------------------------------------------------- requests as values


@dataclass(frozen=True)
class FrozenRequest:
    """A leased request as a frozen scheduler holds it. Waiting ones hold no block.

    The KV of the first `computed_tokens` known tokens lies in `block_table`, which may be longer.
    `home`: index of the home that compaction gave it, or None.
    """

    request_id: RequestId
    computed_tokens: int
    block_table: tuple[BlockId, ...]
    home: int | None = None


@dataclass(frozen=True)
class AdoptedRequest:
    """A request as a new leader takes it over: with all tokens that the client has seen."""

    request: Request
    computed_tokens: int
    block_table: tuple[BlockId, ...]


@dataclass(frozen=True)
class Home:
    """Where the requests of one target group may keep blocks during a restore: range pages of the
    slots of that group's members."""

    pages: tuple[PageRun, ...]


# ---------------------------------------------------------------- moves


@dataclass(frozen=True)
class PageMove:
    """KV of one range page, for `layers`, from the physical pages of `source`.

    `physical_pages[i]` holds layer `layers[i]` there. Bit b of `block_mask`: block b of the page is
    copied; the others have no content worth it. `number` is unique within a transition.
    """

    number: int
    page: int
    layers: tuple[int, ...]
    source: InstanceId
    target: InstanceId
    physical_pages: tuple[int, ...]
    block_mask: int


@dataclass(frozen=True)
class PartSource:
    """A part to bring in: from a peer's physical pages, or from the file when `peer` is None."""

    part: Part
    peer: InstanceId | None
    runs: tuple[PageRun, ...] = ()


@dataclass(frozen=True)
class LayerPages:
    """Range pages of one layer."""

    layer: int
    runs: tuple[PageRun, ...]


# ---------------------------------------------------------------- front to members


@dataclass(frozen=True)
class Compact:
    """To the leader, first of a split: from now on every request has a home, new blocks come from
    its pages, and blocks elsewhere move there step by step (`StepPlan.moves`).

    Refused when the running requests do not fit their homes.
    """

    instance: InstanceId
    transition: TransitionId
    group: GroupId
    epoch: Epoch
    homes: tuple[Home, ...]


@dataclass(frozen=True)
class Prepare:
    """Vote: links to `peers` are up and quarantine is empty. Before the vote, with `keep`, KV pages
    outside of it are given up (compaction has emptied them), then `gains` are brought in."""

    instance: InstanceId
    transition: TransitionId
    peers: tuple[InstanceId, ...]
    gains: tuple[PartSource, ...] = ()
    keep: tuple[PageRun, ...] | None = None


@dataclass(frozen=True)
class Gather:
    """To targets of a split: pull full blocks ahead, while their requests still decode. As much as
    free pages allow; the rest moves after COMMIT."""

    instance: InstanceId
    transition: TransitionId
    moves: tuple[PageMove, ...]


@dataclass(frozen=True)
class Snapshot:
    """To the leader of a split: name the requests and blocks of now, and watch from now on which
    blocks lose their content."""

    instance: InstanceId
    transition: TransitionId
    group: GroupId
    epoch: Epoch


@dataclass(frozen=True)
class Fence:
    """Stop computing at this epoch: cancel the step under way between layers, freeze, report."""

    instance: InstanceId
    transition: TransitionId
    group: GroupId
    epoch: Epoch


@dataclass(frozen=True)
class Remap:
    """COMMIT has happened: pages change owner. `group` is the new one, at its new epoch.

    Of each layer's KV, the pages `keep` stay (all others are given up), `fresh` range pages are
    mapped in every layer of this stage; parts that the stage does not need are dropped, before
    anything is mapped. `departures` (move numbers) leave when they are acknowledged; `escrow_pages`
    are set aside for arrivals.
    """

    instance: InstanceId
    transition: TransitionId
    group: Group
    keep: tuple[LayerPages, ...]
    fresh: tuple[PageRun, ...]
    escrow_pages: int
    departures: tuple[PageMove, ...]


@dataclass(frozen=True)
class Adopt:
    """To every member once all have remapped: the exchange runs, and the leader also schedules.

    `moves`: what this member pulls, in order of preference. For the leader: `requests` in order of
    arrival, `pages` that are backed by all members, `pending` (page, moves that must be pulled
    before it is complete), and `capacity_blocks` that the group will have when all is done.
    """

    instance: InstanceId
    transition: TransitionId
    group: GroupId
    epoch: Epoch
    moves: tuple[PageMove, ...]
    requests: tuple[AdoptedRequest, ...] = ()
    pages: tuple[PageRun, ...] = ()
    pending: tuple[tuple[int, int], ...] = ()
    capacity_blocks: int = 0


@dataclass(frozen=True)
class Finish:
    """The exchange is over: give the escrow back, map `fresh` range pages, check the books."""

    instance: InstanceId
    transition: TransitionId
    group: GroupId
    epoch: Epoch
    fresh: tuple[PageRun, ...]


@dataclass(frozen=True)
class Grow:
    """To the leader: these range pages are backed by all members now."""

    instance: InstanceId
    group: GroupId
    epoch: Epoch
    pages: tuple[PageRun, ...]


@dataclass(frozen=True)
class Abort:
    """Before COMMIT: nothing has changed. Unfreeze at the old epoch, give up incoming parts and
    gathered pages, map `restore_pages` again, which `Prepare.keep` gave up."""

    instance: InstanceId
    transition: TransitionId
    restore_pages: tuple[PageRun, ...]


@dataclass(frozen=True)
class Reset:
    """The group is broken: forget it, give all KV up, load what is missing of the model from the
    file, become a whole instance, say InstanceReady again. The incarnation stays."""

    instance: InstanceId
    incarnation: int


@dataclass(frozen=True)
class PeerAddress:
    """How the other instances reach one incarnation of an instance. `metadata` is its transfer
    agent's."""

    instance: InstanceId
    incarnation: int
    endpoint: str
    public_key: str
    metadata: bytes


@dataclass(frozen=True)
class Peers:
    """All instances that a member may talk to now; others are gone."""

    instance: InstanceId
    peers: tuple[PeerAddress, ...]


TransitionOrder = (
    Compact
    | Prepare
    | Snapshot
    | Gather
    | Fence
    | Remap
    | Adopt
    | Finish
    | Grow
    | Abort
    | Reset
    | Peers
)
"""What the front tells a member besides leases."""


# ---------------------------------------------------------------- members to front


@dataclass(frozen=True)
class Refused:
    """A member cannot take part; nothing has changed there. Before COMMIT only."""

    instance: InstanceId
    incarnation: int
    transition: TransitionId
    reason: str


@dataclass(frozen=True)
class Compacted:
    """Every block in use lies in its home; `used_pages` per home are in use."""

    instance: InstanceId
    incarnation: int
    transition: TransitionId
    used_pages: tuple[int, ...]
    moved_blocks: int


@dataclass(frozen=True)
class Prepared:
    """The vote is yes. Where parts and KV lie, for peers; pages nobody owns."""

    instance: InstanceId
    incarnation: int
    transition: TransitionId
    parts: tuple[PartRuns, ...]
    extents: tuple[KvExtent, ...] = ()
    gained_pages: int = 0
    gained_from_file: int = 0


@dataclass(frozen=True)
class Snapshotted:
    """What the leader's scheduler holds now, without stopping."""

    instance: InstanceId
    incarnation: int
    transition: TransitionId
    requests: tuple[FrozenRequest, ...]


@dataclass(frozen=True)
class Gathered:
    """Moves that were pulled ahead, by number."""

    instance: InstanceId
    incarnation: int
    transition: TransitionId
    moves: tuple[int, ...]
    moved_bytes: int


@dataclass(frozen=True)
class Fenced:
    """Nothing is computed here any more. From the leader: all requests, and the blocks that changed
    or lost their content since the snapshot. `extents`: where KV lies."""

    instance: InstanceId
    incarnation: int
    transition: TransitionId
    extents: tuple[KvExtent, ...]
    requests: tuple[FrozenRequest, ...] = ()
    touched: tuple[BlockId, ...] = ()


@dataclass(frozen=True)
class Aborted:
    """All is as it was before the transition."""

    instance: InstanceId
    incarnation: int
    transition: TransitionId


@dataclass(frozen=True)
class Remapped:
    """Pages have changed owner. `elapsed_ns`: of the memory calls alone. `parts`: held now."""

    instance: InstanceId
    incarnation: int
    transition: TransitionId
    parts: tuple[PartRuns, ...]
    elapsed_ns: int
    remapped_pages: int


@dataclass(frozen=True)
class Adopted:
    """The leader schedules; other members take part."""

    instance: InstanceId
    incarnation: int
    transition: TransitionId


@dataclass(frozen=True)
class MoveProgress:
    """How far this member's exchange is. Said when it gets on; complete when nothing is left to
    pull here and all departures are acknowledged. `link_bytes`: pulled since the start of the
    instance, unfinished moves included: a slow link is no dead one."""

    instance: InstanceId
    incarnation: int
    transition: TransitionId
    pulled_moves: int
    pulled_bytes: int
    is_complete: bool
    waits_for: InstanceId | None = None
    link_bytes: int = 0


@dataclass(frozen=True)
class Finished:
    """Books are in order here; `fresh` pages are mapped. From the leader: who was stalled by the
    exchange and for how long."""

    instance: InstanceId
    incarnation: int
    transition: TransitionId
    stalled: tuple[tuple[RequestId, int], ...] = ()
    activations: int = 0
    activation_p99_ns: int = 0
    free_pages: int = 0


TransitionReport = (
    Refused
    | Compacted
    | Prepared
    | Snapshotted
    | Gathered
    | Fenced
    | Aborted
    | Remapped
    | Adopted
    | MoveProgress
    | Finished
)


# ---------------------------------------------------------------- between members


@dataclass(frozen=True)
class PagesPulled:
    """The receiver has these moves: the source may give the pages up, the leader counts them.

    `digests`: of the bytes as they arrived, one per move, when accounting is checked; else empty.
    """

    sender: InstanceId
    transition: TransitionId
    moves: tuple[int, ...]
    pages: tuple[int, ...]
    digests: tuple[str, ...] = ()


@dataclass(frozen=True)
class StageInput:
    """A step on its way along the ring: hidden rows of all its tokens follow as payload.

    A step in flight is one credit of every link of the ring: the leader never has more steps in
    flight than stages, so no send can block.

    `fence`: the last transition that fenced the leader at this epoch. A fence cancels all work; if
    the transition is aborted, who has been through a later one drops what comes late of it.
    """

    sender: InstanceId
    group: GroupId
    epoch: Epoch
    step: int
    chunks: tuple[Chunk, ...]
    moves: tuple[BlockMove, ...]
    sent_ns: int = 0
    fence: TransitionId = TransitionId(-1)


@dataclass(frozen=True)
class StageOutput:
    """The end of the ring: hidden rows of the tokens that sample follow as payload."""

    sender: InstanceId
    group: GroupId
    epoch: Epoch
    step: int
    sent_ns: int = 0


PeerMessage = PagesPulled | StageInput | StageOutput


# ---------------------------------------------------------------- what a transition did


@dataclass(frozen=True)
class PhaseTime:
    """How long a transition was in one state."""

    name: str
    elapsed_ns: int


@dataclass(frozen=True)
class TransitionRecord:
    """One transition, for the log, metrics and whoever asked for it. Written at COMMIT, ABORTED or
    BROKEN, and again when it is over. `activation_p99_ns`: the slowest member's."""

    id: TransitionId
    kind: str
    why: str
    outcome: str
    reason: str
    sources: tuple[Group, ...]
    targets: tuple[Group, ...]
    phases: tuple[PhaseTime, ...] = ()
    freed_bytes: int = 0
    gained_bytes: int = 0
    gained_from_file_bytes: int = 0
    exchanged_bytes: int = 0
    gathered_bytes: int = 0
    remap_ns: int = 0
    moved_pages: int = 0
    requests: int = 0
    recomputed: int = 0
    stalled: tuple[tuple[RequestId, int], ...] = field(default=())
    activations: int = 0
    activation_p99_ns: int = 0
