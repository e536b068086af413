"""The contract of every actor, refiner, target and objective in the box, and of what `driftstream new` writes."""

import ast
import json
from pathlib import Path

import pytest

from driftstream.actors.registry import actor_names, load_actor, load_refiner, refiner_names
from driftstream.envs.targets import target_names
from driftstream.launch.cli import main
from driftstream.launch.contract import check_actor, check_refiner
from driftstream.launch.contract_methods import check_objective
from driftstream.launch.contract_targets import check_target
from driftstream.launch.findings import Finding
from driftstream.launch.new import SUFFIX, class_name
from driftstream.learner.objectives import objective_names

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def _speeds_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("driftstream.launch.contract.SPEED_S", 0.0)


def assert_holds(findings: list[Finding]) -> None:
    assert len(findings) > 2
    assert [finding for finding in findings if finding.result in ("FAILED", "warning")] == []


@pytest.mark.parametrize("name", actor_names())
def test_actors(name: str) -> None:
    assert_holds(check_actor(load_actor(name)))


@pytest.mark.parametrize("name", refiner_names())
def test_refiners(name: str) -> None:
    assert_holds(check_refiner(load_refiner(name)))


@pytest.mark.parametrize("name", target_names())
def test_targets(name: str) -> None:
    assert_holds(check_target(name))


@pytest.mark.parametrize("name", objective_names())
def test_objectives(name: str) -> None:
    assert_holds(check_objective(name))


@pytest.mark.parametrize("kind", SUFFIX)
def test_what_new_writes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(f"first_{kind}{SUFFIX[kind]}")
    assert main(["new", kind, str(path)]) == 0
    capsys.readouterr()
    place = str(path) if kind == "preset" else f"{path}:{class_name(kind, path)}"
    assert main(["check", place, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kind"] == kind
    assert_holds([Finding(**row) for row in report["findings"]])


def test_an_actor_to_start_from_is_short(tmp_path: Path) -> None:
    assert main(["new", "actor", str(tmp_path / "mine.py")]) == 0
    tree = ast.parse((tmp_path / "mine.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body.pop(0)
    lines = [line for line in ast.unparse(tree).splitlines() if line.strip()]
    assert len(lines) <= 20
