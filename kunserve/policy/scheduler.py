"""The scheduler of one group: which tokens of which requests the next step computes.

There are no prefill and decode phases, only *computed* tokens that catch up with *known* tokens
(design section 5). A request knows its prompt and the tokens sampled so far; the KV of some of
them is computed; a step computes a few more, and when it reaches the last known token, its row
gives the next one:

    tokens     [ prompt ............................ | outputs ...... ]
               [ computed: in blocks ][ next chunk ][ still to compute ]
                                       ^ context_len

One step is an exchange of values:

    plan = scheduler.schedule(now_ns)
    result = executor.execute(plan)
    outputs = scheduler.update(plan, result, now_ns)

`schedule` takes, in this order: running requests that lack one token (decodes), running requests
that lack more (prefills), then waiting requests, each by arrival. Computed counts move only in
`update`, so a cancelled step leaves nothing to undo in them. A request that needs a block when none
is available preempts the latest arrival, which computes again later (as vLLM).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from dataclasses import dataclass, replace
from itertools import pairwise

from kunserve.core.errors import (
    AccountingError,
    ConfigError,
    InvalidRequestError,
    RequestTooLargeError,
)
from kunserve.core.ids import BlockId, Epoch, RequestId
from kunserve.core.request import FinishReason, Request, TokenOutput
from kunserve.core.step import Chunk, GroupLoad, SampledToken, StepPlan, StepResult
from kunserve.policy.blocks import BlockPool
from kunserve.policy.cost_model import CostModel
from kunserve.policy.prefix import block_hashes


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of one group's scheduler.

    Raises:
        ConfigError: a limit leaves no room for work.
    """

    block_size: int
    """Tokens of a KV block."""
    max_model_len: int
    """Most tokens of one request, prompt and outputs together."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a request, unless it ignores them."""
    max_num_seqs: int = 256
    """Most running requests."""
    max_num_batched_tokens: int | None = None
    """Most tokens of a step, and so of decodes. None: set by time, see `step_time_target_ns`."""
    step_time_target_ns: int = 100_000_000
    """What a step with prefills may last by the cost model, if tokens do not bound it."""
    watermark_fraction: float = 0.01
    """Share of all blocks that admission leaves for the growth of running requests."""
    enable_prefix_caching: bool = True
    """Share full blocks of equal prefixes, and keep them after their request until evicted."""
    num_stages: int = 1
    """Stages of the group: as many steps may be in flight, each with its share of the decodes."""

    def __post_init__(self) -> None:
        for name in ("block_size", "max_model_len", "max_num_seqs", "num_stages"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < 1:
            raise ConfigError(
                f"max_num_batched_tokens must be at least 1, got {self.max_num_batched_tokens}"
            )
        if not 0.0 <= self.watermark_fraction < 1.0:
            raise ConfigError(
                f"watermark_fraction must be in [0, 1), got {self.watermark_fraction}"
            )


class _RequestState:
    """A leased request: what is known, what is computed, which blocks hold it."""

    __slots__ = (
        "block_table",
        "computed_tokens",
        "hashes",
        "is_aborted",
        "is_new",
        "is_running",
        "is_unannounced",
        "limit_tokens",
        "num_prompt_tokens",
        "order",
        "planned_tokens",
        "published_blocks",
        "request",
        "tokens",
    )

    def __init__(self, request: Request, lease: int, max_model_len: int) -> None:
        self.request = request
        self.order = (request.arrival_ns, lease)
        self.tokens = [*request.prompt_token_ids, *request.output_token_ids]
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.limit_tokens = min(max_model_len, self.num_prompt_tokens + request.params.max_tokens)
        self.computed_tokens = 0
        self.planned_tokens = 0  # in a plan that is being executed
        self.block_table: tuple[BlockId, ...] = ()
        self.hashes: tuple[bytes, ...] = ()  # of the full blocks of the known tokens, so far
        self.published_blocks = 0  # the first blocks of the table whose names others may see
        self.is_running = False
        self.is_unannounced = True  # the executor has no sampling state of it
        self.is_aborted = False
        self.is_new = True  # never left the queue

    @property
    def missing_tokens(self) -> int:
        """Known tokens whose KV is not computed. 1: a decode."""
        return len(self.tokens) - self.computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens


def _arrival(state: _RequestState) -> tuple[int, int]:
    return state.order


@dataclass(frozen=True)
class _Flight:
    """A plan being executed, and the request of each of its chunks."""

    plan: StepPlan
    states: tuple[_RequestState, ...]
    started: tuple[_RequestState, ...]


class _Draft:
    """A plan being formed: tokens per request, and what is left of the step's budget.

    The budget is either a number of tokens or, by the cost model, a time. In a time budget that is
    used up by decodes, the first prefill still gets one block, so that it gets on. Once the budget
    cuts a chunk the draft is closed, so that no later arrival overtakes.
    """

    def __init__(self, config: SchedulerConfig, cost_model: CostModel) -> None:
        self.work: dict[_RequestState, int] = {}
        self.is_closed = False
        self.has_preempted = False
        self._cost_model = cost_model
        self._least_tokens = config.block_size
        self._left_tokens = config.max_num_batched_tokens
        # A step takes gamma_ns however small its chunks: below twice that, a shorter step would
        # mostly read weights again and prefill would starve.
        target_ns = max(config.step_time_target_ns, 2.0 * cost_model.gamma_ns)
        self._left_ns = target_ns - cost_model.gamma_ns

    def add(self, state: _RequestState, tokens: int) -> None:
        """Compute the next `tokens` tokens of `state` in this step."""
        self.work[state] = tokens
        if self._left_tokens is not None:
            self._left_tokens -= tokens
        else:
            samples = tokens == state.missing_tokens
            self._left_ns -= self._cost_model.chunk_ns(state.computed_tokens, tokens, samples)

    def add_prefill(self, state: _RequestState, tokens: int) -> None:
        """`add` for what `grant` gave."""
        self.add(state, tokens)
        self._least_tokens = 0

    def grant(self, prefix_tokens: int, wanted_tokens: int) -> int:
        """How many of `wanted_tokens` the budget still allows after a prefix: 0 is none."""
        if self._left_tokens is not None:
            granted = min(wanted_tokens, self._left_tokens)
        else:
            granted = self._cost_model.largest_chunk(self._left_ns, prefix_tokens, wanted_tokens)
            granted = max(granted, min(self._least_tokens, wanted_tokens))
        self.is_closed = granted < wanted_tokens
        return granted


class Scheduler:
    """Continuous batching with chunked prefill, prefix cache and preemption by recompute.

    Args:
        config: limits of the group.
        pool: the group's KV blocks; the scheduler is its only user.
        cost_model: predicts step times; used when no token budget is given.
        epoch: of the group; every plan carries it.
    """

    def __init__(
        self, config: SchedulerConfig, pool: BlockPool, cost_model: CostModel, epoch: Epoch
    ) -> None:
        self._config = config
        self._pool = pool
        self._cost_model = cost_model
        self._epoch = epoch
        self._eos_token_ids = frozenset(config.eos_token_ids)
        self._requests: dict[RequestId, _RequestState] = {}
        self._waiting: list[_RequestState] = []  # by arrival, as is _running
        self._running: list[_RequestState] = []
        self._flights: dict[int, _Flight] = {}
        self._next_step = 0
        self._to_release: dict[RequestId, None] = {}  # what the executor has not been told yet
        self._newly_started: list[RequestId] = []
        self._queued_blocks = 0
        self._leases_seen = 0
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._preemptions = 0
        self._prefix_queries = 0
        self._prefix_hits = 0

    # ------------------------------------------------------------ requests in and out

    @property
    def max_request_tokens(self) -> int:
        """Most tokens, prompt and `max_tokens` together, that a request may ask for."""
        return min(self._config.max_model_len, self._pool.total_blocks * self._config.block_size)

    def add(self, request: Request) -> None:
        """Take a lease: the request waits, ordered by arrival.

        One that has outputs continues after them: they are computed like a prompt. A refused
        request counts as seen in `GroupLoad.leases_seen`.

        Raises:
            RequestTooLargeError: prompt and `max_tokens` can never fit.
            InvalidRequestError: the prompt is empty.
            AccountingError: the id is leased already, or nothing is left to generate.
        """
        self._leases_seen += 1
        self._refuse_impossible(request)
        state = _RequestState(request, self._leases_seen, self._config.max_model_len)
        self._requests[request.id] = state
        self._enqueue(state)

    def _refuse_impossible(self, request: Request) -> None:
        prompt, limit = len(request.prompt_token_ids), self.max_request_tokens
        max_tokens = request.params.max_tokens
        if request.id in self._requests:
            raise AccountingError(f"request {request.id} is leased already")
        if prompt == 0:
            raise InvalidRequestError("the prompt has no tokens; give at least one", "prompt")
        if prompt + max_tokens > limit:
            raise RequestTooLargeError(
                f"the prompt has {prompt} tokens and max_tokens is {max_tokens}, "
                f"{prompt + max_tokens} in all, but at most {limit} tokens fit "
                f"(context of {self._config.max_model_len}, KVCache of "
                f"{self._pool.total_blocks * self._config.block_size}); "
                f"shorten the prompt or lower max_tokens",
                "max_tokens",
            )
        if len(request.output_token_ids) >= max_tokens:
            raise AccountingError(f"request {request.id} has all its {max_tokens} tokens already")

    def abort(self, request_id: RequestId) -> None:
        """Forget a request in any state; an unknown id is one that has ended already.

        If a step is computing it, it keeps its blocks until that step is done, and its token is
        dropped then.
        """
        state = self._requests.get(request_id)
        if state is None:
            return
        if state.planned_tokens:
            state.is_aborted = True
            return
        del self._requests[request_id]
        if state.is_running:
            self._leave(state)
        else:
            self._dequeue(state)

    def has_work(self) -> bool:
        """True while a request waits or runs, or a step is in flight."""
        return bool(self._requests or self._flights)

    def newly_started(self) -> tuple[RequestId, ...]:
        """Ids that left the queue for the first time under this lease, since the last call."""
        started = tuple(self._newly_started)
        self._newly_started.clear()
        return started

    def load(self) -> GroupLoad:
        """The group's load now. O(1).

        `prefix_queries` and `prefix_hits` count tokens, once per lease at its first start;
        `prompt_tokens` counts a prompt when its first output token is sampled, so that a request
        that moves is counted once in the cluster.
        """
        return GroupLoad(
            total_blocks=self._pool.total_blocks,
            free_blocks=self._pool.free_blocks,
            cached_blocks=self._pool.cached_blocks,
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            queued_blocks=self._queued_blocks,
            leases_seen=self._leases_seen,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=self._preemptions,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
        )

    # ------------------------------------------------------------ schedule

    def schedule(self, now_ns: int) -> StepPlan | None:
        """Form the next step, or None when there is nothing to compute or all stages are busy.

        A plan always has chunks: ids to release wait for the next one, the executor only holds
        their small sampling state. `now_ns` is the seam for policies that look at deadlines; this
        one goes by arrival alone.
        """
        if len(self._flights) >= self._config.num_stages:
            return None
        draft = _Draft(self._config, self._cost_model)
        self._plan_decodes(draft)
        self._plan_prefills(draft)
        if not draft.has_preempted:
            self._admit(draft)
        return self._issue(draft) if draft.work else None

    def _plan_decodes(self, draft: _Draft) -> None:
        """One token for every decode, at most one microbatch's share of them."""
        decodes = [state for state in self._running if state.missing_tokens == 1]
        share = math.ceil(len(decodes) / self._config.num_stages)
        idle = [state for state in decodes if not state.planned_tokens]
        for state in idle[:share]:
            if state.is_running and self._grow(state, 1, draft):
                draft.add(state, 1)

    def _plan_prefills(self, draft: _Draft) -> None:
        """What the budget allows to requests that lack more than a token, by arrival."""
        prefills = [
            state
            for state in self._running
            if state.missing_tokens > 1 and not state.planned_tokens
        ]
        for state in prefills:
            if draft.is_closed:
                return
            if not state.is_running:  # preempted for an earlier one
                continue
            granted = draft.grant(state.computed_tokens, state.missing_tokens)
            tokens = self._grow(state, granted, draft)
            if tokens:
                draft.add_prefill(state, tokens)

    def _grow(self, state: _RequestState, tokens: int, draft: _Draft) -> int:
        """Give `state` blocks for its next `tokens` tokens; how many of them have room then.

        A chunk is cut to the blocks that are available. Only when it has no room at all are others
        preempted for it; 0 when that hit `state` itself.
        """
        room = len(state.block_table) * self._config.block_size - state.computed_tokens
        if tokens <= room:
            return tokens
        if room == 0 and not self._make_room(state, draft):
            return 0
        missing_blocks = self._blocks_for(tokens - room)
        self._extend(state, min(missing_blocks, self._pool.available_blocks))
        return min(tokens, len(state.block_table) * self._config.block_size - state.computed_tokens)

    def _make_room(self, state: _RequestState, draft: _Draft) -> bool:
        """Preempt the latest arrivals until a block is available; False if `state` must wait."""
        while not self._pool.available_blocks:
            victim = next(s for s in reversed(self._running) if not s.planned_tokens)
            if victim is state and state is not self._running[-1]:
                return False  # later ones are in flight: wait for them
            self._preempt(victim, draft)
            if victim is state:
                return False
        return True

    def _preempt(self, state: _RequestState, draft: _Draft) -> None:
        """Back to the queue, ahead of all later arrivals, to be computed again."""
        draft.work.pop(state, None)
        draft.has_preempted = True
        self._preemptions += 1
        self._leave(state)
        self._enqueue(state)

    def _admit(self, draft: _Draft) -> None:
        """Waiting requests by arrival, as long as limits, budget and memory allow the first.

        All others in the draft have their tokens by then, so one is admitted only when the budget
        has a token more than there are decodes: these can never outgrow it.
        """
        while self._waiting and len(self._running) < self._config.max_num_seqs:
            if draft.is_closed:
                return
            state = self._waiting[0]
            cached = self._cached_prefix(state)
            prefix_tokens = len(cached) * self._config.block_size
            tokens = draft.grant(prefix_tokens, len(state.tokens) - prefix_tokens)
            if not tokens or not self._may_start(cached, prefix_tokens + tokens):
                return
            self._start(state, cached)
            self._extend(state, self._blocks_for(prefix_tokens + tokens) - len(cached))
            draft.add_prefill(state, tokens)

    def _cached_prefix(self, state: _RequestState) -> tuple[BlockId, ...]:
        """Blocks that need no computing. The last token always does: its row is sampled."""
        if not self._config.enable_prefix_caching:
            return ()
        state.hashes = block_hashes(state.tokens, self._config.block_size, state.hashes)
        usable = (len(state.tokens) - 1) // self._config.block_size
        return self._pool.lookup(state.hashes[:usable])

    def _may_start(self, cached: tuple[BlockId, ...], tokens: int) -> bool:
        """Are there blocks for the first chunk, and a reserve for the growth of the others?"""
        needed = self._blocks_for(tokens) - len(cached) + self._pool.count_unreferenced(cached)
        reserve = int(self._config.watermark_fraction * self._pool.total_blocks)
        return self._pool.available_blocks >= needed + (reserve if self._running else 0)

    def _start(self, state: _RequestState, cached: tuple[BlockId, ...]) -> None:
        self._dequeue(state)
        self._pool.share(cached)
        state.block_table = cached
        state.published_blocks = len(cached)
        state.computed_tokens = len(cached) * self._config.block_size
        state.is_running = True
        insort(self._running, state, key=_arrival)
        state.is_unannounced = True
        if state.is_new:
            state.is_new = False
            self._newly_started.append(state.request.id)
            if self._config.enable_prefix_caching:
                self._prefix_queries += len(state.tokens)
                self._prefix_hits += state.computed_tokens

    def _issue(self, draft: _Draft) -> StepPlan:
        """Turn the draft into a plan and remember it until its result comes.

        A request is announced in a plan that computes it, never in another one that could be
        cancelled while it is computed already.
        """
        states = tuple(draft.work)
        started = tuple(state for state in states if state.is_unannounced)
        plan = StepPlan(
            epoch=self._epoch,
            step=self._next_step,
            chunks=tuple(_chunk(state, tokens) for state, tokens in draft.work.items()),
            started=tuple(_known_request(state) for state in started),
            released=tuple(self._to_release),
        )
        for state, tokens in draft.work.items():
            state.planned_tokens = tokens
            state.is_unannounced = False
        self._to_release.clear()
        self._flights[plan.step] = _Flight(plan, states, started)
        self._next_step += 1
        return plan

    # ------------------------------------------------------------ update

    def update(self, plan: StepPlan, result: StepResult, now_ns: int) -> tuple[TokenOutput, ...]:
        """Take in the result of a plan in flight; give the new tokens, in the plan's order.

        A cancelled result gives none, and the same work is planned again; `started` and `released`
        are then said again too, so the executor replaces what it has of a request that starts.
        A request whose row failed ends here like an aborted one, without a last token.

        Raises:
            AccountingError: the plan is not in flight, the result is of another epoch or step, or
                its tokens and failed rows are not those of the plan. Nothing has changed then.
        """
        flight = self._flight_of(plan, result)
        tokens = {} if result.cancelled else _tokens_of(flight.plan, result)
        del self._flights[plan.step]
        for state in flight.states:
            state.planned_tokens = 0
        failed = {request_id for request_id, _ in result.failed}
        outputs: list[TokenOutput] = []
        for state, chunk in zip(flight.states, flight.plan.chunks, strict=True):
            if state.is_aborted or chunk.request_id in failed:
                del self._requests[chunk.request_id]
                self._leave(state)
            elif not result.cancelled:
                self._commit(state, len(chunk.token_ids))
                if chunk.samples:
                    outputs.append(self._append(state, tokens[chunk.request_id]))
        if result.cancelled:
            self._say_again(flight)
        return tuple(outputs)

    def _flight_of(self, plan: StepPlan, result: StepResult) -> _Flight:
        flight = self._flights.get(plan.step)
        if flight is None or plan.epoch != self._epoch:
            raise AccountingError(
                f"step {plan.step} of epoch {plan.epoch} is not in flight (epoch {self._epoch}, "
                f"steps {list(self._flights)})"
            )
        if (result.epoch, result.step) != (plan.epoch, plan.step):
            raise AccountingError(
                f"result of step {result.step} of epoch {result.epoch} came for step {plan.step} "
                f"of epoch {plan.epoch}"
            )
        return flight

    def _commit(self, state: _RequestState, tokens: int) -> None:
        """The KV of the next `tokens` tokens is there: blocks that became full get their names."""
        state.computed_tokens += tokens
        if not self._config.enable_prefix_caching:
            return
        full_blocks = state.computed_tokens // self._config.block_size
        if full_blocks > len(state.hashes):
            state.hashes = block_hashes(state.tokens, self._config.block_size, state.hashes)
        for index in range(state.published_blocks, full_blocks):
            self._pool.register(state.block_table[index], state.hashes[index])
        state.published_blocks = full_blocks

    def _append(self, state: _RequestState, token: SampledToken) -> TokenOutput:
        """Add the sampled token to the known ones; the last one ends the request."""
        self._generated_tokens += 1
        if token.output_index == 0:
            self._prompt_tokens += state.num_prompt_tokens
        state.tokens.append(token.token_id)
        finish, stop_token = self._finish(state, token)
        if finish is not None:
            del self._requests[token.request_id]
            self._leave(state)
        return TokenOutput(
            token.request_id, token.output_index, token.token_id, token.logprobs, finish, stop_token
        )

    def _finish(
        self, state: _RequestState, token: SampledToken
    ) -> tuple[FinishReason | None, bool]:
        """Why the request ends with this token, if it does, and whether by a stop token id."""
        params = state.request.params
        if token.output_index >= params.min_tokens:
            if token.token_id in self._eos_token_ids and not params.ignore_eos:
                return FinishReason.STOP, False
            if token.token_id in params.stop_token_ids:
                return FinishReason.STOP, True
        if len(state.tokens) >= state.limit_tokens:
            return FinishReason.LENGTH, False
        return None, False

    def _say_again(self, flight: _Flight) -> None:
        """A cancelled step may not have taken in who starts and who is released."""
        for state in flight.started:
            state.is_unannounced = True
        for request_id in flight.plan.released:
            state_now = self._requests.get(request_id)
            if state_now is None or not state_now.is_running:
                self._to_release[request_id] = None

    # ------------------------------------------------------------ queue and blocks

    def _enqueue(self, state: _RequestState) -> None:
        insort(self._waiting, state, key=_arrival)
        self._queued_blocks += self._blocks_for(len(state.tokens))

    def _dequeue(self, state: _RequestState) -> None:
        at = bisect_left(self._waiting, state.order, key=_arrival)
        del self._waiting[at]
        self._queued_blocks -= self._blocks_for(len(state.tokens))

    def _leave(self, state: _RequestState) -> None:
        """Out of the running set: finished, aborted or preempted. The executor is told to forget
        the request. Its blocks are given up; full ones stay cached."""
        self._running.remove(state)
        state.is_running = False
        self._pool.release(state.block_table)
        state.block_table = ()
        self._to_release[state.request.id] = None

    def _extend(self, state: _RequestState, num_blocks: int) -> None:
        near = state.block_table[-1] if state.block_table else None
        state.block_table += self._pool.allocate(num_blocks, near)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._config.block_size)

    # ------------------------------------------------------------ laws

    def check(self) -> None:
        """Check blocks, queues and counters. For tests and idle moments: O(total blocks).

        Raises:
            AccountingError: a law is broken.
        """
        self._pool.check(state.block_table for state in self._running)
        for state in self._running:
            self._check_table(state)
        for queue in (self._waiting, self._running):
            if any(a.order >= b.order for a, b in pairwise(queue)):
                raise AccountingError("a queue is not in arrival order")
        listed = {state.request.id: state for state in (*self._waiting, *self._running)}
        if listed != self._requests or len(self._waiting) + len(self._running) != len(listed):
            raise AccountingError("a request is in two queues, or in none")
        if any(state.is_running or state.block_table for state in self._waiting):
            raise AccountingError("a waiting request holds blocks")
        if self._queued_blocks != sum(self._blocks_for(len(s.tokens)) for s in self._waiting):
            raise AccountingError(f"queued_blocks is wrong: {self._queued_blocks}")

    def _check_table(self, state: _RequestState) -> None:
        name, full_blocks = state.request.id, state.computed_tokens // self._config.block_size
        if state.computed_tokens + state.planned_tokens > len(state.tokens):
            raise AccountingError(f"request {name} computes tokens that it does not know")
        covered = self._blocks_for(state.computed_tokens + state.planned_tokens)
        if not covered <= len(state.block_table) <= self._blocks_for(len(state.tokens)):
            raise AccountingError(f"request {name} holds {len(state.block_table)} blocks")
        for block in state.block_table[full_blocks:]:
            if not self._pool.is_writable(block):
                raise AccountingError(f"request {name} would write into block {block}, not its own")


def _chunk(state: _RequestState, tokens: int) -> Chunk:
    start = state.computed_tokens
    return Chunk(
        request_id=state.request.id,
        token_ids=tuple(state.tokens[start : start + tokens]),
        context_len=start,
        block_table=state.block_table,
        samples=start + tokens == len(state.tokens),
        output_index=state.num_output_tokens,
    )


def _known_request(state: _RequestState) -> Request:
    """The request with all tokens known now."""
    outputs = state.tokens[state.num_prompt_tokens :]
    if len(outputs) == len(state.request.output_token_ids):
        return state.request
    return replace(state.request, output_token_ids=tuple(outputs))


def _tokens_of(plan: StepPlan, result: StepResult) -> dict[RequestId, SampledToken]:
    """The result's tokens by request: one for every chunk that samples and has not failed."""
    tokens = {token.request_id: token for token in result.tokens}
    expected = {chunk.request_id: chunk.output_index for chunk in plan.chunks if chunk.samples}
    given: dict[RequestId, int | None] = {
        request_id: token.output_index for request_id, token in tokens.items()
    }
    given |= {request_id: expected.get(request_id) for request_id, _ in result.failed}
    if given != expected or len(result.tokens) + len(result.failed) != len(expected):
        raise AccountingError(
            f"step {plan.step} should sample {expected} (request: output index), got {given}"
        )
    return tokens
