"""What one step may take: the budget that a plan is formed to (design section 5).

A budget is a number of tokens or, by the cost model, a time. Without prefill a step lasts as long
as its decodes take; with prefill it may last

    max(target, 2 x (fixed costs and decodes of the step))

so prompts get at least as much time as everything else in the step: a step takes its fixed costs
however small its chunks, and a burst whose decodes alone use up the target would starve the prompts
behind it although there is memory for them. The price: while prompts queue, the time between two
tokens of a request is that of the target, or at most twice what its decodes need by themselves.
"""

from __future__ import annotations

from kunserve.policy.cost_model import ChunkShape, CostModel, StepCost


class StepBudget:
    """What is left for a step being formed.

    Once a chunk is cut the budget is closed, so that no later arrival overtakes. The first prefill
    of a time budget gets `least_tokens` in any case, so that it gets on: a long prefix may cost
    more than all the time there is.

    Args:
        cost_model: of the group's slowest stage.
        target_ns: what a step with prefills may last.
        max_tokens: most tokens of the step. None: the time counts, not the tokens.
        least_tokens: for the first prefill.
    """

    def __init__(
        self,
        cost_model: CostModel,
        target_ns: float,
        max_tokens: int | None = None,
        least_tokens: int = 1,
    ) -> None:
        self.is_closed = False
        self._cost_model = cost_model
        self._cost = StepCost(cost_model)
        self._target_ns = max(target_ns, 2.0 * cost_model.fixed_ns)
        self._limit_ns = self._target_ns
        self._left_tokens = max_tokens
        self._least_tokens = least_tokens
        self._has_prefill = False

    def add_decode(self, context_tokens: int) -> None:
        """The step computes one token after these."""
        if self._left_tokens is not None:
            self._left_tokens -= 1
        self._cost.add(ChunkShape(context_tokens, 1, samples=True))
        if not self._has_prefill:
            self._limit_ns = max(self._target_ns, 2.0 * self._cost.total_ns)

    def has_room_for_decode(self, context_tokens: int) -> bool:
        """Does one more decode keep the step within its target? For decodes that take what
        prefills have left."""
        if self._left_tokens is not None:
            return self._left_tokens > 0
        decode = ChunkShape(context_tokens, 1, samples=True)
        return self._cost.with_chunk_ns(decode) <= self._target_ns

    def add_prefill(self, prefix_tokens: int, tokens: int, samples: bool) -> None:
        """The step computes a chunk that `grant` gave."""
        if self._left_tokens is not None:
            self._left_tokens -= tokens
        self._cost.add(ChunkShape(prefix_tokens, tokens, samples))
        self._has_prefill = True
        self._least_tokens = 0

    def grant(self, prefix_tokens: int, wanted_tokens: int) -> int:
        """How many of `wanted_tokens` the budget still allows after a prefix: 0 is none."""
        if self._left_tokens is not None:
            granted = max(0, min(wanted_tokens, self._left_tokens))
        else:
            # Some row may yet sample: room is left for the head's weights.
            head_ns = 0.0 if self._cost.sampled_rows else self._cost_model.head_gamma_ns
            left_ns = self._limit_ns - head_ns
            granted = self._cost.largest_chunk(left_ns, prefix_tokens, wanted_tokens)
            granted = max(granted, min(self._least_tokens, wanted_tokens))
        self.is_closed = granted < wanted_tokens
        return granted
