"""`kunserve profile`: measure what steps cost on this machine, fit the cost model, store it.

`kunserve serve` uses the stored constants for instances of the same kind (CPU, kernels, threads,
sizes of the model). With --held-back the fit is then frozen and tested on fresh random
microbatches, on whole instances and on stages, beside a model that counts tokens only (paper
section 5).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kunserve.bench.profile_steps import (
    LONGEST_TOKENS,
    HeldBackStep,
    grid_steps,
    held_back_steps,
    mixed_steps,
)
from kunserve.bench.report import percentile
from kunserve.config import DEFAULT_KV_CACHE_BYTES, ServeConfig, parse_size
from kunserve.core.errors import ConfigError
from kunserve.policy.cost_model import CostModel
from kunserve.runtime.model_config import load_model_spec
from kunserve.runtime.model_source import default_cache_dir, resolve_model
from kunserve.runtime.profiles import (
    ErrorSummary,
    Profile,
    now_text,
    profile_directory,
    store_profile,
)
from kunserve.runtime.step_costs import kind_of
from kunserve.worker.engine import Engine
from kunserve.worker.profile import Fit, StepTimer, TimedStep, quick_fit
from kunserve.worker.settings import EngineSettings, plan_instance_memory, resolve_max_model_len

SCHEMA = "kunserve.bench.profile/1"
MIXED_STEPS = 18
"""Random microbatches among the steps that are fitted."""
HELD_BACK_STEPS = 42
POOR_ERROR = 0.1
"""Mean error on the fitted steps above which the user is told."""
FIT_SHARE = 0.6
"""Of the time, where there are held-back steps as well."""
MAX_SECONDS = 3600.0

Log = Callable[[str], None]


@dataclass(frozen=True)
class ProfileOptions:
    """What is measured and for how long at most, in seconds, loading aside."""

    engine: EngineSettings
    seconds: float
    held_back: bool
    seed: int


@dataclass(frozen=True)
class Prediction:
    """A held-back step as measured and as each cost model, by its name, predicted it."""

    step: HeldBackStep
    measured_ns: int
    predicted_ns: dict[str, float]

    def error(self, name: str) -> float:
        """(predicted - measured) / measured."""
        return self.predicted_ns[name] / self.measured_ns - 1.0


@dataclass(frozen=True)
class ProfileResult:
    """The profile, the samples it was fitted to, and the test on held-back steps."""

    profile: Profile
    fit: Fit
    rivals: dict[str, CostModel]
    predictions: tuple[Prediction, ...]


FITTED = "this profile"
QUICK = "quick fit"
TOKENS = "token count"


def measure(engine: Engine, options: ProfileOptions, log: Log) -> ProfileResult:
    """Measure, fit, and test if wanted.

    Raises:
        ConfigError: no step was timed: the KVCache holds none, or there is no time.
    """
    timer = StepTimer(engine)
    share = FIT_SHARE if options.held_back else 1.0
    budget_ns = int(options.seconds * 1e9)
    steps = _steps_to_fit(timer, options.seed)
    _run(timer, steps, int(share * budget_ns), log)
    fit = Fit.of(timer, steps)
    rivals: dict[str, CostModel] = {}
    predictions: tuple[Prediction, ...] = ()
    if options.held_back:
        log("the quick fit of a start, for comparison")
        quick = quick_fit(engine)
        # Both gauges are the same step: this is the quick fit as of the same machine.
        same_speed = fit.reference_ns / quick.reference_ns
        rivals = {
            QUICK: quick.cost_model.scaled(same_speed),
            TOKENS: CostModel.fit_token_count(fit.samples),
        }
        models = {FITTED: fit.cost_model, **rivals}
        steps = _held_back_steps(timer, options.seed, engine.spec.num_layers)
        _run(timer, steps, int((1.0 - share) * budget_ns), log)
        predictions = _predict(steps, fit.reference_ns, models, engine.spec.num_layers)
    profile = Profile(
        kind=kind_of(engine),
        measured_at=now_text(),
        cost_model=fit.cost_model,
        slowness=timer.slowness,
        fitted=summarize([fit.cost_model.relative_error(sample) for sample in fit.samples]),
        held_back=summarize([one.error(FITTED) for one in predictions]) if predictions else None,
    )
    return ProfileResult(profile, fit, rivals, predictions)


def _steps_to_fit(timer: StepTimer, seed: int) -> list[TimedStep]:
    rng = random.Random(f"fitted {seed}")
    mixed = islice(mixed_steps(rng), MIXED_STEPS)
    steps = [timer.make_step(shapes) for shapes in (*grid_steps(), *mixed)]
    held = [step for step in steps if step is not None]
    rng.shuffle(held)  # where time ends early, what was measured is still of all kinds
    return held


def _held_back_steps(timer: StepTimer, seed: int, num_layers: int) -> list[TimedStep]:
    wanted = held_back_steps(seed, HELD_BACK_STEPS, num_layers)
    steps = [timer.make_step(one.shapes, one.layers) for one in wanted]
    return [step for step in steps if step is not None]


def _run(timer: StepTimer, steps: Sequence[TimedStep], budget_ns: int, log: Log) -> None:
    """Run the steps until all are settled or they took `budget_ns`."""
    log(f"{len(steps)} steps")
    if steps:
        timer.warm_up([max(steps, key=lambda step: step.num_tokens)])
    is_over = timer.deadline(budget_ns)
    while timer.run_round(steps, is_over):
        log(f"{sum(step.is_settled for step in steps)} of them measured")
    missing = sum(not step.has_run for step in steps)
    if missing:
        log(f"no time for {missing} of them; raise --seconds")


def _predict(
    steps: Sequence[TimedStep],
    reference_ns: float,
    models: dict[str, CostModel],
    num_layers: int,
) -> tuple[Prediction, ...]:
    predictions = []
    for step in steps:
        if not step.has_run:
            continue
        stage = (len(step.layers), num_layers, step.is_leader)
        predicted_ns = {name: model.stage_ns(step.shapes, *stage) for name, model in models.items()}
        held_back = HeldBackStep(step.shapes, step.layers)
        measured_ns = step.sample(reference_ns).elapsed_ns
        predictions.append(Prediction(held_back, measured_ns, predicted_ns))
    return tuple(predictions)


def summarize(errors: Sequence[float]) -> ErrorSummary:
    """Relative errors with signs, at least one, in numbers."""
    sizes = [abs(error) for error in errors]
    return ErrorSummary(
        count=len(sizes),
        mean=statistics.fmean(sizes),
        median=statistics.median(sizes),
        p90=percentile(sizes, 90),
        largest=max(sizes),
        bias=statistics.fmean(errors),
    )


# ---------------------------------------------------------------- what is shown


def constants_table(model: CostModel) -> Table:
    """The fitted constants of a whole instance."""
    table = Table(title="cost model of a whole instance")
    table.add_column("constant")
    table.add_column("value", justify="right")
    for field in fields(model):
        value = getattr(model, field.name)
        is_time = field.name.endswith("_ns")
        name = field.name.removesuffix("_ns")
        table.add_row(name, f"{value / 1e3:,.3f} us" if is_time else f"{value:.2f}")
    return table


def errors_table(result: ProfileResult) -> Table:
    """Relative errors on the fitted and on the held-back steps, a row per model and set."""
    table = Table(title="relative error of predicted step times")
    table.add_column("model")
    table.add_column("steps")
    for name in ("n", "mean", "median", "P90", "largest", "bias"):
        table.add_column(name, justify="right")

    def row(name: str, steps: str, errors: Sequence[float]) -> None:
        if errors:
            summary = summarize(errors)
            figures = (summary.mean, summary.median, summary.p90, summary.largest)
            shares = [f"{figure:.1%}" for figure in figures]
            table.add_row(name, steps, str(summary.count), *shares, f"{summary.bias:+.1%}")

    for name, model in {FITTED: result.profile.cost_model, **result.rivals}.items():
        row(name, "fitted", [model.relative_error(sample) for sample in result.fit.samples])
        row(name, "held back", [one.error(name) for one in result.predictions])
    num_layers = result.profile.kind.model["num_layers"]
    stages = [one for one in result.predictions if len(one.step.layers) < num_layers]
    row(FITTED, "of these, stages", [one.error(FITTED) for one in stages])
    return table


def document(result: ProfileResult) -> dict[str, Any]:
    """All of it as JSON; the keys are stable within one `schema`. Times in nanoseconds, `chunks` as
    (prefix tokens, chunk tokens, samples), layers half-open."""
    return {
        "schema": SCHEMA,
        "profile": asdict(result.profile),
        "rivals": {name: asdict(model) for name, model in result.rivals.items()},
        "fitted": [sample._asdict() for sample in result.fit.samples],
        "held_back": [
            {
                "chunks": one.step.shapes,
                "layers": [one.step.layers.start, one.step.layers.stop],
                "measured_ns": one.measured_ns,
                "predicted_ns": one.predicted_ns,
            }
            for one in result.predictions
        ],
    }


# ---------------------------------------------------------------- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `kunserve profile`."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="default: the embedded model")
    parser.add_argument(
        "--threads-per-instance",
        type=int,
        default=0,
        help="compute threads of the instances it is for; 0: all of the machine's cores",
    )
    parser.add_argument(
        "--kv-cache-memory-bytes",
        type=parse_size,
        default=DEFAULT_KV_CACHE_BYTES,
        metavar="SIZE",
        help="KVCache to measure with; steps that do not fit are left out (default 1GiB)",
    )
    parser.add_argument("--block-size", type=int, default=16, help="tokens of a KV block")
    parser.add_argument(
        "--seconds",
        type=float,
        default=75.0,
        help="most time that the measured steps take, longer on a busy machine (default 75)",
    )
    parser.add_argument(
        "--held-back",
        action="store_true",
        help="test the fit on fresh random microbatches, beside a token-count model",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random microbatches")
    parser.add_argument(
        "--cache-dir",
        help="where models and profiles are kept; default $KUNSERVE_CACHE or ~/.cache/kunserve",
    )
    parser.add_argument("--json", metavar="OUT", help="write all measurements to this file")


def run(args: argparse.Namespace) -> int:
    """Measure, store and print; returns the exit code."""
    status = Console(stderr=True)

    def log(line: str) -> None:
        status.print(line, style="dim", highlight=False)

    cache_dir = Path(args.cache_dir) if args.cache_dir else default_cache_dir(os.environ)
    options = _options(args, cache_dir, log)
    with Engine(options.engine, lambda activity, fraction: None) as engine:
        result = measure(engine, options, log)
    path = store_profile(profile_directory(cache_dir), result.profile)
    console = Console(file=sys.stdout)
    console.print(constants_table(result.profile.cost_model))
    console.print(errors_table(result))
    console.print(f"the busiest moments were slower by {result.profile.slowness - 1.0:.0%}")
    console.print(f"stored: {path}", soft_wrap=True)
    if result.fit.mean_error > POOR_ERROR:
        log("the fit is poor: the machine was too busy; measure again when it is quiet")
    if args.json:
        text = json.dumps(document(result), indent=1) + "\n"
        Path(args.json).write_text(text, encoding="utf-8")
    return 0


def _options(args: argparse.Namespace, cache_dir: Path, log: Log) -> ProfileOptions:
    """What the flags say, checked by the rules of `kunserve serve`.

    Raises:
        ConfigError, ModelLoadError, ModelNotSupportedError: with the flag or file at fault.
    """
    if not 0.0 < args.seconds <= MAX_SECONDS:
        raise ConfigError(f"--seconds must be positive, at most {MAX_SECONDS:g}")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise ConfigError(f"--json {args.json}: there is no such directory")
    config = ServeConfig(
        model=args.model,
        threads_per_instance=args.threads_per_instance,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
        block_size=args.block_size,
    )
    model = resolve_model(config.model, cache_dir, log)
    spec = load_model_spec(model.directory)
    plan = plan_instance_memory(spec, config.block_size, config.kv_bytes, None)
    most_tokens = resolve_max_model_len(spec, plan, config.block_size, None)
    log(f"loading {model.name} for {config.threads} thread(s)")
    engine = EngineSettings(
        model_directory=str(model.directory),
        spec=spec,
        threads=config.threads,
        block_size=config.block_size,
        max_model_len=min(most_tokens, LONGEST_TOKENS),
        kv_cache_memory_bytes=config.kv_bytes,
    )
    return ProfileOptions(engine, args.seconds, args.held_back, args.seed)
