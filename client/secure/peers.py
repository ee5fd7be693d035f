"""The other sites of a secure sum: whose keys a client accepts, and what to do about the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from client.context import RequestContext
from client.site_file import NAME
from deal_core.secure_sum.identity import Pins, fingerprint, site_of_fingerprint
from deal_core.secure_sum.protocol_error import UnpinnedPeer
from deal_core.secure_sum.site_run import meet_peers
from deal_core.secure_sum.site_state import SiteState


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
