"""`kunserve demo`: the main job on the embedded model, with its result shown.

Starts two instances on a free port, asks three questions by streaming, runs a short load, prints
the latency table, and shuts everything down.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import BinaryIO

import httpx
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from kunserve.bench.client import LoadOptions, run_load
from kunserve.bench.report import render_table
from kunserve.bench.server_state import process_tree_pss, read_time_counters
from kunserve.bench.workload import ArrivalOptions, RandomLengths, RateStep, synthetic_workload
from kunserve.core.errors import InstanceFailedError
from kunserve.runtime.process import end_with_parent

QUESTIONS = (
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Name three things that are found in a kitchen.",
)
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0
_SERVING = re.compile(r"serving on (http://\S+)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `kunserve demo`."""
    parser.add_argument("--num-requests", type=int, default=32, help="requests of the short load")
    parser.add_argument("--request-rate", type=float, default=2.0, help="their mean rate per s")
    parser.add_argument("--svg", metavar="OUT", help="also write what is shown as a picture")


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit code.

    Raises:
        InstanceFailedError: the server did not start; the message holds its last line.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the server is ended by then.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _run(args)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(args: argparse.Namespace) -> int:
    console = Console(record=args.svg is not None, width=100, highlight=False)
    console.print(Rule("kunserve demo"))
    begin_s = time.monotonic()
    with tempfile.TemporaryFile() as log:  # it has no name: nothing is left however this ends
        console.print("Starting two instances of the embedded model, one thread each ...")
        with _server(log) as (pid, base_url):
            console.print(_start_line(log))
            console.print(f"ready on {base_url} after {time.monotonic() - begin_s:.1f} s\n")
            for question in QUESTIONS:
                _ask(console, base_url, question)
            failed = _short_load(console, base_url, args.num_requests, args.request_rate)
            _show_memory(console, pid)
            console.print("Shutting down ...")
    console.print(f"Done in {time.monotonic() - begin_s:.1f} s; nothing is left running.")
    if args.svg:
        console.save_svg(args.svg, title="kunserve demo")
    return 1 if failed else 0


@contextlib.contextmanager
def _server(log: BinaryIO) -> Iterator[tuple[int, str]]:
    """A server on a free loopback port that writes to `log`: its pid and address. Ended with the
    block, however that is left."""
    command = [sys.executable, "-m", "kunserve.cli", "serve", "--port", "0", "--instances", "2"]
    command += ["--threads-per-instance", "1", "--kv-cache-memory-bytes", "256MiB"]
    process = subprocess.Popen(
        command, stdout=log, stderr=log, preexec_fn=end_with_parent(os.getpid())
    )
    try:
        yield process.pid, _wait_until_serving(process, log)
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_serving(process: subprocess.Popen[bytes], log: BinaryIO) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        text = _text(log)
        found = _SERVING.search(text)
        if found:
            return found.group(1)
        if process.poll() is not None:
            lines = text.strip().splitlines() or ["no output"]
            raise InstanceFailedError(f"the server ended at start: {lines[-1]}")
        time.sleep(0.1)
    raise InstanceFailedError(f"the server is not ready after {START_TIMEOUT_S:.0f} s")


def _text(log: BinaryIO) -> str:
    """What the server has written so far. It shares the file's position: that must not move."""
    descriptor = log.fileno()
    content = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    return content.decode("utf-8", errors="replace")


def _start_line(log: BinaryIO) -> str:
    """The server's own line on what it holds, without the log prefix."""
    lines = _text(log).splitlines()
    return next((line.split(" ", 3)[-1] for line in lines if "replicated weights" in line), "")


def _ask(console: Console, base_url: str, question: str) -> None:
    """Ask by streaming; the answer is printed as it comes, or whole into a picture."""
    console.print(Text(f"> {question}", style="bold"))
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 64,
        "temperature": 0,
        "stream": True,
    }
    pieces = _stream_chat(f"{base_url}/v1/chat/completions", body)
    for piece in ["".join(pieces)] if console.record else pieces:
        console.print(piece, end="", markup=False)
    console.print("\n")


def _stream_chat(url: str, body: dict[str, object]) -> Iterator[str]:
    """The pieces of text of one streamed answer."""
    with httpx.stream("POST", url, json=body, timeout=60.0) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    yield choice["delta"].get("content") or ""


def _short_load(console: Console, base_url: str, num_requests: int, rate: float) -> int:
    """Run the load and print its table; returns the number of failed requests."""
    console.print(f"{num_requests} requests, {rate:g} a second, 96 tokens in, 48 out ...")
    workload = synthetic_workload(
        RandomLengths(prompt_tokens=96, output_tokens=48),
        ArrivalOptions((RateStep(0.0, rate),), num_requests=num_requests),
        seed=0,
        name="demo",
    )
    model = httpx.get(f"{base_url}/v1/models", timeout=10.0).json()["data"][0]["id"]
    before = read_time_counters(base_url)
    result = asyncio.run(run_load(base_url, model, workload, LoadOptions()))
    after = read_time_counters(base_url)
    console.print(render_table(result))
    if before and after:
        share = after.since(before).overhead_share
        console.print(f"HTTP, controller and scheduling took {share:.1%} of the step time")
    return sum(record.error is not None for record in result.records)


def _show_memory(console: Console, pid: int) -> None:
    """Proportional memory of the front and of each instance, which owns its weights and KV."""
    front, *instances = (pss >> 20 for _, pss in process_tree_pss(pid))
    shown = ", ".join(f"{pss} MiB" for pss in instances)
    console.print(f"memory (PSS): front {front} MiB, instances {shown}")
