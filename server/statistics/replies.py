"""Rounds of statistics: which clients' sums count, and what they add up to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from deal_core.aggregation import NUMERICAL
from deal_core.lora.payload import PayloadError
from deal_core.methods import Statistics, SumsOnWire, Tensors
from deal_core.training.threads import threads
from deal_core.wire.instruction import Instruction
from server import wire
from server.dispatch import Dispatch
from server.evaluation import Evaluation, EvaluationReplies
from server.exchange import Exchange, answered
from server.gathering import refuse
from server.reply_collection import LATE, Reply
from server.schedule import Step


@dataclass
class SumsReplies:
    """What the replies of a round have brought.

    Attributes:
        sums: task to client to its sums, of the valid replies.
        examples: number of each valid client's records, as it says.
        sizes: bytes of each valid reply.
        without_data: clients that have no record of their task.
        idle: clients that took no part, these among them.
        late: clients that were silent until the deadline.
        tally: of the evaluation that the requests carried along.
    """

    sums: dict[str, dict[str, Tensors]] = field(default_factory=dict)
    examples: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    without_data: list[str] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    tally: EvaluationReplies = field(default_factory=EvaluationReplies)


@dataclass(frozen=True)
class SumsGathering:
    """Checks the replies of a round of statistics. A bad one costs its sender the round, and nobody
    else.

    Attributes:
        piggybacked_evaluation: the step whose evaluation the requests carry; None: none.
        labels: task to the number of its labels.
        size: entries of an embedding.
    """

    exchange: Exchange
    evaluation: Evaluation
    step: Step
    piggybacked_evaluation: Step | None
    statistics: Statistics
    labels: Mapping[str, int]
    size: int

    def run(self, sent: Dispatch) -> SumsReplies:
        """Return what the replies bring, as they come; what was lost is asked for once more."""
        gathered = SumsReplies()
        self._take(sent, gathered, self.piggybacked_evaluation)
        again = self._lost(sent, gathered)
        if again is not None:
            sent.resent.extend(again.requests.values())
            self._take(again, gathered, None)
        return gathered

    def _lost(self, sent: Dispatch, gathered: SumsReplies) -> Dispatch | None:
        """Return requests to those who were there and not silent, and whose sums have not come;
        None where there is nobody. Sums of every round are lost with it."""
        came = {*gathered.sizes, *gathered.idle, *gathered.late}
        lost = {
            name: sent.instructions[name].model_copy(
                update={"piggybacked_evaluation": (), "learnt": ()}
            )
            for name in sent.requests
            if sent.instructions[name].task and name not in came
        }
        if not self.statistics.once or not lost:
            return None
        for name in lost:
            self.exchange.event("asked_again", self.step, client=name)
        return self.exchange.ask_again(sent, lost)

    def _take(self, sent: Dispatch, gathered: SumsReplies, counting: Step | None) -> None:
        for reply in self.exchange.replies(self.step, sent):
            instruction = sent.instructions[reply.client]
            if counting is not None:
                self.evaluation.hear(counting, reply, sent, gathered.tally)
            if instruction.task:
                self._hear(reply, instruction, gathered)

    def _hear(self, reply: Reply, instruction: Instruction, gathered: SumsReplies) -> None:
        client, tasks = reply.client, instruction.tasks or (instruction.task,)
        try:
            message = answered(reply)
            form = self.statistics.at(self.exchange.experiment.wire.dtype)
            shapes = [form.shapes(self.labels[task], self.size) for task in tasks]
            sent, figures = wire.read_statistics(message, shapes, form.codes, instruction)
            with threads(1):
                parts = [_checked(part, form, len(sent)) for part in sent]
            if not any(bool(part["count"].any()) for part in parts):
                raise PayloadError("sums of no record")
        except wire.ClientSkipped as reason:
            gathered.idle.append(client)
            if reason.code == "no-data":
                gathered.without_data.append(client)
            self.exchange.event("client_idle", self.step, client=client, code=reason.code)
        except NUMERICAL as fault:
            if reply.fault == LATE:
                gathered.late.append(client)
            refuse(self.exchange, self.step, client, fault)
        else:
            for task, part in zip(tasks, parts, strict=True):
                if float(part["count"].sum()):
                    gathered.sums.setdefault(task, {})[client] = part
            gathered.examples[client] = sum(float(part["count"].sum()) for part in parts)
            gathered.sizes[client] = wire.payload_bytes(message.content)
            self.exchange.event(
                "client_finished", self.step, client=client, task=instruction.task, **figures
            )


def _checked(part: Tensors, form: SumsOnWire, parts: int) -> Tensors:
    """Return the sums of a task; of several tasks a client may have no record of some."""
    empty = parts > 1 and not any(bool(value.any()) for value in part.values())
    if not empty:
        form.check(part)
    return form.unpack(part)


def weights(
    examples: Mapping[str, float], weight_cap: float, earlier: Sequence[float] = ()
) -> dict[str, float]:
    """Return client to the factor of its sums: 1, or less where it has more records than
    ``weight_cap`` medians of the others.

    Args:
        examples: client to the number of its records, as it says.
        weight_cap: 0: there is none.
        earlier: records of those who gave their sums before, who are others too.
    """
    found = {}
    for client, own in examples.items():
        others = [*earlier, *(n for name, n in examples.items() if name != client)]
        capped = weight_cap and others
        found[client] = min(1.0, weight_cap * median(others) / own) if capped else 1.0
    return found


def totals(
    gathered: SumsReplies, clients: Sequence[str], factors: Mapping[str, float]
) -> dict[str, Tensors]:
    """Return task to the sums over clients, added in the order of ``clients``, so that no last bit
    depends on who was first.

    Args:
        gathered: the valid replies.
        clients: all of the run.
        factors: client to that of its sums.
    """
    added: dict[str, Tensors] = {}
    for task, own in gathered.sums.items():
        for client in clients:
            for name, value in own.get(client, {}).items():
                part = value if factors[client] == 1.0 else factors[client] * value
                total = added.setdefault(task, {})
                total[name] = total[name] + part if name in total else part
    return added
