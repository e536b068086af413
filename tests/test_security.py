"""Data stays data: no code of ours runs what it reads, and nothing is unpickled in a run."""

import ast
import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from driftstream.eval.monitor import MonitorConfig
from driftstream.launch.config import from_dict, resolve, to_toml
from driftstream.launch.methods import load_method
from driftstream.launch.run_directory import RunDirectory
from driftstream.learner.checkpoint import CheckpointError, CheckpointState, load_checkpoint, save_checkpoint

ROOT = Path(__file__).parent.parent
LAYERS = ["envs", "buffers", "actors", "learner", "eval", "launch"]
SOURCES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
WATCHED = Path(__file__).parent / "watched_roles.py"

PICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "yaml"}
PICKLING_METHODS = {"recv_pyobj", "send_pyobj", "recv_serialized", "send_serialized"}
EXECUTORS = {"eval", "exec", "compile", "__import__"}
PIPES = {"eval/bench_stream.py"}
"""Where a pipe to a child process of one's own may carry objects, which are pickled."""


def literal(call: ast.Call, keyword: str) -> object:
    for given in call.keywords:
        if given.arg == keyword and isinstance(given.value, ast.Constant):
            return given.value.value
    return None


def offences(source: str, may_pipe: bool = False) -> Iterator[str]:
    """What in a module may run code that it reads, by line."""
    pipes = "multiprocessing.connection" in source and not may_pipe
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] in PICKLERS or name in ("torch.load", "numpy.load"):
                yield f"line {node.lineno}: import of {name}"
        if isinstance(node, ast.Attribute) and node.attr in PICKLING_METHODS:
            yield f"line {node.lineno}: {node.attr}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in EXECUTORS or called.removeprefix("builtins.") in EXECUTORS:
            yield f"line {node.lineno}: {called}"
        if called.endswith("torch.load") and literal(node, "weights_only") is not True:
            yield f"line {node.lineno}: torch.load without weights_only=True"
        if called in ("np.load", "numpy.load") and literal(node, "allow_pickle") not in (None, False):
            yield f"line {node.lineno}: numpy.load with allow_pickle"
        if literal(node, "shell") is True or called in ("os.system", "os.popen"):
            yield f"line {node.lineno}: a shell"
        # What `send` of a multiprocessing connection is given is pickled; `send_bytes` sends bytes.
        if pipes and isinstance(node.func, ast.Attribute) and node.func.attr in ("send", "recv"):
            yield f"line {node.lineno}: {called}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_runs_what_it_reads(path: Path) -> None:
    assert not list(offences(path.read_text(), may_pipe=str(path.relative_to(ROOT)) in PIPES))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import dill as d",
        "from torch import load",
        "socket.recv_pyobj()",
        "send = socket.send_pyobj",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "exec(compile(text, '', 'exec'))",
        "builtins.exec(text)",
        "subprocess.run(text, shell=True)",
        "from multiprocessing.connection import Connection; receiver.recv()",
    ],
)
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert list(offences(source))


@pytest.mark.parametrize(
    "source", ["torch.load(path, weights_only=True)", "np.load(path)", "model.eval()", "re.compile(x)", "zap.recv()"]
)
def test_the_search_leaves_the_rest_alone(source: str) -> None:
    assert not list(offences(source))


@pytest.mark.timeout(240)
def test_nothing_is_unpickled_in_a_run_nor_when_its_checkpoint_is_used(tmp_path: Path) -> None:
    """Every role's process is watched from the start of its role, the supervisor's from the start of the run.

    The way to there is left out: `multiprocessing` starts a process by a pickle from its parent, over a pipe that
    nobody else has.
    """
    run = RunDirectory.create(tmp_path / "run")
    small = {
        "grid": {"sampling_steps": 5},
        "policy": {"hidden": 8},
        "learner": {"batch_size": 20},
        "refiner": {"every": 5, "mala": {"chains": 20, "mcmc_steps": 20, "burn_in": 10}},
        "replay": {"minimum": 20},
        "eval": {"samples": 50, "w2_samples": 50, "every_s": 0.5},
        "checkpoint": {"every_s": 1.0},
        "limits": {"steps": 200},
    }
    config = from_dict(load_method("default").config, small)
    run.write_config(to_toml(resolve(replace(config, target="gmm9", monitor=MonitorConfig(wandb="offline")))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def python(*arguments: str | Path) -> None:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=200, env=environment
        )
        assert done.returncode == 0, done.stdout + done.stderr

    python(WATCHED, run.root)
    roles = {"learner", "actor-0", "refiner-0", "evaluator", "supervisor"}
    found = {path.name.removeprefix("unpickled-"): path.read_text() for path in run.root.glob("unpickled-*")}
    assert found == dict.fromkeys(roles, "")
    # What a stranger's checkpoint may be used for.
    use = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from watched_roles import watch\n"
        "from driftstream.launch.cli import main\n"
        "import driftstream.launch.commands\n"
        "run, out = sys.argv[1:]; found = watch()\n"
        "assert main(['sample', run, '-n', '20', '-o', out]) == 0\n"
        "assert main(['eval', run, '--samples', '50', '--json']) == 0\n"
        "import numpy; assert numpy.load(out)['samples'].shape == (20, 2)\n"
        "assert not found, found\n"
    )
    python("-c", use, WATCHED.parent, run.root, tmp_path / "draws.npz")


def test_the_watch_sees_a_pickle() -> None:
    use = (
        "import sys; sys.path.insert(0, sys.argv[1]); from watched_roles import watch\n"
        "import pickle, collections; found = watch()\n"
        "pickle.loads(pickle.dumps(collections.OrderedDict()))\n"
        "assert found == ['collections.OrderedDict'], found\n"
    )
    subprocess.run([sys.executable, "-c", use, str(WATCHED.parent)], check=True, timeout=60)


class Bomb:
    """A pickle of this makes a directory where it is loaded."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.place),)


def test_a_checkpoint_from_someone_else_runs_nothing(tmp_path: Path) -> None:
    """A pickle in place of a checkpoint's files is refused as damaged, also where the manifest vouches for it."""
    group = {"w": torch.ones(2)}
    path = save_checkpoint(tmp_path, CheckpointState(1, {"ema": group}, {"energy_evaluations": 1}))
    data = pickle.dumps(Bomb(tmp_path / "exploded"))
    (path / "ema.safetensors").write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["ema.safetensors"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
    with pytest.raises((CheckpointError, SafetensorError)):
        load_checkpoint(path)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(data)
    assert (tmp_path / "exploded").exists()
