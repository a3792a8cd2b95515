"""The runs of `kunserve bench transition`: each brings a server into a state, drops and restores,
and returns what it saw. All latencies are seen from the client's side."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from kunserve.bench.client import BenchError
from kunserve.bench.cluster import (
    NS_PER_MS,
    NS_PER_S,
    BenchServer,
    LayoutInfo,
    Stream,
    TransitionFigures,
    TransitionInfo,
)

BLOCK_TOKENS = 16
CHUNK_TOKENS = 512
CHUNK_FLAGS = ("--max-num-batched-tokens", str(CHUNK_TOKENS + 1), "--no-drop")
"""One decode and a chunk of 512 tokens in each step."""

_IN_CHUNK_S = 0.15
_CHUNK_GAP_MS = 250.0
"""A decode that has waited so long was in a step with the long chunk."""

_SMALL_PROMPT, _SMALL_STREAMS = 48, 8
_ENDLESS = 1024
_STEADY_S = 1.0
_WHOLE_TIMEOUT_S = 20.0


# ---------------------------------------------------------------- what was seen


@dataclass(frozen=True)
class ControlRun:
    """A drop while KV is full and a chunk of 512 tokens is computed on each instance.

    `first_token_ms`: from the command to the first token of a request that did not fit before.
    `own_ms`: its time to first token alone, on the idle pair.
    """

    drop: TransitionFigures
    text: str
    first_token_ms: float
    own_ms: float

    @property
    def control_ms(self) -> float:
        """All but the request's own prefill."""
        return self.first_token_ms - self.own_ms


@dataclass(frozen=True)
class IdleRun:
    """A drop while nothing is computed: two long requests, whose KV moves."""

    drop: TransitionFigures
    text: str


@dataclass(frozen=True)
class LoadedRun:
    """A drop and a restore while short streams decode on both instances and two long ones stand.

    `step_ms`: median time between tokens before the drop. `queued_extra_ms`: how much longer than
    the median of requests before the drop one that was sent with the command waited for its first
    token. PSS: sum over instances, before the drop, merged, and after the restore. `stage_cpu_s`:
    what each stage computed in a second of the merged pair.
    """

    drop: TransitionFigures
    restore: TransitionFigures | None
    texts: tuple[str, ...]
    step_ms: float
    queued_extra_ms: float
    drop_gap_ms: float
    drop_gap_short_ms: float
    restore_gap_ms: float
    pss_bytes: tuple[int, ...]
    kv_tokens_before: int
    kv_tokens_merged: int
    stage_cpu_s: tuple[float, ...]

    @property
    def imbalance(self) -> float:
        """1 - mean / most of the stages' computing."""
        return 1 - statistics.mean(self.stage_cpu_s) / max(self.stage_cpu_s)


# ---------------------------------------------------------------- control part


async def run_control(server: BenchServer) -> ControlRun:
    """See `ControlRun`.

    Raises:
        BenchError: the state could not be brought about.
    """
    await _be_whole(server)
    fillers, prefills = await _fill_cache(server)
    await _wait_for_second_chunk(fillers)
    newcomer = server.send(BLOCK_TOKENS, 4)
    await asyncio.sleep(_IN_CHUNK_S)
    if newcomer.token_ns:
        raise BenchError("the cache was not full before the drop")
    if any(stream.token_ns for stream in prefills):
        raise BenchError("the long chunk was over before the drop")
    begin_ns = time.monotonic_ns()
    last = await server.change("drop")
    await newcomer.reached(1)
    await server.end([*fillers, *prefills, newcomer])
    await server.idle()
    own_ms = []
    for _ in range(3):
        alone = server.send(BLOCK_TOKENS, 4)
        await alone.reached(4)
        own_ms.append(alone.first_token_ms)
    return ControlRun(
        drop=last.figures,
        text=last.text,
        first_token_ms=(newcomer.token_ns[0] - begin_ns) / NS_PER_MS,
        own_ms=statistics.median(own_ms),
    )


async def _fill_cache(server: BenchServer) -> tuple[list[Stream], list[Stream]]:
    """On each instance one request that decodes, then one whose prompt takes two chunks; together
    they leave a block, too little for a newcomer and the reserve."""
    capacity = min(group.kv_tokens for group in (await server.layout()).groups)
    prompt = capacity - 2 * CHUNK_TOKENS - BLOCK_TOKENS - 12
    fillers = [server.send(prompt, capacity - prompt) for _ in range(2)]
    for filler in fillers:
        await filler.reached(1)
    prefills = [server.send(2 * CHUNK_TOKENS, 16) for _ in range(2)]
    return fillers, prefills


async def _wait_for_second_chunk(fillers: Sequence[Stream]) -> None:
    """Each filler gets one token a step: its first long gap is the first chunk."""
    since_ns = [filler.token_ns[-1] + 1 for filler in fillers]
    for filler, begin_ns in zip(fillers, since_ns, strict=True):
        while not any(gap > _CHUNK_GAP_MS for gap in filler.gaps_ms(begin_ns)):
            await filler.reached(len(filler.token_ns) + 1)


# ---------------------------------------------------------------- exchange


async def run_idle(server: BenchServer) -> IdleRun:
    """See `IdleRun`."""
    await _be_whole(server)
    capacity = min(group.kv_tokens for group in (await server.layout()).groups)
    longs = [server.send(capacity * 7 // 8, _ENDLESS // 8) for _ in range(2)]
    for stream in longs:
        await stream.reached(1)
    last = await server.change("drop")
    await server.end(longs)
    return IdleRun(last.figures, last.text)


async def run_loaded(server: BenchServer, *, restores: bool = True) -> LoadedRun:
    """See `LoadedRun`. With `restores` false it ends merged."""
    await _be_whole(server)
    before = await server.layout()
    capacity = min(group.kv_tokens for group in before.groups)
    # All of it must still fit the homes of a restore, which leave room for the parts to come.
    longs = [server.send(capacity * 3 // 8, 160) for _ in range(2)]
    for stream in longs:
        await stream.reached(1)
    shorts = [server.send(_SMALL_PROMPT, _ENDLESS) for _ in range(_SMALL_STREAMS)]
    for stream in shorts:
        await stream.reached(5)
    step_ms, wait_ms = await _steady(server, shorts)
    pss = [server.pss_bytes()]
    streams = [*longs, *shorts]
    queued = server.send(BLOCK_TOKENS, 4)
    await asyncio.sleep(0.005)
    drop_ns = time.monotonic_ns()
    drop = await server.change("drop")
    done_ns = time.monotonic_ns()
    merged = await server.layout()
    await queued.reached(1)
    stage_cpu_s = await _busy_stages(server)
    pss.append(server.pss_bytes())
    _check(streams)
    restore, restore_gap_ms = None, 0.0
    if restores:
        restore, restore_gap_ms = await _restore(server, streams)
        pss.append(server.pss_bytes())
    await server.end(streams)
    return LoadedRun(
        drop=drop.figures,
        restore=restore.figures if restore else None,
        texts=tuple(each.text for each in (drop, restore) if each),
        step_ms=step_ms,
        queued_extra_ms=queued.first_token_ms - wait_ms,
        drop_gap_ms=_largest_gap(streams, drop_ns, done_ns),
        drop_gap_short_ms=_largest_gap(shorts, drop_ns, done_ns),
        restore_gap_ms=restore_gap_ms,
        pss_bytes=tuple(pss),
        kv_tokens_before=_tokens(before),
        kv_tokens_merged=_tokens(merged),
        stage_cpu_s=stage_cpu_s,
    )


async def _steady(server: BenchServer, shorts: Sequence[Stream]) -> tuple[float, float]:
    """Before the drop: the median time between tokens, and to the first token of a newcomer."""
    begin_ns = time.monotonic_ns()
    waits_ms = []
    for _ in range(5):
        newcomer = server.send(BLOCK_TOKENS, 2)
        await newcomer.reached(2)
        waits_ms.append(newcomer.first_token_ms)
    gaps = [gap for stream in shorts for gap in stream.gaps_ms(begin_ns)]
    return statistics.median(gaps), statistics.median(waits_ms)


async def _busy_stages(server: BenchServer) -> tuple[float, ...]:
    """Seconds that each stage computes in a second. The steady part of the merged pair."""
    await asyncio.sleep(_STEADY_S / 2)
    begin = await server.generated()
    await asyncio.sleep(2 * _STEADY_S)
    end = await server.generated()
    elapsed_s = (end.at_ns - begin.at_ns) / NS_PER_S
    pairs = zip(begin.compute_cpu_s, end.compute_cpu_s, strict=True)
    return tuple((after - before) / elapsed_s for before, after in pairs)


async def _restore(server: BenchServer, streams: Sequence[Stream]) -> tuple[TransitionInfo, float]:
    begin_ns = time.monotonic_ns()
    restore = await server.change("restore")
    end_ns = time.monotonic_ns()
    await asyncio.sleep(_STEADY_S / 2)
    running = [stream for stream in streams if not (stream.task and stream.task.done())]
    return restore, _largest_gap(running, begin_ns, end_ns)


def _largest_gap(streams: Sequence[Stream], begin_ns: int, end_ns: int) -> float:
    gaps = [gap for stream in streams for gap in stream.gaps_ms(begin_ns, end_ns)]
    return max(gaps, default=0.0)


def _tokens(layout: LayoutInfo) -> int:
    return sum(group.kv_tokens for group in layout.groups)


def _check(streams: Sequence[Stream]) -> None:
    for stream in streams:
        if stream.error:
            raise BenchError(f"a stream failed: {stream.error}")


async def _be_whole(server: BenchServer) -> None:
    """Nothing runs, and every instance is whole."""
    deadline_s = time.monotonic() + _WHOLE_TIMEOUT_S
    while True:
        await server.idle()
        if len((await server.layout()).groups) > 1:
            return
        try:
            await server.change("restore")
        except BenchError:  # a leader may still hold a request that was just broken off
            if time.monotonic() > deadline_s:
                raise
            await asyncio.sleep(0.2)


async def hold_load(server: BenchServer) -> list[Stream]:
    """Streams that keep both cores busy until they are ended."""
    await _be_whole(server)
    shorts = [server.send(_SMALL_PROMPT, _ENDLESS) for _ in range(_SMALL_STREAMS)]
    for stream in shorts:
        await stream.reached(2)
    return shorts
