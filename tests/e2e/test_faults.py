"""Real processes that die: no stream loses, repeats or changes a token, and nothing stays."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.models import build_tiny_model
from tests.support.servers import (
    ServerProcess,
    StreamLoad,
    running_server,
    started_command,
    until,
)

NUM_STREAMS = 8
MAX_TOKENS = 300
FEW = 20
"""Tokens of every stream before a fault strikes: early enough that none has ended."""

BODIES: list[dict[str, Any]] = [
    {
        "prompt": [(7 * index + position) % 256 for position in range(20 + 9 * index)],
        "max_tokens": MAX_TOKENS,
        "temperature": 0.0 if index % 2 else 0.9,
        "seed": index,
        "ignore_eos": True,
    }
    for index in range(NUM_STREAMS)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    build_tiny_model(directory, "llama", seed=7, max_position_embeddings=2048)
    return directory


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Two instances that a test may kill, each a few times (three restarts in a row at most)."""
    with running_server(
        tmp_path_factory.mktemp("cluster"), model, "--instances", "2", "--heartbeat-timeout", "2"
    ) as server:
        yield server


@pytest.fixture(scope="module")
def calm(cluster: ServerProcess) -> list[list[int]]:
    """The tokens of a run without any fault."""
    with StreamLoad(cluster.url, BODIES) as load:
        tokens = load.result()
    assert [len(each) for each in tokens] == [MAX_TOKENS] * NUM_STREAMS
    assert len({tuple(each) for each in tokens}) == NUM_STREAMS
    return tokens


def assert_recovers(
    cluster: ServerProcess, load: StreamLoad, calm: list[list[int]], dead: list[int]
) -> None:
    """The streams end as if nothing had happened; new instances take the place of the dead."""
    assert load.result() == calm
    cluster.wait_ready(2)
    instances = cluster.instances()
    assert len(instances) == 2
    assert not set(dead) & set(instances)
    with StreamLoad(cluster.url, BODIES) as again:  # the new ones compute the same
        assert again.result() == calm
    cluster.wait_idle()


# ---------------------------------------------------------------- instances


def test_an_instance_is_killed(cluster: ServerProcess, calm: list[list[int]]):
    victim = cluster.instances()[0]
    with StreamLoad(cluster.url, BODIES) as load:
        load.wait_tokens(FEW)
        os.kill(victim, signal.SIGKILL)
        assert_recovers(cluster, load, calm, [victim])
    assert "was lost: killed by SIGKILL" in cluster.log


def test_an_instance_stands_still(cluster: ServerProcess, calm: list[list[int]]):
    victim = cluster.instances()[0]
    with StreamLoad(cluster.url, BODIES) as load:
        load.wait_tokens(FEW)
        os.kill(victim, signal.SIGSTOP)
        assert_recovers(cluster, load, calm, [victim])
    assert "no heartbeat for" in cluster.log


def test_both_instances_are_killed_at_once(cluster: ServerProcess, calm: list[list[int]]):
    victims = cluster.instances()
    with StreamLoad(cluster.url, BODIES) as load:
        load.wait_tokens(FEW)
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        cluster.wait_ready(0)
        # Load balancers are told to stay away; who comes nevertheless waits, as those that run.
        for path in ("/health", "/health/ready"):
            assert httpx.get(cluster.url + path).status_code == 503
        late = httpx.post(cluster.url + "/v1/completions", json={"prompt": "x"}, timeout=60.0)
        assert late.status_code == 200
        assert_recovers(cluster, load, calm, victims)
    assert httpx.get(cluster.url + "/health").status_code == 200


def test_the_front_stands_still(cluster: ServerProcess, calm: list[list[int]]):
    """Time in which the front itself did not run is held against no instance."""
    instances = cluster.instances()
    with StreamLoad(cluster.url, BODIES) as load:
        load.wait_tokens(FEW)
        cluster.signal(signal.SIGSTOP)
        with pytest.raises(AssertionError):  # longer than --heartbeat-timeout
            until(lambda: False, "", 3.0)
        cluster.signal(signal.SIGCONT)
        assert load.result() == calm
    cluster.wait_idle()
    assert cluster.instances() == instances


# ---------------------------------------------------------------- the front


def test_the_front_is_killed(model: Path, tmp_path: Path):
    with running_server(tmp_path, model, "--instances", "2") as server:
        instances = server.instances()
        assert len(instances) == 2
        with StreamLoad(server.url, BODIES) as load:
            load.wait_tokens(FEW)
            server.signal(signal.SIGKILL)
            server.wait()
            until(lambda: not server.processes(), "instances gone", 3.0)
            with pytest.raises((httpx.HTTPError, AssertionError)):
                load.result()
        server.assert_nothing_left()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_front_is_ended_while_instances_start(
    model: Path, tmp_path: Path, number: signal.Signals
):
    arguments = ["serve", str(model), "--port", "0", "--instances", "2"]
    with started_command(tmp_path, arguments) as server:
        until(lambda: len(server.instances()) == 2, "instance processes")
        server.note_sockets()
        assert server.sockets
        server.signal(number)
        code = server.wait()
        assert code == (-number if number is signal.SIGKILL else 130)
        server.assert_nothing_left()


def test_an_instance_is_killed_during_start(model: Path, tmp_path: Path):
    arguments = ["serve", str(model), "--port", "0", "--instances", "2"]
    with started_command(tmp_path, arguments) as server:
        victim = until(server.instances, "an instance process")[0]
        os.kill(victim, signal.SIGKILL)
        assert server.wait() == 1
        assert len(server.error_lines) == 1
        assert "failed to start: killed by SIGKILL" in server.error_lines[0]


# ---------------------------------------------------------------- an instance that cannot start


def broken_model(model: Path, directory: Path, damage: str) -> Path:
    """A copy of the model whose weights file is damaged; config and tokenizer are whole."""
    copy = Path(shutil.copytree(model, directory / "broken"))
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    if damage == "header":
        weights.write_bytes(b"\xff" * 64 + whole[64:])
    else:
        weights.write_bytes(whole[: len(whole) // 2])
    return copy


@pytest.mark.parametrize(("damage", "instances"), [("header", "2"), ("truncated", "1")])
def test_a_corrupt_checkpoint_is_one_line(model: Path, tmp_path: Path, damage: str, instances: str):
    copy = broken_model(model, tmp_path, damage)
    arguments = ["serve", str(copy), "--port", "0", "--instances", instances]
    with started_command(tmp_path, arguments) as server:
        assert server.wait(60) == 1
        assert len(server.error_lines) == 1
        assert "model.safetensors" in server.error_lines[0]


def test_an_instance_that_takes_too_long_is_one_line(model: Path, tmp_path: Path):
    arguments = ["serve", str(model), "--port", "0", "--start-timeout", "0.1"]
    with started_command(tmp_path, arguments) as server:
        assert server.wait(60) == 1
        assert len(server.error_lines) == 1
        assert "--start-timeout" in server.error_lines[0]
