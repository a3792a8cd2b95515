"""Names of KV block contents: a hash chain over the tokens of full blocks (design section 5).

The hash of block i covers the tokens of blocks 0..i, because the KV of a token depends on all
tokens before it. Equal hashes therefore mean equal KV. Schedulers use them to share blocks, the
dispatcher in the front to guess which group holds a prompt's prefix.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

ROOT_HASH = b""
"""Parent of a request's first block."""


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of one full block after `parent`: 32 bytes, the same on every machine."""
    content = struct.pack(f"<{len(token_ids)}I", *token_ids)
    return hashlib.sha256(parent + content).digest()


def block_hashes(
    token_ids: Sequence[int], block_size: int, known: Sequence[bytes] = ()
) -> tuple[bytes, ...]:
    """Hashes of all full blocks of `token_ids`, in order; a partly filled tail has none.

    `known` are the hashes of its first blocks if they were computed before: only the blocks
    after them are hashed.
    """
    hashes = list(known)
    parent = hashes[-1] if hashes else ROOT_HASH
    for index in range(len(hashes), len(token_ids) // block_size):
        parent = block_hash(parent, token_ids[index * block_size : (index + 1) * block_size])
        hashes.append(parent)
    return tuple(hashes)
