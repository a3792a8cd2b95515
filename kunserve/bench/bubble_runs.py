"""A queue on a server of its own whose two instances are merged, for `kunserve bench bubbles`.

What a stage computes is the CPU time of its compute thread; the rest of the time it was idle or
waited for a core, so bubbles are upper limits.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from kunserve.bench.client import BenchError
from kunserve.bench.cluster import (
    NS_PER_S,
    BenchServer,
    Stream,
    bench_server,
    compute_cpu_s,
)
from kunserve.bench.workload import RequestShape

_FLAGS = (
    *("--instances", "2", "--threads-per-instance", "1"),
    *("--no-enable-prefix-caching", "--max-num-seqs", "256"),
)
_POLL_S = 0.02
_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class ServedQueue:
    """One queue, served. Bubbles of the stages in ring order."""

    elapsed_s: float
    queue_s: float
    bubbles: tuple[float, ...]
    queue_bubbles: tuple[float, ...]
    mean_first_token_s: float
    preemptions: int


async def serve_queue(
    queue: Sequence[RequestShape], flags: Sequence[str], kv_cache: str
) -> ServedQueue:
    """Start, merge, send all requests at once, wait for the last token, end.

    Raises:
        BenchError: a request failed, or the merge was refused.
    """
    async with bench_server((*_FLAGS, "--kv-cache-memory-bytes", kv_cache, *flags)) as server:
        await server.change("drop")
        return await _serve(server, queue)


async def _serve(server: BenchServer, queue: Sequence[RequestShape]) -> ServedQueue:
    pids = await _stage_pids(server)
    (before,) = await server.counters("num_preemptions")
    begin_ns, begin_cpu = time.monotonic_ns(), _cpu_s(pids)
    streams = [server.send(shape.prompt_tokens, shape.output_tokens) for shape in queue]
    await _until(streams, 1)
    queue_s, queue_cpu = _since(begin_ns), _cpu_s(pids)
    await asyncio.gather(*(stream.task for stream in streams if stream.task is not None))
    elapsed_s, end_cpu = _since(begin_ns), _cpu_s(pids)
    _check(streams, queue)
    (after,) = await server.counters("num_preemptions")
    return ServedQueue(
        elapsed_s=elapsed_s,
        queue_s=queue_s,
        bubbles=_bubbles(begin_cpu, end_cpu, elapsed_s),
        queue_bubbles=_bubbles(begin_cpu, queue_cpu, queue_s),
        mean_first_token_s=statistics.mean(stream.first_token_ms for stream in streams) / 1000,
        preemptions=round(sum(after.values()) - sum(before.values())),
    )


async def _stage_pids(server: BenchServer) -> tuple[int, ...]:
    layout = await server.layout()
    pid_of = {instance.id: instance.pid for instance in layout.instances}
    pids = [pid_of[stage.instance] for group in layout.groups for stage in group.stages]
    return tuple(pid for pid in pids if pid is not None)


async def _until(streams: Sequence[Stream], tokens: int) -> None:
    """Wait until every stream has so many tokens."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    while any(len(stream.token_ns) < tokens for stream in streams):
        failed = next((stream.error for stream in streams if stream.error), None)
        if failed or time.monotonic() > deadline_s:
            raise BenchError(f"not all requests got their first token: {failed or 'too slow'}")
        await asyncio.sleep(_POLL_S)


def _check(streams: Sequence[Stream], queue: Sequence[RequestShape]) -> None:
    for stream, shape in zip(streams, queue, strict=True):
        if stream.error or len(stream.token_ns) != shape.output_tokens:
            raise BenchError(
                f"a request ended after {len(stream.token_ns)} of {shape.output_tokens} tokens: "
                f"{stream.error}"
            )


def _since(begin_ns: int) -> float:
    return (time.monotonic_ns() - begin_ns) / NS_PER_S


def _cpu_s(pids: Sequence[int]) -> tuple[float, ...]:
    return tuple(map(compute_cpu_s, pids))


def _bubbles(
    before_s: Sequence[float], after_s: Sequence[float], elapsed_s: float
) -> tuple[float, ...]:
    return tuple(
        1.0 - (after - before) / elapsed_s for before, after in zip(before_s, after_s, strict=True)
    )
