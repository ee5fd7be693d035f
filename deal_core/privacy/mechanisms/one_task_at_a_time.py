"""What every mechanism needs of an experiment: a round reads one task."""

from __future__ import annotations

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError


def check_one_task_at_a_time(experiment: Experiment) -> None:
    """Check that the stages of a run are of one task each: a charge names the task that was read.

    Raises:
        UserError: all tasks are learnt at once.
    """
    if experiment.stream.schedule == "joint":
        raise UserError(
            f'privacy.mechanism = "{experiment.privacy.mechanism}" does not go with '
            'stream.schedule = "joint": set it to "synchronous" or "per-client"'
        )
