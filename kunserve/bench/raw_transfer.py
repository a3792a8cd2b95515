"""What the transfer library alone reaches between two processes: 64 MiB requests of scattered
pages through the same pump, without coordination."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from kunserve.bench.client import BenchError
from kunserve.device.arena import create_arena
from kunserve.device.transfer import (
    MemoryRange,
    PullJob,
    Pump,
    PumpSettings,
    Span,
    create_transfer_agent,
)

PAGE_BYTES = 192 << 10
REQUEST_BYTES = 64 << 20
_NUM_PAGES = REQUEST_BYTES // PAGE_BYTES
_TIMEOUT_S = 60.0


class _Door(NamedTuple):
    """What the other process needs: where our pages begin, and the agent's metadata."""

    address: int
    metadata: bytes


class RawRates(NamedTuple):
    """Bytes per second: of one direction alone, and of both at once together."""

    one_way: float
    both_ways: float


def measure_raw_rates(num_requests: int) -> RawRates:
    """Two processes pull `num_requests` from each other.

    Raises:
        BenchError: a process failed.
    """
    context = multiprocessing.get_context("spawn")
    ends = [context.Pipe() for _ in range(2)]
    workers = [
        context.Process(target=_pull, args=(number, num_requests, ends[number][1]), daemon=True)
        for number in range(2)
    ]
    for worker in workers:
        worker.start()
    pipes = [ours for ours, _ in ends]
    try:
        doors = [_receive(pipe) for pipe in pipes]
        for pipe, door in zip(pipes, reversed(doors), strict=True):
            pipe.send(door)
        _rate(pipes, num_requests)  # the first use of memory pays for page faults
        return RawRates(_rate(pipes[:1], num_requests), _rate(pipes, num_requests))
    finally:
        for pipe, worker in zip(pipes, workers, strict=True):
            pipe.close()
            worker.join(5.0)
            worker.kill()


def _rate(pullers: Sequence[Connection], num_requests: int) -> float:
    """Bytes per second of all `pullers` together, which pull at the same time."""
    for pipe in pullers:
        pipe.send("pull")
    elapsed_s: float = max(_receive(pipe) for pipe in pullers)
    return len(pullers) * num_requests * REQUEST_BYTES / elapsed_s


def _receive(pipe: Connection) -> Any:
    try:
        if not pipe.poll(_TIMEOUT_S):
            raise BenchError(f"the raw transfer takes longer than {_TIMEOUT_S:.0f} s")
        return pipe.recv()
    except (EOFError, OSError) as error:
        raise BenchError("a process of the raw transfer ended") from error


def _pull(number: int, num_requests: int, pipe: Connection) -> None:
    """One of the two processes: pulls whenever it is told to, until the pipe closes."""
    arena = create_arena("host", page_bytes=PAGE_BYTES, num_pages=2 * _NUM_PAGES)
    arena.view(arena.identity.address, arena.identity.nbytes)[:] = number
    pump = Pump(
        lambda: create_transfer_agent("nixl", f"raw-{number}"),
        [MemoryRange(arena.identity.address, arena.identity.nbytes)],
        settings=PumpSettings(coordinated=False, jobs_in_flight=1),
    )
    try:
        pipe.send(_Door(arena.identity.address, pump.metadata))
        other = pipe.recv()
        peer = f"raw-{1 - number}"
        pump.add_peer(peer, other.metadata)
        spans = _scattered(arena.identity.address, other.address)
        while pipe.recv():
            begin_s = time.monotonic()
            _run(pump, [PullJob(job, peer, spans) for job in range(num_requests)])
            pipe.send(time.monotonic() - begin_s)
    except (EOFError, OSError):
        pass  # the benchmark has what it wants
    finally:
        pump.close()
        arena.close()


def _scattered(local: int, remote: int) -> tuple[Span, ...]:
    """The other's first pages into our last ones, in an order in which no two continue each other
    on both sides."""
    sources = list(range(_NUM_PAGES))
    random.Random(0).shuffle(sources)
    return tuple(
        Span(local + (_NUM_PAGES + target) * PAGE_BYTES, remote + source * PAGE_BYTES, PAGE_BYTES)
        for target, source in enumerate(sources)
    )


def _run(pump: Pump, jobs: list[PullJob]) -> None:
    for job in jobs:
        pump.submit(job)
    left = len(jobs)
    while left:
        for done in pump.completions():
            if done.error is not None:
                raise BenchError(f"a raw transfer failed: {done.error}")
            left -= 1
        time.sleep(0.0002)
