"""What keeps a long run going: verified checkpoints, heartbeats, restart accounting, preflight and status.

Everything here works from files and the standard library alone, so that a login node or a batch script can use it
without importing torch. The exceptions are the preflight's checks of GPUs and of the all-reduce, which run on the nodes
with the interpreter of the ranks and import torch when they run.
"""
