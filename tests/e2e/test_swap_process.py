"""`--policy swap` on real processes: KV goes to host memory and back, and every stream gives the
tokens and logprobs that it gives with memory for all.

The server checks its books after every step, and pages are NaN after a change of owner.
"""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from collections.abc import Iterator, Sequence
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
BODIES: list[dict[str, Any]] = [
    {
        "prompt": [(7 * index + position) % 256 for position in range(20 + 6 * index)],
        "max_tokens": 140,
        "temperature": 0.0 if index % 2 else 0.9,
        "seed": index,
        "logprobs": 2,
        "ignore_eos": True,
        "return_tokens_as_token_ids": True,
    }
    for index in range(NUM_STREAMS)
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Two instances, each with KVCache for three streams and host memory for the rest."""
    model = tmp_path_factory.mktemp("tiny")
    build_tiny_model(model, "llama", seed=7, max_position_embeddings=2048)
    flags = ("--instances", "2", "--kv-cache-memory-bytes", "2MiB", "--policy", "swap")
    with running_server(tmp_path_factory.mktemp("swap"), model, *flags, *ADMIN_FLAGS) as server:
        yield server


@pytest.fixture(scope="module")
def calm(server: ServerProcess) -> list[Answer]:
    """Three streams at a time: nothing is preempted."""
    answers = []
    for first in range(0, NUM_STREAMS, 3):
        with StreamLoad(server.url, BODIES[first : first + 3]) as load:
            load.result()
        answers += load.answers
    assert totals(server)["num_preemptions_total"] == 0
    return answers


def totals(server: ServerProcess) -> dict[str, float]:
    """Metrics summed over the instances."""
    summed: dict[str, float] = defaultdict(float)
    for (name, _), value in server.metrics().items():
        summed[name] += value
    return summed


def assert_same(answers: Sequence[Answer], calm: Sequence[Answer]) -> None:
    for answer, expected in zip(answers, calm, strict=True):
        assert answer.tokens == expected.tokens
        assert answer.logprobs == expected.logprobs


def test_tokens_and_logprobs_are_those_without_preemption(
    server: ServerProcess, calm: list[Answer]
) -> None:
    with StreamLoad(server.url, BODIES) as load:
        load.result()
    assert_same(load.answers, calm)
    after = totals(server)
    assert after["num_swapped_in_total"] == after["num_swapped_out_total"] > 2
    assert after["num_swapped_out_total"] == after["num_preemptions_total"]
    assert after["num_swaps_refused_total"] == 0
    block_bytes = 7 * 4096
    assert after["swap_bytes_total"] > 2 * 3 * block_bytes
    server.wait_idle()


def test_clients_that_leave_in_the_middle_of_it_leave_nothing_behind(
    server: ServerProcess, calm: list[Answer]
) -> None:
    leave_after = {index: 20 + 10 * index for index in range(1, NUM_STREAMS, 2)}
    with StreamLoad(server.url, BODIES, leave_after) as load:
        load.result()
    for index, (answer, expected) in enumerate(zip(load.answers, calm, strict=True)):
        if index in leave_after:
            assert answer.tokens == expected.tokens[: len(answer.tokens)]
        else:
            assert answer.tokens == expected.tokens
    server.wait_idle()


def went_and_not_come(server: ServerProcess) -> list[float]:
    """Requests of each instance that went to host memory and did not come back so far."""
    values = server.metrics()
    return [
        values["num_swapped_out_total", instance] - values["num_swapped_in_total", instance]
        for instance in "01"
    ]


def wait_swapped(server: ServerProcess, before: list[float]) -> int:
    """Wait until an instance has more of them than before; the instance."""

    def swapping() -> list[int]:
        now = went_and_not_come(server)
        return [instance for instance in (0, 1) if now[instance] > before[instance]]

    instance: int = until(swapping, "a request in host memory", 60.0)[0]
    return instance


def test_a_merge_finds_swapped_requests_and_computes_them_again(
    server: ServerProcess, calm: list[Answer]
) -> None:
    before = went_and_not_come(server)
    with Layouts(server) as layouts:
        with StreamLoad(server.url, BODIES) as load:
            wait_swapped(server, before)
            layouts.drop()
            load.result()
        assert_same(load.answers, calm)
        layouts.restore()
        layouts.wait_whole()
    with StreamLoad(server.url, BODIES) as again:  # whole instances swap again
        again.result()
    assert_same(again.answers, calm)
    server.wait_idle()


def test_an_instance_that_is_killed_while_it_swaps(
    server: ServerProcess, calm: list[Answer]
) -> None:
    before = went_and_not_come(server)
    with Layouts(server) as layouts, StreamLoad(server.url, BODIES) as load:
        victim = layouts.pids()[wait_swapped(server, before)]
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        load.result()
    assert_same(load.answers, calm)
    server.wait_ready(2)
    server.wait_idle()
    assert "was lost: killed by SIGKILL" in server.log
