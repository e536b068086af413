"""The versioned subscriber: a policy that follows the learner's newest published weights."""

from torch import nn

from driftstream.buffers.weight_channel import WeightSubscriber


class PolicySubscriber:
    """Loads published weights into a policy, whole versions only, when its owner asks for it."""

    def __init__(self, endpoint: str, policy: nn.Module) -> None:
        self._subscriber = WeightSubscriber(endpoint)
        self._tensors = policy.state_dict()
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
            if snapshot.tensors.keys() != self._tensors.keys():
                differing = sorted(snapshot.tensors.keys() ^ self._tensors.keys())
                raise ValueError(f"published weights do not fit the policy: {', '.join(differing)}")
            for name, value in snapshot.tensors.items():
                self._tensors[name].copy_(value)
            self.version = snapshot.version
            self.progress = snapshot.progress
            self.wall_s = snapshot.wall_s
            self.energy_evaluations = snapshot.energy_evaluations
        return self.version >= min_version

    def close(self) -> None:
        """Close the socket."""
        self._subscriber.close()
