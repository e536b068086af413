"""How it runs.

The command line, configuration and presets, the run directory, the supervisor and the start of every role.
Imports every other folder; nothing imports it.
"""
