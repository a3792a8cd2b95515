"""The pipeline in virtual time: what can be said of it by hand, and what lookahead makes of it."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest

from kunserve.core.policy import Batching
from kunserve.policy.cost_model import CostModel
from kunserve.policy.scheduler import SchedulerConfig
from kunserve.sim.pipeline import PipelineProfile, PipelineRun, run_pipeline
from kunserve.sim.profiles import a100_pipeline

MS = 1_000_000
# 1 ms a token in each of four layers.
LINEAR = CostModel(alpha_ns=0, delta_ns=0, beta_ns=4 * MS, gamma_ns=0)
CONFIG = SchedulerConfig(block_size=4, max_model_len=400, watermark_fraction=0.0)

QUEUE = [(5900, 40), (300, 60), (1200, 40), (7400, 30), (60, 80), (2500, 50)] * 4


def pipeline(*stage_layers: int, **changes: float) -> PipelineProfile:
    return replace(PipelineProfile(LINEAR, stage_layers, kv_blocks=1000), **changes)  # type: ignore[arg-type]


def test_one_stage_is_never_idle() -> None:
    run = run_pipeline(pipeline(4), CONFIG, [(10, 5), (20, 7)])
    assert run.elapsed_ns == (10 + 4 + 20 + 6) * 4 * MS
    assert run.bubbles == (0.0,)
    assert run.tokens == 10 + 5 + 20 + 7


def test_a_lone_token_is_on_one_stage_at_a_time() -> None:
    run = run_pipeline(pipeline(3, 1), CONFIG, [(1, 11)])
    assert run.elapsed_ns == 11 * 4 * MS
    assert run.bubbles == pytest.approx((0.25, 0.75))


def test_two_equal_microbatches_fill_two_stages() -> None:
    config = replace(CONFIG, max_num_batched_tokens=20, chain_chunks=False)
    run = run_pipeline(pipeline(2, 2), config, [(20, 1), (20, 1)])
    assert run.elapsed_ns == 3 * 40 * MS
    assert run.first_token_ns == (80 * MS, 120 * MS)
    assert run.busy_ns == (80 * MS, 80 * MS)


def test_chunks_that_follow_each_other_fill_the_stages_with_one_prompt() -> None:
    config = replace(CONFIG, max_num_batched_tokens=20)
    apart = run_pipeline(pipeline(2, 2), replace(config, chain_chunks=False), [(80, 1)])
    chained = run_pipeline(pipeline(2, 2), config, [(80, 1)])
    assert apart.elapsed_ns == 8 * 40 * MS
    assert chained.elapsed_ns == 5 * 40 * MS


def test_links_delay_and_heads_slip_in_between_layers() -> None:
    """The head of the first step, 3 ms, makes the leader's part of the second one longer."""
    model = replace(LINEAR, head_ns=3 * MS)
    profile = pipeline(3, 1, cost_model=model, link_ns=5 * MS, link_ns_per_row=1 * MS)
    config = replace(CONFIG, max_num_batched_tokens=30)
    run = run_pipeline(profile, config, [(30, 1), (30, 1)])
    # 90 ms, hop 35, 30 ms, hop 6, head 3: in the middle of the second one's 90 ms
    assert run.first_token_ns[0] == 164 * MS
    assert run.first_token_ns[1] == (2 * 90 + 3 + 35 + 30 + 6 + 3) * MS
    assert run.busy_ns == ((2 * 90 + 2 * 3) * MS, 60 * MS)


def on_a100(**changes: object) -> PipelineRun:
    config = SchedulerConfig(block_size=16, max_model_len=16384)
    return run_pipeline(a100_pipeline(2), replace(config, **changes), QUEUE)  # type: ignore[arg-type]


def test_lookahead_halves_the_bubbles_of_a_queue() -> None:
    """Against the best of some token budgets, by the time it takes to empty the queue."""
    by_tokens = min(
        (
            on_a100(max_num_batched_tokens=budget, chain_chunks=False)
            for budget in (512, 1024, 2048)
        ),
        key=lambda run: run.elapsed_ns,
    )
    ahead = on_a100(batching=Batching.LOOKAHEAD)
    assert statistics.mean(ahead.queue_bubbles) <= 0.5 * statistics.mean(by_tokens.queue_bubbles)
    assert ahead.queue_ns < by_tokens.queue_ns


def test_a_run_is_the_same_every_time() -> None:
    assert on_a100() == on_a100()
