"""The overload policy in the virtual-time world: it drops where it pays, restores by itself, and
otherwise decides exactly what a server without it does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from random import Random

import pytest

from kunserve.core.decision import Decision, Realised, Shortage, Verdict
from kunserve.core.events import LogTransition, NoteDecision
from kunserve.core.ids import InstanceId, RequestId
from kunserve.core.policy import PolicyName, Trigger
from kunserve.core.request import Request, SamplingParams
from kunserve.core.transition import Fence, TransitionRecord
from kunserve.policy.book import ControllerConfig
from kunserve.policy.cost_model import CostModel
from kunserve.policy.scheduler import SchedulerConfig
from kunserve.sim.faults import Crash, Fault
from kunserve.sim.instance import SimInstanceConfig
from kunserve.sim.scenario import Arrival, Delays, Scenario
from kunserve.sim.timeline import MILLISECOND_NS, SECOND_NS, SpanNs
from kunserve.sim.world import Outcome, World

MAX_LEN = 64
BLOCK = 4

INSTANCE = SimInstanceConfig(
    scheduler=SchedulerConfig(block_size=BLOCK, max_model_len=MAX_LEN),
    cost_model=CostModel(0.0, 0.0, beta_ns=1e6, gamma_ns=15e6, head_gamma_ns=2e6, sharpness=2.0),
    num_layers=6,
    kv_pages=8,
    blocks_per_page=4,
    layer_pages=16,
)
"""Weights take two thirds; a decode step lasts about 20 ms; a whole instance holds 128 tokens, and
dropping a copy makes room for 256 more."""

ROOMY = replace(INSTANCE, kv_pages=24)
"""Memory for all that it can compute."""


def request(number: int, at_s: float, prompt: int = 4, output: int = 40) -> Arrival:
    params = SamplingParams(max_tokens=output, seed=number, ignore_eos=True)
    tokens = tuple((number * 7 + i) % 29 for i in range(prompt))
    return Arrival(Request(RequestId(f"r{number}"), tokens, params, int(at_s * SECOND_NS)))


def arrivals(*phases: tuple[float, float, float], prompt: int = 4, output: int = 40):
    """Steady arrivals in phases of (from, until, per second)."""
    times = [
        start + index / rate
        for start, stop, rate in phases
        for index in range(int((stop - start) * rate))
    ]
    return tuple(request(n, at, prompt, output) for n, at in enumerate(sorted(times)))


def scenario(
    *given: Arrival,
    policy: PolicyName = PolicyName.KUNSERVE,
    instances: int = 2,
    faults: Iterable[Fault] = (),
    instance: SimInstanceConfig = INSTANCE,
    **config: object,
) -> Scenario:
    controller = ControllerConfig(
        num_instances=instances,
        num_layers=instance.num_layers,
        block_size=BLOCK,
        max_model_len=MAX_LEN,
        max_num_queued_reqs=1000,
        part_pages=tuple(instance.part_pages.items()),
        slot_pages=instance.slots(instances).slot_pages,
        blocks_per_page=instance.blocks_per_page,
        page_bytes=256,
        answer_timeout_ns=2 * SECOND_NS,
        long_timeout_ns=4 * SECOND_NS,
        policy=policy,
    )
    return Scenario(
        controller=replace(controller, **config),  # type: ignore[arg-type]
        instance=instance,
        delays=Delays(link=SpanNs(100_000, 100_000), load=SpanNs(SECOND_NS // 2, SECOND_NS // 2)),
        arrivals=given,
        faults=tuple(faults),
    )


def run(given: Scenario) -> tuple[World, Outcome]:
    world = World(given, Random(1))
    return world, world.run()


def notes(world: World) -> list[object]:
    return [e.note for _, e in world.trace if isinstance(e, NoteDecision)]


def verdicts(world: World) -> list[tuple[str, Verdict]]:
    return [(n.kind, n.verdict) for n in notes(world) if isinstance(n, Decision)]


def transitions(world: World) -> list[TransitionRecord]:
    records = [e.record for _, e in world.trace if isinstance(e, LogTransition)]
    return [record for record in records if record.outcome != "commit"]


def what_happened(world: World) -> list[object]:
    """All events and commands but the decisions that were noted, with their times."""
    return [(at, e) for at, e in world.trace if not isinstance(e, NoteDecision)]


CALM = arrivals((1.0, 8.0, 4.0))
BURST = arrivals((1.0, 3.0, 4.0), (3.0, 6.0, 18.0), (6.0, 9.0, 4.0))
LONG_PROMPTS = arrivals((1.0, 3.0, 2.0), (3.0, 4.5, 110.0), prompt=28, output=2)


def test_a_burst_is_answered_by_one_drop_and_one_restore():
    world, outcome = run(scenario(*BURST))
    assert outcome.finished == len(BURST)
    assert [record.kind for record in transitions(world)] == ["merge", "split"]
    assert [record.outcome for record in transitions(world)] == ["done", "done"]
    assert ("drop", Verdict.ACT) in verdicts(world)
    assert ("restore", Verdict.ACT) in verdicts(world)
    assert all(len(group.stages) == 1 for group in world.controller.layout.groups)


def test_the_drop_pays():
    def waited(policy: PolicyName) -> float:
        world, _ = run(scenario(*BURST, policy=policy))
        return sum(first - at for at, first in first_tokens(world)) / SECOND_NS

    assert waited(PolicyName.KUNSERVE) < waited(PolicyName.RECOMPUTE) / 3


def first_tokens(world: World) -> list[tuple[int, int]]:
    """(arrival, first token) of every request."""
    from_name = {}
    for at, entry in world.trace:
        name = getattr(entry, "request_id", None)
        if type(entry).__name__ == "DeliverTokens" and name not in from_name:
            from_name[name] = at
    arrived = {a.request.id: a.request.arrival_ns for a in BURST}
    return [(arrived[name], at) for name, at in from_name.items()]


@pytest.mark.parametrize(
    ("load", "instance"),
    [(CALM, INSTANCE), (LONG_PROMPTS, ROOMY)],
    ids=["calm", "compute-bound"],
)
def test_where_it_does_not_pay_all_decisions_are_those_without_it(
    load: tuple[Arrival, ...], instance: SimInstanceConfig
):
    world, outcome = run(scenario(*load, instance=instance))
    without, _ = run(scenario(*load, instance=instance, may_drop=False))
    assert outcome.finished == len(load)
    assert transitions(world) == []
    assert what_happened(world) == what_happened(without)


def test_a_compute_bound_burst_is_seen_and_left_alone():
    """It is overload: requests queue. The verdicts say why nothing is dropped."""
    world, _ = run(scenario(*LONG_PROMPTS, instance=ROOMY))
    assert verdicts(world)
    assert {verdict for _, verdict in verdicts(world)} <= {Verdict.COMPUTE_BOUND, Verdict.NO_GAIN}


def test_observe_decides_and_never_acts():
    world, _ = run(scenario(*BURST, policy=PolicyName.OBSERVE))
    without, _ = run(scenario(*BURST, policy=PolicyName.RECOMPUTE))
    assert ("drop", Verdict.WOULD_ACT) in verdicts(world)
    assert what_happened(world) == what_happened(without)


def test_the_kill_switch_is_recompute():
    world, _ = run(scenario(*BURST, may_drop=False))
    without, _ = run(scenario(*BURST, policy=PolicyName.RECOMPUTE))
    assert what_happened(world) == what_happened(without)


def test_without_restore_the_layout_stays():
    world, _ = run(scenario(*BURST, may_restore=False))
    assert [record.kind for record in transitions(world)] == ["merge"]


def test_the_papers_trigger_looks_at_memory_alone():
    world, _ = run(scenario(*LONG_PROMPTS, instance=ROOMY, trigger=Trigger.MEMORY_ONLY))
    assert "merge" in [record.kind for record in transitions(world)]


def test_every_wait_that_was_predicted_is_compared_with_what_came_true():
    world, _ = run(scenario(*BURST))
    acted = [n for n in notes(world) if isinstance(n, Decision) and n.verdict is Verdict.ACT]
    queued = [n for n in acted if n.kind == "drop" and n.queued]
    realised = [n for n in notes(world) if isinstance(n, Realised)]
    assert [n.number for n in realised] == [n.number for n in queued]
    assert all(n.requests > 0 and n.realised_ns >= 0 for n in realised)


def test_a_shortage_that_no_drop_can_mend_is_said_once_and_taken_back():
    flood = arrivals((1.0, 4.0, 60.0))
    world, outcome = run(scenario(*flood))
    said = [n for n in notes(world) if isinstance(n, Shortage)]
    assert outcome.finished == len(flood)
    assert said[0].instances_wanted >= 1
    assert len(said) < 8


def test_static_pipelines_are_formed_at_the_start_and_stay():
    world, outcome = run(scenario(*BURST, policy=PolicyName.STATIC_PP, instances=4))
    assert outcome.finished == len(BURST)
    assert [record.kind for record in transitions(world)] == ["merge", "merge"]
    groups = {frozenset(group.instances) for group in world.controller.layout.groups}
    assert groups == {frozenset({0, 1}), frozenset({2, 3})}


def test_a_static_pipeline_is_formed_again_after_a_death():
    crash = Crash(4 * SECOND_NS, InstanceId(1))
    world, outcome = run(scenario(*BURST, policy=PolicyName.STATIC_PP, faults=[crash]))
    assert outcome.finished == len(BURST)
    assert [len(group.stages) for group in world.controller.layout.groups] == [2]


def test_a_member_of_an_automatic_group_may_die():
    for at_ms in (3_100, 4_000, 5_500):
        crash = Crash(at_ms * MILLISECOND_NS, InstanceId(at_ms // 100 % 2))
        _, outcome = run(scenario(*BURST, faults=[crash]))
        assert outcome.finished == len(BURST)


def long_answers_on_two() -> tuple[Arrival, ...]:
    """A few long answers, so that their length is known; then many requests at once, which go
    round: those of instances 0 and 1 have long answers and fill two instances, the others' are over
    at once."""
    known = [request(number, 1.0 + number / 5, 4, 56) for number in range(10)]
    wave = [request(10 + n, 5.0 + n / 1e6, 4, 56 if n % 4 < 2 else 1) for n in range(16)]
    return (*known, *wave)


def test_overload_on_two_of_four_merges_these_two_and_pauses_nobody_else():
    world, outcome = run(scenario(*long_answers_on_two(), instances=4))
    assert outcome.finished == 26
    assert [record.kind for record in transitions(world)] == ["merge", "split"]
    fences = [entry for _, entry in world.trace if isinstance(entry, Fence)]
    assert {fence.instance for fence in fences} == {0, 1}
