"""`kunserve serve`: puts the cluster and HTTP together, and ends them in order.

Threads: HTTP (this one: the API, and the admin API where it is on), the controller (see
`kunserve.runtime.cluster`), tokenising (a pool).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvicorn
import uvloop
from starlette.applications import Starlette

from kunserve.config import ServeConfig
from kunserve.core.errors import ConfigError
from kunserve.core.ids import InstanceId
from kunserve.core.model import ModelSpec
from kunserve.core.policy import Batching, BatchOrder, PolicyName, Trigger
from kunserve.policy.book import SECOND_NS, ControllerConfig
from kunserve.policy.pages import MemoryPlan, SlotMap
from kunserve.policy.scheduler import SchedulerConfig
from kunserve.runtime.cluster import Cluster, ClusterSettings
from kunserve.runtime.model_config import load_model_spec
from kunserve.runtime.model_source import ResolvedModel, default_cache_dir, resolve_model
from kunserve.runtime.process import raise_file_limit
from kunserve.runtime.profiles import profile_directory
from kunserve.runtime.stats_log import CounterSums, StatsLogger
from kunserve.server.admin import create_admin_app
from kunserve.server.app import create_app
from kunserve.server.cluster_engine import ClusterEngine
from kunserve.server.settings import GenerationDefaults, ServerConfig, Slo, load_generation_defaults
from kunserve.server.tokenizer import Tokenizer
from kunserve.worker.settings import EngineSettings, plan_instance_memory, resolve_max_model_len

logger = logging.getLogger("kunserve.serve")

MIB = 1 << 20
DRAIN_POLL_S = 0.02
FLUSH_TIMEOUT_S = 2
"""What open responses get at least to be sent out, once nothing more is computed for them."""


@dataclass(frozen=True)
class ServePlan:
    """All that `serve` decides before it starts anything."""

    config: ServeConfig
    model: ResolvedModel
    spec: ModelSpec
    memory: MemoryPlan
    max_model_len: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of one full copy of the weights, in whole pages."""
        pages = sum(self.memory.part_pages[part] for part in self.memory.held)
        return pages * self.memory.geometry.page_bytes

    @property
    def kv_tokens(self) -> int:
        """Tokens of KVCache of one instance."""
        return self.memory.kv_blocks * self.config.block_size

    def describe(self) -> str:
        """The start line: what is served, and how much memory is replicated weights."""
        instances = self.config.instances
        total = self.memory.num_pages * self.memory.geometry.page_bytes * instances
        replicated = self.weight_bytes * (instances - 1)
        return (
            f"{self.model.name}: {instances} instance(s) of {self.config.threads} thread(s), each "
            f"{self.weight_bytes / MIB:.0f} MiB of weights and KVCache for {self.kv_tokens} "
            f"tokens; {replicated / MIB:.0f} MiB of the cluster's {total / MIB:.0f} MiB "
            f"({replicated / total:.0%}) are replicated weights"
        )


def make_plan(config: ServeConfig, progress: Callable[[str], None]) -> ServePlan:
    """Resolve model and memory.

    Raises:
        ConfigError, ModelLoadError, ModelNotSupportedError: with the flag or file at fault.
    """
    model = resolve_model(config.model, _cache_dir(config), progress)
    spec = load_model_spec(model.directory)
    memory = plan_instance_memory(spec, config.block_size, config.kv_bytes, config.memory_bytes)
    limit = resolve_max_model_len(spec, memory, config.block_size, config.max_model_len)
    return ServePlan(config, model, spec, memory, limit)


def _cache_dir(config: ServeConfig) -> Path:
    return Path(config.cache_dir) if config.cache_dir else default_cache_dir(os.environ)


def cluster_settings(plan: ServePlan) -> ClusterSettings:
    """The cluster's own, narrower view of the configuration."""
    config, spec = plan.config, plan.spec
    slots = SlotMap.for_domain(
        plan.memory.geometry,
        num_slots=config.instances,
        num_layers=spec.num_layers,
        member_pages=plan.memory.num_pages,
    )
    has_partners = config.instances > 1
    part_pages = tuple(plan.memory.part_pages.items()) if has_partners else ()
    return ClusterSettings(
        num_instances=config.instances,
        engine=EngineSettings(
            model_directory=str(plan.model.directory),
            spec=spec,
            threads=config.threads,
            block_size=config.block_size,
            max_model_len=plan.max_model_len,
            kv_cache_memory_bytes=config.kv_bytes,
            memory_bytes=config.memory_bytes,
            num_slots=config.instances,
            poison=config.check_accounting,
        ),
        scheduler=SchedulerConfig(
            block_size=config.block_size,
            max_model_len=plan.max_model_len,
            eos_token_ids=spec.eos_token_ids,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            step_time_target_ns=int(config.step_time_target_ms * 1e6),
            enable_prefix_caching=config.enable_prefix_caching,
            batching=Batching(config.batching),
            batch_order=BatchOrder(config.batch_order),
            chain_chunks=Batching(config.batching) is Batching.LOOKAHEAD,
            host_blocks=_host_blocks(plan),
        ),
        controller=ControllerConfig(
            num_instances=config.instances,
            num_layers=spec.num_layers,
            block_size=config.block_size,
            max_model_len=plan.max_model_len,
            max_num_queued_reqs=config.max_num_queued_reqs,
            heartbeat_timeout_ns=int(config.heartbeat_timeout * SECOND_NS),
            part_pages=part_pages,
            slot_pages=slots.slot_pages,
            blocks_per_page=plan.memory.geometry.blocks_per_page,
            page_bytes=plan.memory.geometry.page_bytes,
            long_timeout_ns=int(config.start_timeout * SECOND_NS),
            policy=PolicyName(config.policy),
            trigger=Trigger(config.trigger),
            may_drop=config.drop,
            may_restore=config.restore,
            slo_ttft_ns=_to_ns(config.slo_ttft_ms),
            slo_tpot_ns=_to_ns(config.slo_tpot_ms),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            step_time_target_ns=int(config.step_time_target_ms * 1e6),
        ),
        start_timeout_s=config.start_timeout,
        log_level=config.log_level,
        check_accounting=config.check_accounting,
        exchange=config.exchange,
        link_gbps=config.link_gbps,
        profile_directory=str(profile_directory(_cache_dir(config))),
    )


def _host_blocks(plan: ServePlan) -> int:
    """Blocks of all layers that fit the swap space; 0 for a policy that does not swap."""
    if PolicyName(plan.config.policy) is not PolicyName.SWAP:
        return 0
    block_bytes = plan.memory.geometry.block_bytes * plan.spec.num_layers
    blocks = plan.config.swap_space // block_bytes
    if not blocks:
        raise ConfigError(
            f"--swap-space must hold at least one KV block of {block_bytes} bytes, "
            f"got {plan.config.swap_space}"
        )
    return blocks


def _to_ns(milliseconds: float | None) -> int | None:
    return None if milliseconds is None else int(milliseconds * 1e6)


def _to_s(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def bind(host: str, port: int) -> socket.socket:
    """Bind the HTTP port before anything expensive starts.

    Raises:
        ConfigError: the address cannot be used.
    """
    with _address_errors(host, port), contextlib.ExitStack() as stack:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = stack.enter_context(socket.socket(family, kind, protocol))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        stack.pop_all()
    return listener


@contextlib.contextmanager
def _address_errors(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeError) as error:  # the latter for a name that IDNA cannot encode
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}") from error


class StartProgress:
    """Start-up progress of all instances as log lines: a line when an activity begins."""

    def __init__(self) -> None:
        self._activities: dict[InstanceId, str] = {}
        self._begins: dict[InstanceId, float] = {}
        self._created = time.monotonic()

    def __call__(self, instance: InstanceId, activity: str, fraction: float) -> None:
        """Take one report in. `fraction` is in 0..1."""
        step = f"{activity} {int(fraction * 2) * 50}%" if 0 < fraction < 1 else activity
        before = self._activities.get(instance)
        if before == step:
            return
        if before == "ready":  # a restart: its time counts anew
            self._begins[instance] = time.monotonic()
        self._activities[instance] = step
        elapsed_s = time.monotonic() - self._begins.get(instance, self._created)
        logger.info("instance %d: %s (%.1f s)", instance, step, elapsed_s)


class _QuietServer(uvicorn.Server):
    """uvicorn without its own signal handlers: SIGTERM drains first (see `Shutdown`)."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Site:
    """One ASGI application on one bound port."""

    def __init__(self, app: Starlette, listener: socket.socket, access_log: bool) -> None:
        self._listener = listener
        self._server = _QuietServer(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=access_log,
                timeout_graceful_shutdown=FLUSH_TIMEOUT_S,
                lifespan="off",
            )
        )

    def listen(self) -> str:
        """Take connections from now on; returns the address. They are served by `serve`.

        Raises:
            ConfigError: another server has bound the port as well and listens already: the kernel
                lets both bind until one does.
        """
        host, port = self._listener.getsockname()[:2]
        with _address_errors(host, port):
            self._listener.listen(self._server.config.backlog)
        return f"http://{host}:{port}"

    async def serve(self) -> None:
        """Serve until `end`."""
        await self._server.serve(sockets=[self._listener])

    def end(self, flush_timeout_s: int | None = None) -> None:
        """Stop listening; responses under way get `flush_timeout_s` to be sent out."""
        if flush_timeout_s is not None:
            self._server.config.timeout_graceful_shutdown = flush_timeout_s
        self._server.should_exit = True


class Shutdown:
    """SIGTERM and SIGINT: the first drains, a second one ends at once.

    Only the API is told. The admin API ends after it, so that a drain can be watched.
    """

    def __init__(self, cluster: Cluster, api: Site, timeout_s: float) -> None:
        self._cluster = cluster
        self._api = api
        self._timeout_s = timeout_s
        self._task: asyncio.Task[None] | None = None

    def on_signal(self) -> None:
        """Called on the event loop."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._drain())
            return
        logger.warning("second signal: ending now")
        self._task.cancel()
        self._cluster.begin_stop(at_once=True)  # streams still open are told so, and end
        self._api.end()

    async def _drain(self) -> None:
        # Polled, not waited for in a thread: asyncio.run would join that thread at its end, and
        # a second signal could not cut the wait short.
        deadline_s = time.monotonic() + self._timeout_s
        logger.info("draining: no new requests; up to %g s for those running", self._timeout_s)
        self._cluster.drain()
        while not self._cluster.drained.is_set() and time.monotonic() < deadline_s:
            await asyncio.sleep(DRAIN_POLL_S)
        if not self._cluster.drained.is_set():
            logger.warning("--shutdown-timeout has passed; aborting the requests left")
            self._cluster.begin_stop()
        # Clients that read slowly have what is left of the time.
        left_s = int(deadline_s - time.monotonic())
        self._api.end(max(FLUSH_TIMEOUT_S, left_s))


def run(config: ServeConfig) -> int:
    """Serve until a signal. Returns the exit code.

    Raises:
        KunserveError: the start failed; the message is one line.
    """
    raise_file_limit()
    # Until HTTP listens, a signal ends the start in order; then `Shutdown` takes over.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(bind(config.host, config.port))
        admin_listener = None
        if config.admin_port is not None:
            admin_listener = stack.enter_context(bind(config.host, config.admin_port))
        plan = make_plan(config, logger.info)
        logger.info("%s", plan.describe())
        stats = StatsLogger()
        cluster = Cluster(cluster_settings(plan), StartProgress(), stats.observe)
        cluster.start()
        stack.callback(cluster.stop)
        tokenizer = stack.enter_context(contextlib.closing(Tokenizer.load(plan.model.directory)))
        cluster.wait_ready()
        debug = config.log_level == "debug"
        api = Site(make_app(plan, cluster, stats.sums, tokenizer), listener, debug)
        admin = None
        if admin_listener is not None:
            admin = Site(create_admin_app(cluster, config.admin_key), admin_listener, debug)
        # uvloop, and httptools which uvicorn takes by itself: a streamed token costs less.
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve_http(api, admin, cluster, config.shutdown_timeout))
        cluster.raise_failure()
    logger.info("stopped")
    return 0


def make_app(
    plan: ServePlan, cluster: Cluster, sums: CounterSums, tokenizer: Tokenizer
) -> Starlette:
    """The HTTP application over a started cluster, whose views `sums` observes."""
    config = plan.config
    engine = ClusterEngine(cluster, sums, plan.spec.vocab_size, config.heartbeat_timeout)
    defaults = GenerationDefaults()
    if config.generation_config == "auto":
        defaults = load_generation_defaults(plan.model.directory)
    server_config = ServerConfig(
        served_model_names=config.served_model_name or _default_names(plan),
        model_root=str(plan.model.directory),
        api_keys=config.api_key,
        max_request_body_bytes=config.max_request_body_bytes,
        generation_defaults=defaults,
        seed=config.seed,
        slo=Slo(_to_s(config.slo_ttft_ms), _to_s(config.slo_tpot_ms)),
    )
    return create_app(engine, tokenizer, server_config)


def _default_names(plan: ServePlan) -> tuple[str, ...]:
    """The model's own name, and MODEL as it was written, which clients of vLLM expect."""
    given = plan.config.model
    return (plan.model.name,) if given in (None, plan.model.name) else (plan.model.name, given)


async def _serve_http(
    api: Site, admin: Site | None, cluster: Cluster, shutdown_timeout_s: float
) -> None:
    shutdown = Shutdown(cluster, api, shutdown_timeout_s)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, shutdown.on_signal)
    watch = loop.create_task(_end_with_cluster(cluster, api))
    # Before the lines below, whose readers may connect at once; the API's comes last.
    if admin is not None:
        logger.info("admin API on %s", admin.listen())
    logger.info("serving on %s", api.listen())
    async with asyncio.TaskGroup() as tasks:
        if admin is not None:
            tasks.create_task(admin.serve())
        await api.serve()
        if admin is not None:
            admin.end()
    watch.cancel()


async def _end_with_cluster(cluster: Cluster, api: Site) -> None:
    """The controller failing ends the command: better restarted than half alive."""
    while not cluster.ended.is_set():
        await asyncio.sleep(0.5)
    api.end()
