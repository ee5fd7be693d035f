"""What all sites of a round must agree on, and what a site asks of it before it takes part."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

from deal_core.secure_sum.keys import SITE_BYTES, fingerprint
from deal_core.secure_sum.messages import BelowThreshold, Message, ProtocolError, UnpinnedPeer

RINGS = (32, 64)
"""Bits of a word: sums are taken modulo 2 to this power."""
LONGEST = 2**32
"""Most words of a vector: a counter of the mask stream never comes round."""
LEAST_SITES = 3
"""In a sum of two each knows the other's part."""


@dataclass(frozen=True)
class RoundTerms(Message):
    """The public terms of one round, which are the request of ``prepare``. Every key of the round
    depends on their digest.

    Attributes:
        run: name of the run.
        number: grows with every attempt at a round, also one that failed.
        cohort: the sites, ascending; a site's position in it is its number in all messages.
        colluding: how many of them may work together with the server.
        min_cohort: fewest sites in a sum.
        bits: of a ring word.
        length: words of a vector.
        layout: digest of what the words mean.
    """

    kind = "terms"
    items = MappingProxyType({"cohort": SITE_BYTES})

    run: str
    number: int
    cohort: tuple[bytes, ...]
    colluding: int
    min_cohort: int
    bits: int
    length: int
    layout: bytes

    @property
    def threshold(self) -> int:
        """Shares that give a secret: see :func:`threshold`."""
        return threshold(len(self.cohort), self.colluding)

    @property
    def least(self) -> int:
        """Sites that must take part, and survive, for a sum."""
        return max(self.threshold, self.min_cohort)

    @property
    def context(self) -> bytes:
        """Digest of all terms, 32 bytes."""
        return hashlib.sha256(self.to_bytes()).digest()

    def require_enough(self, sites: int, what: str, least: int) -> None:
        """Check that at least so many sites have done what a sum needs; else BelowThreshold."""
        if sites < least:
            raise BelowThreshold(
                f"round {self.number}: {sites} of {len(self.cohort)} sites {what}, below the "
                f"{least} that a sum needs: the round ends without one"
            )

    def position(self, site: bytes) -> int:
        """Return the number of a site; ProtocolError where it is not in the cohort."""
        if site not in self.cohort:
            raise ProtocolError("this site is not in the cohort of the round", site)
        return self.cohort.index(site)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Return the terms that the bytes state.

        Raises:
            ProtocolError: they state none, or impossible ones.
        """
        terms = super().from_bytes(data)
        check_terms(terms)
        if terms.to_bytes() != data:
            raise ProtocolError("terms are not written in their one form")
        return terms


def threshold(sites: int, colluding: int) -> int:
    """Return the smallest ``t`` with ``2 t > sites + colluding``.

    Of ``sites - colluding`` honest sites, ``t - colluding`` must answer before a secret is known;
    two different answers would need twice as many, more than there are. Source:
    docs/secure-aggregation.md.
    """
    return (sites + colluding) // 2 + 1


def check_terms(terms: RoundTerms) -> None:
    """Accept possible terms; ProtocolError says what is wrong with others."""
    sites = len(terms.cohort)
    if list(terms.cohort) != sorted(set(terms.cohort)):
        raise ProtocolError("the cohort names a site twice, or is not in ascending order")
    if sites < 2:
        raise ProtocolError("a sum of one site is that site's vector")
    if terms.colluding > sites - 2:
        raise ProtocolError(
            f"{terms.colluding} colluding of {sites} sites leave no two honest ones: nothing hides"
        )
    if not 2 <= terms.min_cohort <= sites:
        raise ProtocolError(
            f"min_cohort = {terms.min_cohort} is not between 2 and the cohort of {sites} sites"
        )
    if terms.bits not in RINGS:
        raise ProtocolError(f"a ring of {terms.bits} bits is unknown; known: 32, 64")
    if not 0 < terms.length <= LONGEST:
        raise ProtocolError(f"a vector of {terms.length} words is empty or too long")
    if len(terms.layout) != hashlib.sha256().digest_size:
        raise ProtocolError("the digest of a layout has 32 bytes")


@dataclass(frozen=True)
class SitePolicy:
    """The site's own conditions.

    Attributes:
        min_cohort: fewest sites in a sum.
        colluding: how many of the others this site expects to work with the server, at least.
        known: the sites that this one knows today, itself among them; None: it trusts the server
            not to pose as a site.
    """

    min_cohort: int = LEAST_SITES
    colluding: int = 0
    known: frozenset[bytes] | None = None

    def check(self, terms: RoundTerms) -> None:
        """Accept the terms of a round.

        Raises:
            UnpinnedPeer: a site of the cohort is not known, or no longer.
            ProtocolError: they are weaker than the policy.
        """
        strangers = set() if self.known is None else set(terms.cohort) - self.known
        for site in sorted(strangers):
            shown = fingerprint(site)
            raise UnpinnedPeer(
                f"site {shown} is of the round, and not among the pinned peers", site
            )
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
