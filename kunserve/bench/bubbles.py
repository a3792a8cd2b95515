"""`kunserve bench bubbles`: one queue through a pipeline, formed by token counts and by lookahead.

    stage 0   [ layers of m+1 ][  idle  ][ layers of m+2 ]
    stage 1   [ layers of m            ][ layers of m+1 ]      idle: a bubble

A bubble is the share of its time that a stage has nothing to do while some microbatch is
unfinished. It is given for the time in which requests queue, until the last one has its first
token, which is what lookahead is for, and for the whole run: its end is a few long answers, which
no formation of batches can spread over the stages.

Every arm has its best step size of a small grid, by the time that the whole queue takes. With
`--simulated` the production scheduler runs a 14B model on A100s in virtual time, on 2 and 4 stages;
without, two instances of this machine are merged and serve a queue scaled down to their size.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kunserve.bench.bubble_queue import FixedQueue, QueueOptions, fixed_queue
from kunserve.bench.bubble_runs import serve_queue
from kunserve.bench.cluster import as_json
from kunserve.core.policy import Batching
from kunserve.policy.scheduler import SchedulerConfig
from kunserve.sim.pipeline import PipelineProfile, run_pipeline
from kunserve.sim.profiles import BLOCK_SIZE, a100_pipeline

SCHEMA = "kunserve.bench.bubbles/1"
TARGET_RATIO = 0.5
NS_PER_S = 1e9
NS_PER_MS = 1_000_000
_SIMULATED_STAGES = (2, 4)
_REAL_STAGES = 2
_MAX_MODEL_LEN = 16384
_MAX_NUM_SEQS = 1024
_DEFAULT_TRACES = "../shared/traces"

TOKEN_COUNT, CHAINED, LOOKAHEAD = "token-count", "token-count, chained", "lookahead"


@dataclass(frozen=True)
class Setting:
    """One way to form steps: an arm, and its budget in tokens or in ms of a stage."""

    arm: str
    max_tokens: int | None
    target_ms: float | None

    @property
    def budget(self) -> str:
        """As text."""
        return f"{self.max_tokens} tokens" if self.max_tokens else f"{self.target_ms:g} ms"

    @property
    def config(self) -> SchedulerConfig:
        """For the simulated pipeline."""
        return SchedulerConfig(
            block_size=BLOCK_SIZE,
            max_model_len=_MAX_MODEL_LEN,
            max_num_seqs=_MAX_NUM_SEQS,
            max_num_batched_tokens=self.max_tokens,
            step_time_target_ns=round((self.target_ms or 0) * NS_PER_MS),
            batching=Batching.LOOKAHEAD if self.arm == LOOKAHEAD else Batching.TOKEN_COUNT,
            chain_chunks=self.arm != TOKEN_COUNT,
        )

    @property
    def flags(self) -> tuple[str, ...]:
        """For a server."""
        if self.max_tokens:
            return ("--batching", self.arm, "--max-num-batched-tokens", str(self.max_tokens))
        return ("--batching", self.arm, "--step-time-target-ms", f"{self.target_ms:g}")


@dataclass(frozen=True)
class BubbleRun:
    """What a setting made of the queue. Shares of time of each stage, in ring order."""

    setting: Setting
    num_stages: int
    elapsed_s: float
    queue_s: float
    bubbles: tuple[float, ...]
    queue_bubbles: tuple[float, ...]
    mean_first_token_s: float
    tokens_per_s: float
    preemptions: int

    @property
    def mean_queue_bubble(self) -> float:
        """Mean of the stages, while requests queued."""
        return statistics.mean(self.queue_bubbles)


@dataclass(frozen=True)
class Comparison:
    """All runs of one pipeline."""

    num_stages: int
    runs: tuple[BubbleRun, ...]

    def best(self, arm: str) -> BubbleRun:
        """The run of an arm that served the queue in the shortest time."""
        return min((r for r in self.runs if r.setting.arm == arm), key=lambda r: r.elapsed_s)

    @property
    def arms(self) -> tuple[str, ...]:
        """Arms in the order of their first run."""
        return tuple(dict.fromkeys(run.setting.arm for run in self.runs))

    @property
    def ratio(self) -> float:
        """Bubbles while requests queue: lookahead over token count, each at its best."""
        lookahead, token_count = self.best(LOOKAHEAD), self.best(TOKEN_COUNT)
        return lookahead.mean_queue_bubble / token_count.mean_queue_bubble


# ---------------------------------------------------------------- settings


def simulated_settings() -> tuple[Setting, ...]:
    """The grids of the three arms. *chained* has the scheduler's chunks that follow each other, but
    not the division by cost."""
    tokens = (256, 512, 1024, 2048, 4096)
    return (
        *(Setting(TOKEN_COUNT, count, None) for count in tokens),
        *(Setting(CHAINED, count, None) for count in tokens),
        *(Setting(LOOKAHEAD, None, target_ms) for target_ms in (25, 50, 100, 200, 400)),
    )


def real_settings(tokens: Sequence[int], targets_ms: Sequence[float]) -> tuple[Setting, ...]:
    """Those of a server."""
    return (
        *(Setting(TOKEN_COUNT, count, None) for count in tokens),
        *(Setting(LOOKAHEAD, None, target_ms) for target_ms in targets_ms),
    )


# ---------------------------------------------------------------- runs


def simulate(
    queue: FixedQueue,
    settings: Sequence[Setting],
    profile: PipelineProfile,
    log: Callable[[str], None],
) -> Comparison:
    """All settings in virtual time."""
    num_stages = len(profile.stage_layers)
    runs = []
    for setting in settings:
        run = _simulate_one(queue, setting, profile)
        log(_line(run))
        runs.append(run)
    return Comparison(num_stages, tuple(runs))


def _simulate_one(queue: FixedQueue, setting: Setting, profile: PipelineProfile) -> BubbleRun:
    lengths = [(shape.prompt_tokens, shape.output_tokens) for shape in queue.requests]
    run = run_pipeline(profile, setting.config, lengths)
    return BubbleRun(
        setting=setting,
        num_stages=len(profile.stage_layers),
        elapsed_s=run.elapsed_ns / NS_PER_S,
        queue_s=run.queue_ns / NS_PER_S,
        bubbles=run.bubbles,
        queue_bubbles=run.queue_bubbles,
        mean_first_token_s=statistics.mean(run.first_token_ns) / NS_PER_S,
        tokens_per_s=run.tokens_per_s,
        preemptions=run.preemptions,
    )


async def measure(
    queue: FixedQueue,
    settings: Sequence[Setting],
    kv_cache: str,
    repeats: int,
    log: Callable[[str], None],
) -> Comparison:
    """All settings on servers of their own, in turn, `repeats` times over.

    Raises:
        BenchError: a request failed or the merge was refused.
    """
    runs = []
    for _ in range(repeats):
        for setting in settings:
            served = await serve_queue(queue.requests, setting.flags, kv_cache)
            run = BubbleRun(
                setting=setting,
                num_stages=_REAL_STAGES,
                elapsed_s=served.elapsed_s,
                queue_s=served.queue_s,
                bubbles=served.bubbles,
                queue_bubbles=served.queue_bubbles,
                mean_first_token_s=served.mean_first_token_s,
                tokens_per_s=(queue.prompt_tokens + queue.output_tokens) / served.elapsed_s,
                preemptions=served.preemptions,
            )
            log(_line(run))
            runs.append(run)
    return Comparison(_REAL_STAGES, tuple(runs))


# ---------------------------------------------------------------- report


def _line(run: BubbleRun) -> str:
    return (
        f"{run.num_stages} stages, {run.setting.arm}, {run.setting.budget}: "
        f"{run.elapsed_s:.1f} s, bubbles {run.mean_queue_bubble:.1%} while requests queue"
    )


def render(comparison: Comparison, queue: FixedQueue) -> Table:
    """The best of each arm, a column each."""
    table = Table(
        title=f"kunserve bench bubbles, {comparison.num_stages} stages, "
        f"{len(queue.requests)} requests ({queue.source}), each arm at its best budget"
    )
    table.add_column("")
    best = [comparison.best(arm) for arm in comparison.arms]
    for run in best:
        table.add_column(run.setting.arm, justify="right")

    def row(name: str, cell: Callable[[BubbleRun], str]) -> None:
        table.add_row(name, *map(cell, best))

    row("budget of a step", lambda r: r.setting.budget)
    row("bubbles while requests queue, mean", lambda r: f"{r.mean_queue_bubble:.1%}")
    row("  of each stage", lambda r: _shares(r.queue_bubbles))
    row("bubbles of the whole run, of each stage", lambda r: _shares(r.bubbles))
    row("time until all had a first token, s", lambda r: f"{r.queue_s:.1f}")
    row("time of the whole queue, s", lambda r: f"{r.elapsed_s:.1f}")
    row("mean TTFT, s", lambda r: f"{r.mean_first_token_s:.2f}")
    row("tokens/s, prompt and output", lambda r: f"{r.tokens_per_s:.0f}")
    row("preemptions", lambda r: str(r.preemptions))
    table.caption = (
        f"lookahead / token-count, bubbles while requests queue: {comparison.ratio:.2f} "
        f"(target {TARGET_RATIO:g})"
    )
    return table


def _shares(shares: Sequence[float]) -> str:
    return " | ".join(f"{share:.1%}" for share in shares)


def _document(
    comparisons: Sequence[Comparison], queue: FixedQueue, options: QueueOptions, is_simulated: bool
) -> str:
    return as_json(
        SCHEMA,
        simulated=is_simulated,
        options=asdict(options),
        source=queue.source,
        prompt_tokens=queue.prompt_tokens,
        output_tokens=queue.output_tokens,
        comparisons=[
            {
                "num_stages": comparison.num_stages,
                "ratio": comparison.ratio,
                "best": {arm: asdict(comparison.best(arm)) for arm in comparison.arms},
                "runs": [asdict(run) for run in comparison.runs],
            }
            for comparison in comparisons
        ],
    )


# ---------------------------------------------------------------- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `kunserve bench bubbles`."""
    parser.add_argument(
        "--simulated", action="store_true", help="a 14B model on A100s in virtual time"
    )
    parser.add_argument(
        "--requests", type=int, help="of the queue (default 128 simulated, 24 on this machine)"
    )
    parser.add_argument(
        "--scale",
        type=float,
        help="multiplies all lengths (default 1 simulated, 0.125 on this machine)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the queue")
    parser.add_argument(
        "--traces",
        type=Path,
        default=Path(_DEFAULT_TRACES),
        help="folder with recorded lengths; synthetic ones if they are not there "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--token-budgets",
        type=int,
        nargs="+",
        default=(64, 128, 256, 512),
        help="token-count's grid on this machine",
    )
    parser.add_argument(
        "--targets-ms",
        type=float,
        nargs="+",
        default=(100.0, 200.0),
        help="lookahead's grid on this machine",
    )
    parser.add_argument("--repeats", type=int, default=1, help="of every setting, on this machine")
    parser.add_argument("--kv-cache-memory-bytes", default="256MiB", help="of each instance")
    parser.add_argument("--json", metavar="OUT", help="write the figures to this file")


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit code.

    Raises:
        BenchError, InstanceFailedError, WorkloadError: nothing could be measured.
    """
    is_simulated = args.simulated
    options = QueueOptions(
        num_requests=args.requests or (128 if is_simulated else 24),
        scale=args.scale or (1.0 if is_simulated else 0.125),
        seed=args.seed,
    )
    queue = fixed_queue(options, args.traces)
    status = Console(stderr=True)

    def log(line: str) -> None:
        status.print(line, style="dim")

    if is_simulated:
        comparisons = [
            simulate(queue, simulated_settings(), a100_pipeline(stages), log)
            for stages in _SIMULATED_STAGES
        ]
    else:
        settings = real_settings(args.token_budgets, args.targets_ms)
        measured = measure(queue, settings, args.kv_cache_memory_bytes, args.repeats, log)
        comparisons = [asyncio.run(measured)]
    for comparison in comparisons:
        Console(file=sys.stdout).print(render(comparison, queue))
    if args.json:
        document = _document(comparisons, queue, options, is_simulated)
        Path(args.json).write_text(document, encoding="utf-8")
    return 0
