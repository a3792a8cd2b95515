"""Host memory for KV: what goes out comes back, to other blocks, while nothing else changes."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kunserve.core.actions import CopyKv
from kunserve.core.errors import ConfigError
from kunserve.core.ids import BlockId, HostBlock
from kunserve.runtime.threads import CopyThread
from kunserve.worker.blocks import BlockRun
from kunserve.worker.host_kv import HostKv, runs_of_copy

LAYERS, BLOCKS, HOST_BLOCKS, BLOCK_BYTES = 3, 40, 64, 4096


@pytest.fixture
def kv() -> np.ndarray:
    """KV of all layers: [layer][block][byte]."""
    return np.random.default_rng(3).integers(0, 255, (LAYERS, BLOCKS, BLOCK_BYTES), np.uint8)


@pytest.fixture
def host_kv(kv: np.ndarray) -> Iterator[HostKv]:
    with HostKv(HOST_BLOCKS, BLOCK_BYTES, [layer.ctypes.data for layer in kv]) as host:
        yield host


def order(transfer: int, to_host: bool, blocks: list[int], host_blocks: list[int]) -> CopyKv:
    return CopyKv(
        transfer,
        to_host,
        tuple(BlockId(block) for block in blocks),
        tuple(HostBlock(block) for block in host_blocks),
    )


def test_blocks_come_back_to_other_places(kv: np.ndarray, host_kv: HostKv) -> None:
    before = kv.copy()
    assert host_kv.copy(order(0, True, [5, 6, 9, 2], [0, 1, 2, 63])) == 4 * LAYERS * BLOCK_BYTES
    assert (kv == before).all()
    host_kv.copy(order(1, False, [30, 31, 4], [1, 2, 63]))
    expected = before.copy()
    expected[:, [30, 31, 4]] = before[:, [6, 9, 2]]
    assert (kv == expected).all()


@pytest.mark.parametrize(
    ("sources", "targets", "runs"),
    [
        ([4, 5, 6], [0, 1, 2], (BlockRun(4, 0, 3),)),
        ([4, 5, 7], [0, 1, 2], (BlockRun(4, 0, 2), BlockRun(7, 2, 1))),
        ([4, 5, 6], [0, 2, 3], (BlockRun(4, 0, 1), BlockRun(5, 2, 2))),
        ([6, 5], [1, 0], (BlockRun(6, 1, 1), BlockRun(5, 0, 1))),
        ([], [], ()),
    ],
)
def test_neighbours_on_both_sides_go_in_one_copy(
    sources: list[int], targets: list[int], runs: tuple[BlockRun, ...]
) -> None:
    assert runs_of_copy(sources, targets) == runs


@settings(max_examples=50, derandomize=True, database=None)
@given(st.permutations(range(12)), st.permutations(range(12)))
def test_runs_make_all_copies_and_no_other(sources: list[int], targets: list[int]) -> None:
    made = [
        (run.source + index, run.target + index)
        for run in runs_of_copy(sources, targets)
        for index in range(run.count)
    ]
    assert made == list(zip(sources, targets, strict=True))


def test_memory_is_taken_only_when_it_is_used(kv: np.ndarray) -> None:
    large = 1 << 18  # blocks: 3 GiB in all
    before = resident_bytes()
    with HostKv(large, BLOCK_BYTES, [layer.ctypes.data for layer in kv]) as host:
        host.copy(order(0, True, [1], [0]))
        assert resident_bytes() - before < 64 << 20


def resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * mmap.PAGESIZE


def test_a_range_that_the_system_refuses_is_said_with_its_flag() -> None:
    with pytest.raises(ConfigError, match="lower --swap-space"):
        HostKv(1 << 45, BLOCK_BYTES, [0])


def test_the_thread_copies_in_order_and_ends_when_all_is_done(kv: np.ndarray) -> None:
    before = kv.copy()
    thread = CopyThread(HostKv(HOST_BLOCKS, BLOCK_BYTES, [layer.ctypes.data for layer in kv]))
    for transfer in range(8):  # out and back, each to the next block
        to_host = transfer % 2 == 0
        thread.submit(order(transfer, to_host, [(transfer + 1) // 2], [transfer // 2 % 3]))
    thread.join()
    assert (kv[:, :5] == before[:, [0]]).all()
    assert (kv[:, 5:] == before[:, 5:]).all()
