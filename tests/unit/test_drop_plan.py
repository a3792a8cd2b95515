"""The drop plan by example, against brute force, and its laws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from kunserve.core.ids import GroupId, InstanceId
from kunserve.policy.drop_plan import DropPlan, GroupDemand, plan_drop

SETTINGS = settings(max_examples=100, deadline=None, derandomize=True, database=None)

CAPACITY = 100


def group(number: int, room: int, size: int = 1, domain: int = 0) -> GroupDemand:
    """Group `number` with `room` blocks free after demand; negative: overloaded by as many."""
    instances = tuple(InstanceId(100 * number + index) for index in range(size))
    return GroupDemand(GroupId(number), instances, domain, CAPACITY, CAPACITY - room)


def plan(*room: int, copy: int = 6, limit: int = 16) -> DropPlan:
    """Whole instances of one domain, by what is free after demand."""
    return plan_drop([group(number, blocks) for number, blocks in enumerate(room)], copy, limit)


# ---------------------------------------------------------------- by example


def test_without_overload_nothing_is_planned() -> None:
    assert plan(0, 1, 50) == DropPlan((), freed_blocks=0, lacking_blocks=0)
    assert plan_drop([], 6) == DropPlan((), 0, 0)


def test_the_example_of_the_module() -> None:
    assert plan(-7, -2, 1, 2, 0) == DropPlan(((0, 1, 3),), freed_blocks=12, lacking_blocks=0)


def test_two_overloaded_groups_share_the_copy_that_they_free() -> None:
    assert plan(-3, -3, 50) == DropPlan(((0, 1),), 6, 0)


def test_a_partner_brings_its_own_free_memory() -> None:
    assert plan(-20, 5, 14) == DropPlan(((0, 2),), 6, 0)


def test_of_equal_partners_the_lowest_id_is_taken() -> None:
    assert plan(-3, 9, 9, 9).merges == ((0, 1),)
    assert plan(9, 9, 9, -3).merges == ((0, 3),)


def test_several_small_groups_rather_than_a_large_one() -> None:
    assert plan(-1, -5, -2, -4, 80).merges == ((0, 1), (2, 3))
    assert plan(-8, 2, 2, -8).merges == ((0, 1), (2, 3))


def test_the_fewest_instances_rather_than_the_fewest_groups() -> None:
    small_groups = [group(0, -10), group(1, 4, size=3), group(2, 0), group(3, 0)]
    assert plan_drop(small_groups, 6).merges == ((0, 2, 3),)


def test_domains_do_not_mix() -> None:
    groups = [group(0, -3, domain=7), group(1, 90, domain=2), group(2, 0, domain=7)]
    assert plan_drop(groups, 6).merges == ((0, 2),)
    alone = [group(0, -3, domain=7), group(1, 90, domain=2)]
    assert plan_drop(alone, 6) == DropPlan((), 0, lacking_blocks=3)


def test_domains_are_planned_in_order_of_their_names() -> None:
    groups = [group(0, -3, domain=7), group(1, 3, domain=7), group(5, -3, domain=2)]
    assert plan_drop([*groups, group(4, 3, domain=2)], 6).merges == ((4, 5), (0, 1))


def test_what_cannot_be_freed_is_said() -> None:
    assert plan(-100, 1, 2) == DropPlan(((0, 1, 2),), freed_blocks=12, lacking_blocks=85)


def test_a_partner_that_frees_nothing_is_left_alone() -> None:
    assert plan(-5, 0, 0, copy=0) == DropPlan((), 0, 5)
    assert plan(-5, 0, 2, copy=0) == DropPlan(((0, 2),), 0, 3)


def test_the_size_of_groups_is_limited() -> None:
    assert plan(-15, 0, 0, 0, limit=3) == DropPlan(((0, 1, 2),), 12, 3)
    assert plan(-7, -2, 1, 2, 0, limit=2) == DropPlan(((0, 2), (1, 3)), 12, 0)
    assert plan(-7, 3, limit=1) == DropPlan((), 0, 7)


def test_merged_groups_are_merged_again() -> None:
    pairs = [group(0, -4, size=2), group(1, 0, size=2), group(2, 10, size=4)]
    assert plan_drop(pairs, 6) == DropPlan(((0, 1),), 6, 0)


def test_the_gain_may_depend_on_the_size() -> None:
    def gain_blocks(size: int) -> int:
        return (0, 5, 20)[size - 1]

    groups = [group(0, -12, size=2), group(1, 0)]
    assert plan_drop(groups, gain_blocks) == DropPlan(((0, 1),), 15, 0)


# ---------------------------------------------------------------- against brute force


def partitions(items: list[GroupDemand]) -> Iterator[list[list[GroupDemand]]]:
    """All ways to divide `items` into sets."""
    if not items:
        yield []
        return
    first, *rest = items
    for found in partitions(rest):
        yield [[first], *found]
        for at, members in enumerate(found):
            yield [*found[:at], [first, *members], *found[at + 1 :]]


def room_blocks(sets: Sequence[GroupDemand], copy: int) -> int:
    """Free after demand of `sets` as one group."""
    return sum(g.capacity_blocks - g.demand_blocks for g in sets) + (len(sets) - 1) * copy


def num_instances(members: Sequence[GroupDemand]) -> int:
    return sum(len(member.instances) for member in members)


def cost(sets: Sequence[Sequence[GroupDemand]], copy: int) -> tuple[int, int]:
    """Blocks that are lacking, and instances that are touched."""
    lacking = sum(max(0, -room_blocks(members, copy)) for members in sets)
    return lacking, sum(num_instances(members) for members in sets if len(members) > 1)


def as_sets(groups: Sequence[GroupDemand], found: DropPlan) -> list[list[GroupDemand]]:
    """All groups after the plan."""
    by_id = {one.group: one for one in groups}
    merged = [[by_id.pop(member) for member in members] for members in found.merges]
    return [*merged, *([alone] for alone in by_id.values())]


copies = st.integers(1, 40)


@st.composite
def one_domain(draw: st.DrawFn, most: int) -> list[GroupDemand]:
    """Groups of 1 to 3 instances, some overloaded."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=most))
    return [
        group(number, draw(st.integers(-60, 40)), min(size, 16 // len(sizes)))
        for number, size in enumerate(sizes)
    ]


@given(one_domain(most=6), copies)
@SETTINGS
def test_no_plan_leaves_less_lacking_or_as_little_with_fewer_instances(
    groups: list[GroupDemand], copy: int
) -> None:
    found = cost(as_sets(groups, plan_drop(groups, copy)), copy)
    assert found == min(cost(sets, copy) for sets in partitions(groups))


@given(st.lists(st.integers(-60, 40), min_size=8, max_size=8), copies)
@settings(SETTINGS, max_examples=10)
def test_the_same_of_eight_whole_instances(room: list[int], copy: int) -> None:
    groups = [group(number, blocks) for number, blocks in enumerate(room)]
    found = cost(as_sets(groups, plan_drop(groups, copy)), copy)
    assert found == min(cost(sets, copy) for sets in partitions(groups))


# ---------------------------------------------------------------- laws


@st.composite
def clusters(draw: st.DrawFn) -> list[GroupDemand]:
    """Several domains of up to 16 instances, in any order."""
    groups: list[GroupDemand] = []
    for domain in draw(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True)):
        left = 16
        while left and len(groups) < 40 and draw(st.integers(0, 7)):
            size = draw(st.integers(1, min(4, left)))
            groups.append(group(len(groups), draw(st.integers(-80, 60)), size, domain))
            left -= size
    return draw(st.permutations(groups))


limits = st.integers(1, 16)


@given(clusters(), copies, limits)
@SETTINGS
def test_the_laws_of_a_plan(groups: list[GroupDemand], copy: int, limit: int) -> None:
    found = plan_drop(groups, copy, limit)
    by_id = {one.group: one for one in groups}
    touched = [member for members in found.merges for member in members]
    assert len(touched) == len(set(touched))
    assert set(touched) <= set(by_id)
    for merged in found.merges:
        members = [by_id[member] for member in merged]
        assert len(members) > 1
        assert merged == tuple(sorted(merged))
        assert len({member.domain for member in members}) == 1
        assert num_instances(members) <= limit
        assert any(member.is_overloaded for member in members)
    assert found.freed_blocks == copy * (len(touched) - len(found.merges))
    assert found.lacking_blocks == cost(as_sets(groups, found), copy)[0]
    assert found.lacking_blocks <= cost([[one] for one in groups], copy)[0]


@given(clusters(), copies, limits)
@SETTINGS
def test_the_order_of_the_groups_says_nothing(
    groups: list[GroupDemand], copy: int, limit: int
) -> None:
    found = plan_drop(groups, copy, limit)
    assert plan_drop(sorted(groups, key=lambda one: one.group), copy, limit) == found
    assert plan_drop(groups[::-1], copy, limit) == found


@given(clusters(), copies)
@SETTINGS
def test_after_a_plan_that_suffices_nothing_is_left_to_plan(
    groups: list[GroupDemand], copy: int
) -> None:
    found = plan_drop(groups, copy)
    after = [merged(members, copy) for members in as_sets(groups, found)]
    again = plan_drop(after, copy)
    assert again.lacking_blocks == found.lacking_blocks
    assert again.merges == ()


def merged(members: Sequence[GroupDemand], copy: int) -> GroupDemand:
    """The group that `members` become, with the lowest id of theirs."""
    first = min(members, key=lambda member: member.group)
    return replace(
        first,
        instances=tuple(instance for member in members for instance in member.instances),
        capacity_blocks=sum(m.capacity_blocks for m in members) + (len(members) - 1) * copy,
        demand_blocks=sum(member.demand_blocks for member in members),
    )


@given(clusters(), copies, limits)
@SETTINGS
def test_a_number_is_the_gain_of_every_copy(
    groups: list[GroupDemand], copy: int, limit: int
) -> None:
    assert plan_drop(groups, copy, limit) == plan_drop(groups, lambda n: copy * (n - 1), limit)


@given(clusters(), st.lists(st.integers(-20, 40), min_size=16, max_size=16), limits)
@SETTINGS
def test_a_gain_of_any_shape_is_counted_right(
    groups: list[GroupDemand], more: list[int], limit: int
) -> None:
    """As real splits have it, which give a little more or less than a copy."""

    def gain_blocks(size: int) -> int:
        return sum(more[1:size])

    def room(members: Sequence[GroupDemand]) -> int:
        """As wholes, and then as one group."""
        free = sum(m.capacity_blocks - m.demand_blocks for m in members)
        apart = sum(gain_blocks(len(member.instances)) for member in members)
        return free - apart + gain_blocks(num_instances(members))

    found = plan_drop(groups, gain_blocks, limit)
    sets = as_sets(groups, found)
    assert found.lacking_blocks == sum(max(0, -room(members)) for members in sets)
    assert found.lacking_blocks <= sum(max(0, -room([one])) for one in groups)
    assert all(num_instances(members) <= limit for members in sets if len(members) > 1)
