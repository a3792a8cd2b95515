"""Copies of KV blocks inside one instance (`StepPlan.moves`, design section 3, restore step 2)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kunserve.core.step import BlockMove


@dataclass(frozen=True)
class BlockRun:
    """Blocks [source, source + count) go to [target, target + count) in one copy."""

    source: int
    target: int
    count: int


def runs_of_moves(moves: Iterable[BlockMove]) -> tuple[BlockRun, ...]:
    """The fewest copies, each like memmove, that do what `moves` do one after the other.

        source   4 5 6   9         move n + 1 joins the run of move n where both sides go on,
        target   0 1 2   3         unless it reads what the run has written: 1 -> 2, 2 -> 3 puts
        runs     4..6 -> 0..2      block 1 into block 3, but one copy of 1..2 to 2..3 would put
                 9 -> 3            the old block 2 there

    A run that writes what it has read already (3 -> 2, 4 -> 3) is what memmove does by itself.
    """
    runs: list[BlockRun] = []
    for move in moves:
        if runs and _continues(runs[-1], move):
            last = runs[-1]
            runs[-1] = BlockRun(last.source, last.target, last.count + 1)
        else:
            runs.append(BlockRun(move.source, move.target, 1))
    return tuple(runs)


def _continues(run: BlockRun, move: BlockMove) -> bool:
    goes_on = (move.source, move.target) == (run.source + run.count, run.target + run.count)
    return goes_on and not run.target <= move.source < run.target + run.count


def copy_blocks(moves: Sequence[BlockMove], kv_bases: Iterable[int], block_bytes: int) -> int:
    """Make `moves`, in order, in every layer whose block 0 lies at one of `kv_bases`.

    All blocks must be mapped there; addresses cannot be checked. The GIL is not held while bytes
    are copied. Returns the bytes copied.
    """
    spans = [
        (run.target * block_bytes, run.source * block_bytes, run.count * block_bytes)
        for run in runs_of_moves(moves)
    ]
    copied_bytes = 0
    for base in kv_bases if spans else ():
        for target, source, nbytes in spans:
            ctypes.memmove(base + target, base + source, nbytes)
            copied_bytes += nbytes
    return copied_bytes
