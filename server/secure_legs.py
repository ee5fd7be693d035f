"""The server's legs of a secure sum: who takes part, who has survived, and the sum.

What it holds of a round is on the disk after every leg that fixes something: a server that starts
again goes on with the same terms, and sites answer the same requests with the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from deal_core.errors import UserError
from deal_core.privacy.accounting.plan import at_server
from deal_core.secure_sum import server_legs as legs
from deal_core.secure_sum.identity import Announcement
from deal_core.secure_sum.layout import Layout
from deal_core.secure_sum.masks import Words
from deal_core.secure_sum.protocol_error import ProtocolError
from deal_core.secure_sum.server_round import ServerRound, open_round
from deal_core.secure_sum.terms import RoundTerms
from deal_core.secure_sum.unmasking import unmasked_sum
from deal_core.whole_file import write_whole
from deal_core.wire.secure_record import ANNOUNCEMENTS, REQUEST, RUN, SECURE
from server import wire
from server.exchange import Exchange, answered
from server.reply_collection import collect
from server.schedule import Step

LEAST_SITES = 3
"""In a sum of two each knows the other's part."""
Add = Callable[[ServerRound, bytes, bytes], ServerRound]


@dataclass(frozen=True)
class SecureLegs:
    """The secure sums of a run.

    Attributes:
        exchange: with the clients.
        folder: of the run.
        announcements: client to its signed channel key, as far as it is known.
    """

    exchange: Exchange
    folder: Path
    announcements: dict[str, bytes] = field(default_factory=dict)

    def open(self, step: Step, clients: Mapping[str, str], layout: Layout) -> ServerRound:
        """Return the round after its first leg: the members are fixed.

        Args:
            step: which round of the run.
            clients: client to task.
            layout: of the vectors.

        Raises:
            BelowThreshold: too few take part.
        """
        self._meet(step, list(clients))
        held = self._load(step)
        if held is None:
            held = open_round(self._terms(layout))
        if held.members is None:
            terms = {name: held.terms.to_bytes() for name in self._named(held.terms.cohort)}
            held = self._leg(step, "prepare", terms, held, legs.add_prepared)
            held = legs.close_prepared(held)
            self._save(step, held)
        return held

    def mask_requests(self, held: ServerRound) -> dict[str, ConfigRecord]:
        """Return client to the record that its training request carries."""
        members = [held.terms.cohort[position] for position in held.members or ()]
        return {
            name: ConfigRecord({REQUEST: legs.mask_request(held, site)})
            for name, site in self._named(members).items()
        }

    def add(self, held: ServerRound, client: str, message: Message) -> ServerRound:
        """Return the round with a client's masked vector.

        Raises:
            ProtocolError, PayloadError: it does not count.
        """
        return legs.add_masked(held, self._site(client), wire.read_secure(message))

    def total(self, step: Step, held: ServerRound) -> Words:
        """Return the sum over those whose masked vectors have arrived.

        Raises:
            BelowThreshold: too few are left.
            ProtocolError: shares that do not fit.
        """
        held = legs.close_masked(held)
        self._save(step, held)
        survivors = self._named([held.terms.cohort[at] for at in held.survivors or ()])
        asked = {name: legs.confirm_request(held, site) for name, site in survivors.items()}
        held = legs.close_confirmed(self._leg(step, "confirm", asked, held, legs.add_confirmed))
        self._save(step, held)
        asked = {name: legs.unmask_request(held, site) for name, site in survivors.items()}
        held = self._leg(step, "unmask", asked, held, legs.add_unmasked)
        return unmasked_sum(held)

    def _meet(self, step: Step, clients: list[str]) -> None:
        """Learn the channel keys of clients that have not told theirs."""
        missing = [name for name in clients if name not in self.announcements]
        records = {name: ConfigRecord({RUN: self.run}) for name in missing}
        for name, data in self._ask(step, "announce", records).items():
            try:
                Announcement.from_bytes(data)
            except ProtocolError as fault:
                self._refuse(step, name, fault)
            else:
                self.announcements[name] = data

    @property
    def run(self) -> str:
        """Name of the run, as sites know it."""
        return self.folder.name

    def _terms(self, layout: Layout) -> RoundTerms:
        config, sites = self.exchange.experiment, sorted(map(self._site, self.announcements))
        privacy, clients = config.privacy, config.federation.clients
        least = clients - privacy.dropouts if at_server(config) else LEAST_SITES
        return RoundTerms(
            run=self.run,
            number=time.time_ns() // 1000,  # grows, whatever has been forgotten
            cohort=tuple(sites),
            colluding=privacy.colluding,
            min_cohort=max(LEAST_SITES, min(least, len(sites))),
            bits=layout.bits,
            length=layout.length,
            layout=layout.digest,
        )

    def _leg(
        self, step: Step, leg: str, asked: Mapping[str, bytes], held: ServerRound, add: Add
    ) -> ServerRound:
        """The round with all valid replies of a leg."""
        records = {name: ConfigRecord({REQUEST: data}) for name, data in asked.items()}
        if leg == "prepare":
            known = list(self.announcements.values())
            for record in records.values():
                record[ANNOUNCEMENTS] = known
        for name, data in self._ask(step, leg, records).items():
            try:
                held = add(held, self._site(name), data)
            except ProtocolError as fault:
                self._refuse(step, name, fault)
        return held

    def _ask(self, step: Step, leg: str, records: Mapping[str, ConfigRecord]) -> dict[str, bytes]:
        """Return the replies' bytes, by client, of those that count."""
        nodes = self.exchange.roster.present(set(records), len(records))
        seconds = self.exchange.experiment.federation.deadline_seconds
        kind = f"{MessageType.QUERY}.{leg}"
        requests = {
            name: Message(RecordDict({SECURE: record}), nodes[name], kind, ttl=seconds)
            for name, record in records.items()
            if name in nodes
        }
        replies: dict[str, bytes] = {}
        for reply in collect(self.exchange.grid, requests, seconds):
            if reply.dropped:
                continue
            try:
                replies[reply.client] = wire.read_secure(answered(reply))
            except (UserError, ValueError) as fault:
                self._refuse(step, reply.client, fault)
        return {name: replies[name] for name in records if name in replies}

    def _refuse(self, step: Step, client: str, fault: Exception) -> None:
        self.exchange.event("client_failed", step, client=client, reason=str(fault)[:400])

    def _site(self, client: str) -> bytes:
        return Announcement.from_bytes(self.announcements[client]).site

    def _named(self, sites: tuple[bytes, ...] | list[bytes]) -> dict[str, bytes]:
        """Client to site, of some sites."""
        own = {name: self._site(name) for name in self.announcements}
        return {name: site for name, site in own.items() if site in sites}

    def _path(self, step: Step) -> Path:
        return self.folder / "secure" / f"{step.phase}-{step.stage}-{step.server_round}.round"

    def _save(self, step: Step, held: ServerRound) -> None:
        path = self._path(step)
        write_whole(path, held.to_bytes(), mode=0o600)
        for old in path.parent.glob("*.round"):
            if old != path:
                old.unlink()

    def _load(self, step: Step) -> ServerRound | None:
        """The round as it was left; None where it has not begun, or its sites are others now."""
        path = self._path(step)
        if not path.exists():
            return None
        held = ServerRound.from_bytes(path.read_bytes())
        return held if len(self._named(held.terms.cohort)) == len(held.terms.cohort) else None
