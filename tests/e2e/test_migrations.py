"""Running requests move between real processes: every stream gives exactly the tokens and logprobs
that it gives where nothing moves, also when an instance is killed in the middle of a migration.

Servers run with --check-accounting: all books are checked after every step.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.layouts import Layouts
from tests.support.models import build_tiny_model
from tests.support.servers import (
    ADMIN_FLAGS,
    Answer,
    ServerProcess,
    StreamLoad,
    running_server,
    until,
)

pytestmark = pytest.mark.timeout(300)  # a busy machine is slow, not wrong

NUM_STREAMS = 12
LONG, SHORT = 300, 8

BODIES: list[dict[str, Any]] = [
    {
        "prompt": [(7 * index + position) % 256 for position in range(20 + index)],
        "max_tokens": SHORT if index % 2 else LONG,
        "temperature": 0.9 if index % 4 else 0.0,
        "seed": index,
        "logprobs": 1,
        "ignore_eos": True,
        "return_tokens_as_token_ids": True,
    }
    for index in range(NUM_STREAMS)
]
"""Dispatch takes instances by turns: one gets all long answers, and soon the other one is empty."""

FLAGS = (
    *("--instances", "2", "--kv-cache-memory-bytes", "16MiB", "--heartbeat-timeout", "2"),
    *("--policy", "migrate"),
)
SLOW_LINK = ("--link-gbps", "0.01")
"""A request takes a second or more: long enough to strike in the middle."""

RUNNING = "num_requests_running"
NO_CACHE = ("--no-enable-prefix-caching",)
"""Where prompts come again, dispatch goes by turns only without it."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny_model(
        directory, "llama", seed=7, max_position_embeddings=4096, num_key_value_heads=14
    )
    return directory


@pytest.fixture(scope="module")
def slow(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("slow")
    with running_server(directory, model, *FLAGS, *SLOW_LINK, *NO_CACHE, *ADMIN_FLAGS) as server:
        yield server


@pytest.fixture(scope="module")
def calm(slow: ServerProcess) -> list[Answer]:
    """What the streams give where nothing moves, because there is room for all."""
    answers: list[Answer] = []
    for first in range(0, NUM_STREAMS, 4):
        with StreamLoad(slow.url, BODIES[first : first + 4]) as load:
            load.result()
        answers += load.answers
    assert total(slow, "migrations_total") == 0
    return answers


def total(server: ServerProcess, metric: str) -> float:
    return sum(value for (name, _), value in server.metrics().items() if name == metric)


def test_long_answers_move_and_stay_the_same(model: Path, calm: list[Answer], tmp_path: Path):
    with running_server(tmp_path, model, *FLAGS) as server:
        with StreamLoad(server.url, BODIES) as load:
            load.result()
        assert load.answers == calm
        server.wait_idle()
        assert re.search(r"migration #\d+: request \S+ \d -> \d done in", server.log)
        assert total(server, "migrated_bytes_total") > 0
        assert "was lost" not in server.log


@pytest.mark.parametrize("role", ["source", "target"])
def test_an_instance_is_killed_during_a_migration(
    slow: ServerProcess, calm: list[Answer], role: str
):
    slow.wait_ready(2)
    with Layouts(slow) as layouts, StreamLoad(slow.url, BODIES) as load:
        pids = layouts.pids()
        until(lambda: total(slow, "num_migrations_running") or load.is_over, "a migration")
        running = {e: n for (name, e), n in slow.metrics().items() if name == RUNNING}
        source, target = sorted(running, key=lambda engine: -running[engine])
        victim = source if role == "source" else target
        pid = pids[int(victim)]
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        load.result(120.0)
    assert load.answers == calm
    ends = re.findall(rf"{source} -> {target} cancelled in \S+ ms \((.*)\)", slow.log)
    assert f"instance {victim} was lost, or is in another group" in ends
    slow.wait_ready(2)
    slow.wait_idle()
