"""`kunserve bench serve`: flags to a workload, a run, and its report.

Exit codes: 0 all requests completed, 1 a request failed or the server could not be asked for its
model (one line on stderr), 2 bad flags or files (one line on stderr), 130 stopped by Ctrl-C (what
was measured so far is reported).
"""

import argparse
import asyncio
import math
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kunserve.bench.client import (
    BenchError,
    ErrorKind,
    LoadOptions,
    LoadResult,
    RequestRecord,
    ServerError,
    first_model,
    run_load,
)
from kunserve.bench.report import render_table, to_json
from kunserve.bench.server_state import read_time_counters
from kunserve.bench.workload import (
    ArrivalOptions,
    LengthCaps,
    RandomLengths,
    RateStep,
    TraceOptions,
    Workload,
    WorkloadError,
    read_azure_csv,
    read_burstgpt_csv,
    read_lengths_csv,
    synthetic_workload,
    trace_workload,
)
from kunserve.core.errors import KunserveError
from kunserve.runtime.process import raise_file_limit

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

_STDOUT = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `kunserve bench serve`, named as in `vllm bench serve` where it has them."""
    _add_server_arguments(parser.add_argument_group("server"))
    _add_workload_arguments(parser.add_argument_group("workload"))
    _add_arrival_arguments(parser.add_argument_group("arrivals"))
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", metavar="OUT", help="write the report as JSON to this file ('-': stdout)"
    )
    output.add_argument(
        "--save-detailed", action="store_true", help="with every token's arrival time in the JSON"
    )
    output.add_argument(
        "--progress",
        choices=("auto", "always", "never"),
        default="auto",
        help="progress bar on stderr (default: on a terminal)",
    )


def _add_server_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--base-url", default="http://127.0.0.1:8000", help="default: %(default)s")
    group.add_argument("--model", help="model name (default: the first of /v1/models)")
    group.add_argument("--api-key", help="sent as a bearer token")
    group.add_argument(
        "--endpoint",
        choices=("completions", "chat"),
        default="completions",
        help="completions sends token ids, so lengths are exact; chat sends words, about as many",
    )
    group.add_argument(
        "--max-concurrency", type=int, metavar="N", help="requests under way at once (no limit)"
    )
    group.add_argument(
        "--request-timeout", type=float, metavar="S", help="fail a request after this time (never)"
    )
    group.add_argument(
        "--respect-eos", action="store_true", help="let an answer end before its recorded length"
    )
    group.add_argument("--temperature", type=float, default=0.0, help="default: %(default)s")
    group.add_argument(
        "--vocab-low", type=int, default=1000, help="lowest prompt token id (default: %(default)s)"
    )
    group.add_argument(
        "--vocab-high",
        type=int,
        default=20000,
        help="end of the prompt token ids, exclusive (default: %(default)s)",
    )


def _add_workload_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dataset-name",
        choices=("azure", "burstgpt", "lengths", "random"),
        default="random",
        help="a recorded trace, recorded lengths with drawn arrivals, or all drawn "
        "(default: %(default)s)",
    )
    group.add_argument("--dataset-path", type=Path, metavar="CSV")
    group.add_argument(
        "--lengths-task",
        action="append",
        default=[],
        metavar="TASK",
        help="of a lengths file, only this task's rows; can be repeated",
    )
    group.add_argument(
        "--num-prompts",
        "--num-requests",
        type=int,
        metavar="N",
        help="at most this many (default: the whole trace; 1000 if drawn without --duration)",
    )
    group.add_argument("--max-prompt-tokens", type=int, metavar="N", help="shorten prompts to this")
    group.add_argument("--max-output-tokens", type=int, metavar="N", help="shorten outputs to this")
    group.add_argument("--random-input-len", type=int, default=1024, help="default: %(default)s")
    group.add_argument("--random-output-len", type=int, default=128, help="default: %(default)s")
    group.add_argument(
        "--random-range-ratio",
        type=float,
        default=0.0,
        metavar="R",
        help="lengths uniform in [len * (1 - R), len * (1 + R)] (default: %(default)s)",
    )
    group.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def _add_arrival_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--request-rate",
        type=float,
        metavar="PER_S",
        help="mean requests per second; scales a trace to it (default: the trace's own, else inf)",
    )
    group.add_argument(
        "--rate-steps",
        metavar="S:PER_S,...",
        help="drawn arrivals with a rate that steps, as 0:2,45:4",
    )
    group.add_argument(
        "--burstiness",
        type=float,
        metavar="SHAPE",
        help="gamma shape of drawn arrivals: 1 is Poisson, less is burstier (default: 1)",
    )
    group.add_argument(
        "--rate-scale",
        type=float,
        metavar="X",
        help="multiply a trace's rate and keep its pattern",
    )
    group.add_argument(
        "--time-scale",
        type=float,
        default=1.0,
        metavar="X",
        help="multiply arrival times: 2 is half speed (default: %(default)s)",
    )
    group.add_argument(
        "--start", type=float, metavar="S", help="window of a trace: where it begins (default: 0)"
    )
    group.add_argument(
        "--duration",
        type=float,
        metavar="S",
        help="window of a trace, or time to draw arrivals for",
    )


# Flags to values


def build_workload(args: argparse.Namespace) -> Workload:
    """Build the workload the flags ask for.

    Raises:
        WorkloadError: flags that do not fit together or an unreadable dataset.
    """
    if args.seed < 0:
        raise WorkloadError("--seed must be 0 or more")
    if args.dataset_name in ("azure", "burstgpt"):
        return _trace_workload(args)
    return _drawn_workload(args)


def _trace_workload(args: argparse.Namespace) -> Workload:
    _refuse_flags(args, "a recorded trace", "rate_steps", "burstiness", "lengths_task")
    path = _dataset_path(args)
    read = read_azure_csv if args.dataset_name == "azure" else read_burstgpt_csv
    options = TraceOptions(
        start_s=args.start or 0.0,
        duration_s=args.duration,
        rate_scale=args.rate_scale,
        requests_per_s=args.request_rate,
        time_scale=args.time_scale,
        num_requests=args.num_prompts,
        caps=_length_caps(args),
    )
    return trace_workload(read(path), options, args.seed, name=path.name)


def _drawn_workload(args: argparse.Namespace) -> Workload:
    _refuse_flags(args, "drawn arrivals", "rate_scale", "start")
    options = ArrivalOptions(
        steps=_rate_steps(args),
        burstiness=1.0 if args.burstiness is None else args.burstiness,
        num_requests=args.num_prompts,
        duration_s=args.duration,
        time_scale=args.time_scale,
    )
    if args.dataset_name == "lengths":
        path = _dataset_path(args)
        table = read_lengths_csv(path, tuple(args.lengths_task))
        return synthetic_workload(table, options, args.seed, _length_caps(args), path.name)
    _refuse_flags(args, "--dataset-name random", "dataset_path", "lengths_task")
    lengths = RandomLengths(args.random_input_len, args.random_output_len, args.random_range_ratio)
    return synthetic_workload(lengths, options, args.seed, _length_caps(args), "random")


def _refuse_flags(args: argparse.Namespace, what: str, *names: str) -> None:
    for name in names:
        if getattr(args, name) not in (None, []):
            raise WorkloadError(f"--{name.replace('_', '-')} does not apply to {what}")


def _dataset_path(args: argparse.Namespace) -> Path:
    if args.dataset_path is None:
        raise WorkloadError(f"--dataset-name {args.dataset_name} needs --dataset-path")
    return Path(args.dataset_path)


def _length_caps(args: argparse.Namespace) -> LengthCaps:
    return LengthCaps(args.max_prompt_tokens, args.max_output_tokens)


def _rate_steps(args: argparse.Namespace) -> tuple[RateStep, ...]:
    if args.rate_steps is None:
        return (RateStep(0.0, math.inf if args.request_rate is None else args.request_rate),)
    if args.request_rate is not None:
        raise WorkloadError("give --request-rate or --rate-steps, not both")
    try:
        pairs = [step.split(":") for step in args.rate_steps.split(",")]
        return tuple(RateStep(float(start), float(rate)) for start, rate in pairs)
    except ValueError:
        raise WorkloadError(
            f"--rate-steps must be like 0:2,45:4 (seconds:rate), not {args.rate_steps!r}"
        ) from None


def _load_options(args: argparse.Namespace) -> LoadOptions:
    return LoadOptions(
        endpoint=args.endpoint,
        max_concurrency=args.max_concurrency,
        seed=args.seed,
        vocab_low=args.vocab_low,
        vocab_high=args.vocab_high,
        ignore_eos=not args.respect_eos,
        temperature=args.temperature,
        api_key=args.api_key,
        timeout_s=args.request_timeout,
    )


# The run


def run(args: argparse.Namespace) -> int:
    """Run the benchmark the flags ask for and return its exit code (see the module)."""
    notes = Console(stderr=True)
    try:
        _check_output(args)
        workload = build_workload(args)
        raise_file_limit()
        before = read_time_counters(args.base_url, args.api_key)
        result = asyncio.run(_measure(args, workload, _load_options(args), notes))
        after = read_time_counters(args.base_url, args.api_key)
        document = to_json(result, detailed=args.save_detailed) if args.json else ""
        console = notes if args.json == _STDOUT else Console()
        console.print(render_table(result))
        if before and after:
            share = after.since(before).overhead_share
            console.print(f"server: HTTP, controller and scheduling took {share:.1%} of step time")
        if args.json == _STDOUT:
            sys.stdout.write(document + "\n")
        elif args.json:
            Path(args.json).write_text(document + "\n", encoding="utf-8")
    except (KunserveError, OSError) as error:
        message = " ".join(str(error).split())
        sys.stderr.write(f"kunserve bench serve: error: {message}\n")
        return EXIT_FAILED if isinstance(error, ServerError) else EXIT_BAD_INPUT
    return _exit_code(result)


def _exit_code(result: LoadResult) -> int:
    errors = [record.error for record in result.records if record.error is not None]
    if result.interrupted:
        return EXIT_INTERRUPTED
    if any(error.kind is not ErrorKind.INTERRUPTED for error in errors):
        return EXIT_FAILED
    return EXIT_OK


def _check_output(args: argparse.Namespace) -> None:
    """Refuse an output file that cannot be written before the run, not after it."""
    if args.json and args.json != _STDOUT:
        target = Path(args.json)
        if target.is_dir() or not target.parent.is_dir():
            raise BenchError(f"--json {target}: expected a file in a directory that exists")
    elif args.save_detailed and not args.json:
        raise BenchError("--save-detailed needs --json")


async def _measure(
    args: argparse.Namespace, workload: Workload, options: LoadOptions, notes: Console
) -> LoadResult:
    model = args.model or await first_model(args.base_url, options)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    on_main_thread = threading.current_thread() is threading.main_thread()
    if on_main_thread:
        loop.add_signal_handler(signal.SIGINT, stop.set)
    try:
        with _make_progress(args.progress, notes) as progress:
            return await run_load(
                args.base_url,
                model,
                workload,
                options,
                on_done=_progress_updater(progress, len(workload.requests)),
                stop=stop,
            )
    finally:
        if on_main_thread:
            loop.remove_signal_handler(signal.SIGINT)


def _make_progress(mode: str, notes: Console) -> Progress:
    shown = mode == "always" or (mode == "auto" and notes.is_terminal)
    return Progress(
        TextColumn("requests"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"),
        TimeElapsedColumn(),
        console=notes,
        disable=not shown,
    )


def _progress_updater(progress: Progress, total: int) -> Callable[[RequestRecord], None]:
    task = progress.add_task("requests", total=total, failed=0)
    failed = 0

    def advance(record: RequestRecord) -> None:
        nonlocal failed
        failed += record.error is not None
        progress.update(task, advance=1, failed=failed)

    return advance
