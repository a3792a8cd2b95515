"""Layouts from wishes: who keeps which layers (paper section 4, design sections 1 and 3).

A wish says which instances form a group; the planner says which stages that makes, step by step:

    wholes      0: [0 ............ L)   1: [0 ............ L)     each holds all parts
    MERGE       0: [0 .. b)             1:        [b ..... L)     both drop the rest, nothing moves
    the next    0: [0 . x)                                        its pages of [0, b) and [b, L)
    MERGE       2:     [x b)                                      are cut in two, again by drops
    (0 1)+(2 3) 1:        [b .. y)                                alone: the ring's order is
                3:             [y . L)                            0, 2, 1, 3
    SPLIT       the way back; parts come in

The split rule, each line among what the line before it left:

1. Balance, mean / max of the stage times of a typical step, is at least 95 %; if no split is, at
   least 90 %; if none is, the best that there is.
2. Merging the group with its like would be as balanced (95 %, then 90 %) by drops alone; if it
   cannot be, every stage has two layers at least, so that the merge is possible; if it cannot be
   either, any split. Only where the cluster has as many instances and a partner domain as many
   slots.
3. SPLIT: fewest pages of parts to bring in. MERGE: none at all.
4. Most KV: the smallest member's pages per layer.
5. Most KV after merging the group with its like.
6. The least squares of the stage times.

The mean of the stage times is that of the whole step over the stages, whatever the split, so that
a limit on the imbalance is an upper limit on each stage's layers, and so is a wanted number of KV
pages. A split is then found by dynamic programming over stage ends, the most of a limit by
bisection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import accumulate
from typing import NamedTuple

from kunserve.core.errors import LayoutError
from kunserve.core.ids import InstanceId
from kunserve.core.layout import Group, LayerRange, Part, PartKind, Stage, stage_holds
from kunserve.policy.cost_model import ChunkShape, CostModel
from kunserve.policy.pages import MAX_SLOTS

BALANCE_LIMITS = (0.95, 0.90)
"""Wanted balance of the stage times, mean / max, best first (design section 1)."""

Wish = tuple[tuple[InstanceId, ...], ...]
"""The partition of all ready instances into groups. Order says nothing."""


class TransitionKind(Enum):
    """MERGE: several groups become one, by drops alone. SPLIT: one becomes several."""

    MERGE = "merge"
    SPLIT = "split"


@dataclass(frozen=True)
class TypicalStep:
    """A microbatch as the moment has it: what stage times are compared on."""

    decodes: int = 8
    context_tokens: int = 256
    prefill_tokens: int = 0

    @property
    def chunks(self) -> tuple[ChunkShape, ...]:
        """The chunks of the step."""
        prefill = (ChunkShape(0, self.prefill_tokens),) if self.prefill_tokens else ()
        return (ChunkShape(self.context_tokens, 1, True),) * self.decodes + prefill


@dataclass(frozen=True)
class ClusterShape:
    """Sizes that layouts depend on, in pages.

    Args:
        part_pages: pages of every part of the model; no HEAD where embeddings are tied.
        pages: physical pages that each instance has for parts and KV.
        slot_pages: range pages of one slot in one layer (`kunserve.policy.pages.SlotMap`).
        blocks_per_page: KV blocks of one layer in one page.

    Raises:
        LayoutError: the pages of the embedding or of a layer are missing, or a size is not
            positive.
    """

    num_layers: int
    part_pages: Mapping[Part, int]
    pages: Mapping[InstanceId, int]
    slot_pages: int
    blocks_per_page: int

    def __post_init__(self) -> None:
        layers = (Part(PartKind.LAYER, index) for index in range(self.num_layers))
        for part in (Part(PartKind.EMBEDDING), *layers):
            if part not in self.part_pages:
                raise LayoutError(f"the pages of the {part} are not given")
        sizes = (self.num_layers, self.slot_pages, self.blocks_per_page)
        if min(*sizes, *self.part_pages.values(), *self.pages.values()) <= 0:
            raise LayoutError("a cluster's shape has a size that is not positive")

    @property
    def copy_blocks(self) -> int:
        """KV blocks that a dropped copy of the model makes room for, roundings aside."""
        return sum(self.part_pages.values()) // self.num_layers * self.blocks_per_page

    def stage_parts(self, index: int, layers: LayerRange) -> tuple[Part, ...]:
        """Parts that stage `index` of a group holds, in the order of the model: see
        `stage_holds`."""
        ends = (Part(PartKind.EMBEDDING), Part(PartKind.HEAD))
        first, last = (
            (end,) if end in self.part_pages and stage_holds(index, layers, end) else ()
            for end in ends
        )
        return (*first, *(Part(PartKind.LAYER, layer) for layer in layers), *last)

    def group_parts(self, stages: Sequence[Stage]) -> dict[InstanceId, tuple[Part, ...]]:
        """Parts that each member of a group holds."""
        return {
            stage.instance: self.stage_parts(index, stage.layers)
            for index, stage in enumerate(stages)
        }

    def pages_of_parts(self, parts: Sequence[Part]) -> int:
        """Pages of `parts` together."""
        return sum(self.part_pages[part] for part in parts)

    def capacity_pages(self, stages: Sequence[Stage]) -> int:
        """Range pages that a group can use: each is backed in every layer, by the layer's holder.

        The minimum over members of (pages - pages of parts) / layers, within the members' slots;
        0 where not even the parts fit.
        """
        parts = self.group_parts(stages)
        backed = min(
            (self.pages[stage.instance] - self.pages_of_parts(parts[stage.instance]))
            // len(stage.layers)
            for stage in stages
        )
        return max(0, min(backed, len(stages) * self.slot_pages))

    def capacity_blocks(self, stages: Sequence[Stage]) -> int:
        """KV blocks that a group can use."""
        return self.capacity_pages(stages) * self.blocks_per_page


@dataclass(frozen=True)
class PlannedTransition:
    """Some groups from one layout to another, as values; ids and epochs are the controller's.

    `targets`, `capacity_pages` and `balance` go together. `gains` and `drops` name every instance
    of `sources`, in the order of the model; those of a MERGE gain nothing.
    """

    kind: TransitionKind
    sources: tuple[Group, ...]
    targets: tuple[tuple[Stage, ...], ...]
    gains: Mapping[InstanceId, tuple[Part, ...]]
    drops: Mapping[InstanceId, tuple[Part, ...]]
    capacity_pages: tuple[int, ...]
    balance: tuple[float, ...]


@dataclass(frozen=True)
class PlannedStep:
    """Transitions of disjoint groups, which may run at once. The wish may need another step."""

    transitions: tuple[PlannedTransition, ...]


# ---------------------------------------------------------------- wishes


def drop_all(groups: Sequence[Group]) -> Wish:
    """The wish for one group of all instances."""
    return (tuple(sorted(instance for group in groups for instance in group.instances)),)


def restore_all(groups: Sequence[Group]) -> Wish:
    """The wish for whole instances only."""
    return tuple((instance,) for instance in drop_all(groups)[0])


def next_step(
    shape: ClusterShape,
    groups: Sequence[Group],
    wish: Wish,
    cost: CostModel,
    typical: TypicalStep | None = None,
) -> PlannedStep | None:
    """The next transitions on the way from `groups` to `wish`; None when nothing is left to do.

    Groups and wished sets that share instances are looked at together. Several groups that form
    one wished set are merged; one group that falls into several is split; otherwise each group is
    split into its pieces of the wished sets, and a later step merges those. Where the layers that
    members still hold allow no merge, the groups are first split into whole instances.

    Args:
        cost: of a whole instance.
        typical: the microbatch of the moment; None: a default one.

    Raises:
        LayoutError: the wish is not a partition of the instances of `groups`, or nothing that
            could hold the model and KV of every layer fits it.
    """
    _check_wish(shape, groups, wish)
    planner = _Planner(shape, cost, typical or TypicalStep())
    transitions: list[PlannedTransition] = []
    for sources, wished in _components(groups, wish):
        if len(wished) == 1 < len(sources):
            transitions += planner.merge(sources)
            continue
        for group in sources:
            pieces = [frozenset(group.instances) & instances for instances in wished]
            pieces = [piece for piece in pieces if piece]
            if len(pieces) > 1:
                transitions.append(planner.split(group, pieces))
    return PlannedStep(tuple(transitions)) if transitions else None


def stage_times_ns(
    stages: Sequence[Stage], num_layers: int, cost: CostModel, typical: TypicalStep
) -> tuple[float, ...]:
    """How long each stage of a group takes for the typical step; `cost` is a whole instance's."""
    return tuple(
        cost.stage_ns(typical.chunks, len(stage.layers), num_layers, is_leader=index == 0)
        for index, stage in enumerate(stages)
    )


def slowest_stage(
    stages: Sequence[Stage], num_layers: int, cost: CostModel, typical: TypicalStep
) -> CostModel:
    """The cost model of the stage that takes longest for the typical step: a group's scheduler
    budgets by it."""
    times_ns = stage_times_ns(stages, num_layers, cost, typical)
    slowest = times_ns.index(max(times_ns))
    return cost.for_stage(len(stages[slowest].layers), num_layers, is_leader=slowest == 0)


def _check_wish(shape: ClusterShape, groups: Sequence[Group], wish: Wish) -> None:
    ready = drop_all(groups)[0]
    for instance in ready:
        if instance not in shape.pages:
            raise LayoutError(f"instance {instance} is in a group but its pages are not given")
    wished: set[InstanceId] = set()
    for instances in wish:
        if not instances:
            raise LayoutError("a wished group has no instance; leave it out")
        limit = min(shape.num_layers, MAX_SLOTS)
        if len(instances) > limit:
            raise LayoutError(
                f"a group of {len(instances)} instances is too large: {shape.num_layers} layers "
                f"and {MAX_SLOTS} slots allow {limit}; wish for smaller groups"
            )
        for instance in instances:
            if instance not in ready:
                raise LayoutError(f"instance {instance} is wished for but is in no group")
            if instance in wished:
                raise LayoutError(f"instance {instance} is wished for twice")
            wished.add(instance)
    missing = [instance for instance in ready if instance not in wished]
    if missing:
        raise LayoutError(
            f"instance {missing[0]} is missing from the wish; name every instance that is in a "
            "group, a whole one as a group of its own"
        )


class _Component(NamedTuple):
    sources: list[Group]
    wished: list[frozenset[InstanceId]]


def _components(groups: Sequence[Group], wish: Wish) -> list[_Component]:
    """Groups and wished sets that are connected by instances, in order of their lowest one."""
    found = [_Component([group], []) for group in sorted(groups, key=lambda g: min(g.instances))]
    for instances in sorted(map(frozenset, wish), key=min):
        touched = [
            component
            for component in found
            if any(instances & set(group.instances) for group in component.sources)
        ]
        joined = touched[0]
        for other in touched[1:]:
            joined.sources.extend(other.sources)
            joined.wished.extend(other.wished)
            found.remove(other)
        joined.wished.append(instances)
    return found


# ---------------------------------------------------------------- transitions


class _Planner:
    """What every split of one call shares."""

    def __init__(self, shape: ClusterShape, cost: CostModel, typical: TypicalStep) -> None:
        self._shape = shape
        self._cost = cost
        self._typical = typical

    def merge(self, sources: Sequence[Group]) -> list[PlannedTransition]:
        """One MERGE of `sources`; or, where drops alone cannot do it, the SPLITs into whole
        instances that must come first.

        Raises:
            LayoutError: whole instances could not be merged either.
        """
        members = [member for group in sources for member in self._members(group)]
        stages = self._best_stages(members, may_gain=False)
        if stages is not None:
            return [self._transition(TransitionKind.MERGE, sources, [stages])]
        wholes = [self._whole(member.instance) for member in members]
        cut = [group for group in sources if len(group.stages) > 1]
        if not cut or self._best_stages(wholes, may_gain=False) is None:
            raise LayoutError(
                f"instances {_listed(members)} cannot be merged: no split of "
                f"{self._shape.num_layers} layers leaves a page of KV per layer on each of them; "
                "give them more memory or wish for smaller groups"
            )
        return [
            self.split(group, [frozenset((instance,)) for instance in group.instances])
            for group in cut
        ]

    def split(self, source: Group, pieces: Sequence[frozenset[InstanceId]]) -> PlannedTransition:
        """`source` falls into `pieces`, each a new group, in order of their lowest instance.

        Raises:
            LayoutError: a piece cannot hold the model and a page of KV per layer.
        """
        members = self._members(source)
        targets = []
        for piece in sorted(pieces, key=min):
            own = [member for member in members if member.instance in piece]
            stages = self._best_stages(own, may_gain=True)
            if stages is None:
                raise LayoutError(
                    f"instances {_listed(own)} cannot form a group: the model and a page of KV "
                    "per layer do not fit; give them more memory or wish for larger groups"
                )
            targets.append(stages)
        return self._transition(TransitionKind.SPLIT, [source], targets)

    def _members(self, group: Group) -> list[_Member]:
        return [
            _Member(stage.layers, stage.instance, self._shape.pages[stage.instance], index == 0)
            for index, stage in enumerate(group.stages)
        ]

    def _whole(self, instance: InstanceId) -> _Member:
        everything = LayerRange(0, self._shape.num_layers)
        return _Member(everything, instance, self._shape.pages[instance], True)

    def _best_stages(self, members: Sequence[_Member], may_gain: bool) -> tuple[Stage, ...] | None:
        num_layers = self._shape.num_layers
        step_ns = self._cost.step_ns(self._typical.chunks)
        layers = self._cost.for_stage(num_layers, num_layers, is_leader=False)
        layers_ns = layers.step_ns(self._typical.chunks)
        return _Splitter(
            self._shape, members, layers_ns / num_layers, step_ns - layers_ns, may_gain
        ).best()

    def _transition(
        self,
        kind: TransitionKind,
        sources: Sequence[Group],
        targets: Sequence[tuple[Stage, ...]],
    ) -> PlannedTransition:
        before: dict[InstanceId, tuple[Part, ...]] = {}
        for group in sources:
            before |= self._shape.group_parts(group.stages)
        after: dict[InstanceId, tuple[Part, ...]] = {}
        for stages in targets:
            after |= self._shape.group_parts(stages)
        return PlannedTransition(
            kind,
            tuple(sources),
            tuple(targets),
            gains={one: _without(after[one], before[one]) for one in sorted(before)},
            drops={one: _without(before[one], after[one]) for one in sorted(before)},
            capacity_pages=tuple(self._shape.capacity_pages(stages) for stages in targets),
            balance=tuple(self._balance(stages) for stages in targets),
        )

    def _balance(self, stages: Sequence[Stage]) -> float:
        times_ns = stage_times_ns(stages, self._shape.num_layers, self._cost, self._typical)
        slowest_ns = max(times_ns)
        return sum(times_ns) / len(times_ns) / slowest_ns if slowest_ns else 1.0


def _without(parts: tuple[Part, ...], others: tuple[Part, ...]) -> tuple[Part, ...]:
    excluded = set(others)
    return tuple(part for part in parts if part not in excluded)


def _listed(members: Sequence[_Member]) -> str:
    return ", ".join(str(instance) for instance in sorted(member.instance for member in members))


# ---------------------------------------------------------------- one group's split


class _Member(NamedTuple):
    """An instance that is to have a stage, and what it holds now."""

    held: LayerRange
    instance: InstanceId
    pages: int
    holds_embedding: bool


@dataclass(frozen=True)
class _Limits:
    """What a split must keep to. Per stage: KV pages of each layer, and time."""

    slowest_ns: float
    most_gained_pages: int
    capacity_pages: int = 1
    ahead: _Ahead | None = None


@dataclass(frozen=True)
class _Ahead:
    """The same limits after a merge of the group with its like, where each stage's layers are cut
    in two."""

    slowest_ns: float
    capacity_pages: int = 1


class _Choice(NamedTuple):
    """The first stages of a group: their last one, [start, end), and those before it.

    `gained_pages` counts layers alone: embedding and head come in whoever leads, unless one of
    those who may lead holds them, and then all of these do.
    """

    gained_pages: int
    squares: float
    member: int
    start: int
    end: int
    before: _Choice | None


_Key = tuple[int, int]
"""Members used so far, as a bit mask, and the first layer that is not yet placed."""

_SAME = 1e-9
"""Relative error of the sums of times that is not taken for a difference."""


class _Splitter:
    """The best stages of one group, by the rule at the top of this file.

    Members take their places in the order of what they hold: of two whose ranges do not nest, the
    one that begins first and ends first goes first (an exchange of their ranges shows that nothing
    is lost where they have as many pages). Nested ranges are tried in all orders. The leader is
    one that holds the embedding already, if any does.

    Args:
        layer_ns: time of one layer for the typical step.
        head_ns: time of the head, which only the leader pays.
        may_gain: members may take parts that they do not hold.
    """

    def __init__(
        self,
        shape: ClusterShape,
        members: Sequence[_Member],
        layer_ns: float,
        head_ns: float,
        may_gain: bool,
    ) -> None:
        self._shape = shape
        self._num_layers = shape.num_layers
        self._members = sorted(
            members, key=lambda member: (member.held.start, member.held.stop, member.instance)
        )
        self._layer_ns = layer_ns
        self._head_ns = head_ns
        self._may_gain = may_gain
        layer_pages = [
            shape.part_pages[Part(PartKind.LAYER, index)] for index in range(shape.num_layers)
        ]
        self._pages_below = [0, *accumulate(layer_pages)]
        self._leader_pages = shape.pages_of_parts(shape.stage_parts(0, LayerRange(0, 0)))
        self._leaders = _leader_candidates(self._members)
        self._goes_after = [
            sum(
                1 << earlier
                for earlier in range(at)
                if self._members[earlier].held.stop <= member.held.stop
            )
            for at, member in enumerate(self._members)
        ]

    def best(self) -> tuple[Stage, ...] | None:
        """The stages in ring order, or None where no split has a page of KV per layer."""
        limits = self._balanced()
        if limits is None:
            return None
        limits = self._look_ahead(limits)
        if self._may_gain:
            choice = self._fill(limits)
            assert choice is not None
            limits = replace(limits, most_gained_pages=choice.gained_pages)
        limits = self._most_capacity(limits)
        choice = self._fill(limits)
        assert choice is not None
        return self._stages(choice)

    # -- limits

    def _balanced(self) -> _Limits | None:
        """The tightest limit on stage times that some split keeps to (rule 1)."""
        count = len(self._members)
        gained = sum(self._shape.part_pages.values()) * count if self._may_gain else 0
        for balance in BALANCE_LIMITS:
            limits = _Limits(self._mean_ns(count) / balance, gained)
            if self._fill(limits) is not None:
                return limits
        if self._fill(_Limits(math.inf, gained)) is None:
            return None
        times_ns = {
            layers * self._layer_ns + head_ns
            for layers in range(1, self._num_layers + 1)
            for head_ns in (0.0, self._head_ns)
        }
        # Upwards, not by bisection: what is too tight is found out fast, loose limits cost most.
        return next(
            limits
            for limits in (_Limits(slowest_ns, gained) for slowest_ns in sorted(times_ns))
            if self._fill(limits) is not None
        )

    def _look_ahead(self, limits: _Limits) -> _Limits:
        """`limits` with the tightest ones on a later merge that some split keeps to (rule 2)."""
        count = 2 * len(self._members)
        if not 2 < count <= min(MAX_SLOTS, self._num_layers, len(self._shape.pages)):
            return limits
        mean_ns = self._mean_ns(count)
        for slowest_ns in (*(mean_ns / balance for balance in BALANCE_LIMITS), math.inf):
            ahead = replace(limits, ahead=_Ahead(slowest_ns))
            if self._fill(ahead) is not None:
                return ahead
        return limits

    def _most_capacity(self, limits: _Limits) -> _Limits:
        """`limits` with the highest capacities that some split keeps to (rules 4 and 5)."""
        pages = sum(member.pages for member in self._members)
        model_pages = sum(self._shape.part_pages.values())
        slots_pages = len(self._members) * self._shape.slot_pages
        limits = replace(
            limits,
            capacity_pages=_highest(
                limits.capacity_pages,
                # All members' pages, one copy of the model less, over all layers.
                min((pages - model_pages) // self._num_layers, slots_pages),
                lambda capacity: self._fill(replace(limits, capacity_pages=capacity)) is not None,
            ),
        )
        ahead = limits.ahead
        if ahead is None:
            return limits
        ahead_pages = _highest(
            ahead.capacity_pages,
            min((2 * pages - model_pages) // self._num_layers, 2 * slots_pages),
            lambda capacity: (
                self._fill(replace(limits, ahead=replace(ahead, capacity_pages=capacity)))
                is not None
            ),
        )
        return replace(limits, ahead=replace(ahead, capacity_pages=ahead_pages))

    def _mean_ns(self, stages: int) -> float:
        return (self._num_layers * self._layer_ns + self._head_ns) / stages

    # -- dynamic programming

    def _fill(self, limits: _Limits) -> _Choice | None:
        """Stages of all members within `limits` that gain least and then are the most even, or
        None where there are none."""
        num_layers, count = self._num_layers, len(self._members)
        ends = self._stage_ends(limits)
        fewest = 1 if limits.ahead is None else 2
        most = max(end - start for by_start in ends.values() for start, end in enumerate(by_start))
        choices: dict[_Key, _Choice] = {(0, 0): _Choice(0, 0.0, 0, 0, 0, None)}
        for left in reversed(range(count)):
            # The members that are left must be able to hold all the rest, and must all get some.
            lowest, highest = num_layers - left * most, num_layers - left * fewest
            found: dict[_Key, _Choice] = {}
            for (used, start), before in choices.items():
                for member in self._next_members(used, start):
                    end = min(highest, ends[self._members[member].pages, not used][start])
                    stage_ends = range(max(start + fewest, lowest), end + 1)
                    self._extend(found, used, before, member, stage_ends, limits.most_gained_pages)
            choices = found
        return choices.get(((1 << count) - 1, num_layers))

    def _extend(
        self,
        found: dict[_Key, _Choice],
        used: int,
        before: _Choice,
        member: int,
        stage_ends: range,
        most_gained_pages: int,
    ) -> None:
        """Put `member` after the stages of `before`, up to each of `stage_ends`."""
        start = before.end
        head_ns = 0.0 if used else self._head_ns
        for end in stage_ends:
            gained = before.gained_pages + self._gained_pages(member, start, end)
            if gained > most_gained_pages:
                break  # longer ranges gain no less
            squares = before.squares + ((end - start) * self._layer_ns + head_ns) ** 2
            key = (used | 1 << member, end)
            known = found.get(key)
            if known is None or (gained, squares) < (known.gained_pages, known.squares):
                found[key] = _Choice(gained, squares, member, start, end, before)

    def _next_members(self, used: int, start: int) -> Sequence[int]:
        """Members whose stage may begin at layer `start`, after those in `used`."""
        if not used:
            return self._leaders
        unused = [member for member in range(len(self._members)) if not used >> member & 1]
        if not self._may_gain and any(
            self._members[member].held.stop <= start for member in unused
        ):
            return ()  # all that it holds is taken
        return [member for member in unused if not self._goes_after[member] & ~used]

    def _gained_pages(self, member: int, start: int, end: int) -> int:
        """Pages of the layers of [start, end) that `member` does not hold."""
        held, below = self._members[member].held, self._pages_below
        gained = 0
        if start < held.start:
            gained += below[min(end, held.start)] - below[start]
        if end > held.stop:
            gained += below[end] - below[max(start, held.stop)]
        return gained

    def _stage_ends(self, limits: _Limits) -> dict[tuple[int, bool], list[int]]:
        """By (pages of the member, is leader): the last end of a stage, for each first layer."""
        return {
            (pages, is_leader): self._ends(limits, pages, is_leader)
            for pages in {member.pages for member in self._members}
            for is_leader in (False, True)
        }

    def _ends(self, limits: _Limits, pages: int, is_leader: bool) -> list[int]:
        """Where a stage that begins at layer 0, 1, ... ends at the latest; at its beginning when
        not even one layer fits."""
        ends = self._fitting(limits.slowest_ns, limits.capacity_pages, pages, is_leader)
        ahead = limits.ahead
        if ahead is None:
            return ends
        # After the merge: one of the two leads if this stage leads, the other follows on.
        first = self._fitting(ahead.slowest_ns, ahead.capacity_pages, pages, is_leader)
        second = self._fitting(ahead.slowest_ns, ahead.capacity_pages, pages, False)
        return [
            min(end, second[first[start]]) if first[start] > start else start
            for start, end in enumerate(ends)
        ]

    def _fitting(
        self, slowest_ns: float, capacity_pages: int, pages: int, is_leader: bool
    ) -> list[int]:
        """Ends as in `_ends`, for one level: index `num_layers` is there, as its own end."""
        num_layers, below = self._num_layers, self._pages_below
        free_pages = pages - (self._leader_pages if is_leader else 0)
        longest = self._most_layers(slowest_ns, self._head_ns if is_leader else 0.0)
        ends: list[int] = []
        end = 0
        for start in range(num_layers + 1):
            end = max(end, start)
            while (
                end < min(num_layers, start + longest)
                and below[end + 1] - below[start] + capacity_pages * (end + 1 - start) <= free_pages
            ):
                end += 1
            ends.append(end)
        return ends

    def _most_layers(self, slowest_ns: float, head_ns: float) -> int:
        """Layers that a stage computes in `slowest_ns`, of which the head takes `head_ns`."""
        allowed_ns = slowest_ns * (1.0 + _SAME) - head_ns
        if allowed_ns < 0.0:
            return 0
        if self._num_layers * self._layer_ns <= allowed_ns:
            return self._num_layers
        return int(allowed_ns / self._layer_ns)

    def _stages(self, choice: _Choice) -> tuple[Stage, ...]:
        stages: list[Stage] = []
        at: _Choice | None = choice
        while at is not None and at.before is not None:
            layers = LayerRange(at.start, at.end)
            stages.append(Stage(self._members[at.member].instance, layers))
            at = at.before
        return tuple(reversed(stages))


def _leader_candidates(members: Sequence[_Member]) -> list[int]:
    """Positions of the members that may lead, of several alike the first.

    Those that hold the embedding; where none does, everyone.
    """
    alike: dict[tuple[int, int], int] = {}
    for position, member in enumerate(members):
        if member.holds_embedding:
            alike.setdefault((member.held.stop, member.pages), position)
    return list(alike.values()) or list(range(len(members)))


def _highest(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The highest of `low`..`high` that `holds`, where `low` does and higher ones do until one
    does not."""
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low
