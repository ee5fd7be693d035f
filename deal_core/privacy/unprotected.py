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
    GradientSum,
    LocalUpdate,
    Permit,
    Refusal,
    Site,
    UpdateRequest,
)
from deal_core.privacy.noise import SecureNoise, SeededNoise
from deal_core.privacy.policy import figures_allowed, metrics_allowed
from deal_core.randomness import seeded


@dataclass(frozen=True)
class NoMechanism:
    """No protection.

    Attributes:
        privacy: settings of the run.
        run: its name in a ledger.
        seed: of a simulated client's noise.
        at_server: whether a round is one sum, for a step at the server.
        secure: whether updates leave in a secure sum.
        ordinary: gradients for the epochs of the run.
    """

    privacy: PrivacyConfig
    run: str
    seed: int
    at_server: bool
    secure: bool
    ordinary: Callable[[UpdateRequest], Gradients]
    unit: str | None = None

    def trained(self, factors: frozenset[str]) -> frozenset[str]:
        """Return the factors of the rule."""
        return factors

    def permit(self, ask: UpdateRequest, site: Site) -> Permit:
        """Return leave to train, for what the site's policy lets go; a site notes that it did so.

        Raises:
            Refusal: there is nothing to learn from, or fewer records than the policy lets go
                without protection.
        """
        least = max(1, site.policy.min_records if site.policy is not None else 1)
        if len(ask.data) < least:
            raise Refusal("no-data", f"fewer than {least} records of task '{ask.task}'")
        return Permit(
            gradients=self._gradients(ask, site),
            release=lambda update: self._noted(update, ask, site),
        )

    def _gradients(self, ask: UpdateRequest, site: Site) -> Gradients | GradientSum:
        if ask.statistics is not None and ask.statistics.exact is None:
            return self._class_sum(ask, site, ask.statistics.noise_multiplier)
        return self._gradient_sum(ask, site) if self.at_server else self.ordinary(ask)

    def _gradient_sum(self, ask: UpdateRequest, site: Site) -> NoisySum:
        """Return the sum of clipped gradients, for a step at the server, without noise: of all
        records at a real site, since the run's seed, the server's word, would choose a sample; of
        one in a simulation."""
        return NoisySum(
            data=ask.data,
            record_ids=ask.record_ids,
            sample_rate=(self.privacy.sample_rate or 1.0) if site.simulated else 1.0,
            noise_multiplier=0.0,
            max_grad_norm=self.privacy.max_grad_norm,
            shares=1,
            noise=SeededNoise(ask.generator),  # of nothing but the draw
        )

    def _class_sum(self, ask: UpdateRequest, site: Site, noise_multiplier: float) -> NoisySum:
        """The sum over all records that is made of vectors, with this site's share of the noise."""
        generator = seeded(self.seed, "sums", ask.client, ask.stage, ask.server_round)
        return NoisySum(
            data=ask.data,
            record_ids=ask.record_ids,
            sample_rate=1.0,
            noise_multiplier=noise_multiplier,
            max_grad_norm=self.privacy.max_grad_norm,
            shares=shares_without_mechanism(ask.sites, self.privacy.colluding),
            noise=SeededNoise(generator) if site.simulated else SecureNoise(),
        )

    def _noted(self, update: LocalUpdate, ask: UpdateRequest, site: Site) -> LocalUpdate:
        note_unprotected(self.run, ask, site, "none")
        return replace(update, figures=figures_allowed(update.figures, site.policy, self.secure))

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
        place = task, ask.phase, ask.stage, ask.server_round
        site.ledger().note(unprotected_event(site.run or run, mechanism, place))
