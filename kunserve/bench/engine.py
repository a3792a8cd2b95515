"""`kunserve bench engine`: speed of one instance, through the real scheduler and paged cache,
beside the machine's limits measured in the same run."""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kunserve.bench.limits import MachineLimits, measure_limits
from kunserve.config import parse_size
from kunserve.core.errors import ConfigError
from kunserve.core.ids import Epoch, RequestId
from kunserve.core.request import Request, SamplingParams
from kunserve.policy.cost_model import CostModel
from kunserve.policy.scheduler import Scheduler, SchedulerConfig
from kunserve.runtime.model_config import load_model_spec
from kunserve.runtime.model_source import default_cache_dir, resolve_model
from kunserve.worker.engine import Engine
from kunserve.worker.executor import Executor
from kunserve.worker.settings import EngineSettings, plan_instance_memory

SCHEMA = "kunserve.bench.engine/1"
_NO_COST = CostModel(alpha_ns=0.0, delta_ns=0.0, beta_ns=0.0, gamma_ns=0.0)
"""The token budget is fixed in this benchmark, so that no measured cost enters the plan."""


@dataclass(frozen=True)
class BenchOptions:
    """What is measured. Lengths in tokens; `repeats` runs each, the median is reported."""

    threads: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    context_tokens: int
    prefill_tokens: int
    decode_steps: int
    repeats: int
    block_size: int
    kv_cache_memory_bytes: int


@dataclass(frozen=True)
class Speed:
    """One measured figure in tokens/s: median, least and most of the repeats. `scheduling_share`
    is the part of the time outside the executor."""

    tokens_per_s: float
    least_tokens_per_s: float
    most_tokens_per_s: float
    scheduling_share: float


@dataclass(frozen=True)
class ThreadResult:
    """All figures for one number of threads."""

    threads: int
    limits: MachineLimits
    prefill: Speed
    decode: dict[int, Speed]


@dataclass
class _Clock:
    """Tokens and time of one repeat."""

    tokens: int = 0
    total_ns: int = 0
    execute_ns: int = 0


class EngineBench:
    """Drives scheduler and executor of a loaded engine, step by step, without a front."""

    def __init__(self, engine: Engine, options: BenchOptions, seed: int) -> None:
        self._engine = engine
        self._options = options
        self._random = random.Random(seed)
        self._next_id = 0

    def prefill(self) -> Speed:
        """Tokens/s of one prompt of `prefill_tokens` in one chunk, to its first token."""
        return self._median(lambda: self._run(1, self._options.prefill_tokens, 1, decodes=False))

    def decode(self, batch_size: int) -> Speed:
        """Tokens/s of `batch_size` requests that all decode, after `context_tokens` of prompt."""
        options = self._options
        # One token comes from the prefill step, the rest from pure decode steps.
        return self._median(
            lambda: self._run(
                batch_size, options.context_tokens, options.decode_steps + 1, decodes=True
            )
        )

    def _median(self, measure: Callable[[], _Clock]) -> Speed:
        measure()  # the first use of memory pays for page faults
        runs = [measure() for _ in range(self._options.repeats)]
        rates = [run.tokens / run.total_ns * 1e9 for run in runs]
        outside = [1 - run.execute_ns / run.total_ns for run in runs]
        return Speed(
            tokens_per_s=statistics.median(rates),
            least_tokens_per_s=min(rates),
            most_tokens_per_s=max(rates),
            scheduling_share=statistics.median(outside),
        )

    def _run(self, batch_size: int, prompt_tokens: int, max_tokens: int, decodes: bool) -> _Clock:
        scheduler = self._scheduler(batch_size * prompt_tokens)
        executor = self._engine.make_executor()
        for _ in range(batch_size):
            scheduler.add(self._request(prompt_tokens, max_tokens))
        clock = _Clock()
        while scheduler.has_work():
            _step(scheduler, executor, clock, decodes)
        return clock

    def _scheduler(self, budget_tokens: int) -> Scheduler:
        config = SchedulerConfig(
            block_size=self._options.block_size,
            max_model_len=self._engine.settings.max_model_len,
            max_num_batched_tokens=max(budget_tokens, 1),
            enable_prefix_caching=False,
        )
        return self._engine.make_scheduler(config, _NO_COST, Epoch(0))

    def _request(self, prompt_tokens: int, max_tokens: int) -> Request:
        self._next_id += 1
        vocab = self._engine.settings.spec.vocab_size
        return Request(
            id=RequestId(f"bench-{self._next_id}"),
            prompt_token_ids=tuple(self._random.randrange(vocab) for _ in range(prompt_tokens)),
            params=SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0, ignore_eos=True),
            arrival_ns=self._next_id,
        )


def _step(scheduler: Scheduler, executor: Executor, clock: _Clock, decodes: bool) -> None:
    """Run one step and count it if it is of the wanted kind."""
    begin_ns = time.perf_counter_ns()
    plan = scheduler.schedule(begin_ns)
    assert plan is not None, "work is left but nothing was scheduled"
    execute_begin_ns = time.perf_counter_ns()
    result = executor.execute(plan, lambda: False)
    execute_end_ns = time.perf_counter_ns()
    scheduler.update(plan, result, execute_end_ns)
    end_ns = time.perf_counter_ns()
    is_decode = all(len(chunk.token_ids) == 1 for chunk in plan.chunks)
    if is_decode == decodes:
        clock.tokens += plan.num_tokens
        clock.total_ns += end_ns - begin_ns
        clock.execute_ns += execute_end_ns - execute_begin_ns


def measure(
    model: str | None, options: BenchOptions, log: Callable[[str], None]
) -> list[ThreadResult]:
    """All figures of `model` (None: the embedded one), one result per number of threads."""
    resolved = resolve_model(model, default_cache_dir(os.environ), log)
    spec = load_model_spec(resolved.directory)
    longest = max(options.prefill_tokens, options.context_tokens + options.decode_steps + 1) + 1
    if longest > spec.max_position:
        raise ConfigError(f"{longest} tokens are more than the model's {spec.max_position}")
    plan = plan_instance_memory(spec, options.block_size, options.kv_cache_memory_bytes, None)
    needed = max(options.batch_sizes) * -(-longest // options.block_size)
    if needed > plan.kv_blocks:
        raise ConfigError(
            f"the largest batch needs {needed} KV blocks, the cache has {plan.kv_blocks}; "
            "raise --kv-cache-memory-bytes"
        )
    results = []
    for threads in options.threads:
        log(f"limits of the machine with {threads} thread(s)")
        limits = measure_limits(threads)
        log(f"loading {resolved.name}")
        settings = EngineSettings(
            model_directory=str(resolved.directory),
            spec=spec,
            threads=threads,
            block_size=options.block_size,
            max_model_len=longest,
            kv_cache_memory_bytes=options.kv_cache_memory_bytes,
        )
        with Engine(settings, lambda activity, fraction: None) as engine:
            results.append(_measure_engine(engine, threads, limits, options, log))
    return results


def _measure_engine(
    engine: Engine,
    threads: int,
    limits: MachineLimits,
    options: BenchOptions,
    log: Callable[[str], None],
) -> ThreadResult:
    bench = EngineBench(engine, options, seed=0)
    log(f"prefill of {options.prefill_tokens} tokens")
    prefill = bench.prefill()
    decode: dict[int, Speed] = {}
    for batch_size in options.batch_sizes:
        log(f"decode at batch {batch_size}")
        decode[batch_size] = bench.decode(batch_size)
    return ThreadResult(threads, limits, prefill, decode)


def render(results: Sequence[ThreadResult], options: BenchOptions) -> Table:
    """The figures as a table, a column per number of threads."""
    table = Table(title="kunserve bench engine: tokens/s, median (least - most)")
    table.add_column("")
    for result in results:
        table.add_column(f"{result.threads} thread(s)", justify="right")

    def row(name: str, cell: Callable[[ThreadResult], str]) -> None:
        table.add_row(name, *(cell(result) for result in results))

    row("machine: memory read, GB/s", lambda r: f"{r.limits.read_gb_per_s:.1f}")
    row("machine: float32 FMA, GFLOP/s", lambda r: f"{r.limits.fma_gflop_per_s:.0f}")
    row(f"prefill {options.prefill_tokens}", lambda r: _cell(r.prefill))
    for batch_size in options.batch_sizes:
        name = f"decode batch {batch_size}, context {options.context_tokens}"
        row(name, lambda r, b=batch_size: _cell(r.decode[b]))  # type: ignore[misc]
    for batch_size in options.batch_sizes:
        name = f"scheduling share, batch {batch_size}"
        row(name, lambda r, b=batch_size: f"{r.decode[b].scheduling_share:.1%}")  # type: ignore[misc]
    return table


def _cell(speed: Speed) -> str:
    spread = f"({speed.least_tokens_per_s:.0f} - {speed.most_tokens_per_s:.0f})"
    return f"{speed.tokens_per_s:.0f} {spread}"


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{text!r} is not a list of whole numbers such as 1,8,32") from None
    if not counts or min(counts) < 1:
        raise ConfigError(f"{text!r}: each number must be at least 1")
    return counts


def _count(text: str) -> int:
    (count,) = _counts(text)
    return count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `kunserve bench engine`."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="default: the embedded model")
    parser.add_argument("--threads", type=_counts, default=(1, 2), help="e.g. 1,2 (default 1,2)")
    parser.add_argument("--batch-sizes", type=_counts, default=(1, 4, 8, 16, 32))
    parser.add_argument("--context", type=_count, default=64, help="prompt tokens before decoding")
    parser.add_argument("--prefill", type=_count, default=512, help="tokens of the prefill")
    parser.add_argument("--steps", type=_count, default=32, help="decode steps of a repeat")
    parser.add_argument("--repeats", type=_count, default=5, help="the median of these is shown")
    parser.add_argument("--block-size", type=_count, default=16)
    parser.add_argument("--kv-cache-memory-bytes", type=parse_size, default=1 << 30, metavar="SIZE")
    parser.add_argument("--json", metavar="OUT", help="write the figures to this file")


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit code."""
    options = BenchOptions(
        threads=args.threads,
        batch_sizes=args.batch_sizes,
        context_tokens=args.context,
        prefill_tokens=args.prefill,
        decode_steps=args.steps,
        repeats=args.repeats,
        block_size=args.block_size,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
    )
    status = Console(stderr=True)
    results = measure(args.model, options, lambda line: status.print(line, style="dim"))
    Console(file=sys.stdout).print(render(results, options))
    if args.json:
        document = {
            "schema": SCHEMA,
            "options": asdict(options),
            "results": [asdict(result) for result in results],
        }
        Path(args.json).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0
