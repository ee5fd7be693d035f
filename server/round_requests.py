"""What each client is asked in a round: its own task, and what it may know of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deal_core.wire.instruction import Instruction
from server.plan import Plan
from server.schedule import Step


def training_requests(
    plan: Plan,
    step: Step,
    clients: Mapping[str, str],
    tasks: tuple[str, ...],
    common: Instruction,
    roster: Sequence[str],
    ranks: Sequence[int],
) -> dict[str, Instruction]:
    """Return the instruction of each client that trains.

    Args:
        plan: of the run.
        step: the round.
        clients: client name to its task.
        tasks: of several that are worked on at once; else none.
        common: what is the same for all.
        roster: all clients of the run, in their order.
        ranks: of the adapters that clients train, which take turns along the roster; empty: that
            of ``common``.
    """
    met, future = plan.met(step.stage, step.server_round), plan.future(step.stage)
    own = ranks or (common.rank,)
    rank_of = {name: own[number % len(own)] for number, name in enumerate(roster)}
    return {
        name: common.model_copy(
            update={
                "task": task,
                "tasks": tasks,
                "seen": tuple(other for other in met if other != task),
                "future": future,
                "past": plan.past(name, step.stage, step.server_round),
                "rank": rank_of[name],
            }
        )
        for name, task in clients.items()
    }


def carrying(
    counting: Instruction, requests: Mapping[str, Instruction], roster: Sequence[str]
) -> dict[str, Instruction]:
    """Return instructions by which everybody is asked for counts as well: who trains the model as
    it is, beside that; the others alone.

    Args:
        counting: the evaluation request.
        requests: of the clients that train.
        roster: all clients of the run.
    """
    asked = dict.fromkeys(roster, counting)
    for name, instruction in requests.items():
        tasks = counting.tasks if instruction.rank == counting.rank else ()
        learnt = counting.learnt if tasks else ()
        asked[name] = instruction.model_copy(
            update={"piggybacked_evaluation": tasks, "learnt": learnt}
        )
    return asked
