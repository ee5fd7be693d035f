"""The requests of a round: what each client is sent, and what the server goes on from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flwr.app import ArrayRecord, Message, MessageType

from deal_core.aggregation import starting_adapter
from deal_core.config.experiment import Experiment
from deal_core.lora.state import State
from deal_core.randomness import seeded
from deal_core.wire.adapter_record import UpdateReader
from deal_core.wire.instruction import Instruction
from server import wire


@dataclass(frozen=True)
class Dispatch:
    """Requests ready to be sent.

    Attributes:
        requests: client name to message, of those who are connected.
        instructions: client name to what it is asked (its own rank in it).
        readers: client name to what reads its update, and knows the current adapter as that
            client decodes it.
        state: the server's state as a client of full rank decodes it.
        records: that state as it travels.
    """

    requests: dict[str, Message]
    instructions: dict[str, Instruction]
    readers: dict[str, UpdateReader]
    state: State
    records: dict[str, ArrayRecord]

    def again(
        self, nodes: dict[str, int], instructions: dict[str, Instruction], deadline: float
    ) -> Dispatch:
        """Ask something else of clients of full rank, with the same state to the byte.

        Args:
            nodes: client name to node id, of those who are connected.
            instructions: for whom is asked.
            deadline: seconds.
        """
        requests = {
            name: wire.request(self.records, asked, nodes[name], kind_of(asked), deadline)
            for name, asked in instructions.items()
            if name in nodes
        }
        return replace(self, requests=requests, instructions=instructions)


def dispatch(
    experiment: Experiment,
    nodes: dict[str, int],
    state: State,
    common: Instruction,
    instructions: dict[str, Instruction],
) -> Dispatch:
    """Pack the state once for every rank that is needed, and address it to each client.

    Args:
        experiment: of the run.
        nodes: client name to node id, of those who are connected.
        state: what all are sent.
        common: what is the same for all, of one round.
        instructions: for whom is asked; each with the client's own rank.
    """
    dtype = experiment.wire.dtype
    ranks = {name: instruction.rank for name, instruction in instructions.items()}
    kinds = {name: kind_of(instruction) for name, instruction in instructions.items()}
    trains = MessageType.TRAIN in kinds.values()
    kind = MessageType.TRAIN if trains else MessageType.EVALUATE
    where = (experiment.run.seed, "downlink", kind, common.stage, common.server_round)
    full = wire.outgoing(state, dtype, seeded(*where))
    sent = {state.current.rank: full}
    for rank in sorted(set(ranks.values()) - sent.keys()):
        scaling = experiment.adapter.lora_alpha / rank
        current = starting_adapter(full.state.current, rank, scaling)
        own = replace(state, current=current)
        sent[rank] = wire.outgoing(own, dtype, seeded(*where))
    deadline = experiment.federation.deadline_seconds
    requests = {
        name: wire.request(
            sent[ranks[name]].records, instruction, nodes[name], kinds[name], deadline
        )
        for name, instruction in instructions.items()
        if name in nodes
    }
    trained = frozenset(common.trained)
    by_rank = {rank: UpdateReader(o.state.current, dtype, trained) for rank, o in sent.items()}
    readers = {name: by_rank[rank] for name, rank in ranks.items()}
    return Dispatch(requests, instructions, readers, full.state, full.records)


def kind_of(instruction: Instruction) -> str:
    """Flower's type of the message that carries it: who has no task is asked to evaluate."""
    return MessageType.TRAIN if instruction.task else MessageType.EVALUATE
