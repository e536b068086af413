"""A configuration in a few words: what is minimised, on which data, by which policy."""

from driftstream.launch.config import LOW_DIMENSION, RunConfig
from driftstream.learner.objectives import ObjectiveName

_OBJECTIVES: dict[ObjectiveName, str] = {
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
    words = _OBJECTIVES[objective.name]
    if objective.name == "subtrajectory_balance":
        words += f" (λ = {objective.lam:g})"
    length = objective.segment_length
    return words if length is None else f"{words}, segments of {length} step" + "s" * (length > 1)


def describe_data(config: RunConfig) -> str:
    """What is trained on, such as "stream + refined replay"."""
    streamed = config.data == "stream"
    replayed = ""
    if config.replay.ratio > 0:
        source = config.replay.source
        refined = source == "refined" or (source == "auto" and streamed and config.refiner.count > 0)
        replayed = "refined replay" if refined else "replay"
    if config.objective.replay_only:
        return replayed
    fresh = "stream" if streamed else "on-policy"
    if config.objective.pathwise:
        fresh += ", pathwise gradient"
    return f"{fresh} + {replayed}" if replayed else fresh


def describe_policy(config: RunConfig) -> str:
    """The networks, and the process unless it is Brownian motion, such as "PIS net + learned variance"."""
    policy = config.policy
    parts = ["Langevin" if policy.langevin else "PIS net"]
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
