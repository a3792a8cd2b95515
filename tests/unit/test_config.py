"""The configuration: flags and fields are one thing, and what cannot work is refused by name."""

import argparse
import os
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kunserve.config import (
    DEFAULT_KV_CACHE_BYTES,
    ServeConfig,
    add_serve_arguments,
    config_from_args,
    parse_size,
)
from kunserve.core.errors import ConfigError


def parse(*arguments: str) -> ServeConfig:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_serve_arguments(parser)
    return config_from_args(parser.parse_args(arguments))


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("1048576", 1 << 20),
        ("96MiB", 96 << 20),
        ("96mib", 96 << 20),
        ("2GiB", 2 << 30),
        ("64KiB", 64 << 10),
        ("1.5GB", 1_500_000_000),
        ("1500MB", 1_500_000_000),
        ("3g", 3_000_000_000),
        ("5k", 5000),
        (" 7 MB ", 7_000_000),
        ("12b", 12),
    ],
)
def test_sizes(text: str, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", " ", "0", "0GiB", "0.2", "12xyz", "-5MiB", "+5MiB", "MiB", "1e9", "1,5GB", "1..5GB",
     ".5GB", "nan", "inf", "1 GiB x", "0x10", "5TiBs", "1_000", "10 %", "٣", "9" * 400,
     "1." + "1" * 400],
)  # fmt: skip
def test_no_sizes(text: str):
    with pytest.raises(ConfigError, match="is not a size; write for example 96MiB"):
        parse_size(text)


@given(st.integers(1, 1 << 50))
def test_plain_bytes_are_exact(size: int):
    assert parse_size(str(size)) == size


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_config_error(text: str):
    try:
        size = parse_size(text)
    except ConfigError:
        return
    assert size > 0


# ---------------------------------------------------------------- flags

OTHER_VALUES: dict[str, tuple[list[str], Any]] = {
    "model": (["some/dir"], "some/dir"),
    "host": (["--host", "::1"], "::1"),
    "port": (["--port", "0"], 0),
    "served_model_name": (["--served-model-name", "a", "--served-model-name", "b"], ("a", "b")),
    "api_key": (["--api-key", "k1", "--api-key", "k2"], ("k1", "k2")),
    "admin_port": (["--admin-port", "0"], 0),
    "admin_key": (["--admin-key", "a1", "--admin-key", "a2"], ("a1", "a2")),
    "instances": (["--instances", "16"], 16),
    "threads_per_instance": (["--threads-per-instance", "3"], 3),
    "kv_cache_memory_bytes": (["--kv-cache-memory-bytes", "96MiB"], 96 << 20),
    "memory_bytes": (["--memory-bytes", "2GiB"], 2 << 30),
    "block_size": (["--block-size", "32"], 32),
    "max_model_len": (["--max-model-len", "99"], 99),
    "max_num_seqs": (["--max-num-seqs", "7"], 7),
    "max_num_batched_tokens": (["--max-num-batched-tokens", "512"], 512),
    "step_time_target_ms": (["--step-time-target-ms", "2.5"], 2.5),
    "max_num_queued_reqs": (["--max-num-queued-reqs", "5"], 5),
    "enable_prefix_caching": (["--no-enable-prefix-caching"], False),
    "exchange": (["--exchange", "uncoordinated"], "uncoordinated"),
    "policy": (["--policy", "observe"], "observe"),
    "drop": (["--no-drop"], False),
    "restore": (["--no-restore"], False),
    "trigger": (["--trigger", "memory-only"], "memory-only"),
    "slo_ttft_ms": (["--slo-ttft-ms", "500"], 500.0),
    "slo_tpot_ms": (["--slo-tpot-ms", "80"], 80.0),
    "batching": (["--batching", "token-count"], "token-count"),
    "batch_order": (["--batch-order", "prefill-first"], "prefill-first"),
    "swap_space": (["--swap-space", "1GiB"], 1 << 30),
    "link_gbps": (["--link-gbps", "2.5"], 2.5),
    "seed": (["--seed", "3"], 3),
    "generation_config": (["--generation-config", "vllm"], "vllm"),
    "max_request_body_bytes": (["--max-request-body-bytes", "1kB"], 1000),
    "shutdown_timeout": (["--shutdown-timeout", "0"], 0.0),
    "start_timeout": (["--start-timeout", "5"], 5.0),
    "heartbeat_timeout": (["--heartbeat-timeout", "2.5"], 2.5),
    "cache_dir": (["--cache-dir", "here"], "here"),
    "log_level": (["--log-level", "debug"], "debug"),
    "check_accounting": (["--check-accounting"], True),
}

# One of these alone is refused.
COMPANIONS: dict[str, dict[str, Any]] = {
    "admin_port": {"admin_key": ("k",)},
    "admin_key": {"admin_port": 9000},
}
COMPANION_ARGUMENTS = {"admin_port": ["--admin-port", "9000"], "admin_key": ["--admin-key", "k"]}


def test_without_flags_all_is_default():
    assert parse() == ServeConfig()


def test_every_field_is_tried():
    assert {field.name for field in fields(ServeConfig)} == set(OTHER_VALUES)


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_a_flag_sets_its_field_and_no_other(name: str):
    arguments, value = OTHER_VALUES[name]
    companions = COMPANIONS.get(name, {})
    more = [text for other in companions for text in COMPANION_ARGUMENTS[other]]
    config = parse(*arguments, *more)
    assert getattr(config, name) == value
    assert type(getattr(config, name)) is type(value)
    assert getattr(ServeConfig(), name) != value
    assert config == ServeConfig(**{name: value}, **companions)


def test_all_flags_together():
    chosen = {name: both for name, both in OTHER_VALUES.items() if name != "memory_bytes"}
    wanted = ServeConfig(**{name: value for name, (_, value) in chosen.items()})
    for order in (list(chosen), list(reversed(chosen))):
        assert parse(*[argument for name in order for argument in chosen[name][0]]) == wanted


def test_exchange_takes_known_words_only():
    with pytest.raises(argparse.ArgumentError, match="--exchange"):
        parse("--exchange", "fast")


@pytest.mark.parametrize("flag", ["--served-model-name", "--api-key"])
def test_a_flag_that_may_be_repeated_takes_one_value_and_leaves_the_model(flag: str):
    config = parse(flag, "foo", "/path/model")
    assert config.model == "/path/model"
    assert (config.served_model_name or config.api_key) == ("foo",)
    assert parse() == ServeConfig()  # nothing is kept in the default


def test_the_help_names_every_flag_and_its_default():
    parser = argparse.ArgumentParser(prog="x")
    add_serve_arguments(parser)
    text = " ".join(parser.format_help().split())
    for field in fields(ServeConfig):
        if field.name != "model":
            assert "--" + field.name.replace("_", "-") in text
    assert "(default 8000)" in text
    assert "(default None)" not in text
    assert "(default ())" not in text


def test_the_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        ServeConfig().port = 1  # type: ignore[misc]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"instances": 0}, ("--instances", "at least 1", "0")),
        ({"instances": -1}, ("--instances", "at least 1")),
        ({"instances": 17}, ("--instances", "at most 16", "17")),
        ({"threads_per_instance": -1}, ("--threads-per-instance", "at least 0")),
        ({"max_num_seqs": 0}, ("--max-num-seqs", "at least 1")),
        ({"max_num_queued_reqs": 0}, ("--max-num-queued-reqs", "at least 1")),
        ({"max_request_body_bytes": 0}, ("--max-request-body-bytes", "at least 1")),
        ({"max_model_len": 0}, ("--max-model-len", "at least 1")),
        ({"max_num_batched_tokens": 0}, ("--max-num-batched-tokens", "at least 1")),
        ({"kv_cache_memory_bytes": 0}, ("--kv-cache-memory-bytes", "at least 1")),
        ({"memory_bytes": -1}, ("--memory-bytes", "at least 1")),
        ({"step_time_target_ms": 0.0}, ("--step-time-target-ms", "positive")),
        ({"step_time_target_ms": float("nan")}, ("--step-time-target-ms",)),
        ({"step_time_target_ms": float("inf")}, ("--step-time-target-ms",)),
        ({"start_timeout": 0.0}, ("--start-timeout", "positive")),
        ({"start_timeout": float("inf")}, ("--start-timeout",)),
        ({"heartbeat_timeout": -1.0}, ("--heartbeat-timeout", "at least 2 seconds")),
        ({"heartbeat_timeout": 1.9}, ("--heartbeat-timeout", "at least 2 seconds", "1.9")),
        ({"heartbeat_timeout": float("inf")}, ("--heartbeat-timeout",)),
        ({"heartbeat_timeout": float("nan")}, ("--heartbeat-timeout",)),
        ({"shutdown_timeout": -0.1}, ("--shutdown-timeout", "negative")),
        ({"shutdown_timeout": float("nan")}, ("--shutdown-timeout",)),
        ({"shutdown_timeout": float("inf")}, ("--shutdown-timeout",)),
        ({"port": -1}, ("--port", "65535", "-1")),
        ({"port": 65536}, ("--port", "65535", "65536")),
        ({"block_size": 0}, ("--block-size", "multiple of 16")),
        ({"block_size": 24}, ("--block-size", "24")),
        ({"block_size": 272}, ("--block-size", "256")),
        ({"kv_cache_memory_bytes": 1, "memory_bytes": 1},
         ("--kv-cache-memory-bytes", "--memory-bytes", "not both")),
        ({"api_key": ("good", "")}, ("--api-key", "empty")),
        ({"served_model_name": ("good", "")}, ("--served-model-name", "empty")),
        ({"threads_per_instance": 100_000}, ("--threads-per-instance", "at most")),
        ({"max_num_seqs": 1 << 64}, ("--max-num-seqs", "at most")),
        ({"max_num_queued_reqs": 1 << 64}, ("--max-num-queued-reqs", "at most")),
        ({"max_num_batched_tokens": 1 << 64}, ("--max-num-batched-tokens", "at most")),
        ({"max_model_len": 1 << 64}, ("--max-model-len", "at most")),
        ({"kv_cache_memory_bytes": 1 << 60}, ("--kv-cache-memory-bytes", "at most")),
        ({"admin_port": 9000}, ("--admin-port", "--admin-key")),
        ({"admin_key": ("k",)}, ("--admin-key", "--admin-port")),
        ({"admin_port": 9000, "admin_key": ("",)}, ("--admin-key", "empty")),
        ({"admin_port": 65536, "admin_key": ("k",)}, ("--admin-port", "65535", "65536")),
        ({"admin_port": 8000, "admin_key": ("k",)}, ("--admin-port", "--port", "8000")),
        ({"link_gbps": 0.0}, ("--link-gbps", "positive")),
        ({"link_gbps": -1.0}, ("--link-gbps", "positive")),
        ({"link_gbps": float("nan")}, ("--link-gbps",)),
        ({"link_gbps": float("inf")}, ("--link-gbps", "at most")),
        ({"step_time_target_ms": 1e300}, ("--step-time-target-ms", "at most")),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_by_name(values: dict[str, Any], words: tuple[str, ...]):
    with pytest.raises(ConfigError) as caught:
        ServeConfig(**values)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "values",
    [
        {"instances": 16},
        {"port": 65535},
        {"block_size": 16},
        {"block_size": 256},
        {"shutdown_timeout": 0.0},
        {"max_num_seqs": 1, "max_num_queued_reqs": 1},
        {"max_model_len": 1},
        {"heartbeat_timeout": 2.0},
        {"port": 0, "admin_port": 0, "admin_key": ("k",)},
    ],
)
def test_the_limits_themselves_work(values: dict[str, Any]):
    config = ServeConfig(**values)
    assert {name: getattr(config, name) for name in values} == values


# ---------------------------------------------------------------- what follows from it


def test_threads_share_the_cores():
    cores = len(os.sched_getaffinity(0))
    assert ServeConfig().threads == cores
    assert ServeConfig(instances=16).threads == max(1, cores // 16)
    assert ServeConfig(instances=16, threads_per_instance=5).threads == 5


def test_the_cache_is_sized_by_one_of_the_two_flags():
    assert ServeConfig().kv_bytes == DEFAULT_KV_CACHE_BYTES
    assert ServeConfig(kv_cache_memory_bytes=5).kv_bytes == 5
    assert ServeConfig(memory_bytes=5).kv_bytes is None
