"""The line that a transition leaves in the log."""

from dataclasses import replace

import pytest

from kunserve.core.ids import Epoch, GroupId, InstanceId, RequestId, TransitionId
from kunserve.core.layout import Group, LayerRange, Stage
from kunserve.core.transition import PhaseTime, TransitionRecord
from kunserve.runtime.transition_log import describe

MS = 1_000_000
MIB = 1 << 20


def group(number: int, epoch: int, *stages: tuple[int, int, int]) -> Group:
    return Group(
        GroupId(number),
        Epoch(epoch),
        tuple(Stage(InstanceId(i), LayerRange(a, b)) for i, a, b in stages),
    )


BARE = TransitionRecord(
    id=TransitionId(3),
    kind="drop",
    why="operator",
    outcome="done",
    reason="",
    sources=(group(0, 5, (0, 0, 30)), group(1, 6, (1, 0, 30))),
    targets=(group(2, 7, (0, 0, 12), (1, 12, 30)),),
)
FULL = replace(
    BARE,
    phases=(
        PhaseTime("prepare", 1_200_000),
        PhaseTime("fence", 38 * MS),
        PhaseTime("remap", 4_100_000),
        PhaseTime("adopt", 2 * MS),
        PhaseTime("move", 361 * MS),
    ),
    freed_bytes=348 * MIB,
    exchanged_bytes=96 * MIB,
    stalled=tuple((RequestId(str(i)), ms * MS) for i, ms in enumerate((50, 210, 340))),
)


def test_a_drop_in_one_line():
    assert describe(FULL) == (
        "drop #3 (operator): 0[0:30] + 1[0:30] -> 0[0:12]|1[12:30] epoch 7 done in 406 ms: "
        "prepare 1.2, fence 38, remap 4.1, adopt 2.0, move 361; freed 348 MiB, exchanged 96 MiB; "
        "stalled 3 requests, median 210 ms, at most 340 ms"
    )


def test_what_did_not_happen_is_not_said():
    assert describe(BARE) == (
        "drop #3 (operator): 0[0:30] + 1[0:30] -> 0[0:12]|1[12:30] epoch 7 done in 0.0 ms"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stalled": ((RequestId("a"), 2 * MS),)},
         "; stalled 1 request, median 2.0 ms, at most 2.0 ms"),
        ({"gained_bytes": 5 * MIB, "gathered_bytes": 3 * MIB // 2},
         "; gained 5.0 MiB, gathered 1.5 MiB"),
        ({"requests": 9, "recomputed": 2}, "; 9 requests, 2 recomputed"),
        ({"requests": 1}, "; 1 request"),
        ({"activations": 480, "activation_p99_ns": 3_200_000}, "; 480 activations, p99 3.2 ms"),
        ({"moved_pages": 12, "remap_ns": 4_100_000}, "; moved 12 pages, memory calls 4.1 ms"),
        ({"phases": (PhaseTime("fence", 9_960_000),)}, "in 10 ms: fence 10"),
        ({"targets": ()}, "-> none done"),
    ],
)  # fmt: skip
def test_everything_has_its_words(changes: dict[str, object], words: str):
    assert words in describe(replace(BARE, **changes))


def test_an_abort_says_why_on_one_line():
    line = describe(replace(FULL, outcome="aborted", reason="instance 1: no\nlinks", stalled=()))
    assert "epoch 7 aborted in 406 ms (instance 1: no links): prepare 1.2" in line
    assert "\n" not in line


def test_several_groups_have_their_epochs():
    restored = replace(
        BARE,
        kind="restore",
        sources=BARE.targets,
        targets=(group(3, 9, (0, 0, 30)), group(4, 8, (1, 0, 30))),
    )
    assert "0[0:12]|1[12:30] -> 0[0:30] + 1[0:30] epochs 8, 9 done" in describe(restored)
