"""Public benchmarks as folders of tasks and an experiment file; nothing that trains."""
