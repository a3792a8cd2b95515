"""`kunserve bench transition` and `bench pipeline`: what they make of what they measured."""

from __future__ import annotations

import asyncio
import os
import threading
from dataclasses import replace

import msgspec
import pytest

from kunserve.bench import pipeline, transition
from kunserve.bench.client import BenchError
from kunserve.bench.cluster import (
    LayoutInfo,
    Stream,
    TransitionFigures,
    TransitionInfo,
    as_json,
    compute_cpu_s,
)
from kunserve.bench.raw_transfer import RawRates
from kunserve.bench.transition_runs import ControlRun, IdleRun, LoadedRun
from kunserve.cli import build_parser
from kunserve.core.errors import ConfigError
from kunserve.core.ids import InstanceId, RequestId, TransitionId
from kunserve.core.transition import PhaseTime, TransitionRecord
from kunserve.runtime.status import ClusterView
from kunserve.runtime.threads import WorkerThread
from kunserve.server.admin import layout_json

MS = 1_000_000
MIB = 1 << 20

DROP = TransitionFigures(
    phases_ns={"prepare": 2 * MS, "fence": 30 * MS, "remap": 8 * MS, "adopt": 5 * MS,
               "move": 20 * MS},
    freed_bytes=512 * MIB,
    gained_bytes=0,
    exchanged_bytes=100_000_000,
    gathered_bytes=0,
    remap_ns=6 * MS,
    requests=3,
    stalled_ns=(10 * MS, 30 * MS, 20 * MS),
    activations=7,
    activation_p99_ns=2 * MS,
)  # fmt: skip
RESTORE = msgspec.structs.replace(
    DROP,
    phases_ns={"prepare": 2000 * MS, "fence": 4 * MS, "remap": 2 * MS, "adopt": 1 * MS},
    gained_bytes=512 * MIB,
)
LOADED = LoadedRun(
    drop=DROP,
    restore=RESTORE,
    texts=("merge #0", "split #1"),
    step_ms=40.0,
    queued_extra_ms=80.0,
    drop_gap_ms=150.0,
    drop_gap_short_ms=90.0,
    restore_gap_ms=60.0,
    pss_bytes=(1000 * MIB, 1040 * MIB, 1010 * MIB),
    kv_tokens_before=5632,
    kv_tokens_merged=15104,
    stage_cpu_s=(0.8, 0.76),
)
RESULT = transition.TransitionResult(
    control=(ControlRun(DROP, "merge #0", first_token_ms=120.0, own_ms=50.0),),
    idle=(IdleRun(DROP, "merge #0"),),
    loaded=(LOADED,),
    raw_idle=(RawRates(one_way=3e9, both_ways=5e9),),
    raw_loaded=(RawRates(one_way=2e9, both_ways=8e9),),
    ablation={"uncoordinated": LOADED},
    base_tokens=5824,
)


def cells(result: transition.TransitionResult) -> dict[str, str]:
    """Figures by name; of equal names the first."""
    return {name.strip(): figure for name, figure, _ in reversed(transition.rows(result))}


@pytest.mark.parametrize(
    ("name", "figure"),
    [
        ("REMAP of an instance, ms", "6.0 (6.0 - 6.0)"),
        # 6 ms for the half of 512 MiB, four times 64.
        ("REMAP, ms per 64 MiB", "1.50 (1.50 - 1.50)"),
        ("command to first token that did not fit, less its own prefill, ms", "70.0"),
        ("command to RUN, ms", "45.0"),
        ("fence, ms", "30.0"),
        # 100 MB in ADOPT and MOVE, 25 ms.
        ("GB/s, both directions", "4.00"),
        ("share of raw", "80%"),
        ("activations during it", "7"),
        ("stall, median, ms", "20.0"),
        ("stall, longest, ms", "30.0"),
        ("queued request waits longer by, steps", "2.0"),
        ("restore: gained, MiB/s", "256"),
        ("restore: cut-over, fence to adopt, ms", "7.0"),
        ("most over least", "4.0%"),
        ("over before", "2.59"),
        ("stage imbalance", "2.5%"),
        ("uncoordinated: move, ms", "25"),
    ],
)
def test_a_figure_of_the_table(name: str, figure: str):
    assert cells(RESULT)[name] == figure


def test_the_loaded_exchange_is_compared_with_the_loaded_raw_rate():
    assert transition.shares(RESULT.loaded, RESULT.raw_loaded) == [pytest.approx(0.5)]


def test_a_run_without_a_restore_has_no_rows_of_it():
    merged = replace(LOADED, restore=None, pss_bytes=LOADED.pss_bytes[:2])
    names = cells(replace(RESULT, loaded=(merged,)))
    assert not [name for name in names if name.startswith("restore")]
    assert names["most over least"] == "4.0%"


def test_the_report_is_json():
    document = msgspec.json.decode(as_json("schema/1", result=RESULT))
    assert document["schema"] == "schema/1"
    assert document["result"]["loaded"][0]["drop"]["phases_ns"]["move"] == 20 * MS


def test_the_admin_api_says_what_the_benchmark_reads():
    record = TransitionRecord(
        TransitionId(4), "merge", "operator", "done", "", (), (),
        phases=(PhaseTime("fence", 3), PhaseTime("move", 5)),
        remap_ns=7,
        stalled=((RequestId("a"), 11),),
        activations=2,
    )  # fmt: skip
    answer = msgspec.json.encode(layout_json(ClusterView(last_transition=record)))
    last = msgspec.json.decode(answer, type=LayoutInfo).last_transition
    assert isinstance(last, TransitionInfo)
    assert (last.id, last.outcome, last.figures.remap_ns) == (4, "done", 7)
    assert last.figures.phases_ns == {"fence": 3, "move": 5}
    assert last.figures.stalled_ns == (11,)
    assert last.figures.ms("fence", "move", "none") == pytest.approx(8e-6)


def test_gaps_between_tokens_around_a_time():
    stream = Stream(1, 0, token_ns=[10 * MS, 20 * MS, 50 * MS, 55 * MS, 90 * MS])
    assert stream.first_token_ms == 10.0
    assert stream.gaps_ms() == [10.0, 30.0, 5.0, 35.0]
    # A gap that began before and one that ended after count.
    assert stream.gaps_ms(30 * MS, 60 * MS) == [30.0, 5.0, 35.0]
    assert stream.gaps_ms(51 * MS, 52 * MS) == [5.0]


def test_waiting_for_a_token_that_cannot_come():
    with pytest.raises(BenchError, match="no room"):
        asyncio.run(Stream(1, 0, error="no room").reached(1))


def test_the_compute_thread_is_found_by_its_name():
    begun = threading.Event()
    thread: WorkerThread[int, int] = WorkerThread("compute", lambda job: begun.set() or job)
    try:
        assert compute_cpu_s(os.getpid()) >= 0.0
    finally:
        thread.join()
    with pytest.raises(BenchError, match="no compute thread"):
        compute_cpu_s(os.getpid())


def window(layout: str, tokens: float, stage_cpu_s: tuple[float, ...]) -> pipeline.Window:
    """A window of ten seconds at batch 8."""
    return pipeline.Window(layout, 8, 10.0, tokens, stage_cpu_s, ())


def test_the_ratio_is_that_of_neighbouring_windows():
    result = pipeline.BatchResult(
        8,
        (
            window("whole", 4000.0, (9.0, 9.0)),
            window("merged", 3600.0, (9.0, 8.0)),
            window("whole", 2000.0, (9.0, 9.0)),  # the machine has slowed down
            window("merged", 1900.0, (9.0, 8.0)),
            window("whole", 4000.0, (9.0, 9.0)),
            window("merged", 2000.0, (9.0, 8.0)),
        ),
    )
    assert result.ratios == [0.9, 0.95, 0.5]
    assert result.ratio == 0.9


def test_a_window_in_figures():
    seen = window("merged", 2000.0, (9.0, 8.0))
    assert seen.tokens_per_s == 200.0
    assert seen.idle == pytest.approx((0.1, 0.2))
    assert seen.imbalance == pytest.approx(1 - 8.5 / 9)
    assert seen.cpu_ms_per_token == pytest.approx(8.5)


def test_flags():
    parser = build_parser(["bench", "pipeline"])
    args = parser.parse_args(["bench", "pipeline", "--batch-sizes", "4,16"])
    assert args.batch_sizes == (4, 16)
    args = build_parser(["bench", "transition"]).parse_args(["bench", "transition"])
    assert (args.repeats, args.kv_cache_memory_bytes, args.ablation) == (3, 128 * MIB, True)


@pytest.mark.parametrize("text", ["", "8,", "x", "0"])
def test_batch_sizes_that_are_none(text: str):
    with pytest.raises(ConfigError):
        pipeline._batch_sizes(text)


def test_an_instance_is_an_instance():
    """The layout of the admin API has what the benchmark asks of groups and instances."""
    answer = {
        "groups": [
            {"id": 1, "kv_tokens": 96, "num_requests": 0, "in_transition": None,
             "stages": [{"instance": 0, "layers": [0, 12]}]}
        ],
        "instances": [{"id": InstanceId(0), "pid": 71, "state": "ready", "pages": {}}],
    }  # fmt: skip
    layout = msgspec.json.decode(msgspec.json.encode(answer), type=LayoutInfo)
    assert layout.groups[0].stages[0].layers == (0, 12)
    assert layout.instances[0].pid == 71
