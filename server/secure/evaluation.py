"""An evaluation whose counts are only seen as one sum over clients."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from deal_core.aggregation import NUMERICAL
from deal_core.lora.state import State
from deal_core.models import has_label_logits
from deal_core.protection import sum_terms
from deal_core.secure_sum.messages import ProtocolError
from deal_core.secure_sum.server_round import ServerRound
from deal_core.wire.records import EXAMPLES, count_names
from deal_core.wire.secure_layout import counts_layout
from server import wire
from server.checkpoint import EVERYBODY, History
from server.evaluation import Counts, Evaluation, decoded, without_zeros
from server.exchange import answered
from server.gathering import refuse
from server.lost_sum import may_be_lost
from server.plan import Step
from server.reply_collection import Reply
from server.round_sum import Sums
from server.secure.protocol import SecureLegs

ROUNDING = 1e-3
"""Of a sum of shares of right answers."""
NO_TASK = ""
"""In the place of a task: clients that keep their counts are not counted on again."""


@dataclass(frozen=True)
class SecureEvaluation:
    """Attributes: the ``evaluation`` that it is, and the ``legs`` of the protocol."""

    evaluation: Evaluation
    legs: SecureLegs

    def run(self, step: Step, state: State, history: History) -> tuple[State, History]:
        """Ask everybody; a sum that does not come about leaves the evaluation without counts.

        Returns:
            The state as the clients decode it, and the history with the sum over clients.

        Raises:
            UserError: fewer prepared than the quorum.
        """
        started, one = time.monotonic(), self.evaluation
        exchange, experiment = one.exchange, one.exchange.experiment
        shown = without_zeros(state)
        names = count_names(has_label_logits(experiment.model))
        asked = one.request(step, shown)
        basis = sum_terms(experiment, experiment.model.name, asked, shown)
        sites = experiment.federation.clients
        layout = counts_layout(names, len(one.tasks), sites, basis)
        counts: dict[str, Counts] = {}
        with may_be_lost(exchange, "evaluation_lost", step):
            everyone = dict.fromkeys(exchange.roster.clients, NO_TASK)
            held = self.legs.open(step, everyone, layout, by_all=True)
            requests = self.legs.mask_requests(held)
            sent = exchange.ask(shown, asked, dict.fromkeys(requests, asked)).carrying(requests)
            for reply in exchange.replies(step, sent):
                held = self._heard(step, reply, held)
            history = history.after_round({"evaluation_bytes_down": sent.bytes_down})
            state = decoded(sent, shown, state)
            sums = layout.decode(self.legs.total(step, held), len(held.masked))
            counts[EVERYBODY] = _rows(sums, names, bool(experiment.data.generation))
        history = one.recorded(step, counts, True, history)
        return state, history.after("evaluate", time.monotonic() - started)

    def _heard(self, step: Step, reply: Reply, held: ServerRound) -> ServerRound:
        """The round with a client's masked counts, if it gives any."""
        exchange = self.evaluation.exchange
        try:
            return self.legs.add(held, reply.client, answered(reply))
        except wire.ClientSkipped as reason:
            self.legs.sits_out(step, reply.client, NO_TASK, reason)
        except NUMERICAL as fault:
            refuse(exchange, step, reply.client, fault)
            self.legs.note_blame(step, held, reply.client, reply.message, NO_TASK)
        return held


def _rows(sums: Sums, names: tuple[str, ...], shares: bool) -> Counts:
    """Return the counts of each task; whole numbers unless answers may be right in part.

    Raises:
        ProtocolError: counts that cannot be, which one site's can make of the sum.
    """
    columns = [sums[name] if shares else np.rint(sums[name]) for name in names]
    rows = [[float(x) if shares else int(x) for x in row] for row in zip(*columns, strict=True)]
    for row in rows:
        examples = row[names.index(EXAMPLES)]
        if any(not 0 <= count <= examples + ROUNDING for count in row):
            raise ProtocolError("a sum of counts that cannot be: some site's are false")
    return rows
