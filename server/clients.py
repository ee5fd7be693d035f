"""The clients of a run: who they are, who is connected, what they are sent and what they answer.

Clients go by name, a number as text, in everything that is seeded or stored: names are stable
across runs and restarts, node ids need not be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from deal_core.aggregation import NUMERICAL, AggregationFailed, one_line
from deal_core.config.experiment import Experiment, FederationConfig
from deal_core.errors import UserError
from deal_core.lora.payload import PayloadError
from deal_core.lora.state import State
from deal_core.secure_sum.messages import ProtocolError
from deal_core.training.hardware import threads
from deal_core.wire.instruction import Instruction
from deal_core.wire.records import SECURE
from server import wire
from server.folder import EventLog
from server.plan import Step
from server.results import Spending

LATE, ABSENT = "no reply before the deadline", "not connected"
CONNECT_SECONDS = 120.0
"""How long a run, and each of its rounds, waits for clients that are not connected, at most."""
POLL_SECONDS = 0.2
HELLO = f"{MessageType.QUERY}.hello"


@dataclass(frozen=True)
class Reply:
    """One client's answer: a message, or the reason why there is none.

    Attributes:
        dropped: a further reply to a request that is answered already; it changes nothing.
    """

    client: str
    message: Message | None
    fault: str = ""
    dropped: bool = False

    def answered(self) -> Message:
        """Return the message.

        Raises:
            PayloadError: there is none; the reason.
        """
        if self.message is None:
            raise PayloadError(self.fault)
        return self.message


def push(grid: Grid, requests: Mapping[str, Message]) -> dict[str, str]:
    """Send requests, client name to message; return message id to client, of those sent."""
    sent = list(grid.push_messages(list(requests.values()))) if requests else []
    return {number: name for name, number in zip(requests, sent, strict=True) if number}


def pull(grid: Grid, ids: Iterable[str], deadline_seconds: float) -> Iterator[Message]:
    """Yield each message as it arrives, until every id is answered.

    The deadline ends the wait for those that are silent. What is there when the server looks is
    taken: a machine that was suspended, or computes all clients itself, loses nobody by it.
    """
    waiting = dict.fromkeys(ids)
    end, quiet = time.monotonic() + deadline_seconds, False
    while waiting:
        left = len(waiting)
        for message in grid.pull_messages(list(waiting)):
            waiting.pop(message.metadata.reply_to_message_id, None)
            yield message
        silent = len(waiting) == left  # further replies to answered requests do not count
        if silent and quiet and time.monotonic() >= end:
            break
        quiet = silent
        if silent:
            time.sleep(POLL_SECONDS)


def matched(ids: Mapping[str, str], messages: Iterable[Message]) -> Iterator[Reply]:
    """Yield the replies in ``messages`` to the requests of these ids, exactly one per client: the
    silent come last, with a fault. A second reply is yielded as dropped, beside that; one to a
    request of an earlier round is not seen at all."""
    waiting = dict.fromkeys(ids.values())
    for message in messages:
        client = ids.get(message.metadata.reply_to_message_id)
        if client is None:
            continue
        if client not in waiting:
            yield Reply(client, None, "a second reply", dropped=True)
            continue
        del waiting[client]
        if message.has_error():
            yield Reply(client, None, f"flower error {message.error.code}")
        else:
            yield Reply(client, message)
    for client in waiting:
        yield Reply(client, None, LATE)


def collect(
    grid: Grid, requests: Mapping[str, Message], deadline_seconds: float
) -> Iterator[Reply]:
    """Send requests, and yield the replies as they arrive: see :func:`pull` and :func:`matched`."""
    ids = push(grid, requests)
    for name in requests.keys() - set(ids.values()):  # the node is gone since it was looked up
        yield Reply(name, None, ABSENT)
    yield from matched(ids, pull(grid, ids, deadline_seconds))


@dataclass(frozen=True)
class Roster:
    """The clients of a run.

    Attributes:
        clients: names of all, in their order.
        connected: asks who is connected now; client name to node id.
        patience: seconds that a round waits for clients that are not.
        keys: asks for the public keys with which sites have signed in; client name to PEM. A
            simulated client has none.
    """

    clients: tuple[str, ...]
    connected: Callable[[], Mapping[str, int]]
    patience: float = 0.0
    keys: Callable[[], Mapping[str, bytes]] = dict

    def present(self, wanted: set[str], least: float) -> dict[str, int]:
        """Return who of ``wanted`` is connected; waits, within its patience, for ``least`` of
        them. Fewer may come back."""
        end = time.monotonic() + self.patience
        while True:
            found = {name: node for name, node in self.connected().items() if name in wanted}
            if len(found) >= min(least, len(wanted)) or time.monotonic() >= end:
                return found
            time.sleep(POLL_SECONDS)


def find_roster(grid: Grid, config: FederationConfig) -> Roster:
    """Return the clients of a run; wait for them, at most :data:`CONNECT_SECONDS`.

    Simulated clients all have to come, and are asked who they are. Registered sites are known by
    the key with which they have signed in; a run starts with a quorum of them, and the others
    may come later.

    Raises:
        UserError: too few clients, or two with one name.
    """
    patience = min(CONNECT_SECONDS, config.deadline_seconds)
    if not config.sites:
        nodes = find_clients(grid, config.clients, patience)
        return Roster(tuple(nodes), lambda: nodes)
    sites = config.sites
    names = tuple(map(str, range(len(sites))))
    roster = Roster(
        names,
        lambda: {name: node.node_id for name, node in signed_in(grid, sites).items()},
        patience,
        lambda: {name: node.public_key for name, node in signed_in(grid, sites).items()},
    )
    there = roster.present(set(names), len(names))
    if len(there) < config.quorum * len(names):
        missing = ", ".join(sites[int(name)] for name in names if name not in there)
        raise UserError(
            f"only {len(there)} of {len(names)} sites are connected after {patience:g} s (missing: "
            f"{missing}); start them with deal site start, or lower federation.quorum"
        )
    return roster


def find_clients(grid: Grid, expected: int, deadline_seconds: float) -> dict[str, int]:
    """Wait for ``expected`` simulated nodes, and ask each who it is.

    Returns:
        Client name to node id, in the order of the names as numbers.

    Raises:
        UserError: fewer nodes than expected at the deadline, one beyond them, or two with one name.
    """
    end = time.monotonic() + deadline_seconds
    while len(nodes := sorted(grid.get_node_ids())) < expected:
        if time.monotonic() > end:
            raise UserError(
                f"only {len(nodes)} of {expected} clients are connected after "
                f"{deadline_seconds:g} s; start the others or lower federation.clients"
            )
        time.sleep(POLL_SECONDS)
    requests = {
        str(node): Message(RecordDict({"hello": ConfigRecord()}), node, HELLO) for node in nodes
    }
    found: dict[str, int] = {}
    for reply in collect(grid, requests, max(1.0, end - time.monotonic())):
        if reply.dropped:
            continue
        if reply.message is None:
            raise UserError(f"a client did not say who it is ({reply.fault}); see its log")
        try:
            name = str(int(reply.message.content.config_records["site"]["client"]))  # type: ignore[arg-type]
        except (LookupError, TypeError, ValueError):
            raise UserError("a client did not say who it is (no number); see its log") from None
        if int(name) >= expected:
            raise UserError(
                f"client '{name}' is connected, and federation.clients is {expected} (from 0); "
                "raise it, or stop that client"
            )
        if name in found:
            raise UserError(f"two clients call themselves '{name}'; give each its own number")
        found[name] = int(reply.client)
    return dict(sorted(found.items(), key=lambda item: (len(item[0]), item[0])))


def signed_in(grid: Grid, sites: tuple[str, ...]) -> dict[str, NodeInfo]:
    """Return client name to what Flower knows of it, of the sites that are connected now.

    Raises:
        UserError: two nodes are registered under one name.
    """
    found: dict[str, NodeInfo] = {}
    for node in sorted(grid.get_nodes(), key=lambda node: node.node_id):
        if node.name not in sites:
            continue
        name = str(sites.index(node.name))
        if name in found:
            raise UserError(
                f"two sites are registered as '{node.name}'; unregister one with "
                "deal server remove-site and add it under another name"
            )
        found[name] = node
    return found


def instruction_of(step: Step, state: State) -> Instruction:
    """Return what is the same for all clients that are asked about a state."""
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


@dataclass
class Sent:
    """Requests to clients, all about one state.

    Attributes:
        step: which step of the run asks.
        packed: the state as it travels.
        instructions: client name to what it is asked, of all that should be asked.
        requests: client name to message, of those who are connected.
        ids: of messages that are on their way, to the client.
        resent: messages to clients that turned out to lack the retained adapter.
    """

    step: Step
    packed: wire.Outgoing
    instructions: dict[str, Instruction]
    requests: dict[str, Message]
    ids: dict[str, str] = field(default_factory=dict)
    resent: list[Message] = field(default_factory=list)

    def whole(self, client: str, deadline: float) -> Message:
        """Return the request to a client with everything in it, valid for so many seconds."""
        content, metadata = self.requests[client].content, self.requests[client].metadata
        packed = self.packed.of(self.instructions[client].rank)
        whole = RecordDict({**content, **packed.records})
        return Message(whole, metadata.dst_node_id, metadata.message_type, ttl=deadline)

    @property
    def bytes_down(self) -> float:
        """What a client is sent, mean over the clients that are asked."""
        sizes = [wire.payload_bytes(m.content) for m in (*self.requests.values(), *self.resent)]
        return sum(sizes) / max(1, len(self.requests))


@dataclass(frozen=True)
class Clients:
    """Requests to the clients of a run and their replies, whatever is asked.

    Attributes:
        roster: the clients of the run.
        holding: client name to the digest of the retained adapter that it has, as far as this
            process knows: who is not in it is sent the adapter.
        refusing: clients whose policy refused the experiment when they were asked last, as far as
            this process knows.
    """

    grid: Grid
    experiment: Experiment
    roster: Roster
    events: EventLog
    holding: dict[str, str] = field(default_factory=dict)
    refusing: set[str] = field(default_factory=set)

    def ask(
        self,
        step: Step,
        state: State,
        instructions: dict[str, Instruction],
        share: float = 1.0,
        secure: Mapping[str, ConfigRecord | None] | None = None,
    ) -> Sent:
        """Return requests about a state to those who are connected, once a ``share`` of them is, or
        patience ends; nothing is sent yet. ``secure``: client name to the record of a secure sum
        that its request carries."""
        asked = list(instructions.values())
        with threads(1):
            one = next((each for each in asked if each.task), asked[0])
            packed = wire.packed(self.experiment, state, one, {each.rank for each in asked})
        return self._addressed(step, packed, instructions, share, secure or {})

    def ask_again(self, step: Step, sent: Sent, instructions: dict[str, Instruction]) -> Sent:
        """Return requests about the very state that was ``sent``."""
        return self._addressed(step, sent.packed, instructions, 1.0, {})

    def _addressed(
        self,
        step: Step,
        packed: wire.Outgoing,
        instructions: dict[str, Instruction],
        share: float,
        secure: Mapping[str, ConfigRecord | None],
    ) -> Sent:
        """The requests; what a client has is left out."""
        nodes = self.roster.present(set(instructions), share * len(instructions))
        deadline = self.experiment.federation.deadline_seconds
        asked = {name: packed.named_in(each) for name, each in instructions.items()}
        sent = Sent(step, packed, asked, {})
        for name, each in asked.items():
            if name in nodes:
                has = self.holding.get(name) == packed.digest
                sent.requests[name] = wire.request(
                    packed.of(each.rank).records_for(has),
                    each,
                    nodes[name],
                    wire.kind_of(each),
                    deadline,
                )
                if (masked := secure.get(name)) is not None:
                    sent.requests[name].content[SECURE] = masked
        return sent

    def messages(self, sent: Sent) -> Iterator[Message]:
        """Return what arrives, as it does, of requests that are sent now. Who lacks the retained
        adapter is sent it, once, and has the rest of the time."""
        sent.ids.update(push(self.grid, sent.requests))
        return self._arriving(sent)

    def _arriving(self, sent: Sent) -> Iterator[Message]:
        deadline = self.experiment.federation.deadline_seconds
        started, lacking = time.monotonic(), list[str]()
        silent = set(sent.ids.values())
        for message in pull(self.grid, list(sent.ids), deadline):
            client = sent.ids.get(message.metadata.reply_to_message_id, "")
            holds = wire.holds_retained(message)
            if holds:
                self.holding[client] = sent.packed.digest
            elif client in silent:
                self.holding.pop(client, None)
            if holds is False and client in silent:
                self.event("resent", sent.step, client=client)
                lacking.append(client)
            else:
                yield message
            silent.discard(client)
        for client in silent:
            self.holding.pop(client, None)
        left = deadline - (time.monotonic() - started)
        if left <= 0:  # whoever trained now would be charged for an update that comes too late
            return
        whole = {name: sent.whole(name, left) for name in lacking}
        sent.resent.extend(whole.values())
        again = push(self.grid, whole)
        sent.ids.update(again)
        for message in pull(self.grid, again, left):
            if wire.holds_retained(message):
                client = again.get(message.metadata.reply_to_message_id, "")
                self.holding[client] = sent.packed.digest
            yield message

    def replies(self, sent: Sent, messages: Iterable[Message] | None = None) -> Iterator[Reply]:
        """Yield one reply per client, the absent first; whatever comes beyond that is named in the
        log and dropped.

        Args:
            sent: the requests.
            messages: what arrives of them; None: they are sent now.
        """
        messages = self.messages(sent) if messages is None else messages
        if not sent.ids:  # Flower's own loop has sent them
            sent.ids.update({m.metadata.message_id: name for name, m in sent.requests.items()})
        reached = set(sent.ids.values())
        for name in sent.instructions:
            if name not in reached:
                yield Reply(name, None, ABSENT)
        for reply in matched(sent.ids, messages):
            if reply.dropped:
                self.event("reply_dropped", sent.step, client=reply.client, reason=reply.fault)
            else:
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

    def record_refusal(self, client: str, refuses: bool) -> None:
        """Note what a client's policy has said of the experiment."""
        (self.refusing.add if refuses else self.refusing.discard)(client)

    def require_participants(self, learners: frozenset[str], step: Step) -> None:
        """Check that the policy of some client allows what the experiment asks: where none does,
        every round would end so. A few that are asked in one round are not all of them.

        Args:
            learners: all that train in the run.
            step: which round it is.

        Raises:
            UserError: all refuse.
        """
        if learners and learners <= self.refusing:
            raise UserError(
                f"{step.kind} {step.server_round} of stage {step.stage}: all clients that train "
                f"({len(learners)}) refuse the experiment by their policy; deal site check "
                "--experiment FILE tells each why; the checkpoint before it stands, continue with "
                "--resume"
            )

    def record_fault(
        self, client: str, step: Step, fault: Exception, spent: Spending | None = None
    ) -> None:
        """Log why a client's reply does not count, and what it says that it has ``spent``."""
        reason = str(fault) if isinstance(fault, ValueError) else one_line(fault)
        told = {} if spent is None else spent.model_dump()
        self.event("client_failed", step, client=client, reason=reason[:400], **told)

    @contextmanager
    def may_be_lost(self, event: str, step: Step) -> Iterator[None]:
        """Within it a fault of the secure protocol, or of numbers, is logged as ``event``; the rest
        of the block is left out, and the run continues.

        Raises:
            UserError: too few sites, or a site twice: the run stops here, and can go on.
        """
        try:
            yield
        except ProtocolError as fault:
            self.event(event, step, reason=str(fault))
        except UserError:
            raise
        except NUMERICAL as fault:
            told = isinstance(fault, AggregationFailed)  # a line for people already
            self.event(event, step, reason=str(fault) if told else one_line(fault))

    def event(self, event: str, step: Step, **fields: object) -> None:
        """Log what happened in a step."""
        where = {"round": step.round, "stage": step.stage, "phase": step.phase}
        self.events.write(event, **where, server_round=step.server_round, **fields)
