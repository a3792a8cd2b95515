"""A server of the benchmark's own, on free loopback ports: its admin API, streams from it, and what
the kernel says of its instances."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from kunserve.bench.client import BenchError
from kunserve.bench.server_state import process_tree_pss, sample_sums
from kunserve.core.errors import InstanceFailedError
from kunserve.runtime.process import end_with_parent

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0
SETTLE_TIMEOUT_S = 60.0
POLL_S = 0.02
NS_PER_MS = 1e6
NS_PER_S = 1e9
_SERVING = re.compile(r"serving on (http://\S+)")
_ADMIN = re.compile(r"admin API on (http://\S+)")
_VOCAB = (1000, 40000)
"""Token ids that prompts are drawn from."""

_PREFIX = "kunserve:"
_CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


# ---------------------------------------------------------------- what the admin API says


class StageInfo(msgspec.Struct, frozen=True):
    """A stage of a group; layers half-open."""

    instance: int
    layers: tuple[int, int]


class GroupInfo(msgspec.Struct, frozen=True):
    """A group that serves; KVCache in tokens, None until its scheduler has reported."""

    id: int
    kv_tokens: int
    num_requests: int
    stages: tuple[StageInfo, ...]
    in_transition: str | None = None
    kv_tokens_whole: int = 0
    kv_tokens_used: int | None = None
    kv_tokens_queued: int | None = None
    num_waiting: int = 0

    @property
    def is_known(self) -> bool:
        """What it holds is known: its scheduler has said so, or it holds nothing."""
        return self.kv_tokens_used is not None or not self.num_requests


class InstanceInfo(msgspec.Struct, frozen=True):
    """An instance and its process. `costs`: constants of its cost model."""

    id: int
    pid: int | None
    state: str
    costs: tuple[float, ...] = ()


class TransitionFigures(msgspec.Struct, frozen=True):
    """What a transition cost, see `kunserve.core.transition.TransitionRecord`. `stalled_ns`: one
    entry per request."""

    phases_ns: dict[str, int]
    freed_bytes: int
    gained_bytes: int
    exchanged_bytes: int
    gathered_bytes: int
    remap_ns: int
    requests: int
    stalled_ns: tuple[int, ...]
    activations: int
    activation_p99_ns: int

    def ms(self, *phases: str) -> float:
        """Time in these phases together."""
        return sum(self.phases_ns.get(phase, 0) for phase in phases) / NS_PER_MS


class TransitionInfo(msgspec.Struct, frozen=True):
    """The last transition."""

    id: int
    kind: str
    outcome: str
    text: str
    figures: TransitionFigures


class LayoutInfo(msgspec.Struct, frozen=True):
    """The answer of the admin API."""

    groups: tuple[GroupInfo, ...]
    instances: tuple[InstanceInfo, ...]
    last_transition: TransitionInfo | None = None
    at_ns: int = 0


# ---------------------------------------------------------------- streams


@dataclass
class Stream:
    """One streamed request. Times are of the monotonic clock."""

    prompt_tokens: int
    begun_ns: int
    token_ns: list[int] = field(default_factory=list)
    error: str = ""
    task: asyncio.Task[None] | None = None

    @property
    def first_token_ms(self) -> float:
        """From the send to the first token."""
        return (self.token_ns[0] - self.begun_ns) / NS_PER_MS

    def gaps_ms(self, since_ns: int = 0, until_ns: int | None = None) -> list[float]:
        """Times between two tokens of which the second came in this time."""
        return [
            (after - before) / NS_PER_MS
            for before, after in zip(self.token_ns, self.token_ns[1:], strict=False)
            if after >= since_ns and (until_ns is None or before <= until_ns)
        ]

    async def reached(self, tokens: int) -> None:
        """Wait until so many tokens are there.

        Raises:
            BenchError: it ended before.
        """
        while len(self.token_ns) < tokens:
            if self.error or (self.task is not None and self.task.done()):
                raise BenchError(f"a request ended after {len(self.token_ns)}: {self.error}")
            await asyncio.sleep(0.001)


@dataclass(frozen=True)
class Sample:
    """Counters at one moment. `compute_cpu_s`: of the compute thread of each instance."""

    at_ns: int
    generated_tokens: float
    compute_cpu_s: tuple[float, ...]


# ---------------------------------------------------------------- the server


class BenchServer:
    """A running server. Made by `bench_server`. `start_line`: what it says that it holds."""

    def __init__(
        self, pid: int, base_url: str, admin_url: str, key: str, seed: int, start_line: str
    ) -> None:
        self.pid = pid
        self.base_url = base_url
        self.start_line = start_line
        self._client = httpx.AsyncClient(
            base_url=base_url,
            timeout=httpx.Timeout(None, connect=10.0),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=2.0),
            trust_env=False,
        )
        self._admin = httpx.AsyncClient(
            base_url=admin_url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=SETTLE_TIMEOUT_S,
            trust_env=False,
        )
        self._random = random.Random(seed)
        self._streams: list[Stream] = []
        self.model = ""

    async def open(self) -> None:
        """Learn the model's name."""
        models = (await self._client.get("/v1/models")).json()
        self.model = models["data"][0]["id"]

    async def close(self) -> None:
        """End all streams and connections."""
        await self.end(self._streams)
        await self._client.aclose()
        await self._admin.aclose()

    # ------------------------------------------------------------ requests

    def send(self, prompt_tokens: int, max_tokens: int, *, streamed: bool = True) -> Stream:
        """Send a greedy request of a random prompt that goes on to its `max_tokens`. Not streamed,
        it costs front and client nothing per token, and `token_ns` stays empty."""
        stream = Stream(prompt_tokens, time.monotonic_ns())
        body = {
            "model": self.model,
            "prompt": [self._random.randrange(*_VOCAB) for _ in range(prompt_tokens)],
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": streamed,
            "return_token_ids": streamed,
        }
        stream.task = asyncio.create_task(self._read(stream, json.dumps(body).encode()))
        self._streams.append(stream)
        return stream

    async def _read(self, stream: Stream, body: bytes) -> None:
        headers = {"Content-Type": "application/json"}
        try:
            async with self._client.stream(
                "POST", "/v1/completions", content=body, headers=headers
            ) as answer:
                if answer.status_code != httpx.codes.OK:
                    stream.error = (await answer.aread()).decode(errors="replace")[:300]
                    return
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        _take_event(stream, line.removeprefix("data: "))
        except httpx.HTTPError as error:
            stream.error = f"{type(error).__name__}: {error}"

    async def end(self, streams: Sequence[Stream]) -> None:
        """Break these requests off; the server aborts them."""
        tasks = [stream.task for stream in streams if stream.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        ended = set(map(id, streams))
        self._streams = [stream for stream in self._streams if id(stream) not in ended]

    async def idle(self) -> None:
        """Wait until the server has no request and no transition is under way.

        Raises:
            BenchError: it takes too long.
        """

        def is_idle(layout: LayoutInfo) -> bool:
            return not any(g.num_requests or g.in_transition for g in layout.groups)

        await self._until(is_idle, "become idle")

    # ------------------------------------------------------------ counters

    async def counters(self, *names: str) -> tuple[dict[str, float], ...]:
        """Metrics by their names without the prefix, each by instance.

        Raises:
            BenchError: there is no such metric.
        """
        answer = await self._client.get("/metrics")
        found: dict[str, dict[str, float]] = {name: {} for name in names}
        for family in text_string_to_metric_families(answer.text):
            values = found.get(family.name.removeprefix(_PREFIX))
            for sample in family.samples if values is not None else ():
                if values is not None and "engine" in sample.labels:
                    values[sample.labels["engine"]] = sample.value
        if not all(found.values()):
            raise BenchError(f"the server has no metrics {[n for n in names if not found[n]]}")
        return tuple(found.values())

    async def totals(self) -> dict[str, float]:
        """Every metric by the name of its samples without the prefix, summed over its labels."""
        answer = await self._client.get("/metrics")
        return sample_sums(answer.text)

    async def generated(self) -> Sample:
        """Tokens generated so far, at the moment of a new snapshot of the controller."""
        before: dict[str, float] = {}
        while True:
            (tokens,) = await self.counters("instance_generation_tokens")
            if before and tokens != before:
                pids = await self.instance_pids()
                cpu_s = tuple(map(compute_cpu_s, pids))
                return Sample(time.monotonic_ns(), sum(tokens.values()), cpu_s)
            before = tokens
            await asyncio.sleep(POLL_S / 2)

    # ------------------------------------------------------------ layouts

    async def layout(self) -> LayoutInfo:
        """The layout now."""
        answer = await self._admin.get("/admin/layout")
        return msgspec.json.decode(answer.content, type=LayoutInfo)

    async def wish(self, what: str) -> LayoutInfo:
        """POST /admin/`what`; the layout as it is answered, at COMMIT.

        Raises:
            BenchError: it was refused.
        """
        answer = await self._admin.post(f"/admin/{what}", json={})
        if answer.status_code != httpx.codes.OK:
            raise BenchError(f"{what} was refused: {answer.text[:300]}")
        return msgspec.json.decode(answer.content, type=LayoutInfo)

    async def settled(self) -> LayoutInfo:
        """Wait until no transition is under way and the last one is recorded."""

        def is_settled(layout: LayoutInfo) -> bool:
            last = layout.last_transition
            is_over = last is None or last.outcome != "commit"
            return is_over and not any(group.in_transition for group in layout.groups)

        return await self._until(is_settled, "end its transition")

    async def change(self, what: str) -> TransitionInfo:
        """POST /admin/`what` and wait for the end of the transition.

        Raises:
            BenchError: it was refused, or did not end well.
        """
        await self.wish(what)
        last = (await self.settled()).last_transition
        if last is None or last.outcome != "done":
            raise BenchError(f"{what} did not end well: {last and last.text}")
        return last

    async def _until(self, wanted: Callable[[LayoutInfo], bool], what: str) -> LayoutInfo:
        deadline_s = time.monotonic() + SETTLE_TIMEOUT_S
        while time.monotonic() < deadline_s:
            layout = await self.layout()
            if wanted(layout):
                return layout
            await asyncio.sleep(POLL_S)
        raise BenchError(f"the server did not {what} in {SETTLE_TIMEOUT_S:.0f} s")

    # ------------------------------------------------------------ figures of processes

    async def instance_pids(self) -> tuple[int, ...]:
        """Processes of the instances, in order."""
        instances = (await self.layout()).instances
        return tuple(instance.pid for instance in instances if instance.pid is not None)

    def pss_bytes(self) -> int:
        """Proportional memory of all instances, without the front (/proc/PID/smaps_rollup)."""
        return sum(pss for pid, pss in process_tree_pss(self.pid) if pid != self.pid)


def _take_event(stream: Stream, data: str) -> None:
    now_ns = time.monotonic_ns()
    event = json.loads(data)
    if "error" in event:
        stream.error = str(event["error"])[:300]
    for choice in event.get("choices", ()):
        stream.token_ns += [now_ns] * len(choice.get("token_ids") or ())


def compute_cpu_s(pid: int) -> float:
    """CPU time that the compute thread of an instance has had, to 10 ms.

    Raises:
        BenchError: the process has no such thread.
    """
    stat = (_compute_task(pid) / "stat").read_text(encoding="ascii")
    words = stat.rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / _CLOCK_TICKS_PER_S


def compute_busy_s(pid: int) -> float:
    """Time in which the compute thread of an instance had something to do: on a core, or waiting
    for one that others had (/proc/PID/task/TID/schedstat).

    Raises:
        BenchError: the process has no such thread.
    """
    words = (_compute_task(pid) / "schedstat").read_text(encoding="ascii").split()
    return (int(words[0]) + int(words[1])) / NS_PER_S


def _compute_task(pid: int) -> Path:
    for task in Path(f"/proc/{pid}/task").iterdir():
        if (task / "comm").read_text(encoding="ascii").strip() == "compute":
            return task
    raise BenchError(f"process {pid} is no instance: it has no compute thread")


# ---------------------------------------------------------------- its life


@contextlib.asynccontextmanager
async def bench_server(
    flags: Sequence[str], seed: int = 0, environment: Mapping[str, str] | None = None
) -> AsyncIterator[BenchServer]:
    """A server with `flags` besides its ports and key, and `environment` beside this process's
    own. Ended with the block. What it writes goes into a file without a name: nothing is left.

    Raises:
        InstanceFailedError: it did not start; the message holds its last line.
    """
    key = secrets.token_hex(16)
    with tempfile.TemporaryFile() as log, _process(flags, key, log, environment) as process:
        base_url, admin_url = await _wait_until_serving(process, log)
        server = BenchServer(process.pid, base_url, admin_url, key, seed, _start_line(log))
        await server.open()
        try:
            yield server
        finally:
            await server.close()


@contextlib.contextmanager
def _process(
    flags: Sequence[str], key: str, log: BinaryIO, environment: Mapping[str, str] | None
) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "kunserve.cli", "serve", *flags, "--port", "0"]
    command += ["--admin-port", "0", "--admin-key", key, "--shutdown-timeout", "1"]
    process = subprocess.Popen(
        command,
        stdout=log,
        stderr=log,
        env={**os.environ, **(environment or {})},
        preexec_fn=end_with_parent(os.getpid()),
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def _wait_until_serving(process: subprocess.Popen[bytes], log: BinaryIO) -> tuple[str, str]:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        text = _text(log)
        serving, admin = _SERVING.search(text), _ADMIN.search(text)
        if serving and admin:
            return serving.group(1), admin.group(1)
        if process.poll() is not None:
            lines = text.strip().splitlines() or ["no output"]
            raise InstanceFailedError(f"the server ended at start: {lines[-1]}")
        await asyncio.sleep(0.1)
    raise InstanceFailedError(f"the server is not ready after {START_TIMEOUT_S:.0f} s")


def _text(log: BinaryIO) -> str:
    """What the server has written so far. It shares the file's position: that must not move."""
    return os.pread(log.fileno(), os.fstat(log.fileno()).st_size, 0).decode(errors="replace")


def _start_line(log: BinaryIO) -> str:
    """The server's own line on what it holds, without the log prefix."""
    lines = _text(log).splitlines()
    return next((line.split(" ", 3)[-1] for line in lines if "replicated weights" in line), "")


def as_json(schema: str, **content: Any) -> str:
    """A report as text."""
    return msgspec.json.format(msgspec.json.encode({"schema": schema, **content})).decode() + "\n"
