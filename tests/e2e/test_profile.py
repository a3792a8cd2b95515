"""`kunserve profile` on a tiny model, and instances that start with what it stored."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from kunserve.bench.profile_steps import held_back_steps
from kunserve.cli import main
from kunserve.core.layout import LayerRange
from kunserve.policy.cost_model import ChunkShape, CostModel
from kunserve.runtime.model_config import load_model_spec
from kunserve.runtime.profiles import load_profile, profile_directory, profile_path
from kunserve.runtime.step_costs import find_cost_model, kind_of
from kunserve.worker.engine import Engine
from kunserve.worker.profile import StepTimer, quick_fit
from kunserve.worker.settings import EngineSettings
from tests.support.models import build_tiny_model

KV_BYTES = 4 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    build_tiny_model(directory, "llama", seed=7)
    return directory


def open_engine(model: Path) -> Engine:
    spec = load_model_spec(model)
    settings = EngineSettings(
        model_directory=str(model),
        spec=spec,
        threads=1,
        block_size=16,
        max_model_len=min(1280, spec.max_position),
        kv_cache_memory_bytes=KV_BYTES,
    )
    return Engine(settings, lambda activity, fraction: None)


def test_a_stored_profile_is_what_an_instance_starts_with(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "profile.json"
    flags = f"--threads-per-instance 1 --held-back --seconds 2 --kv-cache-memory-bytes {KV_BYTES}"
    code = main(
        ["profile", str(model), *flags.split(), "--cache-dir", str(tmp_path), "--json", str(out)]
    )
    assert code == 0
    shown = capsys.readouterr().out
    for words in ("beta", "sharpness", "token count", "held back", "stored: "):
        assert words in shown
    document = json.loads(out.read_text(encoding="utf-8"))
    assert document["schema"] == "kunserve.bench.profile/1"
    assert len(document["fitted"]) == document["profile"]["fitted"]["count"] > 10

    with open_engine(model) as engine, caplog.at_level(logging.INFO, "kunserve.step_costs"):
        directory = profile_directory(tmp_path)
        profile = load_profile(directory, kind_of(engine))
        assert profile is not None
        assert find_cost_model(engine, directory) == profile.cost_model
        assert f"profile of {profile.measured_at}" in caplog.messages[-1]

        caplog.clear()
        profile_path(directory, kind_of(engine)).write_text("{", encoding="utf-8")
        assert isinstance(find_cost_model(engine, directory), CostModel)
        assert "is no profile" in caplog.messages[0]
        assert "steps timed now" in caplog.messages[1]

        caplog.clear()
        assert isinstance(find_cost_model(engine, None), CostModel)
        assert "steps timed now" in caplog.messages[0]


def test_a_quick_fit_without_time_has_one_step(model: Path) -> None:
    with open_engine(model) as engine:
        fit = quick_fit(engine, budget_ns=0)
    assert len(fit.samples) == 1
    assert fit.mean_error < 0.01


def test_steps_that_the_kvcache_cannot_hold_are_not_made(model: Path) -> None:
    with open_engine(model) as engine:
        timer = StepTimer(engine)
        decode = ChunkShape(16, 1, samples=True)  # two blocks
        step = timer.make_step((decode,) * (engine.total_blocks // 2))
        assert step is not None
        assert step.layers == LayerRange(0, engine.spec.num_layers)
        assert timer.make_step((decode,) * (engine.total_blocks // 2 + 1)) is None
        assert timer.make_step((ChunkShape(engine.settings.max_model_len, 1),)) is None


def test_held_back_steps_depend_on_the_seed_alone() -> None:
    steps = held_back_steps(3, 12, 30)
    assert steps == held_back_steps(3, 12, 30)
    assert steps != held_back_steps(4, 12, 30)
    for number, step in enumerate(steps):
        assert 0 <= step.layers.start < step.layers.stop <= 30
        is_whole, is_leader, is_last = number % 3 == 0, number % 3 < 2, number % 3 != 1
        assert (len(step.layers) == 30) == is_whole
        assert (step.layers.start == 0) == is_leader
        assert (step.layers.stop == 30) == is_last
        assert any(chunk.chunk_tokens == 1 for chunk in step.shapes)
        assert any(chunk.chunk_tokens > 1 for chunk in step.shapes)
