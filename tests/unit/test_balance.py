"""Which requests move, by example, and laws of the rules for any load."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kunserve.core.ids import GroupId, RequestId
from kunserve.policy.balance import (
    LEAST_REMAINING_TOKENS,
    InstanceRoom,
    Relief,
    RunningRequest,
    choose_pairs,
    choose_relief,
    choose_request,
)

FULL = InstanceRoom(
    GroupId(0), total_blocks=100, free_blocks=10, head_blocks=0, queued_blocks=0, num_running=6
)
EMPTY = InstanceRoom(
    GroupId(1), total_blocks=100, free_blocks=90, head_blocks=0, queued_blocks=0, num_running=2
)
BLOCKED = replace(FULL, head_blocks=30, queued_blocks=50)


def request(blocks: int, remaining_tokens: int = 100) -> RunningRequest:
    return RunningRequest(RequestId(f"r{blocks}"), blocks, remaining_tokens)


# ---------------------------------------------------------------- by example


def test_freeness_is_what_each_running_request_may_still_grow_by() -> None:
    assert EMPTY.freeness == 45
    assert BLOCKED.freeness == pytest.approx(-20 / 6)
    assert replace(EMPTY, num_running=0).freeness == 90


def test_the_least_free_gives_to_the_most_free() -> None:
    third = replace(EMPTY, group=GroupId(2), free_blocks=60)
    assert choose_pairs([third, FULL, EMPTY]) == [(FULL, EMPTY)]
    other = replace(FULL, group=GroupId(3), free_blocks=12)
    assert choose_pairs([third, FULL, EMPTY, other]) == [(FULL, EMPTY), (other, third)]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (replace(FULL, free_blocks=40), EMPTY),  # not crowded
        (FULL, replace(EMPTY, free_blocks=29)),  # hardly a difference
        (FULL, replace(EMPTY, queued_blocks=90)),  # it has a queue of its own
    ],
)
def test_a_move_that_wins_little_is_not_made(source: InstanceRoom, target: InstanceRoom) -> None:
    assert choose_pairs([source, target]) == []


def test_a_blocked_queue_needs_no_large_difference() -> None:
    target = replace(EMPTY, free_blocks=20)
    assert choose_pairs([FULL, target]) == []
    assert choose_pairs([BLOCKED, target]) == [(BLOCKED, target)]


def test_the_shortest_moves_for_balance() -> None:
    requests = [request(9), request(4), request(3, LEAST_REMAINING_TOKENS - 1)]
    assert choose_request(FULL, EMPTY, requests) == request(4)
    assert choose_request(FULL, replace(EMPTY, free_blocks=17), requests) is None


def test_for_a_head_of_queue_the_shortest_moves_that_makes_room_for_it() -> None:
    requests = [request(9), request(19), request(24), request(31)]
    assert choose_request(BLOCKED, EMPTY, requests) == request(24)  # 20 are missing
    assert choose_request(BLOCKED, EMPTY, requests[:2]) == request(19)


def test_a_blocked_queue_is_relieved_where_there_is_room_now() -> None:
    assert choose_relief([FULL, EMPTY]) is None
    assert choose_relief([BLOCKED, EMPTY]) == Relief(BLOCKED.group, 87)  # less a reserve
    assert choose_relief([BLOCKED, replace(EMPTY, queued_blocks=88)]) is None
    worse = replace(BLOCKED, group=GroupId(5), free_blocks=3)
    relief = choose_relief([BLOCKED, worse, EMPTY])
    assert relief is not None
    assert relief.group == worse.group


# ---------------------------------------------------------------- laws


@st.composite
def rooms(draw: st.DrawFn) -> InstanceRoom:
    total = draw(st.integers(1, 200))
    head = draw(st.integers(0, 50))
    return InstanceRoom(
        group=GroupId(draw(st.integers(0, 1000))),
        total_blocks=total,
        free_blocks=draw(st.integers(-20, total)),
        head_blocks=head,
        queued_blocks=head + draw(st.integers(0, 50)) * (head > 0),
        num_running=draw(st.integers(0, 30)),
    )


clusters = st.lists(rooms(), min_size=1, max_size=8, unique_by=lambda room: room.group)
running = st.lists(
    st.builds(request, st.integers(1, 60), st.integers(0, 200)),
    max_size=8,
    unique_by=lambda r: r.request_id,
)


@given(clusters)
def test_an_instance_is_in_one_pair_and_gives_to_who_has_more_room(
    cluster: list[InstanceRoom],
) -> None:
    pairs = choose_pairs(cluster)
    named = [room.group for pair in pairs for room in pair]
    assert len(set(named)) == len(named)
    for source, target in pairs:
        assert source.freeness <= target.freeness
        assert source.room_blocks < target.room_blocks


@given(rooms(), rooms(), running)
def test_a_move_brings_two_closer_and_is_never_undone(
    source: InstanceRoom, target: InstanceRoom, requests: list[RunningRequest]
) -> None:
    chosen = choose_request(source, target, requests)
    if chosen is None:
        return
    after_source = replace(source, free_blocks=source.free_blocks + chosen.blocks)
    after_target = replace(target, free_blocks=target.free_blocks - chosen.blocks)
    assert after_target.room_blocks >= after_source.room_blocks
    assert after_target.free_blocks >= target.queued_blocks
    assert choose_request(after_target, after_source, [chosen]) is None


@given(clusters)
def test_relief_is_within_the_room_of_another_instance(cluster: list[InstanceRoom]) -> None:
    relief = choose_relief(cluster)
    if relief is not None:
        (source,) = [room for room in cluster if room.group == relief.group]
        assert source.is_blocked
        others = [room for room in cluster if room is not source]
        assert 0 < relief.room_blocks <= max(r.free_blocks - r.queued_blocks for r in others)
