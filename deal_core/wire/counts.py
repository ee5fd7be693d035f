"""Names of the counts that a client takes on its test records, a number a task each."""

from __future__ import annotations

CORRECT = "correct"
"""Right answers among the labels of the task."""
EXAMPLES = "examples"
"""Test records."""
CORRECT_ALL = "correct_all"
"""Right answers among the labels of all tasks learnt so far, and the task's own."""


def count_names(all_labels: bool) -> tuple[str, ...]:
    """Return the counts of an evaluation.

    Args:
        all_labels: whether the model scores the labels of all tasks in one pass.
    """
    return (CORRECT, EXAMPLES, CORRECT_ALL) if all_labels else (CORRECT, EXAMPLES)
