"""What a change of layout would win: waiting with and without it, from a frozen snapshot.

    stay     every group by itself, as it is now
    change   one group of all of them (a drop), or each instance by itself (a restore)

Both futures are run as a fluid over the same requests and the same expected arrivals
(`kunserve.policy.forecast`). Running requests pay for the change: a pause, and half of the exchange
on average. Times are nanoseconds, sums are request-nanoseconds (design section 5, gain trigger).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kunserve.core.decision import Waits
from kunserve.core.layout import Stage
from kunserve.core.transition import TransitionRecord
from kunserve.policy.book import Book, GroupRecord
from kunserve.policy.cost_model import CostModel
from kunserve.policy.forecast import (
    Expected,
    Forecast,
    Pace,
    Plant,
    Slos,
    expected_arrivals,
    project,
)
from kunserve.policy.overload import Arrivals, OutputLengths, capacity_blocks
from kunserve.policy.planner import TypicalStep, slowest_stage
from kunserve.policy.transition import State

HORIZON_NS = 10_000_000_000
RING_EFFICIENCY = 0.9
"""What hand-overs leave of a balanced ring (measured, docs/benchmarks.md: 84 to 92 %)."""

FIRST_PAUSE_NS = 100_000_000
FIRST_LINK_BYTES_PER_S = 1e9
_STALLING = ("fence", "remap", "adopt")
"""Phases in which a whole group stands still."""


@dataclass(frozen=True)
class Population:
    """Requests of a group: those that hold memory, and those that wait for it."""

    running: tuple[Expected, ...]
    queued: tuple[Expected, ...]

    @property
    def tokens(self) -> float:
        """KV of all of them, as far as it is known."""
        return sum(request.known_tokens for request in (*self.running, *self.queued))


def united(populations: Iterable[Population]) -> Population:
    """All of them in one group, queues by arrival."""
    all_of = tuple(populations)
    queued = sorted((q for p in all_of for q in p.queued), key=lambda q: q.arrival_ns)
    return Population(tuple(r for p in all_of for r in p.running), tuple(queued))


def divided(population: Population, parts: int) -> tuple[Population, ...]:
    """Dealt out to so many whole instances, the largest first, as homes are."""
    running = sorted(population.running, key=lambda request: -request.known_tokens)
    return tuple(
        Population(tuple(running[part::parts]), population.queued[part::parts])
        for part in range(parts)
    )


class TransitionCosts:
    """What the last transitions cost: the next one is expected to cost as much."""

    def __init__(self) -> None:
        self.pause_ns = float(FIRST_PAUSE_NS)
        """A whole group stands still for this."""
        self.link_bytes_per_s = FIRST_LINK_BYTES_PER_S
        self.cost_ns = float(FIRST_PAUSE_NS)
        """From FENCE to the end of the exchange, of the last one."""

    def add(self, record: TransitionRecord) -> None:
        """A transition is over; one that turned back cost nothing that counts."""
        phases = {phase.name: phase.elapsed_ns for phase in record.phases}
        if record.outcome != State.DONE.value:
            return
        self.pause_ns = float(sum(phases.get(name, 0) for name in _STALLING))
        move_ns = phases.get(State.MOVE.value, 0)
        self.cost_ns = self.pause_ns + move_ns
        if record.exchanged_bytes and move_ns:
            self.link_bytes_per_s = record.exchanged_bytes * 1e9 / move_ns


@dataclass(frozen=True)
class Estimate:
    """Both futures of some groups. `freed_blocks_per_s` is rho."""

    stay: Waits
    change: Waits
    stall_ns: float
    peak_tokens: float
    running: int
    queued: int
    arrivals_per_s: float
    freed_blocks_per_s: float
    stay_decode_ns: float
    change_decode_ns: float
    queued_change_ns: float


@dataclass(frozen=True)
class Prospect:
    """The layout that some groups could have: the stages of each new group, and its KV blocks."""

    groups: tuple[tuple[Stage, ...], ...]
    capacity_blocks: tuple[int, ...]


class Estimator:
    """Looks at both futures of some groups.

    Args:
        book: instances, groups and requests; read only.
        arrivals, lengths, costs: what was seen so far.
    """

    def __init__(
        self, book: Book, arrivals: Arrivals, lengths: OutputLengths, costs: TransitionCosts
    ) -> None:
        self._book = book
        self._arrivals = arrivals
        self._lengths = lengths
        self._costs = costs
        self._slos = Slos(book.config.slo_ttft_ns, book.config.slo_tpot_ns)

    @property
    def slos(self) -> Slos:
        """What clients are promised."""
        return self._slos

    def population(self, record: GroupRecord, now_ns: int) -> Population:
        """Requests of a group as the front knows them: one that was preempted counts as running."""
        running: list[Expected] = []
        queued: list[Expected] = []
        for request_id in record.requests:
            known = self._book.requests[request_id]
            prompt, outputs = len(known.request.prompt_token_ids), len(known.outputs)
            remaining = self._lengths.remaining(outputs, known.request.params.max_tokens)
            arrival_ns = min(0.0, float(known.request.arrival_ns - now_ns))
            expected = Expected(float(prompt + outputs), remaining, arrival_ns)
            (running if known.started else queued).append(expected)
        queued.sort(key=lambda request: request.arrival_ns)
        return Population(tuple(running), tuple(queued))

    def used_blocks(self, record: GroupRecord, now_ns: int) -> int:
        """Demand by the front's own books: also right while a transition closes pages, but a prefix
        that requests share counts for each."""
        size = self._book.config.block_size
        people = self.population(record, now_ns)
        return sum(
            -(-int(request.known_tokens) // size) for request in (*people.running, *people.queued)
        )

    def expected_requests(
        self, records: Sequence[GroupRecord], copy_blocks: int, now_ns: int
    ) -> int:
        """How many will run together in a burst: those that are here and come within the horizon,
        as far as KVCache goes once a copy of the model (`copy_blocks`) is dropped for each group
        but one."""
        everybody = united(self.population(record, now_ns) for record in records)
        here = len(everybody.running) + len(everybody.queued)
        instances = sum(len(record.group.instances) for record in records)
        share = instances / max(1, self._num_serving())
        coming = self._arrivals.per_s(now_ns) * share * HORIZON_NS / 1e9
        blocks = sum(map(capacity_blocks, records)) + (len(records) - 1) * copy_blocks
        mean = max(1.0, everybody.tokens / here) if here else 1.0
        return int(min(here + coming, blocks * self._book.config.block_size / mean))

    def drop(
        self, records: Sequence[GroupRecord], prospect: Prospect, cost: CostModel, now_ns: int
    ) -> Estimate:
        """`records` become one group."""
        everybody = [self.population(record, now_ns) for record in records]
        together = united(everybody)
        return self._estimate(records, everybody, (together,), prospect, cost, now_ns)

    def restore(
        self, record: GroupRecord, prospect: Prospect, cost: CostModel, now_ns: int
    ) -> Estimate:
        """The group of `record` becomes whole instances."""
        people = self.population(record, now_ns)
        homes = divided(people, len(prospect.groups))
        return self._estimate((record,), (people,), homes, prospect, cost, now_ns)

    def _estimate(
        self,
        records: Sequence[GroupRecord],
        now: Sequence[Population],
        then: Sequence[Population],
        prospect: Prospect,
        cost: CostModel,
        now_ns: int,
    ) -> Estimate:
        instances = sum(len(record.group.instances) for record in records)
        per_s = self._arrivals.per_s(now_ns) * instances / max(1, self._num_serving())
        stay_plants = [
            self._plant(record.group.stages, capacity_blocks(record), cost) for record in records
        ]
        change_plants = [
            self._plant(stages, blocks, cost)
            for stages, blocks in zip(prospect.groups, prospect.capacity_blocks, strict=True)
        ]
        stay = self._futures(stay_plants, now, per_s)
        change = self._futures(change_plants, then, per_s)
        running = sum(len(people.running) for people in now)
        stall_ns = running * self._stall_ns(now, len(prospect.groups), instances)
        return Estimate(
            stay=sum((future.waits for future in stay), Waits()),
            change=sum((future.waits for future in change), Waits()),
            stall_ns=stall_ns,
            peak_tokens=max(
                future.peak_tokens / plant.capacity_tokens
                for future, plant in zip(change, change_plants, strict=True)
            ),
            running=running,
            queued=sum(len(people.queued) for people in now),
            arrivals_per_s=per_s,
            freed_blocks_per_s=self._freed_per_s(now, stay),
            stay_decode_ns=_mean_decode_ns(stay),
            change_decode_ns=_mean_decode_ns(change),
            queued_change_ns=sum(future.present_ns for future in change),
        )

    def _futures(
        self, plants: Sequence[Plant], people: Sequence[Population], per_s: float
    ) -> list[Forecast]:
        """Each group by itself; arrivals are dealt out evenly by capacity, as dispatch does."""
        whole = sum(plant.capacity_tokens for plant in plants)
        prompt = self._arrivals.mean_prompt_tokens
        output = self._lengths.remaining(0, self._arrivals.mean_max_tokens)
        futures = []
        for plant, population in zip(plants, people, strict=True):
            share = plant.capacity_tokens / whole if whole else 0.0
            coming = expected_arrivals(per_s * share, prompt, output, HORIZON_NS)
            queue = (*population.queued, *coming)
            futures.append(project(plant, population.running, queue, HORIZON_NS, self._slos))
        return futures

    def _plant(self, stages: Sequence[Stage], blocks: int, cost: CostModel) -> Plant:
        config = self._book.config
        slowest = slowest_stage(stages, config.num_layers, cost, TypicalStep())
        whole = max(1, min(r.total_blocks for r in self._book.instances.values() if r.total_blocks))
        return Plant(
            capacity_tokens=float(max(1, blocks) * config.block_size),
            overhead_tokens=config.block_size / 2,
            max_seqs=int(config.max_num_seqs * max(1.0, blocks / whole)),
            pace=Pace(
                stages=len(stages),
                cost=slowest,
                efficiency=RING_EFFICIENCY,
                step_target_ns=config.step_time_target_ns,
                max_tokens=config.max_num_batched_tokens,
            ),
        )

    def _stall_ns(self, people: Sequence[Population], targets: int, instances: int) -> float:
        """What each running request pays: the pause, and half of the exchange on average. Of its
        KV, the layers that its member gives up or does not hold yet move."""
        config, costs = self._book.config, self._costs
        token_bytes = (
            config.page_bytes // config.blocks_per_page // config.block_size * config.num_layers
        )
        moved_share = 1.0 - max(1, targets) / max(1, instances) if targets < instances else 0.5
        tokens = sum(request.known_tokens for p in people for request in p.running)
        exchange_ns = tokens * token_bytes * moved_share / costs.link_bytes_per_s * 1e9
        return costs.pause_ns + exchange_ns / 2

    def _freed_per_s(self, people: Sequence[Population], futures: Sequence[Forecast]) -> float:
        """rho: step rate x sum over running of blocks / expected remaining tokens."""
        size = self._book.config.block_size
        return sum(
            request.known_tokens / size / request.remaining_tokens * 1e9 / future.decode_ns
            for population, future in zip(people, futures, strict=True)
            for request in population.running
            if future.decode_ns
        )

    def _num_serving(self) -> int:
        return sum(len(group.instances) for group in self._book.layout.groups)


def _mean_decode_ns(futures: Sequence[Forecast]) -> float:
    return sum(future.decode_ns for future in futures) / len(futures)
