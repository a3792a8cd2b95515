"""Cost models that were measured once (`kunserve profile`) and are used at every start.

A profile holds for one *kind* of instance: this CPU, these kernels, as many threads, a model of
these sizes. Each kind has a file of its own in the cache directory, named by a digest of the kind.
No torch here: the front uses it.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from kunserve.core.errors import ConfigError, KunserveError
from kunserve.core.model import ModelSpec
from kunserve.policy.cost_model import CostModel

SCHEMA = "kunserve.profile/1"

_SIZES = (
    "architecture",
    "num_layers",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "tied_embeddings",
    "qkv_bias",
)
"""What of a model step times depend on."""


class ProfileDamagedError(KunserveError):
    """A profile cannot be read, or is of another kind than its name says."""


@dataclass(frozen=True)
class InstanceKind:
    """What the times of steps depend on. `model` maps names of sizes to their values."""

    cpu: str
    kernels: str
    threads: int
    block_size: int
    model: Mapping[str, Any]

    @classmethod
    def here(cls, spec: ModelSpec, kernels: str, threads: int, block_size: int) -> InstanceKind:
        """The kind of an instance on this machine; `kernels` is their `identity`."""
        sizes = {name: getattr(spec, name) for name in _SIZES}
        return cls(cpu_name(), kernels, threads, block_size, sizes)

    @property
    def digest(self) -> str:
        """A name for files: equal for equal kinds."""
        encoded = msgspec.json.encode(self, order="sorted")
        return hashlib.sha256(encoded).hexdigest()[:32]


@dataclass(frozen=True)
class ErrorSummary:
    """Relative errors of predictions, without their signs; `bias` is their mean with signs."""

    count: int
    mean: float
    median: float
    p90: float
    largest: float
    bias: float


@dataclass(frozen=True)
class Profile:
    """A measured cost model. `fitted` are its errors on the samples it was fitted to, `held_back`
    those on others, measured after the fit. `slowness`: how much longer everything took while the
    machine was at its busiest, as a factor; times are given as of a machine that is not."""

    kind: InstanceKind
    measured_at: str
    cost_model: CostModel
    slowness: float
    fitted: ErrorSummary
    held_back: ErrorSummary | None = None
    schema: str = SCHEMA


def now_text() -> str:
    """The time of day in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def cpu_name() -> str:
    """The name of this machine's CPU, as the kernel gives it; "unknown" if it gives none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


def profile_directory(cache_dir: Path) -> Path:
    """Where profiles are kept."""
    return cache_dir / "profiles"


def profile_path(directory: Path, kind: InstanceKind) -> Path:
    """The file of one kind of instance."""
    return directory / f"{kind.digest}.json"


def store_profile(directory: Path, profile: Profile) -> Path:
    """Write a profile in place of an older one, at once or not at all; returns its path.

    Raises:
        ConfigError: the directory cannot be written.
    """
    path = profile_path(directory, profile.kind)
    text = msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".profile-", delete=False) as file:
            try:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise ConfigError(
            f"the profile cannot be written to {directory} ({error}): give another --cache-dir"
        ) from error
    return path


def load_profile(directory: Path, kind: InstanceKind) -> Profile | None:
    """The stored profile of this kind of instance; None if there is none.

    Raises:
        ProfileDamagedError: there is a file, but it is no profile of this kind.
    """
    path = profile_path(directory, kind)
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=Profile)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, ConfigError) as error:
        raise ProfileDamagedError(f"{path} is no profile ({error}); measure again") from error
    if profile.schema != SCHEMA or profile.kind != kind:
        raise ProfileDamagedError(f"{path} is of another kind of instance; measure again")
    return profile
