"""What a round adds up: single updates, or one sum under masks, of updates or over records. A round
asks and listens (:mod:`server.strategy`); a summation says whom to ask, what a reply adds, and what
follows."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from flwr.app import ConfigRecord, Message

from deal_core.aggregation.rule import (
    NUMERICAL,
    Aggregate,
    Aggregation,
    ClientUpdate,
    Rule,
    finished,
)
from deal_core.aggregation.screen import Screen, Verdict
from deal_core.config.experiment import Experiment, at_server
from deal_core.lora.adapter import compress, stack
from deal_core.lora.payload import LORA, PayloadError
from deal_core.lora.state import State, changed
from deal_core.privacy.distributed_noise import grid_step
from deal_core.protection import sum_deviation, sum_terms
from deal_core.secure_sum.layout import Layout
from deal_core.secure_sum.server_round import ServerRound
from deal_core.training.hardware import threads
from deal_core.wire.instruction import Instruction
from deal_core.wire.records import SECURE
from deal_core.wire.secure_layout import EXAMPLES, layout_of, mean_loss, without_loss
from deal_core.wire.tensors import unpack
from server import wire
from server.clients import Clients, Sent
from server.plan import Step
from server.results import Spending
from server.secure_aggregation import SecureAggregation, Sums

NOISE_PER_EXAMPLE = 1.8e-2
"""Of a step at the server: noise of the mean gradient, in clipping bounds, times the learning rate,
at most; where there is more noise the rate is lowered."""


@dataclass(kw_only=True)
class Summation:
    """What one round adds up."""

    record: ClassVar[str]
    """Name of the record of a reply that is added."""
    clients: Clients
    step: Step
    asked: Mapping[str, str]
    """Client name to its task, of those to ask."""
    tasks: tuple[str, ...] = ()
    """Of several that are worked on at once; else none."""
    trained: frozenset[str] = frozenset()
    """Factors that learn; none where nothing is trained."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of each valid reply, by client."""
    spent: dict[str, Spending] = field(default_factory=dict)
    """What privacy has cost, by client that says so, whether or not its update counts."""
    idle: int = 0
    """Clients that took no part."""
    hindered: int = 0
    """Clients that could not, by what another site sent."""
    sent: Sent = field(init=False)
    """The requests of the round."""
    started: float = field(default_factory=time.monotonic)
    secure_requests: Mapping[str, ConfigRecord] | None = None
    """Who takes part in a secure sum, each to the record of it that its request carries."""

    def open(self, state: State, shown: State, instructions: Mapping[str, Instruction]) -> Sent:
        """Return the requests of a round from ``state``, of which clients are ``shown`` a part.

        Raises:
            ProtocolError: the round cannot begin.
            UserError: fewer than the quorum take part.
        """
        share = self.clients.experiment.federation.quorum
        self.sent = self.clients.ask(self.step, shown, instructions, share, self.secure_requests)
        return self.sent

    def hear(self, reply: wire.Reply) -> None:
        """Take a reply; a bad one costs its sender the round."""
        client, clients, step, spent = reply.client, self.clients, self.step, None
        instruction = self.sent.instructions[client]
        try:
            message = reply.answered()
            figures, spent = wire.read_figures(message, instruction, self.record)
            if spent is not None:  # charged at the client, even if its update is refused here
                self.spent[client] = spent
            self.add(client, message, figures["num_examples"])
        except wire.ClientSkipped as reason:
            self.idle += 1
            clients.refuses[client] = reason.code == wire.BY_POLICY
            self.skipped(client, reason)
        except NUMERICAL as fault:
            clients.record_fault(client, step, fault, spent)
            self.failed(reply)
        else:
            clients.refuses[client] = False
            clients.event("client_finished", step, client=client, task=instruction.task, **figures)
            self.settle()

    def add(self, client: str, message: Message, weight: float) -> None:
        """Check a reply, and take what it gives.

        Raises:
            PayloadError, ProtocolError: it does not count.
        """
        raise NotImplementedError

    def settle(self) -> None:
        """Add what has been taken and can be judged by now."""

    def skipped(self, client: str, reason: wire.ClientSkipped) -> None:
        """Log that a client takes no part."""
        self.clients.event("client_idle", self.step, client=client, code=reason.code)

    def failed(self, reply: wire.Reply) -> None:
        """Note whether a client could not take part by what another one sent."""

    def close(self) -> int:
        """Return how many replies count, when no more can come."""
        return len(self.sizes)

    def finish(self, state: State) -> tuple[State, Aggregate | None]:
        """Return the state after the round, and what was aggregated; ``state``: before it.

        Raises:
            ProtocolError, ValueError, ArithmeticError, RuntimeError: the sum, or its numbers, fail.
        """
        raise NotImplementedError


@dataclass(kw_only=True)
class Updates(Summation):
    """Single updates: each is checked by itself and beside the others, and joins the aggregation
    by the ``rule``. A bad one costs its sender the round."""

    rule: Rule
    record = LORA

    def open(self, state: State, shown: State, instructions: Mapping[str, Instruction]) -> Sent:
        """Begin the aggregation, from the current adapter as clients of full rank decode it."""
        sent = super().open(state, shown, instructions)
        self._alike = self.clients.experiment.privacy.mechanism != "none"
        self._screen = Screen()
        self._arrived: dict[str, int] = {}
        self._verdicts: list[Verdict] = []
        self._before = {
            name: sent.packed.of(each.rank).state.current
            for name, each in sent.instructions.items()
        }
        with threads(1):
            self._aggregation: Aggregation = self.rule.begin(sent.packed.state.current)
        return sent

    def add(self, client: str, message: Message, weight: float) -> None:
        """Check an update by itself, and let it be judged beside the others."""
        if LORA not in message.content.array_records:
            raise PayloadError("a record of another kind than expected")
        dtype, before = self.clients.experiment.wire.dtype, self._before[client]
        record = message.content.array_records[LORA]
        update = ClientUpdate(client, unpack(record, dtype, before, self.trained), weight)
        if self._alike and weight != 1:
            raise PayloadError("num_examples is not 1, the weight of every client here")
        with threads(1):
            self._verdicts += self._screen.add(update, before)
        self._arrived[client] = wire.payload_bytes(message.content)

    def settle(self) -> None:
        """Add who is let in; who is not is named, though its reply was in order by itself."""
        verdicts, self._verdicts = self._verdicts, []
        for verdict in verdicts:
            update = verdict.update
            try:
                if verdict.fault:
                    raise PayloadError(verdict.fault)
                with threads(1):
                    self._aggregation.add(update)
            except NUMERICAL as fault:
                self.clients.record_fault(update.client, self.step, fault)
                continue
            self.sizes[update.client] = self._arrived[update.client]
            if verdict.cut:
                cut = {"client": update.client, "weight": update.weight}
                self.clients.event("weight_cut", self.step, **cut)

    def close(self) -> int:
        """Judge what has waited, and return how many updates are in the aggregation."""
        with threads(1):
            self._verdicts += self._screen.judged()
        self.settle()
        return len(self.sizes)

    def finish(self, state: State) -> tuple[State, Aggregate | None]:
        """Return the state with the aggregate in it."""
        if not self.sizes:
            return state, None
        aggregate = finished(self._aggregation)
        return fold_residual(state, aggregate), aggregate


@dataclass(kw_only=True)
class MaskedSum(Summation):
    """One sum under masks: single replies cannot be read. ``held``: the round of the protocol."""

    secure: SecureAggregation
    held: ServerRound = field(init=False)
    record = SECURE

    def layout(self, state: State, basis: str) -> Layout:
        """Return the layout of what each client gives; ``basis``: what all must agree on."""
        raise NotImplementedError

    def absorb(
        self, state: State, sums: Sums, members: int, given: Sequence[str]
    ) -> tuple[State, Aggregate | None]:
        """Return the state after the round and what was aggregated, from the state before it and
        the sums over clients; ``members``: how many were to give theirs, and shared the noise;
        ``given``: those whose sums have arrived."""
        raise NotImplementedError

    def open(self, state: State, shown: State, instructions: Mapping[str, Instruction]) -> Sent:
        """Return the requests for the masked input of the members of the sum."""
        config, one = self.clients.experiment, next(iter(instructions.values()))
        self._layout = self.layout(state, sum_terms(config, config.model.name, one, shown))
        self.held = self.secure.share_keys(self.step, self.asked, self._layout)
        self.secure_requests = self.secure.masked_input_requests(self.held)
        asked = {name: one for name, one in instructions.items() if name in self.secure_requests}
        return super().open(state, shown, asked)

    def add(self, client: str, message: Message, weight: float) -> None:
        """Add a masked vector."""
        reply = wire.read_secure(message)
        self.held = self.secure.add_masked_input(self.held, client, reply)
        self.sizes[client] = len(reply)

    def skipped(self, client: str, reason: wire.ClientSkipped) -> None:
        """Count on it no more, as well."""
        self.secure.sits_out(self.step, client, self.asked[client], reason)

    def failed(self, reply: wire.Reply) -> None:
        """It may refuse the round because of another site's part in it."""
        client, task = reply.client, self.asked[reply.client]
        blames = self.secure.note_blame(self.step, self.held, client, reply.message, task)
        self.hindered += blames

    def close(self) -> int:
        """Those of before a restart included."""
        return max(len(self.sizes), len(self.held.masked))

    def finish(self, state: State) -> tuple[State, Aggregate | None]:
        """Return the state that follows from the sum."""
        words = self.secure.unmask(self.step, self.held)
        sums = self._layout.decode(words, len(self.held.masked))
        members, given = len(self.held.members or ()), self.secure.given(self.held)
        after, aggregate = self.absorb(state, without_loss(sums), members, given)
        loss = mean_loss(sums, len(self.held.masked))
        if loss is not None:
            self.clients.event("loss_summed", self.step, loss=loss)
        return after, aggregate


@dataclass(kw_only=True)
class MaskedUpdates(MaskedSum):
    """A sum of updates, or of gradients where the server takes the step; ``stream``: number of
    tasks of the run."""

    rule: Rule
    stream: int

    def layout(self, state: State, basis: str) -> Layout:
        """Return the layout of gradient sums, or of changes."""
        config = self.clients.experiment
        return layout_of(config, state.current, self.trained, at_server(config), basis)

    def absorb(
        self, state: State, sums: Sums, members: int, given: Sequence[str]
    ) -> tuple[State, Aggregate | None]:
        """Return the state after the step."""
        config = self.clients.experiment
        if at_server(config):
            return gradient_step(config, state, sums, self.stream), None
        means = {key: torch.from_numpy(part / len(given)) for key, part in sums.items()}
        return mean_update(self.rule, state, means)


def gradient_step(experiment: Experiment, state: State, sums: Sums, tasks: int) -> State:
    """Return the state after a step of gradient descent on a sum of clipped gradients and noise:
    (M59). The learning rate is lowered where a step has much noise."""
    examples = max(1, int(sums[EXAMPLES][0]))
    rate = experiment.train.learning_rate
    if experiment.privacy.mechanism != "none":
        rate = min(rate, NOISE_PER_EXAMPLE * examples / sum_deviation(experiment, tasks))
    unit = grid_step(experiment.privacy.max_grad_norm) * rate / examples
    change = {key: torch.from_numpy(-unit * part) for key, part in sums.items() if key != EXAMPLES}
    return replace(state, current=changed(state.current, change))


def mean_update(
    rule: Rule, state: State, means: Mapping[str, torch.Tensor]
) -> tuple[State, Aggregate]:
    """Return the state after the rule's aggregate of the mean change of all updates, as if it were
    one client's."""
    aggregation = rule.begin(state.current)
    aggregation.add(ClientUpdate("all", changed(state.current, means), 1.0))
    aggregate = finished(aggregation)
    if len(rule.trained) > 1:  # what a mean of factors loses shows in single updates
        aggregate = replace(aggregate, error=None)
    return fold_residual(state, aggregate), aggregate


def fold_residual(state: State, aggregate: Aggregate) -> State:
    """Return the state after a round: what the current adapter cannot hold joins the residual,
    whose rank stays below the layers' own."""
    gained = [part for part in (state.residual, aggregate.residual) if part is not None]
    if not gained:
        return replace(state, current=aggregate.current)
    residual = stack(gained)
    full = max(min(shape) for shape in residual.shapes.values())
    if residual.rank > full:
        residual = compress(residual, full)
    return replace(state, current=aggregate.current, residual=residual)
