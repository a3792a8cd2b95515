"""Dispatch: the most headroom wins; a cached prefix only decides between equals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kunserve.core.ids import GroupId
from kunserve.policy.dispatcher import GroupSnapshot, PrefixIndex, choose_group
from kunserve.policy.prefix import block_hashes


def group(
    number: int, free: int = 100, queued: int = 0, requests: int = 0, prefix: int = 0
) -> GroupSnapshot:
    return GroupSnapshot(GroupId(number), 100, free, queued, requests, prefix)


def test_the_most_free_memory_wins() -> None:
    assert choose_group([group(0, free=40), group(1, free=90), group(2, free=60)], 1) == 1


def test_queued_demand_counts_as_used() -> None:
    assert choose_group([group(0, free=90, queued=80), group(1, free=40)], 1) == 1


def test_under_overload_the_shortest_queue_wins() -> None:
    groups = [group(0, free=0, queued=300), group(1, free=0, queued=200)]
    assert choose_group(groups, 50) == 1


def test_a_cached_prefix_decides_between_equals() -> None:
    assert choose_group([group(0), group(1, free=98, prefix=3), group(2, prefix=2)], 1) == 1


def test_a_cached_prefix_does_not_outweigh_a_queue() -> None:
    groups = [group(0, free=50), group(1, free=40, prefix=30)]
    assert choose_group(groups, needed_blocks=9) == 0
    assert choose_group(groups, needed_blocks=10) == 1  # the next of a family may follow


def test_a_large_request_goes_where_it_has_room_now() -> None:
    groups = [group(0, free=60), group(1, free=10, prefix=40)]
    assert choose_group(groups, needed_blocks=50) == 0


def test_a_large_request_that_fits_nowhere_does_not_widen_the_margin() -> None:
    groups = [group(0, free=10, queued=20), group(1, free=0, queued=60, prefix=40)]
    assert choose_group(groups, needed_blocks=60) == 0


def test_between_equals_without_a_prefix_the_fewest_requests_then_the_lowest_id() -> None:
    assert choose_group([group(0, requests=2), group(1, requests=1)], 1) == 1
    assert choose_group([group(2), group(1), group(3)], 1) == 1


counts = st.integers(0, 100)
groups_strategy = st.lists(
    st.builds(GroupSnapshot, st.integers(0, 9).map(GroupId), st.just(100), *[counts] * 4),
    min_size=1,
    max_size=5,
    unique_by=lambda snapshot: snapshot.group,
)


@given(groups_strategy, st.integers(1, 100))
def test_no_request_queues_while_a_group_has_room_for_it(
    groups: list[GroupSnapshot], needed: int
) -> None:
    chosen = next(g for g in groups if g.group == choose_group(groups, needed))
    best = max(g.headroom_blocks for g in groups)
    if best >= needed:
        assert chosen.headroom_blocks >= needed
    else:
        assert best - chosen.headroom_blocks <= 2  # the margin of 2 %


# ---------------------------------------------------------------- the prefix index


def test_the_index_knows_the_longest_prefix_that_was_sent() -> None:
    index = PrefixIndex(100)
    index.insert(block_hashes(range(12), 4))
    assert index.prefix_blocks(block_hashes(range(12), 4)) == 3
    assert index.prefix_blocks(block_hashes([*range(8), 99, 99, 99, 99], 4)) == 2
    assert index.prefix_blocks(block_hashes([99, *range(1, 12)], 4)) == 0
    assert index.prefix_blocks(()) == 0


@pytest.mark.parametrize(("capacity", "known"), [(3, 3), (2, 2), (0, 0)])
def test_the_index_is_bounded_and_forgets_ends_before_heads(capacity: int, known: int) -> None:
    index = PrefixIndex(capacity)
    chain = block_hashes(range(12), 4)
    index.insert(chain)
    assert index.prefix_blocks(chain) == known


def test_the_index_forgets_what_was_sent_longest_ago() -> None:
    index = PrefixIndex(3)
    chains = [block_hashes([start] * 4, 4) for start in range(4)]
    for chain in chains[:3]:
        index.insert(chain)
    index.insert(chains[0])  # used again
    index.insert(chains[3])
    assert [index.prefix_blocks(chain) for chain in chains] == [1, 0, 1, 1]
