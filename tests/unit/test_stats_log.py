"""The log line every 10 s: rates of the interval, also the first one and over restarts; and the
totals behind it, which never go back."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kunserve.core.events import StepTiming
from kunserve.core.ids import Epoch, GroupId, InstanceId
from kunserve.core.layout import Group, LayerRange, Stage
from kunserve.core.step import GroupLoad
from kunserve.runtime import stats_log
from kunserve.runtime.stats_log import INTERVAL_S, CounterSums, StatsLogger
from kunserve.runtime.status import ClusterView, GroupStatus, InstanceStatus


class Log:
    """A logger of statistics on a clock of its own, and the lines it wrote."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(stats_log.time, "monotonic", lambda: self.now_s)
        caplog.set_level(logging.INFO, logger="kunserve.stats")
        self._caplog = caplog
        self.stats = StatsLogger()

    def after(self, seconds: float, *loads: GroupLoad | None) -> list[str]:
        """The lines that a snapshot causes `seconds` after the last one."""
        self.now_s += seconds
        self._caplog.clear()
        states = [
            InstanceStatus(InstanceId(index), 1, "ready", 0.0, load)
            for index, load in enumerate(loads)
        ]
        self.stats.observe(ClusterView(instances=tuple(states)))
        return self._caplog.messages


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Log:
    return Log(monkeypatch, caplog)


def load(prompt: int, generated: int, running: int = 0, queries: int = 0) -> GroupLoad:
    return GroupLoad(
        total_blocks=10,
        free_blocks=10,
        cached_blocks=0,
        num_running=running,
        num_waiting=0,
        queued_blocks=0,
        leases_seen=0,
        prompt_tokens=prompt,
        generated_tokens=generated,
        preemptions=0,
        prefix_queries=queries,
        prefix_hits=0,
    )


def rates(line: str) -> tuple[float, float]:
    """Prompt and generation throughput."""
    words = line.split()
    return tuple(float(words[index - 1]) for index, word in enumerate(words) if "/s" in word)  # type: ignore[return-value]


def test_the_first_interval_counts_from_zero(log: Log):
    assert log.after(INTERVAL_S - 0.1, load(100, 50)) == []
    (line,) = log.after(0.1, load(200, 50))
    assert line.startswith("Engine 000: Avg prompt throughput: 20.0 tokens/s")
    assert rates(line) == (20.0, 5.0)


def test_later_intervals_count_what_came_since(log: Log):
    log.after(INTERVAL_S, load(200, 50), load(10, 10))
    first, second = log.after(2 * INTERVAL_S, load(300, 50), load(10, 30))
    assert first.startswith("Engine 000")
    assert second.startswith("Engine 001")
    assert (rates(first), rates(second)) == ((5.0, 0.0), (0.0, 1.0))


def test_an_idle_interval_is_not_logged(log: Log):
    assert log.after(INTERVAL_S, load(0, 0)) == []
    assert len(log.after(INTERVAL_S, load(20, 50))) == 1
    assert log.after(INTERVAL_S, load(20, 50)) == []
    assert len(log.after(INTERVAL_S, load(20, 50, running=1))) == 1


@pytest.mark.parametrize(
    "fresh", [load(100, 500), load(500, 100), load(1000, 300), load(300, 300, queries=1)]
)
def test_a_new_incarnation_counts_from_zero(log: Log, fresh: GroupLoad):
    """Whichever counter shows it."""
    log.after(INTERVAL_S, load(300, 300, queries=700) if fresh.prefix_queries else load(999, 301))
    (line,) = log.after(INTERVAL_S, fresh)
    assert rates(line) == (fresh.prompt_tokens / 10, fresh.generated_tokens / 10)


# ---------------------------------------------------------------- totals


def view(
    *instances: InstanceStatus, groups: tuple[tuple[int, int, tuple[int, ...]], ...] = ()
) -> ClusterView:
    """A snapshot with groups of (id, epoch, instances in ring order)."""
    statuses = []
    for number, epoch, members in groups:
        stages = tuple(
            Stage(InstanceId(member), LayerRange(index, index + 1))
            for index, member in enumerate(members)
        )
        group = Group(GroupId(number), Epoch(epoch), stages)
        statuses.append(GroupStatus(group, 10, 10, 0, None))
    return ClusterView(instances=instances, groups=tuple(statuses))


NO_TIME = StepTiming()


def instance(
    number: int, of: GroupLoad | None, pid: int = 1, timing: StepTiming = NO_TIME
) -> InstanceStatus:
    return InstanceStatus(InstanceId(number), pid, "ready", 0.0, of, timing)


def generated(sums: CounterSums) -> dict[int, int]:
    return {number: done.load.generated_tokens for number, done in sums.totals.items()}


def test_a_new_incarnation_that_did_more_than_the_last_counts_from_zero():
    sums = CounterSums()
    sums.observe(view(instance(0, load(100, 100)), groups=((0, 0, (0,)),)))
    sums.observe(view(instance(0, None, pid=2)))
    sums.observe(view(instance(0, load(300, 200), pid=2), groups=((1, 0, (0,)),)))
    assert generated(sums) == {0: 300}


def test_every_epoch_counts_from_zero_and_the_totals_go_on():
    sums = CounterSums()
    apart = ((0, 0, (0,)), (1, 0, (1,)))
    sums.observe(view(instance(0, load(0, 10)), instance(1, load(0, 20)), groups=apart))
    merged = ((2, 1, (0, 1)),)
    # Until the first report of the new scheduler there is no load, and then it has done more than
    # the one before it.
    sums.observe(view(instance(0, None), instance(1, None), groups=merged))
    assert generated(sums) == {0: 10, 1: 20}
    sums.observe(view(instance(0, load(0, 15)), instance(1, None), groups=merged))
    sums.observe(view(instance(0, load(0, 19)), instance(1, None), groups=merged))
    assert generated(sums) == {0: 29, 1: 20}
    again = ((2, 2, (0, 1)),)
    sums.observe(view(instance(0, load(0, 19)), instance(1, None), groups=again))
    assert generated(sums) == {0: 48, 1: 20}
    sums.observe(view(instance(0, None), instance(1, load(0, 1)), groups=((4, 3, (1, 0)),)))
    assert generated(sums) == {0: 48, 1: 21}


def test_a_transition_that_is_given_up_counts_nothing_twice():
    sums = CounterSums()
    groups = ((0, 0, (0,)),)
    sums.observe(view(instance(0, load(5, 10)), groups=groups))
    sums.observe(view(instance(0, None), groups=groups))  # fenced
    sums.observe(view(instance(0, load(5, 12)), groups=groups))
    assert generated(sums) == {0: 12}


def test_the_time_of_steps_goes_on_through_epochs_and_starts_again_with_the_process():
    sums = CounterSums()

    def seen(pid: int, epoch: int, timing: StepTiming) -> StepTiming:
        groups = ((epoch, epoch, (0,)),)
        sums.observe(view(instance(0, load(0, 0), pid, timing), groups=groups))
        return sums.totals[InstanceId(0)].timing

    assert seen(7, 0, StepTiming(10, 100, 5)) == StepTiming(10, 100, 5)
    assert seen(7, 0, StepTiming()) == StepTiming(10, 100, 5)  # follows in a ring
    assert seen(7, 1, StepTiming(12, 130, 6)) == StepTiming(12, 130, 6)
    assert seen(8, 2, StepTiming(20, 200, 7)) == StepTiming(32, 330, 13)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.none() | st.integers(0, 50))))
def test_totals_never_go_back(steps: list[tuple[int, int, int | None]]):
    sums = CounterSums()
    last = 0
    for epoch, pid, count in steps:
        of = None if count is None else load(count, count)
        timing = StepTiming() if count is None else StepTiming(count, count, count)
        sums.observe(view(instance(0, of, pid, timing), groups=((epoch, epoch, (0,)),)))
        total = sums.totals[InstanceId(0)]
        assert total.load.generated_tokens >= last
        assert total.load.prompt_tokens == total.load.generated_tokens
        last = total.load.generated_tokens


def test_a_snapshot_of_the_totals_does_not_change():
    sums = CounterSums()
    sums.observe(view(instance(0, load(0, 10))))
    before = sums.totals
    sums.observe(view(instance(0, load(0, 11))))
    assert before[InstanceId(0)].load.generated_tokens == 10


def test_the_line_of_a_group_is_its_leaders(log: Log, caplog: pytest.LogCaptureFixture):
    log.after(INTERVAL_S, load(10, 10), load(20, 20))
    log.now_s += INTERVAL_S
    caplog.clear()
    merged = ((2, 1, (1, 0)),)
    log.stats.observe(view(instance(0, None), instance(1, load(0, 50, 3)), groups=merged))
    (line,) = caplog.messages
    assert line.startswith("Engine 001 (leads 1+0): Avg prompt throughput: 0.0 tokens/s")
    assert rates(line) == (0.0, 5.0)
    assert "Running: 3 reqs" in line


def test_what_was_done_before_a_merge_is_still_logged(log: Log, caplog: pytest.LogCaptureFixture):
    log.after(1.0, load(10, 10), load(20, 20))
    log.now_s += INTERVAL_S - 1
    caplog.clear()
    merged = ((2, 1, (0, 1)),)
    log.stats.observe(view(instance(0, None), instance(1, None), groups=merged))
    first, second = caplog.messages
    assert (rates(first), rates(second)) == ((1.0, 1.0), (2.0, 2.0))
