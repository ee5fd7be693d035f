"""The requests of a round: what each client is sent, and what the server goes on from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from flwr.app import Message

from deal_core.aggregation import starting_adapter
from deal_core.config import Experiment
from deal_core.instruction import Instruction
from deal_core.methods import State
from deal_core.randomness import seeded
from deal_core.record import UpdateReader
from server import wire


@dataclass(frozen=True)
class Dispatch:
    """Requests ready to be sent.

    Attributes:
        requests: client name to message.
        instructions: client name to what it is asked (its own rank in it).
        readers: client name to what reads its update, and knows the current adapter as that
            client decodes it.
        state: the server's state as a client of full rank decodes it.
    """

    requests: dict[str, Message]
    instructions: dict[str, Instruction]
    readers: dict[str, UpdateReader]
    state: State


def dispatch(
    experiment: Experiment,
    nodes: dict[str, int],
    chosen: Sequence[str],
    ranks: dict[str, int],
    state: State,
    instruction: Instruction,
    message_type: str,
) -> Dispatch:
    """Pack the state once for every rank that is needed, and address it to each client."""
    dtype = experiment.wire.dtype
    place = (instruction.task_index, instruction.server_round)
    where = (experiment.run.seed, "downlink", message_type, *place)
    full = wire.outgoing(state, dtype, seeded(*where))
    sent = {state.current.rank: full}
    for rank in sorted(set(ranks.values()) - sent.keys()):
        scaling = experiment.adapter.lora_alpha / rank
        current = starting_adapter(full.state.current, rank, scaling)
        own = replace(state, current=current)
        sent[rank] = wire.outgoing(own, dtype, seeded(*where))
    instructions = {name: instruction.model_copy(update={"rank": ranks[name]}) for name in chosen}
    deadline = experiment.federation.deadline_seconds
    requests = {
        name: wire.request(
            sent[ranks[name]].records, instructions[name], nodes[name], message_type, deadline
        )
        for name in chosen
    }
    trained = frozenset(instruction.trained)
    by_rank = {rank: UpdateReader(o.state.current, dtype, trained) for rank, o in sent.items()}
    readers = {name: by_rank[ranks[name]] for name in chosen}
    return Dispatch(requests, instructions, readers, full.state)
