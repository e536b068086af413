"""Tiny roles for tests of the supervisor: each obeys, or misbehaves in one way.

As a script: `python launch_roles.py RUN ROLE_FUNCTION` supervises a run of them.
"""

import sys
import time
from pathlib import Path

from driftstream.buffers.control import RoleContext
from driftstream.envs.errors import TargetError
from driftstream.launch.plan import RunPlan
from driftstream.launch.processes import fork_server
from driftstream.launch.progress import Progress
from driftstream.launch.run_directory import RunDirectory
from driftstream.launch.supervisor import Supervisor


def obey(role: str, config: object, context: RoleContext) -> None:
    """A learner that trains until the file RUN/enough appears, and others that do what they are told.

    It drops the senders that the file RUN/drop names.
    """
    control = context.control
    control.report("event", {"text": f"{context.name} runs"})
    where = {"step": 7, "wall_s": 1.5, "energy_evaluations": 11}
    while not context.should_stop:
        if role == "learner":
            context.report_metrics({"train/loss": 0.5}, **where)
            control.report("status", {"phase": "training", "step": 7, "progress": 0.5})
            if (to_drop := context.run_dir / "drop").exists():
                for sender in to_drop.read_text().splitlines():
                    control.report("dropped", {"sender": sender, "reason": "10 messages in a row refused"})
                to_drop.unlink()
            if (context.run_dir / "enough").exists():
                status = {"phase": "finished", "step": 7, "progress": 1.0, "reason": "steps"}
                control.report("status", status)
                return
        if role == "evaluator" and control.finish.is_set():
            control.report("final", {"metrics": {**where, "eval/ess": 0.25}})
            return
        time.sleep(0.02)
    (context.run_dir / f"stopped-{context.name}").touch()


def actor_fails(role: str, config: object, context: RoleContext) -> None:
    if role == "actor":
        raise ValueError("no luck")
    obey(role, config, context)


def refiner_fails(role: str, config: object, context: RoleContext) -> None:
    if role == "refiner":
        raise ValueError("no luck")
    obey(role, config, context)


def target_fails(role: str, config: object, context: RoleContext) -> None:
    if role == "actor":
        error = ZeroDivisionError("division by zero")
        raise TargetError(f"target 'odd' raised ZeroDivisionError: {error}") from error
    obey(role, config, context)


def learner_fails(role: str, config: object, context: RoleContext) -> None:
    if role == "learner":
        raise RuntimeError("disk full")
    obey(role, config, context)


def learner_hangs(role: str, config: object, context: RoleContext) -> None:
    while role == "learner":
        time.sleep(0.1)
    obey(role, config, context)


def evaluator_fails_once(role: str, config: object, context: RoleContext) -> None:
    first = context.run_dir / "failed-once"
    if role == "evaluator" and not first.exists():
        context.control.report("event", {"text": "evaluator runs"})
        context.control.finish.wait()
        first.touch()
        raise RuntimeError("out of memory")
    obey(role, config, context)


def actor_dies_now_and_then(role: str, config: object, context: RoleContext) -> None:
    if role == "actor":
        context.control.report("event", {"text": f"{context.name} runs, epoch {context.epoch}"})
        time.sleep(0.6)
        raise ValueError("no luck")
    obey(role, config, context)


def learner_drops_senders(role: str, config: object, context: RoleContext) -> None:
    if role == "learner":
        for sender in ("actor-0", "stranger"):
            payload = {"sender": sender, "reason": "10 messages in a row refused"}
            context.control.report("dropped", payload)
    obey(role, config, context)


def takes_a_while_to_stop(role: str, config: object, context: RoleContext) -> None:
    obey(role, config, context)
    time.sleep(0.5)
    (context.run_dir / f"drained-{context.name}").touch()


def main(root: str, role_function: str) -> int:
    run = RunDirectory.open(Path(root))
    plan = RunPlan.from_toml(run.config.read_text())
    with fork_server(["driftstream.launch.config"]) as context, run.hold() as launch:
        return Supervisor(plan, run, launch, context, Progress("test"), role_function).run()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
