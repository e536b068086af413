"""How good it is.

Estimators of log Z, distances, mode coverage, the evaluator role, plots, and the monitor (JSONL and W&B).
Imports every folder but `launch`; only `launch` may import it.
"""
