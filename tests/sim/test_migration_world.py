"""Requests that move between instances in the virtual-time world: many seeds with faults, and every
phase of a migration by example.

A failing seed is shown again by `World(draw_scenario(rng, MIGRATION_LIMITS), rng).run()` with
`rng = Random(seed)`. The laws say that every token is right: stale or misplaced KV changes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest

from kunserve.core.events import (
    Event,
    FormGroup,
    KillInstance,
    LayoutWished,
    LeaseRequest,
    LogMigration,
    RevokeLease,
    WishKind,
)
from kunserve.core.ids import Epoch, GroupId, InstanceId, MigrationId, RequestId
from kunserve.core.migration import (
    ActivateRequest,
    MigrationRecord,
    MigrationRefused,
    OfferBlocks,
    PullBlocks,
    SourceBlocks,
    StopRequest,
    WithdrawRequests,
)
from kunserve.core.policy import PolicyName
from kunserve.core.request import Request, SamplingParams
from kunserve.policy.book import ControllerConfig
from kunserve.policy.cost_model import CostModel
from kunserve.policy.migration import Migration, Phase
from kunserve.policy.scheduler import SchedulerConfig
from kunserve.sim.instance import SimInstanceConfig
from kunserve.sim.laws import FrontFacts, LawBrokenError, Laws
from kunserve.sim.scenario import (
    MIGRATION_LIMITS,
    TRANSITION_LIMITS,
    Arrival,
    Delays,
    Scenario,
    ScenarioLimits,
    draw_scenario,
)
from kunserve.sim.timeline import FOREVER_NS, MILLISECOND_NS, SECOND_NS, SpanNs
from kunserve.sim.world import Outcome, World

CALM_LIMITS = replace(MIGRATION_LIMITS, max_faults=0)
DEADLY_LIMITS = replace(MIGRATION_LIMITS, killer_share=0.03, poison_share=0.03)
LAYOUT_LIMITS = replace(TRANSITION_LIMITS, max_instances=4, migrates=True)


# ---------------------------------------------------------------- many seeds


def run_seed(seed: int, limits: ScenarioLimits) -> tuple[World, Outcome]:
    rng = Random(seed)
    world = World(draw_scenario(rng, limits), rng)
    try:
        return world, world.run()
    except Exception as error:
        error.add_note(f"seed {seed} of {limits}")
        raise


def run_seeds(seeds: range, limits: ScenarioLimits) -> Counter[str]:
    happened: Counter[str] = Counter()
    for seed in seeds:
        world, outcome = run_seed(seed, limits)
        happened.update({f"migration {end}": n for end, n in outcome.migrations.items()})
        happened.update(outcome.transitions)
        happened["redispatched"] += outcome.redispatched
        happened["lost"] += outcome.lost_instances
        happened["deaths"] += sum(stream.deaths for stream in world.laws.streams)
    return happened


def test_requests_move_without_a_trace_in_the_tokens() -> None:
    happened = run_seeds(range(10), CALM_LIMITS)
    assert happened["migration done"] > 5, happened
    assert happened["redispatched"] > 10, happened


def test_the_laws_hold_for_every_seed_with_faults() -> None:
    happened = run_seeds(range(100, 116), MIGRATION_LIMITS)
    counted = ("migration done", "migration cancelled", "redispatched", "lost")
    assert all(happened[what] for what in counted), happened


def test_the_laws_hold_while_layouts_change() -> None:
    happened = run_seeds(range(6), LAYOUT_LIMITS)
    assert all(happened[what] for what in ("migration done", "done", "aborted")), happened


def test_requests_that_end_their_instances_hold_to_the_laws() -> None:
    happened = run_seeds(range(8), DEADLY_LIMITS)
    assert all(happened[what] for what in ("migration done", "deaths")), happened


# ---------------------------------------------------------------- by example

ZERO, ONE = InstanceId(0), InstanceId(1)
NUM_REQUESTS = 8


def make_request(number: int, max_tokens: int) -> Request:
    params = SamplingParams(max_tokens=max_tokens, seed=number, ignore_eos=True)
    return Request(RequestId(f"r{number}"), (5, 6, 7, number), params, arrival_ns=0)


def make_scenario(
    pull_ns: int = 5 * MILLISECOND_NS,
    lengths: tuple[int, ...] = (50, 4),
    requests: int = NUM_REQUESTS,
    kv_pages: int = 8,
) -> Scenario:
    """Two instances with room for 128 tokens each (16 per page). Dispatch takes them by turns, so
    that one gets all long answers and the other one has soon nothing to do. A step lasts 25 ms."""
    instance = SimInstanceConfig(
        scheduler=SchedulerConfig(block_size=4, max_model_len=8 * kv_pages),
        cost_model=CostModel(0.0, 0.0, beta_ns=1e6, gamma_ns=20e6),
        num_layers=6,
        kv_pages=kv_pages,
        blocks_per_page=4,
        layer_pages=3,
        digests=True,
    )
    arrivals = [make_request(n, lengths[n % len(lengths)]) for n in range(requests)]
    return Scenario(
        controller=ControllerConfig(
            num_instances=2,
            num_layers=instance.num_layers,
            block_size=4,
            max_model_len=8 * kv_pages,
            max_num_queued_reqs=100,
            part_pages=tuple(instance.part_pages.items()),
            slot_pages=instance.slots(2).slot_pages,
            blocks_per_page=instance.blocks_per_page,
            page_bytes=256,
            answer_timeout_ns=2 * SECOND_NS,
            long_timeout_ns=4 * SECOND_NS,
            policy=PolicyName.MIGRATE,
        ),
        instance=instance,
        delays=Delays(load=SpanNs(SECOND_NS, SECOND_NS), pull=SpanNs(pull_ns, pull_ns)),
        arrivals=tuple(map(Arrival, arrivals)),
    )


def run(scenario: Scenario, seed: int = 1) -> tuple[World, Outcome]:
    world = World(scenario, Random(seed))
    return world, world.run()


def records(world: World) -> list[MigrationRecord]:
    return [entry.record for _, entry in world.trace if isinstance(entry, LogMigration)]


def test_long_answers_move_to_the_instance_that_has_room() -> None:
    world, outcome = run(make_scenario())
    assert (outcome.finished, outcome.lost_instances) == (NUM_REQUESTS, 0)
    done = [record for record in records(world) if record.outcome == "done"]
    assert done
    assert all((record.source, record.target) == (ZERO, ONE) for record in done)
    for record in done:
        # Two pulls of 5 ms; the request stands still for the second one and what is said around it.
        assert record.stages == 2
        assert 5 * MILLISECOND_NS < record.stopped_ns < 40 * MILLISECOND_NS
        assert record.moved_bytes == record.moved_blocks * 64 * 6
    without, _ = run(
        replace(
            make_scenario(),
            controller=replace(make_scenario().controller, policy=PolicyName.RECOMPUTE),
        )
    )
    assert not records(without)


def test_a_slow_link_takes_more_stages_until_little_is_left() -> None:
    slow_ns = 400 * MILLISECOND_NS  # 16 tokens, or 4 blocks
    world, outcome = run(make_scenario(slow_ns, lengths=(110, 4), kv_pages=16))
    assert outcome.finished == NUM_REQUESTS
    first = records(world)[0]
    assert (first.outcome, first.stages) == ("done", 3)  # as fast as it is copied: no more


def test_what_waits_is_dispatched_anew_where_there_is_room() -> None:
    """The same answers without a need to move what runs: the queue of one goes to the other."""
    world, outcome = run(make_scenario(requests=20))
    assert outcome.finished == 20
    assert outcome.redispatched
    withdrawn = {
        entry.request_id: at_ns for at_ns, entry in world.trace if isinstance(entry, RevokeLease)
    }
    assert len(withdrawn) == outcome.redispatched
    leases = Counter(e.request.id for _, e in world.trace if isinstance(e, LeaseRequest))
    assert all(leases[request_id] > 1 for request_id in withdrawn)


def test_nothing_moves_in_a_calm_cluster() -> None:
    world, _ = run(make_scenario(lengths=(20,), requests=4))
    orders = (OfferBlocks, WithdrawRequests)
    assert not [entry for _, entry in world.trace if isinstance(entry, orders)]


# ---------------------------------------------------------------- every phase, every role

PHASES = [Phase.OFFER, Phase.PULL, Phase.STOP, Phase.REST]


class WatchingWorld(World):
    """Does something once, at the moment when a migration enters a phase."""

    def __init__(self, phase: Phase, strike: Callable[[WatchingWorld, Migration], None]) -> None:
        super().__init__(make_scenario(), Random(1))
        self._awaited = phase
        self._strike_once = strike
        self.struck: Migration | None = None

    def _handle(self, event: Event) -> None:
        super()._handle(event)
        awaited = [m for m in self.controller.migrations if m.phase is self._awaited]
        if awaited and self.struck is None:
            self.struck = awaited[0]
            self._strike_once(self, awaited[0])

    def instance_of(self, migration: Migration, role: str) -> InstanceId:
        return (migration.source if role == "source" else migration.target).instance

    def freeze(self, instance: InstanceId, duration_ns: int) -> None:
        self._processes[instance].instance.freeze(duration_ns)

    def abort(self, request_id: RequestId) -> None:
        self._abort(request_id)

    def refuse(self, migration: Migration, role: str) -> None:
        instance = self.instance_of(migration, role)
        self._handle(MigrationRefused(instance, 0, migration.id, "no"))

    def wish_drop(self) -> None:
        self._wish(LayoutWished(0, WishKind.DROP))

    def hang_pulls(self, instance: InstanceId) -> None:
        self._processes[instance].instance.pump.hang(FOREVER_NS)

    @property
    def record(self) -> MigrationRecord:
        """What became of the migration that was struck."""
        assert self.struck is not None
        (record,) = [r for r in records(self) if r.id == self.struck.id]
        return record


def enter(
    phase: Phase, strike: Callable[[WatchingWorld, Migration], None], finished: int = NUM_REQUESTS
) -> tuple[WatchingWorld, Outcome]:
    world = WatchingWorld(phase, strike)
    outcome = world.run()
    assert world.struck is not None
    assert outcome.finished == finished
    return world, outcome


@pytest.mark.parametrize("role", ["source", "target"])
@pytest.mark.parametrize("phase", PHASES)
def test_each_role_may_die_in_each_phase(phase: Phase, role: str) -> None:
    world, outcome = enter(phase, lambda w, m: w.end_by_itself(w.instance_of(m, role)))
    assert outcome.lost_instances == 1
    assert (world.record.outcome, world.record.moved_bytes == 0) == (
        "cancelled",
        phase in (Phase.OFFER, Phase.PULL),
    )


@pytest.mark.parametrize(
    ("role", "reasons"),
    [
        # Nobody asks the source in REST. Transfers from it go on while it stands still.
        ("source", ["no answer in offer", "no answer in stop", "no answer in stop", ""]),
        # A pull may take four seconds: the request, which runs on, ends before.
        ("target", [*["the request has ended"] * 2, *["no answer in rest"] * 2]),
    ],
)
def test_each_phase_has_a_deadline(role: str, reasons: list[str]) -> None:
    """A pause of three seconds is more than an answer may take."""
    pause_ns = 3 * SECOND_NS
    for phase, reason in zip(PHASES, reasons, strict=True):
        world, outcome = enter(phase, lambda w, m: w.freeze(w.instance_of(m, role), pause_ns))
        assert outcome.lost_instances == 0
        assert world.record.outcome == ("cancelled" if reason else "done")
        assert world.record.reason.startswith(reason)


@pytest.mark.parametrize("role", ["source", "target"])
@pytest.mark.parametrize("phase", PHASES)
def test_after_a_refusal_it_runs_on_at_the_source(phase: Phase, role: str) -> None:
    world, outcome = enter(phase, lambda w, m: w.refuse(m, role))
    assert (outcome.failovers, outcome.lost_instances) == (outcome.redispatched, 0)
    assert (world.record.outcome, world.record.reason[-2:]) == ("cancelled", "no")


@pytest.mark.parametrize("phase", PHASES)
def test_a_client_may_leave_in_each_phase(phase: Phase) -> None:
    world, outcome = enter(phase, lambda w, m: w.abort(m.request_id), NUM_REQUESTS - 1)
    assert outcome.aborted == 1
    assert world.record.outcome == "cancelled"


@pytest.mark.parametrize("phase", PHASES)
def test_a_wish_for_another_layout_ends_it(phase: Phase) -> None:
    world, outcome = enter(phase, lambda w, m: w.wish_drop())
    assert (outcome.granted_wishes, outcome.transitions) == (1, {"done": 1})
    assert (world.record.outcome, world.record.reason) == ("cancelled", "the layout changes")
    assert outcome.lost_instances == 0


@pytest.mark.parametrize("phase", [Phase.PULL, Phase.REST])
def test_a_transfer_that_does_not_end_costs_the_target(phase: Phase) -> None:
    world, outcome = enter(phase, lambda w, m: w.hang_pulls(m.target.instance))
    assert world.record.outcome == "cancelled"
    kills = [entry for _, entry in world.trace if isinstance(entry, KillInstance)]
    assert [kill.instance for kill in kills] == [ONE]
    assert "a transfer of migration" in kills[0].reason
    assert outcome.lost_instances == 1


# ---------------------------------------------------------------- laws that can fail

FACTS = FrontFacts(draining=False, has_given_up=False)
REQUEST = make_request(0, 8)
R0, MIGRATION = REQUEST.id, MigrationId(0)
OFFER = OfferBlocks(ZERO, MIGRATION, GroupId(0), Epoch(0), R0, 0)
PULL = PullBlocks(ONE, MIGRATION, GroupId(1), Epoch(1), ZERO, 2, SourceBlocks(0, (), ()))
STOP = StopRequest(ZERO, MIGRATION, GroupId(0), Epoch(0), 0)
ACTIVATE = ActivateRequest(ONE, MIGRATION, GroupId(1), Epoch(1), REQUEST, 3)


@pytest.mark.parametrize(
    ("legal", "illegal"),
    [
        ([OFFER, PULL], ACTIVATE),
        ([OFFER, PULL, STOP], replace(ACTIVATE, epoch=Epoch(0))),
        ([OFFER, PULL, STOP], replace(ACTIVATE, computed_tokens=4)),
        ([OFFER, PULL, STOP], replace(ACTIVATE, request=replace(REQUEST, output_token_ids=(1,)))),
        ([OFFER, PULL, STOP, ACTIVATE], ACTIVATE),
        ([OFFER, PULL, STOP, ACTIVATE], RevokeLease(ZERO, GroupId(0), Epoch(0), R0)),
        ([OFFER], replace(OFFER, migration=MigrationId(1))),
    ],
)
def test_the_laws_object(
    legal: list[OfferBlocks | PullBlocks], illegal: ActivateRequest | RevokeLease
) -> None:
    laws = Laws(64, 10, (), 3, num_layers=4)
    laws.submitted(REQUEST)
    for instance in (ZERO, ONE):
        laws.judge(FormGroup(instance, GroupId(instance), Epoch(instance)), FACTS)
    laws.judge(LeaseRequest(ZERO, GroupId(0), Epoch(0), REQUEST), FACTS)
    for command in legal:
        laws.judge(command, FACTS)
    with pytest.raises(LawBrokenError):
        laws.judge(illegal, FACTS)
