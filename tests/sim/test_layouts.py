"""Layout changes in the virtual-time world: many seeds with faults, and single cases by example.

A failing seed is shown again by `World(draw_scenario(rng, TRANSITION_LIMITS), rng).run()` with
`rng = Random(seed)`. The laws, not the tests, say that every token is right: a lost, stale or
misplaced page of KV changes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest

from kunserve.core.errors import LayoutError
from kunserve.core.events import (
    AnswerWish,
    Command,
    Event,
    FormGroup,
    InstanceDrainWished,
    LayoutWished,
    LeaseRequest,
    LogTransition,
    WishKind,
)
from kunserve.core.ids import Epoch, GroupId, InstanceId, RequestId, TransitionId
from kunserve.core.layout import Group, LayerRange, Layout, Part, PartKind, Stage
from kunserve.core.request import Request, SamplingParams
from kunserve.core.transition import (
    Adopt,
    AdoptedRequest,
    Fence,
    Finish,
    PartSource,
    Prepare,
    Refused,
    Remap,
    Reset,
    TransitionRecord,
)
from kunserve.policy.book import ControllerConfig, InstanceState
from kunserve.policy.cost_model import CostModel
from kunserve.policy.scheduler import SchedulerConfig
from kunserve.policy.transition import BEFORE_COMMIT, State
from kunserve.sim.faults import FailingPulls, Fault, Freeze, HangingPulls, SlowPulls
from kunserve.sim.instance import SimInstanceConfig
from kunserve.sim.laws import FrontFacts, LawBrokenError, Laws
from kunserve.sim.scenario import (
    TRANSITION_LIMITS,
    Arrival,
    Delays,
    Scenario,
    ScenarioLimits,
    Wish,
    draw_scenario,
)
from kunserve.sim.timeline import FOREVER_NS, MILLISECOND_NS, SECOND_NS, SpanNs
from kunserve.sim.world import Outcome, World

CALM_LIMITS = replace(TRANSITION_LIMITS, max_faults=0)
LARGE_LIMITS = replace(TRANSITION_LIMITS, max_instances=16, min_instances=10)
DEADLY_LIMITS = replace(TRANSITION_LIMITS, killer_share=0.05)
DROP_NS = 1_300 * MILLISECOND_NS
RESTORE_NS = 1_700 * MILLISECOND_NS


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
        happened.update(outcome.transitions)
        happened["commits"] += outcome.commits
        happened["granted"] += outcome.granted_wishes
        happened["lost"] += outcome.lost_instances
        happened["struck pulls"] += outcome.struck_pulls
        happened["deaths"] += sum(stream.deaths for stream in world.laws.streams)
        happened["pulled parts"] += sum(
            source.peer is not None
            for _, entry in world.trace
            if isinstance(entry, Prepare)
            for source in entry.gains
        )
    return happened


@pytest.mark.parametrize("first", range(0, 60, 30))
def test_layouts_change_without_a_trace_in_the_tokens(first: int) -> None:
    happened = run_seeds(range(first, first + 30), CALM_LIMITS)
    assert happened["commits"] > 20
    assert happened["commits"] == happened["done"]
    assert happened["aborted"]
    assert not happened["broken"] + happened["lost"]


@pytest.mark.parametrize("first", range(1000, 1120, 30))
def test_the_laws_hold_for_every_seed_with_faults(first: int) -> None:
    happened = run_seeds(range(first, first + 30), TRANSITION_LIMITS)
    counted = ("commits", "done", "granted", "aborted", "lost", "struck pulls", "pulled parts")
    assert all(happened[what] for what in counted), happened


def test_requests_that_end_their_instances_hold_to_the_laws_for_every_seed() -> None:
    happened = run_seeds(range(3000, 3030), DEADLY_LIMITS)
    assert all(happened[what] for what in ("commits", "done", "broken")), happened
    assert happened["deaths"] > 60


def test_the_laws_hold_in_large_clusters() -> None:
    assert run_seeds(range(2000, 2006), LARGE_LIMITS)["commits"]


# ---------------------------------------------------------------- by example


def make_request(number: int, max_tokens: int = 40, prompt: tuple[int, ...] = (5, 6, 7)) -> Request:
    params = SamplingParams(max_tokens=max_tokens, seed=number, ignore_eos=True)
    return Request(RequestId(f"r{number}"), (*prompt, number % 29), params, arrival_ns=0)


def wished(number: int, groups: str) -> LayoutWished:
    """`groups` as in "01 2": instances 0 and 1 together, 2 by itself."""
    wish = tuple(tuple(InstanceId(int(i)) for i in group) for group in groups.split())
    return LayoutWished(number, WishKind.LAYOUT, wish)


DROP, RESTORE = LayoutWished(0, WishKind.DROP), LayoutWished(1, WishKind.RESTORE)
THERE_AND_BACK: tuple[tuple[int, Wish], ...] = ((DROP_NS, DROP), (RESTORE_NS, RESTORE))


def make_scenario(
    *faults: Fault,
    instances: int = 2,
    requests: int = 6,
    wishes: tuple[tuple[int, Wish], ...] = THERE_AND_BACK,
    instance: SimInstanceConfig | None = None,
) -> Scenario:
    """Instances load in 1 s; a decode step lasts about 25 ms, so 40 tokens a second."""
    instance = instance or make_instance()
    return Scenario(
        controller=ControllerConfig(
            num_instances=instances,
            num_layers=instance.num_layers,
            block_size=4,
            max_model_len=64,
            max_num_queued_reqs=100,
            part_pages=tuple(instance.part_pages.items()),
            slot_pages=instance.slots(instances).slot_pages,
            blocks_per_page=instance.blocks_per_page,
            page_bytes=256,
            answer_timeout_ns=2 * SECOND_NS,
            long_timeout_ns=4 * SECOND_NS,
        ),
        instance=instance,
        delays=Delays(load=SpanNs(SECOND_NS, SECOND_NS)),
        arrivals=tuple(Arrival(make_request(number)) for number in range(requests)),
        faults=faults,
        wishes=wishes,
    )


def make_instance(**changes: object) -> SimInstanceConfig:
    config = SimInstanceConfig(
        scheduler=SchedulerConfig(block_size=4, max_model_len=64),
        cost_model=CostModel(0.0, 0.0, beta_ns=1e6, gamma_ns=20e6),
        num_layers=6,
        kv_pages=8,
        blocks_per_page=4,
        layer_pages=3,
        digests=True,
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def run(scenario: Scenario, seed: int = 1) -> tuple[World, Outcome]:
    world = World(scenario, Random(seed))
    return world, world.run()


def commands(world: World, kind: type[Command] | type[Event]) -> list[Command]:
    return [entry for _, entry in world.trace if isinstance(entry, kind)]  # type: ignore[misc]


def layout(world: World) -> str:
    groups = world.controller.layout.groups
    return " ".join("".join(str(i) for i in sorted(group.instances)) for group in groups)


def answers(world: World) -> list[bool]:
    given = [entry for _, entry in world.trace if isinstance(entry, AnswerWish)]
    return [answer.granted for answer in sorted(given, key=lambda answer: answer.wish)]


def test_two_become_one_and_two_again_while_requests_run() -> None:
    world, outcome = run(make_scenario())
    assert (outcome.finished, outcome.failovers) == (6, 0)
    assert (outcome.commits, outcome.granted_wishes, layout(world)) == (2, 2, "0 1")
    adopted = [entry for _, entry in world.trace if isinstance(entry, Adopt)]
    assert sum(len(order.moves) for order in adopted) > 0
    requests = [request for order in adopted for request in order.requests]
    assert len(requests) == 12  # all six, twice
    assert all(request.computed_tokens > 0 for request in requests)


@pytest.mark.parametrize(
    ("instances", "steps"),
    [
        (4, ["01 23", "0123", "01 23", "0 1 2 3"]),
        (4, ["0123", "0 1 2 3"]),
        (4, ["01 23", "02 13", "03 1 2"]),
        (3, ["012", "0 12", "01 2", "0 1 2"]),
        (8, ["01 23 45 67", "0123 4567", "01234567", "0123 4567", "0 1 2 3 4 5 6 7"]),
    ],
)
def test_layouts_follow_each_other(instances: int, steps: list[str]) -> None:
    wishes = tuple(
        (DROP_NS + number * 200 * MILLISECOND_NS, wished(number, groups))
        for number, groups in enumerate(steps)
    )
    instance = make_instance(num_layers=8 if instances == 8 else 7)
    scenario = make_scenario(
        instances=instances, wishes=wishes, requests=instances, instance=instance
    )
    world, outcome = run(scenario)
    assert answers(world) == [True] * len(steps)
    assert (outcome.finished, outcome.failovers) == (instances, 0)
    assert layout(world) == steps[-1]


def test_sixteen_instances_become_one_group_and_fall_apart() -> None:
    instance = make_instance(num_layers=17, layer_pages=2)
    scenario = make_scenario(instances=16, requests=32, instance=instance)
    world, outcome = run(scenario)
    assert (outcome.finished, outcome.granted_wishes) == (32, 2)
    assert len(world.controller.layout.groups) == 16


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("blocks_per_page", [1, 4])
@pytest.mark.parametrize("layer_pages", [1, 4])  # KV is eight or two times the weights
def test_a_full_cache_is_exchanged(seed: int, blocks_per_page: int, layer_pages: int) -> None:
    """More requests than fit: every page has content, and freed pages are hardly more than the
    escrow."""
    instance = make_instance(
        kv_pages=32 // blocks_per_page, blocks_per_page=blocks_per_page, layer_pages=layer_pages
    )
    _, outcome = run(make_scenario(instance=instance, requests=14), seed)
    assert outcome.finished == 14
    assert outcome.commits


def test_shared_prefixes_move_once_and_are_found_after_a_split() -> None:
    prompt = tuple(range(1, 21))
    scenario = make_scenario()
    late = 2_200 * MILLISECOND_NS
    arrivals = [Arrival(make_request(n, 40, prompt)) for n in range(3)]
    arrivals += [
        Arrival(replace(make_request(n, 30, prompt), arrival_ns=late)) for n in range(3, 6)
    ]
    world, outcome = run(replace(scenario, arrivals=tuple(arrivals)))
    assert (outcome.finished, outcome.commits) == (6, 2)
    loads = [record.load for record in world.controller.groups]
    assert any(load is not None and load.prefix_hits for load in loads)


def test_a_drop_during_a_restore_takes_it_back() -> None:
    wishes = (*THERE_AND_BACK, (RESTORE_NS + 30 * MILLISECOND_NS, replace(DROP, wish=2)))
    world, outcome = run(make_scenario(wishes=wishes))
    assert answers(world) == [True, False, True]
    assert outcome.transitions == {"done": 1, "aborted": 1}
    assert (outcome.finished, layout(world)) == (6, "01")


def test_a_restore_after_one_that_was_taken_back_finds_its_parts() -> None:
    """What the first one brought in is gone again: nobody may be sent to pull it there."""
    restores = [RESTORE_NS + n * 200 * MILLISECOND_NS for n in range(2)]
    wishes: list[tuple[int, Wish]] = [(DROP_NS, DROP)]
    for at_ns in restores:
        wishes.append((at_ns, replace(RESTORE, wish=len(wishes))))
        wishes.append((at_ns + 70 * MILLISECOND_NS, replace(DROP, wish=len(wishes))))
    world, outcome = run(make_scenario(instances=3, requests=3, wishes=tuple(wishes[:-1])))
    prepared = [entry for _, entry in world.trace if isinstance(entry, Prepare) and entry.gains]
    assert len({order.transition for order in prepared}) == len(restores)
    assert outcome.transitions == {"done": 2, "aborted": 1}
    assert (outcome.finished, layout(world)) == (3, "0 1 2")


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        ("0", "missing from the wish"),
        ("01 1", "wished for twice"),
        ("012", "is in no group"),
    ],
)
def test_an_illegal_wish_is_refused_and_changes_nothing(wish: str, reason: str) -> None:
    world, outcome = run(make_scenario(wishes=((DROP_NS, wished(0, wish)),)))
    (answer,) = [entry for _, entry in world.trace if isinstance(entry, AnswerWish)]
    assert not answer.granted
    assert reason in answer.message
    assert outcome.commits == 0


def test_a_disjoint_transition_disturbs_nobody_else() -> None:
    scenario = make_scenario(instances=4, requests=12, wishes=((DROP_NS, wished(0, "01 2 3")),))
    world, outcome = run(scenario)
    assert outcome.commits == 1
    told = {
        entry.instance
        for _, entry in world.trace
        if isinstance(entry, Prepare | Fence | Remap | Adopt | Finish | Reset)
    }
    assert told == {0, 1}


def test_an_instance_of_a_group_is_drained() -> None:
    drain = InstanceDrainWished(1, InstanceId(1))
    world, outcome = run(make_scenario(wishes=((DROP_NS, DROP), (RESTORE_NS, drain))))
    states = [record.state for record in world.controller.instances()]
    assert states == [InstanceState.READY, InstanceState.DRAINED]
    assert (outcome.finished, layout(world)) == (6, "0")


def test_a_long_answer_delays_a_restore_by_no_more_than_its_own_kv() -> None:
    long = make_request(0, max_tokens=60)
    scenario = replace(make_scenario(requests=0), arrivals=(Arrival(long),))
    world, outcome = run(scenario)
    assert outcome.granted_wishes == 2
    granted_ns = max(at_ns for at_ns, entry in world.trace if isinstance(entry, AnswerWish))
    assert granted_ns - RESTORE_NS < 300 * MILLISECOND_NS  # it runs for more than a second
    records = [entry.record for _, entry in world.trace if isinstance(entry, LogTransition)]
    stalls = [stall_ns for record in records for _, stall_ns in record.stalled]
    assert max(stalls, default=0) < 100 * MILLISECOND_NS


# ---------------------------------------------------------------- links


LINK_FAULTS: dict[str, Callable[[int, InstanceId], Fault]] = {
    "slow": lambda at_ns, one: SlowPulls(at_ns, one, SECOND_NS, 50),
    "failing": lambda at_ns, one: FailingPulls(at_ns, one, 60 * MILLISECOND_NS),
    "hanging": lambda at_ns, one: HangingPulls(at_ns, one, 3 * SECOND_NS),
    "endless": lambda at_ns, one: HangingPulls(at_ns, one, FOREVER_NS),
    "frozen": lambda at_ns, one: Freeze(at_ns, one, 3 * SECOND_NS),
}


@pytest.mark.parametrize(
    ("kind", "outcomes"),
    [
        ("slow", {"done"}),
        ("failing", {"done", "broken"}),
        ("hanging", {"done", "broken"}),
        ("endless", {"done", "aborted", "broken"}),
        ("frozen", {"done", "aborted", "broken"}),
    ],
)
def test_bad_links_cost_time_or_a_member_but_no_token(kind: str, outcomes: set[str]) -> None:
    """During a merge and a split, at many moments; pulls are under way at most of them."""
    runs = [
        (at_ms, i) for at_ms in (1_300, 1_305, 1_315, 1_700, 1_720, 1_760, 1_790) for i in (0, 1)
    ]
    happened: Counter[str] = Counter()
    struck = lost = 0
    for at_ms, instance in runs:
        fault = LINK_FAULTS[kind](at_ms * MILLISECOND_NS, InstanceId(instance))
        _, outcome = run(make_scenario(fault))
        assert outcome.finished == 6, fault
        happened.update(outcome.transitions)
        struck += outcome.struck_pulls > 0
        lost += outcome.lost_instances
    assert set(happened) == outcomes, happened
    if kind == "endless":  # nothing else ends such a pull
        assert lost == len(runs)
    else:
        assert lost == happened["broken"]
    if kind != "frozen":  # its transfers go on
        assert struck > len(runs) // 2


# ---------------------------------------------------------------- every state, every role

MERGE_STATES = [State.PREPARE, State.FENCE, State.REMAP, State.ADOPT, State.MOVE, State.FINISH]
SPLIT_STATES = [State.COMPACT, State.PREPARE, State.SNAPSHOT, State.GATHER, *MERGE_STATES[1:]]
# In COMPACT a refusal may be answered with larger homes: see the seeds.
REFUSABLE_STATES = BEFORE_COMMIT - {State.COMPACT}
STEPS = [("merge", s) for s in MERGE_STATES] + [("split", s) for s in SPLIT_STATES]

REFUSABLE_STEPS = [step for step in STEPS if step[1] in REFUSABLE_STATES]


class WatchingWorld(World):
    """Does something once, at the moment when a transition enters a state."""

    def __init__(self, scenario: Scenario, kind: str, state: State, what: str, who: int) -> None:
        super().__init__(scenario, Random(1))
        self._awaited = (kind, state)
        self._what, self._who = what, who
        self.has_struck = False
        self.state_before: tuple[object, ...] = ()
        self.pages_before: dict[InstanceId, frozenset[int]] = {}

    def _handle(self, event: Event) -> None:
        super()._handle(event)
        if not self.has_struck and not self.controller.is_in_transition:
            self.pages_before = self.mapped_pages()
        number, awaited = self._awaited
        states = {self.controller.transition_state(InstanceId(i)) for i in range(3)}
        is_kind = (self._laws.commits >= 1) == (number == "split")
        if awaited in (State.REMAP, State.ADOPT, State.MOVE, State.FINISH):
            is_kind = self._laws.commits == (2 if number == "split" else 1)
        if self.has_struck or awaited not in states or not is_kind:
            return
        self.has_struck = True
        victim = InstanceId(self._who)
        process = self._processes.get(victim)
        assert process is not None
        if self._what == "dies":
            self.end_by_itself(victim)
        elif self._what == "stops":
            process.instance.freeze(FOREVER_NS)
        elif self._what == "pauses":
            process.instance.freeze(3 * SECOND_NS)
        else:
            transition = max(self.controller._coordinator._active)
            self.state_before = self.state_of_serving()
            self._handle(Refused(victim, process.instance.incarnation, transition, "no"))
            assert self.state_of_serving() == self.state_before

    def state_of_serving(self) -> tuple[object, ...]:
        """Groups with their ids, epochs and stages, their leases, and what clients have."""
        leased = {group.id: sorted(group.requests) for group in self.controller.groups}
        delivered = [stream.delivered for stream in self.laws.streams]
        return self.controller.layout, leased, delivered

    def mapped_pages(self) -> dict[InstanceId, frozenset[int]]:
        """Range pages that each instance has behind its KV."""
        return {i: process.instance.mapped_pages() for i, process in self._processes.items()}


def enter(kind: str, state: State, what: str, who: int) -> tuple[WatchingWorld, Outcome]:
    requests = 9 if kind == "merge" else 3  # to gather takes some room
    world = WatchingWorld(make_scenario(instances=3, requests=requests), kind, state, what, who)
    outcome = world.run()
    assert world.has_struck
    assert outcome.finished == requests
    return world, outcome


@pytest.mark.parametrize("who", [0, 1, 2])  # the leader, and the others
@pytest.mark.parametrize(("kind", "state"), STEPS)
def test_each_role_may_die_in_each_state(kind: str, state: State, who: int) -> None:
    _, outcome = enter(kind, state, "dies", who)
    assert outcome.lost_instances == 1
    assert outcome.transitions["aborted" if state in BEFORE_COMMIT else "broken"] == 1


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("what", ["stops", "pauses"])
@pytest.mark.parametrize(("kind", "state"), STEPS)
def test_each_state_has_a_deadline(kind: str, state: State, what: str, who: int) -> None:
    _, outcome = enter(kind, state, what, who)
    ends = outcome.transitions
    if what == "stops":
        assert outcome.lost_instances == 1
        assert ends["aborted" if state in BEFORE_COMMIT else "broken"] == 1
        return
    # Three seconds: what may take long waits for it, the rest turns back, or ends it after COMMIT.
    assert outcome.lost_instances == ends.get("broken", 0) == (state not in BEFORE_COMMIT)
    is_late = (kind, state) == ("merge", State.PREPARE) or state is State.FENCE
    is_late |= state is State.SNAPSHOT and who == 0  # only the leader is asked
    assert ends.get("aborted", 0) == is_late


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize(("kind", "state"), REFUSABLE_STEPS)
def test_a_refusal_before_commit_changes_nothing(kind: str, state: State, who: int) -> None:
    world, outcome = enter(kind, state, "refuses", who)
    assert (outcome.lost_instances, outcome.failovers) == (0, 0)
    assert outcome.transitions == {"done": 1, "aborted": 1} if kind == "split" else {"aborted": 1}
    layout, *_ = world.state_before
    assert world.controller.layout == layout
    assert world.mapped_pages() == world.pages_before


# ---------------------------------------------------------------- laws that can fail

ZERO, ONE = InstanceId(0), InstanceId(1)
GROUP = Group(GroupId(0), Epoch(2), (Stage(ZERO, LayerRange(0, 2)), Stage(ONE, LayerRange(2, 4))))
REQUEST = make_request(3)
T = TransitionId(0)


def committed_laws(*, is_fenced: bool = True) -> Laws:
    """Two whole instances on their way to one group; r3 was leased to instance 0."""
    facts = FrontFacts(draining=False, has_given_up=False)
    laws = Laws(64, 10, (), 3, num_layers=4)
    laws.submitted(REQUEST)
    for group in WHOLE:
        laws.judge(form(group), facts)
    laws.judge(LeaseRequest(ZERO, GroupId(0), Epoch(0), REQUEST), facts)
    if is_fenced:
        for group in WHOLE:
            laws.judge(Fence(group.leader, T, group.id, group.epoch), facts)
        record = TransitionRecord(T, "merge", "", "commit", "", WHOLE, (GROUP,))
        laws.judge(LogTransition(record), facts)
    return laws


def form(group: Group) -> Command:
    return FormGroup(group.leader, group.id, group.epoch)


WHOLE = tuple(
    Group(GroupId(i), Epoch(i), (Stage(InstanceId(i), LayerRange(0, 4)),)) for i in range(2)
)
TWO_WHOLE = Layout(4, WHOLE)
REMAP = Remap(ZERO, T, GROUP, (), (), 0, ())
ADOPT = Adopt(ZERO, T, GROUP.id, GROUP.epoch, (), (AdoptedRequest(REQUEST, 0, ()),))
CALM = FrontFacts(draining=False, has_given_up=False)


@pytest.mark.parametrize(
    ("legal", "illegal"),
    [
        ([], replace(REMAP, instance=InstanceId(2))),
        ([], replace(REMAP, group=replace(GROUP, stages=GROUP.stages[:1]))),
        ([], replace(REMAP, group=replace(GROUP, epoch=Epoch(0), id=GroupId(1)))),
        ([], ADOPT),
        ([REMAP], replace(ADOPT, epoch=Epoch(1))),
        ([REMAP, replace(REMAP, instance=ONE)], replace(ADOPT, instance=ONE)),
        ([REMAP, ADOPT], ADOPT),
        ([REMAP], LeaseRequest(ZERO, GROUP.id, GROUP.epoch, REQUEST)),
        ([REMAP], Fence(ZERO, TransitionId(1), GROUP.id, GROUP.epoch)),
        ([], AnswerWish(7, True, "done")),
    ],
)
def test_the_laws_object(legal: list[Command], illegal: Command) -> None:
    laws = committed_laws()
    for command in legal:
        laws.judge(command, CALM)
    with pytest.raises((LawBrokenError, LayoutError)):
        laws.judge(illegal, CALM)


def test_the_laws_object_to_a_commit_without_fences() -> None:
    laws = committed_laws(is_fenced=False)
    with pytest.raises(LawBrokenError, match="remapped, but not fenced"):
        laws.judge(REMAP, CALM)


@pytest.mark.parametrize(
    "source",
    [
        PartSource(Part(PartKind.LAYER, 1), ONE),
        PartSource(Part(PartKind.EMBEDDING), ONE),
        PartSource(Part(PartKind.LAYER, 2), InstanceId(2)),
    ],
)
def test_the_laws_object_to_a_part_from_somebody_who_does_not_keep_it(source: PartSource) -> None:
    laws = committed_laws()
    for instance in (ZERO, ONE):
        laws.judge(replace(REMAP, instance=instance), CALM)
    held = (PartSource(Part(PartKind.LAYER, 2), ONE), PartSource(Part(PartKind.EMBEDDING), ZERO))
    laws.judge(Prepare(ZERO, TransitionId(1), (ONE,), held), CALM)
    with pytest.raises(LawBrokenError, match="is to come from"):
        laws.judge(Prepare(ZERO, TransitionId(1), (ONE,), (source,)), CALM)


def test_the_laws_object_to_a_wish_that_is_answered_wrongly() -> None:
    laws = committed_laws()
    laws.wished(DROP)
    with pytest.raises(LawBrokenError, match="granted, but the layout"):
        laws.judge(AnswerWish(0, True, "yes"), replace(CALM, layout=TWO_WHOLE))
    with pytest.raises(LawBrokenError, match="answered twice"):
        laws.judge(AnswerWish(0, False, "no"), CALM)
