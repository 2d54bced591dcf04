"""What keeps a long run going: verified checkpoints, heartbeats, restart accounting, preflight and status.

Everything here works from files and the standard library alone, so that a login node or a batch script can use it
without importing torch. The one exception is the all-reduce check of `preflight`, which imports torch when it runs.
"""
