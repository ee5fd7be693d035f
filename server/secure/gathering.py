"""The replies of a round whose updates are only seen as one sum."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from deal_core.aggregation import NUMERICAL
from deal_core.secure_sum.server_round import ServerRound
from server import wire
from server.dispatch import Dispatch
from server.evaluation import Evaluation, EvaluationReplies
from server.exchange import Exchange, answered
from server.gathering import refuse
from server.reply_collection import Reply
from server.schedule import Step
from server.secure.legs import SecureLegs
from server.spending import Spending


@dataclass(frozen=True)
class MaskedReplies:
    """What the replies of a round have brought.

    Attributes:
        held: the secure sum with their masked vectors.
        sizes: bytes of each valid reply.
        spent: what privacy has cost, by client that says so.
        idle: how many clients took no part.
        hindered: how many could not, by what another site sent.
        tally: of the evaluation that the requests carried along.
    """

    held: ServerRound
    sizes: dict[str, int] = field(default_factory=dict)
    spent: dict[str, Spending] = field(default_factory=dict)
    idle: int = 0
    hindered: int = 0
    tally: EvaluationReplies = field(default_factory=EvaluationReplies)


@dataclass(frozen=True)
class SecureGathering:
    """Takes the masked vector of every reply that may count. A bad one costs its sender the round.

    Attributes:
        piggybacked_evaluation: the step whose evaluation the requests carry; None: none.
    """

    exchange: Exchange
    evaluation: Evaluation
    legs: SecureLegs
    step: Step
    piggybacked_evaluation: Step | None

    def run(self, sent: Dispatch, held: ServerRound) -> MaskedReplies:
        """Take the replies as they come."""
        gathered = MaskedReplies(held)
        for reply in self.exchange.replies(self.step, sent):
            if self.piggybacked_evaluation is not None:
                self.evaluation.hear(self.piggybacked_evaluation, reply, sent, gathered.tally)
            if sent.instructions[reply.client].task:
                gathered = self._heard(reply, sent, gathered)
        return gathered

    def _heard(self, reply: Reply, sent: Dispatch, gathered: MaskedReplies) -> MaskedReplies:
        client, instruction = reply.client, sent.instructions[reply.client]
        spent: Spending | None = None
        try:
            message = answered(reply)
            figures, spent = wire.read_figures(message, instruction)
            if spent is not None:  # it is charged there, whatever is found wrong here
                gathered.spent[client] = spent
            held = self.legs.add(gathered.held, client, message)
        except wire.ClientSkipped as reason:
            self.legs.sits_out(self.step, client, instruction.task, reason)
            self.exchange.heard_willing(client, reason.code != wire.BY_POLICY)
            return replace(gathered, idle=gathered.idle + 1)
        except NUMERICAL as fault:
            refuse(self.exchange, self.step, client, fault, spent)
            held, task = gathered.held, instruction.task
            hindered = self.legs.note_blame(self.step, held, client, reply.message, task)
            return replace(gathered, hindered=gathered.hindered + hindered)
        self.exchange.heard_willing(client, True)
        gathered.sizes[client] = wire.secure_bytes(message.content)
        self.exchange.event(
            "client_finished", self.step, client=client, task=instruction.task, **figures
        )
        return replace(gathered, held=held)
