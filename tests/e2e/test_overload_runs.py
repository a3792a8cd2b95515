"""`kunserve bench overload` with real servers: a small study from flags to files, and Ctrl-C."""

import json
import signal
from pathlib import Path

import pytest

from kunserve.cli import main
from tests.support.models import build_tiny_model
from tests.support.servers import started_command, until


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    build_tiny_model(directory, "llama", seed=7)
    return directory


def flags(model: Path) -> list[str]:
    return [
        "bench", "overload", "--model", str(model), "--policies", "recompute", "--seeds", "0",
        "--weights-share", "0.5", "--input-len", "16", "--output-len", "32", "--before", "1",
        "--burst", "1", "--after", "1", "--rates", "10,60",
    ]  # fmt: skip


@pytest.mark.timeout(240)
def test_a_study(tmp_path: Path, model: Path):
    report, runs, figures = tmp_path / "o.json", tmp_path / "runs.json", tmp_path / "figures"
    output = ["--json", str(report), "--save-runs", str(runs), "--figures", str(figures)]
    with started_command(tmp_path, [*flags(model), *output]) as command:
        assert command.wait(200.0) == 0, command.log
        assert "recompute, 1x-merged, seed 0" in command.log
    document = json.loads(report.read_text(encoding="utf-8"))
    scenario, policy = document["scenario"], document["policies"]["recompute"]
    assert scenario["merged_tokens"] > scenario["whole_tokens"] > 0
    assert scenario["steady_requests_per_s"] == 10.0
    assert policy["requests"] > 30
    assert policy["failed"] == 0
    assert 0 < policy["ttft_p50_s"] <= policy["ttft_p99_s"]
    assert policy["tokens_per_s"] > 0
    assert 0 <= policy["queue_share_of_ttft"] <= 1
    assert policy["peak_demand_share"] > 0
    drawn = {path.name: path.read_bytes() for path in figures.iterdir()}
    assert len(drawn) == 6
    # The same again, without a server.
    again = ["--json", str(report), "--from-runs", str(runs)]
    assert main(["bench", "overload", *again]) == 0
    assert json.loads(report.read_text(encoding="utf-8"))["policies"] == document["policies"]


def test_ctrl_c_leaves_nothing(tmp_path: Path, model: Path):
    """`started_command` checks that no process and no temporary file is left."""
    with started_command(tmp_path, flags(model)) as command:
        until(lambda: "recompute, 1x-merged, seed 0" in command.log, "the run begins")
        command.signal(signal.SIGINT)
        assert command.wait() == 130
        assert command.log.endswith("kunserve: interrupted\n")
