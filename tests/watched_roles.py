"""Roles that note whatever is unpickled in their process: `python watched_roles.py RUN` trains with such."""

import sys
from pathlib import Path
from typing import Any

from driftstream.buffers.control import RoleContext
from driftstream.launch.plan import RunPlan
from driftstream.launch.processes import fork_server
from driftstream.launch.progress import Progress
from driftstream.launch.run_directory import RunDirectory
from driftstream.launch.supervisor import Supervisor

_found: list[str] = []


def watch() -> list[str]:
    """Note every class or function that a pickle asks for in this process from now on; a hook cannot be undone."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "pickle.find_class":
            _found.append(".".join(map(str, arguments)))

    sys.addaudithook(hook)
    return _found


def watched(role: str, config: Any, context: RoleContext) -> None:
    """Run a role as usual and write what was unpickled, a line each, to RUN/unpickled-<role>."""
    from driftstream.launch.roles import run_role

    found = watch()
    try:
        run_role(role, config, context)
    finally:
        (context.run_dir / f"unpickled-{context.name}").write_text("\n".join(found))


def main(root: str) -> int:
    run = RunDirectory.open(Path(root))
    plan = RunPlan.from_toml(run.config.read_text())
    with fork_server(["driftstream.launch.roles"]) as context, run.hold() as launch:
        found = watch()
        code = Supervisor(plan, run, launch, context, Progress("test"), f"{__file__}:watched").run()
        (run.root / "unpickled-supervisor").write_text("\n".join(found))
        return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
