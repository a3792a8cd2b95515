"""What a step costs, as a function of its chunks (paper section 5 on lookahead, design section 5).

    chunk(p, c) = alpha * (p*c + (c*c + c)/2)     token pairs that attention looks at
                + delta * (p + c)                 KV read once
                + beta * c                        linear layers
    step        = gamma + sum of chunks + head * (rows that sample)

p is the prefix (tokens already computed), c the tokens of the chunk. `gamma` is paid once a step:
the weights are read once for the whole batch. It is added, not overlapped: on a CPU one token's
arithmetic is far above its share of the weight read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import NamedTuple

from kunserve.core.errors import ConfigError


class ChunkShape(NamedTuple):
    """What the cost of a chunk depends on. `samples`: its last row goes through the head."""

    prefix_tokens: int
    chunk_tokens: int
    samples: bool = False


class StepSample(NamedTuple):
    """One measured step: the chunks it computed and the time it took."""

    chunks: tuple[ChunkShape, ...]
    elapsed_ns: int


@dataclass(frozen=True)
class CostModel:
    """Fitted constants of one model on one instance, in nanoseconds.

    A stage that holds n of the L layers takes n/L of all terms but `head_ns`, which the leader
    pays.

    Raises:
        ConfigError: a constant is negative, so that costs would not grow with the work.
    """

    alpha_ns: float
    """Per pair of tokens in attention."""
    delta_ns: float
    """Per token of context that is read, computed or new."""
    beta_ns: float
    """Per computed token, in the linear layers."""
    gamma_ns: float
    """Per step."""
    head_ns: float = 0.0
    """Per row that samples."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) >= 0.0:  # NaN is refused as well
                value = getattr(self, field.name)
                raise ConfigError(f"{field.name} must be at least 0, got {value}; fit it again")

    def chunk_ns(self, prefix_tokens: int, chunk_tokens: int, samples: bool = False) -> float:
        """Cost of one chunk, without the step's own `gamma_ns`."""
        pairs = prefix_tokens * chunk_tokens + (chunk_tokens * chunk_tokens + chunk_tokens) // 2
        cost_ns = (
            self.alpha_ns * pairs
            + self.delta_ns * (prefix_tokens + chunk_tokens)
            + self.beta_ns * chunk_tokens
        )
        return cost_ns + self.head_ns if samples else cost_ns

    def step_ns(self, chunks: Iterable[ChunkShape]) -> float:
        """Cost of one step that computes `chunks`."""
        return self.gamma_ns + sum(self.chunk_ns(*chunk) for chunk in chunks)

    def largest_chunk(self, budget_ns: float, prefix_tokens: int, limit_tokens: int) -> int:
        """Most tokens, 0..`limit_tokens`, that cost at most `budget_ns` after this prefix.

        The inverse of `chunk_ns` in `chunk_tokens`, without the head. Found by bisection, so that
        it agrees with `chunk_ns` to the last bit.
        """
        if limit_tokens <= 0 or self.chunk_ns(prefix_tokens, limit_tokens) <= budget_ns:
            return max(0, limit_tokens)
        fits, too_many = 0, limit_tokens
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self.chunk_ns(prefix_tokens, middle) <= budget_ns:
                fits = middle
            else:
                too_many = middle
        return fits

    @classmethod
    def fit(cls, samples: Sequence[StepSample]) -> CostModel:
        """Least squares on the relative error, with no constant below zero.

        Relative, because decode steps are short and prefill steps long, and both must be
        predicted. Exact non-negative least squares: with five constants, every subset of them is
        solved and the best one without a negative value is taken. Constants that the samples
        cannot tell apart share their part of the cost.

        Raises:
            ConfigError: there is no sample, or a sample without time.
        """
        if not samples:
            raise ConfigError("the cost model needs at least one measured step")
        if any(sample.elapsed_ns <= 0 for sample in samples):
            raise ConfigError("a measured step took no time; measure again")
        rows = [_relative_features(sample) for sample in samples]
        scales = [max(column) or 1.0 for column in zip(*rows, strict=True)]
        scaled = [[value / scale for value, scale in zip(row, scales, strict=True)] for row in rows]
        solution = _non_negative_least_squares(scaled)
        return cls(*(value / scale for value, scale in zip(solution, scales, strict=True)))

    def relative_error(self, sample: StepSample) -> float:
        """(predicted - measured) / measured of one step."""
        return self.step_ns(sample.chunks) / sample.elapsed_ns - 1.0


def _relative_features(sample: StepSample) -> list[float]:
    """What alpha, delta, beta, gamma and head multiply, over the measured time (target: 1)."""
    pairs = context = computed = sampled = 0
    for prefix, tokens, samples in sample.chunks:
        pairs += prefix * tokens + (tokens * tokens + tokens) // 2
        context += prefix + tokens
        computed += tokens
        sampled += samples
    return [value / sample.elapsed_ns for value in (pairs, context, computed, 1, sampled)]


def _non_negative_least_squares(rows: list[list[float]]) -> list[float]:
    """The x >= 0 that minimises |rows * x - 1|, over all subsets of positive x."""
    width = len(rows[0])
    best = [0.0] * width
    best_error = float(len(rows))
    for size in range(width, 0, -1):
        for columns in combinations(range(width), size):
            solved = _least_squares([[row[column] for column in columns] for row in rows])
            if min(solved) < 0.0:
                continue
            candidate = [0.0] * width
            for column, value in zip(columns, solved, strict=True):
                candidate[column] = value
            error = _squared_error(rows, candidate)
            if error < best_error:
                best, best_error = candidate, error
    return best


def _squared_error(rows: list[list[float]], x: list[float]) -> float:
    return sum((sum(a * b for a, b in zip(row, x, strict=True)) - 1.0) ** 2 for row in rows)


RIDGE = 1e-12
"""Relative to the diagonal: makes columns that are equal or zero solvable, too small to be seen."""


def _least_squares(rows: list[list[float]]) -> list[float]:
    """Solve the normal equations of |rows * x - 1|; columns are scaled to at most 1."""
    width = len(rows[0])
    matrix = [[sum(row[i] * row[j] for row in rows) for j in range(width)] for i in range(width)]
    for i in range(width):
        matrix[i][i] += RIDGE * (matrix[i][i] + len(rows))
    return _solve(matrix, [sum(row[i] for row in rows) for i in range(width)])


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gaussian elimination with partial pivoting of a positive definite system."""
    size = len(right)
    rows = [[*matrix[i], right[i]] for i in range(size)]
    for at in range(size):
        pivot = max(range(at, size), key=lambda i: abs(rows[i][at]))
        rows[at], rows[pivot] = rows[pivot], rows[at]
        for below in range(at + 1, size):
            factor = rows[below][at] / rows[at][at]
            for column in range(at, size + 1):
                rows[below][column] -= factor * rows[at][column]
    solution = [0.0] * size
    for at in reversed(range(size)):
        known = sum(rows[at][column] * solution[column] for column in range(at + 1, size))
        solution[at] = (rows[at][size] - known) / rows[at][at]
    return solution
