"""Questions to the clients and their answers, whatever is asked."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.serverapp import Grid

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from deal_core.lora.payload import PayloadError
from deal_core.lora.state import State
from deal_core.training.hardware import threads
from deal_core.wire.instruction import Instruction
from server import wire
from server.dispatch import Dispatch, dispatch
from server.folder import EventLog
from server.plan import Step
from server.reply_collection import Reply, collect
from server.roster import Roster


@dataclass(frozen=True)
class Exchange:
    """Between the server and the clients of a run.

    Attributes:
        roster: the clients of the run.
        holding: client name to the digest of the retained adapter that it has, as far as this
            process knows: who is not in it is sent the adapter.
        unwilling: clients whose policy refused the experiment when they were asked last, as far as
            this process knows.
    """

    grid: Grid
    experiment: Experiment
    roster: Roster
    events: EventLog
    holding: dict[str, str] = field(default_factory=dict)
    unwilling: set[str] = field(default_factory=set)

    def instruction(self, step: Step, state: State) -> Instruction:
        """What is the same for all clients."""
        return Instruction(
            task="",
            stage=step.stage,
            server_round=step.server_round,
            phase=step.phase,
            rank=state.current.rank,
            retained_rank=state.retained.rank,
            residual_rank=state.residual.rank if state.residual is not None else 0,
            num_reference_directions=state.num_reference_directions,
        )

    def ask(
        self,
        state: State,
        common: Instruction,
        instructions: dict[str, Instruction],
        share: float = 1.0,
    ) -> Dispatch:
        """Requests to those who are connected, once a ``share`` of them is, or patience ends."""
        nodes = self.roster.present(set(instructions), share * len(instructions))
        with threads(1):
            return dispatch(self.experiment, nodes, state, common, instructions, self.holding)

    def ask_again(self, sent: Dispatch, instructions: dict[str, Instruction]) -> Dispatch:
        """Something else about the very state that was ``sent``, to clients of full rank."""
        nodes = self.roster.present(set(instructions), len(instructions))
        return sent.again(nodes, instructions, self.holding)

    def replies(self, step: Step, sent: Dispatch) -> Iterator[Reply]:
        """Yield one reply per client, the absent first; whatever comes beyond that is named in the
        log and dropped."""
        for name in sent.instructions:
            if name not in sent.requests:
                yield Reply(name, None, "not connected")
        for reply in self._collected(step, sent):
            if reply.dropped:
                self.event("reply_dropped", step, client=reply.client, reason=reply.fault)
            else:
                yield reply

    def _collected(self, step: Step, sent: Dispatch) -> Iterator[Reply]:
        """The replies as they come; who lacks the retained adapter is sent it, once, and has the
        rest of the time.

        Yields:
            One reply per client that was asked, and what comes beyond that.
        """
        started, lacking = time.monotonic(), list[str]()
        for reply in collect(self.grid, sent.requests, sent.deadline):
            holds = wire.holds_distilled(reply.message)
            if holds:
                self.holding[reply.client] = sent.digest
            elif not reply.dropped:
                self.holding.pop(reply.client, None)
            if holds is False and not reply.dropped:
                self.event("resent", step, client=reply.client)
                lacking.append(reply.client)
            else:
                yield reply
        left = sent.deadline - (time.monotonic() - started)
        if left <= 0:  # whoever trained now would be charged for what nobody takes
            yield from (Reply(name, None, "no time left to send it again") for name in lacking)
        elif lacking:
            again = {name: sent.whole(name, left) for name in lacking}
            sent.resent.extend(again.values())
            for reply in collect(self.grid, again, left):
                if wire.holds_distilled(reply.message):
                    self.holding[reply.client] = sent.digest
                yield reply

    def require_quorum(self, valid: int, asked: int, step: Step) -> None:
        """Check that enough of those who were ``asked`` gave a valid reply.

        Raises:
            UserError: too few did.
        """
        needed = self.experiment.federation.quorum * asked
        if valid < needed:
            raise UserError(
                f"{step.kind} {step.server_round} of stage {step.stage}: {valid} of {asked} "
                f"clients gave a valid reply, the quorum is {needed:g}; the checkpoint before it "
                "stands, continue with --resume (metrics.jsonl has the reasons)"
            )

    def heard_willing(self, client: str, willing: bool) -> None:
        """Note what a client's policy has said of the experiment."""
        (self.unwilling.discard if willing else self.unwilling.add)(client)

    def require_willing(self, learners: frozenset[str], step: Step) -> None:
        """Check that the policy of some client allows what the experiment asks: where none does,
        every round would end so. A few that are asked in one round are not all of them.

        Args:
            learners: all that train in the run.
            step: which round it is.

        Raises:
            UserError: all refuse.
        """
        if learners and learners <= self.unwilling:
            raise UserError(
                f"{step.kind} {step.server_round} of stage {step.stage}: all clients that train "
                f"({len(learners)}) refuse the experiment by their policy; deal site check "
                "--experiment FILE tells each why; the checkpoint before it stands, continue with "
                "--resume"
            )

    def event(self, event: str, step: Step, **fields: object) -> None:
        """Log what happened in a step."""
        where = {"round": step.round, "stage": step.stage, "phase": step.phase}
        self.events.write(event, **where, server_round=step.server_round, **fields)


def answered(reply: Reply) -> Message:
    """Return the message of a reply.

    Raises:
        PayloadError: there is none; the reason.
    """
    if reply.message is None:
        raise PayloadError(reply.fault)
    return reply.message
