"""Who merges with whom, so that demand fits: the drop plan (paper section 4.1, mechanism 2).

The paper keeps all groups in one heap and merges the two smallest until the freed memory suffices.
Here links exist only inside a partner domain, and a merge helps only the groups that take part. So
each domain with an overloaded group is planned by itself, in two steps:

    free after demand   a: -7   b: -2   c: +1   d: +9   e: +3        one copy: 5 blocks
    1. who              a, b and the fewest partners that make them fit together: a b d
    2. how              the neediest with its best partner, for the smallest limit on a group's
                        size that lets all of them fit: (a d) is short of nothing, b is: (a b d)

1. A group of the sets A and B together has at least the room that both have apart (one more copy is
   freed), so what fits in any sets fits in one, and the fewest instances are those of the cheapest
   set: a knapsack over its number of instances, at most 16.
2. The heap of the paper: the neediest group is merged with the partner that makes the smallest
   group in which both fit, of those the one with the least to spare; else with the one that has
   most room. Fewer instances in a group are fewer stages, and less latency.

What can be relied on, where merging never loses room and `max_group_size` is no less than the
instances of a domain: no plan leaves fewer blocks lacking; none that leaves as few touches fewer
instances. That the largest group is as small as it can be is a heuristic (docs/decisions.md has the
measured rate). Under a tighter `max_group_size` all three are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from kunserve.core.ids import GroupId, InstanceId
from kunserve.policy.pages import MAX_SLOTS


@dataclass(frozen=True)
class GroupDemand:
    """One group at one moment. `demand_blocks`: its KV in use, and what its queue needs.

    `domain` names the instances that have links to each other.
    """

    group: GroupId
    instances: tuple[InstanceId, ...]
    domain: int
    capacity_blocks: int
    demand_blocks: int

    @property
    def is_overloaded(self) -> bool:
        """More is asked for than there is."""
        return self.demand_blocks > self.capacity_blocks


@dataclass(frozen=True)
class DropPlan:
    """Which groups become one.

    Args:
        merges: sets of two groups or more, each in order of id; in order of domain, then of their
            first group. Groups in none stay as they are and are not even paused.
        freed_blocks: KV that the dropped copies make room for.
        lacking_blocks: demand that is without room all the same. More than 0: those requests are
            left to the fallback (recompute), and more instances are needed.
    """

    merges: tuple[tuple[GroupId, ...], ...]
    freed_blocks: int
    lacking_blocks: int


def plan_drop(
    groups: Sequence[GroupDemand],
    merged_gain_blocks: int | Callable[[int], int],
    max_group_size: int = MAX_SLOTS,
) -> DropPlan:
    """The merges that make room for the demand of overloaded groups and touch nobody else.

    O(N log N) for N groups in domains of at most 16 instances; ties go to the lowest id.

    Args:
        groups: all groups that may merge: no two share an instance.
        merged_gain_blocks: KV blocks of one model copy, which every merge of two groups frees. Or
            a function: what a group of n instances has beyond its n instances as wholes, 0 for
            n = 1.
        max_group_size: most instances of a group.
    """
    domains: dict[int, list[GroupDemand]] = {}
    for group in groups:
        domains.setdefault(group.domain, []).append(group)
    overloaded = sorted({group.domain for group in groups if group.is_overloaded})
    sizes = [sum(len(group.instances) for group in domains[domain]) for domain in overloaded]
    gains = _gains(merged_gain_blocks, max(sizes, default=0))
    planner = _DomainPlanner(gains, max_group_size)
    merges: list[tuple[GroupId, ...]] = []
    freed_blocks = lacking_blocks = 0
    for domain in overloaded:
        before = [_wholes(group, gains) for group in domains[domain]]
        after = planner.plan(sorted(before, key=lambda united: united.groups))
        merges += sorted(united.groups for united in after if len(united.groups) > 1)
        freed_blocks += sum(gains[u.size] for u in after) - sum(gains[u.size] for u in before)
        lacking_blocks += sum(max(0, -planner.room_blocks(united)) for united in after)
    return DropPlan(tuple(merges), freed_blocks, lacking_blocks)


def _gains(merged_gain_blocks: int | Callable[[int], int], most: int) -> list[int]:
    """By number of instances, 0 to `most`: blocks beyond those of so many wholes."""
    if callable(merged_gain_blocks):
        return [0, *(merged_gain_blocks(size) for size in range(1, most + 1))]
    return [0, *(merged_gain_blocks * (size - 1) for size in range(1, most + 1))]


class _United(NamedTuple):
    """Groups as one. `wholes_blocks`: what is free after demand if all instances were whole, which
    adds up when groups merge."""

    groups: tuple[GroupId, ...]
    size: int
    wholes_blocks: int


def _wholes(group: GroupDemand, gains: Sequence[int]) -> _United:
    size = len(group.instances)
    free_blocks = group.capacity_blocks - group.demand_blocks
    return _United((group.group,), size, free_blocks - gains[size])


def _unite(sets: Iterable[_United]) -> _United:
    parts = tuple(sets)
    return _United(
        tuple(sorted(group for part in parts for group in part.groups)),
        sum(part.size for part in parts),
        sum(part.wholes_blocks for part in parts),
    )


class _DomainPlanner:
    """Plans one domain at a time; `gains` as `_gains` makes them."""

    def __init__(self, gains: Sequence[int], max_group_size: int) -> None:
        self._gains = gains
        self._max_size = max_group_size

    def room_blocks(self, united: _United) -> int:
        """Free after demand; negative is what it lacks."""
        return united.wholes_blocks + self._gains[united.size]

    def plan(self, groups: Sequence[_United]) -> list[_United]:
        """All groups of the domain after the merges, as sets; `groups` in order of id."""
        chosen = self._fewest(groups)
        if chosen is not None:
            whole = _unite(chosen)
            for limit in range(2, min(whole.size, self._max_size) + 1):
                if self._may_fit(whole, limit):
                    merged = self._merge(chosen, limit)
                    if all(self.room_blocks(united) >= 0 for united in merged):
                        rest = set(groups).difference(chosen)
                        return [*merged, *rest]
        return self._merge(groups, self._max_size)

    # ------------------------------------------------------------ who

    def _fewest(self, groups: Sequence[_United]) -> list[_United] | None:
        """The overloaded groups and the partners with the fewest instances that let them fit as one
        group, of equally many those with most room; None where even all do not.

        A knapsack: `best[n]` is the most room of partners that have n instances together.
        """
        short = [group for group in groups if self.room_blocks(group) < 0]
        partners = [group for group in groups if self.room_blocks(group) >= 0]
        partners.sort(key=lambda group: -group.wholes_blocks)
        needing = _unite(short)
        best: dict[int, tuple[int, tuple[_United, ...]]] = {0: (0, ())}
        for partner in partners:
            for size, (blocks, taken) in list(best.items()):
                blocks += partner.wholes_blocks
                known = best.get(size + partner.size)
                if known is None or known[0] < blocks:
                    best[size + partner.size] = (blocks, (*taken, partner))
        for size, (blocks, taken) in sorted(best.items()):
            if needing.wholes_blocks + blocks + self._gains[needing.size + size] >= 0:
                return [*short, *taken]
        return None

    # ------------------------------------------------------------ how

    def _may_fit(self, whole: _United, limit: int) -> bool:
        """False where even the most that groups of `limit` instances free is too little."""
        full, rest = divmod(whole.size, limit)
        return whole.wholes_blocks + full * self._gains[limit] + self._gains[rest] >= 0

    def _merge(self, groups: Sequence[_United], limit: int) -> list[_United]:
        """The neediest group with its best partner, until nobody is short or can be helped."""
        sets = list(groups)
        short = [(self.room_blocks(one), one) for one in sets if self.room_blocks(one) < 0]
        heapify(short)
        while short:
            _, neediest = heappop(short)
            if neediest not in sets:
                continue  # it became somebody's partner
            partner = self._best_partner(neediest, sets, limit)
            if partner is None:
                continue
            sets.remove(neediest)
            sets.remove(partner)
            united = _unite((neediest, partner))
            sets.append(united)
            if self.room_blocks(united) < 0:
                heappush(short, (self.room_blocks(united), united))
        return sets

    def _best_partner(self, one: _United, sets: Sequence[_United], limit: int) -> _United | None:
        """Of those within the limit that leave less lacking than before, the one that makes the
        smallest group with room enough, with the least to spare; else the one with most room."""
        best: tuple[tuple[int, ...], tuple[GroupId, ...], _United] | None = None
        gains, lacking = self._gains, -self.room_blocks(one)
        for other in sets:
            size = one.size + other.size
            if size > limit or other is one:
                continue
            room = one.wholes_blocks + other.wholes_blocks + gains[size]
            if room >= 0:
                rank = (0, size, room)
            elif -room < lacking + max(0, -self.room_blocks(other)):
                rank = (1, -room, size)
            else:
                continue
            if best is None or (rank, other.groups) < best[:2]:
                best = (rank, other.groups, other)
        return best[2] if best else None
