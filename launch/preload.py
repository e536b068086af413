"""What the fork server imports for all roles, as fast as may be.

A module of its own because a fork server takes names of modules, and imports each as it is.
"""

import gc

# Imports make many objects that stay: to look through them again and again is a fifth of an import's time. Frozen,
# they are never looked at again, and the pages that they are on stay shared with every child.
gc.disable()

import driftstream.launch.configure  # noqa: E402
import driftstream.launch.roles  # noqa: E402, F401

gc.freeze()
gc.enable()
