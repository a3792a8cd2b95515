"""The documentation names what the code has."""

import re
from dataclasses import fields
from pathlib import Path

import kunserve
from kunserve.config import ServeConfig
from kunserve.policy.transition import as_mermaid
from kunserve.server.engine import EngineStatus
from kunserve.server.metrics import ServerMetrics
from kunserve.server.settings import Slo

REPOSITORY = Path(__file__).parents[2]
OPERATIONS = (REPOSITORY / "docs" / "operations.md").read_text(encoding="utf-8")
ARCHITECTURE = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")


class IdleEngine:
    """Nothing runs; enough for the metrics that exist before any request."""

    max_model_len = 128

    def status(self) -> EngineStatus:
        return EngineStatus(True, True, False, 0, ())


def test_the_package_exports_its_version_and_nothing_else() -> None:
    assert kunserve.__all__ == ["__version__"]


def test_every_flag_is_in_the_operations_page() -> None:
    names = {
        "MODEL" if f.metadata.get("positional") else "--" + f.name.replace("_", "-")
        for f in fields(ServeConfig)
    }
    described = set(re.findall(r"^\| `([^`]+)` \|", OPERATIONS, re.MULTILINE))
    assert names == {name for name in described if name == "MODEL" or name.startswith("--")}


def test_every_metric_is_in_the_operations_page() -> None:
    metrics = ServerMetrics(IdleEngine(), "m", Slo())  # type: ignore[arg-type]
    exported = re.findall(r"^# TYPE kunserve:(\w+) \w+$", metrics.render().decode(), re.MULTILINE)
    names = [name for name in exported if not name.endswith("_created")]
    assert names
    missing = [name for name in names if f"`{name}" not in OPERATIONS]
    assert not missing


def test_every_package_is_in_the_architecture_page() -> None:
    packages = {path.parent.name for path in (REPOSITORY / "kunserve").glob("*/__init__.py")}
    assert packages == set(re.findall(r"^\| `(\w+)` \|", ARCHITECTURE, re.MULTILINE))


def test_files_that_the_architecture_page_names_exist() -> None:
    for name in re.findall(r"`((?:core|policy|server|worker|device|runtime)/\w+)", ARCHITECTURE):
        path = REPOSITORY / "kunserve" / name
        assert path.with_suffix(".py").exists() or path.is_dir(), name
    for name in re.findall(r"`(tests/[\w/.]+)`", ARCHITECTURE):
        assert (REPOSITORY / name).exists(), name


def test_relative_links_exist() -> None:
    missing = []
    for page in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        links = re.findall(r"\]\(<?([^)>\s]+)", text) + re.findall(
            r"""(?:src|href)=["']([^"']+)""", text
        )
        for link in links:
            path = link.partition("#")[0]
            if re.match(r"[a-z][a-z0-9+.-]*:", path) or not path:
                continue  # an address, or a place on the same page
            if not (page.parent / path).exists():
                missing.append(f"{page.name}: {link}")
    assert not missing


def test_the_diagram_of_the_protocol_is_drawn_from_its_table() -> None:
    assert as_mermaid() in ARCHITECTURE, "run `make docs`"
