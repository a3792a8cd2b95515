"""Everything one whole instance needs to compute, put together: memory, weights, kernels, decoder.

Used by the instance process, by `kunserve bench engine` and by tests, so that all run the same
engine.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

from kunserve.core.closing import Closing
from kunserve.core.ids import Epoch, SlotId
from kunserve.core.layout import LayerRange, Part
from kunserve.core.model import ModelSpec
from kunserve.device.arena import create_arena
from kunserve.device.kernels import Kernels, create_kernels
from kunserve.policy.blocks import BlockPool
from kunserve.policy.cost_model import CostModel
from kunserve.policy.pages import SlotMap
from kunserve.policy.scheduler import Scheduler, SchedulerConfig
from kunserve.worker.decoder import Decoder, DecoderMemory, build_rope_table
from kunserve.worker.executor import Executor
from kunserve.worker.memory import InstanceMemory
from kunserve.worker.sampler import Sampler
from kunserve.worker.settings import EngineSettings, plan_instance_memory
from kunserve.worker.slabs import part_format
from kunserve.worker.weights import (
    CheckpointReader,
    check_checkpoint,
    load_part,
    part_checksum,
)

Progress = Callable[[str, float], None]
"""Called with what is being done and how much of it is done, 0..1."""


class Engine(Closing):
    """A loaded whole instance. Close it to give all memory and threads back."""

    def __init__(self, settings: EngineSettings, progress: Progress) -> None:
        """Open memory and load all parts.

        Raises:
            ModelLoadError, ConfigError, ArenaError, KernelsNotBuiltError, UnsupportedCpuError: see
                the parts.
        """
        self.settings = settings
        spec = settings.spec
        self.plan = plan_instance_memory(
            spec, settings.block_size, settings.kv_cache_memory_bytes, settings.memory_bytes
        )
        with ExitStack() as stack:
            self.kernels: Kernels = create_kernels("cpu", settings.threads)
            stack.callback(self.kernels.close)
            self.slots = SlotMap.for_domain(
                self.plan.geometry,
                num_slots=settings.num_slots,
                num_layers=spec.num_layers,
                member_pages=self.plan.num_pages,
            )
            arena = create_arena(
                "host", page_bytes=self.plan.geometry.page_bytes, num_pages=self.plan.num_pages
            )
            stack.callback(arena.close)
            self.slot = SlotId(settings.slot)
            self.memory = InstanceMemory(
                self.plan, self.slots, self.slot, arena, poison=settings.poison
            )
            stack.callback(self.memory.close)
            self.checksums: dict[Part, str] = {}
            self._load(progress)
            rope = build_rope_table(spec, settings.max_model_len)
            self.decoder = Decoder(
                spec,
                self.kernels,
                DecoderMemory(
                    {part: self.memory.part_address(part) for part in spec.parts},
                    {layer: self.memory.kv_base(layer) for layer in range(spec.num_layers)},
                ),
                LayerRange(0, spec.num_layers),
                rope,
                settings.block_size,
            )
            self._stack = stack.pop_all()

    def _load(self, progress: Progress) -> None:
        spec = self.settings.spec
        with CheckpointReader(Path(self.settings.model_directory)) as reader:
            check_checkpoint(reader, spec)
            for done, part in enumerate(spec.parts):
                progress("loading weights", done / len(spec.parts))
                load_part(reader, spec, part, self.memory.part_address(part), self.kernels)
                if self.settings.num_slots > 1:  # only then can a part ever go and come back
                    self.checksums[part] = self.checksum(part)

    def checksum(self, part: Part) -> str:
        """Of the bytes at the slab of `part` now; equal to `checksums[part]` if they are right."""
        return part_checksum(self.memory.part_address(part), part_format(self.spec, part).nbytes)

    def load(self, part: Part) -> None:
        """Read a part from the file into its slab, which must be mapped. May run beside a step:
        the kernels that pack it here are others than those that compute.

        Raises:
            ModelLoadError: the file is gone or has changed.
        """
        with (
            CheckpointReader(Path(self.settings.model_directory)) as reader,
            closing(create_kernels("cpu", 1)) as kernels,
        ):
            load_part(reader, self.spec, part, self.memory.part_address(part), kernels)

    @property
    def spec(self) -> ModelSpec:
        """Shape of the model."""
        return self.settings.spec

    @property
    def total_blocks(self) -> int:
        """KV blocks of this instance as a group of its own."""
        own = self.slots.slot_range(self.slot)
        pages = sum(run.count for run in self.memory.complete_pages(own))
        return pages * self.plan.geometry.blocks_per_page

    def make_pool(self) -> BlockPool:
        """The block pool of a group of this instance alone."""
        return BlockPool(
            self.slots.slot_blocks,
            self.plan.geometry.blocks_per_page,
            {self.slot: self.total_blocks},
        )

    def make_executor(self) -> Executor:
        """An executor with no request started."""
        sampler = Sampler(self.settings.spec.vocab_size, self.settings.spec.eos_token_ids)
        return Executor(self.decoder, self.kernels, sampler, self.settings.block_size)

    def make_scheduler(
        self, config: SchedulerConfig, cost_model: CostModel, epoch: Epoch
    ) -> Scheduler:
        """The scheduler of a group of this instance alone."""
        return Scheduler(config, self.make_pool(), cost_model, epoch)

    def close(self) -> None:
        """Unmap all memory and end the threads."""
        self._stack.close()
