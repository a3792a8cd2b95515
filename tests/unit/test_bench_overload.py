"""`bench overload`: what it makes of runs. Percentiles with failures, phases, JSON, figures."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kunserve.bench import overload_plots as plots
from kunserve.bench.client import (
    BenchError,
    ErrorKind,
    LoadOptions,
    LoadResult,
    RequestError,
    RequestRecord,
)
from kunserve.bench.cluster import GroupInfo, LayoutInfo, StageInfo
from kunserve.bench.overload_report import (
    figures_json,
    figures_of,
    overload_s,
    render,
)
from kunserve.bench.overload_results import (
    draw,
    load_runs,
    results_json,
    runs_by_variant,
    save_runs,
)
from kunserve.bench.overload_runs import (
    LoadSample,
    OverloadRun,
    RequestFigures,
    RunKey,
    Variant,
    load_sample,
    reduce_run,
)
from kunserve.bench.overload_study import (
    GRID,
    SearchResult,
    StudyResult,
    ablation_variants,
    best_setting,
    external_variant,
    policy_variants,
    two_bursts_variants,
)
from kunserve.bench.report import bootstrap_interval, percentile, percentiles
from kunserve.bench.scenario import (
    Arrivals,
    ClusterFigures,
    Height,
    Scenario,
    ScenarioOptions,
)
from kunserve.bench.workload import RequestShape, Workload, WorkloadRequest
from kunserve.cli import build_parser
from kunserve.config import config_from_args

SCENARIO = Scenario(
    ScenarioOptions(Height(1.0, "merged"), before_s=10.0, burst_s=5.0, after_s=10.0),
    "uniform",
    ClusterFigures(2, 1000, 2400, (1.0,) * 6),
    steady_rate=2.0,
    burst_rate=8.0,
    ramp=(RequestShape(10, 5),),
    ramp_s=1.0,
)


def request(arrival_s: float, ttft_s: float = 0.5, **changes: object) -> RequestFigures:
    """A request of eleven tokens, ten of them 0.1 s apart."""
    whole = RequestFigures(
        arrival_s=arrival_s,
        sent_s=arrival_s,
        first_s=arrival_s + ttft_s,
        last_s=arrival_s + ttft_s + 1.0,
        output_tokens=11,
        itl_max_s=0.1,
        is_ramp=False,
        error="",
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


def sample(
    at_s: float, used: int, queued: int = 0, capacity: int = 1000, **more: int
) -> LoadSample:
    values = {"num_waiting": int(queued > 0), "stages": 1 + (capacity > 1000)} | more
    return LoadSample(at_s, capacity, 1000, used, queued, **values)


def make_run(
    requests: Sequence[RequestFigures],
    samples: Sequence[LoadSample] = (),
    variant: str = "recompute",
    seed: int = 0,
    height: str = "1x-merged",
) -> OverloadRun:
    return OverloadRun(
        RunKey(variant, height, seed),
        tuple(requests),
        tuple(samples),
        tokens_by_second=(5,) * 30,
        duration_s=30.0,
        preemptions=3,
        transitions=2,
        queue_s=4.0,
        ttft_s=16.0,
        send_lag_max_s=0.002,
    )


# ---------------------------------------------------------------- percentiles


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=30),
    st.integers(0, 5),
    st.sampled_from((0, 50, 90, 99, 100)),
)
def test_a_percentile_among_failures(values: list[float], failed: int, percent: int):
    everything = [*values, *[math.inf] * failed]
    found = percentile(everything, percent)
    highest_rank = math.ceil((len(everything) - 1) * percent / 100)
    if highest_rank < len(values):
        # What failed only counts: any large value in its place gives the same.
        finite = [*values, *[1e9] * failed]
        assert found == pytest.approx(np.percentile(finite, percent))
    else:
        assert found == math.inf


def test_percentiles_of_rows_are_those_of_each():
    rows = np.array([[3.0, 1.0, 2.0], [math.inf, 1.0, 5.0]])
    assert percentiles(rows, 50).tolist() == [2.0, 5.0]
    assert percentiles(rows, 99).tolist() == [pytest.approx(2.98), math.inf]


def test_a_bootstrap_interval_holds_the_figure_and_is_the_same_again():
    values = [random.Random(index).expovariate(1.0) for index in range(400)]
    low, high = bootstrap_interval(values, 90, np.random.default_rng(1))
    assert low < percentile(values, 90) < high
    assert (low, high) == bootstrap_interval(values, 90, np.random.default_rng(1))
    assert high - low < 1.0


def test_a_bootstrap_interval_with_failures_is_open_to_the_top():
    values = [*[1.0] * 98, math.inf, math.inf]
    interval = bootstrap_interval(values, 99, np.random.default_rng(0))
    assert interval.high == math.inf
    assert bootstrap_interval([2.0], 50, np.random.default_rng(0)) == (2.0, 2.0)


# ---------------------------------------------------------------- figures


def test_a_failed_request_waits_for_ever():
    fine = [request(11.0, ttft_s=ttft_s) for ttft_s in (0.1, 0.2, 0.3)]
    failed = [
        request(12.0, error="timeout: x"),
        request(12.0, first_s=None, last_s=None, error="h"),
    ]
    figures = figures_of([make_run([*fine, *failed])], SCENARIO)
    assert (figures.latencies.requests, figures.latencies.failed) == (5, 2)
    assert figures.latencies.ttft_s[50] == pytest.approx(0.3)
    assert figures.latencies.ttft_s[90] == math.inf
    assert figures.latencies.e2e_s[99] == math.inf
    assert figures.latencies.tpot_s[99] == pytest.approx(0.1)
    assert figures.errors == ("h", "timeout: x")
    # In JSON there is no infinity.
    document = figures_json(figures)
    assert (document["ttft_p90_s"], document["failed"]) == (None, 2)


def test_the_ramp_counts_in_no_latency():
    figures = figures_of([make_run([request(0.1, 9.0, is_ramp=True), request(5.0)])], SCENARIO)
    assert figures.latencies.requests == 1
    assert figures.latencies.ttft_s[99] == pytest.approx(0.5)


def test_runs_of_several_seeds_are_pooled():
    runs = [make_run([request(5.0, 0.1)]), make_run([request(5.0, 0.3), request(6.0, 0.3)], seed=1)]
    figures = figures_of(runs, SCENARIO)
    assert (figures.runs, figures.latencies.requests) == (2, 3)
    assert figures.latencies.ttft_s[50] == pytest.approx(0.3)
    assert (figures.preemptions, figures.transitions) == (6, 4)
    assert figures.queue_share == pytest.approx(0.25)
    assert figures.tokens_per_s == pytest.approx(5.0)
    assert figures.loaded_tokens_per_s == pytest.approx(5.0)


def test_phases_by_arrival():
    samples = [sample(5.0, 500), sample(12.0, 900, 400), sample(17.0, 900, 10), sample(20.0, 300)]
    requests = [request(at_s, at_s) for at_s in (5.0, 12.0, 16.0, 18.0, 22.0)]
    phases = figures_of([make_run(requests, samples)], SCENARIO).phases
    counts = {name: phase.requests for name, phase in phases.items()}
    # Out of the overload: before the burst, and after the last sample with a queue.
    assert counts == {"before": 1, "burst": 1, "after": 3, "calm": 3}
    assert phases["calm"].ttft_s[50] == pytest.approx(18.0)


def test_nobody_knows_when_the_backlog_of_an_unwatched_server_ends():
    requests = [request(5.0), request(24.0)]
    assert figures_of([make_run(requests)], SCENARIO).phases["calm"].requests == 1


def test_measured_demand():
    samples = [sample(0.5, 100), sample(5.0, 400), sample(9.0, 600), sample(12.0, 1000, 900)]
    figures = figures_of([make_run([request(5.0)], samples)], SCENARIO)
    assert figures.steady_share == pytest.approx(0.5)
    assert figures.peak_share == pytest.approx(1.9)


def test_the_overload_is_the_first_moment_of_too_much_demand():
    samples = [sample(5.0, 1000), sample(12.0, 900, 101), sample(13.0, 900, 200)]
    assert overload_s(make_run([], samples)) == 12.0
    assert overload_s(make_run([], samples[:1])) is None


def test_the_table_says_what_failed():
    figures = figures_of([make_run([request(5.0), request(6.0, error="http: [busy]")])], SCENARIO)
    table = render({"recompute": figures}, "a burst")
    assert "recompute: http: \\[busy]" in str(table.caption)
    assert [column.header for column in table.columns] == ["", "recompute"]


# ---------------------------------------------------------------- JSON and saved runs


def study_result() -> StudyResult:
    """Two policies, two seeds, one burst."""
    rng = random.Random(3)
    runs = []
    for seed in (0, 1):
        for variant, factor in (("recompute", 6.0), ("kunserve", 1.0)):
            requests = [request(0.2, 0.1, is_ramp=True)]
            requests += [
                request(at_s / 4, rng.expovariate(2.0) * (factor if at_s > 40 else 1.0))
                for at_s in range(100)
            ]
            capacity = 2400 if variant == "kunserve" else 1000
            samples = [sample(at_s / 4, 400 + at_s) for at_s in range(40)]
            samples += [
                sample(10 + at_s / 40, min(capacity, 600 + 5 * at_s), 100, capacity)
                for at_s in range(400)
            ]
            samples += [sample(20 + at_s, 500) for at_s in range(10)]
            runs.append(make_run(requests, samples, variant, seed))
    return StudyResult((SCENARIO,), tuple(runs))


def test_the_keys_of_the_json():
    figures = figures_of([make_run([request(5.0)])], SCENARIO)
    search = {"recompute": SearchResult(((GRID[0], figures),), GRID[0])}
    document = json.loads(results_json(replace(study_result(), search=search)))
    assert set(document) == {"schema", "scenario", "policies", "sweep", "search"}
    assert list(document["policies"]) == ["recompute", "kunserve"]
    wanted = {
        "ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s", "itl_max_s", "e2e_p50_s",
        "tokens_per_s", "requests", "failed", "preemptions", "transitions",
    }  # fmt: skip
    for policy in document["policies"].values():
        assert wanted <= set(policy)
        assert set(policy["phases"]) == {"before", "burst", "after", "calm"}
    assert document["scenario"]["burst_requests_per_s"] == 8.0
    assert document["search"]["recompute"]["best"] == list(GRID[0])
    assert document["search"]["recompute"]["grid"][0]["ttft_p99_s"] == pytest.approx(0.5)
    assert len(document["sweep"]) == 1


def test_saved_runs_are_read_again(tmp_path: Path):
    result = study_result()
    save_runs(tmp_path / "runs.json", result)
    assert load_runs(tmp_path / "runs.json") == result
    assert [path.name for path in tmp_path.iterdir()] == ["runs.json"]


@pytest.mark.parametrize("content", ["", "{}", "[1]"])
def test_what_are_no_saved_runs(tmp_path: Path, content: str):
    (tmp_path / "runs.json").write_text(content)
    with pytest.raises(BenchError, match=r"runs\.json cannot be read"):
        load_runs(tmp_path / "runs.json")


# ---------------------------------------------------------------- reduction


def test_a_record_in_seconds():
    sent = WorkloadRequest(1_000_000_000, 4, 3)
    record = RequestRecord(
        0, sent, 1_500_000_000, 9_000_000_000, (2_000_000_000, 2_100_000_000, 3_000_000_000), 4, 3,
        None,
    )  # fmt: skip
    error = RequestError(ErrorKind.TIMEOUT, "no end")
    failed = replace(record, index=1, sent_ns=None, token_ns=(), error=error)
    workload = Workload("overload", (sent, sent))
    result = LoadResult("http://x", "m", workload, LoadOptions(), (record, failed), 10**10, False)
    run = reduce_run(RunKey("v", "h", 0), result, Arrivals(workload, frozenset({1})), ())
    assert run.requests[0] == RequestFigures(1.0, 1.5, 2.0, 3.0, 3, 0.9, False, "")
    assert run.requests[1] == RequestFigures(1.0, None, None, None, 3, 0.0, True, "timeout: no end")
    assert run.tokens_by_second == (0, 0, 2, 1)
    assert (run.duration_s, run.send_lag_max_s) == (10.0, 0.5)


def test_a_layout_as_a_sample():
    stages = (StageInfo(0, (0, 12)), StageInfo(1, (12, 30)))
    group = GroupInfo(1, 240, 5, stages, None, 100, 90, 32, 2)
    layout = LayoutInfo((group,), (), None, at_ns=3_500_000_000)
    seen = load_sample(layout, 1_000_000_000)
    assert seen == LoadSample(2.5, 240, 100, 90, 32, 2, 2)
    assert (seen.demand_tokens, seen.free_tokens) == (122, 150)


# ---------------------------------------------------------------- variants and settings


def test_every_variant_is_a_server_that_exists():
    """The flags are those of `kunserve serve`."""
    parser = build_parser(["serve"])
    policies = [*policy_variants(["swap"]), *two_bursts_variants(["kunserve"])]
    for variant in [*policies, *ablation_variants()]:
        for setting in GRID:
            config_from_args(parser.parse_args(["serve", *variant.flags, *setting]))
    assert len({variant.name for variant in ablation_variants()}) == 7


def test_external_servers():
    assert external_variant("vllm=http://a:1,http://b:2") == Variant(
        "vllm", base_urls="http://a:1,http://b:2"
    )
    for text in ("vllm", "=http://a:1", "vllm=a:1", "vllm=http://a:1,"):
        with pytest.raises(BenchError, match="NAME=URL"):
            external_variant(text)


def test_the_best_setting_has_the_lowest_p99_and_then_most_throughput():
    def figures(ttft_s: float, tokens_per_s: float):
        found = figures_of([make_run([request(5.0, ttft_s)])], SCENARIO)
        return replace(found, loaded_tokens_per_s=tokens_per_s)

    tried = [
        (("a",), figures(2.0, 900.0)),
        (("b",), figures(1.0, 500.0)),
        (("c",), figures(1.04, 600.0)),
    ]
    assert best_setting(tried) == ("c",)
    assert best_setting([]) == ()


# ---------------------------------------------------------------- figures


def test_every_figure_is_drawn(tmp_path: Path):
    """Warnings are errors here, so missing labels and empty axes would show."""
    result = study_result()
    paths = draw(result, tmp_path / "figures")
    assert {path.name for path in paths} == {
        "arrivals.png", "demand.png", "ttft_over_time.png", "percentiles.png", "queue_share.png",
        "free_kv.png",
    }  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_figures_of_servers_that_nobody_watched(tmp_path: Path):
    """Not even failures are in the way."""
    run = make_run([request(5.0, error="x"), request(12.0, error="x")], variant="vllm")
    runs = (replace(run, queue_s=0.0, ttft_s=0.0), replace(run, key=RunKey("vllm", "1x-merged", 1)))
    assert draw(StudyResult((SCENARIO,), runs), tmp_path)


def test_several_heights_have_a_figure_of_their_own(tmp_path: Path):
    """Also where the runs of one height are still to come."""
    higher = replace(SCENARIO, options=replace(SCENARIO.options, height=Height(2.0, "merged")))
    high = [replace(run, key=replace(run.key, height="2x-merged")) for run in study_result().runs]
    paths = draw(StudyResult((SCENARIO, higher), tuple(high)), tmp_path)
    assert paths[-1] == tmp_path / "height.png"
    assert (tmp_path / "2x-merged" / "free_kv.png").exists()


def test_the_story_of_the_demo():
    result = study_result()
    figure = plots.draw_story(SCENARIO, runs_by_variant(result, SCENARIO))
    assert len(figure.axes) == 3


def test_one_policy_has_one_colour():
    both = plots.colours(["kunserve", "recompute", "vllm"])
    assert len(set(both.values())) == 3
    assert both["kunserve"] == plots.colours(["kunserve"])["kunserve"]


def test_times_in_which_parameters_are_dropped():
    samples = [sample(t, 0, 0, 1000, stages=s) for t, s in ((0.0, 1), (1.0, 2), (2.0, 2), (3.0, 1))]
    samples += [sample(4.0, 0, 0, 1000, stages=2), sample(5.0, 0, 0, 1000, stages=2)]
    assert list(plots.merged_periods(samples)) == [(1.0, 3.0), (4.0, 5.0)]


def test_a_policy_without_an_overload_is_shown_at_the_moment_of_another():
    with_one = make_run([], [sample(12.0, 900, 200)])
    without = make_run([], [sample(12.0, 900, 0, 2400)], variant="static-pp")
    moments = plots.overload_moments({"recompute": [with_one], "static-pp": [without]})
    assert moments == {0: 12.0}
