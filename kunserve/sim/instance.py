"""An instance process in virtual time: the production member, memory book and mover on toy leaves.

It drives `kunserve.policy.member` as `kunserve.runtime.instance` does. Only leaves differ: work is
done after the time that the cost model gives it, pulls after a random one, and messages go through
delaying links.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from random import Random
from typing import Any, Protocol

from kunserve.core.actions import (
    CancelCompute,
    CancelPulls,
    CheckPart,
    Compute,
    Computed,
    Configure,
    Connect,
    CopyKv,
    LoadPart,
    Pull,
    RunFirst,
    RunHead,
    SendFront,
    SendPeer,
    Work,
)
from kunserve.core.errors import AccountingError
from kunserve.core.events import GroupReport, Heartbeat, InstanceReady
from kunserve.core.ids import InstanceId, RequestId, SlotId
from kunserve.core.layout import Group, Part, PartKind
from kunserve.core.memory import PageRun, pages_of
from kunserve.core.migration import MigrationReport
from kunserve.core.step import StepResult
from kunserve.core.transition import PeerAddress, PeerMessage, TransitionReport
from kunserve.policy.cost_model import ChunkShape, CostModel
from kunserve.policy.member import Member, MemberConfig, MemberMessage
from kunserve.policy.memory import MemoryBook
from kunserve.policy.pages import MAX_SLOTS, MemoryPlan, PageGeometry, SlotMap
from kunserve.policy.scheduler import SchedulerConfig
from kunserve.sim.host_kv import SimHostKv
from kunserve.sim.memory import PhysicalPages, TableMapper
from kunserve.sim.pump import PullAnswer, Pump
from kunserve.sim.timeline import FOREVER_NS, MICROSECOND_NS, MILLISECOND_NS, SpanNs, Timeline
from kunserve.sim.toy_model import HEAD, ProcessKilledError, ToyExecutor

HEARTBEAT_INTERVAL_NS = 500 * MILLISECOND_NS
WAKE_NS = 20 * MICROSECOND_NS
"""From a message's arrival to the control thread's turn: what comes meanwhile shares the turn."""
BLOCK_BYTES = 64

DownMessage = MemberMessage
UpMessage = InstanceReady | GroupReport | Heartbeat | TransitionReport | MigrationReport


@dataclass(frozen=True)
class SimInstanceConfig:
    """What every instance of a world has.

    `kv_pages`: of its own slot, in each layer of a whole instance. `head_pages` 0: the embedding is
    the head. `spare_pages` belong to nobody. `digests`: what an exchange moves is compared.
    """

    scheduler: SchedulerConfig
    cost_model: CostModel
    num_layers: int
    kv_pages: int
    blocks_per_page: int
    layer_pages: int = 2
    embedding_pages: int = 3
    head_pages: int = 0
    spare_pages: int = 0
    window_pages: int | None = 64
    digests: bool = False

    @property
    def total_blocks(self) -> int:
        """KV blocks of a whole instance."""
        return self.kv_pages * self.blocks_per_page

    @property
    def part_pages(self) -> dict[Part, int]:
        """Pages of every part of the model, in its order."""
        pages = {Part(PartKind.EMBEDDING): self.embedding_pages}
        pages |= {Part(PartKind.LAYER, i): self.layer_pages for i in range(self.num_layers)}
        return pages | ({HEAD: self.head_pages} if self.head_pages else {})

    @property
    def memory_plan(self) -> MemoryPlan:
        """The split of a whole instance's memory."""
        parts = self.part_pages
        kv_pages = self.num_layers * self.kv_pages
        return MemoryPlan(
            geometry=PageGeometry(self.blocks_per_page * BLOCK_BYTES, BLOCK_BYTES),
            num_layers=self.num_layers,
            num_pages=sum(parts.values()) + kv_pages + self.spare_pages,
            part_pages=parts,
            held=tuple(parts),
            kv_pages_per_layer=self.kv_pages,
        )

    def slots(self, num_instances: int) -> SlotMap:
        """Names of blocks in a cluster of so many."""
        plan = self.memory_plan
        return SlotMap.for_domain(
            plan.geometry,
            num_slots=min(MAX_SLOTS, num_instances),
            num_layers=self.num_layers,
            member_pages=plan.num_pages,
        )


@dataclass(frozen=True)
class Spans:
    """How long transfers and reads of parts take, and the copy of one block to host memory."""

    pull: SpanNs
    part: SpanNs
    copy: SpanNs


class Network(Protocol):
    """What a process has of the world around it."""

    def send_front(self, message: UpMessage) -> None:
        """Post a message to the front."""
        ...

    def send_peer(self, target: PeerAddress, message: PeerMessage, payload: Any) -> None:
        """Post a message to another process; lost when that is gone."""
        ...

    def memory_of(self, peer: PeerAddress) -> PhysicalPages | None:
        """A living process's pages."""
        ...

    def end(self) -> None:
        """End this process, as a crash does."""
        ...


@dataclass
class _Flight:
    """Work under way: it ends at `end_ns` when `layers` layers are done."""

    work: Work
    begin_ns: int
    layer_ns: int
    layers: int
    num_layers: int

    @property
    def end_ns(self) -> int:
        return self.begin_ns + self.layers * self.layer_ns


class SimInstance:
    """One incarnation of an instance, from its start to its end.

    Args:
        num_instances: of the cluster: they are one partner domain.
        cost_factor: its steps last so many times what the cost model says.
        load_ns: how long it loads.
    """

    def __init__(
        self,
        instance: InstanceId,
        incarnation: int,
        config: SimInstanceConfig,
        timeline: Timeline,
        rng: Random,
        network: Network,
        spans: Spans,
        num_instances: int,
        cost_factor: float,
        load_ns: int,
    ) -> None:
        self.instance = instance
        self.incarnation = incarnation
        self.is_alive = True
        self.is_loading = True
        self.killed_by: RequestId | None = None
        """The request that ended this process."""
        self._config = config
        self._timeline = timeline
        self._rng = rng
        self._network = network
        self._spans = spans
        self._cost_model = config.cost_model.scaled(cost_factor)
        self._build(num_instances)
        self._inbox: list[DownMessage] = []
        self._peer_inbox: list[tuple[PeerMessage, Any]] = []
        self._computed: list[Computed] = []
        self._copied: list[int] = []
        self._pulled: list[PullAnswer] = []
        self._parts_ready: list[PullAnswer] = []
        self._parts_under_way = 0
        self._peers: dict[InstanceId, PeerAddress] = {}
        self._flight: _Flight | None = None
        self._slipped: RunHead | None = None
        self._is_woken = False
        self._execute_ns = 0
        self._layers_done = 0
        self._frozen_until_ns = 0
        self._stuck_since_ns = FOREVER_NS
        self._slow_until_ns = 0
        self._slow_factor = 1
        self._messages_left: int | None = None
        timeline.after(load_ns, partial(self._when_running, self._loaded))

    def _build(self, num_instances: int) -> None:
        config, plan = self._config, self._config.memory_plan
        size = config.scheduler.block_size
        self.pages = PhysicalPages(plan.num_pages, config.blocks_per_page, size)
        self._mapper = TableMapper(self.pages, config.num_layers)
        slot = SlotId(int(self.instance))
        slots = config.slots(num_instances)
        self.memory = MemoryBook(plan, slots, slot, self._mapper, poison=True)
        for part, pages in self._mapper.parts.items():
            self.pages.load(pages, part)
        self._checked_version = -1
        self._executor = ToyExecutor(self._mapper, config.num_layers, bool(config.head_pages))
        self.member = Member(
            MemberConfig(
                instance=self.instance,
                incarnation=self.incarnation,
                num_layers=config.num_layers,
                scheduler=config.scheduler,
                window_pages=config.window_pages,
            ),
            self._cost_model,
            self.memory,
            self._ready,
            self._digest if config.digests else None,
        )
        self._pump = Pump(
            self._timeline,
            self._rng,
            self.pages,
            self._pages_of_peer,
            self._take_pulled,
            self._spans.pull,
        )
        self._host_kv = SimHostKv(
            self._mapper, config.num_layers, self._timeline, self._rng, self._spans.copy
        )

    # ------------------------------------------------------------ what the world does to it

    def take(self, message: DownMessage) -> None:
        """A message of the front arrives; one that still loads reads it later."""
        if self.is_alive:
            self._inbox.append(message)
            self._wake()

    def take_peer(self, delivery: tuple[PeerMessage, Any]) -> None:
        """A message of another instance arrives."""
        if self.is_alive:
            self._peer_inbox.append(delivery)
            self._wake()

    def kill(self) -> None:
        """The process ends at once."""
        self.is_alive = False
        self._pump.close()

    def peer_died(self, instance: InstanceId) -> None:
        """Another process ended."""
        if self.is_alive:
            self._pump.peer_died(instance)

    def freeze(self, duration_ns: int) -> None:
        """Nothing of the process runs for a while; only its transfers go on."""
        until_ns = min(FOREVER_NS, self._timeline.now_ns + duration_ns)
        self._frozen_until_ns = max(self._frozen_until_ns, until_ns)

    def stick(self) -> None:
        """The compute thread gets no further, in this step or in the next one."""
        self._stuck_since_ns = min(self._stuck_since_ns, self._timeline.now_ns)

    def slow_down(self, duration_ns: int, factor: int) -> None:
        """Steps that start from now on last longer."""
        self._slow_until_ns = self._timeline.now_ns + duration_ns
        self._slow_factor = factor

    def end_after(self, messages: int) -> None:
        """The process ends by itself right after it has sent so many more messages."""
        self._messages_left = messages

    @property
    def pump(self) -> Pump:
        """Its transfers, for faults."""
        return self._pump

    # ------------------------------------------------------------ what the world sees

    @property
    def group(self) -> Group | None:
        """The group it works in."""
        return self.member.group

    @property
    def preemptions(self) -> int:
        """Preemptions of its scheduler so far."""
        return self.member.preemptions

    @property
    def swapped_in(self) -> int:
        """Requests that its scheduler has brought back from host memory so far."""
        return self.member.swapped_in

    def is_idle(self) -> bool:
        """No message is unread, no request leased, no step under way, no end foreseen."""
        has_end = self._messages_left is not None
        has_mail = self._inbox or self._peer_inbox
        return not (has_mail or self.member.has_work() or has_end or self.member.is_changing)

    def hung_until_ns(self) -> int:
        """Until when it makes no progress: 0 for one that never stood still."""
        is_stuck = self._stuck_since_ns < FOREVER_NS and self._flight is not None
        return FOREVER_NS if is_stuck else self._frozen_until_ns

    def troubled_until_ns(self) -> int:
        """Until when something keeps it from answering or moving pages in time."""
        if self._stuck_since_ns < FOREVER_NS:
            return FOREVER_NS
        return max(self._frozen_until_ns, self._slow_until_ns, self._pump.troubled_until_ns())

    def check(self) -> None:
        """Raise AccountingError unless pages, blocks and queues add up, and idle means empty."""
        self.member.check_steps()
        if self._checked_version != self._mapper.version:
            self._checked_version = self._mapper.version
            self.memory.check()
        held = self.member.referenced_blocks
        if held and not self.member.has_work():
            raise AccountingError(f"instance {self.instance} is idle and holds {held} blocks")

    # ------------------------------------------------------------ turns

    def _when_running(self, action: Callable[[], None]) -> None:
        """Run `action` now, after the freeze, or never if the process has ended."""
        if not self.is_alive:
            return
        if self._timeline.now_ns < self._frozen_until_ns:
            self._timeline.at(self._frozen_until_ns, partial(self._when_running, action))
        else:
            action()

    def _wake(self) -> None:
        if not self._is_woken and not self.is_loading:
            self._is_woken = True
            self._timeline.after(WAKE_NS, partial(self._when_running, self._turn))

    def _ready(self) -> InstanceReady:
        return InstanceReady(
            instance=self.instance,
            incarnation=self.incarnation,
            total_blocks=self._config.total_blocks,
            num_pages=self._config.memory_plan.num_pages,
            parts=self.memory.part_runs(),
            costs=astuple(self._cost_model),
            address=PeerAddress(self.instance, self.incarnation, "", "", b""),
        )

    def _loaded(self) -> None:
        self.is_loading = False
        self._send(self._ready())
        self._beat()

    def _beat(self) -> None:
        """A turn, and a heartbeat unless the step under way stands still."""
        self._turn()
        heartbeat = self.member.heartbeat(self._layers_now())
        if heartbeat is not None:
            self._send(heartbeat)
        self._timeline.after(HEARTBEAT_INTERVAL_NS, partial(self._when_running, self._beat))

    def _turn(self) -> None:
        self._is_woken = False
        member, now_ns = self.member, self._timeline.now_ns
        messages, self._inbox = self._inbox, []
        for message in messages:
            member.take(message, now_ns)
        deliveries, self._peer_inbox = self._peer_inbox, []
        for peer_message, payload in deliveries:
            member.take_peer(peer_message, payload, now_ns)
        computed, self._computed = self._computed, []
        for answer in computed:
            member.computed(answer, now_ns)
        copied, self._copied = self._copied, []
        for transfer in copied:
            member.copied(transfer, now_ns)
        parts, self._parts_ready = self._parts_ready, []
        for transfer, error in parts:
            member.part_ready(transfer, error)
        pulled, self._pulled = self._pulled, []
        for transfer, error in pulled:
            member.pulled(transfer, error)
        for action in member.turn(now_ns, self._execute_ns):
            if self.is_alive:
                self._perform(action)
        if self.is_alive:
            self.check()

    def _send(self, message: UpMessage) -> None:
        """Say something, unless the last words are said."""
        if not self.is_alive:
            return
        self._network.send_front(message)
        if self._messages_left is not None:
            self._messages_left -= 1
            if self._messages_left == 0:
                self._network.end()

    def _perform(self, action: Any) -> None:
        if isinstance(action, SendFront):
            self._send(action.message)
        elif isinstance(action, SendPeer):
            address = self._peers.get(action.target)
            if address is not None:
                self._network.send_peer(address, action.message, action.payload)
        elif isinstance(action, Compute):
            self._compute(action.work)
        elif isinstance(action, CancelCompute):
            self._cancel()
        elif isinstance(action, Configure):
            self._configure(action)
        elif isinstance(action, Pull):
            self._pump.pull(action)
        elif isinstance(action, CancelPulls):
            self._pump.cancel()
        elif isinstance(action, LoadPart | CheckPart):
            self._work_on_part(action)
        elif isinstance(action, CopyKv):
            self._host_kv.begin(
                action, partial(self._when_running, partial(self._end_copy, action))
            )
        elif isinstance(action, Connect):
            self._peers = {peer.instance: peer for peer in action.peers}
        else:
            raise AccountingError(f"no instance can do {action}")

    # ------------------------------------------------------------ computing

    def _configure(self, action: Configure) -> None:
        if self._flight is not None:
            raise AccountingError("layers are changed while some are computed")
        self._executor.layers = action.layers

    def _compute(self, work: Work) -> None:
        is_slipping = isinstance(work, RunHead) and self._flight is not None
        if (self._flight is not None and not is_slipping) or self._slipped is not None:
            raise AccountingError("work is given while other work is under way")
        try:
            self._executor.check_killers(work)
        except ProcessKilledError as error:
            # At once: what it has just said may be lost with it.
            self.killed_by = error.request_id
            self._network.end()
            return
        if isinstance(work, RunHead) and self._flight is not None:
            self._slip_in(work, self._flight)
            return
        layers = 1 if isinstance(work, RunHead) else len(self._executor.layers)
        layer_ns = max(1, self._work_ns(work) // layers)
        flight = self._flight = _Flight(work, self._timeline.now_ns, layer_ns, layers, layers)
        self._timeline.at(flight.end_ns, partial(self._when_running, partial(self._end, flight)))

    def _slip_in(self, work: RunHead, flight: _Flight) -> None:
        """Between two layers of the work under way, which ends later for it."""
        head_ns = self._work_ns(work)
        flight.begin_ns += head_ns
        self._slipped = work
        end_ns = self._timeline.now_ns + head_ns
        self._timeline.at(end_ns, partial(self._when_running, self._end_slipped))
        self._timeline.at(flight.end_ns, partial(self._when_running, partial(self._end, flight)))

    def _end_slipped(self) -> None:
        work, self._slipped = self._slipped, None
        if work is None or self._stuck_since_ns <= self._timeline.now_ns:
            return
        result, payload = self._executor.run(work, 1)
        self._computed.append(Computed(work, result, payload))
        self._wake()

    def _work_ns(self, work: Work) -> int:
        chunks = work.plan.chunks if isinstance(work, RunFirst | RunHead) else work.chunks
        shapes = [ChunkShape(c.context_len, len(c.token_ids), c.samples) for c in chunks]
        cost, num_layers = self._cost_model, self._config.num_layers
        whole_ns = cost.step_ns(shapes)
        head_ns = whole_ns - cost.for_stage(num_layers, num_layers, False).step_ns(shapes)
        factor = self._slow_factor if self._timeline.now_ns < self._slow_until_ns else 1
        if isinstance(work, RunHead):
            elapsed_ns = head_ns
        else:
            elapsed_ns = (whole_ns - head_ns) * len(self._executor.layers) / num_layers
            elapsed_ns += head_ns if self._executor.is_whole else 0
        return max(1, round(elapsed_ns)) * factor

    def _cancel(self) -> None:
        """The work ends when the layer under way is done."""
        flight = self._flight
        if flight is None or isinstance(flight.work, RunHead):
            return
        elapsed_ns = max(0, self._timeline.now_ns - flight.begin_ns)  # less heads that slipped in
        done = -(-elapsed_ns // flight.layer_ns)
        if done < flight.layers:
            flight.layers = done
            end_ns = max(flight.end_ns, self._timeline.now_ns)
            self._timeline.at(end_ns, partial(self._when_running, partial(self._end, flight)))

    def _end(self, flight: _Flight) -> None:
        if self._flight is not flight or self._stuck_since_ns <= flight.end_ns:
            return
        if self._timeline.now_ns < flight.end_ns:  # a head slipped in: it ends later
            return
        self._flight = None
        result, payload = self._executor.run(flight.work, flight.layers)
        if flight.layers < flight.num_layers and isinstance(flight.work, RunFirst):
            plan = flight.work.plan
            result = StepResult(plan.epoch, plan.step, (), cancelled=True)
        self._computed.append(Computed(flight.work, result, payload))
        self._layers_done += flight.num_layers
        self._execute_ns += flight.end_ns - flight.begin_ns
        self._wake()

    def _layers_now(self) -> int:
        """Layers computed since the start, those of the work under way included."""
        flight = self._flight
        if flight is None:
            return self._layers_done
        at_ns = min(self._timeline.now_ns, self._stuck_since_ns, flight.end_ns)
        return self._layers_done + max(0, at_ns - flight.begin_ns) // flight.layer_ns

    def _end_copy(self, order: CopyKv) -> None:
        self._host_kv.end(order)
        self._copied.append(order.transfer)
        self._wake()

    # ------------------------------------------------------------ transfers

    def _pages_of_peer(self, peer: InstanceId) -> PhysicalPages | None:
        address = self._peers.get(peer)
        return self._network.memory_of(address) if address is not None else None

    def _take_pulled(self, answer: PullAnswer) -> None:
        self._pulled.append(answer)
        self._wake()

    def _work_on_part(self, order: LoadPart | CheckPart) -> None:
        """Read it from the file, or compare it: its slab must stay mapped until that is done."""
        duration_ns = self._spans.part.draw(self._rng)

        def end() -> None:
            pages = self._mapper.parts.get(order.part)
            if pages is None:
                raise AccountingError(f"{order.part} is read into a hole")
            error = None
            if isinstance(order, LoadPart):
                self.pages.load(pages, order.part)
            elif not self.pages.has_part(pages, order.part):
                error = "its checksum is wrong"
            self._parts_under_way -= 1
            self._parts_ready.append((order.transfer, error))
            self._wake()

        self._parts_under_way += 1
        self._timeline.after(duration_ns, partial(self._when_running, end))

    def _digest(self, places: Sequence[tuple[int, int, int]]) -> str:
        """Hash of blocks of physical pages."""
        digest = hashlib.sha256()
        for page, first, count in places:
            start = self.pages.cell_at(page, first)
            stop = start + count * self.pages.block_size
            digest.update(self.pages.cells[start:stop].tobytes())
        return digest.hexdigest()

    def mapped_pages(self) -> frozenset[int]:
        """Range pages that are backed in some layer."""
        return frozenset(page for shown in self._mapper.kv for page in shown)

    def holds_part(self, part: Part, runs: Sequence[PageRun]) -> bool:
        """True when all weights of `part` lie in `runs`, and its slab shows them."""
        pages = pages_of(runs)
        return self._mapper.parts.get(part) == pages and self.pages.has_part(pages, part)

    def holds_its_stage(self) -> bool:
        """Between transitions: exactly the parts of its stage are held, their weights are all
        there, and every page is backed in all its layers or in none."""
        group, parts = self.group, self._mapper.parts
        if group is None:
            return False
        layers = group.stages[group.instances.index(self.instance)].layers
        is_leader = group.leader == self.instance
        wanted = {
            part
            for part in self._config.part_pages
            if (part.index in layers if part.kind is PartKind.LAYER else is_leader)
        }
        backed = {frozenset(self._mapper.kv[layer]) for layer in layers}
        others = [i for i in range(self._config.num_layers) if i not in layers]
        return (
            parts.keys() == wanted
            and all(self.pages.has_part(pages, part) for part, pages in parts.items())
            and len(backed) == 1
            and not any(self._mapper.kv[layer] for layer in others)
        )
