"""What a run measured: latency distributions, throughput and failures, as table and as JSON.

Latencies are of completed requests only, from the client's side:
    TTFT  from the send to the first token
    TPOT  (E2E - TTFT) / (output tokens - 1), one value per request with two tokens or more
    ITL   between two tokens of one request, one value per gap; tokens of one chunk are 0 apart
    E2E   from the send to the last token
    lag   from the scheduled arrival to the send: what the client itself, or its concurrency
          limit, added; a latency is only as good as this is small
"""

import collections
import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from kunserve.bench.client import ErrorKind, LoadResult, RequestRecord
from kunserve.bench.workload import NS_PER_S

JSON_SCHEMA = "kunserve.bench.serve/1"
MS_PER_S = 1000.0
BOOTSTRAP_SAMPLES = 1000
_SHOWN_MESSAGES = 5


@dataclass(frozen=True, slots=True)
class Stats:
    """A distribution of times in seconds."""

    count: int
    mean_s: float
    p50_s: float
    p90_s: float
    p99_s: float
    p999_s: float
    max_s: float


@dataclass(frozen=True, slots=True)
class ErrorCount:
    """How often one failure was seen; `kind` is an `ErrorKind` value."""

    kind: str
    status: int | None
    message: str
    count: int


@dataclass(frozen=True, slots=True)
class Summary:
    """One run in numbers. A distribution without a value is None.

    `failed` counts requests with an error, `interrupted` those the run was stopped before the end
    of; neither is part of the latencies or the throughput. `other_length` counts completed
    requests whose output is not as long as was asked.
    """

    duration_s: float
    requests: int
    completed: int
    failed: int
    interrupted: int
    other_length: int
    prompt_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft: Stats | None
    tpot: Stats | None
    itl: Stats | None
    e2e: Stats | None
    lag: Stats | None
    errors: tuple[ErrorCount, ...]


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile by linear interpolation between the two nearest ranks.

    The one definition used everywhere here (numpy's "linear"): position (n - 1) * percent / 100.
    `values` must not be empty; next to an infinite one (a request that failed) it is infinite.
    """
    return float(percentiles(np.asarray([values], dtype=np.float64), percent)[0])


def percentiles(rows: NDArray[np.float64], percent: float) -> NDArray[np.float64]:
    """The percentile of each row, as in `percentile`."""
    position = (rows.shape[1] - 1) * percent / 100
    ordered = np.sort(rows, axis=1)
    below, above = ordered[:, math.floor(position)], ordered[:, math.ceil(position)]
    found = np.full(len(rows), np.inf)
    is_finite = np.isfinite(above)  # towards an infinite one, `gap` would give NaN
    gap = above[is_finite] - below[is_finite]
    found[is_finite] = below[is_finite] + gap * (position % 1)
    return found


class Interval(NamedTuple):
    """Where a figure lies, with the confidence that was asked for."""

    low: float
    high: float


def bootstrap_interval(
    values: Sequence[float], percent: float, rng: np.random.Generator, confidence: float = 0.95
) -> Interval:
    """Interval of a percentile: that of `BOOTSTRAP_SAMPLES` samples drawn from the values, with
    replacement. Values that are not independent (requests of one run are not) make it too narrow.
    """
    drawn = rng.choice(np.asarray(values, dtype=np.float64), (BOOTSTRAP_SAMPLES, len(values)))
    found = percentiles(drawn, percent)
    tail = 50 * (1 - confidence)
    return Interval(percentile(found.tolist(), tail), percentile(found.tolist(), 100 - tail))


def compute_stats(values_ns: Iterable[float | None]) -> Stats | None:
    """Return the distribution of the known values, given in ns; None if there is none."""
    values_s = [value / NS_PER_S for value in values_ns if value is not None]
    if not values_s:
        return None
    return Stats(
        count=len(values_s),
        mean_s=float(np.mean(values_s)),
        p50_s=percentile(values_s, 50),
        p90_s=percentile(values_s, 90),
        p99_s=percentile(values_s, 99),
        p999_s=percentile(values_s, 99.9),
        max_s=max(values_s),
    )


def summarize(result: LoadResult) -> Summary:
    """Reduce the records of a run to its summary."""
    completed = [record for record in result.records if record.error is None]
    interrupted = sum(_is_interrupted(record) for record in result.records)
    prompt_tokens = sum(record.prompt_tokens for record in completed)
    output_tokens = sum(record.output_tokens for record in completed)
    duration_s = result.duration_ns / NS_PER_S
    per_s = 1 / duration_s if duration_s else 0.0
    return Summary(
        duration_s=duration_s,
        requests=len(result.records),
        completed=len(completed),
        failed=len(result.records) - len(completed) - interrupted,
        interrupted=interrupted,
        other_length=sum(r.output_tokens != r.request.output_tokens for r in completed),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        requests_per_s=len(completed) * per_s,
        output_tokens_per_s=output_tokens * per_s,
        total_tokens_per_s=(prompt_tokens + output_tokens) * per_s,
        ttft=compute_stats(record.ttft_ns for record in completed),
        tpot=compute_stats(record.tpot_ns for record in completed),
        itl=compute_stats(gap for record in completed for gap in _token_gaps_ns(record)),
        e2e=compute_stats(record.e2e_ns for record in completed),
        lag=compute_stats(record.send_lag_ns for record in completed),
        errors=_count_errors(result.records),
    )


def _is_interrupted(record: RequestRecord) -> bool:
    return record.error is not None and record.error.kind is ErrorKind.INTERRUPTED


def _token_gaps_ns(record: RequestRecord) -> Iterable[int]:
    return (later - earlier for earlier, later in itertools.pairwise(record.token_ns))


def _count_errors(records: Iterable[RequestRecord]) -> tuple[ErrorCount, ...]:
    """Count equal failures, the most frequent first."""
    counts = collections.Counter(record.error for record in records if record.error is not None)
    return tuple(
        ErrorCount(error.kind.value, error.status, error.message, count)
        for error, count in counts.most_common()
    )


# Table


def render_table(result: LoadResult) -> Table:
    """Return the latencies of a run as a table, with totals and failures below it."""
    summary = summarize(result)
    title = f"{result.workload.name} on {result.model}"
    table = Table(
        title=f"{title} (interrupted)" if result.interrupted else title,
        caption="\n".join(_caption_lines(result, summary)),
        caption_justify="left",
        caption_style="",
    )
    table.add_column("ms")
    for name in ("mean", "P50", "P90", "P99", "P99.9", "max"):
        table.add_column(name, justify="right")
    rows = (
        ("TTFT", summary.ttft),
        ("TPOT", summary.tpot),
        ("ITL", summary.itl),
        ("E2E", summary.e2e),
        ("send lag", summary.lag),
    )
    for name, stats in rows:
        table.add_row(name, *_format_stats(stats))
    return table


def _format_stats(stats: Stats | None) -> tuple[str, ...]:
    if stats is None:
        return ("-",) * 6
    values_s = (
        stats.mean_s,
        stats.p50_s,
        stats.p90_s,
        stats.p99_s,
        stats.p999_s,
        stats.max_s,
    )
    return tuple(f"{value_s * MS_PER_S:.2f}" for value_s in values_s)


def _caption_lines(result: LoadResult, summary: Summary) -> list[str]:
    workload = result.workload
    lines = [
        f"{summary.completed} of {summary.requests} requests completed, {summary.failed} failed, "
        f"{summary.interrupted} interrupted, in {summary.duration_s:.2f} s",
        f"{summary.requests_per_s:.2f} requests/s, {summary.output_tokens_per_s:.1f} output "
        f"tokens/s, {summary.total_tokens_per_s:.1f} tokens/s with prompts",
    ]
    if summary.other_length:
        lines.append(f"{summary.other_length} outputs are not as long as was asked")
    if workload.skipped_rows:
        lines.append(f"{workload.skipped_rows} rows without an answer were skipped")
    if workload.clamped_prompts or workload.clamped_outputs:
        lines.append(
            f"{workload.clamped_prompts} prompts and {workload.clamped_outputs} outputs "
            f"were shortened to the caps"
        )
    for error in summary.errors[:_SHOWN_MESSAGES]:
        status = "" if error.status is None else f" {error.status}"
        lines.append(escape(f"{error.count} x {error.kind}{status}: {error.message}"))
    if len(summary.errors) > _SHOWN_MESSAGES:
        lines.append(f"and {len(summary.errors) - _SHOWN_MESSAGES} other failures (see --json)")
    return lines


# JSON


def to_json(result: LoadResult, *, detailed: bool = False) -> str:
    """Return a run as JSON; the keys are stable within one `schema`.

    schema, base_url, model, seed, endpoint, max_concurrency, interrupted
    workload      name, requests, skipped_rows, clamped_prompts, clamped_outputs
    summary       the fields of `Summary`: duration_s, requests, completed, failed, interrupted,
                  other_length, prompt_tokens, output_tokens, requests_per_s, output_tokens_per_s,
                  total_tokens_per_s; ttft, tpot, itl, e2e, lag, each null or {count, mean_s, p50_s,
                  p90_s, p99_s, p999_s, max_s}; errors, a list of {kind, status, message, count}
    requests      one per request, in the order of the workload: index, arrival_s, sent_s, end_s,
                  ttft_s, tpot_s, e2e_s, prompt_tokens, output_tokens, asked_prompt_tokens,
                  asked_output_tokens, error (null or {kind, status, message});
                  with `detailed` also token_s, the arrival of every token

    Every `_s` is in seconds; arrival_s, sent_s, end_s and token_s count from the start of the run.
    """
    workload = result.workload
    document = {
        "schema": JSON_SCHEMA,
        "base_url": result.base_url,
        "model": result.model,
        "seed": result.options.seed,
        "endpoint": result.options.endpoint,
        "max_concurrency": result.options.max_concurrency,
        "interrupted": result.interrupted,
        "workload": {
            "name": workload.name,
            "requests": len(workload.requests),
            "skipped_rows": workload.skipped_rows,
            "clamped_prompts": workload.clamped_prompts,
            "clamped_outputs": workload.clamped_outputs,
        },
        "summary": dataclasses.asdict(summarize(result)),
        "requests": [_record_json(record, detailed) for record in result.records],
    }
    return json.dumps(document, indent=1, allow_nan=False)


def _record_json(record: RequestRecord, detailed: bool) -> dict[str, Any]:
    error = record.error
    row: dict[str, Any] = {
        "index": record.index,
        "arrival_s": record.request.arrival_ns / NS_PER_S,
        "sent_s": _to_s(record.sent_ns),
        "end_s": record.end_ns / NS_PER_S,
        "ttft_s": _to_s(record.ttft_ns),
        "tpot_s": _to_s(record.tpot_ns),
        "e2e_s": _to_s(record.e2e_ns),
        "prompt_tokens": record.prompt_tokens,
        "output_tokens": record.output_tokens,
        "asked_prompt_tokens": record.request.prompt_tokens,
        "asked_output_tokens": record.request.output_tokens,
        "error": None
        if error is None
        else {"kind": error.kind.value, "status": error.status, "message": error.message},
    }
    if detailed:
        row["token_s"] = [at_ns / NS_PER_S for at_ns in record.token_ns]
    return row


def _to_s(value_ns: float | None) -> float | None:
    return None if value_ns is None else value_ns / NS_PER_S
