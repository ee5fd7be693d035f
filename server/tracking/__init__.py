"""Trackers that follow a run beside its own log; a tracker is a file and a line in ``TRACKERS``."""
