"""What a pump does next: jobs cut into chunks, one chunk in flight, KV before weights.

    waiting     KV       | job 7: chunk 3, 4, ... | job 9: 0, ... |
                WEIGHTS  | job 8: chunk 1, ...    |
    in flight   job 7: chunk 2                          at most one (coordinated)
    quarantined job 5: chunk 0                          cancelled, its bytes may still come

A cancelled job that has a chunk in flight ends when the chunk does, and not before: nothing can
stop a pull (links.md, rule 3). Until its `PullDone` the local bytes of a job belong to the job.
Everything here runs on one thread, the agent's; `Pump` is that thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import IntEnum

from kunserve.device.transfer.base import (
    PullHandle,
    PullStatus,
    Span,
    TransferAgent,
    TransferError,
)

BUSY_REST_NS = 100_000
"""Rest between polls while something is in flight (links.md, rule 6)."""

CONNECTED_REST_NS = 5_000_000
"""Rest between looks at sockets on which a peer may begin to pull."""

LONELY_REST_NS = 50_000_000
"""Rest while no peer was added: a peer that connects then waits several times as long."""

ATTENTIVE_NS = 50_000_000
"""How long after an announcement we look after a peer's pulls without rest."""


class Priority(IntEnum):
    """Order of service; the smaller goes first."""

    KV = 0
    WEIGHTS = 1


@dataclass(frozen=True)
class PullJob:
    """Spans of one peer to be pulled. `id` is the caller's; no two unfinished jobs share one."""

    id: int
    peer: str
    spans: tuple[Span, ...]
    priority: Priority = Priority.KV


@dataclass(frozen=True)
class PullDone:
    """The end of a job: no byte of it is written any more.

    Attributes:
        nbytes: what arrived in whole chunks; all of it unless there is an error.
        elapsed_ns: from the start of its first chunk; 0 if none was started.
        error: why it did not end well, or None.
    """

    id: int
    nbytes: int
    elapsed_ns: int
    error: str | None


@dataclass(frozen=True)
class PumpStats:
    """Totals since the start.

    Attributes:
        busy_ns: time in which at least one chunk was in flight, quarantined ones left out.
    """

    nbytes: int = 0
    chunks: int = 0
    busy_ns: int = 0


@dataclass(frozen=True)
class PumpSettings:
    """How a pump shares its link.

    Attributes:
        coordinated: one chunk in flight, and none started while the gate says so. Otherwise each
            job is one request, `jobs_in_flight` of them at once, and the gate is ignored.
        gbps: limit in 10^9 bits per second, or None.
    """

    coordinated: bool = True
    kv_chunk_bytes: int = 4 << 20
    weights_chunk_bytes: int = 4 << 20
    jobs_in_flight: int = 4
    gbps: float | None = None

    def __post_init__(self) -> None:
        if min(self.kv_chunk_bytes, self.weights_chunk_bytes, self.jobs_in_flight) <= 0:
            raise TransferError(f"chunks and jobs in flight must be positive: {self}")
        if self.gbps is not None and not self.gbps > 0:
            raise TransferError(f"gbps must be positive or None: {self}")

    def chunk_bytes(self, job: PullJob) -> int:
        """The most bytes of `job` in one request."""
        if not self.coordinated:
            return max(1, sum(span.nbytes for span in job.spans))
        return self.kv_chunk_bytes if job.priority is Priority.KV else self.weights_chunk_bytes


class TokenBucket:
    """Lets a chunk start once all earlier ones would have left a link of `gbps`.

    It holds no credit: after a pause one chunk starts at once, the next after its time.
    """

    def __init__(self, gbps: float | None) -> None:
        self._ns_per_byte = 0.0 if gbps is None else 8 / gbps
        self._free_ns = 0.0

    def wait_ns(self, now_ns: int) -> int:
        """How long until the next chunk may start."""
        return max(0, round(self._free_ns - now_ns))

    def take(self, nbytes: int, now_ns: int) -> None:
        """A chunk of `nbytes` starts."""
        self._free_ns = max(self._free_ns, now_ns) + nbytes * self._ns_per_byte


def merge_spans(spans: Iterable[Span]) -> Iterator[Span]:
    """`spans` in order; neighbours that continue each other on both sides become one."""
    last: Span | None = None
    for span in spans:
        if (
            last
            and last.local_address + last.nbytes == span.local_address
            and last.remote_address + last.nbytes == span.remote_address
        ):
            last = replace(last, nbytes=last.nbytes + span.nbytes)
            continue
        if last:
            yield last
        last = span
    if last:
        yield last


def cut_spans(spans: Iterable[Span], chunk_bytes: int) -> Iterator[tuple[Span, ...]]:
    """Merged `spans` in chunks of exactly `chunk_bytes`, but for the last."""
    chunk: list[Span] = []
    room = chunk_bytes
    for span in merge_spans(spans):
        done = 0
        while done < span.nbytes:
            taken = min(room, span.nbytes - done)
            chunk.append(Span(span.local_address + done, span.remote_address + done, taken))
            done, room = done + taken, room - taken
            if room == 0:
                yield tuple(chunk)
                chunk, room = [], chunk_bytes
    if chunk:
        yield tuple(chunk)


@dataclass(eq=False)
class _Work:
    """A job on its way. `next_chunk` is empty once every chunk was started."""

    job: PullJob
    chunks: Iterator[tuple[Span, ...]]
    next_chunk: tuple[Span, ...]
    in_flight_bytes: int = 0
    pulled_bytes: int = 0
    started_ns: int | None = None
    cancelled: str = ""


class PullSchedule:
    """Jobs, peers and chunks of one agent. See the module.

    Args:
        gate: True while something more urgent waits for the link; asked between chunks.
        clock: nanoseconds that never go back.
    """

    def __init__(
        self,
        agent: TransferAgent,
        settings: PumpSettings,
        gate: Callable[[], bool] | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.quarantined: tuple[int, ...] = ()
        self.stats = PumpStats()
        self._agent = agent
        self._settings = settings
        self._gate = gate if settings.coordinated else None
        self._clock = clock
        self._bucket = TokenBucket(settings.gbps)
        self._waiting: dict[Priority, deque[_Work]] = {order: deque() for order in Priority}
        self._in_flight: dict[_Work, PullHandle] = {}
        self._done: list[PullDone] = []
        self._peers: set[str] = set()
        self._refused: dict[str, str] = {}  # peers that the agent did not take, with its reason
        self._leaving: set[str] = set()  # removed, with a pull still in flight
        self._returning: dict[str, bytes] = {}  # added again meanwhile
        self._attentive_until_ns = 0
        self._busy_since_ns: int | None = None

    # -- what the owner asks

    def submit(self, job: PullJob) -> None:
        """Take a job. A job without spans, or of an unknown peer, ends at once."""
        chunks = cut_spans(job.spans, self._settings.chunk_bytes(job))
        work = _Work(job, chunks, next(chunks, ()))
        if job.peer in self._leaving:
            self._finish(work, f"{job.peer} is being removed: its last pull has not ended")
        elif job.peer not in self._peers:
            reason = self._refused.get(job.peer, "add it first")
            self._finish(work, f"{job.peer} is not known: {reason}")
        elif not work.next_chunk:
            self._finish(work, None)
        else:
            self._waiting[job.priority].append(work)

    def cancel(self, matches: Callable[[PullJob], bool], reason: str) -> None:
        """End the jobs that match: at once, or when the chunk in flight has ended."""
        for queue in self._waiting.values():
            for work in [work for work in queue if matches(work.job)]:
                queue.remove(work)
                self._finish(work, reason)
        for work in self._in_flight:
            if not work.cancelled and matches(work.job):
                work.cancelled = reason
        self._publish()

    def add_peer(self, name: str, metadata: bytes) -> None:
        """Let jobs pull from `name`. If the agent refuses, they end with its reason."""
        if name in self._leaving:
            self._returning[name] = metadata
            return
        if name in self._peers:
            return
        try:
            self._agent.add_peer(name, metadata)
        except TransferError as error:
            self._refused[name] = str(error)
        else:
            self._refused.pop(name, None)
            self._peers.add(name)

    def remove_peer(self, name: str) -> None:
        """Cancel the jobs of `name`; the agent forgets it once nothing of it is in flight."""
        self._returning.pop(name, None)
        self.cancel(lambda job: job.peer == name, f"{name} was removed")
        if name in self._peers:
            self._leaving.add(name)
            self._remove_idle_peers()

    def take_done(self) -> list[PullDone]:
        """Jobs that ended since the last call."""
        done, self._done = self._done, []
        return done

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing is in flight, quarantine included."""
        return not self._in_flight and not any(self._waiting.values())

    # -- one round

    def step(self) -> int:
        """Poll, start at most one chunk, look after peers; returns how long to rest, in ns."""
        moved = self._poll()
        moved = self._start() or moved
        self._publish()
        if self._agent.service():
            self._attentive_until_ns = self._clock() + ATTENTIVE_NS
        return 0 if moved else self._rest_ns()

    def _poll(self) -> bool:
        ended = [
            (work, handle)
            for work, handle in self._in_flight.items()
            if self._agent.poll(handle) is not PullStatus.IN_PROGRESS
        ]
        for work, handle in ended:
            self._end_chunk(work, handle)
        if ended:
            self._publish()
            self._remove_idle_peers()
        return bool(ended)

    def _end_chunk(self, work: _Work, handle: PullHandle) -> None:
        del self._in_flight[work]
        self._agent.release(handle)
        if handle.status is PullStatus.FAILED:
            self._finish(work, work.cancelled or handle.error)
            return
        work.pulled_bytes += work.in_flight_bytes
        self.stats = replace(
            self.stats,
            nbytes=self.stats.nbytes + work.in_flight_bytes,
            chunks=self.stats.chunks + 1,
        )
        if work.cancelled or not work.next_chunk:
            self._finish(work, work.cancelled or None)
        else:
            self._waiting[work.job.priority].appendleft(work)

    def _start(self) -> bool:
        queue = self._ready_queue()
        if queue is None:
            return False
        work = queue.popleft()
        chunk, work.next_chunk = work.next_chunk, next(work.chunks, ())
        work.in_flight_bytes = sum(span.nbytes for span in chunk)
        now_ns = self._clock()
        if work.started_ns is None:
            work.started_ns = now_ns
        try:
            handle = self._agent.begin_pull(work.job.peer, chunk)
        except TransferError as error:
            self._finish(work, str(error))
            return True
        self._bucket.take(work.in_flight_bytes, now_ns)
        if self._busy_since_ns is None:
            self._busy_since_ns = now_ns
        self._in_flight[work] = handle
        return True

    def _ready_queue(self) -> deque[_Work] | None:
        """The queue whose head may start now."""
        slots = 1 if self._settings.coordinated else self._settings.jobs_in_flight
        queue = next((queue for queue in self._waiting.values() if queue), None)
        if queue is None or self._active() >= slots:
            return None
        if self._bucket.wait_ns(self._clock()) or (self._gate and self._gate()):
            return None
        return queue

    def _rest_ns(self) -> int:
        now_ns = self._clock()
        if self._active() or now_ns < self._attentive_until_ns:
            return BUSY_REST_NS
        rest_ns = CONNECTED_REST_NS if self._peers else LONELY_REST_NS
        if any(self._waiting.values()):  # for the link's limit or for the gate
            rest_ns = min(rest_ns, max(BUSY_REST_NS, self._bucket.wait_ns(now_ns)))
        return rest_ns

    # -- records

    def _active(self) -> int:
        return sum(not work.cancelled for work in self._in_flight)

    def _finish(self, work: _Work, error: str | None) -> None:
        elapsed_ns = 0 if work.started_ns is None else self._clock() - work.started_ns
        self._done.append(PullDone(work.job.id, work.pulled_bytes, elapsed_ns, error))

    def _publish(self) -> None:
        """Bring what others read up to date with what is in flight."""
        self.quarantined = tuple(work.job.id for work in self._in_flight if work.cancelled)
        if self._busy_since_ns is not None:
            now_ns = self._clock()
            busy_ns = self.stats.busy_ns + now_ns - self._busy_since_ns
            self.stats = replace(self.stats, busy_ns=busy_ns)
            self._busy_since_ns = now_ns if self._active() else None

    def _remove_idle_peers(self) -> None:
        for name in self._leaving - {work.job.peer for work in self._in_flight}:
            self._leaving.remove(name)
            self._peers.remove(name)
            self._agent.remove_peer(name)
            if name in self._returning:
                self.add_peer(name, self._returning.pop(name))
