"""Processes that die or stand still while layouts change: every stream gives exactly what it gives
without faults, the survivors become whole instances again, and nothing stays behind."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.layouts import Layouts
from tests.support.models import build_tiny_model
from tests.support.servers import (
    MANUAL_FLAGS,
    Answer,
    ServerProcess,
    StreamLoad,
    running_server,
    until,
)

pytestmark = pytest.mark.timeout(300)  # a busy machine is slow, not wrong

NUM_STREAMS = 8
MAX_TOKENS = 300
FEW = 50
"""Tokens of every stream before anything happens."""

SLOW_LINK = ("--link-gbps", "0.01")
"""A part takes half a second, an exchange some seconds: long enough to strike in the middle."""

BODIES: list[dict[str, Any]] = [
    {
        "prompt": [(7 * index + position) % 256 for position in range(20 + 9 * index)],
        "max_tokens": MAX_TOKENS,
        "temperature": 0.0 if index % 2 else 0.9,
        "seed": index,
        "logprobs": 1,
        "ignore_eos": True,
        "return_tokens_as_token_ids": True,
    }
    for index in range(NUM_STREAMS)
]


@dataclass(frozen=True)
class Fault:
    """Signal `number` to instance `victim`, of which 0 leads the merged group, while a transition
    is in `state`: of a drop for "move", else of a restore; or in no transition, when merged."""

    state: str
    victim: int
    number: signal.Signals

    def __str__(self) -> str:
        role = "the leader" if self.victim == 0 else f"stage {self.victim}"
        return f"{self.number.name} to {role}, {self.state}"


FAULTS = (
    Fault("move", 0, signal.SIGKILL),
    Fault("move", 2, signal.SIGSTOP),
    Fault("prepare", 1, signal.SIGKILL),
    Fault("gather", 1, signal.SIGSTOP),
    Fault("merged", 0, signal.SIGKILL),
)
MORE_FAULTS = (
    Fault("move", 1, signal.SIGKILL),
    Fault("prepare", 0, signal.SIGSTOP),
    Fault("gather", 2, signal.SIGKILL),
    Fault("merged, idle", 2, signal.SIGSTOP),
)
"""With them, each instance is lost three times: so often it is started again."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny_model(
        directory, "llama", seed=7, max_position_embeddings=4096, num_key_value_heads=14
    )
    return directory


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    flags = ("--instances", "3", "--kv-cache-memory-bytes", "32MiB", "--heartbeat-timeout", "2")
    directory = tmp_path_factory.mktemp("cluster")
    with running_server(directory, model, *flags, *SLOW_LINK, *MANUAL_FLAGS) as server:
        yield server


@pytest.fixture(scope="module")
def calm(cluster: ServerProcess) -> list[Answer]:
    """What the streams give without any transition."""
    with StreamLoad(cluster.url, BODIES) as load:
        load.result()
    return load.answers


@pytest.mark.parametrize(
    "fault",
    [*FAULTS, *(pytest.param(fault, marks=pytest.mark.slow) for fault in MORE_FAULTS)],
    ids=str,
)
def test_an_instance_is_lost(cluster: ServerProcess, calm: list[Answer], fault: Fault):
    with Layouts(cluster) as layouts:
        before = layouts.pids()
        victim = before[fault.victim]
        assert victim is not None
        if fault.state == "merged, idle":
            merge(layouts)
            os.kill(victim, fault.number)
            until(lambda: layouts.pids()[fault.victim] != victim, "the loss")
        with StreamLoad(cluster.url, BODIES) as load:
            wish = None
            if fault.state != "merged, idle":
                load.wait_tokens(FEW)
                wish = reach(layouts, fault)
                os.kill(victim, fault.number)
            load.result(120.0)
            assert load.answers == calm
        if wish is not None:
            assert wish.result().status_code == 409
        layouts.wait_whole()
        after = layouts.pids()
        assert after.pop(fault.victim) != before.pop(fault.victim)
        assert after == before
        assert_ended(cluster, fault)
    cluster.wait_idle()


def merge(layouts: Layouts) -> None:
    layouts.drop()
    layouts.wait_settled([range(3)])
    assert min(layouts.stages().items(), key=lambda stage: stage[1])[0] == 0


def reach(layouts: Layouts, fault: Fault) -> Future[httpx.Response] | None:
    """Go to where the fault strikes. Returns the wish that it will leave unfulfilled."""
    if fault.state == "move":
        layouts.drop()
        layouts.wait_state("move")
        return None
    merge(layouts)
    if fault.state == "merged":
        return None
    wish = layouts.post_ahead("restore")
    layouts.wait_state(fault.state)
    return wish


def assert_ended(cluster: ServerProcess, fault: Fault) -> None:
    """The log says how the last transition ended."""
    last = re.findall(r"(?:merge|split) #\d+ .*", cluster.log)[-1]
    expected = {"move": "broken", "prepare": "aborted", "gather": "aborted"}
    outcome = expected.get(fault.state, "done")
    assert f" {outcome} in " in last, last
    if outcome != "done":
        assert f"instance {fault.victim} was lost" in last


def test_the_front_is_killed_while_kv_moves(model: Path, tmp_path: Path):
    flags = ("--instances", "2", "--kv-cache-memory-bytes", "32MiB", *SLOW_LINK, *MANUAL_FLAGS)
    with running_server(tmp_path, model, *flags) as server, Layouts(server) as layouts:
        with StreamLoad(server.url, BODIES) as load:
            load.wait_tokens(FEW)
            layouts.drop()
            layouts.wait_state("move")
            server.signal(signal.SIGKILL)
            server.wait()
            until(lambda: not server.processes(), "instances gone", 3.0)
            with pytest.raises((httpx.HTTPError, AssertionError)):
                load.result()
        server.assert_nothing_left()
