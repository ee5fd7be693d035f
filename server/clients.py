"""The clients of a run: who they are, who is connected, what they are sent and what they answer.

Clients go by name, a number as text, in everything that is seeded or stored: names are stable
across runs and restarts, node ids need not be.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite

import torch
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from deal_core.aggregation.rule import NUMERICAL, AggregationFailed, one_line
from deal_core.config.experiment import Experiment, FederationConfig
from deal_core.errors import UserError
from deal_core.lora.payload import RETAINED
from deal_core.lora.state import State
from deal_core.secure_sum.messages import ProtocolError
from deal_core.training.hardware import threads
from deal_core.wire.instruction import RECORD, Instruction
from deal_core.wire.records import LATE_SECONDS, SECURE
from server import wire
from server.folder import EventLog
from server.plan import Step
from server.results import Spending

CONNECT_SECONDS = 120.0
"""How long a run, and each of its rounds, waits for clients that are not connected, at most."""
LATE_PATIENCE = 60.0
"""Seconds after the deadline for which a run that ends for want of replies hears how late."""
NARROW = 0.2
"""Share of the time of a round: who has less left may be late in the next, and is named."""


@dataclass(frozen=True)
class Roster:
    """The clients of a run."""

    clients: tuple[str, ...]
    connected: Callable[[], Mapping[str, int]]
    """Asks who is connected now; client name to node id."""
    patience: float = 0.0
    """Seconds that a round waits for clients that are not; sites alone have some."""
    keys: Callable[[], Mapping[str, bytes]] = dict
    """Asks for the public keys with which sites have signed in; client name to PEM."""

    def present(self, wanted: set[str], least: float) -> dict[str, int]:
        """Return who of ``wanted`` is connected; waits, within its patience, for ``least`` of
        them. Fewer may come back."""
        end = time.monotonic() + self.patience
        while True:
            found = {name: node for name, node in self.connected().items() if name in wanted}
            if len(found) >= min(least, len(wanted)) or time.monotonic() >= end:
                return found
            time.sleep(wire.POLL_SECONDS)


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

    def signed_in() -> dict[str, NodeInfo]:
        found: dict[str, NodeInfo] = {}
        for node in sorted(grid.get_nodes(), key=lambda node: node.node_id):
            name = str(sites.index(node.name)) if node.name in sites else ""
            if name in found:
                raise UserError(
                    f"two sites are registered as '{node.name}'; unregister one with "
                    "deal server remove-site and add it under another name"
                )
            if name:
                found[name] = node
        return found

    names = tuple(map(str, range(len(sites))))
    roster = Roster(
        names,
        lambda: {name: node.node_id for name, node in signed_in().items()},
        patience,
        lambda: {name: node.public_key for name, node in signed_in().items()},
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
    """Return client name to node id, in the order of the names as numbers, of ``expected``
    simulated nodes: wait for them, and ask each who it is.

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
        time.sleep(wire.POLL_SECONDS)
    kind = f"{MessageType.QUERY}.hello"
    requests = {
        str(node): Message(RecordDict({"hello": ConfigRecord()}), node, kind) for node in nodes
    }
    found: dict[int, int] = {}
    for reply in wire.collect(grid, requests, max(1.0, end - time.monotonic())):
        try:
            said = reply.answered().content.config_records["site"]["client"]
            number = int(said)  # type: ignore[arg-type]
        except (LookupError, TypeError, ValueError):
            fault = reply.fault or "no number"
            raise UserError(f"a client did not say who it is ({fault}); see its log") from None
        if number >= expected:
            raise UserError(
                f"client '{number}' is connected, and federation.clients is {expected} (from 0); "
                "raise it, or stop that client"
            )
        if number in found:
            raise UserError(f"two clients call themselves '{number}'; give each its own number")
        found[number] = int(reply.client)
    return {str(number): found[number] for number in sorted(found)}


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
        component_ranks=tuple(each.rank for each in state.components),
        component_tasks=tuple("\n".join(each.tasks) for each in state.components),
    )


@dataclass
class Sent:
    """Requests to clients, all about one state."""

    step: Step
    packed: wire.Outgoing
    instructions: dict[str, Instruction]
    """Client name to what it is asked, of all that should be asked."""
    requests: dict[str, Message]
    """Client name to message, of those who are connected."""
    bytes: int = 0
    """Of all that is sent."""


@dataclass(frozen=True)
class Clients:
    """Requests to the clients of a run and their replies."""

    grid: Grid
    experiment: Experiment
    roster: Roster
    events: EventLog
    holding: dict[str, str] = field(default_factory=dict)
    """Client to the digest of the retained adapter that it has; who is not in it is sent it."""
    late: dict[str, tuple[str, float]] = field(default_factory=dict)
    """Number of a site's request that had no reply in time, to the site and its deadline."""
    refuses: dict[str, bool] = field(default_factory=dict)
    """Client to whether its policy refused the experiment when it was asked last."""

    def ask(
        self,
        step: Step,
        state: State | wire.Outgoing,
        instructions: Mapping[str, Instruction],
        share: float = 1.0,
        secure: Mapping[str, ConfigRecord] | None = None,
    ) -> Sent:
        """Return requests about a state to those who are connected, once a ``share`` of them is, or
        patience ends; nothing is sent yet. ``secure``: client name to the record of a secure sum
        that its request carries; None: there is no sum."""
        if isinstance(state, State):
            asked = list(instructions.values())
            one = next((each for each in asked if each.task), asked[0])
            with threads(1):
                state = wire.packed(self.experiment, state, one, {each.rank for each in asked})
        nodes = self.roster.present(set(instructions), share * len(instructions))
        retained = {"retained_digest": state.digest, "retained_rows": state.retained_rank}
        named = {name: one.model_copy(update=retained) for name, one in instructions.items()}
        sent = Sent(step, state, named, {})
        deadline = self.experiment.federation.deadline_seconds
        for name, each in named.items():
            if name not in nodes:
                continue
            records = state.of(each.rank).records
            if self.holding.get(name) == state.digest:
                records = {key: record for key, record in records.items() if key != RETAINED}
            content = RecordDict({**records, RECORD: ConfigRecord(each.to_config())})
            if secure is not None:
                content[SECURE] = secure[name]
            # No site begins to work on it after the deadline; a late reply says how late it is.
            ttl = deadline + LATE_SECONDS
            sent.requests[name] = Message(content, nodes[name], state.kind, ttl=ttl)
            sent.bytes += wire.payload_bytes(content)
        return sent

    def replies(
        self, sent: Sent, messages: Iterable[Message] | None = None
    ) -> Iterator[wire.Reply]:
        """Yield one reply per client, the absent first; what comes beyond that is named in the log
        and dropped. Who lacks the retained adapter is sent it, once, and has the rest of the time.
        ``messages``: what arrives of requests that Flower's own loop has sent; None: they are sent
        now."""
        step, deadline = sent.step, self.experiment.federation.deadline_seconds
        end, resent = time.monotonic() + deadline, set[str]()
        self._told_late(step)

        def drop(client: str) -> None:
            self.event("reply_dropped", step, client=client, reason="a second reply")

        def again(client: str, message: Message) -> Mapping[str, str]:
            code = wire.status(message) if message.has_content() else ""
            if code in wire.HAS_RETAINED:
                self.holding[client] = sent.packed.digest
            left = end - time.monotonic()
            # Whoever trained later would be charged for an update that comes too late.
            if code != wire.LACKS_RETAINED or client in resent or left <= 0:
                return {}
            resent.add(client)
            self.event("resent", step, client=client)
            first, rank = sent.requests[client], sent.instructions[client].rank
            whole = RecordDict({**first.content, **sent.packed.of(rank).records})
            sent.bytes += wire.payload_bytes(whole)
            node, kind = first.metadata.dst_node_id, first.metadata.message_type
            more = Message(whole, node, kind, ttl=left + LATE_SECONDS)
            return wire.push(self.grid, {client: more})

        if messages is not None:
            ids = {each.metadata.message_id: name for name, each in sent.requests.items()}
            arriving = wire.matched(ids, messages, drop)
        else:
            ids = wire.push(self.grid, sent.requests)
            for client in ids.values():
                self.holding.pop(client, None)
            arriving = wire.matched(ids, wire.pull(self.grid, ids, deadline), drop, again)
        reached = set(ids.values())
        yield from (
            wire.Reply(name, None, wire.ABSENT) for name in sent.instructions if name not in reached
        )
        for reply in arriving:
            named = bool(self.experiment.federation.sites)
            if reply.fault != wire.LATE:
                left = end - time.monotonic()
                if named and left < NARROW * deadline:
                    reason = (
                        f"answered {max(0, round(left))} s before the deadline of {deadline:g} s"
                    )
                    self.event("reply_slow", step, client=reply.client, reason=reason)
                yield reply
                continue
            if named:
                number = [number for number, name in ids.items() if name == reply.client][-1]
                begun = sent.requests[reply.client].metadata.created_at
                self.late[number] = reply.client, begun + deadline
            yield wire.Reply(reply.client, None, f"{wire.LATE} of {deadline:g} s")

    def _told_late(self, step: Step) -> list[str]:
        """Log which sites have answered after a deadline, and drop what they have sent.

        Returns:
            The same in words.
        """
        deadline, told = self.experiment.federation.deadline_seconds, []
        for message in self.grid.pull_messages([*self.late]) if self.late else ():
            client, end = self.late.pop(message.metadata.reply_to_message_id, ("", 0.0))
            if client and not message.has_error():
                after = message.metadata.created_at - end  # the site's own word
                seconds = max(0, round(after)) if isfinite(after) else 0
                reason = f"answered {seconds} s after the deadline of {deadline:g} s"
                self.event("reply_late", step, client=client, reason=reason)
                told.append(f"{self.experiment.federation.sites[int(client)]} {reason}")
        return told

    def _await_late(self, step: Step) -> str:
        """Return how late those are who answer within ``LATE_PATIENCE``: the run ends here, and its
        next part has to know how long a round takes."""
        end, told = time.monotonic() + LATE_PATIENCE, self._told_late(step)
        while self.late and time.monotonic() < end:
            time.sleep(wire.POLL_SECONDS)
            told += self._told_late(step)
        return f"; {', '.join(told)}: a longer federation.deadline_seconds takes it" if told else ""

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
                f"{self._await_late(step)}"
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
            UserError: the run stops here, and can go on.
            OutOfMemoryError: the same, perhaps on another machine.
        """
        try:
            yield
        except (ProtocolError, AggregationFailed) as fault:  # a line for people already
            self.event(event, step, reason=str(fault))
        except (UserError, torch.OutOfMemoryError):
            raise
        except NUMERICAL as fault:
            self.event(event, step, reason=one_line(fault))

    def event(self, event: str, step: Step, **fields: object) -> None:
        """Log what happened in a step."""
        where = {"round": step.round, "stage": step.stage, "phase": step.phase}
        self.events.write(event, **where, server_round=step.server_round, **fields)
