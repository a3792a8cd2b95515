"""The budget of a step."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kunserve.policy.cost_model import ChunkShape, CostModel
from kunserve.policy.drafting import StepBudget

MS = 1e6
COST = CostModel(
    alpha_ns=0.01 * MS,
    delta_ns=0.05 * MS,
    beta_ns=MS,
    gamma_ns=4 * MS,
    head_gamma_ns=MS,
    sharpness=2.0,
)


def granted_after(decodes: list[int], target_ns: float, prefix: int = 0, wanted: int = 4000) -> int:
    budget = StepBudget(COST, target_ns)
    for context_tokens in decodes:
        budget.add_decode(context_tokens)
    return budget.grant(prefix, wanted)


@given(
    decodes=st.lists(st.integers(0, 300), max_size=30),
    target_ms=st.integers(1, 200),
    prefix=st.integers(0, 300),
)
def test_a_step_lasts_the_target_or_twice_what_it_needs_without_prefill(
    decodes: list[int], target_ms: int, prefix: int
) -> None:
    chunks = [ChunkShape(context, 1, True) for context in decodes]
    base_ns = max(COST.fixed_ns, COST.step_ns(chunks))
    most_ns = max(target_ms * MS, 2 * base_ns)
    head_ns = 0.0 if decodes else COST.head_gamma_ns  # room for a row that samples
    tokens = granted_after(decodes, target_ms * MS, prefix)

    def lasts_ns(tokens: int) -> float:
        return COST.step_ns([*chunks, ChunkShape(prefix, tokens)]) + head_ns

    assert tokens == 1 or lasts_ns(tokens) <= most_ns
    assert lasts_ns(tokens + 1) > most_ns


def test_more_decodes_leave_prompts_more_time_not_less_once_the_target_is_used_up() -> None:
    few, many = granted_after([0] * 20, 20 * MS), granted_after([0] * 40, 20 * MS)
    assert 0 < few < many


def test_only_the_first_prefill_gets_the_least() -> None:
    budget = StepBudget(COST, 8 * MS, block_size=16)
    assert budget.grant(500, 30) == 16  # the prefix alone costs more than there is
    budget.add_prefill(500, 16, samples=False)
    assert budget.is_closed
    assert budget.grant(0, 1) == 0


def test_a_token_budget_counts_tokens_alone() -> None:
    budget = StepBudget(COST, target_ns=1, max_tokens=10, block_size=16)
    budget.add_decode(5000)
    assert (budget.grant(5000, 4), budget.is_closed) == (4, False)
    budget.add_prefill(5000, 4, samples=True)
    assert (budget.grant(0, 9), budget.is_closed) == (5, True)
    budget.add_prefill(0, 5, samples=False)
    assert not budget.has_room_for_decode(0)
