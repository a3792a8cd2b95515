"""The step as an exchange of values: `plan = scheduler.schedule(now_ns)`,
`result = executor.execute(plan)`, `scheduler.update(plan, result, now_ns)`."""

from __future__ import annotations

from dataclasses import dataclass

from kunserve.core.ids import BlockId, Epoch, RequestId
from kunserve.core.request import Request, TokenLogprobs


@dataclass(frozen=True)
class Chunk:
    """Some consecutive tokens of one request, computed in one step.

    Positions [context_len, context_len + len(token_ids)); a decode is a chunk of one token.
    `block_table` covers at least those positions, in order: position p lives in
    block_table[p // block_size]. With `samples`, the last row's logits give the output token
    `output_index` (t); without, the prompt is not yet complete and nothing is sampled.
    """

    request_id: RequestId
    token_ids: tuple[int, ...]
    context_len: int
    block_table: tuple[BlockId, ...]
    samples: bool
    output_index: int


@dataclass(frozen=True)
class BlockMove:
    """KV of block `source` is copied to block `target`, in every layer that a stage holds."""

    source: BlockId
    target: BlockId


@dataclass(frozen=True)
class StepPlan:
    """One step of one group: what every stage computes, in the order of `chunks`.

    `started`: requests that enter the running set in this step, with the tokens known so far
    (a preempted or failed-over request starts again). `released`: requests that left it since
    the last plan (finished, aborted, preempted); the executor forgets their sampling state
    before it looks at `started`. `moves` are made by every stage, in order, before its layers:
    the block tables of `chunks` are those after them. Making them again changes nothing.
    """

    epoch: Epoch
    step: int
    chunks: tuple[Chunk, ...]
    started: tuple[Request, ...] = ()
    released: tuple[RequestId, ...] = ()
    moves: tuple[BlockMove, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Rows of the batch."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)


@dataclass(frozen=True)
class SampledToken:
    """The token drawn from a chunk with `samples`."""

    request_id: RequestId
    output_index: int
    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class StepResult:
    """What a step gave. A cancelled step gave nothing: its KV writes are idempotent, so the same
    plan may simply be scheduled again. `failed`: rows that gave no token (logits that are not
    finite), with the reason; their requests end, the others go on."""

    epoch: Epoch
    step: int
    tokens: tuple[SampledToken, ...]
    cancelled: bool = False
    failed: tuple[tuple[RequestId, str], ...] = ()


@dataclass(frozen=True)
class GroupLoad:
    """What a group's scheduler reports after a step, for dispatch and metrics.

    `free_blocks` have no content; `cached_blocks` are unreferenced and keep theirs until they are
    evicted: both can be had at once.
    `queued_blocks` is what the waiting requests need for all tokens known so far, beyond blocks
    they already hold; `head_blocks`, what the first of them needs. `leases_seen` is the number of
    leases the scheduler has taken in so far, so that the front can add what is still on the way.
    Counters are totals since start.
    """

    total_blocks: int
    free_blocks: int
    cached_blocks: int
    num_running: int
    num_waiting: int
    queued_blocks: int
    leases_seen: int
    prompt_tokens: int
    generated_tokens: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    swapped_out: int = 0
    """Requests whose KV went to host memory, and came back from there."""
    swapped_in: int = 0
    swap_bytes: int = 0
    """Copied to host memory and back."""
    swap_refused: int = 0
    """Preempted requests that host memory had no room for: they are computed again."""
    head_blocks: int = 0

    @property
    def available_blocks(self) -> int:
        """What can be allocated now."""
        return self.free_blocks + self.cached_blocks

    @property
    def used_share(self) -> float:
        """Referenced blocks as a share of all, 0..1."""
        return 1.0 - self.available_blocks / self.total_blocks if self.total_blocks else 0.0
