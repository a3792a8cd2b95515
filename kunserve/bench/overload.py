"""`kunserve bench overload`: the same burst under each policy, measured from the client's side.

Every policy serves with the same memory and threads, on a server of its own that is started for one
run and ended after it. Runs are interleaved: of one seed, all policies; then the next seed. The
rates follow from a rule (`kunserve.bench.scenario`). The bounded queue is off in all of them.

Exit codes: 0 measured, 1 a server did not start or could not be asked, 2 bad flags (one line on
stderr), 130 Ctrl-C. Every run is saved when it ends, with `--save-runs`, and can be drawn again
with `--from-runs`.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from kunserve.bench.client import BenchError, LoadOptions
from kunserve.bench.overload_results import (
    draw,
    load_plots,
    load_runs,
    print_tables,
    results_json,
    save_runs,
)
from kunserve.bench.overload_runs import Variant
from kunserve.bench.overload_study import (
    GRID,
    Study,
    StudyOptions,
    StudyResult,
    ablation_variants,
    external_variant,
    policy_variants,
    size_for_share,
    two_bursts_variants,
)
from kunserve.bench.scenario import Height, Lengths, ScenarioOptions
from kunserve.bench.workload import (
    RandomLengths,
    RandomStream,
    WorkloadError,
    random_shapes,
    read_lengths_csv,
    stream_rng,
)
from kunserve.core.errors import ConfigError
from kunserve.core.policy import PolicyName
from kunserve.runtime.process import raise_file_limit

POLICIES = ("kunserve", "recompute", "swap", "migrate", "static-pp")
TWO_BURSTS_POLICIES = ("kunserve",)
PLAIN_WIDTH = 120
"""Columns of a table that goes into a file."""

SWEEP = ("0.8x-whole", "1.2x-whole", "0.75x-merged", "1.0x-merged", "1.5x-merged", "2.0x-merged")


# ---------------------------------------------------------------- flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `kunserve bench overload`."""
    _add_what(parser.add_argument_group("what is compared"))
    _add_scenario(parser.add_argument_group("scenario"))
    _add_server(parser.add_argument_group("servers"))
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")
    output.add_argument("--figures", type=Path, metavar="DIR", help="draw PNGs into this directory")
    output.add_argument(
        "--save-runs", type=Path, metavar="FILE", help="every run, saved as soon as it is over"
    )
    output.add_argument(
        "--from-runs",
        type=Path,
        metavar="FILE",
        help="measure nothing: table, JSON and figures of saved runs",
    )


def _add_what(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--policies",
        nargs="+",
        choices=[name.value for name in PolicyName],
        metavar="NAME",
        help=f"in the order of the runs (default {' '.join(POLICIES)})",
    )
    group.add_argument(
        "--external",
        action="append",
        default=[],
        metavar="NAME=URL[,URL]",
        help="also load servers that run already; several take turns",
    )
    group.add_argument(
        "--seeds", nargs="+", type=_seed, default=[0, 1, 2], help="default 0 1 2", metavar="N"
    )
    group.add_argument(
        "--ablation",
        action="store_true",
        help="instead: recompute, drop alone, + coordinated exchange, + lookahead, with links "
        "slowed down to 1 Gbit/s, and once more over TCP",
    )
    group.add_argument(
        "--two-bursts",
        action="store_true",
        help="two bursts, and kunserve also with --no-restore",
    )
    group.add_argument(
        "--search",
        action="store_true",
        help=f"before that, find the best of {len(GRID)} settings for each policy",
    )


def _add_scenario(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--height",
        type=_height,
        default=Height(1.0, "merged"),
        metavar="F",
        help="demand of the burst with unlimited memory, such as 0.8x-whole (of what whole "
        "instances hold) or 1.0x-merged (of what the merged group holds, the default)",
    )
    group.add_argument(
        "--sweep",
        nargs="*",
        type=_height,
        metavar="F",
        help=f"several heights (default {' '.join(SWEEP)})",
    )
    group.add_argument("--lengths", type=Path, metavar="CSV", help="recorded lengths")
    group.add_argument(
        "--lengths-task", action="append", default=[], metavar="TASK", help="only this task's rows"
    )
    group.add_argument("--input-len", type=int, default=48, help="mean prompt (default 48)")
    group.add_argument("--output-len", type=int, default=256, help="mean output (default 256)")
    group.add_argument(
        "--range-ratio",
        type=float,
        default=0.5,
        metavar="R",
        help="lengths uniform in [len * (1 - R), len * (1 + R)] (default 0.5)",
    )
    group.add_argument(
        "--steady-share",
        type=float,
        default=0.5,
        help="steady demand as a share of what whole instances hold (default 0.5)",
    )
    for name, default_s, what in (
        ("before", 20.0, "steady before the burst"),
        ("burst", 20.0, "of the burst"),
        ("after", 30.0, "steady after it; then arrivals end"),
        ("gap", 45.0, "between two bursts"),
    ):
        group.add_argument(
            f"--{name}",
            type=float,
            default=default_s,
            metavar="S",
            help=f"seconds {what} (default {default_s:g})",
        )
    group.add_argument(
        "--rates",
        type=_rates,
        metavar="STEADY,BURST",
        help="requests per second as an earlier run found them (its JSON), instead of the rule",
    )


def _add_server(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", metavar="MODEL", help="default: the embedded model")
    group.add_argument("--instances", type=int, default=2, help="default 2")
    group.add_argument("--threads-per-instance", type=int, default=1, help="default 1")
    group.add_argument(
        "--weights-share",
        type=float,
        default=0.75,
        metavar="S",
        help="share of an instance's memory that its weights take (default 0.75)",
    )
    group.add_argument(
        "--server-flags",
        type=shlex.split,
        default=[],
        metavar="FLAGS",
        help="for every server, as one word: --server-flags='--link-gbps 1'",
    )
    group.add_argument(
        "--request-timeout",
        type=float,
        default=300.0,
        metavar="S",
        help="a request without an end after this has failed (default 300)",
    )


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


def _height(text: str) -> Height:
    try:
        return Height.parse(text)
    except BenchError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _rates(text: str) -> tuple[float, float]:
    try:
        steady, burst = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 1.8,6.5") from None
    if not 0 < steady < burst < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: 0 < STEADY < BURST must hold")
    return steady, burst


# ---------------------------------------------------------------- flags to values


def study_options(args: argparse.Namespace, log: Callable[[str], None]) -> StudyOptions:
    """What the flags ask for.

    Raises:
        ConfigError: a value or a combination cannot work.
        ModelLoadError, ModelNotSupportedError: MODEL cannot be served.
    """
    _check(args)
    try:
        variants = _variants(args)
        lengths = _lengths(args)
        scenario = _scenario(args)
    except (BenchError, WorkloadError) as error:
        raise ConfigError(str(error)) from error
    if len({variant.name for variant in variants}) < len(variants):
        raise ConfigError("--policies and --external must name each thing once")
    sizing = size_for_share(args.model, args.weights_share, log)
    flags = [args.model] if args.model else []
    flags += ["--instances", str(args.instances)]
    flags += ["--threads-per-instance", str(args.threads_per_instance)]
    flags += ["--memory-bytes", str(sizing.memory_bytes), *args.server_flags]
    return StudyOptions(
        variants=tuple(variants),
        seeds=tuple(args.seeds),
        heights=_heights(args),
        scenario=scenario,
        lengths=lengths,
        flags=tuple(flags),
        load=LoadOptions(
            vocab_low=sizing.vocab_low,
            vocab_high=sizing.vocab_high,
            timeout_s=args.request_timeout,
        ),
        searches=args.search,
        rates=args.rates,
    )


def _check(args: argparse.Namespace) -> None:
    if args.ablation and (args.policies or args.two_bursts):
        raise ConfigError("--ablation has variants of its own: no --policies, no --two-bursts")
    if len(set(args.seeds)) < len(args.seeds):
        raise ConfigError("--seeds must name each seed once")
    if not 0 < args.weights_share < 1:
        raise ConfigError(f"--weights-share must be in (0, 1), got {args.weights_share:g}")
    if not args.request_timeout > 0:
        raise ConfigError(f"--request-timeout must be positive, got {args.request_timeout:g}")
    if args.instances < 2:
        raise ConfigError("--instances must be at least 2: one instance has nothing to drop")
    if args.rates and args.sweep is not None:
        raise ConfigError("--rates gives one burst, --sweep several; give one of them")
    for name in ("json", "save_runs"):
        target = getattr(args, name)
        if target is not None and (target.is_dir() or not target.parent.is_dir()):
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} {target}: expected a file in a directory that exists")


def _variants(args: argparse.Namespace) -> list[Variant]:
    external = [external_variant(text) for text in args.external]
    if args.ablation:
        return [*ablation_variants(), *external]
    if args.two_bursts:
        return [*two_bursts_variants(args.policies or TWO_BURSTS_POLICIES), *external]
    return [*policy_variants(args.policies or POLICIES), *external]


def _heights(args: argparse.Namespace) -> tuple[Height, ...]:
    """The one of --height, or those of --sweep."""
    if args.sweep is None:
        return (args.height,)
    return tuple(dict.fromkeys(args.sweep or map(Height.parse, SWEEP)))


def _lengths(args: argparse.Namespace) -> Lengths:
    if args.lengths is not None:
        return read_lengths_csv(args.lengths, tuple(args.lengths_task))
    if args.lengths_task:
        raise ConfigError("--lengths-task needs --lengths")
    lengths = RandomLengths(args.input_len, args.output_len, args.range_ratio)
    random_shapes(lengths, 1, stream_rng(0, RandomStream.LENGTHS))  # refuses what is out of range
    return lengths


def _scenario(args: argparse.Namespace) -> ScenarioOptions:
    return ScenarioOptions(
        args.height,
        args.steady_share,
        args.before,
        args.burst,
        args.after,
        num_bursts=2 if args.two_bursts else 1,
        gap_s=args.gap,
    )


# ---------------------------------------------------------------- the command


def run(args: argparse.Namespace) -> int:
    """Measure and show; returns the exit code.

    Raises:
        ConfigError: see `study_options`.
        BenchError, InstanceFailedError: it could not be measured.
    """
    status = Console(stderr=True)

    def log(line: str) -> None:
        status.print(line, style="dim", highlight=False, markup=False)

    if args.figures:
        load_plots()  # what is missing is said before the runs, not after them
    result = load_runs(args.from_runs) if args.from_runs else _measure(args, log)
    _show(args, result, log)
    return 0


def _measure(args: argparse.Namespace, log: Callable[[str], None]) -> StudyResult:
    options = study_options(args, log)
    raise_file_limit()

    def save(result: StudyResult) -> None:
        if args.save_runs:
            save_runs(args.save_runs, result)

    return asyncio.run(Study(options, log, save).run())


def _show(args: argparse.Namespace, result: StudyResult, log: Callable[[str], None]) -> None:
    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    print_tables(result, Console(file=sys.stdout, width=width))
    if args.json:
        args.json.write_text(results_json(result), encoding="utf-8")
    for path in draw(result, args.figures) if args.figures else ():
        log(f"drawn: {path}")
