"""A run of tiny roles that others may join, and a host that joins it, each as a process.

`python join_roles.py run RUN CONFIG.toml` and `python join_roles.py join FILE DIRECTORY ROLE_FUNCTION ACTORS`.
"""

import sys
from pathlib import Path

import tomli_w

import driftstream.launch.join as joining
from driftstream.buffers.keys import write_client_keys
from driftstream.launch.flags import answer
from driftstream.launch.invitation import read_invitation, write_invitation
from driftstream.launch.plan import RunPlan
from driftstream.launch.processes import fork_server
from driftstream.launch.progress import Progress
from driftstream.launch.run_directory import RunDirectory
from driftstream.launch.supervisor import Supervisor

PRELOAD = ["driftstream.launch.config"]
ROLES = Path(__file__).parent / "launch_roles.py"


def start_run(root: str, config: str) -> int:
    toml, run = Path(config).read_text(), RunDirectory.create(Path(root))
    plan = RunPlan.from_toml(toml)
    with fork_server(PRELOAD) as context, run.hold(plan.stream) as launch:
        run.write_config(toml)
        write_invitation(run, toml)
        return Supervisor(plan, run, launch, context, Progress("test"), f"{ROLES}:obey").run()


def join_run(file: str, root: str, role: str, actors: str) -> int:
    joining.SILENCE_S = 3.0
    invitation = read_invitation(Path(file))
    table = invitation.config
    table["actor"] |= {"kinds": {"explore": int(actors)}, "count": int(actors)}
    table["refiner"] |= {"kinds": {}, "count": 0}
    toml, here = tomli_w.dumps(table), RunDirectory.create(Path(root))
    write_client_keys(here.keys, invitation.keys)
    endpoints = invitation.endpoints(here.keys)
    control = endpoints.pop("control")
    with fork_server(PRELOAD) as context, here.hold(elsewhere=endpoints):
        here.write_config(toml)
        return joining.join(RunPlan.from_toml(toml), here, context, control, f"{ROLES}:{role}")


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    sys.exit(answer("test", lambda: {"run": start_run, "join": join_run}[command](*arguments)))
