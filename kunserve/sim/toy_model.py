"""A model small enough to compute by hand: its KV are numbers, its tokens are checksums.

A hidden row is one number. Layer by layer, as in a real decoder,

    KV cell of (layer, position)  =  crc(layer, row below)
    row of (layer, position)      =  crc(row below, all cells of this layer up to the position)

and a sampled token is a checksum of the last row, the seed and its index. So KV that was lost, is
out of date, or comes from a wrong layer, block or page changes the tokens, while failover,
preemption, chunking and another split of the layers do not.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from kunserve.core.actions import Payload, RunFirst, RunHead, Work
from kunserve.core.errors import AccountingError, KunserveError
from kunserve.core.ids import RequestId
from kunserve.core.layout import LayerRange, Part, PartKind
from kunserve.core.request import FinishReason, Request, TokenOutput
from kunserve.core.step import Chunk, SampledToken, StepPlan, StepResult
from kunserve.sim.memory import POISON, TableMapper

VOCAB_SIZE = 29
EOS_TOKEN_ID = 0
POISON_TOKEN_ID = VOCAB_SIZE
"""In a prompt: every row that samples gives logits that are not finite."""
POISON_MESSAGE = "the logits are not finite"
KILLER_TOKEN_ID = VOCAB_SIZE + 1
"""In a prompt: the process that computes it ends in that step."""

EMBEDDING = Part(PartKind.EMBEDDING)
HEAD = Part(PartKind.HEAD)

Rows: TypeAlias = "tuple[array[int], ...]"
"""Hidden rows of each chunk of a step, one per token."""


class ProcessKilledError(KunserveError):
    """A step ended its process, as a segmentation fault does. `request_id`: whose chunk it was."""

    def __init__(self, request_id: RequestId) -> None:
        super().__init__(f"request {request_id} ended the process")
        self.request_id = request_id


def embed(token_id: int) -> int:
    """The row below layer 0."""
    return zlib.crc32(token_id.to_bytes(4, "little"))


def _scramble(number: int) -> int:
    """Break the linearity of a checksum: over four layers, differences would cancel out."""
    product = number * 0x9E3779B1 & 0xFFFFFFFF
    return product ^ product >> 15


def cell_of(layer: int, row: int) -> int:
    """The KV that a row leaves in a layer."""
    return _scramble(zlib.crc32(row.to_bytes(8, "little"), layer + 1))


def add_cell(cells_crc: int, cell: int) -> int:
    """Checksum of the cells of a layer up to one more position; 0 before the first."""
    return zlib.crc32(cell.to_bytes(8, "little"), cells_crc)


def next_row(row: int, cells_crc: int) -> int:
    """The row above a layer."""
    return _scramble(zlib.crc32(row.to_bytes(8, "little"), cells_crc))


def sample(row: int, seed: int, index: int) -> int:
    """Output token `index` from the last row of the last known token."""
    counter = seed.to_bytes(8, "little") + index.to_bytes(8, "little")
    return zlib.crc32(counter, row) % VOCAB_SIZE


def reference_outputs(
    request: Request, eos_token_ids: Sequence[int], num_layers: int
) -> tuple[TokenOutput, ...]:
    """All tokens of a request that fits, without scheduler, blocks, stages or batches."""
    params = request.params
    outputs: list[TokenOutput] = []
    crcs = [0] * num_layers
    row = 0
    for token_id in request.prompt_token_ids:
        row = _reference_row(token_id, crcs)
    for index in range(params.max_tokens):
        token_id = sample(row, params.seed, index)
        row = _reference_row(token_id, crcs)
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


def _reference_row(token_id: int, crcs: list[int]) -> int:
    row = embed(token_id)
    for layer in range(len(crcs)):
        crcs[layer] = add_cell(crcs[layer], cell_of(layer, row))
        row = next_row(row, crcs[layer])
    return row


class ToyExecutor:
    """Computes the work of one stage in the instance's memory, and holds plans to their contract.

    Args:
        has_head: the model has a head of its own; else the embedding serves as one.
    """

    def __init__(self, mapper: TableMapper, num_layers: int, has_head: bool) -> None:
        self._mapper = mapper
        self._num_layers = num_layers
        self._head_part = HEAD if has_head else EMBEDDING
        self._started: dict[RequestId, Request] = {}
        self.layers = LayerRange(0, num_layers)
        """Layers of its stage."""

    @property
    def is_whole(self) -> bool:
        """It computes whole steps."""
        return len(self.layers) == self._num_layers

    def run(self, work: Work, num_layers: int) -> tuple[StepResult | None, Payload]:
        """Compute the first `num_layers` layers of a piece of work, and what comes after them if
        these are all: a result or rows for the next stage. Both are None when it stops before.

        Raises:
            AccountingError: KV or weights are not where they must be, or a chunk's request was not
                started.
            ProcessKilledError: a chunk holds KILLER_TOKEN_ID.
        """
        if isinstance(work, RunHead):
            return self._head(work.plan, work.payload), None
        if isinstance(work, RunFirst):
            self._start(work.plan)
            rows = self._embed(work.plan.chunks)
            chunks, moves = work.plan.chunks, work.plan.moves
        else:
            rows = tuple(array("q", chunk_rows) for chunk_rows in work.payload)
            chunks, moves = work.chunks, work.moves
        for move in moves:
            for layer in self.layers:
                self._mapper.copy_block(layer, move.source, move.target)
        for layer in list(self.layers)[:num_layers]:
            self._layer(layer, chunks, rows)
        if num_layers < len(self.layers):
            return None, None
        if self.layers.stop < self._num_layers:
            return None, rows
        last = tuple(
            chunk_rows[-1:] for chunk, chunk_rows in zip(chunks, rows, strict=True) if chunk.samples
        )
        return (self._head(work.plan, last), None) if isinstance(work, RunFirst) else (None, last)

    def check_killers(self, work: Work) -> None:
        """Raise ProcessKilledError if the work ends its process."""
        for chunk in work.plan.chunks if isinstance(work, RunFirst) else ():
            if KILLER_TOKEN_ID in chunk.token_ids:
                raise ProcessKilledError(chunk.request_id)

    def _start(self, plan: StepPlan) -> None:
        for request_id in plan.released:
            self._started.pop(request_id, None)
        for request in plan.started:
            self._started[request.id] = request

    def _embed(self, chunks: Iterable[Chunk]) -> Rows:
        self._mapper.check_part(EMBEDDING)
        return tuple(array("q", map(embed, chunk.token_ids)) for chunk in chunks)

    def _layer(self, layer: int, chunks: Sequence[Chunk], rows: Rows) -> None:
        """Replace `rows` by those above `layer`, and write its KV."""
        self._mapper.check_part(Part(PartKind.LAYER, layer))
        cells, size = self._mapper.pages.cells, self._mapper.pages.block_size
        for chunk, chunk_rows in zip(chunks, rows, strict=True):
            crc = self._prefix_crc(layer, chunk)
            for index, row in enumerate(chunk_rows):
                block, offset = divmod(chunk.context_len + index, size)
                cell = cell_of(layer, row)
                cells[self._mapper.first_cell(layer, chunk.block_table[block]) + offset] = cell
                crc = add_cell(crc, cell)
                chunk_rows[index] = next_row(row, crc)

    def _prefix_crc(self, layer: int, chunk: Chunk) -> int:
        cells, size = self._mapper.pages.cells, self._mapper.pages.block_size
        crc = 0
        for start in range(0, chunk.context_len, size):
            block = chunk.block_table[start // size]
            first = self._mapper.first_cell(layer, block)
            seen = cells[first : first + min(size, chunk.context_len - start)]
            if POISON in seen:
                raise AccountingError(
                    f"{chunk.request_id} reads KV of layer {layer} in block {block} (position "
                    f"{start}) that nobody has written there"
                )
            crc = zlib.crc32(seen.tobytes(), crc)
        return crc

    def _head(self, plan: StepPlan, rows: Sequence[array[int]]) -> StepResult:
        self._mapper.check_part(self._head_part)
        tokens: list[SampledToken] = []
        failed: list[tuple[RequestId, str]] = []
        chunks = [chunk for chunk in plan.chunks if chunk.samples]
        for chunk, (row,) in zip(chunks, rows, strict=True):
            request = self._started.get(chunk.request_id)
            if request is None:
                raise AccountingError(f"request {chunk.request_id} samples, but was not started")
            if POISON_TOKEN_ID in request.prompt_token_ids:
                failed.append((request.id, POISON_MESSAGE))
                continue
            token_id = sample(row, request.params.seed, chunk.output_index)
            tokens.append(SampledToken(request.id, chunk.output_index, token_id))
        return StepResult(plan.epoch, plan.step, tuple(tokens), failed=tuple(failed))
