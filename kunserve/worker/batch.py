"""From a step's chunks to the arrays that the kernels take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kunserve.core.errors import AccountingError
from kunserve.core.step import Chunk
from kunserve.device.kernels.base import Batch


@dataclass(frozen=True)
class StepInputs:
    """A step as arrays: M rows in the order of the chunks, R of them with wanted logits.

    token_ids: int32 [M]. sample_rows: int64 [R], the last row of each chunk that samples, in the
    order of the chunks. `batch` says where the rows stand and which blocks hold their context.
    """

    token_ids: NDArray[np.int32]
    sample_rows: NDArray[np.int64]
    batch: Batch


def build_step_inputs(chunks: Sequence[Chunk], block_size: int) -> StepInputs:
    """Lay the chunks out one after the other.

        rows          | chunk 0 .......... | chunk 1 | chunk 2 .. |
        query_starts  0                    n0        n0+n1        M
        sample_rows                      ^ (samples)            ^

    Raises:
        AccountingError: a chunk has no tokens, or its block table does not cover its positions
            (`block_size` tokens a block).
    """
    lengths = [len(chunk.token_ids) for chunk in chunks]
    for chunk, length in zip(chunks, lengths, strict=True):
        end = chunk.context_len + length
        if length == 0 or len(chunk.block_table) * block_size < end:
            raise AccountingError(
                f"request {chunk.request_id}: a chunk of {length} tokens after "
                f"{chunk.context_len}, with {len(chunk.block_table)} blocks of {block_size}"
            )
    query_starts = np.zeros(len(chunks) + 1, np.int32)
    np.cumsum(lengths, out=query_starts[1:])
    # Entries beyond a table are never read; block 0 always exists.
    width = max((len(chunk.block_table) for chunk in chunks), default=0)
    block_tables = np.zeros((len(chunks), width), np.int64)
    for row, chunk in zip(block_tables, chunks, strict=True):
        row[: len(chunk.block_table)] = chunk.block_table
    samples = np.fromiter((chunk.samples for chunk in chunks), np.bool_, len(chunks))
    tokens = (token for chunk in chunks for token in chunk.token_ids)
    return StepInputs(
        token_ids=np.fromiter(tokens, np.int32, int(query_starts[-1])),
        sample_rows=query_starts[1:][samples].astype(np.int64) - 1,
        batch=Batch(
            query_starts=query_starts,
            context_lens=np.array([chunk.context_len for chunk in chunks], np.int32),
            block_tables=block_tables,
        ),
    )


def without_tokens(chunks: Sequence[Chunk]) -> tuple[Chunk, ...]:
    """`chunks` as the stages behind the leader get them: only the number of tokens is left.

    They compute on hidden rows and have no embedding. Zeros take one byte each in a message where
    ids take up to three: 512 bytes beside the megabyte of hidden rows of a chunk of 512 tokens, so
    a message type of its own for a count would save nothing.
    """
    return tuple(
        Chunk(
            request_id=chunk.request_id,
            token_ids=(0,) * len(chunk.token_ids),
            context_len=chunk.context_len,
            block_table=chunk.block_table,
            samples=chunk.samples,
            output_index=chunk.output_index,
        )
        for chunk in chunks
    )
