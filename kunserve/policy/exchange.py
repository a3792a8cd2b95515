"""What moves where when layouts change: pure arithmetic on pages (design section 3).

A range page with content belongs to the target group of the requests whose blocks it holds. For
every layer, the stage that had the layer in the source group has the page; the stage that has it
in the target group needs it:

    page p, merge of A [0, L) and B [0, L) into A [0, m) | B [m, L); p is in A's slot

    layers      0 ............ m ............ L
    before      A              A
    after       A  (stays)     B  (a move A -> B of layers m..L)

**Credit.** A move of n layers costs its target n pages and gives its source n pages back, once the
target has it. Let c be the most pages of one move into a member. If every member has c pages more
than all it must hold in the end, no order of moves can get stuck: take the members D that wait for
credit, each with fewer than c free pages. Each still has more pages to send than to receive. All it
has to send goes to members that still receive, which are in D: so D sends more pages into D than D
receives, which cannot be. These c pages are the escrow; new requests never take them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kunserve.core.errors import KunserveError
from kunserve.core.ids import BlockId, InstanceId, RequestId
from kunserve.core.layout import Group, LayerRange, Stage
from kunserve.core.memory import KvExtent, PageRun, runs_of
from kunserve.core.transition import LayerPages, PageMove


class ExchangeError(KunserveError):
    """The exchange cannot be carried out with the pages that are there; nothing has changed."""


@dataclass(frozen=True)
class Member:
    """An instance as the exchange sees it.

    `kv_pages`: physical pages that are no part's in the target layout. `extents`: where its KV
    lies now. `slot`: range pages of its permanent slot.
    """

    instance: InstanceId
    kv_pages: int
    extents: tuple[KvExtent, ...]
    slot: PageRun


@dataclass(frozen=True)
class Tenant:
    """A request with content: the group it comes from, the target (by index), and its blocks that
    hold computed tokens."""

    request_id: RequestId
    source: Group
    target: int
    blocks: tuple[BlockId, ...]


class MoveKey(NamedTuple):
    """What a move is about, whenever it is made."""

    page: int
    layers: tuple[int, ...]
    source: InstanceId
    target: InstanceId


@dataclass
class MemberPlan:
    """What one member does. `keep`: pages by layer that stay mapped; `cost`: pages that arrivals
    need; `leaving`: pages that departures give back."""

    keep: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    moves: list[PageMove] = field(default_factory=list)
    departures: list[PageMove] = field(default_factory=list)
    staying_pages: int = 0
    leaving_pages: int = 0
    arriving_pages: int = 0
    escrow_pages: int = 0

    def kept(self) -> tuple[LayerPages, ...]:
        """`keep` as a message carries it."""
        return tuple(
            LayerPages(layer, runs_of(pages)) for layer, pages in sorted(self.keep.items()) if pages
        )


@dataclass(frozen=True)
class TargetPlan:
    """One target group's pages. `fresh` have no content and are mapped at REMAP, `later` when the
    exchange is over; `complete` have content that lies right already; `pending`: (page, moves)."""

    fresh: tuple[int, ...]
    later: tuple[int, ...]
    complete: tuple[int, ...]
    pending: tuple[tuple[int, int], ...]

    @property
    def num_pages(self) -> int:
        """Range pages of the group when all is done."""
        return len(self.fresh) + len(self.later) + len(self.complete) + len(self.pending)

    @property
    def all_pages(self) -> tuple[PageRun, ...]:
        """Range pages of the group when all is done."""
        pending = (page for page, _ in self.pending)
        return runs_of((*self.fresh, *self.later, *self.complete, *pending))


@dataclass(frozen=True)
class ExchangePlan:
    """All moves of one transition."""

    members: Mapping[InstanceId, MemberPlan]
    targets: tuple[TargetPlan, ...]

    @property
    def num_moves(self) -> int:
        """Moves in all."""
        return sum(len(plan.moves) for plan in self.members.values())


def plan_exchange(
    targets: Sequence[tuple[Stage, ...]],
    members: Sequence[Member],
    tenants: Sequence[Tenant],
    blocks_per_page: int,
    gathered: Mapping[MoveKey, int] | None = None,
) -> ExchangePlan:
    """Plan the exchange at COMMIT. Tenants come in order of preference among equally short ones.

    Args:
        gathered: block masks that targets hold already, and that are still right.

    Raises:
        ExchangeError: some member lacks pages.
    """
    by_instance = {member.instance: member for member in members}
    plans = {member.instance: MemberPlan() for member in members}
    physical = {member.instance: _page_table(member.extents) for member in members}
    live = _live_pages(tenants, blocks_per_page)
    pending: list[dict[int, int]] = [{} for _ in targets]
    number = 0
    for page, content in live.items():
        for key in _moves_of(page, content.source, targets[content.target]):
            if key.source == key.target:
                _keep(plans[key.target], key)
                continue
            held = (gathered or {}).get(key, 0)
            missing = content.mask & ~held
            if not missing:  # gathered ahead: the source need not keep it
                _keep(plans[key.target], key)
                continue
            pages = tuple(physical[key.source][layer][page] for layer in key.layers)
            move = PageMove(number, page, key.layers, key.source, key.target, pages, missing)
            number += 1
            _add_move(plans, move, is_mapped=bool(held))
            pending[content.target][page] = pending[content.target].get(page, 0) + 1
    target_plans = tuple(
        _plan_target(index, stages, by_instance, plans, live, pending[index])
        for index, stages in enumerate(targets)
    )
    return ExchangePlan(plans, target_plans)


def plan_gather(
    targets: Sequence[tuple[Stage, ...]],
    members: Sequence[Member],
    tenants: Sequence[Tenant],
    blocks_per_page: int,
) -> tuple[PageMove, ...]:
    """Moves ahead of a split, of the blocks of `tenants` (full ones: they never change)."""
    physical = {member.instance: _page_table(member.extents) for member in members}
    moves: list[PageMove] = []
    for page, content in _live_pages(tenants, blocks_per_page).items():
        for key in _moves_of(page, content.source, targets[content.target]):
            if key.source != key.target:
                pages = tuple(physical[key.source][layer][page] for layer in key.layers)
                moves.append(PageMove(len(moves), *key, pages, content.mask))
    return tuple(moves)


# ---------------------------------------------------------------- content of pages


@dataclass
class _Content:
    """A page with content: whose, which blocks of it, and the place of its shortest request."""

    source: Group
    target: int
    mask: int
    rank: int


def _live_pages(tenants: Sequence[Tenant], blocks_per_page: int) -> dict[int, _Content]:
    """Pages with content, those of the shortest requests first."""
    order = sorted(range(len(tenants)), key=lambda i: (len(tenants[i].blocks), i))
    live: dict[int, _Content] = {}
    for rank, index in enumerate(order):
        tenant = tenants[index]
        for block in tenant.blocks:
            page, bit = divmod(block, blocks_per_page)
            content = live.setdefault(page, _Content(tenant.source, tenant.target, 0, rank))
            content.mask |= 1 << bit
            if content.target != tenant.target:
                raise ExchangeError(
                    f"page {page} holds blocks of two target groups; compact before the split"
                )
    return live


def _moves_of(page: int, source: Group, stages: tuple[Stage, ...]) -> Iterator[MoveKey]:
    """Who has the page in the source group, and who needs it, layer range by layer range."""
    for old in source.stages:
        for new in stages:
            layers = _overlap(old.layers, new.layers)
            if layers:
                yield MoveKey(page, layers, old.instance, new.instance)


def _overlap(one: LayerRange, other: LayerRange) -> tuple[int, ...]:
    return tuple(range(max(one.start, other.start), min(one.stop, other.stop)))


def _page_table(extents: Iterable[KvExtent]) -> dict[int, dict[int, int]]:
    """layer -> range page -> physical page."""
    table: dict[int, dict[int, int]] = defaultdict(dict)
    for extent in extents:
        layer = table[extent.layer]
        for offset in range(extent.count):
            layer[extent.range_page + offset] = extent.physical_page + offset
    return table


def _keep(plan: MemberPlan, key: MoveKey) -> None:
    for layer in key.layers:
        plan.keep[layer].add(key.page)
    plan.staying_pages += len(key.layers)


def _add_move(plans: Mapping[InstanceId, MemberPlan], move: PageMove, is_mapped: bool) -> None:
    count = len(move.layers)
    source, target = plans[move.source], plans[move.target]
    for layer in move.layers:
        source.keep[layer].add(move.page)
    source.departures.append(move)
    source.leaving_pages += count
    target.moves.append(move)
    if is_mapped:  # some blocks were gathered: the page is there, and stays
        for layer in move.layers:
            target.keep[layer].add(move.page)
        target.staying_pages += count
    else:
        target.arriving_pages += count
        target.escrow_pages = max(target.escrow_pages, count)


# ---------------------------------------------------------------- pages without content


def _plan_target(
    index: int,
    stages: tuple[Stage, ...],
    members: Mapping[InstanceId, Member],
    plans: Mapping[InstanceId, MemberPlan],
    live: Mapping[int, _Content],
    pending: Mapping[int, int],
) -> TargetPlan:
    now = min(_fresh_now(stage, members, plans) for stage in stages)
    if now < 0:
        short = min(stages, key=lambda stage: _fresh_now(stage, members, plans))
        raise ExchangeError(
            f"instance {short.instance} lacks pages for the exchange; try again when less of the "
            "KVCache is in use"
        )
    # With credit for all arrivals at once the exchange never waits for a page to come free: for
    # that, half of what new requests could have now may come when it is over.
    unhindered = min(_fresh_beside(stage, members, plans) for stage in stages)
    now = min(now, max(unhindered, now // 2))
    last = min(_fresh_last(stage, members, plans) for stage in stages)
    own = {page for page, content in live.items() if content.target == index}
    empty = interleaved(members[stage.instance].slot for stage in stages)
    candidates = [page for page in _first(empty, last + len(own)) if page not in own][:last]
    return TargetPlan(
        fresh=tuple(candidates[:now]),
        later=tuple(candidates[now:]),
        complete=tuple(sorted(own - pending.keys())),
        pending=tuple(pending.items()),
    )


def _fresh_now(
    stage: Stage, members: Mapping[InstanceId, Member], plans: Mapping[InstanceId, MemberPlan]
) -> int:
    """Pages without content that may be mapped before the exchange, escrow kept."""
    plan = plans[stage.instance]
    busiest = max(plan.leaving_pages, plan.arriving_pages)
    left = members[stage.instance].kv_pages - plan.staying_pages - busiest - plan.escrow_pages
    return left // len(stage.layers)


def _fresh_beside(
    stage: Stage, members: Mapping[InstanceId, Member], plans: Mapping[InstanceId, MemberPlan]
) -> int:
    """And of those, as many as fit when all arrivals are mapped before anything has left."""
    plan = plans[stage.instance]
    moving = plan.leaving_pages + plan.arriving_pages + plan.escrow_pages
    return (members[stage.instance].kv_pages - plan.staying_pages - moving) // len(stage.layers)


def _fresh_last(
    stage: Stage, members: Mapping[InstanceId, Member], plans: Mapping[InstanceId, MemberPlan]
) -> int:
    """And when it is over."""
    plan = plans[stage.instance]
    left = members[stage.instance].kv_pages - plan.staying_pages - plan.arriving_pages
    return left // len(stage.layers)


def interleaved(slots: Iterable[PageRun]) -> Iterator[int]:
    """Pages of several slots, lowest first, by turns: tails stay equally long."""
    runs = tuple(slots)
    for index in range(max((run.count for run in runs), default=0)):
        for run in runs:
            if index < run.count:
                yield run.start + index


def _first(pages: Iterator[int], count: int) -> list[int]:
    return [page for _, page in zip(range(count), pages, strict=False)]


# ---------------------------------------------------------------- homes of a split


@dataclass(frozen=True)
class SplitMember:
    """A member of a group that is to be split: layers of its stage now and then, pages that are no
    part's while it holds the parts of both layouts, and in the end."""

    instance: InstanceId
    slot: PageRun
    layers_now: LayerRange
    layers_then: LayerRange
    kv_pages_both: int
    kv_pages_then: int
    target: int


def home_pages(
    members: Sequence[SplitMember], num_targets: int, *, gather: bool
) -> tuple[int, ...]:
    """Most range pages of each home, so that the parts of both layouts fit beside the KV.

    With `gather` there is also room for the copies that are pulled ahead:

        q_x * gained layers of x + (q_1 + ... + q_g) * layers of x now <= pages of x

    which with equal shares is the (2 - 1/g) * use <= 1 of design section 3.
    """
    most = [
        min(_final_pages(member) for member in members if member.target == index)
        for index in range(num_targets)
    ]
    total = sum(most)
    share = 1.0
    for member in members:
        gained = len(member.layers_then) - len(_overlap(member.layers_now, member.layers_then))
        weight = total * len(member.layers_now) + (most[member.target] * gained if gather else 0)
        room_pages = member.kv_pages_both
        if not gather:  # all of it arrives after COMMIT, and that takes an escrow
            room_pages = min(room_pages, member.kv_pages_then - gained)
        if weight:
            share = min(share, max(0, room_pages) / weight)
    return tuple(int(pages * share) for pages in most)


def _final_pages(member: SplitMember) -> int:
    """What the member holds as part of its target, with one move's escrow to spare."""
    gained = len(member.layers_then) - len(_overlap(member.layers_now, member.layers_then))
    return max(0, (member.kv_pages_then - gained) // len(member.layers_then))


def pages_of_home(slots: Sequence[PageRun], count: int) -> tuple[PageRun, ...]:
    """The lowest `count` pages of the slots of a home, by turns."""
    return runs_of(_first(interleaved(slots), count))


def full_blocks(
    blocks: tuple[BlockId, ...], computed_tokens: int, block_size: int
) -> tuple[BlockId, ...]:
    """Those that never change any more."""
    return blocks[: computed_tokens // block_size]


def used_blocks(
    blocks: tuple[BlockId, ...], computed_tokens: int, block_size: int
) -> tuple[BlockId, ...]:
    """Those that hold something."""
    return blocks[: -(-computed_tokens // block_size)]


def still_right(
    gathered: Iterable[PageMove], touched: Iterable[BlockId], blocks_per_page: int
) -> dict[MoveKey, int]:
    """Masks of what was gathered, without blocks that lost their content since."""
    lost: dict[int, int] = defaultdict(int)
    for block in touched:
        page, bit = divmod(block, blocks_per_page)
        lost[page] |= 1 << bit
    return {
        MoveKey(m.page, m.layers, m.source, m.target): m.block_mask & ~lost[m.page]
        for m in gathered
    }
