"""Reading and computing that hide behind each other: the formula, and its fit to measured times.

    time = sum of constant * quantity + overlap(read, unit * amount, q)
    overlap(read, compute, q) = (read^q + compute^q)^(1/q)

The sharpness q is 1 where the two add up; towards infinity the longer one counts alone (roofline).

overlap is homogeneous: it equals read * d/d(read) + unit * d/d(unit) of itself. So with the
derivatives at the last estimate as columns, ordinary non-negative least squares gives the next one
(Gauss-Newton without increments), and no constant can fall below zero on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

MAX_SHARPNESS = 20.0
"""Beyond it the formula is the maximum, to a few percent at its corner."""

_HIDDEN_STEP = 0.05
"""Of the search over 1/q, before it is refined."""
_REFINEMENTS = 12
_ITERATIONS = 12
_SETTLED = 1e-9
"""Iterations end when the squared error of all samples changes by less."""

RIDGE = 1e-12
"""Relative to the diagonal: makes columns that are equal or zero solvable, too small to be seen."""


class Measured(NamedTuple):
    """One measured time (above zero) and what it was spent on."""

    quantities: tuple[float, ...]
    amount: float
    time_ns: float


@dataclass(frozen=True)
class OverlapFit:
    """The constants of the formula."""

    constants_ns: tuple[float, ...]
    read_ns: float
    unit_ns: float
    sharpness: float

    def relative_error(self, sample: Measured) -> float:
        """(predicted - measured) / measured."""
        predicted_ns = overlap_ns(self.read_ns, self.unit_ns * sample.amount, self.sharpness)
        for constant_ns, quantity in zip(self.constants_ns, sample.quantities, strict=True):
            predicted_ns += constant_ns * quantity
        return predicted_ns / sample.time_ns - 1.0


def overlap_ns(read_ns: float, compute_ns: float, sharpness: float) -> float:
    """(read^q + compute^q)^(1/q), without powers of large numbers."""
    longer_ns, shorter_ns = max(read_ns, compute_ns), min(read_ns, compute_ns)
    if sharpness == 1.0 or shorter_ns == 0.0:
        return longer_ns + shorter_ns
    factor: float = (1.0 + (shorter_ns / longer_ns) ** sharpness) ** (1.0 / sharpness)
    return longer_ns * factor


def fit_sum(samples: Sequence[Measured]) -> OverlapFit:
    """Least squares on the relative error where nothing overlaps; `samples` is not empty.

    Constants that the samples cannot tell apart share their part of the time.
    """
    return _solve_at(samples, 1.0, 1.0, 1.0)


def fit_overlap(samples: Sequence[Measured]) -> OverlapFit:
    """As `fit_sum`, with the sharpness that fits best, 1..`MAX_SHARPNESS`.

    It stays 1 where there are no more distinct samples than constants: nothing tells it apart.
    """
    best = _Candidate.of(fit_sum(samples), samples)
    if len(set(samples)) <= len(samples[0].quantities) + 2:
        return best.fit
    start = best.fit
    hidden = at = 1.0
    for _ in range(round((1.0 - 1.0 / MAX_SHARPNESS) / _HIDDEN_STEP)):
        at -= _HIDDEN_STEP
        candidate = _fit_at(samples, 1.0 / at, start)
        start = candidate.fit
        if candidate.error < best.error:
            best, hidden = candidate, at
    return _refine(samples, hidden, best).fit


class _Candidate(NamedTuple):
    """`error`: sum of the squared relative errors of all samples."""

    error: float
    fit: OverlapFit

    @classmethod
    def of(cls, fit: OverlapFit, samples: Sequence[Measured]) -> _Candidate:
        return cls(sum(fit.relative_error(sample) ** 2 for sample in samples), fit)


def _refine(samples: Sequence[Measured], hidden: float, best: _Candidate) -> _Candidate:
    """The best fit with 1/q within a step of `hidden`, by thirds; `best` if it is none of those."""
    start = best.fit
    low = max(1.0 / MAX_SHARPNESS, hidden - _HIDDEN_STEP)
    high = min(1.0, hidden + _HIDDEN_STEP)
    for _ in range(_REFINEMENTS):
        left, right = low + (high - low) / 3.0, high - (high - low) / 3.0
        at_left = _fit_at(samples, 1.0 / left, start)
        at_right = _fit_at(samples, 1.0 / right, start)
        if at_left.error < at_right.error:
            high = right
        else:
            low = left
        best = min(best, at_left, at_right, key=lambda candidate: candidate.error)
    return best


def _fit_at(samples: Sequence[Measured], sharpness: float, start: OverlapFit) -> _Candidate:
    """The best constants for one sharpness, from those of another one."""
    # A constant at zero would stay there: its column would be zero as well.
    read_ns = start.read_ns or min(sample.time_ns for sample in samples)
    unit_ns = start.unit_ns or min(sample.time_ns / max(1.0, sample.amount) for sample in samples)
    best = last = _Candidate.of(_solve_at(samples, sharpness, read_ns, unit_ns), samples)
    for _ in range(_ITERATIONS):
        if not last.fit.read_ns or not last.fit.unit_ns:
            break
        fit = _solve_at(samples, sharpness, last.fit.read_ns, last.fit.unit_ns)
        before, last = last, _Candidate.of(fit, samples)
        best = min(best, last, key=lambda candidate: candidate.error)
        if abs(before.error - last.error) < _SETTLED:
            break
    return best


def _solve_at(
    samples: Sequence[Measured], sharpness: float, read_ns: float, unit_ns: float
) -> OverlapFit:
    """Non-negative least squares with the derivatives at these two constants as columns."""
    power = sharpness - 1.0
    rows = []
    for quantities, amount, time_ns in samples:
        whole_ns = overlap_ns(read_ns, unit_ns * amount, sharpness)
        of_read = (read_ns / whole_ns) ** power
        of_unit = amount * (unit_ns * amount / whole_ns) ** power
        rows.append([value / time_ns for value in (*quantities, of_read, of_unit)])
    *constants_ns, read_ns, unit_ns = _fit_columns(rows)
    return OverlapFit(tuple(constants_ns), read_ns, unit_ns, sharpness)


# ---------------------------------------------------------------- non-negative least squares


def _fit_columns(rows: list[list[float]]) -> list[float]:
    """The x >= 0 that brings |rows * x| closest to 1; columns are scaled before solving.

    Exact: with four columns at most, every subset of them is solved, and the best solution without
    a negative value is taken.
    """
    scales = [max(column) or 1.0 for column in zip(*rows, strict=True)]
    scaled = [[value / scale for value, scale in zip(row, scales, strict=True)] for row in rows]
    width = len(scales)
    products = [
        [sum(row[i] * row[j] for row in scaled) for j in range(width)] for i in range(width)
    ]
    sums = [sum(column) for column in zip(*scaled, strict=True)]
    best = [0.0] * width
    best_gain = 0.0
    for size in range(width, 0, -1):
        for columns in combinations(range(width), size):
            x = _solve_columns(products, sums, columns, len(rows))
            if min(x) < 0.0:
                continue
            # |rows * x - 1|^2 = |rows| - gain
            gain = _gain(products, sums, x)
            if gain > best_gain:
                best, best_gain = x, gain
    return [value / scale for value, scale in zip(best, scales, strict=True)]


def _gain(products: list[list[float]], sums: list[float], x: list[float]) -> float:
    quadratic = sum(
        a * b * product
        for a, row in zip(x, products, strict=True)
        for b, product in zip(x, row, strict=True)
    )
    return 2.0 * sum(a * b for a, b in zip(x, sums, strict=True)) - quadratic


def _solve_columns(
    products: list[list[float]], sums: list[float], columns: tuple[int, ...], num_rows: int
) -> list[float]:
    """Least squares over `columns` alone; the others get 0."""
    matrix = [[products[i][j] for j in columns] for i in columns]
    for i, row in enumerate(matrix):
        row[i] += RIDGE * (row[i] + num_rows)
    x = [0.0] * len(sums)
    for column, value in zip(columns, _solve(matrix, [sums[i] for i in columns]), strict=True):
        x[column] = value
    return x


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
