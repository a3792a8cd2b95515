"""What HTTP is told of the cluster: health by instances' states, and the sums of their work."""

import threading
import time
from dataclasses import replace

import pytest

from kunserve.core.ids import InstanceId
from kunserve.runtime.stats_log import CounterSums
from kunserve.runtime.status import ClusterView, InstanceStatus
from kunserve.server.cluster_engine import ClusterEngine
from tests.support.fake_engine import LOAD, MERGED

TIMEOUT_S = 10.0


class FrozenCluster:
    """A cluster that stands still."""

    def __init__(self, view: ClusterView) -> None:
        self.view = replace(view, at_ns=view.at_ns or time.monotonic_ns())
        self.ended = threading.Event()


def engine(cluster: FrozenCluster) -> ClusterEngine:
    sums = CounterSums()
    sums.observe(cluster.view)
    return ClusterEngine(cluster, sums, 100, TIMEOUT_S)  # type: ignore[arg-type]


def cluster_of(*instances: tuple[str, float]) -> FrozenCluster:
    """Instances of (state, seconds since the last message)."""
    return FrozenCluster(
        ClusterView(
            instances=tuple(
                InstanceStatus(InstanceId(index), 1, state, age_s, None)
                for index, (state, age_s) in enumerate(instances)
            )
        )
    )


@pytest.mark.parametrize(
    ("instances", "healthy"),
    [
        ([("ready", 1.0)], True),
        ([("ready", 11.0)], False),
        ([("ready", 1.0), ("ready", 11.0)], False),
        ([("ready", 1.0), ("resetting", 11.0)], True),
        ([("resetting", 11.0), ("starting", 0.0)], True),  # a broken ring: one dead, one resets
        ([("draining", 1.0)], True),
        ([("ready", 1.0), ("draining", 11.0)], False),
        ([("ready", 1.0), ("waiting for restart", 99.0), ("dead", 99.0)], True),
        ([("starting", 1.0), ("waiting for restart", 1.0)], False),
        ([("dead", 1.0)], False),
        ([], False),
    ],
)
def test_health(instances: list[tuple[str, float]], healthy: bool):
    assert engine(cluster_of(*instances)).status().healthy is healthy


def test_a_controller_that_stands_still_or_has_ended_is_not_healthy():
    cluster = cluster_of(("ready", 0.0))
    cluster.ended.set()
    assert not engine(cluster).status().healthy
    cluster = cluster_of(("ready", 0.0))
    cluster.view = replace(cluster.view, at_ns=time.monotonic_ns() - int(11e9))
    assert not engine(cluster).status().healthy


def test_the_layout_and_the_sums_are_handed_on():
    leader, other = MERGED.instances
    view = replace(MERGED, instances=(replace(leader, load=LOAD), other))
    status = engine(FrozenCluster(view)).status()
    assert (status.epoch, status.groups, status.block_size) == (4, MERGED.groups, 16)
    assert status.dropped_bytes == 1000
    assert status.counters[InstanceId(0)].load.preemptions == LOAD.preemptions
    assert status.counters[InstanceId(1)].load.preemptions == 0
