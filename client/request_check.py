"""What a request may ask of a client, decided from the request and the experiment alone.

Nothing here reads data: a request is refused, or not, whatever records a client has. What data are
read, and which mechanism protects them, follows from what has passed here.
"""

from __future__ import annotations

from client.resources import Workbench
from deal_core.lora.payload import PayloadError
from deal_core.privacy.policy import Policy, Refusal
from deal_core.wire.instruction import Instruction


def check_tasks(instruction: Instruction, bench: Workbench) -> None:
    """Check the tasks that a request names.

    Raises:
        PayloadError: one is not of the run.
    """
    known = frozenset(bench.tasks)
    named = (
        *instruction.tasks,
        *instruction.seen,
        *instruction.future,
        *instruction.past,
        *instruction.piggybacked_evaluation,
        *instruction.learnt,
    )
    own = (instruction.task,) if instruction.task else ()
    for task in (*own, *named):
        if task not in known:
            raise PayloadError("instruction: a task that is not of this run")


def check_training(instruction: Instruction, bench: Workbench, policy: Policy | None) -> None:
    """Check what a training request asks for.

    Raises:
        PayloadError: a task that is not of the run; several to be learnt at once where the
            experiment learns them one by one, or has a mechanism.
        Refusal: a larger rank than the site's policy allows.
    """
    check_tasks(instruction, bench)
    if policy is not None and instruction.rank > policy.max_rank:
        raise Refusal("policy", "instruction: a larger rank than the site's policy allows")
    if not instruction.tasks:
        return
    schedule, phase = bench.experiment.stream.schedule, bench.phase(instruction.phase)
    several = schedule == "joint" or (schedule == "per-client" and phase.statistics is not None)
    if not several:
        raise PayloadError("instruction: tasks are learnt one by one in this run")
    if bench.experiment.privacy.mechanism != "none":
        raise PayloadError("instruction: under a mechanism tasks are learnt one by one")
    if phase.statistics is not None:
        if instruction.task not in instruction.tasks:
            raise PayloadError("instruction: not a task of those that are added up")
    elif set(instruction.tasks) != set(bench.tasks) or instruction.task != instruction.tasks[0]:
        raise PayloadError("instruction: not the tasks of this run")
