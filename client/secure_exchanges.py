"""A client's part in the secure sums of a run, but for the masked input: keys, shares, agreement.

Source: docs/secure-aggregation.md. The protocol itself is :mod:`deal_core.secure_sum`; here its
requests are read from the server's messages, its states are kept, and its conditions taken from
what the site has decided: whose keys it accepts, and which rounds. Nothing here loads a model: a
process that answers these exchanges starts in a second.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message

from client.gate import EXPERIMENT, Asked, require
from client.identity import Client, status_reply
from client.site_file import NAME
from client.state import OWNER_ALONE, alone
from deal_core.atomic_write import atomic_write
from deal_core.config.experiment import Experiment, fewest_in_sum, may_take_sums
from deal_core.lora.payload import PayloadError
from deal_core.secure_sum import site_round
from deal_core.secure_sum.keys import Pins, fingerprint, site_of, site_of_fingerprint
from deal_core.secure_sum.messages import ConfirmRequest, ProtocolError, UnmaskRequest, UnpinnedPeer
from deal_core.secure_sum.site_state import SiteState, UsedUpdates, meet_peers, open_run
from deal_core.secure_sum.terms import LEAST_SITES, SitePolicy
from deal_core.wire.records import ANNOUNCEMENTS, NAMES, REPLY, REQUEST, RUN, SECURE

STATE, USED = "secure-sum.state", "secure-sum.used"
ANNOUNCED = "announced"
"""What a backup does have: that the site has announced itself in the run. It is on the disk before
the site is in any sum; updates that it keeps may have left in the clear before its first."""


@dataclass(frozen=True)
class SecureStore:
    """What a client keeps of the secure sums of a run: on the disk for good before a reply leaves.

    Its files are for their owner alone, and for no backup: from an older copy two vectors could be
    masked with one mask. Source: docs/secure-aggregation.md, 'State'.
    """

    folder: Path
    """The client's own, of one run; made when first needed."""

    def alone(self) -> AbstractContextManager[None]:
        """Within the block no other process answers for this client."""
        return alone(self.folder, "secure-sum.lock")

    def state(self) -> SiteState | None:
        """Return the state that is kept, None: there is none; a ProtocolError if it is damaged."""
        path = self.folder / STATE
        return SiteState.from_bytes(path.read_bytes()) if path.exists() else None

    def announced(self) -> SiteState:
        """Return what is kept of the run; a PayloadError where there is nothing: it sits it out."""
        state = self.state()
        if state is None:
            raise PayloadError("secure: nothing is kept of this run; this client sits it out")
        return state

    def keep(self, state: SiteState) -> None:
        """Write the state."""
        self._write(STATE, state.to_bytes())

    def open(self, state: SiteState) -> None:
        """Write the first state of a run, no update being in a sum.

        Raises:
            ProtocolError: the site has announced itself before and has lost what it kept; with a
                new state an update that is in a sum could enter a second one.
        """
        if self._lost():
            raise ProtocolError("what this site kept of the run is lost; it sits the run out")
        if not (self.folder / USED).exists():
            self.keep_used(UsedUpdates())
        self.keep(state)

    def note_announced(self) -> None:
        """Write, once, that there is a state."""
        if not (self.folder / ANNOUNCED).exists():
            self._write(ANNOUNCED, b"")

    def _lost(self) -> bool:
        """Whether there was a state that is no longer here."""
        return (self.folder / ANNOUNCED).exists() and not (self.folder / STATE).exists()

    def used(self) -> UsedUpdates:
        """Return which updates are in a sum; a ProtocolError where the record is lost."""
        path = self.folder / USED
        if not path.exists():
            raise ProtocolError("the record of summed updates is lost; this site sits the run out")
        return UsedUpdates.from_bytes(path.read_bytes())

    def keep_used(self, used: UsedUpdates) -> None:
        """Write which updates are in a sum."""
        self._write(USED, used.to_bytes())

    def _write(self, name: str, data: bytes) -> None:
        atomic_write(self.folder / name, data, OWNER_ALONE, for_good=True)


def announcement(client: Client, message: Message) -> bytes:
    """Return the client's signed channel key of the run; the same each time, as long as the site
    has the same key.

    Raises:
        PayloadError: no name of a run, or another than this client's.
        ProtocolError: the site has lost what it kept of the run, and sits it out.
    """
    store, run = SecureStore(client.folder), _record(message).get(RUN)
    if not isinstance(run, str) or not run:
        raise PayloadError("secure: no name of a run")
    if client.file is not None and run != client.folder.name:
        raise PayloadError("secure: another run than this client's")
    with store.alone():
        state = store.state()
        # its peers know the site by the key that it announced itself with
        known = state is not None and (client.file is None or _own_site(client) == state.site)
        if state is None or not known:
            state = open_run(run, _identity(client))
            store.open(state)
        store.note_announced()
    if state.run != run:
        raise PayloadError("secure: another run than this client's")
    return state.announcement


def exchange_reply(client: Client, message: Message, exchange: str) -> bytes:
    """Return the reply of ``prepare``, ``confirm`` or ``unmask``; what it depends on is on the disk
    before.

    Raises:
        Refusal: the site takes no part in such an experiment, today.
        ProtocolError: the request is refused; nothing is revealed.
        PayloadError: it is no request.
    """
    experiment = client.experiment
    if not (experiment.aggregation.secure or may_take_sums(experiment)):
        raise PayloadError("secure: not in this run")
    store, request = SecureStore(client.folder), request_of(message)
    with store.alone():
        state = store.announced()
        require(Asked(experiment, client.policy), *EXPERIMENT)
        wanted = conditions(client, experiment)
        if exchange == "prepare":
            answered = site_round.prepare(_met(client, state, message), request, wanted)
        elif exchange == "confirm":
            wanted.check(state.round_of(ConfirmRequest.from_bytes(request).context).terms)
            answered = site_round.confirm(state, request)
        else:
            wanted.check(state.round_of(UnmaskRequest.from_bytes(request).context).terms)
            answered = site_round.unmask(state, request)
        store.keep(answered.state)
    return answered.reply


def secure_reply(message: Message, made: bytes) -> Message:
    """Return a reply of the protocol of secure sums."""
    reply = status_reply(message, "ok")
    reply.content[SECURE] = ConfigRecord({REPLY: made})
    return reply


def conditions(client: Client, experiment: Experiment) -> SitePolicy:
    """Return what the site asks of a round: what it has decided, and what its noise counts on; of
    the sites that it knows today, itself among them (a channel of an earlier round is to a peer of
    that day)."""
    policy, pins = client.policy, _pins(client)
    least, colluding = max(LEAST_SITES, fewest_in_sum(experiment)), experiment.privacy.colluding
    if policy is not None:
        least, colluding = max(least, policy.min_cohort), max(colluding, policy.colluding)
    known = None if pins is None else frozenset({*pins, _own_site(client)})
    return SitePolicy(least, colluding, known=known)


def _met(client: Client, state: SiteState, message: Message) -> SiteState:
    pins, unknown, record = _pins(client), [], _record(message)
    names, announced = record.get(NAMES), record.get(ANNOUNCEMENTS)
    if not isinstance(names, list) or not isinstance(announced, list):
        raise PayloadError("secure: no list")
    if len(names) != len(announced):
        raise PayloadError("secure: not one name for each announcement")
    for name, data in zip(names, announced, strict=True):
        try:
            state = meet_peers(state, [_bytes(data)], pins)
        except UnpinnedPeer as fault:
            peers = client.file.peers if client.file is not None else {}
            unknown.append(cure(str(name), fingerprint(fault.site), peers))
    if unknown:
        raise UnpinnedPeer("; ".join(unknown))
    return state


def _pins(client: Client) -> Pins | None:
    """The peers that the site knows; None: it takes whom the server passes on."""
    policy = client.policy
    if client.file is None or (policy is not None and policy.server_vouches_for_peers):
        return None
    return {site_of_fingerprint(text): name for name, text in client.file.peers.items()}


def cure(name: str, shown: str, peers: Mapping[str, str]) -> str:
    """Return what to do about a site that is not pinned: its ``name``, the server's word, the
    fingerprint ``shown``, and the ``peers`` of ``site.toml``."""
    name = name if NAME.fullmatch(name) else "?"
    if name in peers:
        return (
            f"the server says that site '{name}' has the key {shown}, and [peers] of site.toml has "
            f"{peers[name]}: telephone that institution; if it has a new key, write that there, "
            "else somebody stands between"
        )
    return (
        f"site '{name}' (so the server calls it) is not in [peers] of site.toml: compare {shown} "
        f'with that institution by telephone, then add "{name}" = "{shown}"'
    )


def request_of(message: Message) -> bytes:
    """Return the protocol's own request, or raise a PayloadError: there is none."""
    return _bytes(_record(message).get(REQUEST))


def _record(message: Message) -> ConfigRecord:
    records = message.content.config_records if message.has_content() else {}
    if SECURE not in records:
        raise PayloadError("secure: no such record")
    return records[SECURE]


def _bytes(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise PayloadError("secure: no bytes")
    return value


def _own_site(client: Client) -> bytes:
    return site_of(_identity(client).public_key())


def _identity(client: Client) -> ec.EllipticCurvePrivateKey:
    """The key that the site is registered with; of a simulated client one that nobody knows."""
    if client.file is None:
        return ec.generate_private_key(ec.SECP384R1())
    data = Path(client.file.server.key).read_bytes()
    key = serialization.load_ssh_private_key(data, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise PayloadError("secure: the site's key is no EC key")
    return key
