"""Real servers for tests: started, watched, ended, and checked to leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import openai

START_DEADLINE_S = 90.0
DEADLINE_S = 60.0
END_DEADLINE_S = 20.0
TINY_FLAGS = ("--threads-per-instance", "1", "--kv-cache-memory-bytes", "8MiB")
"""Small, and one thread each: two instances on two cores."""

ADMIN_KEY = "admin-secret"
ADMIN_FLAGS = ("--admin-port", "0", "--admin-key", ADMIN_KEY)
MANUAL_FLAGS = (*ADMIN_FLAGS, "--no-drop")
"""Nobody but the test changes the layout."""

_SERVING = re.compile(r"serving on (http://\S+)")
_ADMIN = re.compile(r"admin API on (http://\S+)")
_MARK = "KUNSERVE_TEST_RUN"
_SAMPLE = re.compile(r"^(kunserve:\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)


def until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Poll until `condition` gives something true, and return it."""
    deadline = time.monotonic() + deadline_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {deadline_s:.0f} s: {what}"
        time.sleep(0.02)
    return found


@dataclass
class ServerProcess:
    """One `kunserve` command as a process, with everything it starts."""

    process: subprocess.Popen[bytes]
    log_path: Path
    scratch: Path
    mark: str
    shm_before: frozenset[str]
    url: str = ""
    admin_url: str = ""
    sockets: set[str] = field(default_factory=set)

    @property
    def pid(self) -> int:
        """The front's process id."""
        return self.process.pid

    @property
    def log(self) -> str:
        """Standard output and standard error so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    @property
    def error_lines(self) -> list[str]:
        """The command's own error lines."""
        return [line for line in self.log.splitlines() if line.startswith("kunserve: error: ")]

    # ------------------------------------------------------------ processes

    def processes(self) -> set[int]:
        """Every live process that this server started, adopted ones too."""
        return {pid for pid in _pids() if self._is_ours(pid)}

    def instances(self) -> list[int]:
        """The instance processes, oldest first."""
        return sorted(self.processes() - {self.pid}, key=lambda pid: (_start_ticks(pid), pid))

    def _is_ours(self, pid: int) -> bool:
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            return self.mark.encode() in environment and not _is_zombie(pid)
        return False

    def signal(self, number: int) -> None:
        """Send a signal to the front."""
        self.process.send_signal(number)

    def wait(self, deadline_s: float = END_DEADLINE_S) -> int:
        """The exit code; fails if the command does not end."""
        return self.process.wait(deadline_s)

    # ------------------------------------------------------------ what it says

    def wait_serving(self) -> None:
        """Wait for the line that names the address."""

        def serving() -> re.Match[str] | None:
            found = _SERVING.search(self.log)
            assert found or self.process.poll() is None, f"ended at start:\n{self.log}"
            return found

        self.url = until(serving, "serving", START_DEADLINE_S).group(1)
        admin = _ADMIN.search(self.log)  # said before
        self.admin_url = admin.group(1) if admin else ""
        self.note_sockets()

    def note_sockets(self) -> None:
        """Remember the names of the abstract control sockets that the front has open now."""
        inodes = _socket_inodes(self.pid)
        for name, inode in _abstract_sockets():
            if inode in inodes and name.startswith("@kunserve-"):
                self.sockets.add(name)

    def metrics(self, key: str | None = None) -> dict[tuple[str, str], float]:
        """Metrics as (name without prefix, engine or ""): value, summed over other labels."""
        values: dict[tuple[str, str], float] = {}
        for name, labels, value in self._samples(key):
            engine = re.search(r'engine="(\d+)"', labels)
            where = (name, engine.group(1) if engine else "")
            values[where] = values.get(where, 0.0) + value
        return values

    def count(self, metric: str, **labels: str) -> float:
        """A metric of this name without prefix, summed over samples that have these labels."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(
            value
            for name, given, value in self._samples()
            if name == metric and all(text in given for text in wanted)
        )

    def _samples(self, key: str | None = None) -> list[tuple[str, str, float]]:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        response = httpx.get(self.url + "/metrics", timeout=DEADLINE_S, headers=headers)
        response.raise_for_status()
        return [
            (name.removeprefix("kunserve:"), labels, float(value))
            for name, labels, value in _SAMPLE.findall(response.text)
        ]

    def wait_idle(self, key: str | None = None) -> None:
        """Poll /metrics until the front owns no request, none runs or waits and no block is in
        use, on any instance."""
        gauges = (
            "num_requests_owned",
            "num_requests_running",
            "num_requests_waiting",
            "kv_cache_usage_perc",
        )

        def idle() -> bool:
            values = self.metrics(key)
            loads = [value for (name, _), value in values.items() if name in gauges]
            return bool(loads) and not any(loads)

        until(idle, "idle, with all blocks back")

    def wait_ready(self, instances: int) -> None:
        """Poll /metrics until `instances` of them take requests."""
        until(
            lambda: (
                sum(v for (n, _), v in self.metrics().items() if n == "instance_ready") == instances
            ),
            f"{instances} instances ready",
        )

    @contextlib.contextmanager
    def openai(self, key: str = "none") -> Iterator[openai.OpenAI]:
        """OpenAI's client, without retries."""
        with openai.OpenAI(
            base_url=self.url + "/v1", api_key=key, max_retries=0, timeout=DEADLINE_S
        ) as client:
            yield client

    # ------------------------------------------------------------ the end

    def kill_all(self) -> set[int]:
        """End everything at once; returns what there was to end."""
        found = self.processes()
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(END_DEADLINE_S)
        until(lambda: not self.processes(), "killed processes gone")
        return found

    def assert_nothing_left(self) -> None:
        """No process, control socket, shared memory or temporary file outlives the front."""
        assert self.process.poll() is not None
        until(lambda: not self.processes(), "every process gone", END_DEADLINE_S)
        open_names = {name for name, _ in _abstract_sockets()}
        assert not self.sockets & open_names
        assert not _shared_memory() - self.shm_before
        assert not list(self.scratch.iterdir())


@contextlib.contextmanager
def started_command(
    directory: Path,
    arguments: Sequence[str],
    prefix: Sequence[str] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[ServerProcess]:
    """Run `kunserve ARGUMENTS`, and check at the end that nothing is left of it.

    The log and the temporary directory of the command lie in `directory`.
    """
    mark = f"{_MARK}={uuid.uuid4().hex}"
    directory = directory / mark[-8:]
    scratch = directory / "tmp"
    scratch.mkdir(parents=True)
    name, value = mark.split("=")
    whole_environment = os.environ | dict(environment) | {name: value, "TMPDIR": str(scratch)}
    shm_before = _shared_memory()
    log = directory / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "kunserve.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=whole_environment,
        )
    server = ServerProcess(process, log, scratch, mark, shm_before)
    try:
        yield server
    except BaseException:
        print(f"--- {log}\n{server.log}")  # pytest shows it with the failure
        server.kill_all()
        raise
    try:
        if process.poll() is None:
            server.note_sockets()
            process.terminate()
            assert server.wait() == 0, server.log
        server.assert_nothing_left()
        assert "Traceback" not in server.log, server.log
    finally:
        server.kill_all()


@contextlib.contextmanager
def running_server(
    directory: Path,
    model: Path | None,
    *flags: str,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[ServerProcess]:
    """`kunserve serve MODEL` on a free port with accounting checks, ready for requests.

    `model` None: the embedded one.
    """
    names = () if model is None else (str(model),)
    arguments = ["serve", *names, "--port", "0", "--check-accounting", *TINY_FLAGS, *flags]
    with started_command(directory, arguments, environment=environment) as server:
        server.wait_serving()
        yield server


# ---------------------------------------------------------------- streams


@dataclass
class Answer:
    """What a stream has given so far; `logprobs` per token as the API shows them, if asked for."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    text: str = ""
    finishes: list[str] = field(default_factory=list)


class StreamLoad:
    """Concurrent completion streams in a thread of their own; `answers` grow as they come.

    Leaving the context early cancels what still runs. `leave_after[i]`: tokens after which the
    client of stream i goes away.
    """

    def __init__(
        self,
        url: str,
        bodies: Sequence[dict[str, Any]],
        leave_after: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        self.answers = [Answer() for _ in bodies]
        self._url = url
        self._bodies = bodies
        self._leave_after = leave_after
        self._executor = ThreadPoolExecutor(1)
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[None] | None = None
        self._future: Future[None] | None = None

    def __enter__(self) -> StreamLoad:
        self._future = self._executor.submit(self._run)
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended by itself
            self._loop.call_soon_threadsafe(self._cancel)
        self._executor.shutdown()

    @property
    def tokens(self) -> list[list[int]]:
        """Tokens of each stream."""
        return [answer.tokens for answer in self.answers]

    @property
    def total_tokens(self) -> int:
        """Tokens of all streams."""
        return sum(map(len, self.tokens))

    @property
    def is_over(self) -> bool:
        """True when every stream has ended. Raises what a stream failed with."""
        assert self._future is not None
        if self._future.done():
            self._future.result()
        return self._future.done()

    def wait_tokens(self, count: int) -> None:
        """Wait until every stream has given `count` tokens, and none has ended."""
        until(
            lambda: self.is_over or min(map(len, self.tokens)) >= count,
            f"{count} tokens of each stream",
        )
        for body, tokens in zip(self._bodies, self.tokens, strict=True):
            assert len(tokens) < body["max_tokens"], "a stream ended too early for this test"

    def wait_total(self, count: int) -> None:
        """Wait until the streams together have given `count` tokens, or are over."""
        until(lambda: self.is_over or self.total_tokens >= count, f"{count} tokens of all streams")

    def result(self, deadline_s: float = DEADLINE_S) -> list[list[int]]:
        """All tokens of all streams, each of which must have ended as it should."""
        assert self._future is not None
        self._future.result(deadline_s)
        return self.tokens

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _run(self) -> None:
        try:
            self._task = self._loop.create_task(self._stream_all())
            self._loop.run_until_complete(self._task)
        finally:
            self._loop.close()

    async def _stream_all(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=self._url, timeout=DEADLINE_S, limits=limits
        ) as client:
            await asyncio.gather(
                *(
                    stream_answer(client, body, answer, self._leave_after.get(index))
                    for index, (body, answer) in enumerate(
                        zip(self._bodies, self.answers, strict=True)
                    )
                )
            )


async def stream_answer(
    client: httpx.AsyncClient, body: dict[str, Any], answer: Answer, leave_after: int | None = None
) -> None:
    """Stream a completion into `answer`. Fails unless it finishes once and ends by [DONE]."""
    wanted = {"stream": True, "return_token_ids": True, **body}
    done = False
    async with client.stream("POST", "/v1/completions", json=wanted) as response:
        if response.status_code != 200:
            raise AssertionError((await response.aread()).decode())
        async for line in _lines(response):
            assert not (line and done), "something follows [DONE]"
            if line == "data: [DONE]":
                done = True
            elif line:
                _take_event(json.loads(line.removeprefix("data: ")), answer)
            if leave_after is not None and len(answer.tokens) >= leave_after:
                return
    assert done, "the stream broke off"
    assert len(answer.finishes) == 1, answer.finishes


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    """Lines that end by \\n. httpx's own end by any of Unicode's separators, in texts as well."""
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.decode()
    assert not rest, "the stream ends in the middle of a line"


def _take_event(event: dict[str, Any], answer: Answer) -> None:
    assert "error" not in event, event
    choice = event["choices"][0]
    assert not answer.finishes, "something follows the finish"
    answer.tokens += choice["token_ids"]
    answer.text += choice["text"]
    if choice["logprobs"] is not None:
        given = choice["logprobs"]
        answer.logprobs += zip(
            given["tokens"], given["token_logprobs"], given["top_logprobs"], strict=True
        )
    if choice["finish_reason"] is not None:
        answer.finishes.append(choice["finish_reason"])


async def stream_tokens(
    client: httpx.AsyncClient, body: dict[str, Any], tokens: list[int]
) -> str | None:
    """Stream a completion into `tokens`; its finish reason. Fails unless it ends by [DONE]."""
    answer = Answer(tokens)
    await stream_answer(client, body, answer)
    return answer.finishes[0]


# ---------------------------------------------------------------- /proc


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _stat_fields(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name: state, parent, ..."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()


def _is_zombie(pid: int) -> bool:
    return _stat_fields(pid)[0] == "Z"


def _start_ticks(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(_stat_fields(pid)[19])
    return 0


def _socket_inodes(pid: int) -> set[str]:
    inodes = set()
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(entry.path)
                if target.startswith("socket:["):
                    inodes.add(target[len("socket:[") : -1])
    return inodes


def _abstract_sockets() -> list[tuple[str, str]]:
    """(name with its @, inode) of the abstract Unix sockets of this network namespace."""
    rows = Path("/proc/net/unix").read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    split = [row.split() for row in rows]
    return [(row[7], row[6]) for row in split if len(row) > 7 and row[7].startswith("@")]


def _shared_memory() -> frozenset[str]:
    return frozenset(os.listdir("/dev/shm"))
