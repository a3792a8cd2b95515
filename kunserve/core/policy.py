"""Names of the choices that an operator has: how overload is answered, and how steps are formed.

Each is one value of the configuration, resolved once; the code that follows it is in
`kunserve.policy`.
"""

from __future__ import annotations

from enum import Enum


class PolicyName(Enum):
    """What answers a memory overload. All of them run the same engine."""

    KUNSERVE = "kunserve"
    """Drop replicated parameters where it pays, restore them when it is over (the paper)."""
    OBSERVE = "observe"
    """Decide as KUNSERVE does and say what it would have won, but never act."""
    RECOMPUTE = "recompute"
    """Preempt the latest request and compute it again (vLLM)."""
    SWAP = "swap"
    """Preempt the latest request to host memory, while others compute (InferCept)."""
    MIGRATE = "migrate"
    """Balance memory: move running requests between instances, dispatch queued ones again
    (Llumnix)."""
    STATIC_PP = "static-pp"
    """Pairs of instances are pipelines from the start and stay so (vLLM with PP 2)."""


class Trigger(Enum):
    """When KUNSERVE drops."""

    GAIN = "gain"
    """When waiting falls by enough, counting what the change costs (design section 5)."""
    MEMORY_ONLY = "memory-only"
    """Whenever demand exceeds capacity: the paper's rule, for comparisons."""


class Batching(Enum):
    """How work is divided into microbatches when requests queue."""

    LOOKAHEAD = "lookahead"
    """By predicted cost, over all queued work (paper, mechanism 6)."""
    TOKEN_COUNT = "token-count"
    """By number of tokens alone, for comparisons."""


class BatchOrder(Enum):
    """Who gets a step's budget first."""

    DECODE_FIRST = "decode-first"
    PREFILL_FIRST = "prefill-first"
