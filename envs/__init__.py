"""What is sampled, and the sampling MDP.

Targets (unnormalised densities), time grids, diffusion processes, the trajectory schema and the TorchRL
environment. Imports nothing else of driftstream; every other folder may import it.
"""
