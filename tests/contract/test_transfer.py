"""One suite for every transfer backend, and the pump's order on a fabric that tests advance.

A node is an instance as far as transfers see it: an arena whose identity range is registered, and
a pump. Nodes on NIXL are processes of their own, made by running this file, because UCX_TLS must
be set before NIXL is imported, and because they are stopped and killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kunserve.device.arena import MappedRun, create_arena
from kunserve.device.transfer import (
    LocalAgent,
    LocalFabric,
    MemoryRange,
    PeerUnknownError,
    Priority,
    PullDone,
    PullHandle,
    PullJob,
    PullSchedule,
    PullStatus,
    Pump,
    PumpSettings,
    Span,
    TokenBucket,
    TransferAgent,
    TransferError,
    TransferUnavailableError,
    create_transfer_agent,
    cut_spans,
    merge_spans,
    nixl,
)

REPOSITORY = Path(__file__).parents[2]
DEADLINE_S = 20.0
PAGE_BYTES = 64 << 10
NUM_PAGES = 128
MEMORY_BYTES = PAGE_BYTES * NUM_PAGES
BLOCK_BYTES = 24 << 10


# ---------------------------------------------------------------- nodes


class Node:
    """Arguments and results of all methods are JSON: they may cross a pipe."""

    def __init__(self, name: str, open_agent: Callable[[str], TransferAgent]) -> None:
        self.open_agent = open_agent
        self.ended: list[PullDone] = []
        self.arena = create_arena("host", page_bytes=PAGE_BYTES, num_pages=NUM_PAGES)
        self.range = self.arena.reserve(MEMORY_BYTES)
        identity = self.arena.identity
        self.bytes = self.arena.view(identity.address, MEMORY_BYTES)
        self.pump = Pump(
            partial(open_agent, name), [MemoryRange(identity.address, identity.nbytes)]
        )

    def hello(self) -> list[Any]:
        return [self.pump.name, self.pump.metadata.hex(), self.arena.identity.address]

    def fill(self, seed: int) -> None:
        self.bytes[:] = contents(seed)

    def digest(self, offset: int = 0, nbytes: int = MEMORY_BYTES) -> str:
        return digest(self.bytes[offset : offset + nbytes])

    def digest_blocks(self, offsets: Sequence[int], nbytes: int) -> list[str]:
        return [self.digest(offset, nbytes) for offset in offsets]

    def add_peer(self, name: str, metadata: str) -> None:
        self.pump.add_peer(name, bytes.fromhex(metadata))

    def remove_peer(self, name: str) -> None:
        self.pump.remove_peer(name)

    def submit(
        self, job: int, peer: str, remote: int, spans: list[list[int]], priority: int = 0
    ) -> None:
        """`spans`: rows of (local offset, remote offset, bytes)."""
        start = self.arena.identity.address
        cut = tuple(Span(start + here, remote + there, nbytes) for here, there, nbytes in spans)
        self.pump.submit(PullJob(job, peer, cut, Priority(priority)))

    def wait(self, count: int) -> list[list[Any]]:
        """The next `count` completions as (id, bytes, error)."""
        missing = count - len(self.ended)
        if missing > 0:
            self.ended += wait_done(self.pump, missing)
        ended, self.ended = self.ended[:count], self.ended[count:]
        return [[done.id, done.nbytes, done.error] for done in ended]

    def cancel_peer(self, name: str) -> None:
        self.pump.cancel_peer(name)

    def quarantined(self) -> list[int]:
        return list(self.pump.quarantined)

    def map_pages(self, pages: list[int]) -> None:
        """Show `pages`, and nothing else, in the range beside the identity."""
        for run in self.arena.mapped_runs(self.range):
            self.arena.unmap(self.range, run.offset, run.count)
        self.arena.map(self.range, 0, [MappedRun(0, page, 1) for page in pages])

    def write_mapped(self, seed: int, num_pages: int) -> None:
        shown = self.arena.view(self.range.address, num_pages * PAGE_BYTES)
        shown[:] = contents(seed)[: num_pages * PAGE_BYTES]

    def digest_mapped(self, num_pages: int) -> str:
        return digest(self.arena.view(self.range.address, num_pages * PAGE_BYTES))

    def refusals(self) -> list[str]:
        """What an agent says to wrong calls, in order."""
        said: list[str] = []

        def expect(call: Callable[..., object], *arguments: object) -> None:
            try:
                call(*arguments)
            except TransferError as error:
                said.append(type(error).__name__)
            else:
                said.append("accepted")

        start = self.arena.identity.address
        agent = self.open_agent("extra#0")
        agent.register(start, PAGE_BYTES)
        expect(agent.begin_pull, "nobody#0", [Span(start, start, 1)])
        expect(agent.remove_peer, "nobody#0")
        expect(agent.add_peer, "other#0", self.pump.metadata)
        expect(agent.add_peer, "other#0", b"nonsense")
        agent.add_peer(self.pump.name, self.pump.metadata)
        expect(agent.add_peer, self.pump.name, self.pump.metadata)
        expect(agent.begin_pull, self.pump.name, [Span(start + PAGE_BYTES, start, 1)])
        expect(agent.begin_pull, self.pump.name, [Span(start, start + MEMORY_BYTES, 1)])
        handle = agent.begin_pull(self.pump.name, [Span(start, start + PAGE_BYTES, PAGE_BYTES)])
        deadline = time.monotonic() + DEADLINE_S
        while agent.poll(handle) is PullStatus.IN_PROGRESS and time.monotonic() < deadline:
            pass
        said.append(handle.status.name)
        agent.release(handle)
        agent.remove_peer(self.pump.name)
        expect(agent.begin_pull, self.pump.name, [Span(start, start, 1)])
        agent.close()
        agent.close()
        return said

    def close(self) -> None:
        self.pump.close()


class LocalNode:
    """A node of this process."""

    def __init__(self, name: str, fabric: LocalFabric) -> None:
        self.name = name
        self.alive = True
        self.fabric = fabric
        self.node = Node(name, lambda agent: LocalAgent(agent, fabric))

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self.node, method)(*arguments)

    def stop(self) -> None:
        self.fabric.stop(self.name)

    def resume(self) -> None:
        self.fabric.resume(self.name)

    def kill(self) -> None:
        self.alive = False
        self.fabric.kill(self.name)

    def end(self) -> None:
        self.node.close()


class ProcessNode:
    """A node in a process of its own: one line of JSON per call and per answer."""

    def __init__(self, name: str, tls: str | None) -> None:
        self.name = name
        self.alive = True
        environment = {key: value for key, value in os.environ.items() if key != "UCX_TLS"}
        environment["PYTHONPATH"] = str(REPOSITORY)
        if tls is not None:
            environment["UCX_TLS"] = tls
        self.process = subprocess.Popen(
            [sys.executable, __file__, name],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def call(self, method: str, *arguments: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([method, *arguments]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the node ended with {self.process.wait()} in {method}"
        return json.loads(line)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.alive = False
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


class World:
    """Nodes of one backend."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.fabric = LocalFabric()
        self.nodes: list[LocalNode | ProcessNode] = []

    def start(self, *names: str) -> list[Any]:
        """Start nodes, at once, filled with contents(0), contents(1), ..., all knowing all."""
        nodes = [self._open(name) for name in names]
        known = [node.call("hello") for node in self.nodes if node.alive]
        self.nodes += nodes
        for index, node in enumerate(nodes):
            node.call("fill", index)
        known += [node.call("hello") for node in nodes]
        for node in nodes:
            for name, metadata, _ in known:
                if name != node.name:
                    node.call("add_peer", name, metadata)
        return nodes

    def _open(self, name: str) -> LocalNode | ProcessNode:
        if self.kind == "local":
            return LocalNode(name, self.fabric)
        return ProcessNode(name, "tcp" if self.kind == "nixl-tcp" else None)

    def end(self) -> None:
        for node in self.nodes:
            node.end()


def serve(name: str) -> None:
    """A process node: answer until the pipe closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no answer
    node = Node(name, partial(create_transfer_agent, "nixl"))
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        answers.write(json.dumps(getattr(node, method)(*arguments)) + "\n")
        answers.flush()


def contents(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, MEMORY_BYTES, dtype=np.uint8)


def digest(data: np.ndarray) -> str:
    return hashlib.blake2b(data.tobytes(), digest_size=8).hexdigest()


def wait_done(pump: Pump, count: int) -> list[PullDone]:
    """The next `count` completions, or more."""
    ended: list[PullDone] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(ended) < count:
        left_s = deadline - time.monotonic()
        assert left_s > 0, f"{len(ended)} of {count} jobs ended"
        select.select([pump.wake_fd], [], [], left_s)
        ended += pump.completions()
    return ended


BACKENDS = ("local", "nixl", "nixl-tcp")


def make_world(kind: str) -> World:
    if kind != "local":
        try:
            nixl.check_available()
        except TransferUnavailableError as error:
            pytest.skip(str(error))
    return World(kind)


@pytest.fixture(params=BACKENDS)
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """A world for a test that ends nodes."""
    made = make_world(request.param)
    yield made
    made.end()


@pytest.fixture(scope="module", params=BACKENDS)
def shared_world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = make_world(request.param)
    made.start("a#0", "b#0", "c#0")
    yield made
    made.end()


@pytest.fixture
def nodes(shared_world: World) -> list[Any]:
    """Three nodes with contents(0), contents(1), contents(2), for a test that ends none."""
    for index, node in enumerate(shared_world.nodes):
        node.call("fill", index)
    return list(shared_world.nodes)


# ---------------------------------------------------------------- every backend


def blocks(order: Sequence[int]) -> list[list[int]]:
    """Spans that put block order[i] of the source in place i, every place at its own page."""
    return [[i * PAGE_BYTES, n * PAGE_BYTES, BLOCK_BYTES] for i, n in enumerate(order)]


def test_scattered_spans(nodes: list[Any]):
    """The bytes asked for arrive where they belong, and no other byte changes."""
    reader, source, _ = nodes
    name, _, remote = source.call("hello")
    order = random.Random(0).sample(range(NUM_PAGES), NUM_PAGES)
    reader.call("submit", 1, name, remote, blocks(order))
    assert reader.call("wait", 1) == [[1, NUM_PAGES * BLOCK_BYTES, None]]
    expected = contents(0).reshape(NUM_PAGES, PAGE_BYTES)
    expected[:, :BLOCK_BYTES] = contents(1).reshape(NUM_PAGES, PAGE_BYTES)[order, :BLOCK_BYTES]
    assert reader.call("digest") == digest(expected)
    assert source.call("digest") == digest(contents(1))


def test_many_jobs_both_ways(nodes: list[Any]):
    """Two nodes read a third and each other at once, KV and weights."""
    hellos = [node.call("hello") for node in nodes]
    half, share = MEMORY_BYTES // 2, MEMORY_BYTES // 64
    readers = ((nodes[0], (1, 2)), (nodes[1], (2, 0)))
    for reader, sources in readers:
        for job in range(32):  # into the upper half, out of the lower: nothing read is written
            name, _, remote = hellos[sources[job % 2]]
            spans = [[half + job * share, job * share, share]]
            reader.call("submit", job, name, remote, spans, job % 3 == 0)
    for reader, sources in readers:
        done = reader.call("wait", 32)
        assert sorted(done) == [[job, share, None] for job in range(32)]
        got = reader.call("digest_blocks", [half + job * share for job in range(32)], share)
        assert got == [
            digest(contents(sources[job % 2])[job * share : (job + 1) * share]) for job in range(32)
        ]


def test_a_dead_source_fails_alone_and_its_successor_joins_late(world: World):
    reader, victim, other = world.start("r#0", "v#0", "o#0")
    victims, others = victim.call("hello"), other.call("hello")
    half, share = MEMORY_BYTES // 2, MEMORY_BYTES // 64
    for job in range(32):  # of the victim, enough for a second; of the other, a little
        if job % 2:
            spans = [[job * share, job * share, share]]
            reader.call("submit", job, others[0], others[2], spans)
        else:
            reader.call("submit", job, victims[0], victims[2], [[half, 0, half]] * 16)
    done = reader.call("wait", 1)
    assert done == [[0, 16 * half, None]]
    assert reader.call("digest", half, half) == digest(contents(1)[:half])
    victim.kill()
    done += reader.call("wait", 31)
    assert [job for job, _, _ in done] == list(range(32))
    assert all(error is None for job, _, error in done if job % 2)
    assert any(error for job, _, error in done if job % 2 == 0)
    got = reader.call("digest_blocks", [job * share for job in range(1, 32, 2)], share)
    assert got == [digest(contents(2)[job * share : (job + 1) * share]) for job in range(1, 32, 2)]
    reader.call("submit", 100, victims[0], victims[2], [[0, 0, share]])
    [[job, nbytes, error]] = reader.call("wait", 1)
    assert (job, nbytes) == (100, 0)
    assert error
    reader.call("remove_peer", victims[0])
    (successor,) = world.start("v#1")
    name, metadata, remote = successor.call("hello")
    reader.call("add_peer", name, metadata)
    reader.call("submit", 101, name, remote, [[0, 0, share]])
    reader.call("submit", 102, others[0], others[2], [[half, 0, share]])
    assert reader.call("wait", 2) == [[101, share, None], [102, share, None]]
    assert reader.call("digest", 0, share) == digest(contents(0)[:share])


@pytest.mark.parametrize("end", ["kill", "resume"])
def test_a_stopped_source_is_quarantined_until_its_end(world: World, end: str):
    """Over a link that needs the source's help. The kernel's copy mostly does not."""
    reader, stuck, other = world.start("r#0", "s#0", "o#0")
    stucks, others = stuck.call("hello"), other.call("hello")
    nbytes = 1 << 20
    reader.call("submit", 0, stucks[0], stucks[2], [[0, 0, 4096]])
    assert reader.call("wait", 1) == [[0, 4096, None]]  # connected
    stuck.stop()
    reader.call("submit", 1, stucks[0], stucks[2], [[0, 0, nbytes]])
    reader.call("submit", 2, stucks[0], stucks[2], [])
    first = reader.call("wait", 1)[0]  # job 2 ends in the round in which job 1 has begun
    if first[0] == 2:
        reader.call("cancel_peer", stucks[0])
        reader.call("submit", 3, others[0], others[2], [[nbytes, 0, nbytes]])
        first = reader.call("wait", 1)[0]
    if world.kind == "nixl" and first[0] == 1:
        return
    assert first == [3, nbytes, None]
    assert reader.call("quarantined") == [1]
    reader.call("remove_peer", stucks[0])
    reader.call("submit", 4, stucks[0], stucks[2], [[0, 0, nbytes]])
    [[job, _, error]] = reader.call("wait", 1)
    assert job == 4
    assert "is being removed" in error
    getattr(stuck, end)()
    [[job, got, error]] = reader.call("wait", 1)
    assert (job, got, error) == (1, nbytes if end == "resume" else 0, "cancelled")
    assert reader.call("quarantined") == []
    if end == "resume":  # the late write came, before the job was said to have ended
        assert reader.call("digest", 0, nbytes) == digest(contents(1)[:nbytes])


def test_pages_mapped_elsewhere_under_a_registered_range(nodes: list[Any]):
    """Pages change places behind other addresses; the identity range serves them all along."""
    reader, source, _ = nodes
    name, _, remote = source.call("hello")
    rng = random.Random(1)
    for job in range(4):
        there = rng.sample(range(NUM_PAGES), 32)
        here = rng.sample(range(NUM_PAGES), 32)
        source.call("map_pages", there)
        source.call("write_mapped", 50 + job, 32)
        reader.call("map_pages", here)
        spans = [
            [to * PAGE_BYTES, at * PAGE_BYTES, PAGE_BYTES]
            for to, at in zip(here, there, strict=True)
        ]
        reader.call("submit", job, name, remote, spans)
        assert reader.call("wait", 1) == [[job, 32 * PAGE_BYTES, None]]
        expected = digest(contents(50 + job)[: 32 * PAGE_BYTES])
        assert reader.call("digest_mapped", 32) == expected


@pytest.mark.parametrize("kind", ["local", "nixl"])
def test_a_source_outlives_its_reader(kind: str):
    """Not over tcp: there UCX 1.23 ends the source, too, in about one case of six."""
    world = make_world(kind)
    try:
        source, victim, other = world.start("s#0", "v#0", "o#0")
        name, _, remote = source.call("hello")
        for job in range(64):
            victim.call("submit", job, name, remote, [[0, 0, MEMORY_BYTES]])
        victim.call("wait", 1)
        victim.kill()
        other.call("submit", 0, name, remote, [[0, 0, MEMORY_BYTES]])
        assert other.call("wait", 1) == [[0, MEMORY_BYTES, None]]
        assert other.call("digest") == source.call("digest")
    finally:
        world.end()


def test_wrong_calls_are_refused(nodes: list[Any]):
    assert nodes[0].call("refusals") == [
        "PeerUnknownError",
        "PeerUnknownError",
        "TransferError",
        "TransferError",
        "TransferError",
        "TransferError",
        "TransferError",
        "DONE",
        "PeerUnknownError",
    ]


def test_unknown_backends_are_named():
    with pytest.raises(TransferUnavailableError, match="known: nixl, local"):
        create_transfer_agent("rdma", "a#0")
    agent = create_transfer_agent("local", "factory#0")
    with pytest.raises(TransferError, match="exists already"):
        create_transfer_agent("local", "factory#0")
    agent.close()


# ---------------------------------------------------------------- chunks and the link's limit

SPANS = st.lists(
    st.builds(Span, st.integers(0, 1 << 40), st.integers(0, 1 << 40), st.integers(1, 5000)),
    max_size=20,
)


def pairs(spans: Sequence[Span]) -> list[tuple[int, int]]:
    """(local, remote) of every byte, in order."""
    return [
        (span.local_address + i, span.remote_address + i)
        for span in spans
        for i in range(span.nbytes)
    ]


@given(SPANS, st.integers(1, 9000))
def test_chunks_hold_every_byte_once_in_order(spans: list[Span], chunk_bytes: int):
    chunks = list(cut_spans(spans, chunk_bytes))
    sizes = [sum(span.nbytes for span in chunk) for chunk in chunks]
    assert pairs([span for chunk in chunks for span in chunk]) == pairs(spans)
    assert all(size == chunk_bytes for size in sizes[:-1])
    assert all(0 < size <= chunk_bytes for size in sizes)


def test_spans_that_continue_each_other_become_one():
    spans = [Span(0, 100, 10), Span(10, 110, 5), Span(15, 200, 5), Span(20, 205, 1)]
    assert list(merge_spans(spans)) == [Span(0, 100, 15), Span(15, 200, 6)]
    assert list(merge_spans([])) == []


def test_a_span_needs_bytes():
    with pytest.raises(TransferError, match="needs bytes"):
        Span(0, 0, 0)


def test_token_bucket_keeps_to_the_rate_and_holds_no_credit():
    bucket = TokenBucket(8.0)  # one byte in a nanosecond
    assert bucket.wait_ns(0) == 0
    bucket.take(1000, 0)
    assert bucket.wait_ns(0) == 1000
    assert bucket.wait_ns(600) == 400
    bucket.take(1000, 600)
    assert bucket.wait_ns(600) == 1400
    assert bucket.wait_ns(5000) == 0
    bucket.take(1000, 5000)
    bucket.take(1000, 5000)
    assert bucket.wait_ns(5000) == 2000
    free = TokenBucket(None)
    free.take(1 << 40, 0)
    assert free.wait_ns(0) == 0


@pytest.mark.parametrize("wrong", [{"gbps": 0.0}, {"kv_chunk_bytes": 0}, {"jobs_in_flight": 0}])
def test_wrong_settings_are_refused(wrong: dict[str, Any]):
    with pytest.raises(TransferError, match="positive"):
        PumpSettings(**wrong)


# ---------------------------------------------------------------- the pump's order


class LoggingAgent(LocalAgent):
    """Remembers the first remote address and the size of each pull."""

    def __init__(self, name: str, fabric: LocalFabric) -> None:
        super().__init__(name, fabric)
        self.begun: list[tuple[int, int]] = []

    def begin_pull(self, peer: str, spans: Sequence[Span]) -> PullHandle:
        handle = super().begin_pull(peer, spans)
        self.begun.append((spans[0].remote_address, sum(span.nbytes for span in spans)))
        return handle


class Bench:
    """A schedule over memory of a few KB, on a manual fabric, at a time that the test sets."""

    KV, WEIGHTS = 100, 400

    def __init__(self, gate: Callable[[], bool] | None = None, **settings: Any) -> None:
        self.now_ns = 1000
        self.fabric = LocalFabric(manual=True)
        self.source = np.arange(20_000, dtype=np.uint64).view(np.uint8)
        self.target = np.zeros_like(self.source)
        self.agent = LoggingAgent("reader#0", self.fabric)
        self.agent.register(self.target.ctypes.data, self.target.nbytes)
        for peer in ("a#0", "b#0"):
            LocalAgent(peer, self.fabric).register(self.source.ctypes.data, self.source.nbytes)
        chunks = {"kv_chunk_bytes": self.KV, "weights_chunk_bytes": self.WEIGHTS}
        self.schedule = PullSchedule(
            self.agent, PumpSettings(**{**chunks, **settings}), gate, lambda: self.now_ns
        )
        for peer in ("a#0", "b#0"):
            self.schedule.add_peer(peer, peer.encode())

    def span(self, offset: int, nbytes: int) -> Span:
        return Span(self.target.ctypes.data + offset, self.source.ctypes.data + offset, nbytes)

    def submit(
        self,
        job: int,
        nbytes: int,
        priority: Priority = Priority.KV,
        peer: str = "a#0",
    ) -> None:
        """Job `job` pulls the bytes from 2000 x job on."""
        self.schedule.submit(PullJob(job, peer, (self.span(2000 * job, nbytes),), priority))

    def step(self, count: int = 1) -> int:
        """Rounds without and then one with the end of what is in flight."""
        for _ in range(count):
            self.schedule.step()
            self.fabric.step(10)
        return self.schedule.step()

    def drain(self) -> list[PullDone]:
        for _ in range(1000):
            if self.schedule.idle:
                return self.schedule.take_done()
            self.step()
        raise AssertionError("the schedule does not come to an end")

    @property
    def begun(self) -> list[tuple[int, int]]:
        """(job, bytes) of each chunk in the order of their starts."""
        return [((at - self.source.ctypes.data) // 2000, n) for at, n in self.agent.begun]


def test_kv_goes_before_the_next_chunk_of_weights():
    bench = Bench()
    bench.submit(1, 1000, Priority.WEIGHTS)
    bench.schedule.step()
    assert bench.begun == [(1, 400)]
    bench.submit(2, 150)
    bench.submit(3, 100)
    bench.schedule.step()
    assert bench.begun == [(1, 400)]  # one in flight
    done = bench.drain()
    assert bench.begun == [(1, 400), (2, 100), (2, 50), (3, 100), (1, 400), (1, 200)]
    assert [(d.id, d.nbytes, d.error) for d in done] == [
        (2, 150, None),
        (3, 100, None),
        (1, 1000, None),
    ]
    assert np.array_equal(bench.target[2000:3000], bench.source[2000:3000])


def test_uncoordinated_jobs_go_whole_and_several_at_once():
    bench = Bench(gate=lambda: True, coordinated=False)
    for job in range(1, 7):
        bench.submit(job, 1500, Priority(job % 2))
    for _ in range(8):
        bench.schedule.step()
    assert bench.begun == [(2, 1500), (4, 1500), (6, 1500), (1, 1500)]
    assert bench.fabric.pulls_in_progress == 4
    assert [d.id for d in bench.drain()] == [2, 4, 6, 1, 3, 5]


def test_the_gate_holds_back_the_next_chunk_only():
    waiting = False
    bench = Bench(gate=lambda: waiting)
    bench.submit(1, 300)
    bench.schedule.step()
    waiting = True
    bench.step(5)
    assert bench.begun == [(1, 100)]
    assert 0 < bench.schedule.step() <= 100_000
    waiting = False
    assert [d.nbytes for d in bench.drain()] == [300]


def test_the_limit_of_the_link_spaces_chunks():
    bench = Bench(gbps=8.0)
    bench.submit(1, 250)
    bench.step(5)
    assert bench.begun == [(1, 100)]
    bench.now_ns += 99
    bench.step()
    assert len(bench.begun) == 1
    bench.now_ns += 1
    bench.step()
    assert len(bench.begun) == 2
    bench.now_ns += 100
    bench.step()
    [done] = bench.schedule.take_done()
    assert (done.nbytes, done.elapsed_ns) == (250, 200)


def test_what_waits_is_cancelled_at_once_and_what_flies_when_it_lands():
    bench = Bench()
    bench.submit(1, 300)
    bench.submit(2, 300)
    bench.submit(3, 300, peer="b#0")
    bench.schedule.step()
    bench.schedule.cancel(lambda job: job.peer == "a#0", "deadline")
    assert bench.schedule.take_done() == [PullDone(2, 0, 0, "deadline")]
    assert bench.schedule.quarantined == (1,)
    assert not bench.schedule.idle
    bench.schedule.step()
    assert bench.begun == [(1, 100), (3, 100)]  # it takes no place of others
    bench.now_ns += 7
    done = bench.drain()
    assert done == [PullDone(1, 100, 7, "deadline"), PullDone(3, 300, 7, None)]
    assert bench.schedule.quarantined == ()
    assert bench.begun == [(1, 100), (3, 100), (3, 100), (3, 100)]


def test_a_failed_chunk_ends_its_job_only():
    bench = Bench()
    bench.submit(1, 300)
    bench.submit(2, 100, peer="b#0")
    bench.step()
    bench.schedule.step()
    bench.fabric.fail("a#0", "cut")
    assert [(d.id, d.nbytes, d.error) for d in bench.drain()] == [(1, 100, "cut"), (2, 100, None)]


def test_a_removed_peer_is_forgotten_after_its_last_pull():
    bench = Bench()
    bench.submit(1, 300)
    bench.schedule.step()
    bench.schedule.remove_peer("a#0")
    with pytest.raises(TransferError, match="known already"):
        bench.agent.add_peer("a#0", b"a#0")
    bench.schedule.add_peer("a#0", b"a#0")
    bench.submit(2, 100)
    assert "is being removed" in str(bench.schedule.take_done()[0].error)
    bench.step()
    bench.submit(3, 100)
    assert [(d.id, d.error) for d in bench.drain()] == [(1, "a#0 was removed"), (3, None)]
    bench.schedule.remove_peer("a#0")
    with pytest.raises(PeerUnknownError):
        bench.agent.remove_peer("a#0")
    bench.submit(4, 100)
    assert "add it first" in str(bench.schedule.take_done()[0].error)


def test_a_peer_that_the_agent_refuses_says_why_in_its_jobs():
    bench = Bench()
    bench.schedule.add_peer("c#0", b"d#0")
    bench.submit(1, 100, peer="c#0")
    assert "not the metadata of c#0" in str(bench.schedule.take_done()[0].error)
    bench.schedule.add_peer("c#0", b"c#0")
    bench.submit(2, 100, peer="c#0")
    assert "is gone" in str(bench.drain()[0].error)


def test_bytes_that_nobody_registered_end_the_job():
    bench = Bench()
    bench.schedule.submit(PullJob(1, "a#0", (Span(0, 0, 10),)))
    bench.schedule.submit(PullJob(2, "a#0", ()))
    assert bench.schedule.take_done() == [PullDone(2, 0, 0, None)]
    [done] = bench.drain()
    assert "not registered" in str(done.error)


def test_stats_count_chunks_bytes_and_the_time_in_flight():
    bench = Bench()
    bench.submit(1, 150)
    bench.schedule.step()
    bench.now_ns += 10
    bench.step()
    bench.now_ns += 1000
    bench.drain()
    bench.now_ns += 1000
    bench.schedule.step()
    stats = bench.schedule.stats
    assert (stats.nbytes, stats.chunks, stats.busy_ns) == (150, 2, 1010)


def test_idle_rests_are_long():
    bench = Bench()
    assert bench.schedule.step() == 5_000_000
    bench.submit(1, 300)
    assert bench.schedule.step() == 0
    assert bench.schedule.step() == 100_000
    bench.schedule.cancel(lambda job: True, "x")
    assert bench.schedule.step() == 5_000_000  # for ever, perhaps
    bench.drain()
    LocalAgent("c#0", bench.fabric).add_peer("reader#0", b"reader#0")
    lonely = PullSchedule(LocalAgent("d#0", bench.fabric), PumpSettings())
    assert lonely.step() == 50_000_000


@pytest.mark.parametrize("seed", range(30))
def test_every_job_ends_once_and_writes_nothing_afterwards(seed: int):
    """Random jobs, cancels, faults and removals; `bench.target` is checked at every end."""
    rng = random.Random(seed)
    bench = Bench(coordinated=seed % 3 != 0)
    ended: dict[int, bytes] = {}

    def region(job: int) -> bytes:
        return bench.target[2000 * job : 2000 * (job + 1)].tobytes()

    def note() -> None:
        for done in bench.schedule.take_done():
            assert done.id not in ended
            ended[done.id] = region(done.id)
            if done.error is None:
                expected = bench.source[2000 * done.id :][: done.nbytes]
                assert ended[done.id][: done.nbytes] == expected.tobytes()

    jobs = 60
    for job in range(jobs):
        peer = rng.choice(["a#0", "b#0"])
        bench.submit(job, rng.randint(1, 2000), Priority(rng.randint(0, 1)), peer)
        for _ in range(rng.randint(0, 4)):
            action = rng.randrange(12)
            if action < 5:
                bench.schedule.step()
            elif action < 9:
                bench.fabric.step(rng.randint(1, 3))
            elif action == 9:
                bench.schedule.cancel(lambda job: job.peer == peer, "x")  # noqa: B023
            elif action == 10:
                bench.fabric.fail(peer)
            else:
                bench.schedule.remove_peer(peer)
                bench.schedule.add_peer(peer, peer.encode())
            note()
    while not bench.schedule.idle:
        bench.schedule.step()
        bench.fabric.step()
        note()
    note()
    assert sorted(ended) == list(range(jobs))
    assert {job: region(job) for job in ended} == ended
    assert bench.schedule.quarantined == ()


# ---------------------------------------------------------------- the pump's thread


class Line:
    """A pump and one source on a manual fabric."""

    def __init__(self) -> None:
        self.fabric = LocalFabric(manual=True)
        self.memory = np.zeros(1 << 16, np.uint8)
        self.range = MemoryRange(self.memory.ctypes.data, self.memory.nbytes)
        LocalAgent("s#0", self.fabric).register(self.range.address, self.range.nbytes)
        self.agents: list[LocalAgent] = []
        self.pump = Pump(self.open, [self.range])
        self.pump.add_peer("s#0", b"s#0")

    def open(self) -> TransferAgent:
        self.agents.append(LocalAgent("r#0", self.fabric))
        return self.agents[-1]

    def job(self, number: int) -> PullJob:
        start = self.range.address
        return PullJob(number, "s#0", (Span(start, start + 4096, 4096),))


@pytest.fixture
def line() -> Iterator[Line]:
    made = Line()
    yield made
    made.pump.close()


def advance(fabric: LocalFabric, pulls: int) -> None:
    """Wait until `pulls` have begun, and end them."""
    deadline = time.monotonic() + DEADLINE_S
    while pulls:
        assert time.monotonic() < deadline
        pulls -= fabric.step()


def test_the_wake_fd_tells_of_completions(line: Line):
    assert (line.pump.name, line.pump.metadata) == ("r#0", b"r#0")
    line.pump.submit(line.job(1))
    line.pump.submit(line.job(2))
    assert line.pump.completions() == []
    advance(line.fabric, 2)
    assert [(d.id, d.error) for d in wait_done(line.pump, 2)] == [(1, None), (2, None)]
    assert select.select([line.pump.wake_fd], [], [], 0) == ([], [], [])
    assert line.pump.stats.nbytes == 8192


def test_close_ends_what_waits_and_leaves_what_is_stuck(line: Line):
    line.pump.submit(line.job(1))
    deadline = time.monotonic() + DEADLINE_S
    while not line.fabric.pulls_in_progress:
        assert time.monotonic() < deadline
    line.pump.submit(line.job(2))
    begun = time.monotonic()
    line.pump.close()
    assert time.monotonic() - begun < 2
    assert [(d.id, d.error) for d in line.pump.completions()] == [(2, "the pump is closing")]
    assert line.pump.quarantined == (1,)
    assert not [t for t in threading.enumerate() if t.name == "kunserve-pump"]
    with pytest.raises(TransferError, match="closed"):
        line.pump.submit(line.job(3))
    line.pump.close()


def test_a_pump_that_cannot_start_says_so(line: Line):
    with pytest.raises(TransferError, match="exists already"):
        Pump(line.open, [line.range])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_pump_whose_thread_died_says_so(line: Line):
    def broken(job: PullJob) -> bool:
        raise ZeroDivisionError

    line.pump.submit(line.job(1))
    line.pump.cancel(broken)
    select.select([line.pump.wake_fd], [], [], DEADLINE_S)
    with pytest.raises(TransferError, match="has died"):
        line.pump.completions()
    with pytest.raises(TransferError, match="has died"):
        line.pump.submit(line.job(2))


if __name__ == "__main__":
    serve(sys.argv[1])
