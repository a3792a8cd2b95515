"""`kunserve demo`: the main job on the embedded model, with its result shown.

Three questions are answered by streaming; then the same burst, with the same memory and threads, is
served by queueing and recomputing (`--policy recompute`) and by dropping parameters (`--policy
kunserve`). Shows a table, and draws what happened.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from kunserve.bench.client import ErrorKind, LoadOptions
from kunserve.bench.cluster import BenchServer, bench_server
from kunserve.bench.overload_report import render
from kunserve.bench.overload_results import (
    figures_by_variant,
    load_plots,
    results_json,
    runs_by_variant,
)
from kunserve.bench.overload_runs import calibrate
from kunserve.bench.overload_study import (
    Study,
    StudyOptions,
    StudyResult,
    policy_variants,
    size_for_share,
)
from kunserve.bench.scenario import ClusterFigures, Height, ScenarioOptions
from kunserve.bench.server_state import process_tree_pss
from kunserve.bench.workload import RandomLengths

QUESTIONS = (
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Name three things that are found in a kitchen.",
)
ANSWER_TOKENS = 48
POLICIES = ("recompute", "kunserve")
WEIGHTS_SHARE = 0.85
SCENARIO = ScenarioOptions(Height(2.0, "whole"), before_s=10.0, burst_s=15.0, after_s=10.0)
LENGTHS = RandomLengths(prompt_tokens=48, output_tokens=256, range_ratio=0.5)
REQUEST_TIMEOUT_S = 90.0
"""Bounds the demo to six minutes on a slow machine; what that leaves unfinished shows as failed."""

PICTURE, FIGURES = "overload.png", "overload.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `kunserve demo`."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/demo"),
        metavar="DIR",
        help=f"where {PICTURE} and {FIGURES} go (default out/demo)",
    )
    parser.add_argument("--svg", metavar="OUT", help="also write what is shown as a picture")


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit code.

    Raises:
        BenchError: what the picture needs is not installed.
        InstanceFailedError: the server did not start; the message holds its last line.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the server is ended by then.
    """
    load_plots()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _run(args)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(args: argparse.Namespace) -> int:
    console = Console(record=args.svg is not None, width=100, highlight=False)
    console.print(Rule("kunserve demo"))
    begin_s = time.monotonic()
    options = _options(console)  # may fetch the model: a signal must end that at once
    result = asyncio.run(_serve(console, options))
    _show(console, result, args.out)
    console.print(f"Done in {time.monotonic() - begin_s:.0f} s; nothing is left running.")
    if args.svg:
        console.save_svg(args.svg, title="kunserve demo")
    return 1 if _has_failed(result) else 0


def _has_failed(result: StudyResult) -> bool:
    """Some request ended in another way than by its time running out."""
    errors = [request.error for run in result.runs for request in run.requests if request.error]
    return any(not error.startswith(ErrorKind.TIMEOUT) for error in errors)


def _options(console: Console) -> StudyOptions:
    """The comparison: two instances of the embedded model, one thread each."""
    sizing = size_for_share(None, WEIGHTS_SHARE, console.print)
    flags = ["--instances", "2", "--threads-per-instance", "1"]
    return StudyOptions(
        variants=tuple(policy_variants(POLICIES)),
        seeds=(0,),
        heights=(SCENARIO.height,),
        scenario=SCENARIO,
        lengths=LENGTHS,
        flags=(*flags, "--memory-bytes", str(sizing.memory_bytes)),
        load=LoadOptions(timeout_s=REQUEST_TIMEOUT_S),
    )


async def _serve(console: Console, options: StudyOptions) -> StudyResult:
    """Answer the questions, then let both policies meet the burst."""
    console.print("Starting two instances of the embedded model, one thread each ...")
    async with bench_server((*options.flags, "--policy", "recompute")) as server:
        console.print(server.start_line)
        console.print(f"ready on {server.base_url}\n")
        for question in QUESTIONS:
            await _ask(console, server, question)
        _show_memory(console, server.pid)
        figures = await calibrate(server, options.load)
    console.print(_announcement(figures))
    return await Study(options, console.print, lambda result: None).run_with(figures)


async def _ask(console: Console, server: BenchServer, question: str) -> None:
    """Ask by streaming; the answer is printed as it comes, or whole into a picture."""
    console.print(Text(f"> {question}", style="bold"))
    pieces = []
    async for piece in _stream_chat(server.base_url, question):
        pieces.append(piece)
        if not console.record:
            console.print(piece, end="", markup=False)
    console.print("".join(pieces) if console.record else "", markup=False)
    console.print()


async def _stream_chat(base_url: str, question: str) -> AsyncIterator[str]:
    """The pieces of text of one streamed answer."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "stream": True,
    }
    async with (
        httpx.AsyncClient(base_url=base_url, timeout=60.0, trust_env=False) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as response,
    ):
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    yield choice["delta"].get("content") or ""


def _show_memory(console: Console, pid: int) -> None:
    """Proportional memory of the front and of each instance, which owns its weights and KV."""
    front, *instances = (pss >> 20 for _, pss in process_tree_pss(pid))
    shown = ", ".join(f"{pss} MiB" for pss in instances)
    console.print(f"memory (PSS): front {front} MiB, instances {shown}")


def _announcement(figures: ClusterFigures) -> str:
    return (
        f"\nKVCache for {figures.whole_tokens} tokens; {figures.merged_tokens} once both drop the "
        f"layers that the other one keeps.\nNow a burst of {SCENARIO.burst_s:.0f} s that needs "
        f"{SCENARIO.height.factor:g} times what whole instances hold: first with queueing and "
        "recomputing, then with dropping parameters."
    )


def _show(console: Console, result: StudyResult, directory: Path) -> None:
    """The table, and the files in `directory`."""
    scenario = result.scenarios[0]
    directory.mkdir(parents=True, exist_ok=True)
    picture = directory / PICTURE
    plots = load_plots()
    plots.draw_story(scenario, runs_by_variant(result, scenario)).savefig(picture, dpi=plots.DPI)
    (directory / FIGURES).write_text(results_json(result), encoding="utf-8")
    console.print(render(figures_by_variant(result, scenario), "The same burst, the same memory"))
    console.print(f"picture: {picture}   figures: {directory / FIGURES}")
