"""Workloads: readers, scaling rules and synthetic arrivals."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kunserve.bench.workload import (
    NS_PER_S,
    ArrivalOptions,
    LengthCaps,
    RandomLengths,
    RateStep,
    Trace,
    TraceOptions,
    WorkloadError,
    WorkloadRequest,
    gamma_arrivals_ns,
    mean_rate,
    random_shapes,
    read_azure_csv,
    read_burstgpt_csv,
    read_lengths_csv,
    scale_rate,
    select_window,
    synthetic_workload,
    trace_workload,
)

TRACES = Path(__file__).resolve().parents[2].parent / "shared" / "traces"


def shared_trace(name: str) -> Path:
    path = TRACES / name
    if not path.exists():
        pytest.skip(f"no shared trace {name}")
    return path


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(text, encoding="utf-8")
    return path


def requests_at(*arrivals_s: float) -> tuple[WorkloadRequest, ...]:
    return tuple(
        WorkloadRequest(round(at * NS_PER_S), 10 + i, 5) for i, at in enumerate(arrivals_s)
    )


# Readers


def test_azure_keeps_every_digit_of_the_timestamps(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n"
        "2023-11-16 18:17:04.0319601,3180,8\n"
        "2023-11-16 18:17:05,7,9\n",
    )
    assert read_azure_csv(path) == Trace(
        (
            WorkloadRequest(0, 4808, 10),
            WorkloadRequest(52_000_100, 3180, 8),
            WorkloadRequest(1_020_040_000, 7, 9),
        ),
        skipped_rows=0,
    )


def test_azure_2024_timestamps_with_zone_and_byte_order_mark(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "\ufeffTIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        "2024-05-10 00:00:00.009930+00:00,2162,5\r\n"
        "2024-05-10 00:00:00.017335+00:00,2399,6\r\n",
    )
    assert [r.arrival_ns for r in read_azure_csv(path).requests] == [0, 7_405_000]


def test_burstgpt_skips_and_counts_failures(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n"
        "45,ChatGPT,1087,0,1087,API log\n"
        "118,GPT-4,417,276,693,Conversation log\n",
    )
    trace = read_burstgpt_csv(path)
    assert trace.skipped_rows == 1
    assert trace.requests == (
        WorkloadRequest(0, 472, 18),
        WorkloadRequest(113 * NS_PER_S, 417, 276),
    )


def test_burstgpt_with_session_columns_and_unordered_rows(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,"
        "Log Type\n"
        '2.5,"a,b",1.25,ChatGPT,10,20,30,API log\n'
        "1.0,,3,ChatGPT,11,21.0,32,API log\n",
    )
    assert read_burstgpt_csv(path).requests == (
        WorkloadRequest(0, 11, 21),
        WorkloadRequest(1_500_000_000, 10, 20),
    )


def test_lengths_formats_are_told_by_the_header(tmp_path: Path) -> None:
    etalon = write(tmp_path, "num_prefill_tokens,num_decode_tokens,pd_ratio\n74,918,0.08\n")
    assert [(s.prompt_tokens, s.output_tokens) for s in read_lengths_csv(etalon).shapes] == [
        (74, 918)
    ]
    longbench = write(
        tmp_path,
        "task,idx,ref_answer_tokens,prompt_tokens_est,prompt_tokens_exact_cl100k\n"
        "gov_report,0,700,9000,\n"
        "multi_news,0,280,2600,2609\n"
        "vcsum,0,300,,\n",
    )
    table = read_lengths_csv(longbench)
    assert [(s.prompt_tokens, s.output_tokens) for s in table.shapes] == [(9000, 700), (2609, 280)]
    assert table.skipped_rows == 1
    assert len(read_lengths_csv(longbench, ("multi_news",)).shapes) == 1
    with pytest.raises(WorkloadError, match="of the tasks nothing"):
        read_lengths_csv(longbench, ("nothing",))


AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
AZURE_ROW = "2023-11-16 18:17:03.9,1,2\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ":1: expected the columns TIMESTAMP, ContextTokens, GeneratedTokens; missing"),
        ("TIMESTAMP,Other,GeneratedTokens\n", ":1: expected .* missing ContextTokens"),
        (AZURE_HEADER, "at least one request"),
        (AZURE_HEADER + AZURE_ROW + "yesterday,1,2\n", ":3: expected a TIMESTAMP like"),
        (AZURE_HEADER + "2023-13-16 18:17:03.9,1,2\n", ":2: expected a TIMESTAMP like"),
        (AZURE_HEADER + AZURE_ROW + "\n" + "2023-11-16 18:17:03.9,1\n", ":4: expected 3 columns"),
        (AZURE_HEADER + "2023-11-16 18:17:03.9,-1,2\n", ":2: expected ContextTokens as a whole"),
        (AZURE_HEADER + "2023-11-16 18:17:03.9,1,2.5\n", ":2: expected GeneratedTokens as a wh"),
    ],
)
def test_malformed_azure_files_name_the_line(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(WorkloadError, match=expected):
        read_azure_csv(write(tmp_path, text))


@pytest.mark.parametrize("timestamp", ["", "nan", "inf", "-1", "1s"])
def test_malformed_burstgpt_timestamps_name_the_line(tmp_path: Path, timestamp: str) -> None:
    path = write(tmp_path, f"Timestamp,Request tokens,Response tokens\n{timestamp},1,2\n")
    with pytest.raises(WorkloadError, match=r"trace\.csv:2: expected Timestamp in seconds"):
        read_burstgpt_csv(path)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="nowhere"):
        read_azure_csv(tmp_path / "nowhere.csv")
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WorkloadError, match=r"binary\.csv: cannot be read"):
        read_lengths_csv(binary)
    with pytest.raises(WorkloadError, match="expected the columns of one of"):
        read_lengths_csv(write(tmp_path, "a,b\n1,2\n"))


def test_shared_azure_code_trace_keeps_its_bursts() -> None:
    trace = read_azure_csv(shared_trace("azure_llm_2023_code_first.csv"))
    assert len(trace.requests) == 5305
    assert sum(r.prompt_tokens for r in trace.requests) / 5305 == pytest.approx(2033.24, abs=0.01)
    # A 10 s window holds 13 times the mean of these 1,700 s (16 times that of the whole hour).
    arrivals_s = np.array([r.arrival_ns for r in trace.requests]) / NS_PER_S
    ends = np.searchsorted(arrivals_s, arrivals_s + 10)
    peak = (ends - np.arange(len(arrivals_s))).max() / 10
    assert 13 < peak / mean_rate(trace.requests) < 14


def test_shared_conversation_and_lengths_files_are_read_whole() -> None:
    assert len(read_azure_csv(shared_trace("azure_llm_2023_conv.csv")).requests) == 19366
    assert len(read_lengths_csv(shared_trace("sharegpt_8k_lengths.csv")).shapes) == 30731
    summaries = read_lengths_csv(
        shared_trace("longbench_lengths.csv"), ("gov_report", "multi_news")
    )
    assert len(summaries.shapes) == 400
    # The paper's LongBench summarisation workload answers with 499 tokens on average.
    mean_output = sum(s.output_tokens for s in summaries.shapes) / 400
    assert mean_output == pytest.approx(499, abs=2)


# Recorded arrivals


def test_window_is_half_open_and_keeps_the_quiet_before_the_first() -> None:
    kept = select_window(requests_at(0, 1, 3, 5), start_s=1.0, duration_s=4.0)
    assert [r.arrival_ns / NS_PER_S for r in kept] == [0, 2]
    later = select_window(requests_at(0, 3), start_s=1.0, duration_s=None)
    assert [r.arrival_ns / NS_PER_S for r in later] == [2]
    with pytest.raises(WorkloadError, match=r"the trace ends at 3\.0 s"):
        select_window(requests_at(0, 3), start_s=10.0, duration_s=None)


@settings(max_examples=50, deadline=None)
@given(
    scale=st.floats(0.05, 6.0),
    gaps_ns=st.lists(st.integers(0, 10 * NS_PER_S), min_size=1, max_size=40),
    seed=st.integers(0, 2**32),
)
def test_rate_scale_keeps_arrivals_and_bounds_copies(
    scale: float, gaps_ns: list[int], seed: int
) -> None:
    arrivals_ns = np.cumsum(gaps_ns).tolist()
    requests = tuple(WorkloadRequest(at, i + 1, 1) for i, at in enumerate(arrivals_ns))
    scaled = scale_rate(requests, scale, np.random.default_rng(seed))
    copies = {request: scaled.count(request) for request in requests}
    assert sum(copies.values()) == len(scaled)
    assert max(copies.values()) <= math.ceil(scale)
    assert list(scaled) == sorted(scaled, key=lambda r: r.arrival_ns)
    if scale == math.ceil(scale):
        assert set(copies.values()) == {scale}


@pytest.mark.parametrize("scale", [0.3, 1.0, 1.7, 2.0])
def test_rate_scale_reaches_the_mean_rate(scale: float) -> None:
    requests = requests_at(*np.arange(20_000) / 10)
    scaled = scale_rate(requests, scale, np.random.default_rng(1))
    # Binomial with n = ceil(s), p = s / n: the bound is five standard deviations.
    spread = math.sqrt(len(requests) * scale * (1 - scale / math.ceil(scale)))
    assert abs(len(scaled) - scale * len(requests)) <= 5 * spread


def test_request_rate_of_a_trace_is_the_rate_that_is_sent() -> None:
    trace = Trace(requests_at(*np.arange(4000) / 4), skipped_rows=3)
    options = TraceOptions(requests_per_s=6.0, time_scale=0.5, duration_s=900.0)
    workload = trace_workload(trace, options, seed=1)
    assert mean_rate(workload.requests) == pytest.approx(6.0, rel=0.05)
    assert workload.requests[-1].arrival_ns < 450 * NS_PER_S
    assert workload.skipped_rows == 3


def test_trace_options_apply_in_order_and_count_what_they_shorten() -> None:
    trace = Trace(requests_at(0, 1, 2, 3, 4), skipped_rows=0)
    options = TraceOptions(
        start_s=1.0,
        rate_scale=2.0,
        time_scale=10.0,
        num_requests=5,
        caps=LengthCaps(max_prompt_tokens=12, max_output_tokens=5),
    )
    workload = trace_workload(trace, options, seed=0)
    assert workload.requests == (
        WorkloadRequest(0, 11, 5),
        WorkloadRequest(0, 11, 5),
        WorkloadRequest(10 * NS_PER_S, 12, 5),
        WorkloadRequest(10 * NS_PER_S, 12, 5),
        WorkloadRequest(20 * NS_PER_S, 12, 5),
    )
    assert (workload.clamped_prompts, workload.clamped_outputs) == (1, 0)


@pytest.mark.parametrize(
    "options",
    [
        TraceOptions(rate_scale=2.0, requests_per_s=1.0),
        TraceOptions(rate_scale=0.0),
        TraceOptions(rate_scale=math.inf),
        TraceOptions(requests_per_s=-1.0),
        TraceOptions(requests_per_s=1.0, time_scale=0.0),
        TraceOptions(time_scale=-1.0),
        TraceOptions(start_s=-1.0),
        TraceOptions(duration_s=0.0),
        TraceOptions(num_requests=0),
        TraceOptions(caps=LengthCaps(max_prompt_tokens=0)),
    ],
)
def test_trace_options_out_of_range_are_refused(options: TraceOptions) -> None:
    with pytest.raises(WorkloadError):
        trace_workload(Trace(requests_at(0, 1), 0), options, seed=0)


def test_a_trace_without_extent_has_no_rate() -> None:
    with pytest.raises(WorkloadError, match="span no time"):
        trace_workload(Trace(requests_at(0, 0), 0), TraceOptions(requests_per_s=1.0), seed=0)


# Synthetic arrivals


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_gaps_have_the_rate_and_the_burstiness_asked_for(burstiness: float) -> None:
    options = ArrivalOptions((RateStep(0.0, 8.0),), burstiness, num_requests=40_000)
    arrivals_s = np.array(gamma_arrivals_ns(options, np.random.default_rng(3))) / NS_PER_S
    gaps_s = np.diff(arrivals_s)
    assert gaps_s.mean() == pytest.approx(1 / 8, rel=0.05)
    # The squared coefficient of variation of a gamma gap is 1 / shape.
    assert gaps_s.var() / gaps_s.mean() ** 2 == pytest.approx(1 / burstiness, rel=0.1)
    # Nothing is clipped: the longest of 40,000 Poisson gaps is about ln(40,000) means.
    if burstiness == 1.0:
        assert gaps_s.max() > 7 / 8


def test_rate_steps_change_the_density_at_the_step() -> None:
    options = ArrivalOptions((RateStep(0.0, 200.0), RateStep(45.0, 400.0)), duration_s=128.0)
    arrivals_s = np.array(gamma_arrivals_ns(options, np.random.default_rng(5))) / NS_PER_S
    assert arrivals_s.max() < 128
    assert (arrivals_s < 45).sum() / 45 == pytest.approx(200, rel=0.05)
    assert (arrivals_s >= 45).sum() / 83 == pytest.approx(400, rel=0.05)


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert gamma_arrivals_ns(ArrivalOptions(num_requests=3), np.random.default_rng(0)) == (0, 0, 0)


@pytest.mark.parametrize(
    "options",
    [
        ArrivalOptions(burstiness=0.0),
        ArrivalOptions(num_requests=-1),
        ArrivalOptions(duration_s=10.0),
        ArrivalOptions((RateStep(0.0, 0.0),)),
        ArrivalOptions((RateStep(0.0, math.nan),)),
        ArrivalOptions((RateStep(1.0, 1.0),)),
        ArrivalOptions(()),
        ArrivalOptions((RateStep(0.0, 1.0), RateStep(0.0, 2.0))),
        ArrivalOptions((RateStep(0.0, 1.0), RateStep(5.0, math.inf))),
        ArrivalOptions((RateStep(0.0, 0.001),), duration_s=0.001),
    ],
)
def test_arrival_options_out_of_range_are_refused(options: ArrivalOptions) -> None:
    with pytest.raises(WorkloadError):
        gamma_arrivals_ns(options, np.random.default_rng(0))


@settings(max_examples=50, deadline=None)
@given(length=st.integers(1, 5000), ratio=st.floats(0.0, 0.99), seed=st.integers(0, 1000))
def test_random_lengths_stay_in_their_range(length: int, ratio: float, seed: int) -> None:
    lengths = RandomLengths(length, 7, ratio)
    for shape in random_shapes(lengths, 20, np.random.default_rng(seed)):
        low = max(1, math.floor(length * (1 - ratio)))
        assert low <= shape.prompt_tokens <= math.ceil(length * (1 + ratio))
        assert shape.output_tokens >= 1


def test_a_ratio_of_zero_fixes_the_length() -> None:
    shapes = random_shapes(RandomLengths(100, 20, 0.0), 5, np.random.default_rng(0))
    assert {(s.prompt_tokens, s.output_tokens) for s in shapes} == {(100, 20)}
    with pytest.raises(WorkloadError, match="range ratio"):
        random_shapes(RandomLengths(100, 20, 1.0), 5, np.random.default_rng(0))


def test_one_seed_gives_one_workload_and_the_rate_leaves_the_lengths() -> None:
    lengths = RandomLengths(100, 20, 0.5)
    slow = ArrivalOptions((RateStep(0.0, 1.0),), num_requests=50)
    fast = ArrivalOptions((RateStep(0.0, 9.0),), num_requests=50)
    workload = synthetic_workload(lengths, slow, seed=7)
    assert workload == synthetic_workload(lengths, slow, seed=7)
    assert workload != synthetic_workload(lengths, slow, seed=8)
    assert [(r.prompt_tokens, r.output_tokens) for r in workload.requests] == [
        (r.prompt_tokens, r.output_tokens)
        for r in synthetic_workload(lengths, fast, seed=7).requests
    ]


def test_a_seed_keeps_its_meaning() -> None:
    # Pinned: a published result names its seed, so a change here must be deliberate.
    options = ArrivalOptions((RateStep(0.0, 2.0),), num_requests=3)
    workload = synthetic_workload(RandomLengths(100, 20, 0.5), options, seed=0)
    assert workload.requests == (
        WorkloadRequest(1_235_627_481, 148, 18),
        WorkloadRequest(1_676_934_032, 58, 14),
        WorkloadRequest(2_018_648_279, 78, 22),
    )
