"""Reports: metrics against values worked out by hand, the table and the stable JSON keys."""

import io
import json

import pytest
from rich.console import Console

from kunserve.bench.client import (
    ErrorKind,
    LoadOptions,
    LoadResult,
    RequestError,
    RequestRecord,
    SseDecoder,
)
from kunserve.bench.report import compute_stats, percentile, render_table, summarize, to_json
from kunserve.bench.workload import NS_PER_S, Workload, WorkloadRequest

MS = 1_000_000


def make_record(
    index: int,
    token_ms: tuple[int, ...],
    sent_ms: int | None = 0,
    output_tokens: int | None = None,
    error: RequestError | None = None,
) -> RequestRecord:
    return RequestRecord(
        index=index,
        request=WorkloadRequest(0, 100, 4),
        sent_ns=None if sent_ms is None else sent_ms * MS,
        end_ns=2 * NS_PER_S,
        token_ns=tuple(at * MS for at in token_ms),
        prompt_tokens=100,
        output_tokens=len(token_ms) if output_tokens is None else output_tokens,
        error=error,
    )


def make_result(*records: RequestRecord, interrupted: bool = False) -> LoadResult:
    return LoadResult(
        base_url="http://127.0.0.1:1",
        model="tiny",
        workload=Workload("trace.csv", tuple(r.request for r in records), 3, 2, 1),
        options=LoadOptions(seed=5, api_key="secret-key"),
        records=records,
        duration_ns=2 * NS_PER_S,
        interrupted=interrupted,
    )


HTTP_503 = RequestError(ErrorKind.HTTP, "overloaded [retry]", 503)


def mixed_result() -> LoadResult:
    return make_result(
        make_record(0, (30, 40, 60, 90), sent_ms=10),
        make_record(1, (50, 50, 70), sent_ms=20),
        make_record(2, (15,), sent_ms=10, error=HTTP_503),
        make_record(3, (), sent_ms=10, error=HTTP_503),
        make_record(4, (), sent_ms=None, error=RequestError(ErrorKind.INTERRUPTED, "stopped")),
        interrupted=True,
    )


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1.0), (50, 2.5), (90, 3.7), (99, 3.97), (100, 4.0)]
)
def test_percentile_is_linear_between_ranks(percent: float, expected: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], percent) == pytest.approx(expected)


def test_stats_of_nothing_and_of_one_value() -> None:
    assert compute_stats([None, None]) is None
    stats = compute_stats([None, 2.0 * NS_PER_S])
    assert stats is not None
    assert (stats.count, stats.mean_s, stats.p50_s, stats.p999_s, stats.max_s) == (1, 2, 2, 2, 2)


def test_summary_by_hand() -> None:
    summary = summarize(mixed_result())
    assert (summary.requests, summary.completed) == (5, 2)
    assert (summary.failed, summary.interrupted) == (2, 1)
    assert summary.other_length == 1
    assert (summary.prompt_tokens, summary.output_tokens) == (200, 7)
    assert summary.requests_per_s == pytest.approx(1.0)
    assert summary.output_tokens_per_s == pytest.approx(3.5)
    assert summary.total_tokens_per_s == pytest.approx(103.5)
    assert summary.ttft is not None
    assert summary.ttft.mean_s == pytest.approx(0.025)
    assert summary.ttft.max_s == pytest.approx(0.030)
    assert summary.e2e is not None
    assert summary.e2e.mean_s == pytest.approx((0.080 + 0.050) / 2)
    # (e2e - ttft) / (n - 1): (80 - 20) / 3 and (50 - 30) / 2 ms.
    assert summary.tpot is not None
    assert summary.tpot.mean_s == pytest.approx((0.020 + 0.010) / 2)
    # Gaps of 10, 20, 30 and, for the two tokens of one chunk, 0 and 20 ms.
    assert summary.itl is not None
    assert summary.itl.count == 5
    assert summary.itl.mean_s == pytest.approx(0.016)
    assert summary.lag is not None
    assert summary.lag.max_s == pytest.approx(0.020)


def test_tpot_takes_the_token_count_of_the_usage() -> None:
    # Two chunks were seen, the usage says five tokens: 40 ms are four gaps.
    record = make_record(0, (10, 50), output_tokens=5)
    assert record.tpot_ns == 10 * MS
    assert make_record(0, (10,), output_tokens=1).tpot_ns is None


def test_errors_are_counted_by_kind_status_and_message() -> None:
    errors = summarize(mixed_result()).errors
    assert [(e.kind, e.status, e.message, e.count) for e in errors] == [
        ("http", 503, "overloaded [retry]", 2),
        ("interrupted", None, "stopped", 1),
    ]


def test_a_run_without_any_answer_still_has_a_report() -> None:
    result = make_result(make_record(0, (), error=HTTP_503))
    summary = summarize(result)
    assert (summary.ttft, summary.tpot, summary.itl, summary.e2e) == (None,) * 4
    assert json.loads(to_json(result))["summary"]["ttft"] is None
    assert "-" in render_text(result)


def render_text(result: LoadResult) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(render_table(result))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_table_tells_latencies_failures_and_what_was_changed() -> None:
    text = render_text(mixed_result())
    assert "trace.csv on tiny (interrupted)" in text
    for name in ("TTFT", "TPOT", "ITL", "E2E", "send lag", "P99.9"):
        assert name in text
    assert "25.00" in text
    assert "2 of 5 requests completed, 2 failed, 1 interrupted" in text
    assert "2 x http 503: overloaded [retry]" in text
    assert "1 outputs are not as long" in text
    assert "3 rows without an answer were skipped" in text
    assert "2 prompts and 1 outputs were shortened" in text


STATS_KEYS = {"count", "mean_s", "p50_s", "p90_s", "p99_s", "p999_s", "max_s"}


def test_json_keys_are_stable() -> None:
    document = json.loads(to_json(mixed_result()))
    assert document["schema"] == "kunserve.bench.serve/1"
    assert set(document) == {
        *("schema", "base_url", "model", "seed", "endpoint", "max_concurrency", "interrupted"),
        *("workload", "summary", "requests"),
    }
    assert document["workload"] == {
        "name": "trace.csv",
        "requests": 5,
        "skipped_rows": 3,
        "clamped_prompts": 2,
        "clamped_outputs": 1,
    }
    assert set(document["summary"]) == {
        *("duration_s", "requests", "completed", "failed", "interrupted", "other_length"),
        *("prompt_tokens", "output_tokens", "requests_per_s", "output_tokens_per_s"),
        *("total_tokens_per_s", "ttft", "tpot", "itl", "e2e", "lag", "errors"),
    }
    for metric in ("ttft", "tpot", "itl", "e2e", "lag"):
        assert set(document["summary"][metric]) == STATS_KEYS
    assert document["requests"][0] == {
        "index": 0,
        "arrival_s": 0.0,
        "sent_s": 0.01,
        "end_s": 2.0,
        "ttft_s": 0.02,
        "tpot_s": 0.02,
        "e2e_s": 0.08,
        "prompt_tokens": 100,
        "output_tokens": 4,
        "asked_prompt_tokens": 100,
        "asked_output_tokens": 4,
        "error": None,
    }
    assert document["requests"][3]["error"] == {
        "kind": "http",
        "status": 503,
        "message": "overloaded [retry]",
    }
    assert document["requests"][4]["sent_s"] is None
    detailed = json.loads(to_json(mixed_result(), detailed=True))
    assert detailed["requests"][0]["token_s"] == [0.03, 0.04, 0.06, 0.09]


def test_the_api_key_is_not_reported() -> None:
    result = mixed_result()
    assert "secret-key" not in to_json(result, detailed=True) + render_text(result) + repr(result)


STREAM = (
    b"\xef\xbb\xbf: a comment\r\n"
    b'data: {"text": "a\xe2\x80\xa8b\xc2\x85"}\r\n\r\n'
    b"event: note\rdata:first\rdata: second\r\r"
    b"data: [DONE]\n\n"
    b"data: never ended"
)
EVENTS = ['{"text": "a\u2028b\x85"}', "first\nsecond", "[DONE]"]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, len(STREAM)])
def test_events_do_not_depend_on_how_the_bytes_were_cut(size: int) -> None:
    decoder = SseDecoder()
    events: list[str] = []
    for start in range(0, len(STREAM), size):
        events += decoder.feed(STREAM[start : start + size])
    assert events == EVENTS
