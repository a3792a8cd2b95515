"""The fixed queue of `kunserve bench bubbles`: long summarisation prompts between chats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from kunserve.bench.workload import RequestShape, read_lengths_csv

LONGBENCH = "longbench_lengths.csv"
SHAREGPT = "sharegpt_8k_lengths.csv"
SUMMARISATION_TASKS = ("gov_report", "multi_news")


@dataclass(frozen=True)
class Lengths:
    """Medians of prompt and output, and the deviation of their logarithms."""

    prompt_tokens: float
    prompt_sigma: float
    output_tokens: float
    output_sigma: float

    def draw(self, rng: Random) -> RequestShape:
        """One request, log-normal."""
        return RequestShape(
            max(1, round(rng.lognormvariate(math.log(self.prompt_tokens), self.prompt_sigma))),
            max(1, round(rng.lognormvariate(math.log(self.output_tokens), self.output_sigma))),
        )


# Of the recorded lengths; those of chats have a longer tail to the left than a log-normal.
SYNTHETIC = (Lengths(4260, 0.97, 402, 0.57), Lengths(1730, 1.0, 415, 0.7))


@dataclass(frozen=True)
class QueueOptions:
    """Args:
    num_requests: of the queue, every second one a summary.
    scale: lengths are multiplied by it.
    max_prompt_tokens: longer prompts are cut, after scaling.
    """

    num_requests: int
    scale: float = 1.0
    max_prompt_tokens: int = 8000
    seed: int = 0


@dataclass(frozen=True)
class FixedQueue:
    """Requests in their order, and where their lengths come from."""

    source: str
    requests: tuple[RequestShape, ...]

    @property
    def prompt_tokens(self) -> int:
        """Of all requests."""
        return sum(request.prompt_tokens for request in self.requests)

    @property
    def output_tokens(self) -> int:
        """Of all requests."""
        return sum(request.output_tokens for request in self.requests)


def fixed_queue(options: QueueOptions, traces: Path) -> FixedQueue:
    """The queue of a seed, from the recorded lengths in `traces` if they are there, else from
    log-normal ones of the same statistics.

    Raises:
        WorkloadError: a file of lengths is malformed.
    """
    rng = Random(options.seed)
    kinds = _recorded(traces)
    shapes = [
        rng.choice(kinds[index % 2]) if kinds else SYNTHETIC[index % 2].draw(rng)
        for index in range(options.num_requests)
    ]
    source = "LongBench and ShareGPT, recorded" if kinds else "log-normal"
    return FixedQueue(source, tuple(_scaled(shape, options) for shape in shapes))


def _recorded(traces: Path) -> list[Sequence[RequestShape]]:
    longbench, sharegpt = traces / LONGBENCH, traces / SHAREGPT
    if not (longbench.is_file() and sharegpt.is_file()):
        return []
    return [
        read_lengths_csv(longbench, SUMMARISATION_TASKS).shapes,
        read_lengths_csv(sharegpt).shapes,
    ]


def _scaled(shape: RequestShape, options: QueueOptions) -> RequestShape:
    return RequestShape(
        min(options.max_prompt_tokens, max(1, round(shape.prompt_tokens * options.scale))),
        max(2, round(shape.output_tokens * options.scale)),
    )
