"""The only randomness of token sampling: a pure function of (seed, t).

Counter-based, so there is no generator to advance, hand over in a transition or lose with a
process: a request that moves, is preempted or starts again after a failure draws the same numbers.
"""

from __future__ import annotations

from hashlib import blake2b

_WORD_BYTES = 8
_FRACTION_BITS = 53
_PERSONALIZATION = b"kunserve.uniform"


def uniform(seed: int, token_index: int) -> float:
    """The uniform random number of token `token_index` (t, from 0) of a request.

    BLAKE2b with an 8-byte digest and the personalization `kunserve.uniform` over `seed` and
    `token_index`, each 8 bytes little-endian. The upper 53 bits of the digest, read
    little-endian, times 2^-53: a multiple of 2^-53 in [0, 1), the same on every machine.

    Raises:
        OverflowError: `seed` or `token_index` is outside [0, 2^64).
    """
    counter = seed.to_bytes(_WORD_BYTES, "little") + token_index.to_bytes(_WORD_BYTES, "little")
    digest = blake2b(counter, digest_size=_WORD_BYTES, person=_PERSONALIZATION).digest()
    bits = int.from_bytes(digest, "little") >> (8 * _WORD_BYTES - _FRACTION_BITS)
    return bits * 2.0**-_FRACTION_BITS
