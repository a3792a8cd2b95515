"""Results of a study: saved and read again, as tables, as JSON, as figures."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from kunserve.bench.client import BenchError
from kunserve.bench.cluster import as_json
from kunserve.bench.overload_report import (
    PolicyFigures,
    figures_json,
    figures_of,
    render,
    scenario_json,
)
from kunserve.bench.overload_runs import OverloadRun
from kunserve.bench.overload_study import SearchResult, StudyResult
from kunserve.bench.scenario import Scenario

SCHEMA = "kunserve.bench.overload/1"


def save_runs(path: Path, result: StudyResult) -> None:
    """Write all runs; the file is never half written."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(msgspec.json.encode(_Saved(result.scenarios, result.runs)))
    partial.replace(path)


def load_runs(path: Path) -> StudyResult:
    """Read what `save_runs` wrote.

    Raises:
        BenchError: it cannot be read.
    """
    try:
        saved = msgspec.json.decode(path.read_bytes(), type=_Saved)
    except (OSError, msgspec.MsgspecError) as error:
        raise BenchError(f"{path} cannot be read as saved runs: {error}") from error
    return StudyResult(saved.scenarios, saved.runs)


class _Saved(msgspec.Struct, frozen=True):
    scenarios: tuple[Scenario, ...]
    runs: tuple[OverloadRun, ...]


def runs_by_variant(result: StudyResult, scenario: Scenario) -> dict[str, list[OverloadRun]]:
    """The runs of one height, by variant, in the order of the study."""
    height = str(scenario.options.height)
    found: dict[str, list[OverloadRun]] = {}
    for run in result.runs:
        if run.key.height == height:
            found.setdefault(run.key.variant, []).append(run)
    return found


def figures_by_variant(result: StudyResult, scenario: Scenario) -> dict[str, PolicyFigures]:
    """The figures of one height, by variant."""
    runs = runs_by_variant(result, scenario)
    return {name: figures_of(each, scenario) for name, each in runs.items()}


def print_tables(result: StudyResult, console: Console) -> None:
    """A table for each height."""
    for scenario in result.scenarios:
        title = f"kunserve bench overload, burst of {scenario.options.height}"
        console.print(render(figures_by_variant(result, scenario), title))


def results_json(result: StudyResult) -> str:
    """The figures; keys are stable within one `schema`.

    scenario   the rule and what it gave, of the first height
    policies   by variant, of the first height: ttft_p50_s, ttft_p90_s, ttft_p99_s, likewise tpot_
               and e2e_; itl_max_s, tokens_per_s, loaded_tokens_per_s, requests, failed,
               preemptions, transitions, queue_share_of_ttft, intervals_95, phases, errors
    sweep      of every height: {scenario, policies}
    search     by variant: best (flags), grid (a list of {flags, and the keys of a policy})

    Times in seconds; null is infinite (a request failed) or not known.
    """
    sweep = [
        {"scenario": scenario_json(scenario), "policies": _policies_json(result, scenario)}
        for scenario in result.scenarios
    ]
    search = {name: _search_json(found) for name, found in result.search.items()}
    return as_json(SCHEMA, **sweep[0], sweep=sweep, search=search)


def _policies_json(result: StudyResult, scenario: Scenario) -> dict[str, Any]:
    figures = figures_by_variant(result, scenario)
    return {name: figures_json(each) for name, each in figures.items()}


def _search_json(found: SearchResult) -> dict[str, Any]:
    grid = [{"flags": list(setting), **figures_json(each)} for setting, each in found.tried]
    return {"best": list(found.best), "grid": grid}


def draw(result: StudyResult, directory: Path) -> list[Path]:
    """Draw every height into a directory of its own (a single one into `directory`), and TTFT
    against the height if there are several; returns the files.

    Raises:
        BenchError: matplotlib is not installed.
    """
    plots = load_plots()
    several = len(result.scenarios) > 1
    paths: list[Path] = []
    by_height: list[tuple[float, Mapping[str, PolicyFigures]]] = []
    for scenario in result.scenarios:
        runs = runs_by_variant(result, scenario)
        if not runs:
            continue
        figures = figures_by_variant(result, scenario)
        height = scenario.options.height
        place = directory / str(height) if several else directory
        paths += plots.draw_all(place, scenario, runs, figures)
        by_height.append((height.tokens(scenario.figures) / scenario.figures.whole_tokens, figures))
    if several:
        paths.append(directory / "height.png")
        plots.draw_heights(by_height).savefig(paths[-1], dpi=plots.DPI)
    return paths


def load_plots() -> Any:
    """The module that draws, which alone needs matplotlib.

    Raises:
        BenchError: it is not installed.
    """
    try:
        return importlib.import_module("kunserve.bench.overload_plots")
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise BenchError("figures need matplotlib: pip install 'kunserve[bench]'") from error
