"""What a step costs, as a function of its chunks (paper section 5 on lookahead, design section 5).

    attention(p, c) = alpha * (p*c + (c*c + c)/2)     token pairs that a chunk looks at
                    + delta * (p + c)                 its KV, read once
    linear(M)       = overlap(gamma, beta * M, q)     all M tokens of the step
    layers          = linear + sum of attention       a stage with n of the L layers: n/L of it
    head            = overlap(head_gamma, head * R, head_q)     R rows that sample; 0 if R is 0
    step            = layers + head                   the head is the leader's alone

    overlap(read, compute, q) = (read^q + compute^q)^(1/q)

p is the prefix (tokens already computed), c the tokens of the chunk. `gamma` and `head_gamma` are
the reads of the weights, once for the whole batch, `beta` and `head` the arithmetic of a row. The
sharpness q says how well one hides behind the other: at 1 they add up, towards infinity the longer
one counts alone. On a CPU q is 2 to 4: up to some eight rows the arithmetic is almost free.

So a step costs less than its chunks by themselves would suggest, and what a chunk adds depends on
the chunks beside it: `StepCost` adds them up one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
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
    sharpness: float = 1.0
    """How well `gamma_ns` and the time of all tokens overlap, at least 1: not at all."""
    head_sharpness: float = 1.0
    """How well `head_gamma_ns` and the time of all rows that sample overlap."""

    def __post_init__(self) -> None:
        for field in fields(self):
            least, value = 0.0 if field.name.endswith("_ns") else 1.0, getattr(self, field.name)
            if not least <= value < math.inf:  # NaN is refused as well
                raise ConfigError(
                    f"{field.name} must be at least {least:g}, got {value}; fit it again"
                )

    @property
    def fixed_ns(self) -> float:
        """Cost that a step which samples never falls below, however small its chunks."""
        return self.gamma_ns + self.head_gamma_ns

    def scaled(self, factor: float) -> CostModel:
        """The same instance where everything takes `factor` times as long."""
        return self._scaled(factor, factor)

    def _scaled(self, layers_factor: float, head_factor: float) -> CostModel:
        return replace(
            self,
            alpha_ns=self.alpha_ns * layers_factor,
            delta_ns=self.delta_ns * layers_factor,
            beta_ns=self.beta_ns * layers_factor,
            gamma_ns=self.gamma_ns * layers_factor,
            head_gamma_ns=self.head_gamma_ns * head_factor,
            head_ns=self.head_ns * head_factor,
        )

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
        return self._scaled(num_layers_held / num_layers, 1.0 if is_leader else 0.0)

    def stage_ns(
        self, chunks: Iterable[ChunkShape], num_layers_held: int, num_layers: int, is_leader: bool
    ) -> float:
        """Cost of one step on one stage; arguments and errors as in `for_stage`."""
        return self.for_stage(num_layers_held, num_layers, is_leader).step_ns(chunks)

    def attention_ns(self, prefix_tokens: int, chunk_tokens: int) -> float:
        """Cost of one chunk's attention in all layers, whatever else the step computes."""
        pairs = prefix_tokens * chunk_tokens + (chunk_tokens * chunk_tokens + chunk_tokens) // 2
        return self.alpha_ns * pairs + self.delta_ns * (prefix_tokens + chunk_tokens)

    def linear_ns(self, tokens: float) -> float:
        """Cost of the linear layers of a step that computes `tokens` tokens in all."""
        return _overlap_ns(self.gamma_ns, self.beta_ns * tokens, self.sharpness)

    def head_step_ns(self, rows: float) -> float:
        """Cost of the head of a step in which `rows` rows sample; 0 if there is none."""
        if rows == 0:
            return 0.0
        return _overlap_ns(self.head_gamma_ns, self.head_ns * rows, self.head_sharpness)

    def chunk_ns(self, prefix_tokens: int, chunk_tokens: int, samples: bool = False) -> float:
        """The most that a chunk adds to a step, which is what it adds to a large one.

        A small step that reads weights most of the time takes it in for less (`StepCost`).
        """
        cost_ns = self.attention_ns(prefix_tokens, chunk_tokens) + self.beta_ns * chunk_tokens
        return cost_ns + self.head_ns if samples else cost_ns

    def step_ns(self, chunks: Iterable[ChunkShape]) -> float:
        """Cost of one step that computes `chunks`."""
        step = StepCost(self)
        for chunk in chunks:
            step.add(chunk)
        return step.total_ns

    def largest_chunk(self, budget_ns: float, prefix_tokens: int, limit_tokens: int) -> int:
        """Most tokens, 0..`limit_tokens`, that add at most `budget_ns` to any step.

        The inverse of `chunk_ns` in `chunk_tokens`, without the head.
        """
        return _most_tokens(
            lambda tokens: self.chunk_ns(prefix_tokens, tokens) <= budget_ns, limit_tokens
        )

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


class StepCost:
    """The cost of a step that is being formed: chunks are added one at a time.

    A step without a chunk costs one read of the layers.
    """

    def __init__(self, model: CostModel) -> None:
        self._model = model
        self._attention_ns = 0.0
        self._tokens = 0
        self._rows = 0

    @property
    def total_ns(self) -> float:
        """Cost of the chunks added so far, in one step: `CostModel.step_ns` of them."""
        return self._layers_ns(self._attention_ns, 0) + self._model.head_step_ns(self._rows)

    @property
    def sampled_rows(self) -> int:
        """Rows that go through the head."""
        return self._rows

    def add(self, chunk: ChunkShape) -> None:
        """Compute `chunk` in this step too."""
        self._attention_ns += self._model.attention_ns(chunk.prefix_tokens, chunk.chunk_tokens)
        self._tokens += chunk.chunk_tokens
        self._rows += chunk.samples

    def with_chunk_ns(self, chunk: ChunkShape) -> float:
        """`total_ns` as it would be with `chunk`; less `total_ns`, it is what the chunk adds."""
        attention_ns = self._model.attention_ns(chunk.prefix_tokens, chunk.chunk_tokens)
        layers_ns = self._layers_ns(self._attention_ns + attention_ns, chunk.chunk_tokens)
        return layers_ns + self._model.head_step_ns(self._rows + chunk.samples)

    def largest_chunk(self, budget_ns: float, prefix_tokens: int, limit_tokens: int) -> int:
        """Most tokens, 0..`limit_tokens`, after this prefix that keep the step within `budget_ns`.

        The inverse of `with_chunk_ns` for a chunk that does not sample, to the last bit.
        """
        return _most_tokens(
            lambda tokens: self.with_chunk_ns(ChunkShape(prefix_tokens, tokens)) <= budget_ns,
            limit_tokens,
        )

    def _layers_ns(self, attention_ns: float, more_tokens: int) -> float:
        return self._model.linear_ns(self._tokens + more_tokens) + attention_ns


def _overlap_ns(read_ns: float, compute_ns: float, sharpness: float) -> float:
    """(read^q + compute^q)^(1/q), without powers of large numbers."""
    longer_ns, shorter_ns = max(read_ns, compute_ns), min(read_ns, compute_ns)
    if sharpness == 1.0 or shorter_ns == 0.0:
        return longer_ns + shorter_ns
    hidden: float = (1.0 + (shorter_ns / longer_ns) ** sharpness) ** (1.0 / sharpness)
    return longer_ns * hidden


def _most_tokens(fits: Callable[[int], bool], limit_tokens: int) -> int:
    """The largest number in 0..`limit_tokens` that fits, by bisection; 0 need not be asked."""
    if limit_tokens <= 0 or fits(limit_tokens):
        return max(0, limit_tokens)
    fitting, too_many = 0, limit_tokens
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        if fits(middle):
            fitting = middle
        else:
            too_many = middle
    return fitting


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
