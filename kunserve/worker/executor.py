"""The executor of a whole instance: one plan in, one result out (design section 2)."""

from __future__ import annotations

from kunserve.core.errors import AccountingError
from kunserve.device.kernels.base import Kernels
from kunserve.worker.decoder import Decoder
from kunserve.worker.sampler import Sampler
from kunserve.worker.stage import StageExecutor


class Executor(StageExecutor):
    """A stage that starts with all layers: `execute` is the whole step.

    Raises:
        AccountingError: `block_size` is not the decoder's.
    """

    def __init__(
        self, decoder: Decoder, kernels: Kernels, sampler: Sampler, block_size: int
    ) -> None:
        super().__init__(decoder, kernels)
        if block_size != decoder.block_size:
            raise AccountingError(f"blocks of {block_size} and {decoder.block_size} tokens")
        self._sampler = sampler
