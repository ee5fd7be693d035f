"""A client's part in the secure sums of a run: keys, masks, and what takes the masks away.

Source: docs/secure-aggregation.md. The protocol itself is :mod:`deal_core.secure_sum`; here its
states are kept, and its conditions taken from what the site has decided.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message

from client.context import RequestContext
from client.secure_store import SecureStore
from deal_core.config.experiment import Experiment
from deal_core.lora.payload import PayloadError
from deal_core.privacy.accounting.plan import at_server
from deal_core.randomness import seeded_numpy
from deal_core.secure_sum import site_round
from deal_core.secure_sum.identity import Pins, site_of_fingerprint
from deal_core.secure_sum.layout import Layout
from deal_core.secure_sum.leg_order import Answer
from deal_core.secure_sum.messages import MaskRequest
from deal_core.secure_sum.site_policy import SitePolicy
from deal_core.secure_sum.site_run import meet_peers, open_run
from deal_core.secure_sum.site_state import SiteState
from deal_core.wire.secure_record import ANNOUNCEMENTS, REQUEST, RUN, SECURE

LEAST_SITES = 3
"""In a sum of two each knows the other's part."""


def announcement(place: RequestContext, message: Message) -> bytes:
    """Return the client's signed channel key of the run; the same each time.

    Raises:
        PayloadError: no name of a run, or another than this client's.
    """
    store, run = SecureStore(place.folder), str(_record(message).get(RUN, ""))
    if not run or (place.site is not None and run != place.folder.name):
        raise PayloadError("secure: another run than this client's")
    with store.alone():
        state = store.state(lambda: open_run(run, _identity(place)))
    if state.run != run:
        raise PayloadError("secure: another run than this client's")
    return state.announcement


def leg_reply(place: RequestContext, experiment: Experiment, message: Message, leg: str) -> bytes:
    """Return the reply of ``prepare``, ``confirm`` or ``unmask``; what it depends on is on the disk
    before.

    Raises:
        ProtocolError: the request is refused; nothing is revealed.
        PayloadError: it is no request.
    """
    store, request = SecureStore(place.folder), _request(message)
    with store.alone():
        state = store.state(_not_announced)
        if leg == "prepare":
            peers = _record(message).get(ANNOUNCEMENTS, [])
            state = meet_peers(state, [_bytes(each) for each in _list(peers)], _pins(place))
            answered = site_round.prepare(state, request, _policy(place, experiment))
        elif leg == "confirm":
            answered = site_round.confirm(state, request)
        else:
            answered = site_round.unmask(state, request)
        return _kept(store, answered)


def require_maskable(place: RequestContext, message: Message, update: str) -> None:
    """Check, before anything is trained or charged, that the update can be masked.

    Raises:
        ProtocolError: no such round, or the update is in a sum already.
        PayloadError: no request.
    """
    store, context = SecureStore(place.folder), MaskRequest.from_bytes(_request(message)).context
    with store.alone():
        store.state(_not_announced).round_of(context)
        store.used().masking(context, update)


def masked_reply(
    place: RequestContext,
    experiment: Experiment,
    message: Message,
    update: str,
    layout: Layout,
    arrays: dict[str, np.ndarray],
    where: tuple[int, int],
) -> bytes:
    """Return the masked vector of an update.

    Args:
        place: which client.
        experiment: of the run.
        message: has the request of the leg ``mask``.
        update: name of the update, which is in one sum alone.
        layout: of the vector.
        arrays: the update by the layout's names.
        where: stage and round, for the seed of the rounding.

    Raises:
        ProtocolError: the request is refused, or the update is in another sum.
    """
    store, request = SecureStore(place.folder), _request(message)
    generator = seeded_numpy(experiment.run.seed, "secure rounding", place.client, *where)
    encoded = layout.encode(arrays, generator)
    with store.alone():
        answered = site_round.mask(store.state(_not_announced), request, encoded)
        context = MaskRequest.from_bytes(request).context
        store.keep_used(store.used().masking(context, update))
        return _kept(store, answered)


def _kept(store: SecureStore, answered: Answer) -> bytes:
    store.keep(answered.state)
    return answered.reply


def _not_announced() -> SiteState:
    raise PayloadError("secure: this client has not announced itself")


def _policy(place: RequestContext, experiment: Experiment) -> SitePolicy:
    """What the site asks of a round: what it has decided, and what its noise counts on."""
    policy, privacy = (place.site.policy if place.site else None), experiment.privacy
    least, colluding = LEAST_SITES, privacy.colluding
    if policy is not None:
        least, colluding = max(least, policy.min_cohort), max(colluding, policy.colluding)
    if at_server(experiment):
        least = max(least, experiment.federation.clients - privacy.dropouts)
    return SitePolicy(least, colluding)


def _pins(place: RequestContext) -> Pins | None:
    """Return the peers that the site knows; None: whoever the server passes on, in a simulation, or
    where the policy says so."""
    if place.site is None:
        return None
    policy = place.site.policy
    if not place.site.peers and policy is not None and policy.server_vouches_for_peers:
        return None
    return {site_of_fingerprint(text): name for name, text in place.site.peers.items()}


def _identity(place: RequestContext) -> ec.EllipticCurvePrivateKey:
    """The key that the site is registered with; of a simulated client one that nobody knows."""
    if place.site is None:
        return ec.generate_private_key(ec.SECP384R1())
    data = Path(place.site.server.key).read_bytes()
    key = serialization.load_ssh_private_key(data, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise PayloadError("secure: the site's key is no EC key")
    return key


def _record(message: Message) -> ConfigRecord:
    records = message.content.config_records if message.has_content() else {}
    if SECURE not in records:
        raise PayloadError("secure: no such record")
    return records[SECURE]


def _request(message: Message) -> bytes:
    return _bytes(_record(message).get(REQUEST))


def _bytes(value: object) -> bytes:
    if not isinstance(value, bytes):
        raise PayloadError("secure: no bytes")
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise PayloadError("secure: no list")
    return value
