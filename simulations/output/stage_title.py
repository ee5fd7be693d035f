"""What a stage is called where results are shown."""

from __future__ import annotations

from collections.abc import Sequence

from deal_core.metrics import in_turn


def stage_title(stage: int, tasks: Sequence[str], stages: Sequence[Sequence[str]]) -> str:
    """Return ``2 skin``, the stage's task, where tasks come in turn; else ``stage 2: 1 heart, 3
    eye``, or ``all tasks at once``.

    Args:
        stage: from 0.
        tasks: of the run.
        stages: the tasks of each.
    """
    if [list(work) for work in stages] == [list(tasks)] and len(tasks) > 1:
        return "all tasks at once"
    worked = ", ".join(f"{tasks.index(task) + 1} {task}" for task in stages[stage])
    return worked if in_turn(tasks, stages) else f"stage {stage + 1}: {worked}"
