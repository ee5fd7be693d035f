"""Mechanism ``none``: ordinary gradients; what leaves carries no guarantee, and is noted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from deal_core.config.privacy import PrivacyConfig
from deal_core.privacy.distributed_noise import NoisySum, shares_without_mechanism
from deal_core.privacy.events import CLEAR_COUNTS, unprotected_event
from deal_core.privacy.interface import (
    Counts,
    Gradients,
    LocalUpdate,
    Refusal,
    Site,
    Train,
    UpdateRequest,
)
from deal_core.privacy.noise import NoiseSource, SecureNoise, SeededNoise
from deal_core.privacy.policy import figures_allowed, metrics_allowed, require_floor
from deal_core.randomness import seeded


@dataclass(frozen=True)
class NoMechanism:
    """No protection."""

    privacy: PrivacyConfig
    run: str
    """Its name in a ledger."""
    seed: int
    """Of a simulated client's noise."""
    at_server: bool
    """Whether a round is one sum, for a step at the server."""
    secure: bool
    """Whether updates leave in a secure sum."""
    ordinary: Callable[[UpdateRequest], Gradients]
    """Gradients for the epochs of the run."""
    unit: str | None = None

    def trained(self, factors: frozenset[str]) -> frozenset[str]:
        """Return the factors of the rule."""
        return factors

    def update(self, ask: UpdateRequest, site: Site, train: Train) -> LocalUpdate:
        """Return what was trained, for what the site's policy lets go; a site notes that it did so.

        Raises:
            Refusal: there is nothing to learn from, or fewer records than the policy lets go
                without protection.
        """
        if not ask.data:
            raise Refusal("no-data", f"no records of task '{ask.task}'")
        require_floor(len(ask.data), self.privacy, site.policy)
        update = train(self._gradients(ask, site))
        note_unprotected(self.run, ask, site, "none")
        return replace(update, figures=figures_allowed(update.figures, site.policy, self.secure))

    def _gradients(self, ask: UpdateRequest, site: Site) -> Gradients | NoisySum:
        """Return ordinary gradients; class sums over all records, with the site's share of the
        noise; or, for a step at the server, the sum of clipped gradients without noise: of all
        records at a real site, since the run's seed, the server's word, would choose a sample."""
        place = ask.client, ask.stage, ask.server_round
        rate, shares = 1.0, 1
        noise: NoiseSource = SecureNoise()
        if ask.sums_noise is not None:
            shares = shares_without_mechanism(ask.sites, self.privacy.colluding)
            if site.simulated:
                noise = SeededNoise(seeded(self.seed, "sums", *place))
        elif self.at_server:
            noise = SeededNoise(seeded(self.seed, "train", *place))  # of nothing but the draw
            if site.simulated:
                rate = self.privacy.sample_rate or 1.0
        else:
            return self.ordinary(ask)
        return NoisySum(
            data=ask.data,
            record_ids=ask.record_ids,
            sample_rate=rate,
            noise_multiplier=ask.sums_noise or 0.0,
            max_grad_norm=self.privacy.max_grad_norm,
            shares=shares,
            noise=noise,
        )

    def count(self, ask: UpdateRequest, site: Site, make: Callable[[], Counts]) -> Counts:
        """In the clear, or not at all: there is no ledger that noise could be charged to."""
        if metrics_allowed(self.privacy.metrics, site.policy, ask.masked) != "clear":
            raise Refusal("withheld", "counts of right answers do not leave this site")
        return clear_counts(self.run, ask, site, make)


def clear_counts(run: str, ask: UpdateRequest, site: Site, make: Callable[[], Counts]) -> Counts:
    """Counts as they are; a site notes that they have left."""
    counts = make()
    note_unprotected(run, ask, site, CLEAR_COUNTS)
    return counts


def note_unprotected(run: str, ask: UpdateRequest, site: Site, mechanism: str) -> None:
    """Write into a real site's ledger that something has left without protection: of its records
    no epsilon holds."""
    if site.simulated:
        return
    for task in ask.joint_tasks or (ask.task,):
        event = unprotected_event(site.run or run, mechanism, (task, *ask.place[1:]))
        site.ledger().note(event)
