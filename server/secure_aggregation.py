"""Secure sums at the server, in SecAgg's stages: AdvertiseKeys, ShareKeys, MaskedInput, Unmask.

What the server holds of a round is on the disk after every stage that fixes something: a server
that starts again goes on with the same terms, and sites answer the same requests with the same
bytes. Channel keys and the numbers of rounds last as long as the run's folder: sites answer one
announcement of a peer in a run, and no number twice.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from numpy.typing import NDArray

from deal_core.atomic_write import atomic_write
from deal_core.config.experiment import Experiment, fewest_in_sum
from deal_core.errors import UserError
from deal_core.secure_sum import server_round as stages
from deal_core.secure_sum.keys import Announcement, Words, fingerprint, site_of, verify
from deal_core.secure_sum.layout import Layout
from deal_core.secure_sum.messages import BelowThreshold, ProtocolError, UnpinnedPeer, UsedUpdate
from deal_core.secure_sum.server_round import ServerRound
from deal_core.secure_sum.terms import LEAST_SITES, RoundTerms, threshold
from deal_core.wire.instruction import LEARN
from deal_core.wire.records import ANNOUNCEMENTS, NAMES, REQUEST, RUN, SECURE
from server import wire
from server.clients import Clients
from server.plan import Step

REPLY_SECONDS = 60.0
"""How long the server waits for the short replies of a secure sum, those beside the updates."""
Sums = Mapping[str, NDArray[Any]]
"""Name of a field of a layout to its sum over sites."""
ANNOUNCED, NUMBER = "announced", "number"
"""Keys of the file: client to its announcement, hexadecimal; the last round's number."""


@dataclass(frozen=True)
class ChannelKeys:
    """What clients have announced, in the file ``path``; ``run``: its name, as sites know it."""

    path: Path
    run: str

    @cached_property
    def _held(self) -> dict[str, Any]:
        if not self.path.exists():
            return {ANNOUNCED: {}, NUMBER: 0}
        held: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return held

    def announcement(self, client: str) -> bytes:
        """Return what a client has announced; empty: nothing yet."""
        return bytes.fromhex(self._held[ANNOUNCED].get(client, ""))

    def site(self, client: str) -> bytes:
        """Return which site a client is that has announced itself."""
        return Announcement.from_bytes(self.announcement(client)).site

    def clients_of(self, sites: Iterable[bytes]) -> dict[str, bytes]:
        """Return client to site, of some sites."""
        wanted = frozenset(sites)
        known = {client: self.site(client) for client in self._held[ANNOUNCED]}
        return {client: site for client, site in known.items() if site in wanted}

    def add(self, client: str, data: bytes, registered: bytes = b"") -> str:
        """Return the fingerprint of the key that a client announces, which is kept for good;
        ``registered``: public key that it has signed in with, PEM; empty: it is simulated.

        Raises:
            ProtocolError: it is for another run, not signed by its own key, of another site than
                the registered one, or that of another client.
        """
        announcement = Announcement.from_bytes(data)
        site = announcement.site
        if registered and site != registered_site(registered):
            raise ProtocolError(f"announces {fingerprint(site)}, and is registered with another")
        verify(announcement, self.run, None)
        if any(other != client for other in self.clients_of([site])):
            raise ProtocolError(f"announces {fingerprint(site)}, which is another client's")
        self._held[ANNOUNCED][client] = data.hex()
        self._save()
        return fingerprint(site)

    def forget(self, client: str) -> None:
        """Drop the announcement of a client that has another key now."""
        self._held[ANNOUNCED].pop(client, None)
        self._save()

    def next_number(self) -> int:
        """Return a number for a round, larger than all before, whatever the clock says: sites take
        none that is not."""
        number: int = max(self._held[NUMBER] + 1, time.time_ns() // 1000)
        self._held[NUMBER] = number
        self._save()
        return number

    def _save(self) -> None:
        atomic_write(self.path, json.dumps(self._held), mode=0o600, for_good=True)


def registered_site(key: bytes) -> bytes:
    """Return which site signs in with a public key (PEM); a ProtocolError if it is no EC key."""
    public = serialization.load_pem_public_key(key)
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise ProtocolError("is registered with a key that is no EC key")
    return site_of(public)


Add = Callable[[ServerRound, bytes, bytes], ServerRound]


@dataclass(frozen=True)
class SecureAggregation:
    """The secure sums of a run, in SecAgg's stages."""

    clients: Clients
    folder: Path
    """Of the run; its name is that of the run, as sites know it."""
    idle: dict[str, set[str]] = field(default_factory=dict)
    """Task to the clients that take no part in it, by their own rules: they are not counted on
    again, for whoever prepares and sends nothing brings the sum closer to its threshold."""
    accusers: dict[bytes, set[str]] = field(default_factory=dict)
    """Site to the clients that have refused its part of a round."""

    @cached_property
    def keys(self) -> ChannelKeys:
        """What clients have announced."""
        return ChannelKeys(self.folder / "secure" / "keys.json", self.folder.name)

    def share_keys(
        self, step: Step, clients: Mapping[str, str], layout: Layout, by_all: bool = False
    ) -> ServerRound:
        """Return the round with its members fixed, after AdvertiseKeys and ShareKeys.

        Args:
            step: which round of the run.
            clients: client to task.
            layout: of the vectors.
            by_all: those that take no part have answered, too, and count for the quorum.

        Raises:
            BelowThreshold: too few take part.
            UserError: fewer than the quorum do.
        """
        held = self._load(step, layout)
        if held is not None:
            return held
        self._advertise_keys(step, set(self._counted_on(clients)))
        cohort = [name for name in self._counted_on(clients) if self.keys.announcement(name)]
        if len(cohort) >= self._least():
            held = self._prepared(step, {name: clients[name] for name in cohort}, layout)
        valid = len(held.prepared) if held is not None else len(cohort)
        idle = len(clients) - len(self._counted_on(clients)) if by_all else 0
        self.clients.require_quorum(valid + idle, len(self._counted_on(clients)) + idle, step)
        if held is None:
            raise BelowThreshold(
                f"{len(cohort)} clients can be asked, and a sum is of {self._least()} or more"
            )
        held = stages.close_prepared(held)
        self._save(step, held)
        return held

    def _counted_on(self, clients: Mapping[str, str]) -> list[str]:
        """Those of some clients that have not said that they take no part in their task."""
        return [name for name, task in clients.items() if name not in self.idle.get(task, ())]

    def _advertise_keys(self, step: Step, clients: set[str]) -> None:
        """Learn the channel keys of clients that have not told theirs, or have another key now."""
        registered = self.clients.roster.keys()
        for name in clients & registered.keys():
            known = bool(self.keys.announcement(name))
            if known and self.keys.site(name) != registered_site(registered[name]):
                self.keys.forget(name)
        missing = sorted(name for name in clients if not self.keys.announcement(name))
        least = self._needed(clients) - (len(clients) - len(missing))
        records = {name: ConfigRecord({RUN: self.keys.run}) for name in missing}
        for name, data in self._ask(step, "announce", records, least):
            try:
                shown = self.keys.add(name, data, registered.get(name, b""))
            except ProtocolError as fault:
                self._fault(step, "announce", name, fault)
            else:
                self.clients.event("announced", step, client=name, fingerprint=shown)

    def _prepared(self, step: Step, clients: Mapping[str, str], layout: Layout) -> ServerRound:
        """The round with the replies of those who have prepared; the members are not fixed."""
        config = self.clients.experiment
        terms = RoundTerms(
            run=self.keys.run,
            number=self.keys.next_number(),
            cohort=tuple(sorted(map(self.keys.site, clients))),
            colluding=config.privacy.colluding,
            min_cohort=self._least(),
            bits=layout.bits,
            length=layout.length,
            layout=layout.digest,
        )
        names, sites = sorted(clients), config.federation.sites
        request, called = terms.to_bytes(), [sites[int(name)] if sites else name for name in names]
        shown = [self.keys.announcement(name) for name in names]
        records = {
            name: ConfigRecord({REQUEST: request, ANNOUNCEMENTS: shown, NAMES: called})
            for name in names
        }
        replies = self._ask(step, "prepare", records, self._needed(set(names)), clients)
        held = stages.open_round(terms)
        return self._added(step, "prepare", held, replies, stages.add_prepared)

    def masked_input_requests(self, held: ServerRound) -> dict[str, ConfigRecord]:
        """Return client to the record that its training request carries."""
        members = self._clients(held, held.members)
        return {
            name: ConfigRecord({REQUEST: stages.mask_request(held, site)})
            for name, site in members.items()
        }

    def add_masked_input(self, held: ServerRound, client: str, reply: bytes) -> ServerRound:
        """Return the round with a client's masked vector, or raise a ProtocolError: MaskedInput."""
        return stages.add_masked(held, self.keys.site(client), reply)

    def unmask(self, step: Step, held: ServerRound) -> Words:
        """Return the sum over those whose masked vectors have arrived: ConsistencyCheck and Unmask.

        Raises:
            BelowThreshold: too few are left.
            ProtocolError: shares that do not fit.
        """
        held = stages.close_masked(held)
        self._save(step, held)
        for exchange, request, add in (
            ("confirm", stages.confirm_request, stages.add_confirmed),
            ("unmask", stages.unmask_request, stages.add_unmasked),
        ):
            # Nobody but those who have confirmed may answer the last exchange.
            asked = self._clients(
                held, held.survivors if exchange == "confirm" else held.confirmers
            )
            records = {
                name: ConfigRecord({REQUEST: request(held, site)}) for name, site in asked.items()
            }
            replies = self._ask(step, exchange, records, held.terms.threshold)
            held = self._added(step, exchange, held, replies, add)
            if exchange == "confirm":
                held = stages.close_confirmed(held)
                self._save(step, held)
        total = stages.unmasked_sum(held)
        summed, cohort = len(held.survivors or ()), len(held.terms.cohort)
        self.clients.event("summed", step, sites=summed, cohort=cohort)
        return total

    def given(self, held: ServerRound) -> list[str]:
        """Return the clients whose masked vectors have arrived."""
        return list(self._clients(held, held.masked))

    def sits_out(self, step: Step, client: str, task: str, reason: wire.ClientSkipped) -> None:
        """Note that a client takes no part; it is not counted on again in the task, unless its
        update is in another sum, which is of this round alone."""
        if reason.code != UsedUpdate.code:
            self.idle.setdefault(task, set()).add(client)
        self.clients.event("client_idle", step, client=client, code=reason.code)

    def note_blame(
        self, step: Step, held: ServerRound, client: str, message: Message | None, task: str
    ) -> bool:
        """Return whether a client refuses the round because of another site's part in it. Of whom
        more say so than may collude, two at least, is not counted on again in the task: one of them
        is honest, and a single one could accuse them all, one after another."""
        site = wire.blamed(message)
        if site not in held.terms.cohort:
            return False
        (accused,) = self.keys.clients_of([site])
        if accused == client:
            return False
        self.clients.event("client_blamed", step, client=accused, by=client)
        by = self.accusers.setdefault(site, set())
        by.add(client)
        if len(by) > max(1, self.clients.experiment.privacy.colluding):
            self.idle.setdefault(task, set()).add(accused)
        return True

    def _least(self) -> int:
        return fewest_clients(self.clients.experiment)

    def _needed(self, clients: set[str]) -> int:
        """How many clients a round waits for: the quorum, and as many as a sum needs."""
        config, number = self.clients.experiment, len(clients)
        needed = max(self._least(), threshold(number, config.privacy.colluding))
        return min(number, max(needed, ceil(config.federation.quorum * number)))

    def _added(
        self,
        step: Step,
        exchange: str,
        held: ServerRound,
        replies: list[tuple[str, bytes]],
        add: Add,
    ) -> ServerRound:
        for name, data in replies:
            try:
                held = add(held, self.keys.site(name), data)
            except ProtocolError as fault:
                self._fault(step, exchange, name, fault)
        return held

    def _ask(
        self,
        step: Step,
        exchange: str,
        records: Mapping[str, ConfigRecord],
        least: int,
        tasks: Mapping[str, str] | None = None,
    ) -> list[tuple[str, bytes]]:
        """Return client and reply of those that count, once ``least`` are connected; with ``tasks``
        who takes no part is not counted on again. A site that knows no key of the others may train
        in the clear: its class sums stay there, as by its policy."""
        nodes = self.clients.roster.present(set(records), least) if records else {}
        seconds = min(REPLY_SECONDS, self.clients.experiment.federation.deadline_seconds)
        kind = f"{MessageType.QUERY}.{exchange}"
        requests = {
            name: Message(RecordDict({SECURE: record}), nodes[name], kind, ttl=seconds)
            for name, record in records.items()
            if name in nodes
        }
        for name in records.keys() - requests.keys():
            self._fault(step, exchange, name, UserError("not connected"))
        replies: dict[str, bytes] = {}
        idle = {UnpinnedPeer.code} if tasks is not None and step.phase != LEARN else set()
        for reply in wire.collect(self.clients.grid, requests, seconds):
            client = reply.client
            try:
                replies[client] = wire.read_secure(reply.answered(), idle)
                if tasks is not None:
                    self.clients.refuses[client] = False
            except wire.ClientSkipped as reason:
                if tasks is not None:
                    self.clients.refuses[client] = reason.code == wire.BY_POLICY
                    self.idle.setdefault(tasks[client], set()).add(client)
                self.clients.event("client_idle", step, client=client, code=reason.code)
            except ValueError as fault:
                self._fault(step, exchange, client, fault)
        return [(name, replies[name]) for name in records if name in replies]

    def _fault(self, step: Step, exchange: str, client: str, fault: Exception) -> None:
        """Log that a client is out of the round, or, its update in the sum, missed an exchange."""
        event = "client_failed" if exchange in ("announce", "prepare") else "exchange_failed"
        self.clients.event(event, step, client=client, exchange=exchange, reason=str(fault)[:400])

    def _clients(self, held: ServerRound, positions: tuple[int, ...] | None) -> dict[str, bytes]:
        return self.keys.clients_of(held.terms.cohort[at] for at in positions or ())

    def _path(self, step: Step) -> Path:
        return self.folder / "secure" / f"{step.phase}-{step.stage}-{step.server_round}.round"

    def _save(self, step: Step, held: ServerRound) -> None:
        path = self._path(step)
        atomic_write(path, held.to_bytes(), mode=0o600, for_good=True)
        for old in path.parent.glob("*.round"):
            if old != path:
                old.unlink()

    def _load(self, step: Step, layout: Layout) -> ServerRound | None:
        """The round as it was left, its members fixed; None where it has not come so far."""
        path = self._path(step)
        if not path.exists():
            return None
        held = ServerRound.from_bytes(path.read_bytes())
        known = self.keys.clients_of(held.terms.cohort)
        same = len(known) == len(held.terms.cohort) and held.terms.layout == layout.digest
        return held if same else None


def fewest_clients(experiment: Experiment) -> int:
    """Return of how many clients a masked sum is at least: two beside those that may collude; where
    the noise is in it, all but those that may fail."""
    honest = experiment.privacy.colluding + 2
    return max(LEAST_SITES, experiment.aggregation.min_cohort, honest, fewest_in_sum(experiment))
