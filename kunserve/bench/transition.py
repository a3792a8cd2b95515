"""`kunserve bench transition`: what a drop and a restore cost, on servers of its own.

Two instances of one thread each. Every figure is the median of the repeats; the raw rate of the
transfer library is measured in the same run. Exit code 0 says only that everything was measured:
the table shows targets beside figures and judges nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kunserve.bench.cluster import (
    NS_PER_MS,
    BenchServer,
    TransitionFigures,
    as_json,
    bench_server,
)
from kunserve.bench.raw_transfer import RawRates, measure_raw_rates
from kunserve.bench.transition_runs import (
    BLOCK_TOKENS,
    CHUNK_FLAGS,
    ControlRun,
    IdleRun,
    LoadedRun,
    hold_load,
    run_control,
    run_idle,
    run_loaded,
)
from kunserve.config import parse_size
from kunserve.runtime.model_config import load_model_spec
from kunserve.runtime.model_source import default_cache_dir, resolve_model
from kunserve.worker.settings import plan_instance_memory

SCHEMA = "kunserve.bench.transition/1"
MIB = 1 << 20
GB = 1e9
_RAW_REQUESTS = 8
_VARIANTS = {
    "uncoordinated": ("--exchange", "uncoordinated"),
    "coordinated, 1 Gbit/s": ("--link-gbps", "1"),
    "uncoordinated, 1 Gbit/s": ("--exchange", "uncoordinated", "--link-gbps", "1"),
}
_REMAP, _CONTROL = ("remap",), ("prepare", "fence", "remap", "adopt")
_MOVE = ("adopt", "move")
"""The first pulls begin in ADOPT."""

_CUT_OVER = ("fence", "remap", "adopt")

Log = Callable[[str], None]


@dataclass(frozen=True)
class TransitionOptions:
    """What is measured. `kv_cache_bytes`: of each instance."""

    repeats: int
    kv_cache_bytes: int
    ablation: bool


@dataclass(frozen=True)
class TransitionResult:
    """All runs. `base_tokens`: what two whole instances would hold by their KV bytes alone.
    `ablation`: one loaded run for each variant of the exchange."""

    control: tuple[ControlRun, ...]
    idle: tuple[IdleRun, ...]
    loaded: tuple[LoadedRun, ...]
    raw_idle: tuple[RawRates, ...]
    raw_loaded: tuple[RawRates, ...]
    ablation: dict[str, LoadedRun]
    base_tokens: int


# ---------------------------------------------------------------- measuring


async def measure(options: TransitionOptions, log: Log) -> TransitionResult:
    """All runs, on one server after the other.

    Raises:
        BenchError: a state could not be brought about, or a wish was refused.
    """
    base_tokens = _base_tokens(options.kv_cache_bytes, log)
    flags = ["--instances", "2", "--threads-per-instance", "1"]
    flags += ["--kv-cache-memory-bytes", str(options.kv_cache_bytes)]
    control = []
    async with bench_server([*flags, *CHUNK_FLAGS]) as server:
        for repeat in range(options.repeats):
            control.append(await run_control(server))
            log(f"control part, {repeat + 1} of {options.repeats}: {control[-1].text}")
    idle, loaded, raw_idle, raw_loaded = [], [], [], []
    async with bench_server(flags) as server:
        for repeat in range(options.repeats):
            log(f"exchange, {repeat + 1} of {options.repeats}")
            raw_idle.append(await _raw(server, loads=False))
            idle.append(await run_idle(server))
            log(f"idle: {idle[-1].text}")
            raw_loaded.append(await _raw(server, loads=True))
            loaded.append(await run_loaded(server))
            for text in loaded[-1].texts:
                log(f"loaded: {text}")
    ablation: dict[str, LoadedRun] = {}
    for name, variant in _VARIANTS.items() if options.ablation else ():
        async with bench_server([*flags, *variant]) as server:
            ablation[name] = await run_loaded(server, restores=False)
            log(f"{name}: {ablation[name].texts[0]}")
    return TransitionResult(
        tuple(control),
        tuple(idle),
        tuple(loaded),
        tuple(raw_idle),
        tuple(raw_loaded),
        ablation,
        base_tokens,
    )


async def _raw(server: BenchServer, *, loads: bool) -> RawRates:
    """The library's own rate while the server decodes on both cores, or does nothing."""
    await server.idle()
    streams = await hold_load(server) if loads else []
    try:
        return await asyncio.to_thread(measure_raw_rates, _RAW_REQUESTS)
    finally:
        await server.end(streams)


def _base_tokens(kv_cache_bytes: int, log: Log) -> int:
    """Two whole instances: floor(KV bytes / bytes of a block in all layers) blocks each."""
    model = resolve_model(None, default_cache_dir(os.environ), log)
    spec = load_model_spec(model.directory)
    plan = plan_instance_memory(spec, BLOCK_TOKENS, kv_cache_bytes, None)
    return 2 * (kv_cache_bytes // (plan.geometry.block_bytes * spec.num_layers)) * BLOCK_TOKENS


# ---------------------------------------------------------------- report


def _middle(values: Sequence[float], text: str = "{:.1f}") -> str:
    """Median, and least and most where there are several."""
    middle = text.format(statistics.median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({text.format(min(values))} - {text.format(max(values))})"


def _remap_ms(result: TransitionResult) -> list[float]:
    return [drop.remap_ns / NS_PER_MS for drop in _drops(result)]


def _remap_ms_per_64_mib(result: TransitionResult) -> list[float]:
    """The slower instance's time over what it freed: half of all, to a few percent."""
    return [
        drop.remap_ns / NS_PER_MS / (drop.freed_bytes / 2 / (64 * MIB)) for drop in _drops(result)
    ]


def _drops(result: TransitionResult) -> list[TransitionFigures]:
    return [
        *(run.drop for run in result.control),
        *(run.drop for run in result.idle),
        *(run.drop for run in result.loaded),
    ]


def rates(runs: Sequence[IdleRun | LoadedRun]) -> list[float]:
    """Bytes per second of each exchange in both directions, from ADOPT to the last page."""
    return [run.drop.exchanged_bytes / (run.drop.ms(*_MOVE) / 1000) for run in runs]


def shares(runs: Sequence[IdleRun | LoadedRun], raw: Sequence[RawRates]) -> list[float]:
    """Each exchange over the raw rate measured right before it."""
    return [rate / each.both_ways for rate, each in zip(rates(runs), raw, strict=True)]


def rows(result: TransitionResult) -> list[tuple[str, str, str]]:
    """Name, figure and target of every line of the table."""
    return [
        *_control_rows(result),
        *_exchange_rows(result),
        *_restore_rows(result),
        *_memory_rows(result),
        *_ablation_rows(result),
    ]


def _control_rows(result: TransitionResult) -> list[tuple[str, str, str]]:
    control = result.control
    lines = [
        ("REMAP of an instance, ms", _middle(_remap_ms(result)), "< 20"),
        ("REMAP, ms per 64 MiB", _middle(_remap_ms_per_64_mib(result), "{:.2f}"), "< 1"),
        ("command to RUN, ms", _middle([run.drop.ms(*_CONTROL) for run in control]), "< 250"),
        (
            "command to first token that did not fit, less its own prefill, ms",
            _middle([run.control_ms for run in control]),
            "< 250",
        ),
        ("  the request's own prefill, ms", _middle([run.own_ms for run in control]), ""),
    ]
    for phase in _CONTROL:
        figures = [run.drop.ms(phase) for run in control]
        lines.append((f"  {phase}, ms", _middle(figures), ""))
    return lines


def _exchange_rows(result: TransitionResult) -> list[tuple[str, str, str]]:
    lines = []
    for name, runs, raw in (
        ("idle", result.idle, result.raw_idle),
        ("loaded", result.loaded, result.raw_loaded),
    ):
        exchanged = [run.drop.exchanged_bytes / MIB for run in runs]
        lines += [
            (f"exchange {name}, MiB", _middle(exchanged, "{:.0f}"), ""),
            ("  GB/s, both directions", _middle([r / GB for r in rates(runs)], "{:.2f}"), ""),
            (
                "  raw GB/s, both directions",
                _middle([r.both_ways / GB for r in raw], "{:.2f}"),
                "",
            ),
            ("  raw GB/s, one direction", _middle([r.one_way / GB for r in raw], "{:.2f}"), ""),
            ("  share of raw", _middle(shares(runs, raw), "{:.0%}"), ">= 60%"),
        ]
    loaded = result.loaded
    stalls = [[ns / NS_PER_MS for ns in run.drop.stalled_ns] or [0.0] for run in loaded]
    return [
        *lines,
        ("activations during it", _middle([r.drop.activations for r in loaded], "{:.0f}"), ""),
        ("  delay P99, ms", _middle([r.drop.activation_p99_ns / NS_PER_MS for r in loaded]), ""),
        ("largest gap of a stream, drop, ms", _middle([r.drop_gap_ms for r in loaded]), ""),
        ("  of a short one, ms", _middle([r.drop_gap_short_ms for r in loaded]), ""),
        ("requests stalled", _middle([len(r.drop.stalled_ns) for r in loaded], "{:.0f}"), ""),
        ("  stall, median, ms", _middle([statistics.median(s) for s in stalls]), ""),
        ("  stall, longest, ms", _middle([max(s) for s in stalls]), ""),
        (
            "queued request waits longer by, steps",
            _middle([r.queued_extra_ms / r.step_ms for r in loaded]),
            "<= 3",
        ),
    ]


def _restore_rows(result: TransitionResult) -> list[tuple[str, str, str]]:
    runs = [run for run in result.loaded if run.restore is not None]
    restores = [run.restore for run in runs if run.restore is not None]
    if not restores:
        return []
    gained = [each.gained_bytes / MIB / (each.ms("prepare") / 1000) for each in restores]
    lines = [
        (f"restore: {phase}, ms", _middle([each.ms(phase) for each in restores]), "")
        for phase in restores[0].phases_ns
    ]
    gathered = [each.gathered_bytes / MIB for each in restores]
    return [
        *lines,
        ("restore: gained, MiB/s", _middle(gained, "{:.0f}"), ""),
        ("restore: KV gathered before the fence, MiB", _middle(gathered), ""),
        (
            "restore: cut-over, fence to adopt, ms",
            _middle([each.ms(*_CUT_OVER) for each in restores]),
            "",
        ),
        ("restore: largest gap of a stream, ms", _middle([r.restore_gap_ms for r in runs]), ""),
    ]


def _memory_rows(result: TransitionResult) -> list[tuple[str, str, str]]:
    lines = []
    for index, name in enumerate(("before", "merged", "after")):
        sizes = [run.pss_bytes[index] / MIB for run in result.loaded if len(run.pss_bytes) > index]
        if sizes:
            lines.append((f"PSS of all instances {name}, MiB", _middle(sizes, "{:.0f}"), ""))
    flat = [max(run.pss_bytes) / min(run.pss_bytes) - 1 for run in result.loaded]
    tokens = [run.kv_tokens_merged / result.base_tokens for run in result.loaded]
    merged = [float(run.kv_tokens_merged) for run in result.loaded]
    return [
        *lines,
        ("  most over least", _middle(flat, "{:.1%}"), "<= 5%"),
        (f"usable tokens merged ({result.base_tokens} before)", _middle(merged, "{:.0f}"), ""),
        ("  over before", _middle(tokens, "{:.2f}"), ">= 2.4"),
        ("  stage imbalance", _middle([r.imbalance for r in result.loaded], "{:.1%}"), "<= 5%"),
    ]


def _ablation_rows(result: TransitionResult) -> list[tuple[str, str, str]]:
    lines = []
    for name, run in result.ablation.items():
        p99_ms = run.drop.activation_p99_ns / NS_PER_MS
        lines += [
            (f"{name}: move, ms", f"{run.drop.ms(*_MOVE):.0f}", ""),
            ("  activations, delay P99 ms", f"{run.drop.activations}, {p99_ms:.1f}", ""),
            ("  largest gap of a short stream, ms", f"{run.drop_gap_short_ms:.0f}", ""),
            ("  of any stream, ms", f"{run.drop_gap_ms:.0f}", ""),
        ]
    return lines


def render(result: TransitionResult, options: TransitionOptions) -> Table:
    """The figures as a table, targets beside them."""
    table = Table(title=f"kunserve bench transition, median of {options.repeats} (least - most)")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("target", justify="right")
    for row in rows(result):
        table.add_row(*row)
    return table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `kunserve bench transition`."""
    parser.add_argument("--repeats", type=int, default=3, help="the median of these is shown")
    parser.add_argument(
        "--kv-cache-memory-bytes",
        type=parse_size,
        default=128 * MIB,
        metavar="SIZE",
        help="of each instance (default 128MiB)",
    )
    parser.add_argument(
        "--ablation",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also measure the uncoordinated exchange and slow links",
    )
    parser.add_argument("--json", metavar="OUT", help="write the figures to this file")


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit code.

    Raises:
        BenchError, InstanceFailedError: it could not be measured.
    """
    options = TransitionOptions(args.repeats, args.kv_cache_memory_bytes, args.ablation)
    status = Console(stderr=True)
    result = asyncio.run(
        measure(options, lambda line: status.print(line, style="dim", highlight=False))
    )
    Console(file=sys.stdout).print(render(result, options))
    if args.json:
        document = as_json(
            SCHEMA,
            options=asdict(options),
            table=[
                dict(zip(("name", "figure", "target"), row, strict=True)) for row in rows(result)
            ],
            result=result,
        )
        Path(args.json).write_text(document, encoding="utf-8")
    return 0
