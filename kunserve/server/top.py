"""`kunserve top`: a running server in the terminal, from /metrics and, if given, the admin API."""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Self

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kunserve.core.errors import ConfigError

PREFIX = "kunserve:"
MIB = 1 << 20
MIN_INTERVAL_S = 0.05
READ_TIMEOUT_S = 5.0
PIPE_WIDTH = 120
BAR_CELLS = 20


class UnreachableError(ConfigError):
    """Nothing that --url or --admin-url names answers as a kunserve server does."""


# ---------------------------------------------------------------- what is read


class StageInfo(msgspec.Struct, frozen=True):
    """A stage of GET /admin/layout; layers [start, stop)."""

    instance: int
    layers: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.instance} [{self.layers[0]}:{self.layers[1]}]"


class GroupInfo(msgspec.Struct, frozen=True):
    """A group of GET /admin/layout."""

    id: int
    epoch: int
    stages: tuple[StageInfo, ...]
    kv_tokens: int
    num_requests: int = 0
    in_transition: str | None = None


class InstanceInfo(msgspec.Struct, frozen=True):
    """An instance of GET /admin/layout."""

    id: int
    pid: int | None
    state: str
    pages: dict[str, int] = {}


class TransitionInfo(msgspec.Struct, frozen=True):
    """The last transition of GET /admin/layout."""

    text: str = ""


class LayoutInfo(msgspec.Struct, frozen=True):
    """What GET /admin/layout answers, as far as it is shown."""

    epoch: int
    groups: tuple[GroupInfo, ...]
    instances: tuple[InstanceInfo, ...]
    last_transition: TransitionInfo | None = None


Labels = Mapping[str, str]


@dataclass(frozen=True)
class Metrics:
    """Samples by name without the prefix."""

    samples: Mapping[str, tuple[tuple[Labels, float], ...]]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Samples of kunserve in an exposition.

        Raises:
            ValueError: `text` is no exposition.
        """
        found: defaultdict[str, list[tuple[Labels, float]]] = defaultdict(list)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith(PREFIX):
                    name = sample.name.removeprefix(PREFIX)
                    found[name].append((sample.labels, float(sample.value)))
        return cls({name: tuple(rows) for name, rows in found.items()})

    def total(self, name: str) -> float:
        """Sum over all labels; 0 without samples."""
        return sum(value for _, value in self.samples.get(name, ()))

    def by(self, name: str, label: str) -> dict[str, float]:
        """Values by one label."""
        return {labels.get(label, ""): v for labels, v in self.samples.get(name, ())}

    def label(self, name: str, label: str) -> str:
        """A label of the first sample; empty without one."""
        return next((labels.get(label, "") for labels, _ in self.samples.get(name, ())), "")


@dataclass(frozen=True)
class Snapshot:
    """The server at `at_s` on the monotonic clock. `admin_problem`: why there is no layout."""

    at_s: float
    metrics: Metrics
    layout: LayoutInfo | None = None
    admin_problem: str = ""


@dataclass
class Source:
    """Where snapshots come from."""

    url: str
    api_key: str | None = None
    admin_url: str | None = None
    admin_key: str = ""
    client: httpx.Client = field(
        default_factory=lambda: httpx.Client(timeout=READ_TIMEOUT_S, trust_env=False)
    )

    def read(self) -> Snapshot:
        """Ask the server. The admin API may fail: the rest is shown without it.

        Raises:
            UnreachableError: the API does not answer, or not as kunserve does.
        """
        response = self._get(self.url, "/metrics", self.api_key, "--api-key")
        try:
            metrics = Metrics.parse(response.text)
        except ValueError:
            metrics = Metrics({})
        if not metrics.samples:
            raise UnreachableError(f"{self.url} is no kunserve server (no such metrics)")
        layout, problem = None, ""
        if self.admin_url is not None:
            try:
                layout = self._read_layout(self.admin_url)
            except UnreachableError as error:
                problem = str(error)
        return Snapshot(time.monotonic(), metrics, layout, problem)

    def _read_layout(self, url: str) -> LayoutInfo:
        response = self._get(url, "/admin/layout", self.admin_key, "--admin-key")
        try:
            return msgspec.json.decode(response.content, type=LayoutInfo)
        except msgspec.DecodeError as error:
            raise UnreachableError(f"{url} is no admin API of kunserve: {error}") from error

    def _get(self, url: str, path: str, key: str | None, flag: str) -> httpx.Response:
        # As bytes: httpx takes text headers for ASCII only.
        headers = {b"authorization": b"Bearer " + key.encode()} if key else {}
        try:
            response = self.client.get(url.rstrip("/") + path, headers=headers)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UnreachableError(f"cannot reach {url}: {reason}") from error
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise UnreachableError(f"{url} wants another key ({flag})")
        if response.status_code != httpx.codes.OK:
            raise UnreachableError(f"{url}{path} answered {response.status_code}")
        return response


# ---------------------------------------------------------------- what is shown


def frame(source: Source, before: Snapshot, now: Snapshot, problem: str = "") -> RenderableType:
    """One screen. Rates are those between `before` and `now`; `problem`: why `now` is old."""
    parts: list[RenderableType] = [
        _title(source, now),
        _traffic(before, now),
        _memory(now.metrics),
        Text(),
        _groups(now),
        _instances(now),
        _transitions(now),
    ]
    for line in (problem, now.admin_problem):
        if line:
            parts.append(Text(_plain(line), style="bold red"))
    return Group(*parts)


def _title(source: Source, now: Snapshot) -> Text:
    model = now.metrics.label("num_requests_owned", "model_name")
    epoch = now.layout.epoch if now.layout else int(now.metrics.total("layout_epoch"))
    return Text.assemble(
        ("kunserve top", "bold"), _plain(f"  {source.url}  {model}  epoch {epoch}")
    )


def _traffic(before: Snapshot, now: Snapshot) -> Text:
    metrics = now.metrics
    running = metrics.total("num_requests_running")
    waiting = metrics.total("num_requests_waiting")
    # Those that no instance has: in the front, or on their way.
    elsewhere = max(0.0, metrics.total("num_requests_owned") - running - waiting)
    firsts = _since(before, now, "time_to_first_token_seconds_count")
    ttft_s = _since(before, now, "time_to_first_token_seconds_sum") / firsts if firsts else None
    preempted = _since(before, now, "num_preemptions_total")
    return Text(
        f"running {running:.0f}  waiting {waiting:.0f}  in front {elsewhere:.0f}"
        f"  |  {_rate(before, now, 'generation_tokens_total')} tokens/s out, "
        f"{_rate(before, now, 'prompt_tokens_total')} tokens/s in"
        f"  |  TTFT {'-' if ttft_s is None else f'{ttft_s * 1e3:.0f} ms'}{_attainment(before, now)}"
        f"  |  preemptions {metrics.total('num_preemptions_total'):.0f} (+{preempted:.0f})"
    )


def _attainment(before: Snapshot, now: Snapshot) -> str:
    """Share of the answers that ended within what `--slo-ttft-ms` and `--slo-tpot-ms` promise."""
    promises = ("slo_ttft_seconds", "slo_tpot_seconds")
    if not any(now.metrics.total(name) for name in promises):
        return ""
    ended = _since(before, now, "e2e_request_latency_seconds_count")
    attained = _since(before, now, "slo_attained_requests_total")
    return f", SLO {attained / ended:.0%}" if ended else ", SLO -"


def _memory(metrics: Metrics) -> Text:
    used = metrics.total("kv_used_tokens")
    capacity = metrics.total("kv_capacity_tokens")
    whole = metrics.total("kv_capacity_tokens_whole")
    line = f"KV {_bar(used, capacity)} {used:.0f} of {capacity:.0f} tokens"
    dropped = metrics.total("parameter_dropped_bytes")
    if dropped:
        line += (
            f"; parameters dropped {dropped / MIB:.0f} MiB, without {whole:.0f} tokens "
            f"({used / whole if whole else 0:.0%} used)"
        )
    return Text(line)


def _groups(now: Snapshot) -> Table:
    table = _table("group", "epoch", "ring: instance [layers]", "KV", "tokens", "")
    metrics = now.metrics
    usage = metrics.by("kv_cache_usage_perc", "engine")
    if now.layout is not None:
        for group in now.layout.groups:
            leader = str(group.stages[0].instance) if group.stages else ""
            table.add_row(
                str(group.id),
                str(group.epoch),
                Text(ring([str(stage) for stage in group.stages])),
                _bar(usage.get(leader, 0.0), 1.0),
                str(group.kv_tokens),
                Text(_plain(group.in_transition or "")),
            )
        return table
    epochs = metrics.by("group_epoch", "group")
    tokens = metrics.by("group_kv_capacity_tokens", "group")
    changing = metrics.by("group_in_transition", "group")
    for labels, size in metrics.samples.get("group_size", ()):
        id_, leader = labels.get("group", ""), labels.get("engine", "")
        table.add_row(
            id_,
            f"{epochs.get(id_, 0):.0f}",
            ring([leader] + ["?"] * (int(size) - 1)),
            _bar(usage.get(leader, 0.0), 1.0),
            f"{tokens.get(id_, 0):.0f}",
            "in transition" if changing.get(id_) else "",
        )
    return table


def ring(stages: list[str]) -> str:
    """Stages as a ring: what the last one computes goes back to the first. One alone is none.

    ┌▶ 0 [0:12] ─▶ 1 [12:30] ─┐
    └─────────────────────────┘
    """
    if len(stages) < 2:
        return "".join(stages)
    line = "┌▶ " + " ─▶ ".join(stages) + " ─┐"
    return line + "\n└" + "─" * (len(line) - 2) + "┘"


def _instances(now: Snapshot) -> Table:
    table = _table("instance", "state", "pid", "layers", "pages", "running", "waiting", "heard")
    metrics = now.metrics
    running = metrics.by("num_requests_running", "engine")
    waiting = metrics.by("num_requests_waiting", "engine")
    ages_s = metrics.by("instance_heartbeat_age_seconds", "engine")
    for instance in _instance_infos(now):
        engine = str(instance.id)
        table.add_row(
            engine,
            Text(_plain(instance.state)),
            "-" if instance.pid is None else str(instance.pid),
            _layers_of(instance.id, now.layout),
            Text(_plain(_pages(instance.pages))),
            f"{running.get(engine, 0):.0f}",
            f"{waiting.get(engine, 0):.0f}",
            f"{ages_s.get(engine, 0):.1f} s ago",
        )
    return table


def _instance_infos(now: Snapshot) -> tuple[InstanceInfo, ...]:
    """Of the admin API, or what metrics tell of them."""
    if now.layout is not None:
        return now.layout.instances
    pages: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for labels, count in now.metrics.samples.get("instance_pages", ()):
        pages[labels.get("engine", "")][labels.get("kind", "")] = int(count)
    ready = now.metrics.by("instance_ready", "engine")
    return tuple(
        InstanceInfo(int(engine), None, "ready" if is_ready else "not ready", pages[engine])
        for engine, is_ready in ready.items()
        if engine.isdigit()
    )


def _pages(pages: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in pages.items()) or "-"


def _layers_of(instance: int, layout: LayoutInfo | None) -> str:
    if layout is None:
        return "-"
    stages = [stage for group in layout.groups for stage in group.stages]
    held = (f"{s.layers[0]}..{s.layers[1] - 1}" for s in stages if s.instance == instance)
    return next(held, "none")


def _transitions(now: Snapshot) -> Text:
    if now.layout is not None and now.layout.last_transition is not None:
        return Text(_plain(f"last transition: {now.layout.last_transition.text}"))
    counts = ", ".join(
        f"{value:.0f} {labels.get('kind')} {labels.get('outcome')}"
        for labels, value in now.metrics.samples.get("transitions_total", ())
    )
    return Text(_plain(f"transitions: {counts or 'none'}"))


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=column.startswith("ring"))
    return table


def _bar(used: float, whole: float) -> str:
    share = min(1.0, max(0.0, used / whole)) if whole else 0.0
    full = math.ceil(share * BAR_CELLS)
    return "█" * full + "░" * (BAR_CELLS - full) + f" {share:4.0%}"


def _since(before: Snapshot, now: Snapshot, name: str) -> float:
    """What a counter gained. One that went down is another server's: it began at zero."""
    old, new = before.metrics.total(name), now.metrics.total(name)
    return new - old if new >= old else new


def _rate(before: Snapshot, now: Snapshot, name: str) -> str:
    elapsed_s = now.at_s - before.at_s
    return f"{_since(before, now, name) / elapsed_s:.1f}" if elapsed_s > 0 else "-"


def _plain(text: str) -> str:
    """Without control characters: what a server says must not steer the terminal."""
    return "".join(char if char.isprintable() else " " for char in text)


# ---------------------------------------------------------------- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `kunserve top`."""
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", help="the API (default %(default)s)"
    )
    parser.add_argument("--api-key", metavar="KEY", help="key of the API, if it wants one")
    parser.add_argument("--admin-url", metavar="URL", help="the admin API, to show the layout")
    parser.add_argument("--admin-key", metavar="KEY", help="key of the admin API")
    parser.add_argument(
        "--interval", type=float, default=1.0, help="seconds between frames (default 1)"
    )
    parser.add_argument("--once", action="store_true", help="print one frame and end")


def run(args: argparse.Namespace) -> int:
    """Show frames until interrupted, or one; returns the exit code.

    Raises:
        ConfigError: flags that cannot work, or a server that cannot be reached at the start.
    """
    if not MIN_INTERVAL_S <= args.interval <= 1e6:
        raise ConfigError(f"--interval must be at least {MIN_INTERVAL_S:g} seconds, at most 1e6")
    if (args.admin_url is None) != (args.admin_key is None):
        raise ConfigError("--admin-url and --admin-key go together; give both")
    source = Source(args.url, args.api_key, args.admin_url, args.admin_key or "")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # gives the screen back
    try:
        with source.client:
            return _show(source, args.interval, args.once)
    finally:
        signal.signal(signal.SIGTERM, before)


def _show(source: Source, interval_s: float, once: bool) -> int:
    first = source.read()
    if first.admin_problem:
        raise UnreachableError(first.admin_problem)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPE_WIDTH)
    if once:
        time.sleep(interval_s)  # rates need two looks
        console.print(frame(source, first, source.read()))
        return 0
    with contextlib.suppress(KeyboardInterrupt):  # the way to end it
        _watch(source, console, first, interval_s)
    return 0


def _watch(source: Source, console: Console, first: Snapshot, interval_s: float) -> None:
    """Until interrupted. A server that goes away may come back."""
    before, now, problem = first, first, ""
    with contextlib.ExitStack() as stack:
        show: Callable[[RenderableType], None] = console.print
        if console.is_terminal:
            live = stack.enter_context(Live(console=console, screen=True, auto_refresh=False))
            show = functools.partial(live.update, refresh=True)
        while True:
            show(frame(source, before, now, problem))
            time.sleep(interval_s)
            before, now, problem = _next(source, before, now)


def _next(source: Source, before: Snapshot, now: Snapshot) -> tuple[Snapshot, Snapshot, str]:
    try:
        return now, source.read(), ""
    except UnreachableError as error:
        age_s = time.monotonic() - now.at_s
        return before, now, f"{error}; shown is what was {age_s:.0f} s ago; trying again"
