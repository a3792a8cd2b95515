"""`kunserve bench decisions`: how long the cluster's decisions take, on one core.

Drop plans for a large cluster, and the load reports of groups through the controller that serves.
Both are pure and run here as they do in the front; nothing is served. Times are CPU times of this
thread, so that others on the machine matter less.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kunserve.bench.client import BenchError
from kunserve.bench.cluster import NS_PER_S, as_json
from kunserve.core.errors import ConfigError
from kunserve.core.events import (
    Command,
    DeliverTokens,
    GroupReport,
    InstanceReady,
    LeaseRequest,
    RequestSubmitted,
    StepTiming,
)
from kunserve.core.ids import GroupId, InstanceId, RequestId
from kunserve.core.layout import Part, PartKind
from kunserve.core.policy import PolicyName
from kunserve.core.request import Request, SamplingParams, TokenOutput
from kunserve.core.step import GroupLoad
from kunserve.policy.book import ControllerConfig, GroupRecord
from kunserve.policy.controller import Controller
from kunserve.policy.drop_plan import GroupDemand, plan_drop
from kunserve.policy.pages import MAX_SLOTS

SCHEMA = "kunserve.bench.decisions/1"
TARGET_PLAN_MS = 100.0
TARGET_REPORTS_PER_S = 20_000.0
NS_PER_MS = 1e6

# SmolLM2-135M with 1 GiB of KVCache, in pages of 192 KiB.
_NUM_LAYERS = 30
_PART_PAGES = (
    (Part(PartKind.EMBEDDING), 577),
    *((Part(PartKind.LAYER, layer), 72) for layer in range(_NUM_LAYERS)),
)
_BLOCK_SIZE = 16
_BLOCKS_PER_PAGE = 8
_KV_PAGES = 186
_CAPACITY_BLOCKS = _KV_PAGES * _BLOCKS_PER_PAGE
_COSTS = (300.0, 300.0, 5e6, 2e7, 5e6, 1e6)
_PROMPT_TOKENS = 16
_STEP_NS = 50_000_000
_RUN_IN_STEPS = 30
"""A second and a half: the monitor has forgotten how demand rose at the beginning."""


@dataclass(frozen=True)
class DecisionOptions:
    """What is measured: plans for `plan_instances` with each of `seeds` random demands; `reports`
    reports of `groups` groups, `repeats` times."""

    plan_instances: int
    seeds: int
    groups: int
    reports: int
    repeats: int


# ---------------------------------------------------------------- drop plans


@dataclass(frozen=True)
class OverloadPattern:
    """Who is overloaded. `lacking_share`: the most that an overloaded group lacks, as a share of
    what a model copy frees; it lacks half of it on average."""

    name: str
    domains_share: float
    groups_share: float
    lacking_share: float


PATTERNS = (
    OverloadPattern("none", 0.0, 0.0, 0.0),
    OverloadPattern("one group in 1 % of the domains", 0.01, 1 / MAX_SLOTS, 0.9),
    OverloadPattern("half of all groups", 1.0, 0.5, 0.9),
    OverloadPattern("all: pairs are enough", 1.0, 1.0, 0.45),
    OverloadPattern("all: groups of about 4", 1.0, 1.0, 1.3),
    OverloadPattern("all: some beyond help", 1.0, 1.0, 1.9),
    OverloadPattern("all: beyond help", 1.0, 1.0, 4.0),
)


@dataclass(frozen=True)
class PlanFigures:
    """Times of one pattern over all seeds; what the plan of the last seed has in it."""

    pattern: str
    median_ms: float
    max_ms: float
    merges: int
    largest: int
    lacking_blocks: int


def cluster_demand(
    num_instances: int, pattern: OverloadPattern, copy_blocks: int, seed: int
) -> list[GroupDemand]:
    """Whole instances in full domains, with random demand after `pattern`."""
    drawn = random.Random(seed)
    groups: list[GroupDemand] = []
    for first in range(0, num_instances, MAX_SLOTS):
        is_hit = drawn.random() < pattern.domains_share
        for number in range(first, min(first + MAX_SLOTS, num_instances)):
            demand_blocks = int(_CAPACITY_BLOCKS * drawn.uniform(0.3, 0.9))
            if is_hit and drawn.random() < pattern.groups_share:
                lacking = drawn.uniform(0.0, pattern.lacking_share)
                demand_blocks = _CAPACITY_BLOCKS + 1 + int(copy_blocks * lacking)
            groups.append(
                GroupDemand(
                    GroupId(number),
                    (InstanceId(number),),
                    first // MAX_SLOTS,
                    _CAPACITY_BLOCKS,
                    demand_blocks,
                )
            )
    return groups


def measure_plans(options: DecisionOptions, pattern: OverloadPattern) -> PlanFigures:
    """Plan once for each seed."""
    copy_blocks = _CAPACITY_BLOCKS // 2
    times_ms = []
    for seed in range(options.seeds):
        groups = cluster_demand(options.plan_instances, pattern, copy_blocks, seed)
        begin_ns = time.thread_time_ns()
        plan = plan_drop(groups, copy_blocks)
        times_ms.append((time.thread_time_ns() - begin_ns) / NS_PER_MS)
    return PlanFigures(
        pattern=pattern.name,
        median_ms=statistics.median(times_ms),
        max_ms=max(times_ms),
        merges=len(plan.merges),
        largest=max(map(len, plan.merges), default=1),
        lacking_blocks=plan.lacking_blocks,
    )


# ---------------------------------------------------------------- load reports


@dataclass(frozen=True)
class ReportPattern:
    """What reports are about: requests that run in each group and get a token each, and requests
    that wait in each. `used_share`: of the KVCache; where what waits needs more than the rest, all
    groups are overloaded, and the policy estimates what drops would win, every 100 ms of their
    time. `reports_share`: of the reports asked for."""

    name: str
    running: int
    waiting: int
    used_share: float = 0.5
    reports_share: float = 1.0


REPORTS = (
    ReportPattern("no tokens", 0, 0),
    ReportPattern("2 tokens", 2, 0),
    ReportPattern("8 tokens", 8, 0),
    ReportPattern("2 tokens, 500 waiting", 2, 500),
    ReportPattern("8 tokens, 60 waiting, overload", 8, 60, used_share=0.99, reports_share=0.02),
)


@dataclass(frozen=True)
class ReportFigures:
    """Reports that one core takes in, by pattern; tokens among them. `longest_ms`: what one report
    took at most, which is how long all others wait."""

    pattern: str
    reports_per_s: float
    least_reports_per_s: float
    most_reports_per_s: float
    tokens_per_s: float
    longest_ms: float


class ReportBench:
    """A controller with groups that serve, and what their leaders say. Its policy is `observe`:
    it decides as `kunserve` does, and the layout stays."""

    def __init__(self, num_groups: int, pattern: ReportPattern) -> None:
        self._pattern = pattern
        self._now_ns = 0
        self._step = 0
        self._tokens = 0
        per_group = pattern.running + pattern.waiting
        self._controller = Controller(
            ControllerConfig(
                num_instances=num_groups,
                num_layers=_NUM_LAYERS,
                block_size=_BLOCK_SIZE,
                max_model_len=1 << 30,
                max_num_queued_reqs=per_group * num_groups + 1,
                part_pages=_PART_PAGES,
                slot_pages=MAX_SLOTS * _KV_PAGES,
                blocks_per_page=_BLOCKS_PER_PAGE,
                policy=PolicyName.OBSERVE,
            ),
            now_ns=0,
        )
        pages = sum(pages for _, pages in _PART_PAGES) + _NUM_LAYERS * _KV_PAGES
        for index in range(num_groups):
            ready = InstanceReady(InstanceId(index), 0, _CAPACITY_BLOCKS, pages, costs=_COSTS)
            self._controller.handle(ready, 0)
        for index in range(per_group * num_groups):
            self._submit(index)
        self._running = {
            record.id: sorted(record.requests)[: pattern.running]
            for record in self._controller.groups
        }

    def _submit(self, index: int) -> None:
        prompt = tuple(range(index, index + _PROMPT_TOKENS))
        params = SamplingParams(max_tokens=1 << 14, seed=0)
        request = Request(RequestId(f"cmpl-{index:06}"), prompt, params, self._now_ns)
        (command,) = self._controller.handle(RequestSubmitted(request), self._now_ns)
        if not isinstance(command, LeaseRequest):
            raise BenchError(f"a request was not leased: {command}")

    def reports_per_s(self, num_reports: int) -> float:
        """They are made before the clock starts, a step of all groups at a time."""
        elapsed_ns = done = 0
        handle = self._controller.handle
        while done < num_reports:
            reports = list(self._reports())
            begin_ns = time.thread_time_ns()
            commands = [handle(report, self._now_ns) for report in reports]
            elapsed_ns += time.thread_time_ns() - begin_ns
            done += len(reports)
            self._check(commands)
        return done / elapsed_ns * NS_PER_S

    def longest_ms(self, num_reports: int) -> float:
        """The most that one report takes."""
        longest_ns = done = 0
        while done < num_reports:
            for report in list(self._reports()):
                begin_ns = time.thread_time_ns()
                self._controller.handle(report, self._now_ns)
                longest_ns = max(longest_ns, time.thread_time_ns() - begin_ns)
                done += 1
        return longest_ns / NS_PER_MS

    def _check(self, commands: Sequence[Sequence[Command]]) -> None:
        """A step of all groups delivers a token for each request that runs."""
        delivered = sum(isinstance(c, DeliverTokens) for of_one in commands for c in of_one)
        if delivered != len(commands) * self._pattern.running:
            raise BenchError("not every token of a report was delivered")
        self._controller.check()

    def _reports(self) -> Iterator[GroupReport]:
        """What every leader says after its next step."""
        self._step += 1
        self._now_ns += _STEP_NS
        for record in self._controller.groups:
            running = self._running[record.id]
            outputs = (TokenOutput(request, self._tokens, 17) for request in running)
            yield GroupReport(
                instance=record.leader,
                incarnation=0,
                group=record.id,
                epoch=record.epoch,
                step=self._step,
                outputs=tuple(outputs),
                started=tuple(running) if self._step == 1 else (),
                load=self._load(record),
                timing=StepTiming(self._step, self._step * _STEP_NS, 0),
            )
        self._tokens += 1

    def _load(self, record: GroupRecord) -> GroupLoad:
        waiting = self._pattern.waiting
        free_blocks = int(_CAPACITY_BLOCKS * (1 - self._pattern.used_share))
        return GroupLoad(
            total_blocks=_CAPACITY_BLOCKS,
            free_blocks=free_blocks // 2,
            cached_blocks=free_blocks - free_blocks // 2,
            num_running=self._pattern.running,
            num_waiting=waiting,
            queued_blocks=waiting * _PROMPT_TOKENS // _BLOCK_SIZE,
            leases_seen=record.leases_sent,
            prompt_tokens=0,
            generated_tokens=self._tokens * self._pattern.running,
            preemptions=0,
            prefix_queries=0,
            prefix_hits=0,
        )


def measure_reports(options: DecisionOptions, pattern: ReportPattern) -> ReportFigures:
    """All repeats of one pattern, once its requests have started."""
    bench = ReportBench(options.groups, pattern)
    bench.reports_per_s(options.groups * _RUN_IN_STEPS)
    num_reports = max(1, int(options.reports * pattern.reports_share))
    rates = [bench.reports_per_s(num_reports) for _ in range(options.repeats)]
    rate = statistics.median(rates)
    return ReportFigures(
        pattern=pattern.name,
        reports_per_s=rate,
        least_reports_per_s=min(rates),
        most_reports_per_s=max(rates),
        tokens_per_s=rate * pattern.running,
        longest_ms=bench.longest_ms(num_reports),
    )


# ---------------------------------------------------------------- report


def render_plans(results: Sequence[PlanFigures], options: DecisionOptions) -> Table:
    """Times of drop plans, a row per pattern."""
    table = Table(
        title=f"drop plans, {options.plan_instances} instances, {options.seeds} seeds "
        f"(target: less than {TARGET_PLAN_MS:.0f} ms)"
    )
    table.add_column("overloaded")
    for name in ("median ms", "most ms", "merges", "largest", "blocks lacking"):
        table.add_column(name, justify="right")
    for found in results:
        cells = (found.merges, found.largest, found.lacking_blocks)
        times = (f"{found.median_ms:.1f}", f"{found.max_ms:.1f}")
        table.add_row(found.pattern, *times, *map(str, cells))
    return table


def render_reports(results: Sequence[ReportFigures], options: DecisionOptions) -> Table:
    """Rates of reports, a row per pattern."""
    table = Table(
        title=f"load reports through the controller, {options.groups} groups, medians of "
        f"{options.repeats} (target: {TARGET_REPORTS_PER_S:.0f} a second)"
    )
    table.add_column("each report")
    for name in ("reports/s", "least", "most", "tokens/s", "longest ms"):
        table.add_column(name, justify="right")
    for found in results:
        rates = (found.reports_per_s, found.least_reports_per_s, found.most_reports_per_s)
        cells = [f"{rate:.0f}" for rate in (*rates, found.tokens_per_s)]
        table.add_row(found.pattern, *cells, f"{found.longest_ms:.2f}")
    return table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `kunserve bench decisions`."""
    parser.add_argument("--plan-instances", type=int, default=10_000, help="instances to plan for")
    parser.add_argument("--seeds", type=int, default=11, help="random demands of each pattern")
    parser.add_argument("--groups", type=int, default=16, help="groups that report")
    parser.add_argument("--reports", type=int, default=10_000, help="reports of each repeat")
    parser.add_argument("--repeats", type=int, default=5, help="repeats of each pattern")
    parser.add_argument("--json", metavar="OUT", help="write the figures to this file")


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit code.

    Raises:
        ConfigError: a number is not positive.
        BenchError: the controller did not do what is measured.
    """
    options = DecisionOptions(
        args.plan_instances, args.seeds, args.groups, args.reports, args.repeats
    )
    for name, value in asdict(options).items():
        if value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    plans = [measure_plans(options, pattern) for pattern in PATTERNS]
    console = Console(file=sys.stdout)
    console.print(render_plans(plans, options))
    reports = [measure_reports(options, pattern) for pattern in REPORTS]
    console.print(render_reports(reports, options))
    if args.json:
        document = as_json(
            SCHEMA,
            options=asdict(options),
            plans=[asdict(found) for found in plans],
            reports=[asdict(found) for found in reports],
        )
        Path(args.json).write_text(document, encoding="utf-8")
    return 0
