"""Real processes change their layout by themselves, and every stream gives the tokens and logprobs
that it gives without: the policies on a burst that two tiny instances cannot hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_transitions import (
    TINY_LAYERS,
    TINY_PAGE_BYTES,
    Body,
    assert_same,
    calm_answers,
    tiny_bodies,
)
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

pytestmark = pytest.mark.timeout(300)

KV_PAGES = 8
"""Of each layer: 896 tokens an instance."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny_model(
        directory, "llama", seed=7, max_position_embeddings=4096, num_key_value_heads=14
    )
    return directory


BODIES: list[Body] = tiny_bodies(24, 150)
"""About 4,800 tokens of KVCache, all at once."""


def server_of(directory: Path, model: Path, *flags: str, kv_pages: int = KV_PAGES) -> Any:
    size = str(kv_pages * TINY_LAYERS * TINY_PAGE_BYTES)
    return running_server(
        directory,
        model,
        *("--instances", "2", *ADMIN_FLAGS, "--kv-cache-memory-bytes", size),
        *("--no-enable-prefix-caching", *flags),
    )


@pytest.fixture(scope="module")
def calm(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Answer]]:
    """What the streams give with memory for all of them."""
    directory = tmp_path_factory.mktemp("ample")
    with server_of(directory, model, "--no-drop", kv_pages=10 * KV_PAGES) as server:
        yield calm_answers(server, BODIES, 240.0)


def transitions(server: ServerProcess, kind: str) -> float:
    return server.count("transitions_total", kind=kind, outcome="done")


def verdicts(server: ServerProcess, verdict: str) -> float:
    return server.count("overload_decisions_total", verdict=verdict)


def run_burst(server: ServerProcess, calm: list[Answer]) -> None:
    with StreamLoad(server.url, BODIES) as load:
        load.result(240.0)
    assert_same(load, calm)


def test_a_burst_drops_and_what_is_left_restores(model: Path, tmp_path: Path, calm: list[Answer]):
    with server_of(tmp_path, model, "--trigger", "memory-only") as server:
        run_burst(server, calm)
        assert transitions(server, "merge") >= 1
        until(lambda: transitions(server, "split") >= 1, "the layout is restored", 60.0)
        server.wait_idle()
        with Layouts(server) as layouts:
            assert layouts.groups() == {frozenset({0}), frozenset({1})}
            assert layouts.now()["policy"] == {"name": "kunserve", "drop": True}
        assert "overload" in server.log


def test_observe_decides_and_never_acts(model: Path, tmp_path: Path, calm: list[Answer]):
    flags = ("--policy", "observe", "--trigger", "memory-only")
    with server_of(tmp_path, model, *flags) as server:
        run_burst(server, calm)
        until(lambda: verdicts(server, "would act") >= 1, "a decision is counted", 10.0)
        assert transitions(server, "merge") == 0


def test_the_kill_switch_stops_drops_at_once(model: Path, tmp_path: Path, calm: list[Answer]):
    with server_of(tmp_path, model, "--trigger", "memory-only") as server:
        with Layouts(server) as layouts:
            answer = layouts.post("policy", drop=False)
            assert answer.status_code == 200
            assert answer.json()["policy"]["drop"] is False
            assert layouts.post("policy", drop="no").status_code == 400
        run_burst(server, calm)
        assert transitions(server, "merge") == 0


def test_static_pipelines_from_the_start(model: Path, tmp_path: Path, calm: list[Answer]):
    with server_of(tmp_path, model, "--policy", "static-pp") as server:
        with Layouts(server) as layouts:
            pair = {frozenset({0, 1})}
            until(lambda: layouts.groups() == pair, "the pair is formed", 30.0)
            run_burst(server, calm)
            assert layouts.groups() == pair
        assert transitions(server, "split") == 0
