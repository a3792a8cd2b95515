"""Where an instance's cost model comes from: a stored profile, or steps timed at start."""

from __future__ import annotations

import logging
from pathlib import Path

from kunserve.policy.cost_model import CostModel
from kunserve.runtime.profiles import InstanceKind, Profile, ProfileDamagedError, load_profile
from kunserve.worker.engine import Engine
from kunserve.worker.profile import GOOD_ERROR, quick_fit

logger = logging.getLogger("kunserve.step_costs")


def kind_of(engine: Engine) -> InstanceKind:
    """What the times of this engine's steps depend on."""
    settings = engine.settings
    return InstanceKind.here(
        engine.spec, engine.kernels.identity, settings.threads, settings.block_size
    )


def find_cost_model(engine: Engine, directory: Path | None) -> CostModel:
    """The stored cost model of this kind of instance, else one from a few steps timed now.

    A profile that cannot be used costs a warning, nothing else. Nothing may be scheduled yet.
    """
    profile = _usable_profile(engine, directory) if directory is not None else None
    if profile is not None:
        logger.info(
            "step cost of the profile of %s (mean error %.1f %%): %s",
            profile.measured_at,
            100 * (profile.held_back or profile.fitted).mean,
            profile.cost_model,
        )
        return profile.cost_model
    fit = quick_fit(engine)
    logger.info(
        "step cost of %d steps timed now (mean error %.1f %%): %s",
        len(fit.samples),
        100 * fit.mean_error,
        fit.cost_model,
    )
    if fit.mean_error > GOOD_ERROR:
        logger.warning(
            "the timed steps were disturbed: predictions are off by %.0f %%; "
            "run `kunserve profile` once while the machine is quiet",
            100 * fit.mean_error,
        )
    return fit.cost_model


def _usable_profile(engine: Engine, directory: Path) -> Profile | None:
    try:
        return load_profile(directory, kind_of(engine))
    except ProfileDamagedError as error:
        logger.warning("the stored profile is not used: %s", error)
        return None
