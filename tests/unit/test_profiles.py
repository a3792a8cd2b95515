"""Stored cost models: found again for the same kind of instance, and for no other."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from kunserve.core.errors import ConfigError
from kunserve.core.model import ModelSpec
from kunserve.policy.cost_model import CostModel
from kunserve.runtime.profiles import (
    ErrorSummary,
    InstanceKind,
    Profile,
    ProfileDamagedError,
    cpu_name,
    load_profile,
    profile_path,
    store_profile,
)

SPEC = ModelSpec(
    architecture="LlamaForCausalLM",
    num_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49152,
    rms_norm_eps=1e-5,
    rope_theta=1e5,
    max_position=8192,
    tied_embeddings=True,
)
KIND = InstanceKind.here(SPEC, "cpu avx512 0123", threads=1, block_size=16)
ERRORS = ErrorSummary(count=40, mean=0.02, median=0.01, p90=0.04, largest=0.08, bias=-0.001)
PROFILE = Profile(
    kind=KIND,
    measured_at="2026-11-22T10:00:00+00:00",
    cost_model=CostModel(630.0, 2500.0, 1.5e6, 22e6, 6e6, 0.42e6, 2.4, 2.9),
    slowness=1.02,
    fitted=ERRORS,
    held_back=None,
)


def test_a_stored_profile_is_found_again(tmp_path: Path) -> None:
    assert load_profile(tmp_path, KIND) is None
    path = store_profile(tmp_path / "deeper", PROFILE)
    assert path == profile_path(tmp_path / "deeper", KIND)
    assert load_profile(tmp_path / "deeper", KIND) == PROFILE
    newer = replace(PROFILE, measured_at="later", held_back=ERRORS)
    store_profile(tmp_path / "deeper", newer)
    assert load_profile(tmp_path / "deeper", KIND) == newer
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing half written


@pytest.mark.parametrize(
    "other",
    [
        replace(KIND, cpu="another"),
        replace(KIND, kernels="cpu avx2 0123"),
        replace(KIND, threads=2),
        replace(KIND, block_size=32),
        InstanceKind.here(replace(SPEC, num_layers=12), KIND.kernels, 1, 16),
    ],
)
def test_another_kind_of_instance_has_a_profile_of_its_own(
    tmp_path: Path, other: InstanceKind
) -> None:
    store_profile(tmp_path, PROFILE)
    assert load_profile(tmp_path, other) is None


def test_what_times_do_not_depend_on_is_not_part_of_the_kind() -> None:
    same = replace(SPEC, rope_theta=5e5, eos_token_ids=(2,))
    assert InstanceKind.here(same, KIND.kernels, 1, 16).digest == KIND.digest


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace("kunserve.profile/1", "kunserve.profile/9"),
        lambda text: text.replace("0123", "4567"),
        lambda text: json.dumps({**json.loads(text), "cost_model": {"alpha_ns": 1.0}}),
        lambda text: text.replace("2500.0", "-2500.0"),
        lambda text: text.replace("2500.0", '"fast"'),
        lambda text: "\x00" * 100,
    ],
)
def test_a_damaged_profile_is_a_named_error(tmp_path: Path, change) -> None:  # type: ignore[no-untyped-def]
    path = store_profile(tmp_path, PROFILE)
    text = path.read_text(encoding="utf-8")
    changed = change(text)
    assert changed != text
    path.write_text(changed, encoding="utf-8")
    with pytest.raises(ProfileDamagedError, match="measure again"):
        load_profile(tmp_path, KIND)


def test_a_profile_that_is_no_file_is_a_named_error(tmp_path: Path) -> None:
    profile_path(tmp_path, KIND).mkdir()
    with pytest.raises(ProfileDamagedError, match="measure again"):
        load_profile(tmp_path, KIND)
    with pytest.raises(ConfigError, match="--cache-dir"):
        store_profile(tmp_path, PROFILE)
    assert len(os.listdir(tmp_path)) == 1


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--cache-dir"):
        store_profile(tmp_path / "file" / "profiles", PROFILE)


def test_this_machine_has_a_name() -> None:
    assert cpu_name()
