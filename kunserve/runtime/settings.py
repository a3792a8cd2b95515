"""What the front tells a new instance process."""

from __future__ import annotations

from dataclasses import dataclass

from kunserve.core.ids import InstanceId
from kunserve.policy.scheduler import SchedulerConfig
from kunserve.runtime.transport import ClientKeys
from kunserve.worker.settings import EngineSettings


@dataclass(frozen=True)
class InstanceSettings:
    """What the front writes to a new instance's standard input. `exchange`: "coordinated" or
    "uncoordinated"; `link_gbps` bounds each link of the instance, None for no bound;
    `profile_directory` has measured cost models, None: measure at start."""

    instance: InstanceId
    incarnation: int
    keys: ClientKeys
    engine: EngineSettings
    scheduler: SchedulerConfig
    log_level: str
    check_accounting: bool
    exchange: str = "coordinated"
    link_gbps: float | None = None
    profile_directory: str | None = None
