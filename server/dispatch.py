"""What each client is asked in a round, and the messages that carry it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from flwr.app import ConfigRecord, Message, MessageType

from deal_core.aggregation import starting_adapter
from deal_core.config.experiment import Experiment
from deal_core.lora.payload import DISTILLED, LORA
from deal_core.lora.state import State
from deal_core.methods import method_of, statistics_of
from deal_core.randomness import seeded
from deal_core.wire.adapter_record import UpdateReader, pack, unpack
from deal_core.wire.instruction import Instruction
from deal_core.wire.records import SECURE
from server import wire
from server.plan import Plan, Step
from server.wire import Outgoing


def training_requests(
    plan: Plan,
    step: Step,
    clients: Mapping[str, str],
    tasks: tuple[str, ...],
    common: Instruction,
) -> dict[str, Instruction]:
    """Return the instruction of each client that trains.

    Args:
        plan: of the run.
        step: the round.
        clients: client name to its task.
        tasks: of several that are worked on at once; else none.
        common: what is the same for all.
    """
    met, future = plan.met(step.stage, step.server_round), plan.future(step.stage)
    return {
        name: common.model_copy(
            update={
                "task": task,
                "tasks": tasks,
                "seen": tuple(other for other in met if other != task),
                "future": future,
                "past": plan.past(name, step.stage, step.server_round),
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


@dataclass(frozen=True)
class Dispatch:
    """Requests ready to be sent.

    Attributes:
        requests: client name to message, of those who are connected.
        instructions: client name to what it is asked (its own rank in it).
        readers: client name to what reads its update, and knows the current adapter as that
            client decodes it.
        state: the server's state as a client of full rank decodes it.
        nodes: client name to node id.
        sent: rank of the current adapter to the state on its way.
        deadline: seconds.
        resent: messages to clients that turned out to lack the retained adapter.
        secure: client name to the record of a secure sum that its request carries.
    """

    requests: dict[str, Message]
    instructions: dict[str, Instruction]
    readers: dict[str, UpdateReader]
    state: State
    nodes: dict[str, int]
    sent: dict[int, Outgoing]
    deadline: float
    resent: list[Message] = field(default_factory=list)
    secure: Mapping[str, ConfigRecord] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Of the retained adapter that all are asked with."""
        return self.sent[self.state.current.rank].digest

    @property
    def bytes_down(self) -> float:
        """What a client is sent, mean over the clients that are asked."""
        messages = (*self.requests.values(), *self.resent)
        sizes = [wire.payload_bytes(message.content) for message in messages]
        return sum(sizes) / max(1, len(self.requests))

    def whole(self, name: str, deadline: float) -> Message:
        """Return the request to a client with everything in it, valid for so many seconds."""
        message = _request(self.sent, self.instructions[name], self.nodes[name], deadline)
        if name in self.secure:
            message.content[SECURE] = self.secure[name]
        return message

    def carrying(self, secure: Mapping[str, ConfigRecord]) -> Dispatch:
        """Return the requests with the record of a secure sum in each that has one."""
        for name in secure.keys() & self.requests.keys():
            self.requests[name].content[SECURE] = secure[name]
        return replace(self, secure=secure)

    def again(
        self,
        nodes: dict[str, int],
        instructions: dict[str, Instruction],
        holding: Mapping[str, str],
    ) -> Dispatch:
        """Return requests that ask something else of clients of full rank, with the same state to
        the byte.

        Args:
            nodes: client name to node id, of those who are connected.
            instructions: for whom is asked.
            holding: client name to the digest of the retained adapter that it has.
        """
        return _dispatch(self, nodes, instructions, holding)


def dispatch(
    experiment: Experiment,
    nodes: dict[str, int],
    state: State,
    common: Instruction,
    instructions: dict[str, Instruction],
    holding: Mapping[str, str],
) -> Dispatch:
    """Pack the state once for every rank that is needed, and address it to each client.

    Args:
        experiment: of the run.
        nodes: client name to node id, of those who are connected.
        state: what all are sent.
        common: what is the same for all, of one round.
        instructions: for whom is asked; each with the client's own rank.
        holding: client name to the digest of the retained adapter that it has, and is not sent.

    Returns:
        The requests, ready to be sent, and the state that the server goes on from.
    """
    dtype = experiment.wire.dtype
    ranks = {name: instruction.rank for name, instruction in instructions.items()}
    trains = MessageType.TRAIN in map(kind_of, instructions.values())
    kind = MessageType.TRAIN if trains else MessageType.EVALUATE
    where = (experiment.run.seed, "downlink", kind, common.stage, common.server_round)
    statistics = statistics_of(method_of(experiment)) if state.heads else None
    round_heads = statistics is not None and statistics.rounds(dtype)
    full = wire.outgoing(state, dtype, seeded(*where), round_heads)
    sent = {state.current.rank: full}
    for rank in sorted(set(ranks.values()) - sent.keys()):
        scaling = experiment.adapter.lora_alpha / rank
        current = starting_adapter(full.state.current, rank, scaling)
        encoded = pack(current, dtype, seeded(*where))
        own = replace(full.state, current=unpack(encoded, dtype, current))
        sent[rank] = replace(
            full, records={**full.records, LORA: wire.as_record(encoded)}, state=own
        )
    trained = frozenset(common.trained)
    by_rank = {rank: UpdateReader(o.state.current, dtype, trained) for rank, o in sent.items()}
    readers = {name: by_rank[rank] for name, rank in ranks.items()}
    deadline = experiment.federation.deadline_seconds
    blank = Dispatch({}, {}, readers, full.state, {}, sent, deadline)
    return _dispatch(blank, nodes, instructions, holding)


def _dispatch(
    common: Dispatch,
    nodes: dict[str, int],
    instructions: dict[str, Instruction],
    holding: Mapping[str, str],
) -> Dispatch:
    """The requests for these instructions; what a client has is left out."""
    full = common.sent[common.state.current.rank]
    asked = {name: full.named_in(each) for name, each in instructions.items()}
    requests = {
        name: _request(
            common.sent,
            instruction,
            nodes[name],
            common.deadline,
            leave_out={DISTILLED} if holding.get(name) == common.digest else frozenset(),
        )
        for name, instruction in asked.items()
        if name in nodes
    }
    return replace(common, requests=requests, instructions=asked, nodes=nodes, resent=[])


def _request(
    sent: Mapping[int, Outgoing],
    instruction: Instruction,
    node: int,
    deadline: float,
    leave_out: Set[str] = frozenset(),
) -> Message:
    records = sent[instruction.rank].records
    kept = {name: record for name, record in records.items() if name not in leave_out}
    return wire.request(kept, instruction, node, kind_of(instruction), deadline)


def kind_of(instruction: Instruction) -> str:
    """Flower's type of the message that carries it: who has no task is asked to evaluate."""
    return MessageType.TRAIN if instruction.task else MessageType.EVALUATE
