"""Data in motion and at rest.

The pickle-free wire format, the ZeroMQ channels between roles, replay with its samplers, and the limiter that
holds the replay ratio. Imports `envs` only; `actors`, `learner`, `eval` and `launch` may import it.
"""
