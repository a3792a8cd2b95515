"""What is sent and when: recorded traces and synthetic arrivals, both as plain values.

The readers are the only functions here that touch a file; everything else maps values to values
with the random generator passed in, so one seed gives one workload. Arrivals, lengths and rate
scaling draw from separate streams (`stream_rng`): changing the rate leaves the lengths as they are.

Inter-arrival gaps are never clipped: the bursts are what is studied.
"""

import csv
import dataclasses
import enum
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal, InvalidOperation
from pathlib import Path

import numpy as np

from kunserve.core.errors import KunserveError

NS_PER_S = 1_000_000_000
DEFAULT_NUM_REQUESTS = 1000


class WorkloadError(KunserveError):
    """A workload that cannot be built; the message names the file and line, or the option."""


@dataclass(frozen=True, slots=True)
class RequestShape:
    """The lengths of one request, in tokens."""

    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """One request to send `arrival_ns` after the start of the run."""

    arrival_ns: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Trace:
    """A recorded trace: requests by arrival, the first at 0 ns.

    `skipped_rows` counts the rows that record no answer (zero tokens on either side).
    """

    requests: tuple[WorkloadRequest, ...]
    skipped_rows: int


@dataclass(frozen=True, slots=True)
class LengthTable:
    """Recorded lengths without arrivals; `skipped_rows` as in `Trace`, plus rows of no length."""

    shapes: tuple[RequestShape, ...]
    skipped_rows: int


@dataclass(frozen=True, slots=True)
class RateStep:
    """From `start_s` on, requests arrive at a mean of `requests_per_s` (inf: all at once)."""

    start_s: float
    requests_per_s: float


@dataclass(frozen=True, slots=True)
class LengthCaps:
    """The longest prompt and output to send, in tokens; None leaves that side as recorded."""

    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """How a recorded trace is cut and scaled; applied in the order of the fields.

    `start_s` and `duration_s` cut a window of the recorded time. `rate_scale` multiplies the mean
    rate (see `scale_rate`); `requests_per_s` is the same, given as the mean rate to reach, and
    excludes it. `time_scale` multiplies every arrival time: 2 replays at half speed.
    """

    start_s: float = 0.0
    duration_s: float | None = None
    rate_scale: float | None = None
    requests_per_s: float | None = None
    time_scale: float = 1.0
    num_requests: int | None = None
    caps: LengthCaps = LengthCaps()


@dataclass(frozen=True, slots=True)
class ArrivalOptions:
    """Synthetic arrivals: a gamma renewal process whose mean rate follows `steps`.

    `burstiness` is the gamma shape, as in `vllm bench serve`: 1 is Poisson, less is burstier.
    The run ends after `num_requests` or before `duration_s`, whichever comes first; with neither,
    after `DEFAULT_NUM_REQUESTS`.
    """

    steps: tuple[RateStep, ...] = (RateStep(0.0, math.inf),)
    burstiness: float = 1.0
    num_requests: int | None = None
    duration_s: float | None = None
    time_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class RandomLengths:
    """Lengths uniform in [len * (1 - ratio), len * (1 + ratio)], as in `vllm bench serve`."""

    prompt_tokens: int = 1024
    output_tokens: int = 128
    range_ratio: float = 0.0


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests by arrival, and what was left out or shortened to get them."""

    name: str
    requests: tuple[WorkloadRequest, ...]
    skipped_rows: int = 0
    clamped_prompts: int = 0
    clamped_outputs: int = 0


class RandomStream(enum.IntEnum):
    """The independent random streams of one seed; the values are part of what a seed means."""

    ARRIVALS = 1
    LENGTHS = 2
    RATE_SCALE = 3
    PROMPTS = 4


def stream_rng(seed: int, stream: RandomStream, index: int = 0) -> np.random.Generator:
    """Return the generator of one stream of a seed, the same in every process."""
    return np.random.default_rng((seed, int(stream), index))


# Readers


def read_azure_csv(path: Path) -> Trace:
    """Read an Azure LLM inference trace (`TIMESTAMP,ContextTokens,GeneratedTokens`).

    Timestamps keep all their digits (the files have 100 ns).

    Raises:
        WorkloadError: the file cannot be read or a row is malformed (names file and line).
    """
    rows: list[WorkloadRequest] = []
    for line, cells in _read_rows(path, ("TIMESTAMP", "ContextTokens", "GeneratedTokens")):
        arrival_ns = _parse_datetime_ns(cells[0], path, line)
        rows.append(
            WorkloadRequest(
                arrival_ns,
                _parse_tokens(cells[1], "ContextTokens", path, line),
                _parse_tokens(cells[2], "GeneratedTokens", path, line),
            )
        )
    return _make_trace(rows, path)


def read_burstgpt_csv(path: Path) -> Trace:
    """Read a BurstGPT trace by column name, so files with `Session ID` read alike.

    Rows with 0 response tokens are the failures of the recorded service: skipped and counted.

    Raises:
        WorkloadError: the file cannot be read or a row is malformed (names file and line).
    """
    rows: list[WorkloadRequest] = []
    for line, cells in _read_rows(path, ("Timestamp", "Request tokens", "Response tokens")):
        arrival_ns = _parse_seconds_ns(cells[0], path, line)
        rows.append(
            WorkloadRequest(
                arrival_ns,
                _parse_tokens(cells[1], "Request tokens", path, line),
                _parse_tokens(cells[2], "Response tokens", path, line),
            )
        )
    return _make_trace(rows, path)


@dataclass(frozen=True, slots=True)
class _LengthColumns:
    """Where one kind of lengths file keeps its lengths; the first filled prompt column counts."""

    prompt: tuple[str, ...]
    output: str


_LENGTH_FORMATS = (
    _LengthColumns(("prompt_tokens",), "output_tokens"),
    _LengthColumns(("num_prefill_tokens",), "num_decode_tokens"),
    _LengthColumns(("prompt_tokens_exact_cl100k", "prompt_tokens_est"), "ref_answer_tokens"),
)


def read_lengths_csv(path: Path, tasks: Sequence[str] = ()) -> LengthTable:
    """Read recorded lengths: plain, etalon (ShareGPT) or LongBench columns, told by the header.

    Args:
        path: the CSV file.
        tasks: keep only rows whose `task` column is one of these; empty keeps all.

    Raises:
        WorkloadError: no known columns, a malformed row, or no row of the named tasks.
    """
    columns = _length_columns(path)
    picked = (*columns.prompt, columns.output, *(("task",) if tasks else ()))
    shapes: list[RequestShape] = []
    skipped_rows = 0
    for line, cells in _read_rows(path, picked):
        if tasks and cells[-1] not in tasks:
            continue
        named = dict(zip(picked, cells, strict=True))
        filled = [name for name in columns.prompt if named[name].strip()]
        if not filled:
            skipped_rows += 1
            continue
        prompt_tokens = _parse_tokens(named[filled[0]], filled[0], path, line)
        output_tokens = _parse_tokens(named[columns.output], columns.output, path, line)
        if prompt_tokens and output_tokens:
            shapes.append(RequestShape(prompt_tokens, output_tokens))
        else:
            skipped_rows += 1
    if not shapes:
        of_tasks = f" of the tasks {', '.join(tasks)}" if tasks else ""
        raise WorkloadError(f"{path}: expected rows with lengths{of_tasks}, found none")
    return LengthTable(tuple(shapes), skipped_rows)


def _length_columns(path: Path) -> _LengthColumns:
    header = _read_header(path)
    for columns in _LENGTH_FORMATS:
        if {*columns.prompt, columns.output} <= set(header):
            return columns
    known = "; ".join(",".join((*c.prompt, c.output)) for c in _LENGTH_FORMATS)
    raise WorkloadError(f"{path}:1: expected the columns of one of [{known}], found {header}")


def _read_header(path: Path) -> list[str]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return [name.strip() for name in next(csv.reader(file), [])]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise WorkloadError(f"{path}: cannot be read as CSV: {error}") from error


def _read_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield (line number, the cells of `columns`) of every row that is not blank."""
    header = _read_header(path)
    missing = [name for name in columns if name not in header]
    if missing:
        raise WorkloadError(
            f"{path}:1: expected the columns {', '.join(columns)}; missing {', '.join(missing)}"
        )
    picks = [header.index(name) for name in columns]
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            next(reader)
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise WorkloadError(
                        f"{path}:{reader.line_num}: expected {len(header)} columns "
                        f"as in the header, found {len(row)}"
                    )
                yield reader.line_num, tuple(row[pick] for pick in picks)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise WorkloadError(f"{path}: cannot be read as CSV: {error}") from error


_DATETIME = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(?:Z|\+00:00)?")
_EPOCH = datetime(1970, 1, 1)


def _parse_datetime_ns(text: str, path: Path, line: int) -> int:
    match = _DATETIME.fullmatch(text.strip())
    try:
        if match is None:
            raise ValueError(text)
        whole_s = (datetime.fromisoformat(match[1]) - _EPOCH) // timedelta(seconds=1)
    except ValueError:
        raise WorkloadError(
            f"{path}:{line}: expected a TIMESTAMP like 2023-11-16 18:17:03.9799600, found {text!r}"
        ) from None
    return whole_s * NS_PER_S + int((match[2] or "").ljust(9, "0"))


def _parse_seconds_ns(text: str, path: Path, line: int) -> int:
    try:
        value_s = Decimal(text.strip())
    except InvalidOperation:
        value_s = Decimal("NaN")
    if not value_s.is_finite() or value_s < 0:
        raise WorkloadError(f"{path}:{line}: expected Timestamp in seconds >= 0, found {text!r}")
    return int(value_s * NS_PER_S)


def _parse_tokens(text: str, column: str, path: Path, line: int) -> int:
    digits = text.strip().removesuffix(".0")
    if not (digits.isascii() and digits.isdigit()):
        raise WorkloadError(
            f"{path}:{line}: expected {column} as a whole number >= 0, found {text!r}"
        )
    return int(digits)


def _make_trace(rows: Sequence[WorkloadRequest], path: Path) -> Trace:
    answered = [row for row in rows if row.prompt_tokens and row.output_tokens]
    if not answered:
        raise WorkloadError(f"{path}: expected at least one request with tokens, found none")
    answered.sort(key=lambda row: row.arrival_ns)
    requests = _shift(answered, -answered[0].arrival_ns)
    return Trace(requests, skipped_rows=len(rows) - len(answered))


# Recorded arrivals


def _shift(requests: Sequence[WorkloadRequest], by_ns: int) -> tuple[WorkloadRequest, ...]:
    return tuple(
        WorkloadRequest(r.arrival_ns + by_ns, r.prompt_tokens, r.output_tokens) for r in requests
    )


def select_window(
    requests: Sequence[WorkloadRequest], start_s: float, duration_s: float | None
) -> tuple[WorkloadRequest, ...]:
    """Keep the arrivals in [start_s, start_s + duration_s), with `start_s` as the new zero.

    The quiet time before the first kept arrival stays: it belongs to the window.

    Raises:
        WorkloadError: a bound is out of range or the window holds no request.
    """
    _require(start_s >= 0, f"the window must start at 0 s or later, not at {start_s} s")
    start_ns = round(start_s * NS_PER_S)
    kept = [r for r in requests if r.arrival_ns >= start_ns]
    if duration_s is not None:
        _require_positive(duration_s, "the duration of the window in seconds")
        end_ns = start_ns + round(duration_s * NS_PER_S)
        kept = [r for r in kept if r.arrival_ns < end_ns]
    if not kept:
        last_s = requests[-1].arrival_ns / NS_PER_S if requests else 0.0
        raise WorkloadError(
            f"no request in the window from {start_s} s, duration {duration_s} s; "
            f"the trace ends at {last_s:.1f} s"
        )
    return _shift(kept, -start_ns)


def scale_rate(
    requests: Sequence[WorkloadRequest], scale: float, rng: np.random.Generator
) -> tuple[WorkloadRequest, ...]:
    """Multiply the mean rate by `scale` and keep the pattern of the arrivals.

    At each arrival there are n = ceil(scale) candidates, each kept with probability scale / n
    (as the KunServe paper scales BurstGPT). Candidates share their arrival's time and lengths.

    Raises:
        WorkloadError: `scale` is not a positive finite number.
    """
    _require_positive(scale, "the rate scale")
    candidates = math.ceil(scale)
    copies = rng.binomial(candidates, scale / candidates, size=len(requests))
    return tuple(
        itertools.chain.from_iterable(
            itertools.repeat(request, int(count))
            for request, count in zip(requests, copies, strict=True)
        )
    )


def scale_time(requests: Sequence[WorkloadRequest], factor: float) -> tuple[WorkloadRequest, ...]:
    """Multiply every arrival time by `factor`: 2 replays at half speed.

    Raises:
        WorkloadError: `factor` is not a positive finite number.
    """
    _require_positive(factor, "the time scale")
    return tuple(
        WorkloadRequest(round(r.arrival_ns * factor), r.prompt_tokens, r.output_tokens)
        for r in requests
    )


def mean_rate(requests: Sequence[WorkloadRequest], duration_s: float | None = None) -> float:
    """Return the mean arrivals per second, over `duration_s` or from the first to the last.

    Raises:
        WorkloadError: the arrivals span no time.
    """
    if duration_s is not None:
        return len(requests) / duration_s
    span_ns = requests[-1].arrival_ns - requests[0].arrival_ns if requests else 0
    if span_ns == 0:
        raise WorkloadError("the arrivals span no time, so they have no rate to scale")
    return (len(requests) - 1) / (span_ns / NS_PER_S)


def trace_workload(trace: Trace, options: TraceOptions, seed: int, name: str = "trace") -> Workload:
    """Cut and scale a recorded trace into a workload.

    Raises:
        WorkloadError: an option is out of range or no request is left.
    """
    _require(
        options.rate_scale is None or options.requests_per_s is None,
        "give the rate scale or the request rate of a trace, not both",
    )
    _require_positive(options.time_scale, "the time scale")
    requests = trace.requests
    if options.start_s or options.duration_s is not None:
        requests = select_window(requests, options.start_s, options.duration_s)
    scale = options.rate_scale
    if options.requests_per_s is not None:
        _require_positive(options.requests_per_s, "the request rate of a trace")
        # The rate is asked of what is sent, after the time scale.
        native_rate = mean_rate(requests, options.duration_s) / options.time_scale
        scale = options.requests_per_s / native_rate
    if scale is not None:
        requests = scale_rate(requests, scale, stream_rng(seed, RandomStream.RATE_SCALE))
    requests = scale_time(requests, options.time_scale)
    if options.num_requests is not None:
        _require_positive(options.num_requests, "the number of requests")
        requests = requests[: options.num_requests]
    if not requests:
        raise WorkloadError(f"no request is left at rate scale {scale:g}; raise it")
    return _capped(Workload(name, requests, trace.skipped_rows), options.caps)


# Synthetic arrivals and lengths


def gamma_arrivals_ns(options: ArrivalOptions, rng: np.random.Generator) -> tuple[int, ...]:
    """Draw arrival times in ns from a gamma renewal process with a stepwise mean rate.

    Unit-mean gaps are drawn and then mapped through the inverse of the integrated rate, so a rate
    step changes the density of arrivals at its start and not one gap later.

    Raises:
        WorkloadError: an option is out of range.
    """
    _check_arrivals(options)
    by_time = options.duration_s is not None
    count = options.num_requests or (None if by_time else DEFAULT_NUM_REQUESTS)
    if math.isinf(options.steps[0].requests_per_s):
        _require(count is not None, "an infinite request rate needs a number of requests")
        return (0,) * (count or 0)
    arrivals_ns: list[int] = []
    for work in _gamma_walk(options.burstiness, rng):
        at_s = _invert_rate(options.steps, work) * options.time_scale
        if options.duration_s is not None and at_s >= options.duration_s:
            break
        arrivals_ns.append(round(at_s * NS_PER_S))
        if len(arrivals_ns) == count:
            break
    if not arrivals_ns:
        raise WorkloadError(f"no request arrived within {options.duration_s} s; raise the rate")
    return tuple(arrivals_ns)


def _gamma_walk(burstiness: float, rng: np.random.Generator) -> Iterator[float]:
    """Yield the partial sums of unit-mean gamma gaps, without end."""
    total = 0.0
    while True:
        for gap in rng.gamma(burstiness, 1.0 / burstiness, size=256):
            total += float(gap)
            yield total


def _invert_rate(steps: Sequence[RateStep], work: float) -> float:
    """Return the time in s by which `work` arrivals are expected.

    rate  |        +--------      work = area under the rate up to the time returned
          |--------+
          +--------+-------> s
     steps[0]   steps[1]
    """
    for step, following in itertools.pairwise(steps):
        area = step.requests_per_s * (following.start_s - step.start_s)
        if work < area:
            return step.start_s + work / step.requests_per_s
        work -= area
    return steps[-1].start_s + work / steps[-1].requests_per_s


def _check_arrivals(options: ArrivalOptions) -> None:
    _require_positive(options.burstiness, "the burstiness")
    _require_positive(options.time_scale, "the time scale")
    if options.num_requests is not None:
        _require_positive(options.num_requests, "the number of requests")
    if options.duration_s is not None:
        _require_positive(options.duration_s, "the duration in seconds")
    _require(bool(options.steps), "arrivals need at least one rate")
    _require(options.steps[0].start_s == 0, "the first rate must start at 0 s")
    for step, following in itertools.pairwise(options.steps):
        _require(step.start_s < following.start_s, "rate steps must start one after another")
    for step in options.steps:
        _require(step.requests_per_s > 0, f"a request rate must be > 0, not {step.requests_per_s}")
        _require(
            math.isfinite(step.requests_per_s) or len(options.steps) == 1,
            "an infinite request rate cannot be one step among others",
        )


def random_shapes(
    lengths: RandomLengths, count: int, rng: np.random.Generator
) -> tuple[RequestShape, ...]:
    """Draw `count` lengths uniformly around the given ones, at least 1 token each.

    Raises:
        WorkloadError: a length is below 1 or the range ratio is outside [0, 1).
    """
    _require_positive(lengths.prompt_tokens, "the random input length")
    _require_positive(lengths.output_tokens, "the random output length")
    _require(0 <= lengths.range_ratio < 1, "the random range ratio must be in [0, 1)")
    prompts = _uniform_lengths(lengths.prompt_tokens, lengths.range_ratio, count, rng)
    outputs = _uniform_lengths(lengths.output_tokens, lengths.range_ratio, count, rng)
    return tuple(RequestShape(p, o) for p, o in zip(prompts, outputs, strict=True))


def _uniform_lengths(middle: int, ratio: float, count: int, rng: np.random.Generator) -> list[int]:
    low = max(1, math.floor(middle * (1 - ratio)))
    high = math.ceil(middle * (1 + ratio))
    return [int(value) for value in rng.integers(low, high + 1, size=count)]


def sample_shapes(
    table: LengthTable, count: int, rng: np.random.Generator
) -> tuple[RequestShape, ...]:
    """Draw `count` recorded lengths, with replacement."""
    picks = rng.integers(0, len(table.shapes), size=count)
    return tuple(table.shapes[int(pick)] for pick in picks)


def synthetic_workload(
    lengths: RandomLengths | LengthTable,
    options: ArrivalOptions,
    seed: int,
    caps: LengthCaps | None = None,
    name: str = "synthetic",
) -> Workload:
    """Combine drawn lengths with drawn arrivals into a workload.

    Raises:
        WorkloadError: an option is out of range.
    """
    arrivals_ns = gamma_arrivals_ns(options, stream_rng(seed, RandomStream.ARRIVALS))
    rng = stream_rng(seed, RandomStream.LENGTHS)
    if isinstance(lengths, LengthTable):
        shapes = sample_shapes(lengths, len(arrivals_ns), rng)
    else:
        shapes = random_shapes(lengths, len(arrivals_ns), rng)
    requests = tuple(
        WorkloadRequest(arrival_ns, shape.prompt_tokens, shape.output_tokens)
        for arrival_ns, shape in zip(arrivals_ns, shapes, strict=True)
    )
    skipped_rows = lengths.skipped_rows if isinstance(lengths, LengthTable) else 0
    return _capped(Workload(name, requests, skipped_rows), caps or LengthCaps())


# Shared


def _capped(workload: Workload, caps: LengthCaps) -> Workload:
    """Shorten what is over the caps and count it."""
    for cap in (caps.max_prompt_tokens, caps.max_output_tokens):
        if cap is not None:
            _require_positive(cap, "a cap on lengths in tokens")
    max_prompt = math.inf if caps.max_prompt_tokens is None else caps.max_prompt_tokens
    max_output = math.inf if caps.max_output_tokens is None else caps.max_output_tokens
    requests = tuple(
        WorkloadRequest(
            r.arrival_ns,
            int(min(r.prompt_tokens, max_prompt)),
            int(min(r.output_tokens, max_output)),
        )
        for r in workload.requests
    )
    return dataclasses.replace(
        workload,
        requests=requests,
        clamped_prompts=sum(r.prompt_tokens > max_prompt for r in workload.requests),
        clamped_outputs=sum(r.output_tokens > max_output for r in workload.requests),
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise WorkloadError(message)


def _require_positive(value: float, what: str) -> None:
    _require(math.isfinite(value) and value > 0, f"{what} must be positive, not {value}")
