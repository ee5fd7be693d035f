"""The coordinator: rounds, tasks, aggregation, checkpoints. It never sees a text."""
