"""Where a run's clients compute: in process, in worker processes, or under Flower's runtime."""
