"""The scheduler: rules by example, and random histories against a simulated executor.

The executor below keeps a KV memory of (block, offset) and samples only from what it reads there,
so a wrong block table, a shared block that was overwritten, or KV that was never computed changes
its tokens. The expected tokens come from a loop without scheduler, blocks or batches.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kunserve.core.errors import (
    AccountingError,
    ConfigError,
    InvalidRequestError,
    RequestTooLargeError,
)
from kunserve.core.ids import BlockId, Epoch, RequestId, SlotId
from kunserve.core.policy import Batching, BatchOrder
from kunserve.core.request import FinishReason, Request, SamplingParams, TokenOutput
from kunserve.core.step import BlockMove, Chunk, SampledToken, StepPlan, StepResult
from kunserve.policy.blocks import BlockPool
from kunserve.policy.cost_model import CostModel
from kunserve.policy.scheduler import MOST_STEPS_WITHOUT_DECODES, Scheduler, SchedulerConfig

EPOCH = Epoch(3)
EOS, STOP, VOCAB_SIZE = 0, 1, 13
# A token costs 1 ms, a decode with its row 2 ms, a step 4 ms.
COST_MODEL = CostModel(alpha_ns=0.0, delta_ns=0.0, beta_ns=1e6, gamma_ns=4e6, head_ns=1e6)

NEVER_WRITTEN = 0xDEAD
"""What KV reads as that no step has computed: it changes the tokens."""

# ---------------------------------------------------------------- a model of numbers


def digest_of(tokens_kv: Sequence[int]) -> int:
    """What attention would see: depends on every position, in order."""
    return zlib.crc32(b"".join(value.to_bytes(4, "little") for value in tokens_kv))


def kv_of(token_id: int, before: Sequence[int]) -> int:
    return zlib.crc32(token_id.to_bytes(4, "little"), digest_of(before))


def sample(kv: Sequence[int], index: int) -> int:
    return zlib.crc32(index.to_bytes(4, "little"), digest_of(kv)) % VOCAB_SIZE


def reference_outputs(request: Request, max_model_len: int) -> list[TokenOutput]:
    """Every token of `request` from its first, one forward pass after another."""
    params = request.params
    outputs: list[TokenOutput] = []
    kv: list[int] = []
    for token_id in request.prompt_token_ids:
        kv.append(kv_of(token_id, kv))
    while True:
        index = len(outputs)
        token_id = sample(kv, index)
        kv.append(kv_of(token_id, kv))
        may_stop = index >= params.min_tokens
        is_eos = may_stop and token_id == EOS and not params.ignore_eos
        is_stop = may_stop and token_id in params.stop_token_ids and not is_eos
        finish = None
        if is_eos or is_stop:
            finish = FinishReason.STOP
        elif index + 1 == params.max_tokens or len(kv) == max_model_len:
            finish = FinishReason.LENGTH
        outputs.append(TokenOutput(request.id, index, token_id, None, finish, is_stop))
        if finish is not None:
            return outputs


@dataclass
class Executor:
    """Computes plans, and checks the contract of a plan while it does."""

    block_size: int
    memory: dict[tuple[BlockId, int], int] = field(default_factory=dict)
    outputs: dict[RequestId, int] = field(default_factory=dict)
    """Sampling state: per started request, how many tokens it has sampled."""

    def execute(
        self, plan: StepPlan, cancel_after: int | None = None, moves_made: int | None = None
    ) -> StepResult:
        """`cancel_after` chunks the step is cancelled: their KV is written, nothing is sampled.
        With `moves_made`, it was cancelled before that, after so many moves."""
        for request_id in plan.released:
            self.outputs.pop(request_id, None)
        for request in plan.started:
            self.outputs[request.id] = len(request.output_token_ids)
        check_plan(plan, self.block_size)
        for move in plan.moves[:moves_made]:
            self.copy(move)
        if moves_made is not None:
            cancel_after = 0
        tokens = []
        for chunk in plan.chunks[:cancel_after]:
            kv = self.compute(chunk)
            if chunk.samples and cancel_after is None:
                # More than that: a row that counted for nothing was sampled before.
                assert self.outputs[chunk.request_id] >= chunk.output_index
                self.outputs[chunk.request_id] = chunk.output_index + 1
                token_id = sample(kv, chunk.output_index)
                tokens.append(SampledToken(chunk.request_id, chunk.output_index, token_id))
        cancelled = cancel_after is not None
        return StepResult(plan.epoch, plan.step, () if cancelled else tuple(tokens), cancelled)

    def copy(self, move: BlockMove) -> None:
        for offset in range(self.block_size):
            self.memory.pop((move.target, offset), None)
            if (move.source, offset) in self.memory:
                self.memory[move.target, offset] = self.memory[move.source, offset]

    def compute(self, chunk: Chunk) -> list[int]:
        """Read the KV before the chunk, write that of the chunk."""
        assert chunk.request_id in self.outputs, "computed before it was started"
        places = [
            (chunk.block_table[position // self.block_size], position % self.block_size)
            for position in range(chunk.context_len + len(chunk.token_ids))
        ]
        kv = [self.memory.get(place, NEVER_WRITTEN) for place in places[: chunk.context_len]]
        for token_id, place in zip(chunk.token_ids, places[chunk.context_len :], strict=True):
            self.memory[place] = kv_of(token_id, kv)
            kv.append(self.memory[place])
        return kv


def check_plan(plan: StepPlan, block_size: int) -> None:
    """No two chunks of one request; no block that is written is in another table."""
    assert plan.chunks or plan.moves
    targets = [move.target for move in plan.moves]
    assert len(set(targets)) == len(targets)
    assert not set(targets) & {move.source for move in plan.moves}
    assert {request.id for request in plan.started} <= {chunk.request_id for chunk in plan.chunks}
    assert len({chunk.request_id for chunk in plan.chunks}) == len(plan.chunks)
    for chunk in plan.chunks:
        assert chunk.token_ids
        first = chunk.context_len // block_size
        last = (chunk.context_len + len(chunk.token_ids) - 1) // block_size
        written = set(chunk.block_table[first : last + 1])
        assert len(written) == last + 1 - first
        for other in plan.chunks:
            assert other is chunk or not written & set(other.block_table)


# ---------------------------------------------------------------- helpers


def make_config(**changes: object) -> SchedulerConfig:
    config = SchedulerConfig(
        block_size=4, max_model_len=100, eos_token_ids=(EOS,), watermark_fraction=0.0
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def make_scheduler(num_blocks: int = 64, **changes: object) -> Scheduler:
    pool = BlockPool(1024, 4, {SlotId(0): num_blocks})
    return Scheduler(make_config(**changes), pool, COST_MODEL, EPOCH)


def make_request(
    name: str,
    prompt: int | Sequence[int],
    max_tokens: int = 8,
    arrival_ns: int = 0,
    outputs: Sequence[int] = (),
    **params: object,
) -> Request:
    """Prompts given by length differ from their first token on."""
    if isinstance(prompt, int):
        prompt = [zlib.crc32(name.encode()) % 1000 + 2, *range(2, prompt + 1)]
    params = {"ignore_eos": True, "max_tokens": max_tokens, "seed": 0, **params}
    sampling = SamplingParams(**params)  # type: ignore[arg-type]
    return Request(RequestId(name), tuple(prompt), sampling, arrival_ns, tuple(outputs))


def result_of(plan: StepPlan, token_id: int = 7) -> StepResult:
    tokens = tuple(
        SampledToken(chunk.request_id, chunk.output_index, token_id)
        for chunk in plan.chunks
        if chunk.samples
    )
    return StepResult(plan.epoch, plan.step, tokens)


def cancelled(plan: StepPlan) -> StepResult:
    return StepResult(plan.epoch, plan.step, (), cancelled=True)


def next_plan(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule(0)
    assert plan is not None
    return plan


def step(scheduler: Scheduler, token_id: int = 7) -> tuple[StepPlan, tuple[TokenOutput, ...]]:
    """One step in which every row samples `token_id`."""
    plan = next_plan(scheduler)
    outputs = scheduler.update(plan, result_of(plan, token_id), 0)
    scheduler.check()
    return plan, outputs


def sizes(plan: StepPlan) -> dict[str, int]:
    return {chunk.request_id: len(chunk.token_ids) for chunk in plan.chunks}


# ---------------------------------------------------------------- batching


def test_a_request_from_prompt_to_end() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 6, max_tokens=3)
    scheduler.add(request)
    table = (BlockId(0), BlockId(1))
    plan, outputs = step(scheduler)
    (chunk,) = plan.chunks
    assert plan.started == (request,)
    assert (plan.epoch, plan.step, plan.released) == (EPOCH, 0, ())
    assert chunk == Chunk(request.id, request.prompt_token_ids, 0, table, True, 0)
    assert outputs == (TokenOutput(request.id, 0, 7),)
    plan, outputs = step(scheduler)
    assert plan.chunks == (Chunk(request.id, (7,), 6, table, True, 1),)
    assert plan.started == ()
    _, outputs = step(scheduler)
    assert outputs == (TokenOutput(request.id, 2, 7, None, FinishReason.LENGTH),)
    assert not scheduler.has_work()
    assert scheduler.schedule(0) is None
    load = scheduler.load()
    assert (load.prompt_tokens, load.generated_tokens, load.num_running) == (6, 3, 0)
    assert load.free_blocks + load.cached_blocks == load.total_blocks


def test_released_ids_wait_for_the_next_plan() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 5, max_tokens=1))
    step(scheduler)
    assert scheduler.schedule(0) is None
    scheduler.add(make_request("b", 5, max_tokens=1))
    plan, _ = step(scheduler)
    assert plan.released == (RequestId("a"),)


def test_a_token_budget_cuts_prompts_after_the_decodes() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=6)
    scheduler.add(make_request("a", 3))
    scheduler.add(make_request("b", 10))
    scheduler.add(make_request("c", 2))
    assert sizes(step(scheduler)[0]) == {"a": 3, "b": 3}
    plan, outputs = step(scheduler)
    assert sizes(plan) == {"a": 1, "b": 5}  # c is not let past b
    assert [output.request_id for output in outputs] == ["a"]
    assert sizes(step(scheduler)[0]) == {"a": 1, "b": 2, "c": 2}
    assert sizes(step(scheduler)[0]) == {"a": 1, "b": 1, "c": 1}


def test_a_time_target_sets_the_chunk() -> None:
    # 20 ms less 4 ms for the step: 16 tokens of 1 ms
    scheduler = make_scheduler(step_time_target_ns=20_000_000)
    scheduler.add(make_request("a", 30, max_tokens=30))
    scheduler.add(make_request("b", 40))
    assert sizes(step(scheduler)[0]) == {"a": 16}
    # the rest of a (14 ms) and its row (1 ms) leave 1 ms
    assert sizes(step(scheduler)[0]) == {"a": 14, "b": 1}
    assert sizes(step(scheduler)[0]) == {"a": 1, "b": 14}


def test_prefill_may_take_as_long_as_the_rest_of_the_step() -> None:
    scheduler = make_scheduler(step_time_target_ns=8_000_000)
    for name in "abcd":
        scheduler.add(make_request(name, 1, max_tokens=40))
    while scheduler.load().num_waiting:
        step(scheduler)
    scheduler.add(make_request("e", 19))
    decodes = dict.fromkeys("abcd", 1)  # 4 ms for the step and 2 ms for each: above the target
    assert sizes(step(scheduler)[0]) == decodes | {"e": 12}
    assert sizes(step(scheduler)[0]) == decodes | {"e": 7}


def test_a_token_budget_always_has_room_for_all_decodes_and_one_prefill_token() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=3)
    for name in "abc":
        scheduler.add(make_request(name, 1, max_tokens=20))
    scheduler.add(make_request("d", 5, max_tokens=20))
    assert sizes(step(scheduler)[0]) == {"a": 1, "b": 1, "c": 1}
    assert sizes(step(scheduler)[0]) == {"a": 1, "b": 1, "c": 1}
    scheduler.abort(RequestId("a"))
    assert sizes(step(scheduler)[0]) == {"b": 1, "c": 1, "d": 1}


def test_max_num_seqs_bounds_the_running() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for name in "abc":
        scheduler.add(make_request(name, 4, max_tokens=2))
    assert sizes(step(scheduler)[0]) == {"a": 4, "b": 4}
    assert scheduler.load().num_waiting == 1
    step(scheduler)
    assert sizes(step(scheduler)[0]) == {"c": 4}


def test_queue_order_is_arrival_then_lease() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for name, arrival_ns in (("late", 5), ("early", 1), ("late too", 5), ("middle", 3)):
        scheduler.add(make_request(name, 2, max_tokens=1, arrival_ns=arrival_ns))
    order = [next(iter(sizes(step(scheduler)[0]))) for _ in range(4)]
    assert order == ["early", "middle", "late", "late too"]


def test_newly_started_is_drained_and_names_a_request_once() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make_request("a", 7, max_tokens=9))
    scheduler.add(make_request("b", 7, max_tokens=9))
    started: list[RequestId] = []
    while scheduler.has_work():
        step(scheduler)
        started += scheduler.newly_started()
    assert scheduler.load().preemptions > 0
    assert started == ["a", "b"]
    assert scheduler.newly_started() == ()


def test_a_microbatch_takes_its_share_of_the_decodes() -> None:
    scheduler = make_scheduler(num_stages=2)
    for name in "abcde":
        scheduler.add(make_request(name, 2))
    first = next_plan(scheduler)
    assert scheduler.schedule(0) is None  # all are in flight
    scheduler.update(first, result_of(first), 0)
    plans = [next_plan(scheduler), next_plan(scheduler)]
    assert [sizes(plan) for plan in plans] == [dict.fromkeys("abc", 1), dict.fromkeys("de", 1)]
    assert scheduler.schedule(0) is None  # as many steps as stages
    scheduler.update(plans[0], result_of(plans[0]), 0)
    assert sizes(next_plan(scheduler)) == dict.fromkeys("abc", 1)
    scheduler.check()


def test_the_microbatches_of_steady_decodes_settle_at_equal_sizes() -> None:
    """Whatever the sizes were before, and however requests come and go."""
    scheduler = make_scheduler(400, num_stages=2, max_num_batched_tokens=64)
    flights: list[StepPlan] = []

    def turn() -> int:
        """The oldest step lands, and all stages are filled; how many rows the last plan has."""
        if flights:
            plan = flights.pop(0)
            scheduler.update(plan, result_of(plan), 0)
        while (plan_now := scheduler.schedule(0)) is not None:
            flights.append(plan_now)
        scheduler.check()
        return flights[-1].num_tokens

    for number in range(16):
        scheduler.add(make_request(f"r{number}", 2, max_tokens=90))
    for _ in range(3):
        turn()
    assert [turn() for _ in range(6)] == [8] * 6
    for number in range(6):  # all of one microbatch, as it happens
        scheduler.abort(flights[0].chunks[number].request_id)
    for _ in range(4):
        turn()
    assert [turn() for _ in range(6)] == [5] * 6
    for number in range(16, 29):  # one at a time
        scheduler.add(make_request(f"r{number}", 2, max_tokens=90))
        turn()
    for _ in range(3):
        turn()
    assert sorted(turn() for _ in range(6)) == [11, 11, 11, 12, 12, 12]


# ---------------------------------------------------------------- prefill first


def test_prefills_first_take_the_budget_and_decodes_what_is_left() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8, batch_order=BatchOrder.PREFILL_FIRST)
    for name in "ab":
        scheduler.add(make_request(name, 4))
    assert sizes(step(scheduler)[0]) == {"a": 4, "b": 4}
    scheduler.add(make_request("c", 8))
    scheduler.add(make_request("d", 7))
    assert sizes(step(scheduler)[0]) == {"c": 8}
    assert sizes(step(scheduler)[0]) == {"d": 7, "a": 1}
    assert sizes(step(scheduler)[0]) == dict.fromkeys("abcd", 1)


def test_prefills_first_leave_decodes_the_rest_of_a_time_budget() -> None:
    # 20 ms less 4 ms for the step: prompts of 13 tokens and a row (14 ms) leave one decode (2 ms)
    scheduler = make_scheduler(step_time_target_ns=20_000_000, batch_order=BatchOrder.PREFILL_FIRST)
    for name in "ab":
        scheduler.add(make_request(name, 2))
    step(scheduler)
    scheduler.add(make_request("c", 13))
    assert sizes(step(scheduler)[0]) == {"c": 13, "a": 1}


def test_decodes_alone_are_not_cut_by_the_time_target() -> None:
    scheduler = make_scheduler(step_time_target_ns=1, batch_order=BatchOrder.PREFILL_FIRST)
    for name in "abc":
        scheduler.add(make_request(name, 1))
    while scheduler.load().num_waiting:
        step(scheduler)
    assert sizes(step(scheduler)[0]) == dict.fromkeys("abc", 1)


@pytest.mark.parametrize("stages", [1, 2])
def test_decodes_wait_for_prefills_a_bounded_number_of_steps(stages: int) -> None:
    """Prompts of one output token never fill the memory, so they never end by themselves."""
    scheduler = make_scheduler(
        max_num_batched_tokens=4, batch_order=BatchOrder.PREFILL_FIRST, num_stages=stages
    )
    for name in "abc":
        scheduler.add(make_request(name, 1, max_tokens=90))
    step(scheduler)
    flights: list[StepPlan] = []
    last_step = dict.fromkeys("abc", 0)
    for number in range(120):
        for copy in range(2):
            scheduler.add(make_request(f"p{number}.{copy}", 4, max_tokens=1, arrival_ns=number))
        flights.append(next_plan(scheduler))
        last_step |= {name: number for name in sizes(flights[-1]) if name in last_step}
        assert number - min(last_step.values()) <= MOST_STEPS_WITHOUT_DECODES + stages
        if len(flights) == stages:
            plan = flights.pop(0)
            scheduler.update(plan, result_of(plan), 0)
    assert min(last_step.values()) > 90


# ---------------------------------------------------------------- memory


def test_admission_leaves_the_watermark_but_never_blocks_a_lone_request() -> None:
    scheduler = make_scheduler(num_blocks=8, watermark_fraction=0.25)
    scheduler.add(make_request("a", 20, max_tokens=12))
    scheduler.add(make_request("b", 8))
    assert sizes(step(scheduler)[0]) == {"a": 20}  # b: 2 needed, 3 free, 2 in reserve
    load = scheduler.load()
    assert (load.num_waiting, load.queued_blocks, load.free_blocks) == (1, 2, 3)
    scheduler.abort(RequestId("a"))
    scheduler.abort(RequestId("b"))
    scheduler.add(make_request("c", 31, max_tokens=1))  # all blocks, reserve included
    assert sizes(step(scheduler)[0]) == {"c": 31}


def test_the_head_of_the_queue_is_not_overtaken_by_a_smaller_request() -> None:
    scheduler = make_scheduler(num_blocks=8)
    scheduler.add(make_request("a", 20, max_tokens=4))
    scheduler.add(make_request("large", 20))
    scheduler.add(make_request("small", 2))
    assert sizes(step(scheduler)[0]) == {"a": 20}
    assert sizes(step(scheduler)[0]) == {"a": 1}


def test_the_latest_arrival_is_preempted_and_computes_again() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make_request("a", 7, max_tokens=9))
    scheduler.add(make_request("b", 7, max_tokens=9))
    step(scheduler)
    step(scheduler)  # both tables are full at 8 tokens
    plan, _ = step(scheduler)
    assert sizes(plan) == {"a": 1}
    assert plan.released == ("b",)
    load = scheduler.load()
    assert (load.num_running, load.num_waiting, load.preemptions) == (1, 1, 1)
    assert load.queued_blocks == 3  # 9 known tokens
    while "b" not in sizes(plan):
        plan, _ = step(scheduler)
    (chunk,) = plan.chunks
    assert (chunk.output_index, chunk.samples) == (2, True)
    assert plan.started[0].output_token_ids == (7, 7)
    assert chunk.context_len + len(chunk.token_ids) == 9


def test_a_preempted_request_goes_ahead_of_later_arrivals() -> None:
    scheduler = make_scheduler(num_blocks=4)
    for arrival_ns, name in enumerate("abc"):
        scheduler.add(make_request(name, 7, max_tokens=6, arrival_ns=arrival_ns))
    order: list[str] = []
    while scheduler.has_work():
        order += [request.id for request in step(scheduler)[0].started]
    assert order == ["a", "b", "b", "c"]


def test_a_prefill_is_cut_to_the_blocks_there_are() -> None:
    scheduler = make_scheduler(num_blocks=6, max_num_batched_tokens=12)
    scheduler.add(make_request("a", 6, max_tokens=10))
    scheduler.add(make_request("b", 20, max_tokens=4))
    assert sizes(step(scheduler)[0]) == {"a": 6, "b": 6}
    # a: 7 tokens in 2 blocks; b: 16 of its 17 fit the other 4
    assert sizes(step(scheduler)[0]) == {"a": 1, "b": 10}
    plan, _ = step(scheduler)  # no block at all is left for b, the latest
    assert (sizes(plan), plan.released) == ({"a": 1}, ("b",))


def test_a_prefill_uses_its_own_last_block_before_it_preempts() -> None:
    scheduler = make_scheduler(num_blocks=4, max_num_batched_tokens=12)
    scheduler.add(make_request("a", 6, max_tokens=10))
    scheduler.add(make_request("b", 12, max_tokens=4))
    assert sizes(step(scheduler)[0]) == {"a": 6, "b": 6}
    assert sizes(step(scheduler)[0]) == {"a": 1, "b": 2}


def test_nobody_is_admitted_in_a_step_that_preempts() -> None:
    scheduler = make_scheduler(num_blocks=4, max_num_batched_tokens=14, enable_prefix_caching=False)
    scheduler.add(make_request("a", 7, max_tokens=9))
    scheduler.add(make_request("b", 7, max_tokens=9))
    scheduler.add(make_request("c", 1))  # one block: it would fit
    assert sizes(step(scheduler)[0]) == {"a": 7, "b": 7}
    assert sizes(step(scheduler)[0]) == {"a": 1, "b": 1}
    assert sizes(step(scheduler)[0]) == {"a": 1}


def test_a_cut_prefill_is_not_overtaken_by_one_that_fits_the_rest() -> None:
    model = CostModel(alpha_ns=1e6, delta_ns=0.0, beta_ns=1e6, gamma_ns=0.0)
    pool = BlockPool(1024, 4, {SlotId(0): 64})
    scheduler = Scheduler(make_config(step_time_target_ns=19_000_000), pool, model, EPOCH)
    scheduler.add(make_request("a", 20))
    scheduler.add(make_request("b", 2))  # 2 + 3 ms
    assert sizes(step(scheduler)[0]) == {"a": 4}  # 4 + 10 ms; 5 ms are left


def test_a_decode_of_the_draft_gives_way_to_an_earlier_arrival() -> None:
    scheduler = make_scheduler(num_blocks=4, max_num_batched_tokens=5)
    scheduler.add(make_request("late", 5, max_tokens=8, arrival_ns=9))
    step(scheduler)
    scheduler.add(make_request("early", 14, max_tokens=2, arrival_ns=1))  # failed over
    assert sizes(step(scheduler)[0]) == {"late": 1, "early": 4}
    assert sizes(step(scheduler)[0]) == {"late": 1, "early": 4}
    plan, _ = step(scheduler)
    assert (sizes(plan), plan.released) == ({"early": 4}, ("late",))


# ---------------------------------------------------------------- several steps in flight


def decodes_in_full_blocks(*names: str) -> Scheduler:
    """A stage for each request; each has two blocks, all there are, and soon needs another."""
    num = len(names)
    scheduler = make_scheduler(2 * num, num_stages=num, enable_prefix_caching=False)
    for name in names:
        scheduler.add(make_request(name, 7, max_tokens=9))
    step(scheduler)
    return scheduler


def test_a_request_in_flight_is_not_preempted_but_waited_for() -> None:
    scheduler = decodes_in_full_blocks("a", "b")
    first, second = next_plan(scheduler), next_plan(scheduler)
    assert (sizes(first), sizes(second)) == ({"a": 1}, {"b": 1})
    scheduler.update(first, result_of(first), 0)
    assert scheduler.schedule(0) is None  # a needs a block, b is in flight
    scheduler.update(second, result_of(second), 0)
    plan = next_plan(scheduler)
    assert (sizes(plan), plan.released) == ({"a": 1}, ("b",))
    scheduler.check()


def test_a_cancelled_release_is_said_again_unless_the_request_runs_again() -> None:
    scheduler = decodes_in_full_blocks("a", "b", "c")
    for plan in (next_plan(scheduler), next_plan(scheduler), next_plan(scheduler)):
        scheduler.update(plan, result_of(plan), 0)
    first = next_plan(scheduler)
    assert (sizes(first), first.released) == ({"a": 1}, ("c",))
    scheduler.abort(RequestId("b"))
    second = next_plan(scheduler)
    assert ([request.id for request in second.started], second.released) == (["c"], ("b",))
    scheduler.update(second, result_of(second), 0)
    scheduler.update(first, cancelled(first), 0)
    assert next_plan(scheduler).released == ()
    scheduler.check()


def test_a_request_is_announced_only_in_a_plan_that_computes_it() -> None:
    scheduler = make_scheduler(num_stages=2)
    scheduler.add(make_request("a", 1))
    scheduler.add(make_request("b", 1))
    plan = next_plan(scheduler)
    assert len(plan.started) == 2
    scheduler.update(plan, cancelled(plan), 0)
    for name in ("a", "b"):  # decodes of different microbatches now
        plan = next_plan(scheduler)
        assert [request.id for request in plan.started] == [name]
        assert sizes(plan) == {name: 1}


def test_a_prefill_preempted_for_an_earlier_one_is_not_computed() -> None:
    scheduler = make_scheduler(num_blocks=4, num_stages=2, max_num_batched_tokens=8)
    scheduler.add(make_request("late", 8, arrival_ns=9))
    first = next_plan(scheduler)
    scheduler.add(make_request("early", 12, max_tokens=4, arrival_ns=1))
    second = next_plan(scheduler)
    scheduler.update(first, cancelled(first), 0)
    scheduler.update(second, result_of(second), 0)
    plan = next_plan(scheduler)
    assert (sizes(plan), plan.released) == ({"early": 4}, ("late",))
    scheduler.check()


# ---------------------------------------------------------------- prefix cache


def test_a_cached_prefix_is_not_computed_again_but_the_last_token_is() -> None:
    scheduler = make_scheduler()
    prompt = list(range(2, 14))  # three full blocks
    scheduler.add(make_request("a", prompt, max_tokens=1))
    step(scheduler)
    scheduler.add(make_request("b", prompt, max_tokens=1))
    plan, _ = step(scheduler)
    (chunk,) = plan.chunks
    assert (chunk.context_len, len(chunk.token_ids)) == (8, 4)
    assert chunk.block_table[:2] == (0, 1)
    assert chunk.block_table[2] != 2
    load = scheduler.load()
    assert (load.prefix_queries, load.prefix_hits) == (24, 8)


def test_generated_tokens_are_cached_too() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [2, 3, 4], max_tokens=6))
    while scheduler.has_work():
        step(scheduler)
    scheduler.add(make_request("b", [2, 3, 4, 7, 7, 7, 7, 7, 9]))
    plan, _ = step(scheduler)
    assert plan.chunks[0].context_len == 8


def test_a_block_is_visible_only_after_its_step() -> None:
    scheduler = make_scheduler(num_stages=2)
    prompt = list(range(2, 14))
    scheduler.add(make_request("a", prompt))
    first = next_plan(scheduler)
    scheduler.add(make_request("b", prompt))
    second = next_plan(scheduler)
    assert second.chunks[0].context_len == 0
    scheduler.update(first, cancelled(first), 0)
    scheduler.add(make_request("c", prompt))
    third = next_plan(scheduler)
    assert {chunk.context_len for chunk in third.chunks} == {0}
    scheduler.update(second, result_of(second), 0)
    scheduler.add(make_request("d", prompt))
    assert next_plan(scheduler).chunks[-1].context_len == 8
    scheduler.check()


def test_without_prefix_caching_nothing_is_shared_or_kept() -> None:
    scheduler = make_scheduler(enable_prefix_caching=False)
    for name in "ab":
        scheduler.add(make_request(name, list(range(2, 14)), max_tokens=1))
        assert step(scheduler)[0].chunks[0].context_len == 0
    load = scheduler.load()
    assert (load.cached_blocks, load.prefix_queries, load.prefix_hits) == (0, 0, 0)


# ---------------------------------------------------------------- limits


def test_what_can_never_fit_is_refused_with_the_limit() -> None:
    scheduler = make_scheduler(num_blocks=5)  # 20 tokens
    with pytest.raises(RequestTooLargeError, match="21 in all, but at most 20 tokens fit") as error:
        scheduler.add(make_request("a", 13, max_tokens=8))
    assert error.value.param == "max_tokens"
    with pytest.raises(RequestTooLargeError, match="context of 100, KVCache of 20"):
        scheduler.add(make_request("b", 50))
    scheduler.add(make_request("c", 13, max_tokens=7))
    assert scheduler.load().leases_seen == 3  # refused ones were seen as well
    assert scheduler.max_request_tokens == 20
    scheduler.check()


def test_the_context_is_a_limit_too() -> None:
    scheduler = make_scheduler(max_model_len=10)
    with pytest.raises(RequestTooLargeError, match="at most 10 tokens"):
        scheduler.add(make_request("a", 6, max_tokens=5))
    scheduler.add(make_request("b", 6, max_tokens=4))


def test_an_empty_prompt_is_invalid() -> None:
    with pytest.raises(InvalidRequestError, match="no tokens"):
        make_scheduler().add(make_request("a", []))


def test_leases_that_cannot_be_are_accounting_errors() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 5))
    with pytest.raises(AccountingError, match="leased already"):
        scheduler.add(make_request("a", 5))
    with pytest.raises(AccountingError, match="all its 2 tokens"):
        scheduler.add(make_request("b", 5, max_tokens=2, outputs=(7, 7)))
    scheduler.check()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("block_size", 0),
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", 0),
        ("num_stages", 0),
        ("watermark_fraction", 1.0),
    ],
)
def test_impossible_configs_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        replace(make_config(), **{name: value})  # type: ignore[arg-type]


# ---------------------------------------------------------------- the end of a request


def finish_of(token_ids: Sequence[int], **params: object) -> tuple[int, FinishReason | None, bool]:
    """Sample `token_ids` in turn; index, reason and stop flag of the last output."""
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 3, max_tokens=6, **params))  # type: ignore[arg-type]
    for token_id in token_ids:
        _, (output,) = step(scheduler, token_id)
        if output.finish is not None:
            assert not scheduler.has_work()
            break
    return output.index, output.finish, output.stop_token


def test_eos_stops() -> None:
    assert finish_of([7, EOS, 7], ignore_eos=False) == (1, FinishReason.STOP, False)


def test_ignored_eos_does_not_stop() -> None:
    assert finish_of([7, EOS, 7]) == (2, None, False)


def test_stop_token_ids_stop_and_say_so() -> None:
    assert finish_of([7, STOP, 7], stop_token_ids=(STOP,)) == (1, FinishReason.STOP, True)
    assert finish_of([EOS], stop_token_ids=(EOS,)) == (0, FinishReason.STOP, True)
    both = finish_of([EOS], stop_token_ids=(EOS,), ignore_eos=False)
    assert both == (0, FinishReason.STOP, False)


def test_nothing_stops_before_min_tokens() -> None:
    params = {"min_tokens": 3, "stop_token_ids": (STOP,), "ignore_eos": False}
    assert finish_of([EOS, STOP, EOS, STOP], **params) == (3, FinishReason.STOP, True)
    assert finish_of([EOS] * 4, **params) == (3, FinishReason.STOP, False)


def test_max_tokens_is_length_and_a_stop_on_the_last_token_is_a_stop() -> None:
    assert finish_of([7] * 6) == (5, FinishReason.LENGTH, False)
    assert finish_of([7] * 5 + [EOS], ignore_eos=False) == (5, FinishReason.STOP, False)


# ---------------------------------------------------------------- abort, cancel, failover


def test_abort_of_a_waiting_a_running_and_an_unknown_request() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(make_request("a", 5))
    scheduler.add(make_request("b", 5))
    step(scheduler)
    for name in ("b", "b", "a", "a", "nobody"):
        scheduler.abort(RequestId(name))
        scheduler.check()
    assert not scheduler.has_work()
    load = scheduler.load()
    assert (load.queued_blocks, load.num_waiting, load.num_running) == (0, 0, 0)
    assert load.free_blocks + load.cached_blocks == load.total_blocks


@pytest.mark.parametrize("make_result", [result_of, cancelled])
def test_abort_during_the_step_drops_the_token_and_keeps_the_blocks_until_its_end(
    make_result: object,
) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 5))
    plan = next_plan(scheduler)
    scheduler.abort(RequestId("a"))
    scheduler.abort(RequestId("a"))
    scheduler.check()
    assert scheduler.has_work()
    assert scheduler.load().free_blocks == 62
    assert scheduler.update(plan, make_result(plan), 0) == ()  # type: ignore[operator]
    scheduler.check()
    assert not scheduler.has_work()
    assert scheduler.load().free_blocks + scheduler.load().cached_blocks == 64
    scheduler.add(make_request("b", 5))
    assert next_plan(scheduler).released == ("a",)


def test_a_cancelled_step_is_planned_again() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 5, max_tokens=1))
    step(scheduler)
    scheduler.add(make_request("b", 9))
    first = next_plan(scheduler)
    assert scheduler.update(first, cancelled(first), 0) == ()
    scheduler.check()
    second = next_plan(scheduler)
    assert second.step == first.step + 1
    assert replace(second, step=first.step) == first  # `started` and `released` included


def test_results_of_another_step_or_epoch_change_nothing() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 5))
    plan = next_plan(scheduler)
    good = result_of(plan)
    token = good.tokens[0]
    for wrong in (
        replace(good, epoch=Epoch(4)),
        replace(good, step=1),
        replace(good, tokens=()),
        replace(good, tokens=(token, token)),
        replace(good, tokens=(replace(token, output_index=1),)),
        replace(good, tokens=(token, replace(token, request_id=RequestId("b")))),
        replace(good, failed=((RequestId("a"), "not finite"),)),
        replace(good, failed=((RequestId("b"), "not finite"),)),
    ):
        with pytest.raises(AccountingError, match="step"):
            scheduler.update(plan, wrong, 0)
    with pytest.raises(AccountingError, match="not in flight"):
        scheduler.update(replace(plan, epoch=Epoch(2)), good, 0)
    assert len(scheduler.update(plan, good, 0)) == 1
    with pytest.raises(AccountingError, match="not in flight"):
        scheduler.update(plan, good, 0)
    scheduler.check()


@pytest.mark.parametrize("aborted_before", [False, True])
def test_a_row_without_a_token_ends_its_request_alone_and_is_not_cached(
    aborted_before: bool,
) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 9))
    scheduler.add(make_request("b", 9))
    plan = next_plan(scheduler)
    good = result_of(plan)
    failed = replace(good, tokens=good.tokens[1:], failed=((RequestId("a"), "not finite"),))
    if aborted_before:
        scheduler.abort(RequestId("a"))
    (output,) = scheduler.update(plan, failed, 0)
    scheduler.check()
    assert output.request_id == "b"
    load = scheduler.load()
    assert (load.num_running, load.cached_blocks, load.free_blocks) == (1, 0, 61)
    plan, _ = step(scheduler)
    assert (sizes(plan), plan.released) == ({"b": 1}, ("a",))


def test_a_failed_over_request_goes_on_after_its_outputs() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 5, max_tokens=4, outputs=(7, 8))
    scheduler.add(request)
    plan, (output,) = step(scheduler)
    (chunk,) = plan.chunks
    assert plan.started == (request,)
    assert chunk.token_ids == (*request.prompt_token_ids, 7, 8)
    assert (chunk.output_index, output.index, output.finish) == (2, 2, None)
    _, (output,) = step(scheduler)
    assert (output.index, output.finish) == (3, FinishReason.LENGTH)
    assert scheduler.load().prompt_tokens == 0  # counted where it first ran


# ---------------------------------------------------------------- random histories


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, end, are aborted and continued, steps are cancelled; tokens never change."""

    @initialize(
        block_size=st.integers(1, 5),
        capacity_tokens=st.integers(16, 70),
        budget_tokens=st.one_of(st.none(), st.integers(1, 40)),
        target_ms=st.sampled_from([1, 8, 20, 1000]),
        max_num_seqs=st.sampled_from([1, 2, 3, 5, 8, 8]),
        caching=st.booleans(),
        watermark=st.sampled_from([0.0, 0.2]),
        stages=st.sampled_from([1, 1, 1, 2, 3]),
        order=st.sampled_from(BatchOrder),
        batching=st.sampled_from(Batching),
        chained=st.booleans(),
    )
    def build(
        self,
        block_size: int,
        capacity_tokens: int,
        budget_tokens: int | None,
        target_ms: int,
        max_num_seqs: int,
        caching: bool,
        watermark: float,
        stages: int,
        order: BatchOrder,
        batching: Batching,
        chained: bool,
    ) -> None:
        self.config = SchedulerConfig(
            block_size=block_size,
            max_model_len=60,
            eos_token_ids=(EOS,),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget_tokens,
            step_time_target_ns=target_ms * 1_000_000,
            watermark_fraction=watermark,
            enable_prefix_caching=caching,
            num_stages=stages,
            batch_order=order,
            batching=batching,
            chain_chunks=chained,
        )
        num_blocks = max(2, capacity_tokens // block_size)
        self.pool = BlockPool(1024, 4, {SlotId(0): num_blocks - 2, SlotId(3): 2})
        self.scheduler = Scheduler(self.config, self.pool, COST_MODEL, EPOCH)
        self.executor = Executor(block_size)
        self.flights: list[StepPlan] = []
        self.expected: dict[RequestId, list[TokenOutput]] = {}
        self.requests: dict[RequestId, Request] = {}
        self.arrivals: dict[RequestId, tuple[int, int]] = {}
        self.started: set[RequestId] = set()
        self.num_requests = 0

    @rule(
        copies=st.integers(1, 4),
        first=st.integers(2, 4),
        length=st.integers(1, 24),
        max_tokens=st.integers(1, 20),
        min_tokens=st.integers(0, 3),
        ignore_eos=st.booleans(),
        stop_token_ids=st.sampled_from([(), (STOP,)]),
        delivered=st.integers(0, 4),
        age_ns=st.integers(0, 3),
    )
    def submit(
        self,
        copies: int,
        first: int,
        length: int,
        max_tokens: int,
        min_tokens: int,
        delivered: int,
        age_ns: int,
        **params: object,
    ) -> None:
        """Prompts of one repeated token, so that prefixes are often equal; in bursts."""
        params["min_tokens"] = min(min_tokens, max_tokens)
        for _ in range(copies):
            self.num_requests += 1
            arrival_ns = 10 * self.num_requests - 15 * age_ns
            request = make_request(
                f"r{self.num_requests}", (first,) * length, max_tokens, arrival_ns, (), **params
            )
            self.lease(request, delivered)

    def lease(self, request: Request, delivered: int) -> None:
        total = len(request.prompt_token_ids) + request.params.max_tokens
        if total > min(60, self.capacity_tokens()):
            with pytest.raises(RequestTooLargeError, match="at most"):
                self.scheduler.add(request)
            return
        expected = reference_outputs(request, 60)
        done = expected[: min(delivered, len(expected) - 1)]  # failed over after these
        outputs = tuple(output.token_id for output in done)
        self.scheduler.add(replace(request, output_token_ids=outputs))
        self.expected[request.id] = expected[len(done) :]
        self.requests[request.id] = request
        self.arrivals[request.id] = (request.arrival_ns, self.num_requests)

    def capacity_tokens(self) -> int:
        return self.pool.total_blocks * self.config.block_size

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.expected)))
        self.scheduler.abort(request_id)
        del self.expected[request_id]

    @rule()
    def schedule(self) -> None:
        plan = self.scheduler.schedule(0)
        if plan is None:
            assert self.may_be_idle(), "work is left, but nothing is planned"
            return
        self.flights.append(plan)
        assert len(self.flights) <= self.config.num_stages
        self.check_limits(plan)
        self.check_queue_order()

    def may_be_idle(self) -> bool:
        return bool(self.flights) or not self.scheduler.has_work()

    def check_limits(self, plan: StepPlan) -> None:
        budget = self.config.max_num_batched_tokens
        assert budget is None or plan.num_tokens <= budget
        assert self.scheduler.load().num_running <= self.max_running()
        self.check_chains()

    def check_chains(self) -> None:
        """A request is in one microbatch, or its chunks follow each other."""
        reached: dict[RequestId, int] = {}
        for chunk in (chunk for flight in self.flights for chunk in flight.chunks):
            follows = chunk.request_id in reached
            assert self.config.chain_chunks or not follows
            assert reached.get(chunk.request_id, chunk.context_len) == chunk.context_len
            is_last = chunk.samples
            reached[chunk.request_id] = -1 if is_last else chunk.context_len + len(chunk.token_ids)

    def max_running(self) -> int:
        return self.config.max_num_seqs

    def check_queue_order(self) -> None:
        newly = self.scheduler.newly_started()
        assert not self.started.intersection(newly)
        self.started.update(newly)
        orders = [self.arrivals[request_id] for request_id in newly]
        assert all(a < b for a, b in pairwise(orders))
        waiting = [self.arrivals[r] for r in self.expected if r not in self.started]
        assert not waiting or not orders or max(orders) < min(waiting)

    @precondition(lambda self: self.flights)
    @rule()
    def land(self) -> None:
        plan = self.flights.pop(0)
        outputs = self.scheduler.update(plan, self.executor.execute(plan), 0)
        for output in outputs:
            expected = self.expected[output.request_id]
            assert output == expected.pop(0)
            assert (output.finish is not None) == (not expected)
            if not expected:
                del self.expected[output.request_id]

    @precondition(lambda self: self.flights)
    @rule(chunks=st.integers(0, 5))
    def cancel(self, chunks: int) -> None:
        plan = self.flights.pop(0)
        assert self.scheduler.update(plan, self.executor.execute(plan, chunks), 0) == ()

    @rule(steps=st.integers(1, 10))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.schedule()
            if self.flights:
                self.land()

    @invariant()
    def laws(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check()
        load = self.scheduler.load()
        used = self.pool.total_blocks - self.pool.available_blocks
        assert used == self.pool.referenced_blocks
        assert load.total_blocks == self.pool.open_blocks
        is_busy = self.scheduler.is_copying or self.flights  # maybe for an aborted request
        assert self.scheduler.has_work() == bool(self.expected or is_busy)

    def teardown(self) -> None:
        """Everything that is left runs to its end, and everything is given back."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(5000):
            if not self.scheduler.has_work():
                break
            self.schedule()
            self.land()
        assert not self.expected
        assert not self.scheduler.has_work()
        self.laws()
        assert self.pool.available_blocks == self.pool.total_blocks
        self.scheduler.add(make_request("last", 1, max_tokens=1))
        plan = next_plan(self.scheduler)
        self.executor.execute(plan)
        assert set(self.executor.outputs) == {RequestId("last")}


SchedulerMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, derandomize=True, database=None
)
TestScheduler = SchedulerMachine.TestCase
