"""A model small enough to compute by hand: its KV are numbers, its tokens are checksums.

The KV of a position depends on its token and on the KV before it, as in a real decoder, and a
sampled token on the KV of all positions, on the seed and on its index. So a wrong block table, a
shared block that was overwritten or KV that was never computed changes the tokens, while
failover, preemption and chunking do not.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence

from kunserve.core.errors import AccountingError, KunserveError
from kunserve.core.ids import BlockId, RequestId
from kunserve.core.request import FinishReason, Request, TokenOutput
from kunserve.core.step import Chunk, SampledToken, StepPlan, StepResult

VOCAB_SIZE = 29
EOS_TOKEN_ID = 0
POISON_TOKEN_ID = VOCAB_SIZE
"""In a prompt: every row that samples gives logits that are not finite."""
POISON_MESSAGE = "the logits are not finite"
KILLER_TOKEN_ID = VOCAB_SIZE + 1
"""In a prompt: the process that computes it ends in that step."""


class ProcessKilledError(KunserveError):
    """A step ended its process, as a segmentation fault does. `request_id`: whose chunk it was."""

    def __init__(self, request_id: RequestId) -> None:
        super().__init__(f"request {request_id} ended the process")
        self.request_id = request_id


def next_cell(previous: int, token_id: int) -> int:
    """KV of a position, from the KV of the position before it (0 before the first)."""
    return zlib.crc32(token_id.to_bytes(4, "little"), previous)


def sample(cells: bytes, seed: int, index: int) -> int:
    """Output token `index` from the KV of all known tokens, 4 bytes each."""
    counter = seed.to_bytes(8, "little") + index.to_bytes(8, "little")
    return zlib.crc32(counter, zlib.crc32(cells)) % VOCAB_SIZE


def reference_outputs(request: Request, eos_token_ids: Sequence[int]) -> tuple[TokenOutput, ...]:
    """All tokens of a request that fits, without scheduler, blocks or batches."""
    params = request.params
    outputs: list[TokenOutput] = []
    cells = array("I")
    for token_id in request.prompt_token_ids:
        cells.append(next_cell(cells[-1] if cells else 0, token_id))
    for index in range(params.max_tokens):
        token_id = sample(cells.tobytes(), params.seed, index)
        cells.append(next_cell(cells[-1], token_id))
        may_stop = index >= params.min_tokens
        is_eos = may_stop and token_id in eos_token_ids and not params.ignore_eos
        is_stop = may_stop and token_id in params.stop_token_ids and not is_eos
        is_last = index + 1 == params.max_tokens
        finish = FinishReason.STOP if is_eos or is_stop else None
        if is_last and finish is None:
            finish = FinishReason.LENGTH
        outputs.append(TokenOutput(request.id, index, token_id, None, finish, is_stop))
        if finish is not None:
            break
    return tuple(outputs)


class ToyExecutor:
    """Computes plans in a KV memory of blocks, and holds the plan to its contract."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._memory: dict[BlockId, array[int]] = {}
        self._started: dict[RequestId, Request] = {}

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute a plan.

        Raises:
            AccountingError: a chunk's request was not started.
            ProcessKilledError: a chunk holds KILLER_TOKEN_ID.
        """
        for chunk in plan.chunks:
            if KILLER_TOKEN_ID in chunk.token_ids:
                raise ProcessKilledError(chunk.request_id)
        for request_id in plan.released:
            self._started.pop(request_id, None)
        for request in plan.started:
            self._started[request.id] = request
        tokens: list[SampledToken] = []
        failed: list[tuple[RequestId, str]] = []
        for chunk in plan.chunks:
            cells = self._compute(chunk)
            if not chunk.samples:
                continue
            request = self._request_of(chunk)
            if POISON_TOKEN_ID in request.prompt_token_ids:
                failed.append((request.id, POISON_MESSAGE))
                continue
            token_id = sample(cells, request.params.seed, chunk.output_index)
            tokens.append(SampledToken(request.id, chunk.output_index, token_id))
        return StepResult(plan.epoch, plan.step, tuple(tokens), failed=tuple(failed))

    def _request_of(self, chunk: Chunk) -> Request:
        request = self._started.get(chunk.request_id)
        if request is None:
            raise AccountingError(f"request {chunk.request_id} samples, but it was not started")
        return request

    def _compute(self, chunk: Chunk) -> bytes:
        """Write the KV of the chunk's tokens; give that of all tokens up to its last."""
        position = chunk.context_len
        last = self._block(chunk, position - 1) if position else None
        cell = last[(position - 1) % self._block_size] if last is not None else 0
        for token_id in chunk.token_ids:
            cell = next_cell(cell, token_id)
            self._block(chunk, position)[position % self._block_size] = cell
            position += 1
        blocks = range(-(-position // self._block_size))
        cells = b"".join(self._block(chunk, i * self._block_size).tobytes() for i in blocks)
        return cells[: position * 4]

    def _block(self, chunk: Chunk, position: int) -> array[int]:
        block = chunk.block_table[position // self._block_size]
        if block not in self._memory:
            self._memory[block] = array("I", [0] * self._block_size)
        return self._memory[block]
