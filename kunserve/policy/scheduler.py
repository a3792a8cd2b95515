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
that lack more (prefills), then waiting requests, each by arrival, to the budget of a step
(`kunserve.policy.drafting`). With `BatchOrder.PREFILL_FIRST` decodes come last. Computed counts
move only in `update`, so a cancelled step leaves nothing to undo in them. A request that needs a
block when none is available preempts the latest arrival, which computes again later (as vLLM).

When the group's layout changes (design sections 3 and 4), its requests go from one scheduler to
the next as values:

    old   freeze   every step in flight counts as cancelled, nothing is planned any more
          unfreeze, if the transition is aborted
    new   adopt    running requests go on with the blocks that they have. One whose pages are not
                   complete on all members is *stalled*: it neither runs nor is preempted until
                   `page_complete` has come for each of them, or `recompute`

Before a group is split it is compacted: every request gets a home, and its blocks move there by
`StepPlan.moves`, a few with each step. The table changes when the plan is issued; the source keeps
its reference until the plan is done, so that a cancelled one is undone by going back to it.
Meanwhile the request is in no other plan.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from kunserve.core.actions import CopyKv
from kunserve.core.errors import (
    AccountingError,
    ConfigError,
    InvalidRequestError,
    RequestTooLargeError,
)
from kunserve.core.ids import BlockId, Epoch, HostBlock, MigrationId, RequestId
from kunserve.core.memory import PageRun, pages_of, runs_of
from kunserve.core.policy import Batching, BatchOrder
from kunserve.core.request import FinishReason, Request, TokenOutput
from kunserve.core.step import BlockMove, Chunk, GroupLoad, SampledToken, StepPlan, StepResult
from kunserve.core.transition import AdoptedRequest, FrozenRequest, Home
from kunserve.policy.blocks import BlockPool
from kunserve.policy.cost_model import CostModel
from kunserve.policy.drafting import StepBudget
from kunserve.policy.homes import Compaction, CompactionRefusedError, assign_homes
from kunserve.policy.microbatch import Work, share_of_decodes
from kunserve.policy.prefix import block_hashes
from kunserve.policy.swap import SWAP_AHEAD_TOKENS, SwapSpace

MOST_STEPS_WITHOUT_DECODES = 16
"""With PREFILL_FIRST: after so many steps in a row that left a decode out, one goes decodes first.
Prefills also end by themselves when memory is full; requests of one token could go on for ever."""


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
    capacity_blocks: int = 0
    """Blocks that the group will have when a transition under way is over, for refusing what can
    never fit. 0: those of the pool."""
    max_moves_per_step: int = 64
    """Most blocks that a step copies while the group is compacted."""
    batching: Batching = Batching.TOKEN_COUNT
    """How steps are formed when requests queue and the group has several stages."""
    batch_order: BatchOrder = BatchOrder.DECODE_FIRST
    """Who gets a step's budget first."""
    chain_chunks: bool = True
    """In a pipeline, the chunks of a prompt go into consecutive microbatches, each before the one
    ahead of it is done. False: one at a time, so that a prompt keeps one stage at work only."""
    host_blocks: int = 0
    """Blocks of host memory that preempted requests are swapped to. 0: they are recomputed."""
    host_block_bytes: int = 0
    """Size of one of them, for counting."""

    def __post_init__(self) -> None:
        for name in (
            "block_size",
            "max_model_len",
            "max_num_seqs",
            "num_stages",
            "max_moves_per_step",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < 1:
            raise ConfigError(
                f"max_num_batched_tokens must be at least 1, got {self.max_num_batched_tokens}"
            )
        if self.host_blocks and self.num_stages > 1:
            raise ConfigError("a group of several stages does not swap; leave host_blocks at 0")
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
        "home",
        "host_blocks",
        "is_aborted",
        "is_moving",
        "is_new",
        "is_running",
        "is_swapping",
        "is_unannounced",
        "is_void",
        "limit_tokens",
        "num_outside",
        "num_prompt_tokens",
        "order",
        "pending_pages",
        "planned_tokens",
        "published_blocks",
        "request",
        "tokens",
    )

    def __init__(self, request: Request, position: int, max_model_len: int) -> None:
        self.request = request
        self.order = (request.arrival_ns, position)
        self.tokens = [*request.prompt_token_ids, *request.output_token_ids]
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.limit_tokens = min(max_model_len, self.num_prompt_tokens + request.params.max_tokens)
        self.computed_tokens = 0
        self.planned_tokens = 0  # in plans that are being executed
        self.block_table: tuple[BlockId, ...] = ()
        self.hashes: tuple[bytes, ...] = ()  # of the full blocks of the known tokens, so far
        self.published_blocks = 0  # the first blocks of the table whose names others may see
        self.is_running = False
        self.is_unannounced = True  # the executor has no sampling state of it
        self.is_aborted = False
        self.is_new = True  # never left the queue
        self.pending_pages: set[int] = set()  # of its table, not complete on all members
        self.home = 0
        self.num_outside = 0  # blocks of the table that do not lie in its home
        self.is_moving = False  # some of its blocks, by a plan that is being executed
        self.host_blocks: tuple[HostBlock, ...] = ()  # that hold its computed tokens, or will
        self.is_swapping = False  # a copy to or from host memory is under way
        self.is_void = False  # its plans in flight go on from a chunk that was cancelled

    @property
    def is_in_flight(self) -> bool:
        """A plan that is being executed computes or moves something of it."""
        return self.planned_tokens > 0 or self.is_moving

    @property
    def is_stalled(self) -> bool:
        """It waits for pages."""
        return bool(self.pending_pages)

    @property
    def is_idle(self) -> bool:
        """It may be planned, moved or preempted."""
        return not self.is_in_flight and not self.is_stalled and not self.is_swapping

    @property
    def missing_tokens(self) -> int:
        """Known tokens whose KV is not computed. 1: a decode."""
        return len(self.tokens) - self.computed_tokens

    @property
    def reached_tokens(self) -> int:
        """Known tokens whose KV is computed when the plans in flight are done."""
        return self.computed_tokens + self.planned_tokens

    @property
    def unplanned_tokens(self) -> int:
        """Known tokens that are neither computed nor in a plan."""
        return len(self.tokens) - self.reached_tokens

    @property
    def may_follow(self) -> bool:
        """Its next chunk may follow one in flight: stages compute plans in their order, so they
        have the KV of the first one when the second one comes."""
        is_going_on = self.planned_tokens > 0 and not self.is_void and not self.is_aborted
        return is_going_on and self.unplanned_tokens > 0 and not self.is_moving

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens


def _arrival(state: _RequestState) -> tuple[int, int]:
    return state.order


@dataclass(frozen=True)
class _Relocation:
    """Entry `index` of a table goes from `source` to `target`; both are held until the plan is
    over. Several requests may take one copy: the first of them has it made."""

    state: _RequestState
    index: int
    source: BlockId
    target: BlockId
    is_first: bool


@dataclass(frozen=True)
class _Flight:
    """A plan being executed, the request of each of its chunks, and the changes of tables that
    come with its moves."""

    plan: StepPlan
    states: tuple[_RequestState, ...]
    started: tuple[_RequestState, ...]
    relocations: tuple[_Relocation, ...]
    cost_ns: float

    @property
    def all_states(self) -> list[_RequestState]:
        """Requests that it computes or moves, each once."""
        moved = (relocation.state for relocation in self.relocations)
        return list(dict.fromkeys((*self.states, *moved)))


class _Draft:
    """A plan being formed: tokens per request, copies of blocks, and what is left of the budget."""

    def __init__(self, budget: StepBudget) -> None:
        self.budget = budget
        self.work: dict[_RequestState, int] = {}
        self.relocations: list[_Relocation] = []
        self.has_preempted = False

    @property
    def is_empty(self) -> bool:
        return not self.work and not self.relocations

    def add_decode(self, state: _RequestState) -> None:
        """Compute the one token that `state` lacks."""
        self.work[state] = 1
        self.budget.add_decode(state.computed_tokens)

    def add_prefill(self, state: _RequestState, tokens: int) -> None:
        """Compute the next `tokens` tokens of `state`, which the budget has granted."""
        self.work[state] = tokens
        samples = tokens == state.unplanned_tokens
        self.budget.add_prefill(state.reached_tokens, tokens, samples)


class Scheduler:
    """Continuous batching with chunked prefill, prefix cache and preemption by recompute, or with
    host memory by swapping (see `kunserve.policy.swap`).

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
        self._next_position = 0  # orders requests of the same arrival
        self._is_frozen = False
        self._pending: dict[int, list[_RequestState]] = {}  # incomplete pages, and who waits
        self._adopted_ns = 0
        self._stalled: list[tuple[RequestId, int]] = []
        self._compaction: Compaction | None = None
        self._swap = SwapSpace(config.host_blocks)
        self._offered: set[RequestId] = set()  # running, and has been since its first `offer`
        self._taken_out: dict[RequestId, _RequestState] = {}  # neither waiting nor running
        self._reserved: dict[MigrationId, tuple[BlockId, ...]] = {}
        self._to_release: dict[RequestId, None] = {}  # what the executor has not been told yet
        self._newly_started: list[RequestId] = []
        self._steps_without_decodes = 0  # in a row, that left one out for prefills
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
        """Most tokens, prompt and `max_tokens` together, that a request may ask for.

        Pages that are still on their way or closed for now count: nobody is refused for good
        because a transition is under way.
        """
        return min(self._config.max_model_len, self._capacity_tokens)

    @property
    def _capacity_tokens(self) -> int:
        pending = len(self._pending) * self._pool.blocks_per_page
        blocks = max(self._pool.backed_blocks + pending, self._config.capacity_blocks)
        return blocks * self._config.block_size

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
        self._enqueue(self._make_state(request))

    def _make_state(self, request: Request) -> _RequestState:
        self._next_position += 1
        state = _RequestState(request, self._next_position, self._config.max_model_len)
        self._requests[request.id] = state
        return state

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
                f"{self._capacity_tokens}); "
                f"shorten the prompt or lower max_tokens",
                "max_tokens",
            )
        if len(request.output_token_ids) >= max_tokens:
            raise AccountingError(f"request {request.id} has all its {max_tokens} tokens already")

    def abort(self, request_id: RequestId) -> None:
        """Forget a request in any state; an unknown id is one that has ended already.

        If a step is computing it, it keeps its blocks until that step is done, and its token is
        dropped then; likewise while it is copied to or from host memory.
        """
        state = self._requests.get(request_id)
        if state is None:
            return
        if state.is_in_flight or state.is_swapping:
            state.is_aborted = True
            return
        del self._requests[request_id]
        self._give_up_host_blocks(state)
        if state.is_running:
            self._leave(state)
        elif self._taken_out.pop(request_id, None) is not None:
            self._release(state.block_table)
        else:
            self._dequeue(state)

    def has_work(self) -> bool:
        """True while a request waits, runs or is on its way here, or a step is in flight."""
        return bool(self._requests or self._flights or self._reserved)

    def newly_started(self) -> tuple[RequestId, ...]:
        """Ids that left the queue for the first time under this lease, since the last call."""
        started = tuple(self._newly_started)
        self._newly_started.clear()
        return started

    def load(self) -> GroupLoad:
        """The group's load now. O(1).

        `prefix_queries` and `prefix_hits` count tokens, once per lease at its first start;
        `prompt_tokens` counts a prompt when its first output token is sampled, so that a request
        that moves is counted once in the cluster. Blocks are those of open pages: stalled requests
        may hold more, and so may those that compaction has not moved yet.
        """
        swap = self._swap.counts
        return GroupLoad(
            total_blocks=self._pool.open_blocks,
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
            swapped_out=swap.swapped_out,
            swapped_in=swap.swapped_in,
            swap_bytes=swap.copied_blocks * self._config.host_block_bytes,
            swap_refused=swap.refused,
            head_blocks=self._blocks_for(len(self._waiting[0].tokens)) if self._waiting else 0,
        )

    # ------------------------------------------------------------ schedule

    def schedule(self, now_ns: int) -> StepPlan | None:
        """Form the next step, or None: nothing can be computed, all stages are busy, or frozen.

        A plan has chunks, or during a compaction at least moves: ids to release wait for the next
        one, the executor only holds their small sampling state. With work left, None is only given
        while a plan is in flight, pages are pending or closed, KV is copied to or from host memory,
        the scheduler is frozen, or what a migration holds takes the room. `now_ns` is the seam for
        policies that look at deadlines; this one goes by arrival alone.
        """
        if self._is_frozen or len(self._flights) >= self._config.num_stages:
            return None
        draft = self._new_draft()
        self._swap_ahead(draft)
        if self._prefills_go_first():
            self._draft_prefills_first(draft)
        else:
            self._draft_decodes_first(draft)
        if draft.has_preempted and draft.is_empty and not self._flights:
            # Whoever needed room was preempted itself. No result will come and ask for a plan.
            draft = self._new_draft()
            self._admit(draft)
        self._count_waiting_decodes(draft)
        return None if draft.is_empty else self._issue(draft)

    def _new_draft(self) -> _Draft:
        config = self._config
        return _Draft(
            StepBudget(
                self._cost_model,
                config.step_time_target_ns,
                config.max_num_batched_tokens,
                config.block_size,
            )
        )

    def _draft_decodes_first(self, draft: _Draft) -> None:
        for state in self._decode_share():
            self._plan_decode(state, draft)
        self._look_ahead(draft)
        self._plan_prefills(draft)
        self._plan_moves(draft)
        if not draft.has_preempted:
            self._admit(draft)

    def _prefills_go_first(self) -> bool:
        is_due = self._steps_without_decodes >= MOST_STEPS_WITHOUT_DECODES
        return self._config.batch_order is BatchOrder.PREFILL_FIRST and not is_due

    def _draft_prefills_first(self, draft: _Draft) -> None:
        """Decodes get what prefills and admissions leave of the budget, the earliest first, and all
        of a step without prefills."""
        self._look_ahead(draft)
        self._plan_prefills(draft)
        if not draft.has_preempted:
            self._admit(draft)
        has_prefills = bool(draft.work)
        for state in self._decode_share():
            if has_prefills and not draft.budget.has_room_for_decode(state.computed_tokens):
                break
            self._plan_decode(state, draft)
        self._plan_moves(draft)

    def _count_waiting_decodes(self, draft: _Draft) -> None:
        is_left_out = any(
            state.missing_tokens == 1 and state.is_idle and state not in draft.work
            for state in self._running
        )
        self._steps_without_decodes = self._steps_without_decodes + 1 if is_left_out else 0

    def _decode_share(self) -> list[_RequestState]:
        """Decodes of one microbatch, by arrival, at most its share of all.

        Adopted requests may be more than the budget allows to be admitted: then as many as it has
        tokens.
        """
        decodes = [s for s in self._running if s.missing_tokens == 1 and not s.is_stalled]
        share = math.ceil(len(decodes) / self._config.num_stages)
        idle = [state for state in decodes if state.is_idle]
        if self._looks_ahead:
            share = share_of_decodes(
                [self._decode_ns(state) for state in idle],
                sum(map(self._decode_ns, decodes)),
                self._config.num_stages,
            )
        if self._config.max_num_batched_tokens is not None:
            share = min(share, self._config.max_num_batched_tokens)
        return idle[:share]

    def _decode_ns(self, state: _RequestState) -> float:
        context_tokens = len(state.tokens) - 1
        return self._cost_model.chunk_ns(context_tokens, 1, samples=True)

    @property
    def _looks_ahead(self) -> bool:
        return self._config.batching is Batching.LOOKAHEAD and self._config.num_stages > 1

    def _look_ahead(self, draft: _Draft) -> None:
        """With a queue, the microbatch gets an equal share of it."""
        works = self._queued_works() if self._looks_ahead else []
        if works:
            in_flight_ns = [flight.cost_ns for flight in self._flights.values()]
            draft.budget.look_ahead(works, self._config.num_stages, in_flight_ns)

    def _queued_works(self) -> list[Work]:
        """Prompt tokens that can be computed before any request ends, in the order in which they
        are planned."""
        prefills = self._plannable_prefills()
        works = [Work(state.reached_tokens, state.unplanned_tokens) for state in prefills]
        growth = sum(self._blocks_for(len(s.tokens)) - len(s.block_table) for s in prefills)
        return works + self._admissible_works(self._pool.available_blocks - growth)

    def _admissible_works(self, num_blocks: int) -> list[Work]:
        """Waiting requests that fit into so many blocks, the last one perhaps in part."""
        works = []
        for state in self._waiting[: max(0, self._most_running - len(self._running))]:
            tokens = min(len(state.tokens), num_blocks * self._config.block_size)
            if tokens <= 0:
                break
            works.append(Work(0, tokens))
            num_blocks -= self._blocks_for(tokens)
        return works

    def _plan_decode(self, state: _RequestState, draft: _Draft) -> None:
        """Its one token, unless it was preempted for an earlier one or must wait for a block."""
        if state.is_running and self._grow(state, 1, draft):
            draft.add_decode(state)

    def _plan_prefills(self, draft: _Draft) -> None:
        """What the budget allows to requests that lack more than a token, by arrival."""
        for state in self._plannable_prefills():
            if draft.budget.is_closed:
                return
            if not state.is_running:  # preempted for an earlier one
                continue
            granted = draft.budget.grant(state.reached_tokens, state.unplanned_tokens)
            tokens = self._grow(state, granted, draft)
            if tokens:
                draft.add_prefill(state, tokens)

    def _plannable_prefills(self) -> list[_RequestState]:
        """By arrival. In a pipeline the chunks of a prompt follow each other; while blocks move to
        their homes, each waits for the one before."""
        can_follow = self._config.chain_chunks and self._compaction is None
        return [
            state
            for state in self._running
            if state.missing_tokens > 1 and (state.is_idle or (can_follow and state.may_follow))
        ]

    def _grow(self, state: _RequestState, tokens: int, draft: _Draft) -> int:
        """Give `state` blocks for its next `tokens` tokens; how many of them have room then.

        A chunk is cut to the blocks that are available. Only when it has no room at all are others
        preempted for it, unless it gets on anyway; 0 when that hit `state` itself.
        """
        room = len(state.block_table) * self._config.block_size - state.reached_tokens
        if tokens <= room:
            return tokens
        if room == 0 and state.is_idle and not self._make_room(state, draft):
            return 0
        missing_blocks = self._blocks_for(tokens - room)
        self._extend(state, min(missing_blocks, self._pool.available_in(state.home)))
        return min(tokens, len(state.block_table) * self._config.block_size - state.reached_tokens)

    def _make_room(self, state: _RequestState, draft: _Draft) -> bool:
        """Preempt the latest arrivals of its home until a block is available there; False if
        `state` must wait."""
        while not self._pool.available_in(state.home):
            if self._swap.is_sending_out:  # blocks will be free in a moment
                return False
            victim = self._latest_idle(state.home)
            if victim is state and self._will_have_room(state):
                return False
            self._preempt(victim, draft)
            if victim is state:
                return False
        return True

    def _latest_idle(self, home: int) -> _RequestState:
        """There is one: whoever asks is idle itself."""
        return next(s for s in reversed(self._running) if s.home == home and s.is_idle)

    def _will_have_room(self, state: _RequestState) -> bool:
        """Is it worth to wait, although nobody else can be preempted now? Later arrivals may be in
        flight, pages still to come, and blocks on their way out of a home."""
        return any(
            other.is_stalled
            or other.num_outside
            or other.is_moving
            or (other.home == state.home and other.order > state.order)
            for other in self._running
            if other is not state
        )

    def _preempt(self, state: _RequestState, draft: _Draft) -> None:
        """Back to the queue, ahead of all later arrivals, to be computed again; or on its way to
        host memory."""
        draft.work.pop(state, None)
        draft.has_preempted = True
        self._preemptions += 1
        if self._swap_out(state):
            return
        self._leave(state)
        self._enqueue(state)

    def _admit(self, draft: _Draft) -> None:
        """Waiting requests by arrival, as long as limits, budget and memory allow the first.

        Decodes can never outgrow a budget of tokens. All others in the draft have theirs by then,
        so one is admitted only when there is a token more than there are decodes; where prefills go
        first, `_most_running` sees to it.
        """
        while self._waiting and len(self._running) < self._most_running:
            state = self._waiting[0]
            if self._swap.is_sending_out:  # room is being made for earlier arrivals
                return
            if state.host_blocks:
                if not self._swap_in(state):
                    return
                continue
            if draft.budget.is_closed:
                return
            home = self._roomiest_home()
            cached = self._cached_prefix(state, home)
            prefix_tokens = len(cached) * self._config.block_size
            tokens = draft.budget.grant(prefix_tokens, len(state.tokens) - prefix_tokens)
            if not tokens or not self._may_start(cached, prefix_tokens + tokens, home):
                return
            self._start(state, cached, home)
            self._extend(state, self._blocks_for(prefix_tokens + tokens) - len(cached))
            draft.add_prefill(state, tokens)

    @property
    def _most_running(self) -> int:
        config = self._config
        if config.batch_order is BatchOrder.DECODE_FIRST or config.max_num_batched_tokens is None:
            return config.max_num_seqs
        return min(config.max_num_seqs, config.max_num_batched_tokens * config.num_stages)

    def _cached_prefix(self, state: _RequestState, home: int) -> tuple[BlockId, ...]:
        """Blocks that need no computing. The last token always does: its row is sampled."""
        if not self._config.enable_prefix_caching:
            return ()
        state.hashes = block_hashes(state.tokens, self._config.block_size, state.hashes)
        usable = (len(state.tokens) - 1) // self._config.block_size
        return self._pool.lookup(state.hashes[:usable], home)

    def _may_start(self, cached: tuple[BlockId, ...], tokens: int, home: int) -> bool:
        """Are there blocks for the first chunk, and a reserve for the growth of the others?"""
        needed = self._blocks_for(tokens) - len(cached) + self._pool.count_unreferenced(cached)
        reserve = int(self._config.watermark_fraction * self._pool.open_blocks)
        if self._compaction is not None:
            residents = sum(state.home == home for state in self._running)
            reserve = max(residents, reserve // self._compaction.num_homes) if residents else 0
        elif not self._running:
            reserve = 0
        return self._room_in(home) >= needed + reserve

    def _roomiest_home(self) -> int:
        if self._compaction is None:
            return 0
        return max(range(self._compaction.num_homes), key=self._room_in)

    def _room_in(self, home: int) -> int:
        """Blocks that a new request could have there, less those that are still to move there.
        Negative when these do not fit yet."""
        if self._compaction is None:
            return self._pool.available_in(home)
        coming = sum(state.num_outside for state in self._running if state.home == home)
        return self._pool.available_in(home) - coming

    def _start(self, state: _RequestState, cached: tuple[BlockId, ...], home: int) -> None:
        self._dequeue(state)
        self._pool.share(cached)
        state.block_table = cached
        state.home = home
        state.published_blocks = len(cached)
        state.computed_tokens = len(cached) * self._config.block_size
        self._enter(state)
        if state.is_new:
            state.is_new = False
            self._newly_started.append(state.request.id)
            if self._config.enable_prefix_caching:
                self._prefix_queries += len(state.tokens)
                self._prefix_hits += state.computed_tokens

    def _enter(self, state: _RequestState) -> None:
        """Into the running set. The executor hears of it with its first chunk."""
        state.is_running = True
        state.is_unannounced = True
        insort(self._running, state, key=_arrival)

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
            moves=tuple(BlockMove(r.source, r.target) for r in draft.relocations if r.is_first),
        )
        for state, tokens in draft.work.items():
            state.planned_tokens += tokens
            state.is_unannounced = False
        for relocation in draft.relocations:
            relocation.state.is_moving = True
        self._to_release.clear()
        self._flights[plan.step] = _Flight(
            plan, states, started, tuple(draft.relocations), draft.budget.total_ns
        )
        self._next_step += 1
        return plan

    # ------------------------------------------------------------ host memory

    def _swap_ahead(self, draft: _Draft) -> None:
        """Preempt while blocks are left: see `kunserve.policy.swap`."""
        while self._swap.is_used:
            idle = [state for state in self._running if state.is_idle]
            lacking = sum(self._lacks_ahead(state) for state in idle)
            coming = self._pool.available_in(0) + self._swap.freed_blocks
            if lacking <= coming or len(idle) < 2 or not self._may_swap(idle[-1]):
                return
            self._preempt(idle[-1], draft)

    def _lacks_ahead(self, state: _RequestState) -> int:
        """Blocks that it needs beside those that it has for its next `SWAP_AHEAD_TOKENS`."""
        tokens = min(state.computed_tokens + SWAP_AHEAD_TOKENS, state.limit_tokens - 1)
        return max(0, self._blocks_for(tokens) - len(state.block_table))

    def _may_swap(self, state: _RequestState) -> bool:
        return 0 < self._blocks_for(state.computed_tokens) <= self._swap.free_blocks

    def _swap_out(self, state: _RequestState) -> bool:
        """Begin to copy a victim's computed tokens to host memory; False if they are to be computed
        again. It keeps the blocks until they are copied (`copied`)."""
        if not self._may_swap(state):
            if self._swap.is_used and state.computed_tokens:
                self._swap.refuse()
            return False
        covered = self._blocks_for(state.computed_tokens)
        self._release(state.block_table[covered:])
        state.block_table = state.block_table[:covered]
        freed = self._pool.count_exclusive(state.block_table)
        state.host_blocks = self._swap.send_out(state.request.id, state.block_table, freed)
        state.is_swapping = True
        return True

    def _swap_in(self, state: _RequestState) -> bool:
        """Begin to copy a request back, with a block for its next token; False if there is no room
        yet. Full blocks that the prefix cache has are shared, but for the last: a copy brings the
        request on its way."""
        computed = state.computed_tokens
        covered = self._blocks_for(computed)
        cached = self._cached_prefix(state, 0)[: covered - 1]
        needed = self._blocks_for(computed + 1) - len(cached)
        taken = needed + self._pool.count_unreferenced(cached)
        if self._pool.available_in(0) < taken + len(self._running):
            return False
        self._start(state, cached, 0)
        self._extend(state, needed)
        state.computed_tokens = computed
        state.is_swapping = True
        self._swap.bring_in(
            state.request.id,
            state.block_table[len(cached) : covered],
            state.host_blocks[len(cached) :],
        )
        return True

    @property
    def is_copying(self) -> bool:
        """True while KV is copied to or from host memory: no page may change its owner."""
        return self._swap.is_copying

    def take_copies(self) -> list[CopyKv]:
        """Copies that have to be made, in this order, beside the steps. Each is answered by
        `copied`, also when the scheduler is frozen."""
        return self._swap.take_orders()

    def copied(self, transfer: int) -> None:
        """A copy has ended: its request waits in the queue with its host blocks, or runs.

        Raises:
            AccountingError: no such copy is under way.
        """
        copy = self._swap.finish(transfer)
        state = self._requests[copy.request_id]
        state.is_swapping = False
        if state.is_aborted:
            del self._requests[copy.request_id]
            self._leave(state)
            self._give_up_host_blocks(state)
        elif copy.to_host:
            computed = state.computed_tokens
            self._leave(state)
            state.computed_tokens = computed
            self._enqueue(state)
        else:
            self._give_up_host_blocks(state)

    def _give_up_host_blocks(self, state: _RequestState) -> None:
        self._swap.release(state.host_blocks)
        state.host_blocks = ()

    # ------------------------------------------------------------ moves

    def _plan_moves(self, draft: _Draft) -> None:
        """Bring blocks to their homes, first those of requests that the step computes: they are in
        flight anyway.

        Two full homes that hold blocks of each other can get stuck. When nothing moves any more,
        the latest arrival of a home without room is preempted: at least one request less to move.
        """
        while self._compaction and any(state.num_outside for state in self._running):
            blocked = self._draft_moves(draft)
            is_moving = any(flight.relocations for flight in self._flights.values())
            if blocked is None or draft.relocations or is_moving:
                return
            self._preempt(self._latest_idle(blocked.home), draft)

    def _draft_moves(self, draft: _Draft) -> _RequestState | None:
        """Moves for the draft, up to the limit; the first request whose home has no room."""
        blocked: _RequestState | None = None
        copying = self._copies_under_way()
        copies: dict[tuple[int, BlockId], BlockId] = {}  # of this draft
        others: list[_RequestState] = []
        if len(self._flights) + 1 >= self._config.num_stages or not draft.work:
            # No other step is formed right after this one, in which they could be computed.
            others = [s for s in self._running if s.is_idle and s not in draft.work]
        for state in (*draft.work, *others):
            if state.num_outside and not self._relocate(state, draft, copies, copying):
                blocked = blocked or state
            if len(copies) >= self._config.max_moves_per_step:
                break
        return blocked

    def _copies_under_way(self) -> set[tuple[int, BlockId]]:
        return {
            (relocation.state.home, relocation.source)
            for flight in self._flights.values()
            for relocation in flight.relocations
        }

    def _relocate(
        self,
        state: _RequestState,
        draft: _Draft,
        copies: dict[tuple[int, BlockId], BlockId],
        copying: Collection[tuple[int, BlockId]],
    ) -> bool:
        """Move the blocks of an idle request to its home, as many as may be; False if its home has
        no room for one of them.

        A block that another one of the home has copied already, in a plan that is done or in this
        draft, is shared. While its copy is in flight (`copying`) it stays: that may be cancelled.
        """
        assert self._compaction is not None
        table = list(state.block_table)
        covered = self._blocks_for(state.computed_tokens)
        has_room = True
        for index, source in enumerate(table):
            key = (state.home, source)
            if self._pool.lies_in(source, state.home) or key in copying:
                continue
            done = self._compaction.copy_of(*key)
            target = done if done is not None else copies.get(key)
            if target is not None:
                self._pool.share((target,))
            elif not self._pool.available_in(state.home):
                has_room = False
                break
            elif len(copies) >= self._config.max_moves_per_step:
                break
            else:
                near = table[index - 1] if index else None
                (target,) = self._pool.allocate(1, near, state.home)
            table[index] = target
            if done is not None or index >= covered:  # nothing to copy
                self._release((source,))
            else:
                draft.relocations.append(
                    _Relocation(state, index, source, target, is_first=key not in copies)
                )
                copies[key] = target
        state.block_table = tuple(table)
        state.num_outside = self._count_outside(state)
        return has_room

    def _settle_moves(self, flight: _Flight, is_cancelled: bool) -> None:
        """The plan is over. Done: the sources are given up. Cancelled: some stages may have copied
        and some not, so the tables go back to the sources, which nobody has overwritten."""
        for relocation in flight.relocations:
            state = relocation.state
            state.is_moving = False
            if is_cancelled:
                table = list(state.block_table)
                table[relocation.index] = relocation.source
                state.block_table = tuple(table)
                self._release((relocation.target,))
            else:
                self._complete_move(relocation)
        for state in dict.fromkeys(relocation.state for relocation in flight.relocations):
            state.num_outside = self._count_outside(state)

    def _complete_move(self, relocation: _Relocation) -> None:
        source, target = relocation.source, relocation.target
        if relocation.is_first and not self._pool.is_open(source):
            self._pool.rename(source, target)
        self._release((source,))
        home = relocation.state.home
        if self._compaction is None or not relocation.is_first:
            return
        self._compaction.moved_blocks += 1
        if self._pool.is_referenced(source) and self._pool.lies_in(target, home):
            self._compaction.note_copy(home, source, target)

    def _count_outside(self, state: _RequestState) -> int:
        if self._compaction is None:
            return 0
        return sum(not self._pool.lies_in(block, state.home) for block in state.block_table)

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
        void = {state for state in flight.states if state.is_void}
        self._land(flight, result.cancelled, {request_id for request_id, _ in result.failed})
        outputs: list[TokenOutput] = []
        if not result.cancelled:
            for state, chunk in zip(flight.states, flight.plan.chunks, strict=True):
                if state.is_running and state not in void:
                    self._commit(state, len(chunk.token_ids))
                    if chunk.samples:
                        outputs.append(self._append(state, tokens[chunk.request_id]))
        return tuple(outputs)

    def _land(
        self, flight: _Flight, is_cancelled: bool, failed: Collection[RequestId] = ()
    ) -> None:
        """The plan is over. Requests that were aborted meanwhile or failed leave now."""
        del self._flights[flight.plan.step]
        for state, chunk in zip(flight.states, flight.plan.chunks, strict=True):
            state.planned_tokens -= len(chunk.token_ids)
            state.is_void = state.planned_tokens > 0 and (state.is_void or is_cancelled)
        self._settle_moves(flight, is_cancelled)
        for state in flight.all_states:
            if state.is_in_flight:
                continue
            if state.is_aborted or state.request.id in failed:
                del self._requests[state.request.id]
                self._leave(state)
        if is_cancelled:
            self._say_again(flight)

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
        self._publish(state)

    def _publish(self, state: _RequestState) -> None:
        """Name the full blocks that others may share."""
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
        """Out of the running set: finished, aborted or preempted. Its blocks are given up; full
        ones stay cached."""
        self._step_back(state)
        state.computed_tokens = 0
        state.pending_pages = set()
        state.num_outside = 0
        state.home = 0
        self._release(state.block_table)
        state.block_table = ()

    def _step_back(self, state: _RequestState) -> None:
        """Out of the running set, with all that it holds. The executor is told to forget it."""
        self._running.remove(state)
        state.is_running = False
        self._offered.discard(state.request.id)
        self._to_release[state.request.id] = None

    def _release(self, blocks: Sequence[BlockId]) -> None:
        self._pool.release(blocks)
        if self._compaction is not None:
            self._compaction.forget(b for b in blocks if not self._pool.is_referenced(b))

    def _extend(self, state: _RequestState, num_blocks: int) -> None:
        near = state.block_table[-1] if state.block_table else None
        state.block_table += self._pool.allocate(num_blocks, near, state.home)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._config.block_size)

    # ------------------------------------------------------------ transitions: the old scheduler

    def freeze(self) -> tuple[FrozenRequest, ...]:
        """Plan nothing any more, and say what there is, by arrival.

        Every plan in flight counts as cancelled; `update` must not be called for it. Blocks that
        hold no computed token are given up. Requests may still come and be aborted. Those in host
        memory, or on their way there or back, count as waiting ones with nothing computed: another
        scheduler has no use of host blocks.

        Raises:
            AccountingError: it is frozen already.
        """
        if self._is_frozen:
            raise AccountingError("a frozen scheduler cannot be frozen; unfreeze it first")
        self._is_frozen = True
        for flight in tuple(self._flights.values()):
            self._land(flight, is_cancelled=True)
        for state in self._running:
            covered = self._blocks_for(state.computed_tokens)
            self._release(state.block_table[covered:])
            state.block_table = state.block_table[:covered]
            state.num_outside = self._count_outside(state)
        return self._frozen_requests()

    def unfreeze(self) -> None:
        """Go on at the same epoch: the transition was aborted.

        Raises:
            AccountingError: it is not frozen.
        """
        if not self._is_frozen:
            raise AccountingError("a scheduler that is not frozen cannot be unfrozen")
        self._is_frozen = False

    def snapshot(self) -> tuple[FrozenRequest, ...]:
        """What `freeze` would say now, without stopping; `touched` counts from here."""
        self._pool.watch()
        return self._frozen_requests()

    def touched(self) -> tuple[BlockId, ...]:
        """Blocks that lost their last reference since `snapshot`, ascending: what was copied of
        them may be out of date. Other blocks that were full then still have their content."""
        return self._pool.touched()

    def turn_back(self) -> None:
        """A transition was aborted: no homes any more, and not frozen. Pages outside of the homes
        stay closed until `grow_or_reopen`."""
        if self._compaction is not None:
            self.end_compaction(())
        self._is_frozen = False

    @property
    def referenced_blocks(self) -> int:
        """Blocks in use, shared ones counted once."""
        return self._pool.referenced_blocks

    def _frozen_requests(self) -> tuple[FrozenRequest, ...]:
        """Tables are as if every plan in flight were cancelled."""
        sources: dict[_RequestState, dict[int, BlockId]] = {}
        for flight in self._flights.values():
            for relocation in flight.relocations:
                sources.setdefault(relocation.state, {})[relocation.index] = relocation.source
        frozen = []
        for state in sorted((*self._waiting, *self._running), key=_arrival):
            if state.is_aborted:
                continue
            moved = sources.get(state, {})
            computed_tokens = 0 if state.host_blocks else state.computed_tokens
            table = state.block_table[: self._blocks_for(computed_tokens)]
            has_home = self._compaction is not None and state.is_running
            frozen.append(
                FrozenRequest(
                    request_id=state.request.id,
                    computed_tokens=computed_tokens,
                    block_table=tuple(moved.get(i, block) for i, block in enumerate(table)),
                    home=state.home if has_home else None,
                )
            )
        return tuple(frozen)

    # ------------------------------------------------------------ transitions: the new scheduler

    def adopt(
        self,
        requests: Sequence[AdoptedRequest],
        pages: Iterable[PageRun],
        pending: Iterable[int] = (),
        now_ns: int = 0,
    ) -> None:
        """Take over the requests of the groups that this one is made of, once, before anything
        else. They do not count as leases seen.

        Those with computed tokens run, however many they are; the others wait. Requests of the
        same arrival keep their order, ahead of what comes later.

        Args:
            requests: in order of arrival.
            pages: range pages that are backed by all members, besides those of the pool.
            pending: pages that are not complete yet, among `pages` or not: see `page_complete`.
            now_ns: when the requests with blocks there begin to be stalled.

        Raises:
            AccountingError: the scheduler has had requests, an id comes twice, a block lies in none
                of the pages, or counts of tokens and blocks do not agree. Nothing has changed then.
        """
        pending_pages = set(pending)
        opened = runs_of(set(pages_of(pages)) - pending_pages)
        self._refuse_unadoptable(requests, pending_pages, set(pages_of(opened)))
        self._pool.adopt((self._adopted_table(r) for r in requests), opened)
        self._pending = {page: [] for page in pending_pages}
        self._adopted_ns = now_ns
        for adopted in requests:
            state = self._make_state(adopted.request)
            if not adopted.computed_tokens:
                self._enqueue(state)
                continue
            state.computed_tokens = adopted.computed_tokens
            state.block_table = self._adopted_table(adopted)
            state.is_new = False
            state.pending_pages = pending_pages & set(self._pages_of(state.block_table))
            for page in state.pending_pages:
                self._pending[page].append(state)
            self._enter(state)
            if not state.is_stalled:
                self._publish(state)

    def _refuse_unadoptable(
        self, requests: Sequence[AdoptedRequest], pending: set[int], opened: set[int]
    ) -> None:
        if self._next_position or self._next_step:
            raise AccountingError("only a new scheduler adopts requests")
        if len({adopted.request.id for adopted in requests}) != len(requests):
            raise AccountingError("a request is adopted twice")
        for adopted in requests:
            request, name = adopted.request, adopted.request.id
            known = len(request.prompt_token_ids) + len(request.output_token_ids)
            if not 0 <= adopted.computed_tokens < known:
                raise AccountingError(
                    f"request {name} is adopted with {adopted.computed_tokens} computed tokens, "
                    f"but {known} are known and the last one is never computed"
                )
            if len(request.output_token_ids) >= request.params.max_tokens:
                raise AccountingError(f"request {name} is adopted, but has all its tokens already")
            table = self._adopted_table(adopted)
            if len(table) < self._blocks_for(adopted.computed_tokens):
                raise AccountingError(f"request {name} is adopted with {len(table)} blocks")
            strangers = set(self._pages_of(table)) - pending - opened
            if any(not self._pool.is_open(self._first_block(page)) for page in strangers):
                raise AccountingError(f"request {name} is adopted with blocks that are nowhere")

    def _adopted_table(self, adopted: AdoptedRequest) -> tuple[BlockId, ...]:
        return adopted.block_table[: self._blocks_for(adopted.computed_tokens)]

    def _pages_of(self, blocks: Iterable[BlockId]) -> list[int]:
        return [block // self._pool.blocks_per_page for block in blocks]

    def _first_block(self, page: int) -> BlockId:
        return BlockId(page * self._pool.blocks_per_page)

    def page_complete(self, page: int, now_ns: int) -> None:
        """All members have all of a pending page: its other blocks are free, and requests for which
        it was the last one run.

        Raises:
            AccountingError: the page is not pending.
        """
        if page not in self._pending:
            raise AccountingError(f"page {page} is complete, but nobody waits for it")
        self._pool.add_pages((PageRun(page, 1),))
        for state in self._pending.pop(page):
            if page not in state.pending_pages:  # aborted or computed again
                continue
            state.pending_pages.remove(page)
            if not state.is_stalled:
                self._stalled.append((state.request.id, now_ns - self._adopted_ns))
                self._publish(state)

    def recompute(self, request_ids: Iterable[RequestId]) -> None:
        """Compute these requests again, from the queue: blocks of theirs will never be complete.
        Ids that do not run here are left alone.

        Raises:
            AccountingError: one of them is in flight.
        """
        running = [self._requests[r] for r in request_ids if r in self._requests]
        if any(state.is_in_flight or state.is_swapping for state in running):
            raise AccountingError("a request in flight cannot be computed again")
        for state in running:
            if state.is_running:
                self._leave(state)
                self._enqueue(state)

    def grow(self, runs: Iterable[PageRun]) -> None:
        """More pages are backed by all members. During a compaction they stay closed.

        Raises:
            AccountingError: a page is here already, or pending. Nothing has changed then.
        """
        pages = pages_of(runs)
        awaited = sorted(self._pending.keys() & set(pages))
        if awaited:
            raise AccountingError(f"pages {awaited[:8]} are added, but they are not complete")
        self._pool.add_pages(runs_of(pages))

    def grow_or_reopen(self, runs: Iterable[PageRun]) -> None:
        """Pages are backed by all members: those that an aborted split left closed are open again,
        others are new.

        Raises:
            AccountingError: a page is pending. Nothing has changed then.
        """
        pages = set(pages_of(runs))
        closed = pages & set(pages_of(self._pool.closed_pages()))
        known = {page for page in pages if self._pool.is_backed(page)}
        self.grow(runs_of(pages - known))
        if closed and self._compaction is None:
            self._pool.reopen_pages(runs_of(closed))

    @property
    def num_stalled(self) -> int:
        """Running requests that wait for pages."""
        return sum(state.is_stalled for state in self._running)

    @property
    def stalled(self) -> tuple[tuple[RequestId, int], ...]:
        """Who was stalled and now runs, and for how many ns, in the order in which they went on."""
        return tuple(self._stalled)

    # ------------------------------------------------------------ compaction

    def compact(self, homes: Sequence[Home]) -> None:
        """From now on every running request has a home, and its blocks move there with the plans.

        New requests get the home with most room, and find prefixes only there. A home without room
        preempts its own. Pages of a home that are not open do not count.

        Raises:
            CompactionRefusedError: the running requests do not fit, or pages are pending. Nothing
                has changed then.
            AccountingError: a compaction is under way, the scheduler is frozen or swaps, or homes
                have a page in common. Nothing has changed then.
        """
        if self._is_frozen or self._compaction is not None:
            raise AccountingError("a scheduler that is frozen or compacting cannot compact")
        if self._swap.is_used:
            raise AccountingError("a group that swaps has one stage, so it is never split")
        if self._pending:
            raise CompactionRefusedError(f"{len(self._pending)} pages are still on their way")
        home_of_page = {p: n for n, home in enumerate(homes) for p in pages_of(home.pages)}
        assigned = assign_homes(
            [state.block_table for state in self._running],
            [self._pool.capacity_of(home.pages) for home in homes],
            lambda block: home_of_page.get(block // self._pool.blocks_per_page),
        )
        self._pool.divide([home.pages for home in homes])
        self._compaction = Compaction(len(homes))
        for state, home_index in zip(self._running, assigned, strict=True):
            state.home = home_index
            state.num_outside = self._count_outside(state)

    def end_compaction(self, reopen: Iterable[PageRun]) -> None:
        """The split is aborted: homes are forgotten, closed pages `reopen` are open again. Others
        stay closed, see `closed_pages`. Moves in flight come to their end.

        Raises:
            AccountingError: no compaction is under way, or a page is not closed. Nothing has
                changed then.
        """
        if self._compaction is None:
            raise AccountingError("no compaction is under way")
        self._pool.reopen_pages(reopen)
        self._compaction = None
        for state in self._running:
            state.home = state.num_outside = 0

    @property
    def is_compacted(self) -> bool:
        """Every block in use lies in the home of whoever uses it, and will stay there. False when
        no compaction is under way."""
        return self._compaction is not None and not any(
            state.num_outside or state.is_moving for state in self._running
        )

    @property
    def moved_blocks(self) -> int:
        """Blocks that the compaction under way has moved; 0 without."""
        return self._compaction.moved_blocks if self._compaction is not None else 0

    def used_pages_per_home(self) -> tuple[int, ...]:
        """Pages of each home that are in use; one home if no compaction is under way. O(blocks in
        use)."""
        return self._pool.used_pages_per_home()

    def closed_pages(self) -> tuple[PageRun, ...]:
        """Pages outside of all homes: backed, but not used for new blocks."""
        return self._pool.closed_pages()

    # ------------------------------------------------------------ migrations: the source

    def offer(self, request_id: RequestId) -> FrozenRequest | None:
        """What a running request holds now; None if it does not run here. Its full blocks keep
        their content for as long as it `is_offered`."""
        state = self._requests.get(request_id)
        if state is None or not state.is_running or state.is_aborted or state.is_stalled:
            return None
        self._offered.add(request_id)
        return _holding(state)

    def is_offered(self, request_id: RequestId) -> bool:
        """True while it has not left the running set since its first `offer`."""
        return request_id in self._offered

    def end_offer(self, request_id: RequestId) -> None:
        """Nobody copies it any more."""
        self._offered.discard(request_id)

    def take_out(self, request_id: RequestId) -> FrozenRequest | None:
        """Take an offered request out of the running set; it keeps what it holds until `put_back`,
        `give_away` or `abort`. None while a step computes it.

        Raises:
            AccountingError: it is not offered.
        """
        if request_id not in self._offered:
            raise AccountingError(f"request {request_id} is taken out, but it is not offered")
        state = self._requests[request_id]
        if state.is_in_flight:
            return None
        self._step_back(state)
        covered = self._blocks_for(state.computed_tokens)
        self._release(state.block_table[covered:])
        state.block_table = state.block_table[:covered]
        self._taken_out[request_id] = state
        return _holding(state)

    def put_back(self, request_id: RequestId) -> None:
        """A request that was taken out runs on; one that has been aborted does not."""
        state = self._taken_out.pop(request_id, None)
        if state is not None:
            self._enter(state)

    def give_away(self, request_id: RequestId) -> None:
        """A request that was taken out runs elsewhere: forget it. Its full blocks stay cached."""
        state = self._taken_out.pop(request_id, None)
        if state is not None:
            del self._requests[request_id]
            self._release(state.block_table)

    def withdraw(self, room_blocks: int, keep: Collection[RequestId]) -> tuple[RequestId, ...]:
        """If the queue finds no room here, forget waiting requests, by arrival, which need at most
        `room_blocks` in all; none of `keep`."""
        if not self._waiting or self.load().head_blocks <= self._pool.available_blocks:
            return ()
        given: list[RequestId] = []
        for state in tuple(self._waiting):
            blocks = self._blocks_for(len(state.tokens))
            if blocks <= room_blocks and state.request.id not in keep:
                room_blocks -= blocks
                given.append(state.request.id)
                self.abort(state.request.id)
        return tuple(given)

    # ------------------------------------------------------------ migrations: the target

    def reserve(self, migration: MigrationId, num_blocks: int) -> tuple[BlockId, ...] | None:
        """Set blocks aside until there are `num_blocks` for a request that is on its way here. None
        if there is no room for it: as at admission, besides what the head of the queue needs. The
        first call counts as a lease seen."""
        held = self._reserved.get(migration)
        self._leases_seen += held is None
        missing = num_blocks - len(held or ())
        left = self._pool.available_blocks - missing
        if held is None:
            coming = len(self._running) + len(self._reserved)
            watermark = int(self._config.watermark_fraction * self._pool.open_blocks)
            if coming >= self._config.max_num_seqs or left < watermark + self.load().head_blocks:
                return None
        if left < 0:
            return None
        near = held[-1] if held else None
        self._reserved[migration] = (held or ()) + self._pool.allocate(max(0, missing), near)
        return self._reserved[migration]

    def release_reserved(self, migration: MigrationId) -> None:
        """What was set aside is not needed, and nobody writes it any more."""
        self._release(self._reserved.pop(migration, ()))

    def take_in(self, migration: MigrationId, request: Request, computed_tokens: int) -> None:
        """A request has come, and the KV of its first `computed_tokens` tokens is in the blocks set
        aside for it: it runs, as if it had been adopted.

        Raises:
            AccountingError: the id is leased already, all its tokens are computed, or too few
                blocks were set aside. Nothing has changed then.
        """
        known = len(request.prompt_token_ids) + len(request.output_token_ids)
        blocks, covered = self._reserved.get(migration, ()), self._blocks_for(computed_tokens)
        if request.id in self._requests or computed_tokens >= known or len(blocks) < covered:
            raise AccountingError(
                f"request {request.id} with {computed_tokens} of {known} tokens computed, in "
                f"{len(blocks)} blocks, cannot be taken in"
            )
        del self._reserved[migration]
        self._release(blocks[covered:])
        state = self._make_state(request)
        state.computed_tokens, state.block_table = computed_tokens, blocks[:covered]
        state.is_new = False
        self._enter(state)
        self._publish(state)

    # ------------------------------------------------------------ laws

    def check(self) -> None:
        """Check blocks, queues and counters. For tests and idle moments: O(total blocks).

        Raises:
            AccountingError: a law is broken.
        """
        moving = [r for flight in self._flights.values() for r in flight.relocations]
        sources = [(relocation.source,) for relocation in moving]
        holders = (*self._running, *self._taken_out.values())
        reserved = self._reserved.values()
        self._pool.check([*sources, *reserved, *(state.block_table for state in holders)])
        for state in holders:
            self._check_table(state)
            self._check_place(state)
        if {r.state for r in moving} != {state for state in self._running if state.is_moving}:
            raise AccountingError("a request is said to move, but does not, or the other way round")
        for queue in (self._waiting, self._running):
            if any(a.order >= b.order for a, b in pairwise(queue)):
                raise AccountingError("a queue is not in arrival order")
        listed = {state.request.id: state for state in (*self._waiting, *holders)}
        if listed != self._requests or len(self._waiting) + len(holders) != len(listed):
            raise AccountingError("a request is in two queues, or in none")
        if not self._offered <= {state.request.id for state in self._running}:
            raise AccountingError("a request is offered that does not run")
        if any(state.is_running or state.block_table for state in self._waiting):
            raise AccountingError("a waiting request holds blocks")
        self._check_host_blocks()
        if self._queued_blocks != sum(self._blocks_for(len(s.tokens)) for s in self._waiting):
            raise AccountingError(f"queued_blocks is wrong: {self._queued_blocks}")

    def _check_host_blocks(self) -> None:
        states = self._requests.values()
        swapping = [state.request.id for state in states if state.is_swapping]
        self._swap.check((state.host_blocks for state in states), swapping)
        for state in states:
            name, is_held = state.request.id, bool(state.host_blocks)
            is_here = state.is_running or name in self._taken_out
            if is_held != (state.is_swapping if is_here else state.computed_tokens > 0):
                raise AccountingError(f"request {name} has host blocks without need, or lacks them")
            if is_held and len(state.host_blocks) != self._blocks_for(state.computed_tokens):
                raise AccountingError(f"request {name} has {len(state.host_blocks)} host blocks")
            if state.is_swapping and state.is_in_flight:
                raise AccountingError(f"request {name} is in flight while it is copied")

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

    def _check_place(self, state: _RequestState) -> None:
        name, pages = state.request.id, set(self._pages_of(state.block_table))
        if state.pending_pages != pages & self._pending.keys():
            raise AccountingError(f"request {name} does not wait for its own pending pages")
        if any(state not in self._pending[page] for page in state.pending_pages):
            raise AccountingError(f"request {name} would not hear of a complete page")
        if state.is_stalled and state.is_in_flight:
            raise AccountingError(f"request {name} is in flight, but its pages are not complete")
        if state.num_outside != self._count_outside(state):
            raise AccountingError(f"request {name} has another number of blocks to move")


def _chunk(state: _RequestState, tokens: int) -> Chunk:
    start = state.reached_tokens
    return Chunk(
        request_id=state.request.id,
        token_ids=tuple(state.tokens[start : start + tokens]),
        context_len=start,
        block_table=state.block_table,
        samples=start + tokens == len(state.tokens),
        output_index=state.num_output_tokens,
    )


def _holding(state: _RequestState) -> FrozenRequest:
    return FrozenRequest(state.request.id, state.computed_tokens, state.block_table)


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
