"""`kunserve bench bubbles`: its queue, and what it makes of its runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from kunserve.bench import bubbles
from kunserve.bench.bubble_queue import FixedQueue, QueueOptions, fixed_queue
from kunserve.bench.bubbles import LOOKAHEAD, TOKEN_COUNT, BubbleRun, Comparison, Setting
from kunserve.bench.workload import RequestShape
from kunserve.cli import build_parser
from kunserve.core.policy import Batching

NOWHERE = Path("/nonexistent")


def made_run(arm: str, budget: int, elapsed_s: float, bubble: float) -> BubbleRun:
    setting = Setting(arm, budget, None)
    return BubbleRun(
        setting=setting,
        num_stages=2,
        elapsed_s=elapsed_s,
        queue_s=elapsed_s / 2,
        bubbles=(0.3, 0.4),
        queue_bubbles=(bubble, 3 * bubble),
        mean_first_token_s=1.0,
        tokens_per_s=100.0,
        preemptions=0,
    )


COMPARISON = Comparison(
    2,
    (
        made_run(TOKEN_COUNT, 256, 12.0, 0.01),
        made_run(TOKEN_COUNT, 512, 10.0, 0.1),
        made_run(LOOKAHEAD, 512, 9.0, 0.04),
    ),
)


def test_an_arm_is_at_its_best_where_the_queue_takes_least_time() -> None:
    assert COMPARISON.best(TOKEN_COUNT).setting.max_tokens == 512
    assert COMPARISON.ratio == pytest.approx(0.4)


def test_the_table_names_the_ratio_and_the_budgets() -> None:
    console = Console(width=120, record=True, quiet=True)
    console.print(bubbles.render(COMPARISON, FixedQueue("log-normal", (RequestShape(3, 4),))))
    text = console.export_text()
    assert "0.40 (target 0.5)" in text
    assert "512 tokens" in text
    assert "10.0% | 30.0%" in text


def test_settings_are_a_schedulers_and_a_servers() -> None:
    lookahead, token_count = Setting(LOOKAHEAD, None, 50.0), Setting(TOKEN_COUNT, 512, None)
    assert lookahead.config.batching is Batching.LOOKAHEAD
    assert lookahead.config.step_time_target_ns == 50_000_000
    assert lookahead.flags == ("--batching", "lookahead", "--step-time-target-ms", "50")
    assert not token_count.config.chain_chunks
    assert token_count.flags == ("--batching", "token-count", "--max-num-batched-tokens", "512")
    serve = build_parser(["serve"]).parse_args(["serve", *token_count.flags])
    assert (serve.batching, serve.max_num_batched_tokens) == ("token-count", 512)


def test_a_queue_is_the_seeds() -> None:
    options = QueueOptions(200)
    queue = fixed_queue(options, NOWHERE)
    assert queue == fixed_queue(options, NOWHERE)
    assert queue != fixed_queue(QueueOptions(200, seed=1), NOWHERE)
    assert queue.source == "log-normal"
    assert 2500 < queue.prompt_tokens / 200 < 5000
    assert 350 < queue.output_tokens / 200 < 600


def test_a_queue_is_scaled_and_cut() -> None:
    queue = fixed_queue(QueueOptions(50, scale=0.1, max_prompt_tokens=500), NOWHERE)
    assert max(shape.prompt_tokens for shape in queue.requests) == 500
    assert min(shape.output_tokens for shape in queue.requests) >= 2


def test_recorded_lengths_come_in_turn(tmp_path: Path) -> None:
    (tmp_path / "longbench_lengths.csv").write_text(
        "task,idx,length_words,ref_answer_tokens,llama2_pred_tokens,prompt_tokens_est,"
        "prompt_tokens_exact_cl100k\ngov_report,0,1,10,10,6000,\nqasper,0,1,1,1,1,\n"
    )
    (tmp_path / "sharegpt_8k_lengths.csv").write_text(
        "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n70,90,160,1\n"
    )
    queue = fixed_queue(QueueOptions(4), tmp_path)
    assert [shape.prompt_tokens for shape in queue.requests] == [6000, 70, 6000, 70]
    assert queue.source == "LongBench and ShareGPT, recorded"


def test_the_command_writes_every_run_of_its_grid(tmp_path: Path) -> None:
    out = tmp_path / "bubbles.json"
    words = ["bench", "bubbles", "--simulated", "--requests", "4", "--scale", "0.02"]
    args = build_parser(words).parse_args([*words, "--traces", str(tmp_path), "--json", str(out)])
    assert args.run(args) == 0
    document = json.loads(out.read_text())
    assert document["schema"] == bubbles.SCHEMA
    assert [comparison["num_stages"] for comparison in document["comparisons"]] == [2, 4]
    budgets = [
        run["setting"]["max_tokens"]
        for run in document["comparisons"][0]["runs"]
        if run["setting"]["arm"] == TOKEN_COUNT
    ]
    assert budgets == [256, 512, 1024, 2048, 4096]
