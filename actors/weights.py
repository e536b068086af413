"""The versioned subscriber: policies that follow the learner's newest published weights."""

import torch
from torch import Tensor, nn

from driftstream.buffers.weight_channel import WeightSubscriber

TEACHER = "teacher."
"""What the names of the teacher's tensors start with, beside the student's in one snapshot."""


def published_tensors(policy: nn.Module, teacher: nn.Module | None) -> dict[str, Tensor]:
    """Tensors of a student and of its teacher, if any, under the names that they are published with."""
    of_teacher = {} if teacher is None else teacher.state_dict()
    return policy.state_dict() | {TEACHER + name: value for name, value in of_teacher.items()}


class PolicySubscriber:
    """Loads published weights into a policy, whole versions only, when its owner asks for it.

    A teacher's weights are left aside where its owner has none.
    """

    def __init__(self, endpoint: str, policy: nn.Module, teacher: nn.Module | None = None) -> None:
        self._subscriber = WeightSubscriber(endpoint)
        self._tensors = published_tensors(policy, teacher)
        self._has_teacher = teacher is not None
        self.version = -1
        self.progress = 0.0
        self.wall_s = 0.0
        self.energy_evaluations = 0

    def update(self, timeout_s: float, min_version: int = 0) -> bool:
        """Load the newest weights, waiting up to `timeout_s` for a version of at least `min_version`.

        Returns whether the policy now holds such a version.

        Raises:
            ValueError: the published tensors are not those of this policy.
        """
        if self.version >= min_version:
            snapshot = self._subscriber.latest()
        else:
            snapshot = self._subscriber.wait(timeout_s, min_version=min_version)
        if snapshot is not None:
            tensors = {k: v for k, v in snapshot.tensors.items() if self._has_teacher or not k.startswith(TEACHER)}
            if tensors.keys() != self._tensors.keys():
                differing = sorted(tensors.keys() ^ self._tensors.keys())
                raise ValueError(f"published weights do not fit the policy: {', '.join(differing)}")
            torch._foreach_copy_([self._tensors[name] for name in tensors], list(tensors.values()))
            self.version = snapshot.version
            self.progress = snapshot.progress
            self.wall_s = snapshot.wall_s
            self.energy_evaluations = snapshot.energy_evaluations
        return self.version >= min_version

    def close(self) -> None:
        """Close the socket."""
        self._subscriber.close()
