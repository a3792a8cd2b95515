"""Who merges with whom, so that demand fits: the drop plan (paper section 4, mechanism 2).

The paper keeps all groups in one heap and merges the two smallest until enough memory is freed.
Here links exist only inside a partner domain, and a merge helps only those who take part. So each
domain with an overloaded group is planned by itself, in two steps, with one copy of the model = 6:

    free after demand    a: -7    b: -2    c: +1    d: +2    e: 0

1. who   a and b, and the fewest partners with which they would fit as one group: d.
         -7 - 2 + 2 + 2 copies = 5. c and e are not even paused.
2. how   the first that is short with its best partner, under the smallest limit on a group's size
         under which all of them fit: (a b d).

1. Two sets that merge have at least the room that both have apart, and one more copy; so what fits
   in any sets fits in one, and the fewest instances are those of the cheapest set with enough room:
   a knapsack over numbers of instances, at most 16.
2. The paper's heap. A short group merges with the partner that makes the smallest group in which
   both have room, of those with the least to spare; where none does, with the one that leaves least
   lacking, and it is its turn again later. Fewer instances are fewer stages, and less latency.

What holds where every merge frees something and `max_group_size` is no less than the instances of a
domain: no plan leaves fewer blocks lacking; none that leaves as few touches fewer instances. That
the largest group is as small as it can be is a heuristic: in 39 of 2,700 random domains of 6 to 8
groups it was not (1.4 %). A lower `max_group_size` makes heuristics of all three: under 4, in 12 of
750 domains of 7 or 8 whole instances another plan left fewer blocks lacking, in 9 as few with fewer
instances.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from heapq import heapify, heappop, heappush
from itertools import chain
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
        after = planner.plan(before)
        merges += sorted(tuple(sorted(u.groups)) for u in after if len(u.groups) > 1)
        freed_blocks += sum(gains[u.size] for u in after) - sum(gains[u.size] for u in before)
        lacking_blocks += planner.lacking_blocks(after)
    return DropPlan(tuple(merges), freed_blocks, lacking_blocks)


def _gains(merged_gain_blocks: int | Callable[[int], int], most: int) -> list[int]:
    """By number of instances, 0 to `most`: blocks beyond those of so many wholes."""
    if callable(merged_gain_blocks):
        return [0, *(merged_gain_blocks(size) for size in range(1, most + 1))]
    return [0, *(merged_gain_blocks * (size - 1) for size in range(1, most + 1))]


class _United(NamedTuple):
    """Groups as one, in the order of their room. `wholes_blocks`: what is free after demand if all
    instances were whole, which adds up when groups merge."""

    wholes_blocks: int
    groups: tuple[GroupId, ...]
    size: int


def _wholes(group: GroupDemand, gains: Sequence[int]) -> _United:
    size = len(group.instances)
    free_blocks = group.capacity_blocks - group.demand_blocks
    return _United(free_blocks - gains[size], (group.group,), size)


def _unite(one: _United, other: _United) -> _United:
    wholes_blocks = one.wholes_blocks + other.wholes_blocks
    return _United(wholes_blocks, one.groups + other.groups, one.size + other.size)


def _totals(sets: Sequence[_United]) -> tuple[int, int]:
    """Free after demand if all instances were whole, and how many these are."""
    return sum(united.wholes_blocks for united in sets), sum(united.size for united in sets)


class _Order(Enum):
    """Whose turn it is to merge. The first leaves less lacking where not all can fit, the second
    makes smaller groups where all can; neither is best for all, so that both are tried."""

    NEEDIEST = 1
    LARGEST = 2
    """What has been merged and is still short; of equally large ones the neediest."""


_ORDERS = tuple(_Order)


class _DomainPlanner:
    """Plans one domain at a time; `gains` as `_gains` makes them."""

    def __init__(self, gains: Sequence[int], max_group_size: int) -> None:
        self._gains = gains
        self._max_size = max_group_size

    def room_blocks(self, united: _United) -> int:
        """Free after demand; negative is what it lacks."""
        return united.wholes_blocks + self._gains[united.size]

    def lacking_blocks(self, sets: Iterable[_United]) -> int:
        """Demand without room, over `sets`."""
        return sum(max(0, -self.room_blocks(united)) for united in sets)

    def plan(self, groups: Sequence[_United]) -> list[_United]:
        """All groups of the domain after the merges."""
        short = [group for group in groups if self.room_blocks(group) < 0]
        partners = [group for group in groups if self.room_blocks(group) >= 0]
        partners.sort(key=lambda group: (-group.wholes_blocks, group.groups))
        taken = self._fewest(short, partners)
        while taken is not None:
            merged = self._smallest_groups([*short, *taken])
            left = [partner for partner in partners if partner not in taken]
            if merged is not None:
                return [*merged, *left]
            # `max_group_size` asks for more groups, which free fewer copies.
            taken = (*taken, left[0]) if left else None
        limit = self._max_size
        orders = self._orders(groups, limit)
        tried = [self._merge(groups, limit, order, must_fit=False) for order in orders]
        return min(tried, key=self._cost)

    def _cost(self, sets: Sequence[_United]) -> tuple[int, int, int]:
        """What is lacking, how many instances are paused, the most in one group."""
        merged = [united.size for united in sets if len(united.groups) > 1]
        return self.lacking_blocks(sets), sum(merged), max(merged, default=0)

    # ------------------------------------------------------------ who

    def _fewest(
        self, short: Sequence[_United], partners: Sequence[_United]
    ) -> tuple[_United, ...] | None:
        """Partners with the fewest instances that let `short` fit as one group with them, of
        equally many those with most room; None where even all do not.

        A knapsack: `best[n]` is the most room of partners that have n instances together.
        """
        best: dict[int, tuple[int, tuple[_United, ...]]] = {0: (0, ())}
        for partner in partners:
            for size, (blocks, taken) in list(best.items()):
                more_blocks = blocks + partner.wholes_blocks
                known = best.get(size + partner.size)
                if known is None or known[0] < more_blocks:
                    best[size + partner.size] = (more_blocks, (*taken, partner))
        short_blocks, short_size = _totals(short)
        for size, (blocks, taken) in sorted(best.items()):
            if short_blocks + blocks + self._gains[short_size + size] >= 0:
                return taken
        return None

    # ------------------------------------------------------------ how

    def _smallest_groups(self, chosen: Sequence[_United]) -> list[_United] | None:
        """`chosen` merged so that all have room, the largest group as small as is found; None where
        none within `max_group_size` is."""
        blocks, size = _totals(chosen)
        for limit in range(2, min(size, self._max_size) + 1):
            # The most that groups of so many instances free.
            full, rest = divmod(size, limit)
            if blocks + full * self._gains[limit] + self._gains[rest] < 0:
                continue
            for order in self._orders(chosen, limit):
                merged = self._merge(chosen, limit, order, must_fit=True)
                if not self.lacking_blocks(merged):
                    return merged
        return None

    def _orders(self, groups: Sequence[_United], limit: int) -> Sequence[_Order]:
        """One will do where all that can merge are of one size, or all become one group."""
        is_one = limit == 2 or sum(group.size for group in groups) <= limit
        return _ORDERS[:1] if is_one else _ORDERS

    def _merge(
        self, groups: Sequence[_United], limit: int, order: _Order, must_fit: bool
    ) -> list[_United]:
        """The first short group in `order` with its best partner, until none can be helped; with
        `must_fit`, until one cannot."""
        gains, by_size = self._gains, order is _Order.LARGEST
        pool = _Pool(groups, gains)
        short: list[tuple[int, int, _United]] = []
        for one in groups:
            room_blocks = one.wholes_blocks + gains[one.size]
            if room_blocks < 0:
                short.append((-one.size if by_size else 0, room_blocks, one))
        heapify(short)
        while short:
            one = heappop(short)[-1]
            if not pool.take(one):
                continue  # it became somebody's partner
            partner = pool.take_partner(one, limit)
            if partner is None:
                pool.add(one)
                if must_fit:
                    break
                continue
            united = _unite(one, partner)
            pool.add(united)
            room_blocks = united.wholes_blocks + gains[united.size]
            if room_blocks < 0:
                heappush(short, (-united.size if by_size else 0, room_blocks, united))
        return list(pool)


class _Pool:
    """Sets of groups that may merge, by size and then by room: the best partner is a bisection for
    each size that occurs."""

    def __init__(self, sets: Iterable[_United], gains: Sequence[int]) -> None:
        self._gains = gains
        self._by_size: dict[int, list[_United]] = {}
        for united in sorted(sets):
            self._by_size.setdefault(united.size, []).append(united)
        self._sizes = sorted(self._by_size)

    def __iter__(self) -> Iterator[_United]:
        return chain.from_iterable(self._by_size.values())

    def add(self, united: _United) -> None:
        """Put a set in."""
        alike = self._by_size.get(united.size)
        if alike is None:
            self._by_size[united.size] = [united]
            insort(self._sizes, united.size)
        else:
            insort(alike, united)

    def take(self, united: _United) -> bool:
        """Take a set out. False: it is not in any more."""
        alike = self._by_size[united.size]
        at = bisect_left(alike, united)
        if at == len(alike) or alike[at] is not united:
            return False
        del alike[at]
        return True

    def take_partner(self, one: _United, limit: int) -> _United | None:
        """Take out the best partner of `one`, which is short and not in the pool: the set that
        makes the smallest group with room enough, with the least to spare; else the one that leaves
        least lacking, if that is less than before."""
        wholes_blocks, _, own_size = one
        best: tuple[int, list[_United]] | None = None
        for size in self._sizes:
            if own_size + size > limit:
                break
            alike = self._by_size[size]
            if not alike:
                continue
            enough_blocks = -wholes_blocks - self._gains[own_size + size]
            most_blocks = alike[-1].wholes_blocks
            if most_blocks >= enough_blocks:
                return alike.pop(bisect_left(alike, (enough_blocks,)))
            if best is None or enough_blocks - most_blocks < best[0]:
                best = enough_blocks - most_blocks, alike
        if best is None:
            return None
        lacking_blocks, alike = best
        at = bisect_left(alike, (alike[-1].wholes_blocks,))  # of equal ones the lowest id
        if lacking_blocks >= self._lacking(one) + self._lacking(alike[at]):
            return None
        return alike.pop(at)

    def _lacking(self, united: _United) -> int:
        return max(0, -united.wholes_blocks - self._gains[united.size])
