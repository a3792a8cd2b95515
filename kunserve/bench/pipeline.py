"""`kunserve bench pipeline`: two whole instances with b requests each against the merged pair with
2b, which runs them as two microbatches of b.

    whole    0: [ all layers of b requests ]     1: [ all layers of b others ]
    merged   0: [ head B, first layers B ][ head A, first layers A ] ...
             1: [ last layers A          ][ last layers B          ] ...

Both compute the same tokens and read each weight equally often, so the ratio shows what the ring
itself costs: imbalance of the stages, and time between the pieces of work. Measured on one server,
in turn, so that a machine that drifts does not matter. Requests are endless and not streamed: front
and client cost next to nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kunserve.bench.client import BenchError
from kunserve.bench.cluster import NS_PER_S, BenchServer, Sample, as_json, bench_server
from kunserve.core.errors import ConfigError

SCHEMA = "kunserve.bench.pipeline/1"
WHOLE, MERGED = "whole", "merged"
TARGET_RATIO = 0.90
_FLAGS = (
    *("--instances", "2", "--threads-per-instance", "1"),
    *("--no-enable-prefix-caching", "--no-drop"),
)
_RUN_IN_S = 1.0
_START_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class PipelineOptions:
    """What is measured: `repeats` windows of `window_s` for each batch and layout."""

    batch_sizes: tuple[int, ...]
    context_tokens: int
    window_s: float
    repeats: int
    kv_cache: str


@dataclass(frozen=True)
class Window:
    """One measured window. `stage_cpu_s`: what the compute thread of each instance had of a core.

    `split`: layers of each stage; empty for whole instances.
    """

    layout: str
    batch_size: int
    elapsed_s: float
    tokens: float
    stage_cpu_s: tuple[float, ...]
    split: tuple[int, ...]

    @property
    def tokens_per_s(self) -> float:
        """Throughput of both instances."""
        return self.tokens / self.elapsed_s

    @property
    def idle(self) -> tuple[float, ...]:
        """Share of the time that each stage was not on a core, though requests never ran out."""
        return tuple(1 - cpu_s / self.elapsed_s for cpu_s in self.stage_cpu_s)

    @property
    def imbalance(self) -> float:
        """1 - mean / most of the stages' computing."""
        return 1 - statistics.mean(self.stage_cpu_s) / max(self.stage_cpu_s)

    @property
    def cpu_ms_per_token(self) -> float:
        """Computing of all stages for one token."""
        return sum(self.stage_cpu_s) * 1000 / self.tokens


@dataclass(frozen=True)
class BatchResult:
    """All windows of one batch size, in the order they were measured."""

    batch_size: int
    windows: tuple[Window, ...]

    def of(self, layout: str) -> list[Window]:
        """The windows of one layout."""
        return [window for window in self.windows if window.layout == layout]

    @property
    def ratios(self) -> list[float]:
        """Throughput of each merged window over that of the whole one right before it."""
        pairs = zip(self.of(MERGED), self.of(WHOLE), strict=True)
        return [merged.tokens_per_s / whole.tokens_per_s for merged, whole in pairs]

    @property
    def ratio(self) -> float:
        """The median of the pairs."""
        return statistics.median(self.ratios)


async def measure(
    options: PipelineOptions, flags: Sequence[str], log: Callable[[str], None]
) -> list[BatchResult]:
    """All batch sizes on one server.

    Raises:
        BenchError: a request failed or a transition was refused.
    """
    log("starting two instances of one thread each")
    all_flags = (*_FLAGS, "--kv-cache-memory-bytes", options.kv_cache, *flags)
    async with bench_server(all_flags) as server:
        results = []
        for batch_size in options.batch_sizes:
            windows = []
            for repeat in range(options.repeats):
                for layout in (WHOLE, MERGED):
                    window = await _window(server, options, layout, batch_size)
                    windows.append(window)
                    log(
                        f"batch {batch_size}, {repeat + 1} of {options.repeats}: {layout} "
                        f"{window.tokens_per_s:.0f} tokens/s"
                    )
            results.append(BatchResult(batch_size, tuple(windows)))
        return results


async def _window(
    server: BenchServer, options: PipelineOptions, layout: str, batch_size: int
) -> Window:
    """Bring the layout about, let 2b requests decode, measure, break them off."""
    await server.idle()
    stages = [group.stages for group in (await server.layout()).groups]
    if (len(stages) == 1) != (layout == MERGED):
        await server.change("drop" if layout == MERGED else "restore")
        stages = [group.stages for group in (await server.layout()).groups]
    limit = options.context_tokens * 8 + 4096 // batch_size
    streams = [
        server.send(options.context_tokens, limit, streamed=False) for _ in range(2 * batch_size)
    ]
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while not await _is_spread(server, layout, batch_size):
        _check(streams)
        if time.monotonic() > deadline_s:
            raise BenchError(f"{layout}: not {2 * batch_size} requests run, evenly spread")
        await asyncio.sleep(0.1)
    await asyncio.sleep(_RUN_IN_S)
    begin = await server.generated()
    await asyncio.sleep(options.window_s)
    end = await server.generated()
    _check(streams)
    if not await _is_spread(server, layout, batch_size):
        raise BenchError(f"{layout}: the requests are spread in another way than at the beginning")
    await server.end(streams)
    split = tuple(stage.layers[1] - stage.layers[0] for stage in stages[0])
    return _between(begin, end, layout, batch_size, split if layout == MERGED else ())


def _between(
    begin: Sample, end: Sample, layout: str, batch_size: int, split: tuple[int, ...]
) -> Window:
    return Window(
        layout=layout,
        batch_size=batch_size,
        elapsed_s=(end.at_ns - begin.at_ns) / NS_PER_S,
        tokens=end.generated_tokens - begin.generated_tokens,
        stage_cpu_s=tuple(
            after - before
            for before, after in zip(begin.compute_cpu_s, end.compute_cpu_s, strict=True)
        ),
        split=split,
    )


async def _is_spread(server: BenchServer, layout: str, batch_size: int) -> bool:
    """Whole instances have b requests each, a leader all of them; else the ratio means nothing."""
    (running,) = await server.counters("num_requests_running")
    wanted = [batch_size, batch_size] if layout == WHOLE else [0, 2 * batch_size]
    return sorted(running.values()) == wanted


def _check(streams: Sequence[Any]) -> None:
    for stream in streams:
        if stream.error or stream.task.done():
            raise BenchError(f"a request ended too early: {stream.error or 'max_tokens reached'}")


# ---------------------------------------------------------------- report


def render(results: Sequence[BatchResult], options: PipelineOptions) -> Table:
    """The figures as a table, a column per batch size."""
    table = Table(title=f"kunserve bench pipeline, medians of {options.repeats}")
    table.add_column("")
    for result in results:
        table.add_column(f"b = {result.batch_size}", justify="right")

    def row(name: str, cell: Callable[[BatchResult], str]) -> None:
        table.add_row(name, *map(cell, results))

    row("whole, tokens/s", lambda r: _middle(r.of(WHOLE), lambda w: w.tokens_per_s, "{:.0f}"))
    row("merged, tokens/s", lambda r: _middle(r.of(MERGED), lambda w: w.tokens_per_s, "{:.0f}"))
    row(f"merged / whole (target {TARGET_RATIO:.0%})", _ratio_cell)
    row("split, layers", lambda r: " | ".join(map(str, r.of(MERGED)[-1].split)))
    row("stage imbalance", lambda r: _middle(r.of(MERGED), lambda w: w.imbalance, "{:.1%}"))
    for layout in (WHOLE, MERGED):
        for stage in (0, 1):
            name = f"whole: instance {stage} not on a core"
            if layout == MERGED:  # requests never run out: some microbatch is always unfinished
                name = f"merged: bubble of stage {stage}, at most"
            row(name, lambda r, n=layout, s=stage: _middle(r.of(n), lambda w: w.idle[s], "{:.1%}"))  # type: ignore[misc]
    for layout in (WHOLE, MERGED):
        row(
            f"{layout}: computing, ms per token",
            lambda r, n=layout: _middle(r.of(n), lambda w: w.cpu_ms_per_token, "{:.2f}"),  # type: ignore[misc]
        )
    return table


def _middle(windows: Sequence[Window], value: Callable[[Window], float], text: str) -> str:
    return text.format(statistics.median(map(value, windows)))


def _ratio_cell(result: BatchResult) -> str:
    return f"{result.ratio:.1%} ({min(result.ratios):.1%} - {max(result.ratios):.1%})"


def _batch_sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{text!r} is not a list of whole numbers such as 8,32") from None
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"{text!r}: each batch size must be at least 1")
    return sizes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `kunserve bench pipeline`."""
    parser.add_argument("--batch-sizes", type=_batch_sizes, default=(8, 32), help="b, e.g. 8,32")
    parser.add_argument("--context", type=int, default=64, help="prompt tokens of each request")
    parser.add_argument("--window", type=float, default=6.0, help="seconds of each measurement")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of whole and merged")
    parser.add_argument("--kv-cache-memory-bytes", default="768MiB", help="of each instance")
    parser.add_argument("--json", metavar="OUT", help="write the figures to this file")


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit code.

    Raises:
        BenchError, InstanceFailedError: nothing could be measured.
    """
    options = PipelineOptions(
        batch_sizes=args.batch_sizes,
        context_tokens=args.context,
        window_s=args.window,
        repeats=args.repeats,
        kv_cache=args.kv_cache_memory_bytes,
    )
    status = Console(stderr=True)
    results = asyncio.run(measure(options, (), lambda line: status.print(line, style="dim")))
    Console(file=sys.stdout).print(render(results, options))
    if args.json:
        figures = [asdict(result) | {"ratio": result.ratio} for result in results]
        document = as_json(SCHEMA, options=asdict(options), results=figures)
        Path(args.json).write_text(document, encoding="utf-8")
    return 0
