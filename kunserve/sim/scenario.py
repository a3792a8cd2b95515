"""A scenario: a cluster, what its clients do and what goes wrong. All of it drawn from a seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from kunserve.core.events import InstanceDrainWished, LayoutWished, WishKind
from kunserve.core.ids import InstanceId, RequestId
from kunserve.core.policy import Batching, PolicyName
from kunserve.core.request import Request, SamplingParams
from kunserve.policy.book import ControllerConfig
from kunserve.policy.cost_model import CostModel
from kunserve.policy.scheduler import SchedulerConfig
from kunserve.sim.faults import Fault, draw_faults
from kunserve.sim.instance import SimInstanceConfig
from kunserve.sim.timeline import MICROSECOND_NS, MILLISECOND_NS, SECOND_NS, SpanNs
from kunserve.sim.toy_model import EOS_TOKEN_ID, KILLER_TOKEN_ID, POISON_TOKEN_ID, VOCAB_SIZE


@dataclass(frozen=True)
class Arrival:
    """One client. It goes away at `abort_at_ns`, or when it has `abort_after_tokens` tokens."""

    request: Request
    abort_at_ns: int | None = None
    abort_after_tokens: int | None = None


@dataclass(frozen=True)
class Delays:
    """How long things take in the world."""

    link: SpanNs = SpanNs(50 * MICROSECOND_NS, 3 * MILLISECOND_NS)
    load: SpanNs = SpanNs(SECOND_NS // 2, 4 * SECOND_NS)
    exit: SpanNs = SpanNs(100 * MICROSECOND_NS, 50 * MILLISECOND_NS)
    """From the end of a process until the front learns of it."""
    start_timeout_ns: int = 20 * SECOND_NS
    """A process that loads longer is killed."""
    peer: SpanNs = SpanNs(20 * MICROSECOND_NS, 500 * MICROSECOND_NS)
    """Between two instances."""
    pull: SpanNs = SpanNs(100 * MICROSECOND_NS, 5 * MILLISECOND_NS)
    """One pull of pages."""
    part: SpanNs = SpanNs(MILLISECOND_NS, 30 * MILLISECOND_NS)
    """A part is read from the file, or compared."""
    copy: SpanNs = SpanNs(10 * MICROSECOND_NS, 2 * MILLISECOND_NS)
    """One KV block goes to host memory, or back."""


Wish = LayoutWished | InstanceDrainWished


@dataclass(frozen=True)
class Scenario:
    """Everything that a world needs besides its source of randomness."""

    controller: ControllerConfig
    instance: SimInstanceConfig
    delays: Delays
    arrivals: tuple[Arrival, ...]
    faults: tuple[Fault, ...] = ()
    drain_at_ns: int | None = None
    wishes: tuple[tuple[int, Wish], ...] = ()
    """When somebody asks for another layout."""
    cost_factors: tuple[float, ...] = ()
    """Instance i takes so many times as long as its cost model says; 1 where none is given."""

    @property
    def max_request_tokens(self) -> int:
        """Most tokens of one request: the context, or the KVCache of a whole instance."""
        scheduler = self.instance.scheduler
        return min(scheduler.max_model_len, self.instance.total_blocks * scheduler.block_size)


@dataclass(frozen=True)
class ScenarioLimits:
    """How large and how hard a drawn scenario may be. `poison_share`: of the requests, those
    whose rows give no token; `killer_share`: those that end the process that computes them.
    `swaps`: instances have some host memory. `migrates`: requests move between instances."""

    max_instances: int = 4
    max_requests: int = 24
    max_faults: int = 5
    arrivals_ns: int = 8 * SECOND_NS
    poison_share: float = 0.0
    killer_share: float = 0.0
    max_wishes: int = 0
    min_instances: int = 1
    swaps: bool = False
    migrates: bool = False

    @property
    def has_links(self) -> bool:
        """Instances pull from each other."""
        return self.max_wishes > 0 or self.migrates


TRANSITION_LIMITS = ScenarioLimits(
    max_instances=8, min_instances=2, max_wishes=5, max_faults=6, max_requests=40
)
"""Small clusters whose layout changes often, with faults."""

MIGRATION_LIMITS = ScenarioLimits(
    max_instances=4, min_instances=2, max_faults=5, max_requests=60, migrates=True
)
"""Small clusters whose requests move, with faults."""


def draw_scenario(rng: Random, limits: ScenarioLimits = ScenarioLimits()) -> Scenario:
    """A small, tight cluster: few blocks, so that requests preempt each other. With wishes it
    changes its layout."""
    instance = _draw_instance(rng)
    if limits.max_wishes:
        instance = _draw_parts(rng, instance)
    if limits.migrates:
        instance = _draw_batches(rng, instance)
    controller = _draw_controller(rng, limits, instance)
    wishes = _draw_wishes(rng, limits, controller.num_instances)
    arrivals = _draw_arrivals(rng, limits, instance, wishes)
    faults = draw_faults(
        rng,
        count=rng.randint(0, limits.max_faults),
        num_instances=controller.num_instances,
        horizon_ns=limits.arrivals_ns + 4 * SECOND_NS,
        heartbeat_timeout_ns=controller.heartbeat_timeout_ns,
        links=limits.has_links,
    )
    faults = _near_wishes(rng, faults, wishes)
    drains = rng.random() < 0.25
    drain_at_ns = rng.randint(0, 2 * limits.arrivals_ns) if drains else None
    if limits.swaps:
        host_blocks = rng.choice((3, instance.total_blocks, 4 * instance.total_blocks))
        scheduler = replace(instance.scheduler, host_blocks=host_blocks)
        instance = replace(instance, scheduler=scheduler)
    return Scenario(
        controller=controller,
        instance=instance,
        delays=_draw_delays(rng),
        arrivals=arrivals,
        faults=faults,
        drain_at_ns=drain_at_ns,
        wishes=wishes,
        cost_factors=_draw_factors(rng, limits, controller.num_instances),
    )


def _draw_factors(rng: Random, limits: ScenarioLimits, num_instances: int) -> tuple[float, ...]:
    if not limits.max_wishes:
        return ()
    return tuple(rng.choice((1.0, 1.0, 0.5, 2.0)) for _ in range(num_instances))


def _draw_parts(rng: Random, instance: SimInstanceConfig) -> SimInstanceConfig:
    """Layers that do not divide, and KV from a quarter to four times the weights."""
    return replace(
        instance,
        num_layers=rng.choice((4, 5, 6, 7, 8, 8, 12, 20)),
        layer_pages=rng.randint(1, 4) * max(1, instance.kv_pages // rng.choice((2, 4, 16))),
        embedding_pages=rng.randint(1, 8),
        head_pages=rng.choice((0, 0, 1, 5)),
        spare_pages=rng.choice((0, 0, 1, 3)),
        window_pages=rng.choice((None, 1, 4, 64)),
        digests=rng.random() < 0.5,
    )


def _draw_batches(rng: Random, instance: SimInstanceConfig) -> SimInstanceConfig:
    """Several requests at once, of which some can move."""
    most_seqs = rng.randint(3, 16)
    return replace(
        instance,
        scheduler=replace(instance.scheduler, max_num_seqs=most_seqs),
    )


def _draw_wishes(
    rng: Random, limits: ScenarioLimits, num_instances: int
) -> tuple[tuple[int, Wish], ...]:
    """Some come close together, so that one overtakes the other."""
    times: list[int] = []
    for _ in range(rng.randint(min(1, limits.max_wishes), limits.max_wishes)):
        if times and rng.random() < 0.4:
            times.append(times[-1] + rng.randint(0, 300 * MILLISECOND_NS))
        else:
            times.append(rng.randint(SECOND_NS, limits.arrivals_ns + 4 * SECOND_NS))
    return tuple(
        (at_ns, _draw_wish(rng, number, num_instances)) for number, at_ns in enumerate(times)
    )


def _near_wishes(
    rng: Random, faults: tuple[Fault, ...], wishes: tuple[tuple[int, Wish], ...]
) -> tuple[Fault, ...]:
    """Most faults strike while layouts change."""
    moved = []
    for fault in faults:
        if wishes and rng.random() < 0.7:
            span_ns = rng.choice((20, 100, 500)) * MILLISECOND_NS
            fault = replace(fault, at_ns=rng.choice(wishes)[0] + rng.randint(0, span_ns))
        moved.append(fault)
    return tuple(sorted(moved, key=lambda fault: fault.at_ns))


def _draw_wish(rng: Random, number: int, num_instances: int) -> Wish:
    kind = rng.random()
    if kind < 0.04:
        return InstanceDrainWished(number, InstanceId(rng.randrange(num_instances)))
    if kind < 0.3:
        return LayoutWished(number, WishKind.DROP)
    if kind < 0.55:
        return LayoutWished(number, WishKind.RESTORE)
    groups: list[list[InstanceId]] = [[] for _ in range(rng.randint(1, num_instances))]
    for index in range(num_instances):
        rng.choice(groups).append(InstanceId(index))
    if rng.random() < 0.05:  # illegal: somebody twice, or an empty group
        rng.choice(groups).append(InstanceId(0))
    else:
        groups = [group for group in groups if group]
    return LayoutWished(number, WishKind.LAYOUT, tuple(map(tuple, groups)))


def _draw_delays(rng: Random) -> Delays:
    """With a slow link, news of a process's end overtake what it said."""
    longest_ns = rng.choice((1, 3, 100)) * MILLISECOND_NS
    peer_ns = rng.choice((1, 1, 50)) * MILLISECOND_NS
    pull_ns = rng.choice((1, 5, 50)) * MILLISECOND_NS
    return Delays(
        link=SpanNs(50 * MICROSECOND_NS, longest_ns),
        peer=SpanNs(20 * MICROSECOND_NS, peer_ns),
        pull=SpanNs(100 * MICROSECOND_NS, pull_ns),
    )


def _draw_instance(rng: Random) -> SimInstanceConfig:
    block_size = rng.choice((2, 4, 8))
    total_blocks = rng.randint(56, 120) // block_size
    budget = rng.choice((None, rng.randint(2, 32)))
    scheduler = SchedulerConfig(
        block_size=block_size,
        max_model_len=rng.randint(48, 100),
        eos_token_ids=(EOS_TOKEN_ID,),
        max_num_seqs=rng.randint(1, 10),
        max_num_batched_tokens=budget,
        step_time_target_ns=rng.randint(10, 60) * MILLISECOND_NS,
        watermark_fraction=rng.choice((0.0, 0.01, 0.2)),
        enable_prefix_caching=rng.random() < 0.8,
        batching=Batching.TOKEN_COUNT if budget else Batching.LOOKAHEAD,
    )
    cost_model = CostModel(
        alpha_ns=rng.uniform(0, 20) * MICROSECOND_NS,
        delta_ns=rng.uniform(0, 20) * MICROSECOND_NS,
        beta_ns=rng.uniform(100, 2000) * MICROSECOND_NS,
        gamma_ns=rng.uniform(5, 40) * MILLISECOND_NS,
        head_ns=rng.uniform(0, 500) * MICROSECOND_NS,
    )
    blocks_per_page = rng.choice((1, 3, 8))
    kv_pages = max(1, total_blocks // blocks_per_page)
    return SimInstanceConfig(scheduler, cost_model, 4, kv_pages, blocks_per_page)


def _draw_controller(
    rng: Random, limits: ScenarioLimits, instance: SimInstanceConfig
) -> ControllerConfig:
    num_instances = rng.randint(limits.min_instances, limits.max_instances)
    return ControllerConfig(
        num_instances=num_instances,
        num_layers=instance.num_layers,
        block_size=instance.scheduler.block_size,
        max_model_len=instance.scheduler.max_model_len,
        max_num_queued_reqs=rng.choice((20, 1000) if limits.max_wishes else (3, 10, 1000)),
        heartbeat_timeout_ns=rng.randint(4, 10) * SECOND_NS,
        restart_backoff_ns=rng.randint(100, 1000) * MILLISECOND_NS,
        stable_ns=rng.choice((2, 60)) * SECOND_NS,
        max_restarts=rng.randint(0, 3),
        part_pages=tuple(instance.part_pages.items()) if limits.max_wishes else (),
        slot_pages=instance.slots(num_instances).slot_pages,
        blocks_per_page=instance.blocks_per_page,
        page_bytes=instance.memory_plan.geometry.page_bytes,
        answer_timeout_ns=rng.randint(2, 5) * SECOND_NS,
        long_timeout_ns=rng.randint(3, 20) * SECOND_NS,
        move_timeout_ns=rng.choice((1, 2, 2)) * SECOND_NS,
        policy=PolicyName.MIGRATE if limits.migrates else PolicyName.RECOMPUTE,
    )


def _draw_arrivals(
    rng: Random,
    limits: ScenarioLimits,
    instance: SimInstanceConfig,
    wishes: tuple[tuple[int, Wish], ...],
) -> tuple[Arrival, ...]:
    """Some bursts and some single requests, with a few prefixes in common; where layouts change,
    most of them right before."""
    prefixes = [_draw_tokens(rng, rng.randint(0, 20)) for _ in range(3)]
    bursts = [rng.randint(0, limits.arrivals_ns) for _ in range(3)]
    if wishes:
        longest_ns = rng.choice((100, 500)) * MILLISECOND_NS
        bursts = [max(0, at_ns - rng.randint(0, longest_ns)) for at_ns, _ in wishes]
    arrivals = []
    least = limits.max_requests // 2 if wishes else 1
    for number in range(rng.randint(least, limits.max_requests)):
        is_burst = rng.random() < (0.9 if wishes else 0.6)
        arrival_ns = rng.choice(bursts) if is_burst else rng.randint(0, limits.arrivals_ns)
        prompt = rng.choice(prefixes) + _draw_tokens(rng, rng.randint(1, 12))
        if rng.random() < limits.poison_share:
            prompt = (*prompt, POISON_TOKEN_ID)
        if limits.killer_share and rng.random() < limits.killer_share:
            prompt = (*prompt, KILLER_TOKEN_ID)
        request = Request(
            id=RequestId(f"r{number}"),
            prompt_token_ids=prompt,
            params=_draw_params(
                rng, instance.scheduler.max_model_len, most_tokens=40 if limits.has_links else 24
            ),
            arrival_ns=arrival_ns,
        )
        arrivals.append(_draw_client(rng, request))
    return tuple(sorted(arrivals, key=lambda arrival: arrival.request.arrival_ns))


def _draw_tokens(rng: Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(VOCAB_SIZE) for _ in range(count))


def _draw_params(rng: Random, max_model_len: int, most_tokens: int) -> SamplingParams:
    is_too_large = rng.random() < 0.04
    max_tokens = max_model_len if is_too_large else rng.randint(1, most_tokens)
    return SamplingParams(
        max_tokens=max_tokens,
        seed=rng.getrandbits(64),
        min_tokens=rng.choice((0, min(3, max_tokens))),
        stop_token_ids=rng.choice(((), (1,))),
        ignore_eos=rng.random() < (0.6 if most_tokens < 40 else 0.9),
    )


def _draw_client(rng: Random, request: Request) -> Arrival:
    kind = rng.random()
    if kind < 0.1:
        abort_at_ns = request.arrival_ns + rng.randint(0, 3 * SECOND_NS)
        return Arrival(request, abort_at_ns=abort_at_ns)
    if kind < 0.2:
        return Arrival(request, abort_after_tokens=rng.randint(1, 10))
    return Arrival(request)
