"""Drop plans carried out: the layout planner can make every merge that is planned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kunserve.core.errors import LayoutError
from kunserve.core.ids import Epoch, GroupId, InstanceId
from kunserve.core.layout import Group, Layout, Part, PartKind, whole_instance
from kunserve.policy.cost_model import CostModel
from kunserve.policy.drop_plan import GroupDemand, plan_drop
from kunserve.policy.planner import ClusterShape, PlannedTransition, TransitionKind, next_step

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True, database=None)
COST = CostModel(alpha_ns=0.0, delta_ns=0.0, beta_ns=0.0, gamma_ns=1e7, head_gamma_ns=2e6)
BLOCKS_PER_PAGE = 4


class Case(NamedTuple):
    shape: ClusterShape
    copy_blocks: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Up to 8 instances of one size that hold a small model and at least a page of KV per layer."""
    num_layers = draw(st.integers(4, 12))
    parts = {Part(PartKind.EMBEDDING): draw(st.integers(1, 12))}
    parts |= {Part(PartKind.LAYER, n): draw(st.integers(1, 6)) for n in range(num_layers)}
    model_pages = sum(parts.values())
    pages = model_pages + num_layers * draw(st.integers(1, 5))
    shape = ClusterShape(
        num_layers=num_layers,
        part_pages=parts,
        pages={InstanceId(n): pages for n in range(draw(st.integers(2, 8)))},
        slot_pages=1000,
        blocks_per_page=BLOCKS_PER_PAGE,
    )
    return Case(shape, max(1, model_pages * BLOCKS_PER_PAGE // num_layers))


def wholes(shape: ClusterShape) -> list[Group]:
    return [
        whole_instance(GroupId(int(instance)), Epoch(0), instance, shape.num_layers)
        for instance in shape.pages
    ]


def demands(shape: ClusterShape, groups: Sequence[Group], data: st.DataObject) -> list[GroupDemand]:
    """A snapshot: every group asks for up to three times what it has."""
    shares = data.draw(st.lists(st.integers(0, 12), min_size=len(groups), max_size=len(groups)))
    found = []
    for group, quarters in zip(groups, shares, strict=True):
        capacity = shape.capacity_blocks(group.stages)
        found.append(GroupDemand(group.id, group.instances, 0, capacity, capacity * quarters // 4))
    return found


def steps_to(
    shape: ClusterShape, sources: Sequence[Group], next_id: int
) -> tuple[list[PlannedTransition], Group]:
    """What the planner makes of a merge: whole instances by drops alone; other groups too, or they
    become whole first. And the group that it ends in."""
    wish = (tuple(sorted(instance for group in sources for instance in group.instances)),)
    groups, done = list(sources), []
    while (step := next_step(shape, groups, wish, COST)) is not None:
        assert len(done) < 2 * len(sources), "no end"
        for transition in step.transitions:
            done.append(transition)
            assert set(transition.sources) <= set(groups)
            groups = [group for group in groups if group not in transition.sources]
            for stages in transition.targets:
                next_id += 1
                groups.append(Group(GroupId(next_id), Epoch(next_id), stages))
    (group,) = groups
    assert sorted(group.instances) == list(wish[0])
    return done, group


@given(cases(), st.data())
@SETTINGS
def test_planned_merges_can_be_carried_out_level_after_level(
    case: Case, data: st.DataObject
) -> None:
    shape, copy_blocks = case
    groups = wholes(shape)
    next_id = 100
    for _ in range(3):
        plan = plan_drop(demands(shape, groups, data), copy_blocks, min(16, shape.num_layers))
        for merge in plan.merges:
            sources = [group for group in groups if group.id in merge]
            done, merged = steps_to(shape, sources, next_id)
            if all(len(source.stages) == 1 for source in sources):
                assert [transition.kind for transition in done] == [TransitionKind.MERGE]
            assert done[-1].kind is TransitionKind.MERGE
            check_capacity(case, sources, merged)
            groups = [group for group in groups if group not in sources] + [merged]
            next_id = int(merged.id) + 1
        Layout(shape.num_layers, tuple(groups))
        groups.sort(key=lambda group: min(group.instances))


def check_capacity(case: Case, sources: Sequence[Group], merged: Group) -> None:
    """The plan counts what an ideal split gives; the real one is cut between layers and balanced,
    and has no more. The margin: pages that do not divide into layers."""
    shape, copy_blocks = case
    pooled = sum(shape.capacity_blocks(source.stages) for source in sources)
    planned = pooled + (len(sources) - 1) * copy_blocks
    members = len(merged.instances)
    assert shape.capacity_blocks(merged.stages) > 0
    if members == len(sources):  # of wholes; other sources have lost by their own splits
        rounding = 2 * members * BLOCKS_PER_PAGE
        assert shape.capacity_blocks(merged.stages) <= planned + rounding


def test_a_group_larger_than_the_model_is_refused_by_the_planner() -> None:
    """So `max_group_size` must not exceed the number of layers."""
    parts = {Part(PartKind.EMBEDDING): 1} | {Part(PartKind.LAYER, n): 1 for n in range(2)}
    shape = ClusterShape(2, parts, {InstanceId(n): 5 for n in range(3)}, 100, BLOCKS_PER_PAGE)
    groups = [GroupDemand(g.id, g.instances, 0, 4, 100) for g in wholes(shape)]
    (merge,) = plan_drop(groups, 6).merges
    with pytest.raises(LayoutError, match="a group of 3 instances is too large"):
        steps_to(shape, [group for group in wholes(shape) if group.id in merge], 100)
    (merge,) = plan_drop(groups, 6, max_group_size=shape.num_layers).merges
    assert len(merge) == 2
