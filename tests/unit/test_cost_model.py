"""Cost model: the formula, its fit and its inverse."""

from __future__ import annotations

import math
import random
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kunserve.core.errors import ConfigError, LayoutError
from kunserve.policy.cost_model import ChunkShape, CostModel, StepCost, StepSample

SETTINGS = settings(max_examples=100, deadline=None, derandomize=True, database=None)
FIT_SETTINGS = settings(SETTINGS, max_examples=15)

# Of the size that SmolLM2-135M has on one CPU thread.
CPU = CostModel(
    alpha_ns=150.0,
    delta_ns=900.0,
    beta_ns=3.5e6,
    gamma_ns=8e6,
    head_gamma_ns=2e6,
    head_ns=1.2e6,
)
CURVED = CostModel(
    alpha_ns=630.0,
    delta_ns=2500.0,
    beta_ns=1.5e6,
    gamma_ns=22e6,
    head_gamma_ns=6e6,
    head_ns=0.42e6,
    sharpness=2.4,
    head_sharpness=2.9,
)

additive_models = st.builds(
    CostModel,
    alpha_ns=st.floats(1.0, 1e4),
    delta_ns=st.floats(1.0, 1e4),
    beta_ns=st.floats(1e3, 1e7),
    gamma_ns=st.floats(1e3, 1e8),
    head_gamma_ns=st.floats(1e3, 1e7),
    head_ns=st.floats(1e3, 1e7),
)
models = st.builds(
    replace, additive_models, sharpness=st.floats(1.0, 8.0), head_sharpness=st.floats(1.0, 8.0)
)
chunk_shapes = st.builds(ChunkShape, st.integers(0, 3000), st.integers(1, 600), st.booleans())
steps = st.lists(chunk_shapes, max_size=40)


def grid_of_steps() -> list[tuple[ChunkShape, ...]]:
    """Prefill chunks at several prefixes and decode batches: what a calibration run measures."""
    prefills = [
        (ChunkShape(prefix, tokens, samples),)
        for prefix in (0, 64, 1000, 4000)
        for tokens in (1, 16, 128, 512)
        for samples in (False, True)
    ]
    decodes = [
        (ChunkShape(prefix, 1, True),) * batch
        for prefix in (10, 1000)
        for batch in (1, 4, 8, 16, 32)
    ]
    return prefills + decodes


def measured(
    model: CostModel, chunks: tuple[ChunkShape, ...], layers_factor: float = 1.0
) -> StepSample:
    """What a calibration run finds where `model` is true; the layers' time is off by a factor."""
    layers_ns = model.stage_ns(chunks, 1, 1, is_leader=False)
    head_ns = model.step_ns(chunks) - layers_ns
    return StepSample(chunks, round(layers_ns * layers_factor), round(head_ns))


def test_chunk_cost_by_hand() -> None:
    model = CostModel(
        alpha_ns=2.0, delta_ns=3.0, beta_ns=5.0, gamma_ns=7.0, head_gamma_ns=13.0, head_ns=11.0
    )
    # prefix 10, 4 tokens: rows see 11, 12, 13, 14 tokens
    assert model.chunk_ns(10, 4) == 2 * (11 + 12 + 13 + 14) + 3 * 14 + 5 * 4
    assert model.chunk_ns(10, 4, samples=True) == model.chunk_ns(10, 4) + 11
    silent, sampled = ChunkShape(10, 4), ChunkShape(10, 4, samples=True)
    assert model.step_ns((silent, silent)) == 7 + 2 * model.chunk_ns(10, 4)
    assert model.step_ns((sampled, silent)) == 7 + 2 * model.chunk_ns(10, 4) + 13 + 11
    assert model.step_ns((sampled, sampled)) == 7 + 2 * model.chunk_ns(10, 4) + 13 + 22
    assert model.fixed_ns == 7 + 13


def test_a_stage_has_its_share_of_the_layers_and_the_leader_the_head() -> None:
    model = CostModel(
        alpha_ns=20.0, delta_ns=30.0, beta_ns=50.0, gamma_ns=70.0, head_gamma_ns=13.0, head_ns=11.0
    )
    chunks = (ChunkShape(10, 4, samples=True), ChunkShape(0, 3))
    layers_ns = 70 + 20 * (50 + 6) + 30 * (14 + 3) + 50 * 7
    assert model.stage_ns(chunks, 3, 10, is_leader=True) == pytest.approx(layers_ns * 0.3 + 24)
    assert model.stage_ns(chunks, 7, 10, is_leader=False) == pytest.approx(layers_ns * 0.7)
    assert model.for_stage(10, 10, is_leader=True) == model


@SETTINGS
@given(models, st.integers(1, 30), st.integers(1, 30))
def test_stages_add_up_to_the_whole(model: CostModel, first: int, second: int) -> None:
    num_layers = first + second
    for chunks in grid_of_steps():
        stages_ns = model.stage_ns(chunks, first, num_layers, is_leader=True) + model.stage_ns(
            chunks, second, num_layers, is_leader=False
        )
        assert stages_ns == pytest.approx(model.step_ns(chunks))


@pytest.mark.parametrize("held", [-1, 0, 31])
def test_a_stage_has_some_of_the_layers(held: int) -> None:
    with pytest.raises(LayoutError, match=f"30 layers cannot hold {held}"):
        CPU.for_stage(held, 30, is_leader=False)


@SETTINGS
@given(additive_models, steps)
def test_at_sharpness_1_all_terms_add_up(model: CostModel, chunks: list[ChunkShape]) -> None:
    expected_ns = model.gamma_ns + sum(model.chunk_ns(*chunk) for chunk in chunks)
    if any(chunk.samples for chunk in chunks):
        expected_ns += model.head_gamma_ns
    assert model.step_ns(chunks) == pytest.approx(expected_ns)


def test_reading_hides_behind_computing() -> None:
    model = CostModel(0.0, 0.0, beta_ns=3.0, gamma_ns=12.0, sharpness=2.0)
    assert model.linear_ns(0) == 12.0
    assert model.linear_ns(3) == pytest.approx(15.0)  # 12 and 9
    assert model.linear_ns(4000) == pytest.approx(12_000.0, rel=1e-6)
    head = CostModel(0.0, 0.0, 0.0, 0.0, head_gamma_ns=8.0, head_ns=6.0, head_sharpness=2.0)
    assert [head.head_step_ns(rows) for rows in (0, 1)] == [0.0, pytest.approx(10.0)]


@SETTINGS
@given(models, steps, chunk_shapes)
def test_cost_grows_with_the_work(
    model: CostModel, chunks: list[ChunkShape], added: ChunkShape
) -> None:
    base_ns = model.step_ns([*chunks, added])
    larger = (
        added._replace(prefix_tokens=added.prefix_tokens + 1),
        added._replace(chunk_tokens=added.chunk_tokens + 1),
        added._replace(samples=True),
    )
    for other in larger:
        assert model.step_ns([*chunks, other]) >= base_ns * (1.0 - 1e-12)
    assert model.step_ns(chunks) <= base_ns


@SETTINGS
@given(models, steps)
def test_adding_chunks_one_by_one_gives_the_cost_of_the_step(
    model: CostModel, chunks: list[ChunkShape]
) -> None:
    step = StepCost(model)
    assert step.total_ns == model.gamma_ns
    for done, chunk in enumerate(chunks, start=1):
        before_ns, with_ns = step.total_ns, step.with_chunk_ns(chunk)
        step.add(chunk)
        assert step.total_ns == with_ns == model.step_ns(chunks[:done])
        more_ns = model.chunk_ns(*chunk) + (model.head_gamma_ns if chunk.samples else 0.0)
        assert with_ns - before_ns <= more_ns + 1e-9 * with_ns
    assert step.sampled_rows == sum(chunk.samples for chunk in chunks)


@SETTINGS
@given(models, steps, st.floats(-1e6, 1e10), st.integers(0, 10_000), st.integers(0, 5_000))
def test_largest_chunk_fills_a_step(
    model: CostModel, chunks: list[ChunkShape], budget_ns: float, prefix: int, limit: int
) -> None:
    step = StepCost(model)
    for chunk in chunks:
        step.add(chunk)
    tokens = step.largest_chunk(budget_ns, prefix, limit)
    assert 0 <= tokens <= limit
    if tokens:
        assert model.step_ns([*chunks, ChunkShape(prefix, tokens)]) <= budget_ns
    if tokens < limit:
        assert model.step_ns([*chunks, ChunkShape(prefix, tokens + 1)]) > budget_ns


def test_a_step_that_reads_anyway_takes_a_chunk_in_for_less() -> None:
    step = StepCost(CURVED)
    chunk = ChunkShape(0, 4)
    assert step.with_chunk_ns(chunk) - step.total_ns < 0.2 * CURVED.chunk_ns(0, 4)
    step.add(ChunkShape(0, 512))
    assert step.with_chunk_ns(chunk) - step.total_ns == pytest.approx(
        CURVED.chunk_ns(0, 4), rel=0.01
    )


def test_everything_slower_by_a_factor() -> None:
    chunks = (ChunkShape(10, 4, samples=True), ChunkShape(0, 30))
    assert CURVED.scaled(3.0).step_ns(chunks) == pytest.approx(3.0 * CURVED.step_ns(chunks))


def test_weights_are_read_once_a_step() -> None:
    chunks = (ChunkShape(10, 4), ChunkShape(0, 3, samples=True))
    apart = sum(CPU.step_ns((chunk,)) for chunk in chunks)
    assert CPU.step_ns(chunks) == pytest.approx(apart - CPU.gamma_ns)
    both_sample = (ChunkShape(10, 4, samples=True), ChunkShape(0, 3, samples=True))
    apart = sum(CPU.step_ns((chunk,)) for chunk in both_sample)
    assert CPU.step_ns(both_sample) == pytest.approx(apart - CPU.fixed_ns)
    assert CPU.step_ns(()) == CPU.gamma_ns


def test_splitting_a_prompt_costs_only_a_second_read_of_its_prefix() -> None:
    whole = CPU.chunk_ns(0, 100)
    split = CPU.chunk_ns(0, 60) + CPU.chunk_ns(60, 40)
    assert split == pytest.approx(whole + CPU.delta_ns * 60)


@pytest.mark.parametrize("bad", [-1.0, math.nan])
def test_negative_constants_are_refused(bad: float) -> None:
    with pytest.raises(ConfigError, match="beta_ns"):
        CostModel(alpha_ns=1.0, delta_ns=1.0, beta_ns=bad, gamma_ns=1.0)


@pytest.mark.parametrize("bad", [0.99, math.nan, math.inf])
def test_a_sharpness_below_1_is_refused(bad: float) -> None:
    with pytest.raises(ConfigError, match="sharpness must be at least 1"):
        replace(CPU, sharpness=bad)


@FIT_SETTINGS
@given(models)
def test_fit_predicts_exact_samples(model: CostModel) -> None:
    samples = [measured(model, chunks) for chunks in grid_of_steps()]
    fitted = CostModel.fit(samples)
    for sample in samples:
        assert abs(fitted.relative_error(sample)) < 2e-3
        follower_ns = fitted.stage_ns(sample.chunks, 3, 10, is_leader=False)
        assert follower_ns == pytest.approx(0.3 * sample.layers_ns, rel=2e-3)


@pytest.mark.parametrize("model", [CPU, CURVED])
def test_fit_recovers_constants(model: CostModel) -> None:
    fitted = CostModel.fit([measured(model, chunks) for chunks in grid_of_steps()])
    for field in fields(CostModel):
        assert getattr(fitted, field.name) == pytest.approx(getattr(model, field.name), rel=0.01)


def test_fit_recovers_a_roofline() -> None:
    """Where the longer of reading and computing counts alone, predictions are off at the corner."""
    roofline = replace(CURVED, sharpness=100.0)
    samples = [measured(roofline, chunks) for chunks in grid_of_steps()]
    fitted = CostModel.fit(samples)
    assert fitted.sharpness > 10.0
    assert all(abs(fitted.relative_error(sample)) < 0.04 for sample in samples)


def test_a_model_without_attention_cannot_tell_short_contexts_from_long_ones() -> None:
    samples = [measured(CURVED, chunks) for chunks in grid_of_steps()]
    counting = CostModel.fit_token_count(samples)
    assert (counting.alpha_ns, counting.delta_ns, counting.sharpness) == (0.0, 0.0, 1.0)
    assert max(abs(counting.relative_error(sample)) for sample in samples) > 0.5
    with pytest.raises(ConfigError, match="at least one"):
        CostModel.fit_token_count([])


@FIT_SETTINGS
@given(st.randoms(use_true_random=False))
def test_fit_of_noisy_samples_is_never_negative(rng: random.Random) -> None:
    samples = [
        measured(CPU, chunks, layers_factor=rng.uniform(0.8, 1.25)) for chunks in grid_of_steps()
    ]
    fitted = CostModel.fit(samples)  # the constructor refuses negative constants
    assert all(abs(fitted.relative_error(sample)) < 0.5 for sample in samples)


def test_fit_of_pure_noise_is_never_negative() -> None:
    rng = random.Random(1)
    samples = [
        StepSample(chunks, rng.randrange(1, 10**9), rng.randrange(1, 10**9))
        for chunks in grid_of_steps()
    ]
    assert CostModel.fit(samples).step_ns((ChunkShape(0, 1, True),)) >= 0.0


def test_fit_of_samples_that_cannot_tell_constants_apart_still_predicts_them() -> None:
    decode = (ChunkShape(100, 1, True),)
    fitted = CostModel.fit([StepSample(decode, 4_000_000, 1_000_000)] * 2)
    assert fitted.step_ns(decode) == pytest.approx(5e6, rel=1e-6)
    assert fitted.stage_ns(decode, 1, 4, is_leader=False) == pytest.approx(1e6, rel=1e-6)


def test_without_a_row_that_samples_the_head_is_free() -> None:
    silent = (ChunkShape(0, 16),)
    sample = StepSample(silent, layers_ns=5_000_000, head_ns=700)
    assert sample.elapsed_ns == 5_000_000  # a call of the head with no rows
    fitted = CostModel.fit([sample])
    assert (fitted.head_gamma_ns, fitted.head_ns) == (0.0, 0.0)


def test_fit_needs_measurements() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        CostModel.fit([])
    with pytest.raises(ConfigError, match="no time"):
        CostModel.fit([StepSample((ChunkShape(0, 1),), 0)])
    with pytest.raises(ConfigError, match="no time"):
        CostModel.fit([StepSample((ChunkShape(0, 1, True),), 1000, 0)])


@SETTINGS
@given(models, st.floats(-1e6, 1e10), st.integers(0, 10_000), st.integers(0, 5_000))
def test_largest_chunk_is_the_inverse(
    model: CostModel, budget_ns: float, prefix: int, limit: int
) -> None:
    tokens = model.largest_chunk(budget_ns, prefix, limit)
    assert 0 <= tokens <= limit
    if tokens:
        assert model.chunk_ns(prefix, tokens) <= budget_ns
    if tokens < limit:
        assert model.chunk_ns(prefix, tokens + 1) > budget_ns


def test_chunks_shrink_as_the_prefix_grows() -> None:
    sizes = [CPU.largest_chunk(100e6, prefix, 512) for prefix in range(0, 8000, 500)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 28  # 3.5 ms a token


def test_a_free_model_is_limited_by_the_limit_alone() -> None:
    free = CostModel(alpha_ns=0.0, delta_ns=0.0, beta_ns=0.0, gamma_ns=0.0)
    assert free.largest_chunk(0.0, 5, 77) == 77
    assert free.largest_chunk(-1.0, 5, 77) == 0
