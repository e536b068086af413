"""Who makes the data.

The policy, the fused rollout and the one trajectory scorer, exploration, MALA, and the actor and refiner roles.
Imports `envs` and `buffers`; `learner`, `eval` and `launch` may import it.
"""
