"""What moves where, and that credit always suffices: by example, and by carrying plans out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kunserve.core.ids import BlockId, Epoch, GroupId, InstanceId, RequestId
from kunserve.core.layout import Group, LayerRange, Stage, whole_instance
from kunserve.core.memory import KvExtent, PageRun, pages_of
from kunserve.core.transition import PageMove
from kunserve.policy.exchange import (
    ExchangeError,
    ExchangePlan,
    Member,
    MoveKey,
    SplitMember,
    Tenant,
    full_blocks,
    home_pages,
    interleaved,
    pages_of_home,
    plan_exchange,
    plan_gather,
    still_right,
    used_blocks,
)

ZERO, ONE = InstanceId(0), InstanceId(1)
SLOT_PAGES = 50


def slot(instance: int) -> PageRun:
    return PageRun(instance * SLOT_PAGES, SLOT_PAGES)


def whole(instance: int, num_layers: int = 4) -> Group:
    return whole_instance(GroupId(instance), Epoch(0), InstanceId(instance), num_layers)


def stages(*bounds: int) -> tuple[Stage, ...]:
    """Instance i has layers [bounds[i - 1], bounds[i])."""
    starts = (0, *bounds[:-1])
    return tuple(
        Stage(InstanceId(i), LayerRange(start, stop))
        for i, (start, stop) in enumerate(zip(starts, bounds, strict=True))
    )


def extents(layers: Sequence[int], pages: Sequence[int]) -> tuple[KvExtent, ...]:
    """Range pages of each layer, one after the other in physical pages."""
    return tuple(
        KvExtent(layer, page, 100 * layer + index, 1)
        for layer in layers
        for index, page in enumerate(pages)
    )


def blocks(*numbers: int) -> tuple[BlockId, ...]:
    return tuple(BlockId(number) for number in numbers)


def tenant(name: str, source: Group, *numbers: int, target: int = 0) -> Tenant:
    return Tenant(RequestId(name), source, target, blocks(*numbers))


def merge_plan(kv_pages: int = 20, *tenants: Tenant) -> ExchangePlan:
    """Two whole instances of four layers and five pages each, in two stages; two blocks a page."""
    members = [
        Member(InstanceId(i), kv_pages, extents(range(4), range(i * 50, i * 50 + 5)), slot(i))
        for i in range(2)
    ]
    return plan_exchange([stages(2, 4)], members, tenants, blocks_per_page=2)


def test_a_merge_moves_what_lies_at_the_wrong_layers() -> None:
    plan = merge_plan(30, tenant("a", whole(0), 0, 1, 2), tenant("b", whole(1), 100))
    (to_one,) = plan.members[ONE].moves[:1]
    assert [m.page for m in plan.members[ONE].moves] == [0, 1]
    assert [m.page for m in plan.members[ZERO].moves] == [50]
    assert (to_one.layers, to_one.source, to_one.target) == ((2, 3), ZERO, ONE)
    assert to_one.physical_pages == (200, 300)
    assert [m.block_mask for m in plan.members[ONE].moves] == [0b11, 0b01]
    assert plan.members[ZERO].departures == plan.members[ONE].moves
    # Both keep what they have: of their own layers for good, of the others until it is fetched.
    kept = {pages.layer: pages_of(pages.runs) for pages in plan.members[ZERO].kept()}
    assert kept == {0: [0, 1], 1: [0, 1], 2: [0, 1], 3: [0, 1]}
    (target,) = plan.targets
    assert dict(target.pending) == {0: 1, 1: 1, 50: 1}
    assert target.complete == ()
    assert target.num_pages == 15  # 30 pages over two layers


def test_the_shortest_request_goes_first_and_shared_pages_once() -> None:
    plan = merge_plan(
        30, tenant("long", whole(0), 0, 1, 2, 3, 4), tenant("short", whole(0), 0, 1, 6)
    )
    assert [m.page for m in plan.members[ONE].moves] == [0, 3, 1, 2]


def test_pages_without_content_are_not_moved() -> None:
    plan = merge_plan(30)
    assert plan.num_moves == 0
    (target,) = plan.targets
    assert (len(target.fresh), target.later, target.pending) == (15, (), ())
    assert set(target.fresh) == {*range(8), *range(50, 57)}


def test_escrow_is_not_given_to_fresh_pages() -> None:
    plan = merge_plan(20, *(tenant(f"t{i}", whole(0), 2 * i) for i in range(4)))
    (target,) = plan.targets
    # Instance 1: 4 arrivals of two layers, two pages of escrow; instance 0 keeps 8 and sends 8.
    assert plan.members[ONE].escrow_pages == 2
    assert (len(target.fresh), len(target.later)) == (2, 4)
    assert len(target.all_pages) >= 1
    assert sum(run.count for run in target.all_pages) == target.num_pages == 10


def test_a_member_without_pages_is_an_error() -> None:
    with pytest.raises(ExchangeError, match="instance 0 lacks pages"):
        merge_plan(9, *(tenant(f"t{i}", whole(0), 2 * i) for i in range(5)))


def ring() -> Group:
    return Group(GroupId(0), Epoch(1), stages(2, 4))


def split_members() -> list[Member]:
    pages = (0, 1, 50, 51)
    return [
        Member(ZERO, 24, extents((0, 1), pages), slot(0)),
        Member(ONE, 24, extents((2, 3), pages), slot(1)),
    ]


SPLIT = [(Stage(ZERO, LayerRange(0, 4)),), (Stage(ONE, LayerRange(0, 4)),)]


def test_what_was_gathered_is_not_moved_again_unless_it_changed() -> None:
    tenants = [
        tenant("a", ring(), 0, 1, 2, target=0),
        tenant("b", ring(), 100, 101, target=1),
    ]
    gathered = plan_gather(SPLIT, split_members(), tenants, 2)
    assert [(m.page, m.source, m.target, m.block_mask) for m in gathered] == [
        (50, ZERO, ONE, 0b11),
        (0, ONE, ZERO, 0b11),
        (1, ONE, ZERO, 0b01),
    ]
    right = still_right(gathered, blocks(1), 2)
    assert right[MoveKey(0, (2, 3), ONE, ZERO)] == 0b01
    plan = plan_exchange(SPLIT, split_members(), tenants, 2, right)
    (move,) = plan.members[ZERO].moves
    assert (move.page, move.block_mask) == (0, 0b10)
    assert plan.members[ONE].moves == []
    # The gathered page is there already: no credit is needed.
    assert plan.members[ZERO].escrow_pages == plan.members[ZERO].arriving_pages == 0
    assert [target.complete for target in plan.targets] == [(1,), (50,)]


def test_a_page_of_two_homes_is_an_error() -> None:
    tenants = [tenant("a", ring(), 0, target=0), tenant("b", ring(), 1, target=1)]
    with pytest.raises(ExchangeError, match="page 0 holds blocks of two"):
        plan_exchange(SPLIT, split_members(), tenants, 2)


# ---------------------------------------------------------------- credit


def carry_out(
    plan: ExchangePlan, members: Sequence[Member], targets: Sequence[Sequence[Stage]], rng: Random
) -> None:
    """Pull in a random order of members, each in the order of its plan, on free pages and escrow
    only; every page that is kept until it is fetched, and all pages counted."""
    free: dict[InstanceId, int] = {}
    for index, group in enumerate(targets):
        for stage in group:
            member = next(m for m in members if m.instance == stage.instance)
            mine = plan.members[stage.instance]
            kept = sum(len(pages) for pages in mine.keep.values())
            fresh = len(plan.targets[index].fresh) * len(stage.layers)
            free[stage.instance] = member.kv_pages - kept - fresh
            assert free[stage.instance] >= mine.escrow_pages
    queues: dict[InstanceId, list[PageMove]] = {
        i: list(p.moves) for i, p in plan.members.items() if p.moves
    }
    mapped: dict[InstanceId, set[tuple[int, int]]] = defaultdict(set)
    for instance, p in plan.members.items():
        mapped[instance] = {(layer, page) for layer, pages in p.keep.items() for page in pages}
    while queues:
        able = [
            i
            for i, queue in queues.items()
            if sum((layer, queue[0].page) not in mapped[i] for layer in queue[0].layers) <= free[i]
        ]
        assert able, "the exchange is stuck"
        instance = rng.choice(able)
        move = queues[instance].pop(0)
        for layer in move.layers:
            assert (layer, move.page) in mapped[move.source], "it left before it was fetched"
            free[instance] -= (layer, move.page) not in mapped[instance]
            mapped[instance].add((layer, move.page))
        for layer in move.layers:
            mapped[move.source].remove((layer, move.page))
            free[move.source] += 1
        if not queues[instance]:
            del queues[instance]
    for index, group in enumerate(targets):
        for stage in group:
            left = free[stage.instance] - len(plan.targets[index].later) * len(stage.layers)
            assert left >= 0


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_every_exchange_ends_on_its_credit(seed: int) -> None:
    """Whole instances merge with as much KV as fits, the cache as full as may be."""
    rng = Random(seed)
    count = rng.randint(2, 5)
    num_layers = rng.randint(count, 9)
    bounds = [*sorted(rng.sample(range(1, num_layers), count - 1)), num_layers]
    layer_pages, kv_pages = rng.randint(1, 6), rng.randint(1, 8)
    total = num_layers * (layer_pages + kv_pages)
    targets = [stages(*bounds)]
    members, tenants = [], []
    for index, stage in enumerate(targets[0]):
        used = list(range(index * SLOT_PAGES, index * SLOT_PAGES + kv_pages))
        then = total - len(stage.layers) * layer_pages
        members.append(
            Member(InstanceId(index), then, extents(range(num_layers), used), slot(index))
        )
        for page in used:
            if rng.random() < 0.9:
                name = f"r{index}.{page}"
                tenants.append(tenant(name, whole(index, num_layers), page * 2))
    try:
        plan = plan_exchange(targets, members, tenants, 2)
    except ExchangeError:
        return
    carry_out(plan, members, targets, rng)


# ---------------------------------------------------------------- homes


def test_pages_of_several_slots_by_turns() -> None:
    assert list(interleaved([PageRun(0, 3), PageRun(10, 1)])) == [0, 10, 1, 2]
    assert pages_of_home([slot(0), slot(1)], 3) == (PageRun(0, 2), PageRun(50, 1))


@settings(max_examples=100, deadline=None)
@given(
    pages=st.lists(st.integers(0, 60), min_size=2, max_size=4),
    num_layers=st.integers(4, 8),
    gather=st.booleans(),
)
def test_homes_leave_room_for_parts_and_copies(
    pages: list[int], num_layers: int, gather: bool
) -> None:
    bounds = [*range(1, len(pages)), num_layers]
    members = [
        SplitMember(stage.instance, slot(i), stage.layers, LayerRange(0, num_layers), free, 60, i)
        for i, (stage, free) in enumerate(zip(stages(*bounds), pages, strict=True))
    ]
    homes = home_pages(members, len(pages), gather=gather)
    for member in members:
        gained = num_layers - len(member.layers_now)
        copies = homes[member.target] * gained if gather else 0
        assert sum(homes) * len(member.layers_now) + copies <= max(0, member.kv_pages_both)
        assert homes[member.target] * num_layers + gained <= 60


def test_full_and_used_blocks() -> None:
    table = blocks(5, 6, 7)
    assert full_blocks(table, 9, 4) == table[:2]
    assert used_blocks(table, 9, 4) == table
    assert used_blocks(table, 8, 4) == table[:2]
