"""The layout of the code: imports point one way, and every package is shipped."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ["envs", "buffers", "actors", "learner", "eval", "launch"]
SOURCES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0]
    allowed = set(LAYERS[: LAYERS.index(layer) + 1])
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] == "driftstream" and len(parts) > 1:
            assert parts[1] in allowed, f"{layer} may not import driftstream.{parts[1]}"
        assert parts[0] not in LAYERS, f"import driftstream.{parts[0]}, not {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_travels_as_data(path: Path) -> None:
    forbidden = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    tree = ast.parse(path.read_text())
    assert not {name.split(".")[0] for name in imported_modules(path)} & forbidden
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"recv_pyobj", "send_pyobj"}
            assert not (node.attr == "load" and isinstance(node.value, ast.Name) and node.value.id == "torch")


def test_only_the_monitor_imports_wandb() -> None:
    users = {path.name for path in SOURCES if any(n.split(".")[0] == "wandb" for n in imported_modules(path))}
    assert users <= {"monitor.py"}


def test_every_package_is_shipped() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {".".join(("driftstream", *p.parent.relative_to(ROOT).parts)) for p in SOURCES}
    assert folders == set(config["packages"]) == set(config["package-dir"])


def test_module_names_do_not_shadow_the_standard_library() -> None:
    assert not {path.name for path in SOURCES} & {"types.py", "queue.py", "logging.py"}


def test_files_stay_readable_in_one_sitting() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in SOURCES}
    assert not {name: n for name, n in lengths.items() if n > 400}
