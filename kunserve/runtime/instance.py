"""The instance process: a member and an engine, driven by messages of the front and of peers.

    front  --leases, orders--->  control --work--> compute        (layers, head)
    front  <--reports----------  control <-answers- compute
    peers  <==rows, acks=====>   control --parts-> parts          (file, checksums)
    peers  ..pages, pulled..>    control --pulls-> pump           (transfer library)
                                 control --copies> copies         (KV, to host memory and back)

The control thread (main) takes messages in, schedules and reports; all others run one job at a
time. So an abort, a lease or a heartbeat never waits for a long step.

What it decides is `kunserve.policy.member`; here are threads, sockets and time.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
import zmq

from kunserve.core.actions import (
    Action,
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
    SendFront,
    SendPeer,
)
from kunserve.core.errors import KunserveError
from kunserve.core.events import GroupReport, InstanceReady
from kunserve.core.ids import InstanceId
from kunserve.core.transition import PeerAddress, Remap, Remapped
from kunserve.device.transfer import (
    MemoryRange,
    Priority,
    PullJob,
    Pump,
    PumpSettings,
    Span,
    create_transfer_agent,
)
from kunserve.policy.cost_model import CostModel
from kunserve.policy.member import Member, MemberConfig
from kunserve.runtime.codec import CodecError, LoadProgress, Shutdown, StartFailed
from kunserve.runtime.peers import PeerMesh
from kunserve.runtime.process import ignore_terminal_signals
from kunserve.runtime.settings import InstanceSettings
from kunserve.runtime.step_costs import find_cost_model
from kunserve.runtime.threads import ComputeThread, CopyThread, PartThread
from kunserve.runtime.transport import InstanceSocket
from kunserve.worker.engine import Engine
from kunserve.worker.host_kv import HostKv

logger = logging.getLogger("kunserve.instance")

HEARTBEAT_INTERVAL_MS = 500
SWITCH_INTERVAL_S = 0.0005
"""How long a thread may keep another one that wants to go on with Python waiting: between kernels
the compute thread does, a hundred times a step."""

PULL_WINDOW_BYTES = 8 << 20
"""Pages handed to the pump ahead: enough that it never waits for the control thread."""


class _PeerMemory(msgspec.Struct, frozen=True):
    """What a peer needs to pull from here: where the identity range begins, and the agent's own."""

    base: int
    metadata: bytes


class Links:
    """Everything between this instance and others: messages, rows and pulls.

    Args:
        gate: True while rows wait to be handed on.
    """

    def __init__(
        self, settings: InstanceSettings, engine: Engine, gate: Callable[[], bool]
    ) -> None:
        self._engine = engine
        self._names: dict[InstanceId, str] = {}
        self._bases: dict[InstanceId, int] = {}
        self.mesh = PeerMesh(settings.instance, settings.incarnation, engine.spec.hidden_size)
        name = f"{settings.instance}#{settings.incarnation}"
        identity = engine.memory.identity
        coordinated = settings.exchange == "coordinated"
        self.pump = Pump(
            lambda: create_transfer_agent("nixl", name),
            [MemoryRange(identity.address, identity.nbytes)],
            settings=PumpSettings(coordinated=coordinated, gbps=settings.link_gbps),
            gate=gate,
        )

    @property
    def address(self) -> PeerAddress:
        """How others reach this instance."""
        base = self._engine.memory.identity.address
        metadata = msgspec.msgpack.encode(_PeerMemory(base, self.pump.metadata))
        return self.mesh.address(metadata)

    def connect(self, peers: Sequence[PeerAddress]) -> None:
        """Open links to these incarnations, close all others."""
        self.mesh.update(peers)
        names = {peer.instance: f"{peer.instance}#{peer.incarnation}" for peer in peers}
        for name in set(self._names.values()) - set(names.values()):
            self.pump.remove_peer(name)
        for peer in peers:
            memory = msgspec.msgpack.decode(peer.metadata, type=_PeerMemory)
            self._bases[peer.instance] = memory.base
            self.pump.add_peer(names[peer.instance], memory.metadata)
        self._names = names

    def pull(self, order: Pull) -> str | None:
        """Begin a pull. Returns why it cannot begin, or None."""
        name = self._names.get(order.peer)
        if name is None:
            return f"instance {order.peer} has no link"
        memory, base = self._engine.memory, self._bases[order.peer]
        page_bytes = self._engine.plan.geometry.page_bytes
        block_bytes = self._engine.plan.geometry.block_bytes
        spans = tuple(
            Span(
                memory.identity_address(copy.local_page, copy.first_block * block_bytes),
                base + copy.remote_page * page_bytes + copy.remote_first_block * block_bytes,
                copy.num_blocks * block_bytes,
            )
            for copy in order.copies
        )
        priority = Priority.WEIGHTS if order.is_weights else Priority.KV
        self.pump.submit(PullJob(order.transfer, name, spans, priority))
        return None

    def close(self) -> None:
        """Close all links."""
        self.pump.close()
        self.mesh.close()


class Instance:
    """The control thread: messages and answers in; work, pulls and reports out."""

    def __init__(
        self,
        settings: InstanceSettings,
        engine: Engine,
        cost_model: CostModel,
        link: InstanceSocket,
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._cost_model = cost_model
        self._link = link
        self._compute = ComputeThread(engine.make_executor())
        self._parts = PartThread(engine)
        host_blocks = settings.scheduler.host_blocks
        self._copies = CopyThread(_host_kv(engine, host_blocks)) if host_blocks else None
        has_links = settings.engine.num_slots > 1
        self._links = Links(settings, engine, self._rows_wait) if has_links else None
        window = max(1, PULL_WINDOW_BYTES // engine.plan.geometry.page_bytes)
        self._member = Member(
            MemberConfig(
                instance=settings.instance,
                incarnation=settings.incarnation,
                num_layers=engine.spec.num_layers,
                scheduler=settings.scheduler,
                window_pages=window if settings.exchange == "coordinated" else None,
            ),
            cost_model,
            engine.memory,
            self._ready,
            self._digest if settings.check_accounting else None,
        )
        self._schedule_ns = 0
        self._remap_ns = 0
        self._stopping = False
        self._failed_pulls: list[tuple[int, str]] = []

    def run(self) -> None:
        """Serve until the front says Shutdown."""
        poller = self._make_poller()
        self._link.send(self._ready())
        next_beat = time.monotonic()
        try:
            while not self._stopping:
                wait_ms = max(0, int((next_beat - time.monotonic()) * 1000))
                poller.poll(0 if self._failed_pulls else wait_ms)
                begin_ns = time.monotonic_ns()
                self._turn()
                self._schedule_ns += time.monotonic_ns() - begin_ns
                if time.monotonic() >= next_beat:
                    self._beat()
                    next_beat = time.monotonic() + HEARTBEAT_INTERVAL_MS / 1000
        finally:
            self._compute.join()
            self._parts.join()
            if self._copies is not None:
                self._copies.join()
            if self._links is not None:
                self._links.close()

    def _make_poller(self) -> zmq.Poller:
        poller = zmq.Poller()
        sources: list[Any] = [self._link.socket, self._compute.wake_fd, self._parts.wake_fd]
        if self._copies is not None:
            sources.append(self._copies.wake_fd)
        if self._links is not None:
            sources += [self._links.mesh.socket, self._links.pump.wake_fd]
        for source in sources:
            poller.register(source, zmq.POLLIN)
        return poller

    def _ready(self) -> InstanceReady:
        engine = self._engine
        return InstanceReady(
            instance=self._settings.instance,
            incarnation=self._settings.incarnation,
            total_blocks=engine.total_blocks,
            num_pages=engine.plan.num_pages,
            parts=engine.memory.part_runs(),
            costs=astuple(self._cost_model),
            address=self._links.address if self._links is not None else None,
        )

    def _rows_wait(self) -> bool:
        return self._compute.is_handing_on

    def _digest(self, places: Sequence[tuple[int, int, int]]) -> str:
        """Hash of blocks of physical pages, for comparing what an exchange moved."""
        geometry, arena = self._engine.plan.geometry, self._engine.memory.arena
        digest = hashlib.sha256()
        for page, first, count in places:
            at = self._engine.memory.identity_address(page, first * geometry.block_bytes)
            digest.update(arena.view(at, count * geometry.block_bytes).data)
        return digest.hexdigest()

    # ------------------------------------------------------------ a turn

    def _turn(self) -> None:
        self._take_messages()
        for done in self._compute.collect():
            self._take_computed(done)
        for transfer in self._copies.answers() if self._copies is not None else ():
            self._member.copied(transfer, time.monotonic_ns())
        for part in self._parts.answers():
            if part.error is not None:
                logger.warning("transfer %d: %s", part.transfer, part.error)
            self._member.part_ready(part.transfer, part.error)
        failed, self._failed_pulls = self._failed_pulls, []
        for transfer, error in failed:
            self._member.pulled(transfer, error)
        if self._links is not None:
            for pull in self._links.pump.completions():
                if pull.error is not None:
                    logger.warning("transfer %d: %s", pull.id, pull.error)
                self._member.pulled(pull.id, pull.error)
        link_bytes = self._links.pump.stats.nbytes if self._links is not None else 0
        actions = self._member.turn(
            time.monotonic_ns(), self._compute.execute_ns, self._schedule_ns, link_bytes
        )
        for action in _work_first(actions):
            self._perform(action)
        if not self._compute.is_busy:
            self._compute.handed_on()

    def _take_messages(self) -> None:
        for message in self._link.receive():
            if isinstance(message, Shutdown):
                self._stopping = True
            elif isinstance(message, Remap):
                self._remap(message)
            else:
                self._member.take(message, time.monotonic_ns())
        if self._links is not None:
            self._take_deliveries(self._links.mesh)

    def _take_deliveries(self, mesh: PeerMesh) -> None:
        try:
            for delivery in mesh.receive():
                self._member.take_peer(delivery.message, delivery.payload, time.monotonic_ns())
        except CodecError:
            logger.exception("a message of a peer was dropped")

    def _remap(self, message: Remap) -> None:
        """The one order whose time is its result: the member has no clock."""
        begin_ns = time.monotonic_ns()
        self._member.take(message, begin_ns)
        self._remap_ns = time.monotonic_ns() - begin_ns

    def _take_computed(self, done: Computed) -> None:
        for request_id, message in done.result.failed if done.result is not None else ():
            logger.error("request %s failed: %s", request_id, message)
        self._member.computed(done, time.monotonic_ns())
        if self._settings.check_accounting:
            self._member.check()

    def _perform(self, action: Any) -> None:
        if isinstance(action, Compute):
            self._compute.handed_on()  # the rows before it are sent
            self._compute.submit(action.work)
        elif isinstance(action, SendFront):
            message = action.message
            if isinstance(message, Remapped):
                message = replace(message, elapsed_ns=self._remap_ns)
            self._link.send(message)
        elif isinstance(action, CancelCompute):
            self._compute.cancel()
        elif isinstance(action, Configure):
            self._compute.configure(action.layers)
        elif isinstance(action, LoadPart | CheckPart):
            self._parts.submit(action)
        elif isinstance(action, CopyKv) and self._copies is not None:
            self._copies.submit(action)
        else:
            self._perform_link(action)

    def _perform_link(self, action: Any) -> None:
        if self._links is None:
            raise KunserveError(f"{type(action).__name__} needs links, and there are none")
        if isinstance(action, SendPeer):
            if not self._links.mesh.send(action.target, action.message, action.payload):
                logger.warning("instance %d has no link: a message is dropped", action.target)
        elif isinstance(action, Pull):
            error = self._links.pull(action)
            if error is not None:
                self._failed_pulls.append((action.transfer, error))
        elif isinstance(action, CancelPulls):
            self._links.pump.cancel(lambda job: True)
        elif isinstance(action, Connect):
            self._links.connect(action.peers)

    def _beat(self) -> None:
        heartbeat = self._member.heartbeat(self._compute.layers_done)
        if heartbeat is not None:
            self._link.send(heartbeat)


def _host_kv(engine: Engine, num_blocks: int) -> HostKv:
    bases = [engine.memory.kv_base(layer) for layer in range(engine.spec.num_layers)]
    return HostKv(num_blocks, engine.plan.geometry.block_bytes, bases)


def _work_first(actions: list[Action]) -> list[Action]:
    """`actions` with the next work right behind the rows that another stage waits for, so that both
    compute while the rest is done. Left as they are where the order says more: a change of layers,
    and a report with the requests that start with this work (see `Member.turn`)."""
    if not actions or not isinstance(actions[-1], Compute):
        return actions
    behind_rows = 0
    for index, action in enumerate(actions):
        if isinstance(action, Configure | CancelCompute):
            return actions
        if isinstance(action, SendFront):
            message = action.message
            if isinstance(message, GroupReport) and message.started:
                return actions
        elif isinstance(action, SendPeer) and action.payload is not None:
            behind_rows = index + 1
    return [*actions[:behind_rows], actions[-1], *actions[behind_rows:-1]]


def _serve(settings: InstanceSettings, link: InstanceSocket) -> None:
    def progress(activity: str, fraction: float) -> None:
        link.send(LoadProgress(settings.instance, settings.incarnation, activity, fraction))

    progress("opening memory", 0.0)
    with Engine(settings.engine, progress) as engine:
        progress("measuring step times", 1.0)
        profiles = settings.profile_directory
        cost_model = find_cost_model(engine, Path(profiles) if profiles else None)
        instance = Instance(settings, engine, cost_model, link)
        gc.freeze()  # what lives until the end: no collection needs to look at it again
        instance.run()


def main() -> int:
    """Entry of the process: settings come as msgpack on standard input."""
    ignore_terminal_signals()
    given = sys.stdin.buffer.read()
    if not given:  # the front died before it wrote them
        return 1
    settings = msgspec.msgpack.decode(given, type=InstanceSettings)
    logging.basicConfig(
        level=settings.log_level.upper(),
        format=f"%(levelname)s %(asctime)s instance {settings.instance}: %(message)s",
        datefmt="%m-%d %H:%M:%S",
    )
    # All parallelism is the kernels' own pool; torch only computes small tables here.
    torch.set_num_threads(1)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    link = InstanceSocket(settings.keys)
    try:
        _serve(settings, link)
    except KunserveError as error:
        logger.debug("the instance ends", exc_info=True)
        link.send(StartFailed(settings.instance, settings.incarnation, _one_line(error)))
        return 1
    except MemoryError:
        message = "out of memory; lower --kv-cache-memory-bytes or --instances"
        link.send(StartFailed(settings.instance, settings.incarnation, message))
        return 1
    finally:
        link.close()
    return 0


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


if __name__ == "__main__":
    sys.exit(main())
