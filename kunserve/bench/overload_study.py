"""A study of `bench overload`: which variants run under which heights and seeds, in which order."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kunserve.bench.client import BenchError, LoadOptions
from kunserve.bench.cluster import bench_server
from kunserve.bench.overload_report import PolicyFigures, figures_of
from kunserve.bench.overload_runs import Log, OverloadRun, Variant, calibrate, run_variant
from kunserve.bench.scenario import (
    ClusterFigures,
    Height,
    Lengths,
    Scenario,
    ScenarioOptions,
    resolve,
)
from kunserve.runtime.model_config import load_model_spec
from kunserve.runtime.model_source import default_cache_dir, resolve_model
from kunserve.worker.settings import plan_instance_memory

BLOCK_TOKENS = 16
UNBOUNDED = 1_000_000
SEARCH_SEED = 100
"""Of the runs that look for the best settings: no seed of the comparison by default."""
SAME_P99 = 1.05
"""P99s closer than this do not decide between two settings: throughput does."""

Setting = tuple[str, ...]
GRID: tuple[Setting, ...] = tuple(
    (*seqs, *budget, *order)
    for seqs, budget, order in itertools.product(
        (("--max-num-seqs", "64"), ("--max-num-seqs", "256")),
        ((), ("--max-num-batched-tokens", "256")),
        (("--batch-order", "decode-first"), ("--batch-order", "prefill-first")),
    )
)
"""Flags that every policy may choose from: most requests at once, token budget of a step (by time
where none is given), and whether decodes or prefills come first."""


# ---------------------------------------------------------------- variants


def policy_variants(names: Sequence[str]) -> list[Variant]:
    """Each policy as it is."""
    return [Variant(name, ("--policy", name)) for name in names]


def two_bursts_variants(names: Sequence[str]) -> list[Variant]:
    """Each policy, and kunserve without the restore."""
    kept = Variant("kunserve, no restore", ("--policy", "kunserve", "--no-restore"))
    return [*policy_variants(names), kept]


def ablation_variants() -> list[Variant]:
    """What each mechanism adds (paper, the ablation), on links of 1 Gbit/s, shared memory and
    TCP."""
    link = ("--link-gbps", "1")
    token_count = ("--batching", "token-count")
    steps = {
        "recompute": ("--policy", "recompute"),
        "drop alone": ("--policy", "kunserve", "--exchange", "uncoordinated", *token_count),
        "+ coordinated exchange": ("--policy", "kunserve", *token_count),
        "+ lookahead": ("--policy", "kunserve"),
    }
    return [
        Variant(f"{name}{suffix}", (*flags, *link), environment)
        for suffix, environment in (("", ()), (" (TCP)", (("UCX_TLS", "tcp"),)))
        for name, flags in steps.items()
        if not (suffix and name == "recompute")  # it has no links
    ]


def external_variant(text: str) -> Variant:
    """Servers that run already, from NAME=URL[,URL].

    Raises:
        BenchError: it is not written so.
    """
    name, _, urls = text.partition("=")
    if not name or not all(url.startswith(("http://", "https://")) for url in urls.split(",")):
        raise BenchError(f"--external is written NAME=URL[,URL], not {text!r}")
    return Variant(name, base_urls=urls)


@dataclass(frozen=True)
class Sizing:
    """Bytes of an instance, and the token ids that prompts are drawn from."""

    memory_bytes: int
    vocab_low: int
    vocab_high: int


def size_for_share(model: str | None, share: float, log: Log) -> Sizing:
    """The memory of which the weights, in whole pages, take this share. Token ids are those of
    whole words, where there are as many.

    Raises:
        ModelLoadError, ModelNotSupportedError: the model cannot be served.
    """
    resolved = resolve_model(model, default_cache_dir(os.environ), log)
    spec = load_model_spec(resolved.directory)
    plan = plan_instance_memory(spec, BLOCK_TOKENS, 1 << 30, None)
    pages = sum(plan.part_pages[part] for part in plan.held)
    low, high = LoadOptions().vocab_low, min(LoadOptions().vocab_high, spec.vocab_size)
    memory_bytes = math.ceil(pages * plan.geometry.page_bytes / share)
    return Sizing(memory_bytes, min(low, high // 2), high)


# ---------------------------------------------------------------- the study


@dataclass(frozen=True)
class StudyOptions:
    """What runs. `flags`: of every server. `load`: how requests are sent; its seed is replaced by
    each run's. `rates`: (steady, burst) instead of the rule."""

    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    heights: tuple[Height, ...]
    scenario: ScenarioOptions
    lengths: Lengths
    flags: tuple[str, ...]
    load: LoadOptions
    searches: bool = False
    rates: tuple[float, float] | None = None


@dataclass(frozen=True)
class SearchResult:
    """Every setting of the grid with its figures, and the best one."""

    tried: tuple[tuple[Setting, PolicyFigures], ...]
    best: Setting


@dataclass(frozen=True)
class StudyResult:
    """All runs, in order, and the scenario of each height. `search` by variant."""

    scenarios: tuple[Scenario, ...]
    runs: tuple[OverloadRun, ...] = ()
    search: Mapping[str, SearchResult] = dataclasses.field(default_factory=dict)


class Study:
    """Runs a study.

    Args:
        log: takes a line for people as each run begins and ends.
        on_result: takes all that is there after every run.
    """

    def __init__(
        self, options: StudyOptions, log: Log, on_result: Callable[[StudyResult], None]
    ) -> None:
        self._options = options
        self._log = log
        self._on_result = on_result
        # What is compared never sheds load: who turns requests away has no queue to show.
        self._flags = (*options.flags, "--max-num-queued-reqs", str(UNBOUNDED))

    async def run(self) -> StudyResult:
        """Calibrate, search if asked, and run all.

        Raises:
            BenchError, InstanceFailedError: a server could not be started or asked.
        """
        return await self.run_with(await self.calibrate())

    async def calibrate(self) -> ClusterFigures:
        """The figures of the cluster, from a server that serves nothing else."""
        self._log("starting a server to learn what it holds and what its steps cost")
        async with bench_server((*self._flags, "--policy", "recompute")) as server:
            return await calibrate(server, self._options.load)

    async def run_with(self, figures: ClusterFigures) -> StudyResult:
        """The same, of a cluster whose figures are known."""
        result = StudyResult(tuple(self._scenarios(figures)))
        for scenario in result.scenarios:
            self._log(_describe(scenario))
        variants = list(self._options.variants)
        if self._options.searches:
            search = {v.name: await self._search(v, result.scenarios[0]) for v in variants}
            result = dataclasses.replace(result, search=search)
            variants = [_with_flags(v, search[v.name].best) for v in variants]
        # Interleaved: a machine that drifts treats all policies alike.
        for seed in self._options.seeds:
            for scenario, variant in itertools.product(result.scenarios, variants):
                run = await self._run(variant, scenario, seed)
                result = dataclasses.replace(result, runs=(*result.runs, run))
                self._on_result(result)
        return result

    def _scenarios(self, figures: ClusterFigures) -> Iterator[Scenario]:
        options = self._options
        for height in options.heights:
            scenario = dataclasses.replace(options.scenario, height=height)
            yield resolve(scenario, options.lengths, figures, options.rates)

    async def _run(self, variant: Variant, scenario: Scenario, seed: int) -> OverloadRun:
        self._log(f"{variant.name}, {scenario.options.height}, seed {seed}")
        arrivals = scenario.arrivals(self._options.lengths, seed)
        load = dataclasses.replace(self._options.load, seed=seed)
        run = await run_variant(variant, self._flags, scenario, arrivals, load)
        latencies = figures_of([run], scenario).latencies
        self._log(
            f"  {run.duration_s:.0f} s, {latencies.requests} requests, {latencies.failed} failed, "
            f"TTFT P50 {latencies.ttft_s[50]:.2f} s, P99 {latencies.ttft_s[99]:.2f} s, "
            f"{run.transitions} transitions, {run.preemptions} preemptions"
        )
        return run

    async def _search(self, variant: Variant, scenario: Scenario) -> SearchResult:
        tried = []
        for setting in GRID if not variant.base_urls else ():
            self._log(f"search: {' '.join(setting)}")
            run = await self._run(_with_flags(variant, setting), scenario, SEARCH_SEED)
            tried.append((setting, figures_of([run], scenario)))
        return SearchResult(tuple(tried), best_setting(tried))


def best_setting(tried: Sequence[tuple[Setting, PolicyFigures]]) -> Setting:
    """The setting with the lowest P99 of TTFT; of those that are as good, with most throughput."""

    def p99_s(figures: PolicyFigures) -> float:
        value = figures.latencies.ttft_s[99]
        return math.inf if value is None else value

    if not tried:
        return ()
    lowest_s = min(p99_s(figures) for _, figures in tried)
    good = [pair for pair in tried if p99_s(pair[1]) <= lowest_s * SAME_P99]
    return max(good, key=lambda pair: pair[1].loaded_tokens_per_s)[0]


def _with_flags(variant: Variant, flags: Setting) -> Variant:
    return dataclasses.replace(variant, flags=(*variant.flags, *flags))


def _describe(scenario: Scenario) -> str:
    figures = scenario.figures
    return (
        f"burst of {scenario.options.height}: {figures.whole_tokens} tokens whole, "
        f"{figures.merged_tokens} merged; {scenario.steady_rate:.2f} requests/s, "
        f"{scenario.burst_rate:.2f} in the burst; {scenario.lengths}"
    )
