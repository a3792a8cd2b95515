"""The log line every 10 s: rates of the interval, also the first one and over restarts."""

import logging

import pytest

from kunserve.core.ids import InstanceId
from kunserve.core.step import GroupLoad
from kunserve.runtime import stats_log
from kunserve.runtime.stats_log import INTERVAL_S, StatsLogger
from kunserve.runtime.status import ClusterView, InstanceStatus


class Log:
    """A logger of statistics on a clock of its own, and the lines it wrote."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(stats_log.time, "monotonic", lambda: self.now_s)
        caplog.set_level(logging.INFO, logger="kunserve.stats")
        self._caplog = caplog
        self._stats = StatsLogger()

    def after(self, seconds: float, *loads: GroupLoad | None) -> list[str]:
        """The lines that a snapshot causes `seconds` after the last one."""
        self.now_s += seconds
        self._caplog.clear()
        states = [
            InstanceStatus(InstanceId(index), 1, "ready", 0.0, load)
            for index, load in enumerate(loads)
        ]
        self._stats.observe(ClusterView(instances=tuple(states)))
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


def test_a_new_incarnation_that_did_more_than_the_last_counts_from_zero(log: Log):
    log.after(INTERVAL_S, load(100, 100))
    assert log.after(1.0, None) == []  # seen without a load, while it starts
    (line,) = log.after(INTERVAL_S - 1.0, load(300, 200))
    assert rates(line) == (30.0, 20.0)
