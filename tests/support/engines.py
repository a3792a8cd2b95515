"""The embedded model in a real engine, driven step by step with every law checked on the way."""

from __future__ import annotations

import itertools
import os
import select
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import pytest

from kunserve.core.errors import ModelLoadError
from kunserve.core.ids import Epoch, RequestId, SlotId
from kunserve.core.memory import PageRun
from kunserve.core.request import Request, TokenOutput
from kunserve.core.step import GroupLoad, StepPlan, StepResult
from kunserve.policy.cost_model import CostModel
from kunserve.policy.scheduler import SchedulerConfig
from kunserve.runtime.model_config import load_model_spec
from kunserve.runtime.model_source import default_cache_dir, resolve_model
from kunserve.runtime.threads import CopyThread
from kunserve.worker.engine import Engine
from kunserve.worker.host_kv import HostKv
from kunserve.worker.settings import EngineSettings

BLOCK_SIZE = 16
_UNUSED_COSTS = CostModel(alpha_ns=0.0, delta_ns=0.0, beta_ns=0.0, gamma_ns=0.0)

CancelBefore = Callable[[int], int | None]
"""The layer before which step n is cancelled, None for a step that is not."""


@contextmanager
def open_embedded_engine(
    *, kv_blocks: int, max_model_len: int, num_slots: int = 1
) -> Iterator[Engine]:
    """An engine of the embedded model on two threads, with memory for `kv_blocks` blocks.

    Pages are NaN until they are written. Where the model can be neither found nor fetched, the test
    is skipped.
    """
    try:
        model = resolve_model(None, default_cache_dir(os.environ), print)
    except ModelLoadError as error:
        pytest.skip(f"needs the embedded model: {error}")
    spec = load_model_spec(model.directory)
    kv_tokens = kv_blocks * BLOCK_SIZE
    settings = EngineSettings(
        model_directory=str(model.directory),
        spec=spec,
        threads=2,
        block_size=BLOCK_SIZE,
        max_model_len=max_model_len,
        kv_cache_memory_bytes=kv_tokens * spec.num_layers * spec.kv_bytes_per_token_layer,
        num_slots=num_slots,
        poison=True,
    )
    with Engine(settings, lambda activity, fraction: None) as engine:
        yield engine


def renew_kv(engine: Engine, blocks: Mapping[SlotId, int]) -> None:
    """Back the first `blocks` of each slot, whole pages of them, and no other block.

    All of them are NaN again, so that what an earlier run left behind cannot stand in for what a
    later one fails to compute.
    """
    memory, blocks_per_page = engine.memory, engine.plan.geometry.blocks_per_page
    range_runs: list[PageRun] = []
    for slot, count in blocks.items():
        pages, rest = divmod(count, blocks_per_page)
        assert rest == 0, f"{count} blocks are no whole pages of {blocks_per_page}"
        range_runs.append(PageRun(engine.slots.slot_range(slot).start, pages))
    memory.release_all_kv()
    memory.map_kv_many(dict.fromkeys(memory.held_layers, range_runs))


@contextmanager
def open_copy_thread(engine: Engine, host_blocks: int) -> Iterator[CopyThread]:
    """A thread that copies KV of `engine` to host memory and back."""
    bases = [engine.memory.kv_base(layer) for layer in range(engine.spec.num_layers)]
    thread = CopyThread(HostKv(host_blocks, engine.plan.geometry.block_bytes, bases))
    yield thread
    thread.join()


class CheckedRun:
    """A scheduler and an executor on an engine's memory; time is the number of steps so far.

    Args:
        max_num_batched_tokens: the budget of a step: a small one cuts prompts into many chunks.
        cancel_before: which steps are cancelled between layers, and where.
        is_lost: which steps are cancelled before the executor has seen their plan at all.
        copies: with host memory of `host_blocks` behind it, where preempted requests are swapped
            to; every copy is made beside a step.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool = True,
        cancel_before: CancelBefore = lambda step: None,
        is_lost: Callable[[int], bool] = lambda step: False,
        copies: CopyThread | None = None,
        host_blocks: int = 0,
    ) -> None:
        config = SchedulerConfig(
            block_size=BLOCK_SIZE,
            max_model_len=engine.settings.max_model_len,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=enable_prefix_caching,
            host_blocks=host_blocks,
        )
        self._memory = engine.memory
        self._scheduler = engine.make_scheduler(config, _UNUSED_COSTS, Epoch(0))
        self._executor = engine.make_executor()
        self._cancel_before = cancel_before
        self._is_lost = is_lost
        self._copies = copies
        self._now = 0
        self.cancelled_steps = 0
        self.mixed_steps = 0
        """Steps with a decode and a piece of a longer prompt side by side."""

    @property
    def load(self) -> GroupLoad:
        """The scheduler's counters."""
        return self._scheduler.load()

    def generate(self, requests: Sequence[Request]) -> dict[RequestId, list[TokenOutput]]:
        """The outputs of each request, which joins at step `arrival_ns` (late ones at once)."""
        outputs: dict[RequestId, list[TokenOutput]] = {request.id: [] for request in requests}
        coming = sorted(requests, key=lambda request: request.arrival_ns)
        while coming or self._scheduler.has_work():
            while coming and coming[0].arrival_ns <= self._now:
                self._scheduler.add(coming.pop(0))
            for output in self._step():
                assert output.index == len(outputs[output.request_id])
                outputs[output.request_id].append(output)
        load = self.load
        assert load.free_blocks + load.cached_blocks == load.total_blocks
        assert all(tokens[-1].finish is not None for tokens in outputs.values())
        return outputs

    def _step(self) -> tuple[TokenOutput, ...]:
        step, self._now = self._now, self._now + 1
        plan = self._scheduler.schedule(step)
        self._scheduler.check()
        orders = self._begin_copies()
        if plan is None:
            assert orders or not self._scheduler.has_work(), "work is left, but no step is planned"
            self._end_copies(orders)
            return ()
        result = self._execute(plan, step)
        self._end_copies(orders)
        outputs = self._scheduler.update(plan, result, step)
        self._scheduler.check()
        self._memory.check()
        self.cancelled_steps += result.cancelled
        self.mixed_steps += len({len(chunk.token_ids) == 1 for chunk in plan.chunks}) == 2
        return outputs

    def _begin_copies(self) -> int:
        orders = self._scheduler.take_copies()
        for order in orders:
            assert self._copies is not None
            self._copies.submit(order)
        return len(orders)

    def _end_copies(self, orders: int) -> None:
        while orders:
            assert self._copies is not None
            select.select([self._copies.wake_fd], [], [])
            for transfer in self._copies.answers():
                self._scheduler.copied(transfer)
                orders -= 1

    def _execute(self, plan: StepPlan, step: int) -> StepResult:
        if self._is_lost(step):
            return StepResult(plan.epoch, plan.step, (), cancelled=True)
        layer = self._cancel_before(step)
        layers_begun = itertools.count()
        result = self._executor.execute(plan, lambda: next(layers_begun) == layer)
        assert result.cancelled == (layer is not None)
        return result
