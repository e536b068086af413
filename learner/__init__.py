"""How it learns.

Objectives as pure functions, the optimiser, the sources of batches, the learner's loop and its checkpoints.
Imports `envs`, `buffers` and `actors`; `eval` and `launch` may import it.
"""
