"""A client's part in the secure sums of a run, but for the masked input: keys, shares, agreement.

Source: docs/secure-aggregation.md. The protocol itself is :mod:`deal_core.secure_sum`; here its
requests are read from the server's messages, its states are kept, and its conditions taken from
what the site has decided: whose keys it accepts, and which rounds. Nothing here loads a model: a
process that answers these legs starts in a second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message

from client.context import RequestContext
from client.gate import require_policy
from client.secure.store import SecureStore
from client.site_file import NAME
from deal_core.config.experiment import Experiment, fewest_in_sum, may_take_sums
from deal_core.lora.payload import PayloadError
from deal_core.secure_sum import site_round
from deal_core.secure_sum.keys import Pins, fingerprint, site_of, site_of_fingerprint
from deal_core.secure_sum.messages import ConfirmRequest, UnmaskRequest, UnpinnedPeer
from deal_core.secure_sum.site_state import Answer, SiteState, meet_peers, open_run
from deal_core.secure_sum.terms import LEAST_SITES, SitePolicy
from deal_core.wire.records import ANNOUNCEMENTS, NAMES, REQUEST, RUN, SECURE

Read = Callable[[bytes], ConfirmRequest | UnmaskRequest]
LATER_LEGS: Mapping[str, tuple[Read, Callable[[SiteState, bytes], Answer]]] = {
    "confirm": (ConfirmRequest.from_bytes, site_round.confirm),
    "unmask": (UnmaskRequest.from_bytes, site_round.unmask),
}
"""Leg to what reads its request, and what answers it."""


def announcement(place: RequestContext, message: Message) -> bytes:
    """Return the client's signed channel key of the run; the same each time, as long as the site
    has the same key.

    Raises:
        PayloadError: no name of a run, or another than this client's.
        ProtocolError: the site has lost what it kept of the run, and sits it out.
    """
    store, run = SecureStore(place.folder), run_of(message)
    if place.site is not None and run != place.folder.name:
        raise PayloadError("secure: another run than this client's")
    with store.alone():
        state = store.state()
        if state is None or _renewed(place, state):
            state = open_run(run, _identity(place))
            store.open(state)
        store.note_announced()
    if state.run != run:
        raise PayloadError("secure: another run than this client's")
    return state.announcement


def leg_reply(place: RequestContext, experiment: Experiment, message: Message, leg: str) -> bytes:
    """Return the reply of ``prepare``, ``confirm`` or ``unmask``; what it depends on is on the disk
    before.

    Raises:
        Refusal: the site takes no part in such an experiment, today.
        ProtocolError: the request is refused; nothing is revealed.
        PayloadError: it is no request.
    """
    if not (experiment.aggregation.secure or may_take_sums(experiment)):
        raise PayloadError("secure: not in this run")
    store, request = SecureStore(place.folder), request_of(message)
    with store.alone():
        state = announced_state(store)
        require_policy(experiment, place.policy)
        if leg == "prepare":
            answered = _prepared(place, experiment, message, state)
        else:
            read, answer = LATER_LEGS[leg]
            terms = state.round_of(read(request).context).terms
            conditions(place, experiment).check(terms)
            answered = answer(state, request)
        store.keep(answered.state)
    return answered.reply


def announced_state(store: SecureStore) -> SiteState:
    """Return what is kept of the run.

    Raises:
        PayloadError: nothing: the client has not announced itself, or has lost its state, and sits
            the run out.
    """
    state = store.state()
    if state is None:
        raise PayloadError("secure: nothing is kept of this run; this client sits it out")
    return state


def conditions(place: RequestContext, experiment: Experiment) -> SitePolicy:
    """Return what the site asks of a round: what it has decided, and what its noise counts on."""
    policy, privacy = place.policy, experiment.privacy
    least, colluding = max(LEAST_SITES, fewest_in_sum(experiment)), privacy.colluding
    if policy is not None:
        least, colluding = max(least, policy.min_cohort), max(colluding, policy.colluding)
    return SitePolicy(least, colluding, known=_known(place))


def met(
    place: RequestContext, state: SiteState, announced: Sequence[tuple[str, bytes]]
) -> SiteState:
    """Return the state with a channel to each site of a round.

    Args:
        place: which client.
        state: of the client.
        announced: what the server calls each site, and its announcement.

    Raises:
        UnpinnedPeer: sites that the client does not know, each with the cure.
        ProtocolError: an announcement is not its site's, or a second one of the same site.
    """
    pins, unknown = pins_of(place), []
    for name, announcement in announced:
        try:
            state = meet_peers(state, [announcement], pins)
        except UnpinnedPeer as fault:
            peers = place.site.peers if place.site is not None else {}
            unknown.append(cure(name, fingerprint(fault.site), peers))
    if unknown:
        raise UnpinnedPeer("; ".join(unknown))
    return state


def pins_of(place: RequestContext) -> Pins | None:
    """Return the peers that the site knows; None: whoever the server passes on, in a simulation, or
    where the policy says so."""
    if place.site is None:
        return None
    policy = place.site.policy
    if not place.site.peers and policy is not None and policy.server_vouches_for_peers:
        return None
    return {site_of_fingerprint(text): name for name, text in place.site.peers.items()}


def cure(name: str, shown: str, peers: Mapping[str, str]) -> str:
    """Return what to do about a site that is not pinned.

    Args:
        name: what the server calls it; somebody else's word.
        shown: fingerprint of the key that it signs with.
        peers: name to fingerprint, of ``site.toml``.
    """
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


def run_of(message: Message) -> str:
    """Return the name of the run that a client is asked to announce itself for.

    Raises:
        PayloadError: there is none.
    """
    run = _record(message).get(RUN)
    if not isinstance(run, str) or not run:
        raise PayloadError("secure: no name of a run")
    return run


def request_of(message: Message) -> bytes:
    """Return the protocol's own request.

    Raises:
        PayloadError: there is none.
    """
    return _bytes(_record(message).get(REQUEST))


def announcements_of(message: Message) -> list[tuple[str, bytes]]:
    """Return what the server calls each site of a round, and that site's announcement.

    Raises:
        PayloadError: there are none.
    """
    record = _record(message)
    names, announced = _list(record.get(NAMES)), _list(record.get(ANNOUNCEMENTS))
    if len(names) != len(announced):
        raise PayloadError("secure: not one name for each announcement")
    return [(str(name), _bytes(data)) for name, data in zip(names, announced, strict=True)]


def _record(message: Message) -> ConfigRecord:
    records = message.content.config_records if message.has_content() else {}
    if SECURE not in records:
        raise PayloadError("secure: no such record")
    return records[SECURE]


def _bytes(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise PayloadError("secure: no bytes")
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise PayloadError("secure: no list")
    return value


def _prepared(
    place: RequestContext, experiment: Experiment, message: Message, state: SiteState
) -> Answer:
    state = met(place, state, announcements_of(message))
    return site_round.prepare(state, request_of(message), conditions(place, experiment))


def _known(place: RequestContext) -> frozenset[bytes] | None:
    """Return the sites that the site knows today, itself among them (a channel of an earlier round
    is to a peer of that day); None: whoever the server passes on."""
    pins = pins_of(place)
    if pins is None:
        return None
    return frozenset({*pins, site_of(_identity(place).public_key())})


def _renewed(place: RequestContext, state: SiteState) -> bool:
    """Whether the site has another key than when it announced itself: its peers know it by that."""
    return place.site is not None and site_of(_identity(place).public_key()) != state.site


def _identity(place: RequestContext) -> ec.EllipticCurvePrivateKey:
    """The key that the site is registered with; of a simulated client one that nobody knows."""
    if place.site is None:
        return ec.generate_private_key(ec.SECP384R1())
    data = Path(place.site.server.key).read_bytes()
    key = serialization.load_ssh_private_key(data, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise PayloadError("secure: the site's key is no EC key")
    return key
