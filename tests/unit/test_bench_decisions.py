"""`kunserve bench decisions`: what it measures is what it says, and its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kunserve.bench.decisions import (
    PATTERNS,
    REPORTS,
    ReportBench,
    ReportPattern,
    cluster_demand,
)
from kunserve.cli import main
from kunserve.policy.drop_plan import plan_drop
from kunserve.policy.pages import MAX_SLOTS

TINY = ["--plan-instances", "40", "--seeds", "2", "--groups", "2", "--reports", "4"]


def test_demand_follows_its_pattern() -> None:
    by_name = {pattern.name: cluster_demand(160, pattern, 1000, seed=1) for pattern in PATTERNS}
    for groups in by_name.values():
        assert [group.instances for group in groups] == [(number,) for number in range(160)]
        assert [group.domain for group in groups] == [n // MAX_SLOTS for n in range(160)]
    overloaded = {
        name: sum(group.is_overloaded for group in groups) for name, groups in by_name.items()
    }
    assert overloaded["none"] == 0
    assert 50 < overloaded["half of all groups"] < 110
    assert overloaded["all: pairs are enough"] == 160


def test_patterns_are_what_they_are_called() -> None:
    by_name = {pattern.name: pattern for pattern in PATTERNS}
    pairs = plan_drop(cluster_demand(160, by_name["all: pairs are enough"], 1000, 1), 1000)
    assert (len(pairs.merges), pairs.lacking_blocks) == (80, 0)
    hopeless = plan_drop(cluster_demand(160, by_name["all: beyond help"], 1000, 1), 1000)
    assert [len(merge) for merge in hopeless.merges] == [MAX_SLOTS] * 10
    assert hopeless.lacking_blocks > 0


@pytest.mark.parametrize("pattern", REPORTS, ids=lambda pattern: pattern.name)
def test_every_token_of_every_report_is_delivered(pattern: ReportPattern) -> None:
    bench = ReportBench(2, pattern)
    assert bench.reports_per_s(4) > 0
    assert bench.longest_ms(2) > 0


def test_figures_are_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    assert main(["bench", "decisions", *TINY, "--repeats", "1", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "drop plans, 40 instances" in printed
    assert "2 groups" in printed
    document = json.loads(path.read_text())
    assert document["schema"] == "kunserve.bench.decisions/1"
    assert [plan["pattern"] for plan in document["plans"]] == [p.name for p in PATTERNS]
    assert [found["pattern"] for found in document["reports"]] == [p.name for p in REPORTS]
    assert all(found["reports_per_s"] > 0 for found in document["reports"])


def test_a_number_that_is_not_positive_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "decisions", "--seeds", "0"]) == 2
    assert "--seeds must be at least 1" in capsys.readouterr().err
