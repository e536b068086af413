"""A configuration in a few words: what is minimised, on which data, by which policy and which kinds of actors."""

from collections.abc import Mapping

from driftstream.actors.kinds import Option, short_name
from driftstream.launch.config import LOW_DIMENSION, RunConfig, settled_kinds

_OBJECTIVES: dict[str, str] = {
    "trajectory_balance": "trajectory balance",
    "vargrad": "log variance (VarGrad)",
    "detailed_balance": "detailed balance",
    "subtrajectory_balance": "subtrajectory balance",
    "reverse_kl": "reverse KL",
    "maximum_likelihood": "maximum likelihood",
}
_FLOWS = {"plain": "state flow", "forward_looking": "forward-looking flow"}


def describe_objective(config: RunConfig) -> str:
    """The objective, such as "subtrajectory balance (λ = 2), segments of 20 steps"."""
    objective = config.objective
    words = _OBJECTIVES.get(objective.name) or short_name(objective.name)
    if objective.name == "subtrajectory_balance":
        words += f" (λ = {objective.lam:g})"
    length = objective.segment_length
    return words if length is None else f"{words}, segments of {length} step" + "s" * (length > 1)


def describe_data(config: RunConfig) -> str:
    """What is trained on, such as "explore:2 + teacher:1 + replay by loss"."""
    streamed = config.data == "stream"
    replayed = ""
    if config.replay.ratio > 0:
        source, order = config.replay.source, config.replay.prioritization
        refined = source == "refined" or (source == "auto" and streamed and config.refiner.count > 0)
        replayed = "refined replay" if refined else "replay"
        if order == "loss":
            replayed += " by loss"
    if config.objective.replay_only:
        return replayed
    fresh = describe_kinds(settled_kinds(config)[0], {}) if streamed else "on-policy"
    if config.objective.pathwise:
        fresh += ", pathwise gradient"
    return f"{fresh} + {replayed}" if replayed else fresh


def describe_kinds(kinds: Mapping[str, int], options: Mapping[str, Mapping[str, Option]]) -> str:
    """Kinds with their counts and options, such as "explore:2 + Mine:1 (width 3)"."""
    words = []
    for kind, count in kinds.items():
        name = short_name(kind)
        values = ", ".join(f"{option} {value}" for option, value in options.get(name, {}).items())
        words.append(f"{name}:{count}" + (f" ({values})" if values else ""))
    return " + ".join(words)


def describe_policy(config: RunConfig) -> str:
    """The networks, and the process unless it is Brownian motion, such as "PIS net + learned variance"."""
    policy = config.policy
    parts = ["Langevin" if policy.langevin else "PIS net"]
    if policy.precondition:
        parts.append("preconditioning")
    if policy.learned_variance is None:
        parts.append(f"learned variance (D ≤ {LOW_DIMENSION})")
    elif policy.learned_variance:
        parts.append("learned variance")
    if policy.learned_backward:
        parts.append("learned backward")
    flow = policy.state_flow
    if flow == "auto" and config.objective.balances_flows:
        flow = "plain"
    if flow in _FLOWS:
        parts.append(_FLOWS[flow])
    words = " + ".join(parts)
    kind = config.process.kind
    return words if kind == "brownian" else f"{words}, {kind.upper()} process"
