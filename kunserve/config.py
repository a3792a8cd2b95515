"""The frozen configuration of `kunserve serve`, resolved once; flags are made from its fields."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from kunserve.core.errors import ConfigError
from kunserve.core.policy import Batching, BatchOrder, PolicyName, Trigger

_SIZE_UNITS = {
    "": 1,
    "b": 1,
    "k": 1000,
    "kb": 1000,
    "kib": 1 << 10,
    "m": 1000**2,
    "mb": 1000**2,
    "mib": 1 << 20,
    "g": 1000**3,
    "gb": 1000**3,
    "gib": 1 << 30,
}
DEFAULT_KV_CACHE_BYTES = 1 << 30
MAX_THREADS = 1024
MAX_COUNT = 1 << 31
MAX_BYTES = 1 << 50
MAX_DURATION = 1e6
"""Of the unit in the flag's name. Beyond these limits a flag is a mistake, not a wish."""
MAX_GBPS = 1e6
MIN_HEARTBEAT_TIMEOUT_S = 2.0
"""Instances report every 0.5 s; a shorter timeout would kill those that are only busy."""


def parse_size(text: str) -> int:
    """Bytes of a size such as 96MiB, 2GiB, 1.5GB or 1048576.

    Raises:
        ConfigError: not a positive size.
    """
    match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([a-zA-Z]*)\s*", text, re.ASCII)
    unit = _SIZE_UNITS.get(match.group(2).lower()) if match else None
    size = int(float(match.group(1)) * unit) if match and unit else 0
    if size <= 0:
        raise ConfigError(f"{text!r} is not a size; write for example 96MiB, 2GiB or 1500MB")
    return size


def _flag(default: Any, help_text: str, **options: Any) -> Any:
    """A field that becomes a flag. `options` go to argparse as they are."""
    return field(default=default, metadata={"help": help_text, "options": options})


def _size_flag(help_text: str) -> Any:
    return _flag(None, help_text, type=parse_size, metavar="SIZE")


def _switch(default: bool, help_text: str) -> Any:
    return _flag(default, help_text, action=argparse.BooleanOptionalAction)


@dataclass(frozen=True)
class ServeConfig:
    """Everything an operator can say to `kunserve serve`. Names and defaults are vLLM's where
    they exist there.

    Raises:
        ConfigError: a value or a combination cannot work; the message names the flag.
    """

    model: str | None = field(
        default=None,
        metadata={
            "help": "local Hugging Face directory or hub id; without it the embedded "
            "SmolLM2-135M-Instruct",
            "positional": True,
            "options": {"nargs": "?", "metavar": "MODEL"},
        },
    )
    host: str = _flag("127.0.0.1", "address to listen on")
    port: int = _flag(8000, "port to listen on; 0 takes a free one", type=int)
    served_model_name: tuple[str, ...] = _flag(
        (),
        "name of the model in the API, may be repeated; default: MODEL",
        action="append",
        metavar="NAME",
    )
    api_key: tuple[str, ...] = _flag(
        (),
        "key that clients must send as Authorization: Bearer KEY, may be repeated",
        action="append",
        metavar="KEY",
    )
    admin_port: int | None = _flag(
        None,
        "port of the admin API, on the same --host; 0 takes a free one; default: off",
        type=int,
    )
    admin_key: tuple[str, ...] = _flag(
        (),
        "key that the admin API wants as Authorization: Bearer KEY, may be repeated; needed with "
        "--admin-port",
        action="append",
        metavar="KEY",
    )
    instances: int = _flag(
        1, "replicated instances, each with a full copy of the weights", type=int
    )
    threads_per_instance: int = _flag(
        0,
        "compute threads of an instance; 0: the machine's cores divided by the instances",
        type=int,
    )
    kv_cache_memory_bytes: int | None = _size_flag(
        "KVCache of an instance, e.g. 96MiB (default 1GiB unless --memory-bytes is given)"
    )
    memory_bytes: int | None = _size_flag(
        "memory of an instance, weights and KVCache together: its device size"
    )
    block_size: int = _flag(16, "tokens of a KV block (a multiple of 16)", type=int)
    max_model_len: int | None = _flag(
        None,
        "most tokens of a request, prompt and output; default: the model's, or what the KVCache "
        "of an instance holds if that is less",
        type=int,
    )
    max_num_seqs: int = _flag(256, "most requests that run at once on an instance", type=int)
    max_num_batched_tokens: int | None = _flag(
        None, "fixed token budget of a step; default: by --step-time-target-ms", type=int
    )
    step_time_target_ms: float = _flag(
        100.0, "time that a step with prefill chunks should take, by the cost model", type=float
    )
    max_num_queued_reqs: int = _flag(
        1024, "most requests that wait for their first step; more are answered 503", type=int
    )
    enable_prefix_caching: bool = _switch(True, "reuse KV blocks of equal prompt prefixes")
    policy: str = _flag(
        "kunserve",
        "what answers a memory overload: kunserve drops replicated parameters, observe only says "
        "when it would; for comparisons recompute (vLLM), swap (InferCept), migrate (Llumnix), "
        "static-pp (vLLM with PP 2)",
        choices=tuple(name.value for name in PolicyName),
    )
    drop: bool = _switch(
        True, "let the policy drop parameters; --no-drop is the switch that stops it at once"
    )
    restore: bool = _switch(
        True, "let the policy restore dropped parameters; --no-restore for comparisons"
    )
    trigger: str = _flag(
        "gain",
        "when kunserve drops: gain, when waiting falls by enough, or memory-only, whenever demand "
        "exceeds capacity (for comparisons)",
        choices=tuple(trigger.value for trigger in Trigger),
    )
    slo_ttft_ms: float | None = _flag(
        None,
        "time to first token that clients are promised; the trigger then counts requests that "
        "attain it",
        type=float,
    )
    slo_tpot_ms: float | None = _flag(
        None, "time per output token that clients are promised, likewise", type=float
    )
    batching: str = _flag(
        "lookahead",
        "how a pipeline's steps are formed when requests queue: lookahead, with equal cost, or "
        "token-count (for comparisons)",
        choices=tuple(batching.value for batching in Batching),
    )
    batch_order: str = _flag(
        "decode-first",
        "who gets a step's budget first: decode-first or prefill-first",
        choices=tuple(order.value for order in BatchOrder),
    )
    swap_space: int = _flag(
        4 << 30,
        "host memory of an instance for swapped requests, with --policy swap (default 4GiB)",
        type=parse_size,
        metavar="SIZE",
    )
    exchange: str = _flag(
        "coordinated",
        "KV that moves between instances after a change of layout: coordinated lets activations go "
        "first, uncoordinated sends it as fast as it can (for comparisons)",
        choices=("coordinated", "uncoordinated"),
    )
    link_gbps: float | None = _flag(
        None,
        "slow every link between two instances down to this many Gbit/s (for comparisons); "
        "default: as fast as it is",
        type=float,
    )
    seed: int | None = _flag(
        None, "seed of the generator that draws seeds for requests without one", type=int
    )
    generation_config: str = _flag(
        "auto",
        "auto: sampling defaults from the model's generation_config.json; vllm: OpenAI's defaults",
        choices=("auto", "vllm"),
    )
    max_request_body_bytes: int = _flag(
        8 << 20, "larger HTTP bodies are answered 413", type=parse_size, metavar="SIZE"
    )
    shutdown_timeout: float = _flag(
        60.0, "seconds that running requests get after SIGTERM before they are aborted", type=float
    )
    start_timeout: float = _flag(
        300.0, "seconds an instance may take to load before the start fails", type=float
    )
    heartbeat_timeout: float = _flag(
        10.0,
        "seconds of silence after which an instance is killed and replaced, at least 2",
        type=float,
    )
    cache_dir: str | None = _flag(
        None, "where the embedded model is kept; default $KUNSERVE_CACHE or ~/.cache/kunserve"
    )
    log_level: str = _flag(
        "info", "least severe log lines to print", choices=("debug", "info", "warning", "error")
    )
    check_accounting: bool = _switch(
        False, "check pages, blocks and leases after every step and poison pages (debugging)"
    )

    def __post_init__(self) -> None:
        self._check_range("threads_per_instance", 0, MAX_THREADS)
        for name in ("instances", "max_num_seqs", "max_num_queued_reqs"):
            self._check_range(name, 1, MAX_COUNT)
        for name in ("max_model_len", "max_num_batched_tokens"):
            if getattr(self, name) is not None:
                self._check_range(name, 1, MAX_COUNT)
        for name in (
            "kv_cache_memory_bytes",
            "memory_bytes",
            "max_request_body_bytes",
            "swap_space",
        ):
            if getattr(self, name) is not None:
                self._check_range(name, 1, MAX_BYTES)
        for name in ("step_time_target_ms", "start_timeout", "slo_ttft_ms", "slo_tpot_ms"):
            if getattr(self, name) is None:
                continue
            if not 0 < getattr(self, name) <= MAX_DURATION:
                raise ConfigError(f"{_flag_name(name)} must be positive, at most {MAX_DURATION:g}")
        if not MIN_HEARTBEAT_TIMEOUT_S <= self.heartbeat_timeout <= MAX_DURATION:
            raise ConfigError(
                f"--heartbeat-timeout must be at least {MIN_HEARTBEAT_TIMEOUT_S:g} seconds (an "
                f"instance reports every 0.5 s) and at most {MAX_DURATION:g}, "
                f"got {self.heartbeat_timeout:g}"
            )
        if not 0 <= self.shutdown_timeout <= MAX_DURATION:
            raise ConfigError(
                f"--shutdown-timeout must not be negative, and at most {MAX_DURATION:g}"
            )
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must be between 0 and 65535, got {self.port}")
        if self.block_size < 16 or self.block_size > 256 or self.block_size % 16:
            raise ConfigError(
                f"--block-size must be a multiple of 16 between 16 and 256, got {self.block_size}"
            )
        if self.instances > 16:
            raise ConfigError(
                f"--instances: at most 16 instances share one partner domain, got {self.instances}"
            )
        if self.kv_cache_memory_bytes is not None and self.memory_bytes is not None:
            raise ConfigError("give --kv-cache-memory-bytes or --memory-bytes, not both")
        if self.link_gbps is not None and not 0 < self.link_gbps <= MAX_GBPS:
            raise ConfigError(
                f"--link-gbps must be positive, at most {MAX_GBPS:g}, got {self.link_gbps:g}"
            )
        for name in ("api_key", "admin_key", "served_model_name"):
            if not all(getattr(self, name)):
                raise ConfigError(f"{_flag_name(name)} must not be empty")
        self._check_admin()

    def _check_admin(self) -> None:
        if self.admin_port is None:
            if self.admin_key:
                raise ConfigError("--admin-key does nothing without --admin-port; give both")
            return
        if not 0 <= self.admin_port <= 65535:
            raise ConfigError(f"--admin-port must be between 0 and 65535, got {self.admin_port}")
        if not self.admin_key:
            raise ConfigError("--admin-port needs --admin-key: who has it can change the layout")
        if self.admin_port == self.port != 0:
            raise ConfigError(f"--admin-port and --port must differ, got {self.port} for both")

    def _check_range(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if value < low:
            raise ConfigError(f"{_flag_name(name)} must be at least {low}, got {value}")
        if value > high:
            raise ConfigError(f"{_flag_name(name)} must be at most {high}, got {value}")

    @property
    def threads(self) -> int:
        """Compute threads of one instance."""
        if self.threads_per_instance:
            return self.threads_per_instance
        return max(1, len(os.sched_getaffinity(0)) // self.instances)

    @property
    def kv_bytes(self) -> int | None:
        """KVCache bytes of an instance, or None when --memory-bytes decides."""
        if self.memory_bytes is not None:
            return None
        return self.kv_cache_memory_bytes or DEFAULT_KV_CACHE_BYTES


def _flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one argument for every field of `ServeConfig`."""
    for config_field in fields(ServeConfig):
        options = dict(config_field.metadata["options"])
        if config_field.metadata.get("positional"):
            parser.add_argument(config_field.name, help=config_field.metadata["help"], **options)
            continue
        parser.add_argument(
            _flag_name(config_field.name),
            dest=config_field.name,
            default=_default(config_field),
            help=_help(config_field),
            **options,
        )


def _default(config_field: Field[Any]) -> Any:
    default = config_field.default
    if isinstance(default, tuple):
        return list(default)  # argparse appends to a copy of it
    return None if default is MISSING else default


def _help(config_field: Field[Any]) -> str:
    text: str = config_field.metadata["help"].replace("%", "%%")
    shown = config_field.default not in (None, (), MISSING) and "default" not in text
    if shown and not isinstance(config_field.default, bool):
        text += " (default %(default)s)"
    return text


def config_from_args(args: argparse.Namespace) -> ServeConfig:
    """The configuration of parsed arguments.

    Raises:
        ConfigError: see `ServeConfig`.
    """
    values = {f.name: getattr(args, f.name) for f in fields(ServeConfig)}
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple(value)
    return ServeConfig(**values)
