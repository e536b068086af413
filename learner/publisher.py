"""Publishing the learner's weights: newest to the actors, averaged to the evaluator."""

import time

from driftstream.buffers.weight_channel import WeightPublisher
from driftstream.buffers.weights_wire import WeightEncoder
from driftstream.learner.learner import Learner
from driftstream.learner.limits import Budget

AVERAGE_EVERY_S = 1.0


class Publisher:
    """Publishes versions of the policy; a version is the number of learner steps behind it."""

    def __init__(self, learner: Learner, budget: Budget, weights: str, ema_weights: str) -> None:
        self._learner = learner
        self._budget = budget
        # Training and resuming change these in place.
        self._newest = WeightEncoder(learner.published_tensors())
        self._averaged = WeightEncoder(learner.average.tensors)
        self._weights = WeightPublisher(weights)
        self._average = WeightPublisher(ema_weights)
        self._average_due = 0.0
        self.version = -1

    def publish(self) -> int:
        """Publish the current weights to actors, and at most once a second the average; returns the version."""
        learner = self._learner
        if self.version != learner.step:
            self.version = learner.step
            self._weights.publish_frame(self._frame(self._newest))
        now = time.monotonic()
        if now >= self._average_due:
            self._average_due = now + AVERAGE_EVERY_S
            self._average.publish_frame(self._frame(self._averaged))
        return self.version

    def _frame(self, encoder: WeightEncoder) -> bytearray:
        learner = self._learner
        calls = learner.energy_evaluations
        progress = self._budget.progress(learner.step, calls)
        return encoder.encode(learner.step, progress, self._budget.elapsed_s, calls)

    def close(self) -> None:
        """Close both sockets."""
        self._weights.close()
        self._average.close()
