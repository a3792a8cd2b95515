"""What one step may take: the budget that a plan is formed to (design section 5).

A budget is a number of tokens or, by the cost model, a time. Without prefill a step lasts as long
as its decodes take; with prefill it may last

    max(target, 2 x (fixed costs and decodes of the step))

so prompts get at least as much time as everything else in the step: a step takes its fixed costs
however small its chunks, and a burst whose decodes alone use up the target would starve the prompts
behind it although there is memory for them. The price: while prompts queue, the time between two
tokens of a request is that of the target, or at most twice what its decodes need by themselves.

In a pipeline with a queue, lookahead may set a lower limit: an equal share of all queued work
(`kunserve.policy.microbatch`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kunserve.policy.cost_model import ChunkShape, CostModel, StepCost
from kunserve.policy.microbatch import Bounds, Work, next_microbatch

_LEAST_BLOCKS = 4
"""Blocks of a microbatch that lookahead does not divide."""


class StepBudget:
    """What is left for a step being formed.

    Once a chunk is cut the budget is closed, so that no later arrival overtakes. The first prefill
    of a time budget gets a block in any case, so that it gets on: a long prefix may cost more than
    all the time there is.

    Args:
        cost_model: of the group's slowest stage.
        target_ns: what a step with prefills may last.
        max_tokens: most tokens of the step. None: the time counts, not the tokens.
        block_size: tokens of a KV block.
    """

    def __init__(
        self,
        cost_model: CostModel,
        target_ns: float,
        max_tokens: int | None = None,
        block_size: int = 1,
    ) -> None:
        self.is_closed = False
        self._cost_model = cost_model
        self._cost = StepCost(cost_model)
        self._target_ns = max(target_ns, 2.0 * cost_model.fixed_ns)
        self._limit_ns = self._target_ns
        self._cap_ns = math.inf
        self._decodes: list[ChunkShape] = []
        self._left_tokens = max_tokens
        self._block_size = block_size
        self._least_tokens = block_size
        self._min_tokens = 0
        self._has_prefill = False

    def add_decode(self, context_tokens: int) -> None:
        """The step computes one token after these."""
        if self._left_tokens is not None:
            self._left_tokens -= 1
        self._decodes.append(ChunkShape(context_tokens, 1, samples=True))
        self._cost.add(self._decodes[-1])
        if not self._has_prefill:
            self._limit_ns = max(self._target_ns, 2.0 * self._cost.total_ns)

    def has_room_for_decode(self, context_tokens: int) -> bool:
        """Does one more decode keep the step within its target? For decodes that take what
        prefills have left."""
        if self._left_tokens is not None:
            return self._left_tokens > 0
        decode = ChunkShape(context_tokens, 1, samples=True)
        return self._cost.with_chunk_ns(decode) <= self._target_ns

    @property
    def total_ns(self) -> float:
        """What the step costs so far."""
        return self._cost.total_ns

    def look_ahead(
        self, works: Sequence[Work], num_stages: int, in_flight_ns: Sequence[float]
    ) -> None:
        """From now on the step may cost no more than an equal share of all queued work, decodes
        included (`next_microbatch`), and does not begin a request with a few tokens only: it could
        not be in the next microbatch then.

        Args:
            works: in the order in which they will be granted.
            in_flight_ns: `total_ns` of the steps under way.
        """
        is_by_time = self._left_tokens is None
        self._min_tokens = self._least_worth_a_step()
        bounds = Bounds(
            self._cost_model,
            tuple(self._decodes),
            most_ns=self._limit_ns if is_by_time else math.inf,
            max_tokens=None if self._left_tokens is None else max(1, self._left_tokens),
            min_tokens=self._min_tokens,
        )
        self._cap_ns = next_microbatch(works, bounds, num_stages, in_flight_ns).cost_ns

    def _least_worth_a_step(self) -> int:
        """Tokens of a microbatch that is not divided: some blocks, and as many as it takes for the
        arithmetic of a step to last as long as the read of the weights."""
        model = self._cost_model
        knee_tokens = math.ceil(model.gamma_ns / model.beta_ns) if model.beta_ns else 1
        return max(_LEAST_BLOCKS * self._block_size, knee_tokens)

    def add_prefill(self, prefix_tokens: int, tokens: int, samples: bool) -> None:
        """The step computes a chunk that `grant` gave."""
        if self._left_tokens is not None:
            self._left_tokens -= tokens
        self._cost.add(ChunkShape(prefix_tokens, tokens, samples))
        self._has_prefill = True
        self._least_tokens = 0

    def grant(self, prefix_tokens: int, wanted_tokens: int) -> int:
        """How many of `wanted_tokens` the budget still allows after a prefix: 0 is none."""
        granted = wanted_tokens
        if self._left_tokens is not None:
            granted = max(0, min(granted, self._left_tokens))
        most_ns = self._most_ns()
        if most_ns < math.inf:
            in_time = self._cost.largest_chunk(most_ns, prefix_tokens, granted)
            granted = max(in_time, min(self._least_tokens, granted))
        if granted < min(self._min_tokens, wanted_tokens) and self._has_prefill:
            granted = 0
        self.is_closed = granted < wanted_tokens
        return granted

    def _most_ns(self) -> float:
        """What the step may cost with a chunk whose row is not sampled."""
        if self._left_tokens is not None:
            return self._cap_ns
        # Some row may yet sample: room is left for the head's weights.
        head_ns = 0.0 if self._cost.sampled_rows else self._cost_model.head_gamma_ns
        return min(self._limit_ns - head_ns, self._cap_ns)
