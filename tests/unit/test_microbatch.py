"""Lookahead formulation: nothing lost, order kept, bounds held, costs equal."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kunserve.policy.cost_model import ChunkShape, CostModel
from kunserve.policy.microbatch import Bounds, Microbatch, Work, formulate, next_microbatch

COSTS = CostModel(
    alpha_ns=2.0, delta_ns=30.0, beta_ns=1000.0, gamma_ns=20_000.0, head_gamma_ns=5000.0, head_ns=50
)
OVERLAPPING = CostModel(
    2.0, 30.0, 1000.0, 200_000.0, 5000.0, 50.0, sharpness=3.0, head_sharpness=2.0
)

queues = st.lists(
    st.builds(Work, st.integers(0, 3000), st.integers(1, 5000)), min_size=1, max_size=30
)
decode_lists = st.lists(st.integers(0, 4000), max_size=20)


def decodes_of(contexts: list[int]) -> tuple[ChunkShape, ...]:
    return tuple(ChunkShape(context, 1, samples=True) for context in contexts)


def token_ns(model: CostModel, works: list[Work]) -> float:
    """One token alone after the longest prefix."""
    return model.chunk_ns(max(work.prefix_tokens + work.tokens for work in works), 1, True)


def check_complete(works: list[Work], batches: list[Microbatch]) -> None:
    """Every token once, in order, and chunks that follow each other."""
    done = [work.prefix_tokens for work in works]
    last_index = 0
    for batch in batches:
        assert batch.pieces
        indices = [piece.work for piece in batch.pieces]
        assert len(indices) == len(set(indices))
        for index, chunk in batch.pieces:
            assert last_index <= index
            last_index = index
            assert chunk.chunk_tokens > 0
            assert chunk.prefix_tokens == done[index]
            done[index] += chunk.chunk_tokens
            assert chunk.samples == (done[index] == sum(works[index]))
    assert done == [sum(work) for work in works]


def tokens_of(batch: Microbatch) -> int:
    return sum(piece.chunk.chunk_tokens for piece in batch.pieces)


@given(
    works=st.lists(
        st.builds(Work, st.integers(0, 3000), st.integers(1, 300)), min_size=1, max_size=12
    ),
    contexts=decode_lists,
    model=st.sampled_from([COSTS, OVERLAPPING]),
    most_ns=st.floats(1e5, 2e6),
    max_tokens=st.one_of(st.none(), st.integers(1, 300)),
    min_tokens=st.integers(1, 100),
    least_parts=st.integers(1, 5),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_all_tokens_in_order_within_the_bounds(
    works: list[Work],
    contexts: list[int],
    model: CostModel,
    most_ns: float,
    max_tokens: int | None,
    min_tokens: int,
    least_parts: int,
) -> None:
    decodes = decodes_of(contexts)
    bounds = Bounds(model, decodes, most_ns, max_tokens, min_tokens)
    batches = formulate(works, bounds, least_parts)
    check_complete(works, batches)
    for batch in batches:
        chunks = [*decodes, *(piece.chunk for piece in batch.pieces)]
        assert batch.cost_ns == pytest.approx(model.step_ns(chunks), rel=1e-6)
        assert batch.cost_ns <= most_ns or tokens_of(batch) < 2 * min_tokens
        assert max_tokens is None or tokens_of(batch) <= max_tokens
    assert batches == formulate(works, bounds, least_parts)


@given(
    works=queues,
    contexts=decode_lists,
    model=st.sampled_from([COSTS, OVERLAPPING]),
    most_ns=st.floats(1e6, 1e8),
    least_parts=st.integers(1, 9),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_costs_are_equal_up_to_four_tokens(
    works: list[Work], contexts: list[int], model: CostModel, most_ns: float, least_parts: int
) -> None:
    decodes = decodes_of(contexts)
    most_ns += 2 * model.step_ns(decodes) + 20 * token_ns(model, works)
    costs = [b.cost_ns for b in formulate(works, Bounds(model, decodes, most_ns), least_parts)]
    tolerance_ns = 4 * token_ns(model, works) + (model.head_gamma_ns if not decodes else 0.0)
    if model.sharpness > 1.0:
        tolerance_ns += model.gamma_ns
    assert max(costs) - min(costs) <= tolerance_ns


@given(
    works=queues,
    contexts=decode_lists,
    most_ns=st.floats(1e6, 1e8),
    max_tokens=st.one_of(st.none(), st.integers(50, 3000)),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_next_one_is_the_first_of_a_formulation(
    works: list[Work], contexts: list[int], most_ns: float, max_tokens: int | None
) -> None:
    bounds = Bounds(COSTS, decodes_of(contexts), most_ns, max_tokens, min_tokens=16)
    assert next_microbatch(works, bounds, num_stages=1) == formulate(works, bounds)[0]


def test_a_long_request_is_cut_into_chunks_that_get_shorter() -> None:
    bounds = Bounds(COSTS, most_ns=COSTS.step_ns([ChunkShape(0, 4000, True)]) / 4)
    sizes = [tokens_of(batch) for batch in formulate([Work(0, 4000)], bounds)]
    assert len(sizes) == 5  # gamma and the prefix are paid again
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 2 * sizes[-1]


def test_the_number_of_parts_does_not_jump_while_the_queue_shrinks() -> None:
    """Work of 9 bounds is 10 parts or so, not 16 of little more than half the bound."""
    whole_ns = COSTS.step_ns([ChunkShape(0, 500, True)])
    batches = formulate([Work(0, 500)] * 9, Bounds(COSTS, most_ns=whole_ns))
    assert len(batches) == 10
    assert min(batch.cost_ns for batch in batches) > 0.85 * whole_ns


def test_small_work_is_shared_by_the_stages_and_not_halved_again() -> None:
    works, bounds = [Work(0, 200), Work(0, 200)], Bounds(COSTS, min_tokens=64)
    first = next_microbatch(works, bounds, num_stages=2)
    assert tokens_of(first) == 200
    second = next_microbatch(works[1:], bounds, num_stages=2, in_flight_ns=[first.cost_ns])
    assert tokens_of(second) == 200


def test_a_microbatch_of_decodes_alone_has_no_part_in_the_work_yet() -> None:
    decodes = decodes_of([100] * 8)
    bounds = Bounds(COSTS, decodes, min_tokens=64)
    idle_ns = COSTS.step_ns(decodes)
    works = [Work(0, 300), Work(0, 300)]
    batch = next_microbatch(works, bounds, num_stages=2, in_flight_ns=[idle_ns])
    assert tokens_of(batch) == 300


def test_little_work_is_not_divided() -> None:
    bounds = Bounds(COSTS, most_ns=1.0, min_tokens=64)
    (batch,) = formulate([Work(0, 60), Work(0, 67)], bounds, least_parts=4)
    assert tokens_of(batch) == 127


def test_without_work_there_is_nothing() -> None:
    assert formulate([], Bounds(COSTS)) == []
    assert next_microbatch([], Bounds(COSTS), 2).pieces == ()
    assert math.isfinite(next_microbatch([], Bounds(COSTS), 2).cost_ns)
