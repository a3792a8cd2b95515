"""Layouts: who computes which layers.

A whole instance is a group of one stage. Dropping, merging, restoring and failing over are all
transitions of some groups from one layout to another (paper section 4, design section 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from kunserve.core.errors import LayoutError
from kunserve.core.ids import Epoch, GroupId, InstanceId


class PartKind(Enum):
    """What a model is made of, for memory: layers, the embedding and the head."""

    LAYER = "layer"
    EMBEDDING = "embedding"
    HEAD = "head"


@dataclass(frozen=True)
class Part:
    """One droppable, reloadable piece of the parameters. `index` counts layers; else it is 0.

    With tied embeddings there is no HEAD part: EMBEDDING holds the shared matrix and the final
    norm, so that the two uses are never counted twice.
    """

    kind: PartKind
    index: int = 0

    def __str__(self) -> str:
        return f"layer {self.index}" if self.kind is PartKind.LAYER else self.kind.value


@dataclass(frozen=True)
class LayerRange:
    """Contiguous layers [start, stop)."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def __contains__(self, layer: int) -> bool:
        return self.start <= layer < self.stop


def stage_holds(index: int, layers: LayerRange, part: Part) -> bool:
    """Does stage `index` of a ring, which computes `layers`, hold `part`? The leader, stage 0, has
    embedding and head, nobody else does."""
    if part.kind is PartKind.LAYER:
        return part.index in layers
    return index == 0


@dataclass(frozen=True)
class Stage:
    """One instance's share of a group: it computes `layers` of every request of the group."""

    instance: InstanceId
    layers: LayerRange


@dataclass(frozen=True)
class Group:
    """Stages in ring order. Stage 0, the leader, holds embedding and head, and schedules."""

    id: GroupId
    epoch: Epoch
    stages: tuple[Stage, ...]

    @property
    def leader(self) -> InstanceId:
        """The instance of stage 0."""
        return self.stages[0].instance

    @property
    def instances(self) -> tuple[InstanceId, ...]:
        """Members in ring order."""
        return tuple(stage.instance for stage in self.stages)


@dataclass(frozen=True)
class Layout:
    """All groups of a cluster. Instances that load, drain or are dead are in none.

    Raises:
        LayoutError: the stages of a group do not tile 0..num_layers exactly once, or an instance
            is in two groups.
    """

    num_layers: int
    groups: tuple[Group, ...]

    def __post_init__(self) -> None:
        seen: set[InstanceId] = set()
        for group in self.groups:
            self._check_tiling(group)
            for instance in group.instances:
                if instance in seen:
                    raise LayoutError(f"instance {instance} is in two groups")
                seen.add(instance)

    def _check_tiling(self, group: Group) -> None:
        at = 0
        for stage in group.stages:
            if stage.layers.start != at or stage.layers.stop <= at:
                raise LayoutError(
                    f"group {group.id}: stage on instance {stage.instance} holds layers "
                    f"[{stage.layers.start}, {stage.layers.stop}), expected to start at {at}"
                )
            at = stage.layers.stop
        if at != self.num_layers:
            raise LayoutError(f"group {group.id} covers {at} of {self.num_layers} layers")

    def group_of(self, instance: InstanceId) -> Group | None:
        """The group that `instance` works in, or None when it is in none."""
        for group in self.groups:
            if instance in group.instances:
                return group
        return None


def whole_instance(group: GroupId, epoch: Epoch, instance: InstanceId, num_layers: int) -> Group:
    """The group of one stage that a whole instance is."""
    return Group(group, epoch, (Stage(instance, LayerRange(0, num_layers)),))
