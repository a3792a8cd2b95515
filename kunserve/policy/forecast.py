"""What waiting lies ahead of a group: its near future as a fluid (design section 5, gain trigger).

Requests hold memory from admission to their end, grow by a token a step, and all that decode get on
at the same pace; prompts are computed by arrival with what a step leaves them:

    queue --memory--> prompts --compute--> decoding --last token--> memory is free again
      ^                                        |
      +------------- preempted: memory is full +

Time runs in quanta, tokens are real numbers, and a virtual clock counts the tokens that everybody
has got since the start, so that a quantum costs O(1) and a request O(log n). The same model looks
at the layout as it is and at the one that could be; only the difference decides.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple

from kunserve.core.decision import Waits
from kunserve.policy.cost_model import CostModel

LONGEST_QUANTUM_NS = 100_000_000
SHORTEST_QUANTUM_NS = 20_000_000
CONTEXT_STEP = 16
MOST_STEP_TOKENS = 4096
"""No step is expected to take more."""


class Expected(NamedTuple):
    """A request as a forecast sees it. `arrival_ns` from now; those that are here have at most 0.
    `remaining_tokens`: outputs still to come, by the lengths seen so far. `has_begun`: its client
    has had the first token before."""

    known_tokens: float
    remaining_tokens: float
    arrival_ns: float = 0.0
    has_begun: bool = False


@dataclass(frozen=True)
class Slos:
    """What clients are promised. None: nothing."""

    ttft_ns: int | None = None
    tpot_ns: int | None = None

    @property
    def are_given(self) -> bool:
        """Is anything promised?"""
        return self.ttft_ns is not None or self.tpot_ns is not None


@dataclass(frozen=True)
class Pace:
    """How fast a group computes: `stages` microbatches go around, and the slowest stage sets the
    beat.

    Args:
        cost: of the slowest stage.
        efficiency: what hand-overs of a ring leave, 0..1.
        step_target_ns: what a step of the slowest stage may last with prompts.
        max_tokens: fixed token budget of a step, or None.
    """

    stages: int
    cost: CostModel
    efficiency: float
    step_target_ns: int
    max_tokens: int | None

    def decode_ns(self, running: int, context_tokens: float) -> float:
        """Time in which each of `running` requests gets one token."""
        return self._round_ns(self._stage_ns(self._share(running), context_tokens, 0))

    def mixed(self, running: int, context_tokens: float) -> tuple[float, int]:
        """(time, prompt tokens) of a round with as many prompt tokens as the budget allows
        (`kunserve.policy.drafting`)."""
        decodes = self._share(running)
        if self.max_tokens is not None:
            tokens = max(1, self.max_tokens - decodes)
        else:
            tokens = self._prompt_tokens(decodes, context_tokens)
        stage_ns = self._stage_ns(decodes, context_tokens, tokens)
        return self._round_ns(stage_ns), tokens * self.stages

    def _prompt_tokens(self, decodes: int, context_tokens: float) -> int:
        fixed_ns = max(self.cost.fixed_ns, self._stage_ns(decodes, context_tokens, 0))
        limit_ns = max(self.step_target_ns, 2.0 * fixed_ns)
        fitting, too_many = 1, MOST_STEP_TOKENS
        while too_many - fitting > max(1, fitting // 16):
            middle = (fitting + too_many) // 2
            if self._stage_ns(decodes, context_tokens, middle) <= limit_ns:
                fitting = middle
            else:
                too_many = middle
        return fitting

    def _share(self, running: int) -> int:
        return -(-running // self.stages)

    def _stage_ns(self, decodes: int, context_tokens: float, prompt_tokens: int) -> float:
        """A step of the slowest stage, all contexts alike."""
        cost, context = self.cost, max(1, int(context_tokens))
        attention_ns = decodes * cost.attention_ns(context, 1)
        attention_ns += cost.attention_ns(0, prompt_tokens) if prompt_tokens else 0.0
        tokens = max(1, decodes + prompt_tokens)
        return cost.linear_ns(tokens) + attention_ns + cost.head_step_ns(max(1, decodes))

    def _round_ns(self, stage_ns: float) -> float:
        efficiency = self.efficiency if self.stages > 1 else 1.0
        return self.stages * stage_ns / efficiency


@dataclass(frozen=True)
class Plant:
    """A group as a forecast sees it: memory and pace."""

    capacity_tokens: float
    overhead_tokens: float
    """What a request holds beyond its tokens: half a block, on average."""
    max_seqs: int
    pace: Pace


@dataclass(frozen=True)
class Forecast:
    """What a group's next `horizon` looks like. `peak_tokens`: most that its requests would hold
    together, queued ones included. `decode_ns`: mean time between two tokens of a request.
    `present_ns`: of the waits, those of requests that are here already, from now on."""

    waits: Waits
    peak_tokens: float
    decode_ns: float
    finished: int
    present_ns: float


def project(
    plant: Plant,
    running: Sequence[Expected],
    queued: Iterable[Expected],
    horizon_ns: int,
    slos: Slos = Slos(),
) -> Forecast:
    """Run the fluid for `horizon_ns`, in quanta of about a step.

    Args:
        running: requests that hold memory now.
        queued: those that wait, and those that are expected to come, by arrival.
    """
    fluid = _Fluid(plant, running, queued, slos)
    step_ns = plant.pace.decode_ns(len(running), fluid.mean_context)
    quantum_ns = max(SHORTEST_QUANTUM_NS, min(LONGEST_QUANTUM_NS, int(step_ns)))
    now_ns = 0.0
    while now_ns < horizon_ns:
        fluid.advance(now_ns, quantum_ns)
        now_ns += quantum_ns
    return fluid.forecast(now_ns)


def expected_arrivals(
    per_s: float, known_tokens: float, output_tokens: float, horizon_ns: int
) -> tuple[Expected, ...]:
    """Arrivals at a steady rate over the horizon, all of mean length."""
    count = int(per_s * horizon_ns / 1e9)
    gap_ns = 1e9 / per_s if count else 0.0
    return tuple(
        Expected(known_tokens, output_tokens, (number + 1) * gap_ns) for number in range(count)
    )


class _Decoding(NamedTuple):
    """A request that decodes, by the virtual clock: it ends at `end` tokens."""

    end: float
    order: int
    start: float
    start_tokens: float

    def tokens_at(self, clock: float) -> float:
        return self.start_tokens + clock - self.start


@dataclass
class _Prompt:
    """An admitted request whose prompt is being computed; its memory is held already."""

    request: Expected
    left_tokens: float


class _Fluid:
    """The state of one projection."""

    def __init__(
        self, plant: Plant, running: Sequence[Expected], queued: Iterable[Expected], slos: Slos
    ) -> None:
        self._plant = plant
        self._slos = slos
        self._clock = 0.0  # tokens that each decoding request has got
        self._order = 0
        self._held = 0.0  # tokens of memory in use
        self._decoding: list[_Decoding] = []
        self._latest: list[_Decoding] = []  # a stack, the latest admitted on top
        self._gone: set[int] = set()  # preempted: still in the heap
        self._count = 0
        self._context = 0.0  # tokens of all that decode
        for request in running:
            self._held += request.known_tokens + plant.overhead_tokens
            self._decode(request)
        self._to_come = deque(queued)
        self._queue: deque[Expected] = deque()
        self._queued_tokens = 0.0
        self._prompts: deque[_Prompt] = deque()
        self._memory_ns = self._compute_ns = self._decode_ns = self._present_ns = 0.0
        self._requests = self._attained = self._finished = self._beats = 0
        self._peak = self._held
        self._paces: dict[tuple[bool, int, int], tuple[float, int]] = {}

    @property
    def mean_context(self) -> float:
        """Tokens of a request that decodes."""
        return self._context / self._count if self._count else 1.0

    def advance(self, now_ns: float, quantum_ns: int) -> None:
        """One quantum: arrivals, admission, computing, ends, preemption."""
        while self._to_come and self._to_come[0].arrival_ns <= now_ns:
            request = self._to_come.popleft()
            self._requests += 1
            self._enqueue(request)
        self._admit()
        # Who computes its tokens again does so for want of memory.
        again = sum(prompt.request.has_begun for prompt in self._prompts)
        self._memory_ns += (len(self._queue) + again) * quantum_ns
        self._compute_ns += (len(self._prompts) - again) * quantum_ns
        self._peak = max(self._peak, self._held + self._queued_tokens)
        self._compute(now_ns, quantum_ns)
        self._end()
        self._preempt()

    def forecast(self, now_ns: float) -> Forecast:
        """What came of it; requests that still wait count up to now, and have attained nothing."""
        waits = Waits(self._memory_ns, self._compute_ns, self._requests, self._attained)
        decode_ns = self._decode_ns / self._beats if self._beats else 0.0
        left = (*self._queue, *(prompt.request for prompt in self._prompts))
        present_ns = self._present_ns + now_ns * sum(map(_is_present, left))
        return Forecast(waits, self._peak, decode_ns, self._finished, present_ns)

    def _enqueue(self, request: Expected) -> None:
        self._queue.append(request)
        self._queued_tokens += request.known_tokens + self._plant.overhead_tokens

    def _decode(self, request: Expected) -> None:
        self._order += 1
        entry = _Decoding(
            end=self._clock + max(1.0, request.remaining_tokens),
            order=self._order,
            start=self._clock,
            start_tokens=request.known_tokens,
        )
        heappush(self._decoding, entry)
        self._latest.append(entry)
        self._count += 1
        self._context += request.known_tokens

    def _admit(self) -> None:
        plant = self._plant
        while self._queue and self._count + len(self._prompts) < plant.max_seqs:
            request = self._queue[0]
            needed = request.known_tokens + plant.overhead_tokens
            if self._held + needed > plant.capacity_tokens and (self._count or self._prompts):
                return
            self._queue.popleft()
            self._queued_tokens -= needed
            self._held += needed
            self._prompts.append(_Prompt(request, request.known_tokens))

    def _compute(self, now_ns: float, quantum_ns: int) -> None:
        round_ns, tokens = self._pace()
        if self._prompts:
            self._prefill(tokens * quantum_ns / round_ns, now_ns + quantum_ns / 2, round_ns)
        if self._count:
            self._beats += 1
            self._decode_ns += round_ns
            steps = quantum_ns / round_ns
            self._clock += steps
            self._held += self._count * steps
            self._context += self._count * steps

    def _pace(self) -> tuple[float, int]:
        """(time, prompt tokens) of a round now; contexts are rounded, so that it is looked up more
        often than computed."""
        context = int(self.mean_context) // CONTEXT_STEP * CONTEXT_STEP
        key = (bool(self._prompts), self._count, context)
        known = self._paces.get(key)
        if known is None:
            pace = self._plant.pace
            if self._prompts:
                known = pace.mixed(self._count, context)
            else:
                known = (pace.decode_ns(self._count, context), 0)
            self._paces[key] = known
        return known

    def _prefill(self, tokens: float, now_ns: float, round_ns: float) -> None:
        while self._prompts and tokens > 0.0:
            prompt = self._prompts[0]
            done = min(tokens, prompt.left_tokens)
            prompt.left_tokens -= done
            tokens -= done
            if prompt.left_tokens > 0.0:
                return
            self._prompts.popleft()
            if not prompt.request.has_begun:
                self._note_first_token(now_ns - prompt.request.arrival_ns, round_ns)
            self._present_ns += now_ns if _is_present(prompt.request) else 0.0
            self._decode(prompt.request)

    def _note_first_token(self, ttft_ns: float, round_ns: float) -> None:
        slos = self._slos
        in_time = slos.ttft_ns is None or ttft_ns <= slos.ttft_ns
        on_pace = slos.tpot_ns is None or round_ns <= slos.tpot_ns
        self._attained += in_time and on_pace

    def _end(self) -> None:
        while self._decoding and self._decoding[0].end <= self._clock:
            entry = heappop(self._decoding)
            if entry.order in self._gone:
                continue
            self._gone.add(entry.order)
            self._finished += 1
            self._drop(entry, entry.end)

    def _preempt(self) -> None:
        """Memory is full: the latest goes back to the head of the queue and is computed again."""
        while self._held > self._plant.capacity_tokens and self._latest and self._count > 1:
            entry = self._latest.pop()
            if entry.order in self._gone:
                continue
            self._gone.add(entry.order)
            known = self._drop(entry, self._clock)
            self._queue.appendleft(Expected(known, entry.end - self._clock, has_begun=True))
            self._queued_tokens += known + self._plant.overhead_tokens

    def _drop(self, entry: _Decoding, clock: float) -> float:
        tokens = entry.tokens_at(clock)
        self._count -= 1
        self._context -= tokens
        self._held -= tokens + self._plant.overhead_tokens
        return tokens


def _is_present(request: Expected) -> bool:
    """It waits now for its first token."""
    return request.arrival_ns <= 0.0 and not request.has_begun
