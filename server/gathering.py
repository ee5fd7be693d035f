"""The replies of a round: which of them count, and what they bring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from deal_core.aggregation import (
    NUMERICAL,
    Aggregation,
    Limits,
    Screen,
    Verdict,
    one_line,
    refuse_beyond,
)
from deal_core.config.experiment import Experiment
from deal_core.lora.payload import PayloadError
from deal_core.training.hardware import threads
from server import wire
from server.dispatch import Dispatch
from server.evaluation import Evaluation, EvaluationReplies
from server.exchange import Exchange, answered
from server.plan import Step
from server.reply_collection import Reply
from server.results import Spending

RELATIVE_BOUND = 20.0
"""Largest length of a whole update, in medians of the round's other updates (of three clients or
more); above: quarantined."""
WEIGHT_CAP = 50.0
"""Largest weight of a client in the average, in medians of the round's other weights; what is above
is cut to it."""
LARGEST_CHANGE = 100.0
"""Of an entry in a round. AdamW moves it by about its rate in a step: a thousand steps of 0.1."""


@dataclass
class RoundReplies:
    """What the replies of a round have brought, beside their updates.

    Attributes:
        sizes: bytes of each valid update, by client.
        spent: what privacy has cost, by client that says so, whether or not its update counts.
        idle: how many clients took no part.
        tally: of the evaluation that the requests carried along.
    """

    sizes: dict[str, int] = field(default_factory=dict)
    spent: dict[str, Spending] = field(default_factory=dict)
    idle: int = 0
    tally: EvaluationReplies = field(default_factory=EvaluationReplies)


@dataclass(frozen=True)
class Gathering:
    """Gives every update that may count to the aggregation, and every count to the evaluation that
    went along. A bad reply costs its sender the round, and nobody else.

    Attributes:
        piggybacked_evaluation: the step whose evaluation the requests carry; None: none.
        limits: of one client's part.
        alike: every client weighs 1.
    """

    exchange: Exchange
    evaluation: Evaluation
    step: Step
    piggybacked_evaluation: Step | None
    limits: Limits
    alike: bool

    def run(self, sent: Dispatch, aggregation: Aggregation) -> RoundReplies:
        """Take the replies as they come."""
        gathered, screen, arrived = RoundReplies(), Screen(self.limits), dict[str, int]()
        for reply in self.exchange.replies(self.step, sent):
            if self.piggybacked_evaluation is not None:
                self.evaluation.hear(self.piggybacked_evaluation, reply, sent, gathered.tally)
            if sent.instructions[reply.client].task:
                verdicts = self._hear(reply, sent, screen, gathered, arrived)
                self._admit(verdicts, aggregation, gathered, arrived)
        with threads(1):
            last = screen.judged()
        self._admit(last, aggregation, gathered, arrived)
        return gathered

    def _hear(
        self,
        reply: Reply,
        sent: Dispatch,
        screen: Screen,
        gathered: RoundReplies,
        arrived: dict[str, int],
    ) -> Sequence[Verdict]:
        """Check a reply by itself; return the updates that can be judged beside others now."""
        client = reply.client
        reader, instruction = sent.readers[client], sent.instructions[client]
        spent: Spending | None = None
        try:
            message = answered(reply)
            answer = wire.read_update_reply(message, instruction)
            spent = answer.spent
            if spent is not None:  # it is charged there, whatever is found wrong here
                gathered.spent[client] = spent
            update = answer.update(client, reader)
            if self.alike and update.weight != 1:
                raise PayloadError("num_examples is not 1, the weight of every client here")
            with threads(1):
                refuse_beyond(
                    update, reader.before, self.exchange.experiment.aggregation.norm_bound
                )
                verdicts = screen.add(update, reader.before)
        except wire.ClientSkipped as reason:
            gathered.idle += 1
            self.exchange.heard_willing(client, reason.code != wire.BY_POLICY)
            self.exchange.event("client_idle", self.step, client=client, code=reason.code)
            return ()
        except NUMERICAL as fault:
            refuse(self.exchange, self.step, client, fault, spent)
            return ()
        self.exchange.heard_willing(client, True)
        arrived[client] = wire.payload_bytes(message.content)
        self.exchange.event(
            "client_finished", self.step, client=client, task=instruction.task, **answer.figures
        )
        return verdicts

    def _admit(
        self,
        verdicts: Sequence[Verdict],
        aggregation: Aggregation,
        gathered: RoundReplies,
        arrived: dict[str, int],
    ) -> None:
        """Add who is let in; who is not is named, though its reply was in order by itself."""
        for verdict in verdicts:
            update = verdict.update
            try:
                if verdict.fault:
                    raise PayloadError(verdict.fault)
                with threads(1):
                    aggregation.add(update)
            except NUMERICAL as fault:
                refuse(self.exchange, self.step, update.client, fault)
                continue
            gathered.sizes[update.client] = arrived[update.client]
            if verdict.cut:
                self.exchange.event(
                    "weight_cut", self.step, client=update.client, weight=update.weight
                )


def refuse(
    exchange: Exchange,
    step: Step,
    client: str,
    fault: Exception,
    spent: Spending | None = None,
) -> None:
    """Log why a client's reply does not count, and what the client says that it has ``spent``."""
    reason = str(fault) if isinstance(fault, ValueError) else one_line(fault)
    told = {} if spent is None else spent.model_dump()
    exchange.event("client_failed", step, client=client, reason=reason[:400], **told)


def limits_of(experiment: Experiment) -> Limits:
    """Return what one client may do in a round."""
    return Limits(RELATIVE_BOUND, WEIGHT_CAP, LARGEST_CHANGE)
