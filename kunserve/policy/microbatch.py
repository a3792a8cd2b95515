"""Lookahead batch formulation: all queued work as microbatches of equal cost (paper section 5).

Microbatches of a pipeline that cost unequal leave its stages idle in between. Token counts do not
make them equal: attention is quadratic, and a later chunk also attends to its prefix. So all queued
prompt tokens, in order, are taken as one batch and divided by cost, again and again:

    works      [ request 0 ...... ][ request 1 ][ request 2 ............... ]
    5 parts    [           2           |                 3                  ]
               [     1     |     1     |     1     |           2            ]
               [     1     |     1     |     1     |     1      |     1     ]
                           ^ a request is cut into chunks where a boundary meets it

The paper halves until a batch is small enough. Here the number of parts comes first, the least that
keeps all within the bounds, and a batch of n parts is divided as n//2 to n - n//2. Halves alone
would end between a half and all of the bound, and jump from one to the other while the queue
shrinks: each jump is a bubble.

How equal: with u the cost of one token alone after the longest prefix, two parts differ by less
than 4 u: a boundary lies between two tokens, and whatever it is off is shared by the parts on
either side; a cut makes the later chunk read its prefix again. Where weight reads and arithmetic
overlap, one read of the weights comes on top.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from kunserve.policy.cost_model import ChunkShape, CostModel


class Work(NamedTuple):
    """Prompt tokens of one request that are still to compute. Its last one samples."""

    prefix_tokens: int
    tokens: int


class Piece(NamedTuple):
    """Consecutive tokens of one work, which is given by its index in the queue."""

    work: int
    chunk: ChunkShape


class Microbatch(NamedTuple):
    """Pieces of consecutive works, and what a step of them costs, decodes included."""

    pieces: tuple[Piece, ...]
    cost_ns: float


@dataclass(frozen=True)
class Bounds:
    """What a microbatch may be, besides the work that is divided.

    Args:
        cost_model: of the group's slowest stage.
        decodes: that every microbatch computes as well.
        most_ns: of a microbatch. inf: unbounded.
        max_tokens: prompt tokens of a microbatch. None: unbounded.
        min_tokens: a batch of less than twice as many is not divided, unless `max_tokens` says so.
    """

    cost_model: CostModel
    decodes: tuple[ChunkShape, ...] = ()
    most_ns: float = math.inf
    max_tokens: int | None = None
    min_tokens: int = 1


def formulate(works: Sequence[Work], bounds: Bounds, least_parts: int = 1) -> list[Microbatch]:
    """All work in microbatches of nearly equal cost: the least number of them that keeps all within
    the bounds, but at least `least_parts` where `min_tokens` allows.

    O(n + m log t) for n works, m microbatches and t tokens.
    """
    if not works:
        return []
    division = _Division(works, bounds)
    parts = max(least_parts, division.needed_parts(division.all))
    return [division.microbatch(span) for span in division.divide(division.all, parts)]


def next_microbatch(
    works: Sequence[Work], bounds: Bounds, num_stages: int, in_flight_ns: Sequence[float] = ()
) -> Microbatch:
    """The one that a pipeline of `num_stages` computes next, while those of `in_flight_ns` are
    under way: the first of a formulation, in O(n + log m log t).

    Even little work is shared by as many microbatches as there are stages. Those in flight have
    their part of it already, by what they cost more than decodes alone.
    """
    if not works:
        return Microbatch((), 0.0)
    division = _Division(works, bounds)
    needed = division.needed_parts(division.all)
    own_ns = needed * (division.part_ns(division.all, needed) - division.idle_ns)
    under_way_ns = sum(max(0.0, cost_ns - division.idle_ns) for cost_ns in in_flight_ns)
    share_ns = (own_ns + under_way_ns) / max(num_stages, needed)
    parts = max(needed, round(own_ns / share_ns)) if share_ns > 0.0 else needed
    return division.microbatch(division.first(division.all, parts))


def share_of_decodes(idle_ns: Sequence[float], all_ns: float, num_stages: int) -> int:
    """How many of the idle decodes, the first ones, make up a microbatch's share by cost.

    At least the share, if there are so many: when every stage has taken its own, nobody is left.

    Args:
        idle_ns: cost of each decode that no microbatch in flight has.
        all_ns: cost of all decodes.
    """
    share_ns = all_ns / num_stages * (1.0 - 1e-9)
    return bisect_left(list(accumulate(idle_ns, initial=0.0)), share_ns, hi=len(idle_ns))


def _cheapest_ns(bounds: Bounds) -> float:
    """What a microbatch of `max_tokens` costs at least: were the others allowed more, some would
    have too many tokens for an equal part."""
    if bounds.max_tokens is None:
        return math.inf
    return bounds.cost_model.step_ns([*bounds.decodes, ChunkShape(0, bounds.max_tokens)])


class _Span(NamedTuple):
    """Prompt tokens [begin, end) of the queue, counted through all works."""

    begin: int
    end: int

    @property
    def tokens(self) -> int:
        return self.end - self.begin


class _Amount(NamedTuple):
    """What the cost of a span depends on."""

    attention_ns: float
    tokens: int
    rows: int


class _Division:
    """One queue being divided. Sums over whole works are made once: then the cost of any span
    takes two searches."""

    def __init__(self, works: Sequence[Work], bounds: Bounds) -> None:
        self._works = works
        self._model = model = bounds.cost_model
        self._most_ns = min(bounds.most_ns, _cheapest_ns(bounds))
        self._max_tokens = bounds.max_tokens or math.inf
        self._min_tokens = min(bounds.min_tokens, (self._max_tokens + 1) // 2)
        self._ends = list(accumulate((work.tokens for work in works), initial=0))
        attention_ns = (model.attention_ns(work.prefix_tokens, work.tokens) for work in works)
        self._attention_ns = list(accumulate(attention_ns, initial=0.0))
        self._decodes = _Amount(
            sum(model.attention_ns(d.prefix_tokens, d.chunk_tokens) for d in bounds.decodes),
            sum(decode.chunk_tokens for decode in bounds.decodes),
            sum(decode.samples for decode in bounds.decodes),
        )
        self.all = _Span(0, self._ends[-1])
        self.idle_ns = self._cost_ns(_Amount(0.0, 0, 0), 1)
        """What a microbatch without prompt tokens costs."""
        longest = max((work.prefix_tokens + work.tokens for work in works), default=0)
        self._token_ns = model.chunk_ns(longest, 1, samples=True)

    # ------------------------------------------------------------ division

    def divide(self, span: _Span, parts: int) -> list[_Span]:
        """All microbatches of a span that is to be at least `parts`."""
        parts = self._possible_parts(span, parts)
        if parts == 1:
            return [span]
        left, right = self._cut(span, parts)
        return [*self.divide(left, parts // 2), *self.divide(right, parts - parts // 2)]

    def first(self, span: _Span, parts: int) -> _Span:
        """The first one of `divide`."""
        while (parts := self._possible_parts(span, parts)) > 1:
            span, _ = self._cut(span, parts)
            parts //= 2
        return span

    def needed_parts(self, span: _Span) -> int:
        """The least number of parts whose mean is within the bounds."""
        amount = self._amount(span)
        slack_ns = min(2.0 * self._token_ns, (self._most_ns - self.idle_ns) / 2.0)
        most_ns = self._most_ns - slack_ns  # some parts are a little above the mean

        def is_within(parts: int) -> bool:
            return span.tokens <= parts * self._max_tokens and (
                self._cost_ns(amount, parts) <= most_ns
            )

        others = range(1, self._most_parts(span))
        return 1 + bisect_left(others, True, key=is_within)

    def part_ns(self, span: _Span, parts: int) -> float:
        """Mean cost of a span's parts, without what its cuts add."""
        return self._cost_ns(self._amount(span), parts)

    def _most_parts(self, span: _Span) -> int:
        return max(1, int(span.tokens // self._min_tokens))

    def _possible_parts(self, span: _Span, parts: int) -> int:
        """What becomes of a span that is to be `parts`: fewer if it is too small, and more than one
        if that is still too large."""
        is_too_large = span.tokens > self._max_tokens or self.part_ns(span, 1) > self._most_ns
        if parts == 1 and is_too_large:
            parts = 2
        return min(parts, self._most_parts(span))

    def _cut(self, span: _Span, parts: int) -> tuple[_Span, _Span]:
        """Where each of parts // 2 on the left costs as much as each of the others on the right."""
        left_parts, right_parts = parts // 2, parts - parts // 2

        def is_left_dearer(cut: int) -> bool:
            left_ns = self.part_ns(_Span(span.begin, cut), left_parts)
            return left_ns >= self.part_ns(_Span(cut, span.end), right_parts)

        inner = range(span.begin + 1, span.end - 1)
        cut = span.begin + 1 + bisect_left(inner, True, key=is_left_dearer)
        return _Span(span.begin, cut), _Span(cut, span.end)

    # ------------------------------------------------------------ spans

    def microbatch(self, span: _Span) -> Microbatch:
        """The span as pieces of works."""
        pieces = tuple(
            Piece(index, self._chunk(span, index)) for index in range(*self._range(span))
        )
        return Microbatch(pieces, self.part_ns(span, 1))

    def _range(self, span: _Span) -> tuple[int, int]:
        """Half-open indices of the works that it has tokens of."""
        return bisect_right(self._ends, span.begin) - 1, bisect_left(self._ends, span.end)

    def _chunk(self, span: _Span, index: int) -> ChunkShape:
        """The span's tokens of one of its works."""
        work_begin, work_end = self._ends[index], self._ends[index + 1]
        begin, end = max(work_begin, span.begin), min(work_end, span.end)
        prefix_tokens = self._works[index].prefix_tokens + begin - work_begin
        return ChunkShape(prefix_tokens, end - begin, samples=end == work_end)

    def _amount(self, span: _Span) -> _Amount:
        first, end = self._range(span)
        if first >= end:
            return _Amount(0.0, 0, 0)
        last = end - 1
        attention_ns = self._attention_of(span, first)
        if last > first:
            whole_ns = self._attention_ns[last] - self._attention_ns[first + 1]
            attention_ns += whole_ns + self._attention_of(span, last)
        rows = last - first + (self._ends[end] <= span.end)
        return _Amount(attention_ns, span.tokens, rows)

    def _attention_of(self, span: _Span, index: int) -> float:
        chunk = self._chunk(span, index)
        return self._model.attention_ns(chunk.prefix_tokens, chunk.chunk_tokens)

    def _cost_ns(self, amount: _Amount, parts: int) -> float:
        """Cost of a step with one of `parts` equal parts of `amount`, and the decodes."""
        decodes = self._decodes
        return (
            self._model.linear_ns(decodes.tokens + amount.tokens / parts)
            + self._model.head_step_ns(decodes.rows + amount.rows / parts)
            + decodes.attention_ns
            + amount.attention_ns / parts
        )
