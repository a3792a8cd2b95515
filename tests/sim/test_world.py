"""The virtual-time world: many seeds with faults, and single faults by example.

A failing seed is shown again by `World(draw_scenario(rng), rng).run()` with `rng = Random(seed)`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest

from kunserve.core.actions import RunFirst, RunHead, RunStage
from kunserve.core.errors import AccountingError
from kunserve.core.events import (
    Command,
    DeliverTokens,
    DrainComplete,
    FormGroup,
    GroupReport,
    InstanceReady,
    KillInstance,
    LeaseRequest,
    RefusalKind,
    RefuseRequest,
    RevokeLease,
    StartInstance,
)
from kunserve.core.ids import BlockId, Epoch, GroupId, InstanceId, RequestId
from kunserve.core.layout import LayerRange, Part, PartKind
from kunserve.core.memory import PageRun
from kunserve.core.request import Request, SamplingParams
from kunserve.core.step import Chunk, StepPlan
from kunserve.policy.controller import SECOND_NS, Controller, ControllerConfig, InstanceState
from kunserve.policy.cost_model import CostModel
from kunserve.policy.scheduler import SchedulerConfig
from kunserve.sim import world as world_module
from kunserve.sim.faults import Crash, Fault, Freeze, LastWords, SlowSteps, StuckStep
from kunserve.sim.instance import SimInstanceConfig
from kunserve.sim.laws import FrontFacts, LawBrokenError, Laws, StreamState
from kunserve.sim.memory import PhysicalPages, TableMapper
from kunserve.sim.scenario import (
    TRANSITION_LIMITS,
    Arrival,
    Delays,
    Scenario,
    ScenarioLimits,
    draw_scenario,
)
from kunserve.sim.timeline import FOREVER_NS, MILLISECOND_NS, Link, SpanNs, Timeline
from kunserve.sim.toy_model import (
    EMBEDDING,
    KILLER_TOKEN_ID,
    POISON_TOKEN_ID,
    ToyExecutor,
    reference_outputs,
)
from kunserve.sim.world import Outcome, World

NUM_SEEDS = 250
SEEDS_PER_TEST = 50
WHOLE_LIMITS = ScenarioLimits()
SWAP_LIMITS = ScenarioLimits(swaps=True, max_requests=60, max_instances=2)
SWAP_TRANSITION_LIMITS = replace(TRANSITION_LIMITS, swaps=True)
ZERO, ONE, TWO = InstanceId(0), InstanceId(1), InstanceId(2)


def run_seed(seed: int, limits: ScenarioLimits = WHOLE_LIMITS) -> tuple[World, Outcome]:
    rng = Random(seed)
    world = World(draw_scenario(rng, limits), rng)
    try:
        return world, world.run()
    except Exception as error:
        error.add_note(f"seed {seed}")
        raise


# ---------------------------------------------------------------- many seeds


@pytest.mark.parametrize("first_seed", range(0, NUM_SEEDS, SEEDS_PER_TEST))
def test_the_laws_hold_for_every_seed(first_seed: int) -> None:
    happened: Counter[str | RefusalKind] = Counter()
    for seed in range(first_seed, first_seed + SEEDS_PER_TEST):
        _, outcome = run_seed(seed)
        happened.update(outcome.refused)
        happened["finished"] += outcome.finished
        happened["aborted"] += outcome.aborted
        happened["failovers"] += outcome.failovers
        happened["preemptions"] += outcome.preemptions
        happened["killed"] += outcome.killed_instances
        happened["crashed"] += outcome.lost_instances - outcome.killed_instances
        happened["drained"] += outcome.is_drained
    counted = ("finished", "aborted", "failovers", "preemptions", "killed", "crashed", "drained")
    refusals = set(RefusalKind) - {RefusalKind.FAILED}  # no poison here
    assert all(happened[what] for what in (*counted, *refusals)), happened


@pytest.mark.parametrize(("limits", "num_seeds"), [(SWAP_LIMITS, 50), (SWAP_TRANSITION_LIMITS, 15)])
def test_the_laws_hold_when_requests_are_swapped(limits: ScenarioLimits, num_seeds: int) -> None:
    happened: Counter[str] = Counter()
    for seed in range(num_seeds):
        _, outcome = run_seed(seed, limits)
        happened["swapped_in"] += outcome.swapped_in
        happened["recomputed"] += outcome.preemptions > outcome.swapped_in
        happened["lost"] += outcome.swapped_in > 0 and outcome.lost_instances > 0
        happened["aborted"] += outcome.swapped_in > 0 and outcome.aborted > 0
        happened["commits"] += outcome.swapped_in > 0 and outcome.commits > 0
    assert all(happened[what] for what in ("swapped_in", "recomputed", "lost", "aborted"))
    assert bool(happened["commits"]) == bool(limits.max_wishes)


@pytest.mark.parametrize("limits", [WHOLE_LIMITS, TRANSITION_LIMITS], ids=["whole", "layouts"])
def test_a_seed_gives_one_trace_in_every_process(limits: ScenarioLimits) -> None:
    seeds = range(7)
    program = (
        "from random import Random\n"
        "from kunserve.sim.scenario import ScenarioLimits, draw_scenario\n"
        "from kunserve.sim.world import World\n"
        f"for seed in {list(seeds)}:\n"
        "    rng = Random(seed)\n"
        f"    world = World(draw_scenario(rng, {limits}), rng)\n"
        "    world.run()\n"
        "    print(world.trace_hash())\n"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        for hash_seed in ("1", "2")
    ]
    runs = [run_seed(seed, limits) for seed in seeds]
    here = [world.trace_hash() for world, _ in runs]
    assert printed == [here, here]
    assert len(set(here)) == len(seeds)
    commits = sum(outcome.commits for _, outcome in runs)
    assert commits >= len(seeds) if limits.max_wishes else not commits


# ---------------------------------------------------------------- one fault at a time


def make_request(number: int, max_tokens: int = 20, prompt: tuple[int, ...] = (5, 6, 7)) -> Request:
    params = SamplingParams(max_tokens=max_tokens, seed=number, ignore_eos=True)
    return Request(RequestId(f"r{number}"), (*prompt, number), params, arrival_ns=0)


def make_scenario(*faults: Fault, requests: int = 4, instances: int = 2) -> Scenario:
    """Instances load in 1 s; a decode step lasts about 25 ms, so 20 tokens half a second."""
    return Scenario(
        controller=ControllerConfig(
            num_instances=instances,
            num_layers=4,
            block_size=4,
            max_model_len=64,
            max_num_queued_reqs=100,
        ),
        instance=SimInstanceConfig(
            scheduler=SchedulerConfig(block_size=4, max_model_len=64),
            cost_model=CostModel(0.0, 0.0, beta_ns=1e6, gamma_ns=20e6),
            num_layers=4,
            kv_pages=8,
            blocks_per_page=4,
        ),
        delays=Delays(load=SpanNs(SECOND_NS, SECOND_NS)),
        arrivals=tuple(Arrival(make_request(number)) for number in range(requests)),
        faults=faults,
    )


def run(scenario: Scenario) -> tuple[World, Outcome]:
    world = World(scenario, Random(1))
    return world, world.run()


def commands(world: World, kind: type[Command]) -> list[Command]:
    return [entry for _, entry in world.trace if isinstance(entry, kind)]


def test_without_faults_all_requests_finish_on_both_instances() -> None:
    world, outcome = run(make_scenario())
    assert (outcome.finished, outcome.lost_instances, outcome.failovers) == (4, 0, 0)
    leased = Counter(command.instance for command in commands(world, LeaseRequest))
    # Parked while both loaded, the first to get ready takes them all: nobody else is there.
    assert leased.total() == 4


def test_a_crash_in_the_middle_of_a_stream_moves_it_with_its_tokens() -> None:
    world, outcome = run(make_scenario(Crash(1_200 * MILLISECOND_NS, ZERO)))
    assert (outcome.finished, outcome.lost_instances) == (4, 1)
    continued = [c.request for c in commands(world, LeaseRequest) if c.request.output_token_ids]
    assert continued
    assert all(0 < len(request.output_token_ids) < 20 for request in continued)


def test_an_instance_that_dies_while_it_loads_is_started_again() -> None:
    world, outcome = run(make_scenario(Crash(SECOND_NS // 2, ZERO), instances=1))
    assert (outcome.finished, outcome.lost_instances, outcome.failovers) == (4, 1, 0)
    assert commands(world, StartInstance) == [StartInstance(ZERO, 1)]


def test_an_instance_that_hangs_while_it_loads_is_killed_by_its_start_deadline() -> None:
    _, outcome = run(make_scenario(Freeze(SECOND_NS // 2, ZERO, FOREVER_NS), instances=1))
    assert (outcome.finished, outcome.lost_instances, outcome.killed_instances) == (4, 1, 0)


@pytest.mark.parametrize(
    "fault",
    [Freeze(1_200 * MILLISECOND_NS, ZERO, FOREVER_NS), StuckStep(1_200 * MILLISECOND_NS, ZERO)],
)
def test_a_hung_instance_is_killed_and_its_requests_go_on(fault: Fault) -> None:
    world, outcome = run(make_scenario(fault, instances=1))
    assert (outcome.finished, outcome.killed_instances, outcome.failovers) == (4, 1, 4)
    (kill,) = commands(world, KillInstance)
    assert kill.reason.startswith("no heartbeat for 10.")


def test_a_pause_shorter_than_the_deadline_costs_nothing() -> None:
    _, outcome = run(make_scenario(Freeze(1_200 * MILLISECOND_NS, ZERO, 9 * SECOND_NS)))
    assert (outcome.finished, outcome.lost_instances, outcome.failovers) == (4, 0, 0)


def test_slow_steps_that_get_on_are_not_killed() -> None:
    # 28 ms for 4 decodes, 600 times as long: 4.2 s a layer, 17 s a step, a deadline of 10 s.
    slow = SlowSteps(1_200 * MILLISECOND_NS, ZERO, 20 * SECOND_NS, factor=600)
    world, outcome = run(make_scenario(slow, instances=1))
    assert (outcome.finished, outcome.lost_instances) == (4, 0)
    assert outcome.end_ns > 18 * SECOND_NS
    assert not commands(world, KillInstance)


def test_an_instance_that_dies_with_its_first_words_is_started_again() -> None:
    """Its InstanceReady arrives after the news of its end (found by seed 14)."""
    slow_link = Delays(
        link=SpanNs(80 * MILLISECOND_NS, 90 * MILLISECOND_NS),
        load=SpanNs(SECOND_NS, SECOND_NS),
        exit=SpanNs(MILLISECOND_NS, MILLISECOND_NS),
    )
    scenario = replace(make_scenario(LastWords(0, ZERO, 1), instances=1), delays=slow_link)
    for seed in range(20):  # the link draws whether the words are lost
        world = World(scenario, Random(seed))
        assert world.run().finished == 4
        said = [e for _, e in world.trace if isinstance(e, InstanceReady)]
        overtaken = [event for event in said if event.incarnation == 0]
        if overtaken:
            return
    pytest.fail("the message was lost every time")


def test_an_instance_that_keeps_dying_is_given_up_and_its_requests_are_refused() -> None:
    crashes = [Crash(int(seconds * SECOND_NS), ZERO) for seconds in (1.2, 3.4, 6.6, 11.8)]
    world, outcome = run(make_scenario(*crashes, instances=1))
    assert outcome.lost_instances == 4
    assert outcome.refused == {RefusalKind.UNAVAILABLE: 4 - outcome.finished}
    assert [c.incarnation for c in commands(world, StartInstance)] == [1, 2, 3]


def test_a_drain_lets_admitted_requests_end_and_refuses_new_ones() -> None:
    late = Arrival(replace(make_request(9), arrival_ns=1_300 * MILLISECOND_NS))
    scenario = make_scenario()
    scenario = replace(
        scenario, arrivals=(*scenario.arrivals, late), drain_at_ns=1_200 * MILLISECOND_NS
    )
    world, outcome = run(scenario)
    assert outcome.is_drained
    assert (outcome.finished, outcome.refused) == (4, {RefusalKind.UNAVAILABLE: 1})
    assert world.trace.index(_last_delivery(world)) < min(
        at for at, (_, entry) in enumerate(world.trace) if isinstance(entry, DrainComplete)
    )


def _last_delivery(world: World) -> tuple[int, DeliverTokens]:
    return [entry for entry in world.trace if isinstance(entry[1], DeliverTokens)][-1]


def test_a_full_queue_refuses() -> None:
    scenario = make_scenario(requests=6, instances=1)
    scenario = replace(scenario, controller=replace(scenario.controller, max_num_queued_reqs=4))
    _, outcome = run(scenario)
    assert (outcome.finished, outcome.refused) == (4, {RefusalKind.QUEUE_FULL: 2})


def test_few_blocks_make_requests_preempt_each_other_without_a_trace_in_their_tokens() -> None:
    scenario = make_scenario(requests=8, instances=1)
    scenario = replace(scenario, instance=replace(scenario.instance, kv_pages=3))
    _, outcome = run(scenario)
    assert outcome.finished == 8
    assert outcome.preemptions > 0


def test_with_host_memory_preempted_requests_come_back_from_there() -> None:
    scenario = make_scenario(requests=8, instances=1)
    scheduler = replace(scenario.instance.scheduler, host_blocks=100)
    instance = replace(scenario.instance, kv_pages=3, scheduler=scheduler)
    _, outcome = run(replace(scenario, instance=instance))
    assert outcome.finished == 8
    assert outcome.swapped_in == outcome.preemptions > 0


def test_an_instance_that_dies_while_it_swaps_takes_nothing_with_it() -> None:
    """Its host memory is gone; the front has all tokens. The crash strikes at several moments."""
    scenario = make_scenario(requests=8, instances=1)
    scheduler = replace(scenario.instance.scheduler, host_blocks=100)
    instance = replace(scenario.instance, kv_pages=3, scheduler=scheduler)
    delays = replace(scenario.delays, copy=SpanNs(5 * MILLISECOND_NS, 5 * MILLISECOND_NS))
    scenario = replace(scenario, instance=instance, delays=delays)
    for at_ms in range(1_150, 1_500, 30):
        crash = Crash(at_ms * MILLISECOND_NS, ZERO)
        _, outcome = run(replace(scenario, faults=(crash,)))
        assert (outcome.finished, outcome.lost_instances) == (8, 1)
        assert outcome.swapped_in > 0


def test_clients_that_go_away_leave_nothing_behind() -> None:
    scenario = make_scenario()
    arrivals = (
        replace(scenario.arrivals[0], abort_at_ns=SECOND_NS // 2),  # parked
        replace(scenario.arrivals[1], abort_at_ns=1_200 * MILLISECOND_NS),  # running
        replace(scenario.arrivals[2], abort_after_tokens=7),  # as for a stop string
        scenario.arrivals[3],
    )
    world, outcome = run(replace(scenario, arrivals=arrivals))
    assert (outcome.finished, outcome.aborted) == (1, 3)
    assert {c.request_id for c in commands(world, RevokeLease)} == {"r1", "r2"}
    assert world.laws.delivered_tokens(RequestId("r2")) >= 7


def test_a_row_without_a_token_ends_only_its_own_request() -> None:
    scenario = make_scenario(requests=3, instances=1)
    poison = Arrival(make_request(9, prompt=(1, POISON_TOKEN_ID)))
    world, outcome = run(replace(scenario, arrivals=(*scenario.arrivals, poison)))
    assert (outcome.finished, outcome.lost_instances) == (3, 0)
    (refusal,) = commands(world, RefuseRequest)
    assert (refusal.request_id, refusal.kind) == ("r9", RefusalKind.FAILED)


def test_rows_without_a_token_hold_to_the_laws_for_every_seed() -> None:
    limits = ScenarioLimits(poison_share=0.2)
    failed = 0
    for seed in range(40):
        rng = Random(seed)
        outcome = World(draw_scenario(rng, limits), rng).run()
        failed += outcome.refused.get(RefusalKind.FAILED, 0)
    assert failed


@pytest.mark.parametrize("instances", [1, 2, 3])
@pytest.mark.parametrize("max_num_seqs", [256, 2])
def test_a_request_that_ends_its_instances_is_given_up_and_all_others_finish(
    instances: int, max_num_seqs: int
) -> None:
    """Whether or not the news that it starts outran the crash (the link draws it)."""
    scenario = make_scenario(requests=5, instances=instances)
    scheduler = replace(scenario.instance.scheduler, max_num_seqs=max_num_seqs)
    late = 1_200 * MILLISECOND_NS
    killer = Arrival(make_request(9, prompt=(1, KILLER_TOKEN_ID)))
    for arrival in (killer, replace(killer, request=replace(killer.request, arrival_ns=late))):
        arrivals = (*scenario.arrivals[:2], arrival, *scenario.arrivals[2:])
        deadly = replace(
            scenario,
            arrivals=arrivals,
            instance=replace(scenario.instance, scheduler=scheduler),
        )
        for seed in range(20):
            world = World(deadly, Random(seed))
            outcome = world.run()
            assert (outcome.finished, outcome.lost_instances) == (5, 3)
            (refusal,) = commands(world, RefuseRequest)
            assert (refusal.request_id, refusal.kind) == ("r9", RefusalKind.UNAVAILABLE)
            states = {record.state for record in world.controller.instances()}
            assert states == {InstanceState.READY}


def test_requests_that_end_their_instances_hold_to_the_laws_for_every_seed() -> None:
    deaths = 0
    for seed in range(60):
        rng = Random(seed)
        world = World(draw_scenario(rng, ScenarioLimits(killer_share=0.1)), rng)
        world.run()
        deaths += sum(stream.deaths for stream in world.laws.streams)
    assert deaths > 60


# ---------------------------------------------------------------- laws that can fail


class ForgetfulController(Controller):
    """Does not lease a request again that has begun."""

    def _dispatch(self, request_id: RequestId) -> Iterator[Command]:
        if not self._requests[request_id].outputs:
            yield from super()._dispatch(request_id)


class TrustingController(Controller):
    """Blames no request for the end of an instance."""

    def _blame(self, orphans: list[RequestId]) -> None:
        pass


class StutteringController(Controller):
    """Delivers a token twice."""

    def _on_report(self, event: GroupReport, now_ns: int) -> Iterator[Command]:
        for command in super()._on_report(event, now_ns):
            yield command
            yield command


class ImpatientController(Controller):
    """Kills whatever works."""

    def _on_report(self, event: GroupReport, now_ns: int) -> Iterator[Command]:
        yield KillInstance(event.instance, event.incarnation, "bored")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (ForgetfulController, "not quiet in time"),
        (StutteringController, "was due"),
        (ImpatientController, "makes progress"),
    ],
)
def test_a_broken_controller_breaks_a_law(
    broken: type[Controller], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world_module, "Controller", broken)
    with pytest.raises(LawBrokenError, match=message):
        run(make_scenario(Crash(1_200 * MILLISECOND_NS, ZERO), instances=1))


def test_a_controller_that_blames_nobody_breaks_a_law(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world_module, "Controller", TrustingController)
    scenario = make_scenario(instances=2)
    killer = Arrival(make_request(9, prompt=(1, KILLER_TOKEN_ID)))
    with pytest.raises(LawBrokenError, match="is leased during another's trial"):
        run(replace(scenario, arrivals=(*scenario.arrivals, killer)))


CALM = FrontFacts(draining=False, has_given_up=False)
REQUEST = make_request(1, max_tokens=3)
GROUP, EPOCH = GroupId(0), Epoch(0)
STREAM = reference_outputs(REQUEST, (), 4)
LEASE = LeaseRequest(ZERO, GROUP, EPOCH, REQUEST)


def submitted_laws() -> Laws:
    laws = Laws(max_request_tokens=64, max_num_queued_reqs=1, eos_token_ids=(), max_losses=3)
    laws.submitted(REQUEST)
    laws.judge(FormGroup(ZERO, GROUP, EPOCH), CALM)
    laws.judge(FormGroup(ONE, GroupId(1), EPOCH), CALM)
    return laws


@pytest.mark.parametrize(
    ("legal", "illegal"),
    [
        ([LEASE], DeliverTokens(REQUEST.id, STREAM[1:2])),
        ([LEASE], DeliverTokens(REQUEST.id, (replace(STREAM[0], token_id=99),))),
        ([LEASE], DeliverTokens(REQUEST.id, (replace(STREAM[0], finish=STREAM[2].finish),))),
        ([LEASE], DeliverTokens(REQUEST.id, ())),
        ([LEASE, DeliverTokens(REQUEST.id, STREAM)], DeliverTokens(REQUEST.id, STREAM[2:])),
        ([], DeliverTokens(RequestId("unknown"), STREAM)),
        ([LEASE], LEASE),
        ([], replace(LEASE, request=replace(REQUEST, output_token_ids=(1,)))),
        ([LEASE], RevokeLease(ONE, GroupId(1), EPOCH, REQUEST.id)),
        ([], FormGroup(TWO, GROUP, EPOCH)),
        ([], FormGroup(ZERO, GroupId(2), EPOCH)),
        ([], DrainComplete()),
        *(([LEASE], RefuseRequest(REQUEST.id, kind, "because")) for kind in RefusalKind),
    ],
)
def test_the_laws_object(legal: list[Command], illegal: Command) -> None:
    laws = submitted_laws()
    for command in legal:
        laws.judge(command, CALM)
    with pytest.raises(LawBrokenError):
        laws.judge(illegal, CALM)


def test_the_laws_count_the_queue() -> None:
    laws = submitted_laws()
    laws.check_queue()
    laws.submitted(make_request(2))
    with pytest.raises(LawBrokenError, match="2 requests wait, at most 1 may"):
        laws.check_queue()
    laws.started((REQUEST.id,))
    laws.check_queue()


def test_the_laws_count_the_instances_that_a_request_ends() -> None:
    laws = submitted_laws()
    for _ in range(3):
        laws.instance_killed_by(REQUEST.id)
    with pytest.raises(LawBrokenError, match="r1 ended 4 instances"):
        laws.instance_killed_by(REQUEST.id)


def test_the_laws_object_to_a_lease_after_too_many_losses() -> None:
    laws = submitted_laws()
    for number in range(3):
        laws.judge(replace(LEASE, group=GroupId(2 * number)), CALM)
        laws.instance_lost(ZERO)
        laws.judge(FormGroup(ZERO, GroupId(2 * number + 2), EPOCH), CALM)
    with pytest.raises(LawBrokenError, match="r1 is leased after 3 losses"):
        laws.judge(replace(LEASE, group=GroupId(6)), CALM)


def test_the_laws_object_to_two_trials_at_a_time() -> None:
    laws = Laws(max_request_tokens=64, max_num_queued_reqs=9, eos_token_ids=(), max_losses=2)
    two = [REQUEST, make_request(2)]
    for request in two:
        laws.submitted(request)
    for group in (0, 1):
        laws.judge(FormGroup(ZERO, GroupId(group), EPOCH), CALM)
        for request in two:
            laws.judge(LeaseRequest(ZERO, GroupId(group), EPOCH, request), CALM)
            if group:
                with pytest.raises(LawBrokenError, match="r2 is leased during another's trial"):
                    laws.judge(LeaseRequest(ZERO, GroupId(group), EPOCH, two[1]), CALM)
                break
        laws.instance_lost(ZERO)


def test_the_laws_accept_a_stream_that_moves() -> None:
    laws = submitted_laws()
    laws.judge(LEASE, CALM)
    laws.judge(DeliverTokens(REQUEST.id, STREAM[:1]), CALM)
    laws.instance_lost(ZERO)
    known = replace(REQUEST, output_token_ids=(STREAM[0].token_id,))
    laws.judge(LeaseRequest(ONE, GroupId(1), EPOCH, known), CALM)
    laws.judge(DeliverTokens(REQUEST.id, STREAM[1:]), CALM)
    (stream,) = laws.streams
    assert (stream.state, stream.leases) == (StreamState.FINISHED, 2)


# ---------------------------------------------------------------- parts


def chunk(tokens: tuple[int, ...], context_len: int, *table: int) -> Chunk:
    blocks = tuple(BlockId(block) for block in table)
    return Chunk(REQUEST.id, tokens, context_len, blocks, samples=True, output_index=0)


def make_executor() -> ToyExecutor:
    """A whole instance of four layers, ten blocks of two positions."""
    pages = PhysicalPages(60, blocks_per_page=1, block_size=2)
    mapper = TableMapper(pages, num_layers=4)
    for layer in range(4):
        mapper.map_kv(layer, 0, [PageRun(10 * layer, 10)])
    for number, part in enumerate((EMBEDDING, *(Part(PartKind.LAYER, i) for i in range(4)))):
        mapper.map_part(part, [PageRun(40 + number, 1)])
        pages.load([40 + number], part)
    return ToyExecutor(mapper, 4, has_head=False)


def sampled(executor: ToyExecutor, *chunks: Chunk) -> list[int]:
    plans = [StepPlan(EPOCH, step, (c,), (REQUEST,)) for step, c in enumerate(chunks)]
    results = [executor.run(RunFirst(plan), 4)[0] for plan in plans]
    assert results[-1] is not None
    return [token.token_id for token in results[-1].tokens]


def test_the_toy_model_does_not_see_chunks_or_tables_but_sees_lost_kv() -> None:
    tokens = REQUEST.prompt_token_ids
    whole = sampled(make_executor(), chunk(tokens, 0, 0, 1))
    assert whole == [STREAM[0].token_id]
    split = [chunk(tokens[:3], 0, 7, 2), chunk(tokens[3:], 3, 7, 2)]
    assert sampled(make_executor(), *split) == whole
    overwritten = [chunk(tokens[:3], 0, 7, 2), chunk((9, 8), 0, 7), chunk(tokens[3:], 3, 7, 2)]
    assert sampled(make_executor(), *overwritten) != whole
    with pytest.raises(AccountingError, match="was not started"):
        make_executor().run(RunFirst(StepPlan(EPOCH, 0, (chunk(tokens, 0, 0, 1),))), 4)


def test_the_toy_model_cannot_use_what_is_not_there() -> None:
    tokens = REQUEST.prompt_token_ids
    step = chunk(tokens[2:], 2, 0, 1)
    with pytest.raises(AccountingError, match="nobody has written"):
        sampled(make_executor(), step)
    with pytest.raises(AccountingError, match="hole at block 10"):
        sampled(make_executor(), chunk(tokens, 0, 10, 1))
    executor = make_executor()
    executor._mapper.pages.poison(42)
    with pytest.raises(AccountingError, match="weights of layer 1"):
        sampled(executor, chunk(tokens, 0, 0, 1))


def test_stages_give_what_a_whole_instance_gives() -> None:
    plan = StepPlan(EPOCH, 0, (chunk(REQUEST.prompt_token_ids, 0, 3, 1),), (REQUEST,))
    leader, stage = make_executor(), make_executor()
    leader.layers, stage.layers = LayerRange(0, 1), LayerRange(1, 4)
    nothing, rows = leader.run(RunFirst(plan), 1)
    assert nothing is None
    work = RunStage(GROUP, EPOCH, 0, plan.chunks, (), rows)
    assert stage.run(work, 2) == (None, None)  # cancelled between layers
    _, last = stage.run(work, 3)
    result, _ = leader.run(RunHead(plan, last), 1)
    assert result is not None
    assert [token.token_id for token in result.tokens] == [STREAM[0].token_id]


def test_equal_times_run_in_the_order_of_planning() -> None:
    timeline, seen = Timeline(), []
    for number in range(5):
        timeline.at(10 if number % 2 else 5, lambda number=number: seen.append(number))
    timeline.at(10, lambda: timeline.after(0, lambda: seen.append(9)))
    for _ in range(7):
        timeline.advance()
    assert (seen, timeline.now_ns) == ([0, 2, 4, 1, 3, 9], 10)


def test_a_link_delays_but_keeps_the_order_and_loses_only_an_end() -> None:
    timeline, seen = Timeline(), []
    link = Link(timeline, SpanNs(0, 1000), Random(3), seen.append)
    for number in range(40):
        timeline.at(number * 10, lambda number=number: link.send(number))
    timeline.at(400, link.cut)
    for _ in range(81):
        timeline.advance()
    assert seen == list(range(len(seen)))
    assert 0 < len(seen) < 40
