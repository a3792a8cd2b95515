"""What a step costs, as a function of its chunks (paper section 5 on lookahead, design section 5).

    chunk(p, c) = alpha * (p*c + (c*c + c)/2)     token pairs that attention looks at
                + delta * (p + c)                 KV read once
                + beta * c                        linear layers
    layers      = gamma + sum of chunks           a stage with n of the L layers: n/L of it
    head        = head_gamma + head * rows        rows that sample, if any; the leader's alone
    step        = layers + head

p is the prefix (tokens already computed), c the tokens of the chunk. `gamma` and `head_gamma` are
paid once a step: the weights are read once for the whole batch. They are added, not overlapped: on
a CPU one token's arithmetic is far above its share of the weight read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import NamedTuple

from kunserve.core.errors import ConfigError, LayoutError


class ChunkShape(NamedTuple):
    """What the cost of a chunk depends on. `samples`: its last row goes through the head."""

    prefix_tokens: int
    chunk_tokens: int
    samples: bool = False


class StepSample(NamedTuple):
    """One measured step of a whole instance: the chunks it computed and the time it took.

    Layers and head apart, so that the time of any stage follows. `head_ns` of a step without a row
    that samples is ignored.
    """

    chunks: tuple[ChunkShape, ...]
    layers_ns: int
    head_ns: int = 0

    @property
    def elapsed_ns(self) -> int:
        """Time of the step."""
        return self.layers_ns + (self.head_ns if self.sampled_rows else 0)

    @property
    def sampled_rows(self) -> int:
        """Rows that went through the head."""
        return sum(chunk.samples for chunk in self.chunks)


@dataclass(frozen=True)
class CostModel:
    """Fitted constants of one model on one instance or on one stage, in nanoseconds.

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
    """Per step, in the layers."""
    head_gamma_ns: float = 0.0
    """Per step in which some row samples, in the head."""
    head_ns: float = 0.0
    """Per row that samples."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) >= 0.0:  # NaN is refused as well
                value = getattr(self, field.name)
                raise ConfigError(f"{field.name} must be at least 0, got {value}; fit it again")

    @property
    def fixed_ns(self) -> float:
        """Cost of a step that samples, however small its chunks."""
        return self.gamma_ns + self.head_gamma_ns

    def for_stage(self, num_layers_held: int, num_layers: int, is_leader: bool) -> CostModel:
        """The cost model of one stage, fitted on whole instances (design section 5).

        Args:
            num_layers_held: layers of the stage.
            num_layers: layers of the model, as many as this cost model is of.
            is_leader: the stage runs the head.

        Raises:
            LayoutError: a stage has 1..`num_layers` layers.
        """
        if not 1 <= num_layers_held <= num_layers:
            raise LayoutError(
                f"a stage of a model of {num_layers} layers cannot hold {num_layers_held} of them"
            )
        share = num_layers_held / num_layers
        return CostModel(
            alpha_ns=self.alpha_ns * share,
            delta_ns=self.delta_ns * share,
            beta_ns=self.beta_ns * share,
            gamma_ns=self.gamma_ns * share,
            head_gamma_ns=self.head_gamma_ns if is_leader else 0.0,
            head_ns=self.head_ns if is_leader else 0.0,
        )

    def stage_ns(
        self, chunks: Iterable[ChunkShape], num_layers_held: int, num_layers: int, is_leader: bool
    ) -> float:
        """Cost of one step on one stage; arguments and errors as in `for_stage`."""
        return self.for_stage(num_layers_held, num_layers, is_leader).step_ns(chunks)

    def chunk_ns(self, prefix_tokens: int, chunk_tokens: int, samples: bool = False) -> float:
        """Cost of one chunk, without what the step pays once: `gamma_ns` and `head_gamma_ns`."""
        pairs = prefix_tokens * chunk_tokens + (chunk_tokens * chunk_tokens + chunk_tokens) // 2
        cost_ns = (
            self.alpha_ns * pairs
            + self.delta_ns * (prefix_tokens + chunk_tokens)
            + self.beta_ns * chunk_tokens
        )
        return cost_ns + self.head_ns if samples else cost_ns

    def step_ns(self, chunks: Iterable[ChunkShape]) -> float:
        """Cost of one step that computes `chunks`."""
        cost_ns, some_sample = self.gamma_ns, False
        for chunk in chunks:
            cost_ns += self.chunk_ns(*chunk)
            some_sample = some_sample or chunk.samples
        return cost_ns + self.head_gamma_ns if some_sample else cost_ns

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
        predicted. Layers and head are fitted apart. Exact non-negative least squares: with four
        constants at most, every subset of them is solved and the best one without a negative value
        is taken. Constants that the samples cannot tell apart share their part of the cost.

        Raises:
            ConfigError: there is no sample, or a sample without time.
        """
        if not samples:
            raise ConfigError("the cost model needs at least one measured step")
        with_head = [sample for sample in samples if sample.sampled_rows]
        if any(sample.layers_ns <= 0 for sample in samples) or any(
            sample.head_ns <= 0 for sample in with_head
        ):
            raise ConfigError("a measured step took no time; measure again")
        alpha_ns, delta_ns, beta_ns, gamma_ns = _fit_columns(
            [_layer_features(sample) for sample in samples]
        )
        head_gamma_ns, head_ns = (
            _fit_columns([_head_features(sample) for sample in with_head])
            if with_head
            else (0.0, 0.0)
        )
        return cls(alpha_ns, delta_ns, beta_ns, gamma_ns, head_gamma_ns, head_ns)

    def relative_error(self, sample: StepSample) -> float:
        """(predicted - measured) / measured of one step."""
        return self.step_ns(sample.chunks) / sample.elapsed_ns - 1.0


def _layer_features(sample: StepSample) -> list[float]:
    """What alpha, delta, beta and gamma multiply, over the measured time (target: 1)."""
    pairs = context = computed = 0
    for prefix, tokens, _ in sample.chunks:
        pairs += prefix * tokens + (tokens * tokens + tokens) // 2
        context += prefix + tokens
        computed += tokens
    return [value / sample.layers_ns for value in (pairs, context, computed, 1)]


def _head_features(sample: StepSample) -> list[float]:
    """What head_gamma and head multiply, over the measured time (target: 1)."""
    return [1 / sample.head_ns, sample.sampled_rows / sample.head_ns]


def _fit_columns(rows: list[list[float]]) -> list[float]:
    """The x >= 0 that brings |rows * x| closest to 1; columns are scaled before solving."""
    scales = [max(column) or 1.0 for column in zip(*rows, strict=True)]
    scaled = [[value / scale for value, scale in zip(row, scales, strict=True)] for row in rows]
    solution = _non_negative_least_squares(scaled)
    return [value / scale for value, scale in zip(solution, scales, strict=True)]


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
