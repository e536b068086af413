"""What `driftstream new` writes: working plug-ins, to be changed."""
