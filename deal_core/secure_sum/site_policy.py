"""What a site asks of a round before it takes part; a message cannot change it."""

from __future__ import annotations

from dataclasses import dataclass

from deal_core.secure_sum.identity import fingerprint
from deal_core.secure_sum.protocol_error import ProtocolError, UnpinnedPeer
from deal_core.secure_sum.terms import RoundTerms

LEAST_SITES = 3
"""In a sum of two each knows the other's part."""


@dataclass(frozen=True)
class SitePolicy:
    """The site's own conditions.

    Attributes:
        min_cohort: fewest sites in a sum.
        colluding: how many of the others this site expects to work with the server, at least.
        confirm: whether survivors must agree before they reveal (a server that may lie). False
            only where the server is trusted to tell all sites the same.
        known: the sites that this one knows today, itself among them; None: it trusts the server
            not to pose as a site.
    """

    min_cohort: int = LEAST_SITES
    colluding: int = 0
    confirm: bool = True
    known: frozenset[bytes] | None = None

    def check(self, terms: RoundTerms) -> None:
        """Accept the terms of a round.

        Raises:
            UnpinnedPeer: a site of the cohort is not known, or no longer.
            ProtocolError: they are weaker than the policy.
        """
        if self.known is not None:
            for site in terms.cohort:
                _require_known(site, self.known)
        if len(terms.cohort) < self.min_cohort:
            raise ProtocolError(
                f"a cohort of {len(terms.cohort)} sites is below this site's "
                f"min_cohort = {self.min_cohort}"
            )
        if terms.min_cohort < self.min_cohort:
            raise ProtocolError(
                f"the round would sum {terms.min_cohort} sites, this site's policy asks for "
                f"min_cohort = {self.min_cohort}"
            )
        if terms.colluding < self.colluding:
            raise ProtocolError(
                f"the round reckons with {terms.colluding} colluding sites, this site's policy "
                f"with {self.colluding}"
            )
        if self.confirm and not terms.confirm:
            raise ProtocolError(
                "the round does without agreement on the survivors, which this site's policy asks "
                "for"
            )


def _require_known(site: bytes, known: frozenset[bytes]) -> None:
    if site not in known:
        shown = fingerprint(site)
        raise UnpinnedPeer(f"site {shown} is of the round, and not among the pinned peers", site)
