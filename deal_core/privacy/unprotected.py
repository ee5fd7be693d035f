"""Mechanism ``none``: ordinary gradients; what leaves carries no guarantee, and is noted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from deal_core.config.privacy import PrivacyConfig
from deal_core.privacy.distributed_noise import NoisySum, shares_without_mechanism
from deal_core.privacy.events import unprotected_event
from deal_core.privacy.interface import Gradients, LocalUpdate, Site, Train, UpdateRequest
from deal_core.privacy.noise import NoiseSource, SecureNoise, SeededNoise
from deal_core.privacy.policy import figures_allowed
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
        """Return what was trained, for what the site's policy lets go; a real site notes in its
        ledger that it did so: of its records no epsilon holds."""
        update = train(self._gradients(ask, site))
        for task in () if site.simulated else ask.joint_tasks or (ask.task,):
            place = task, ask.phase, ask.stage, ask.server_round
            site.ledger().note(unprotected_event(site.run or self.run, "none", place))
        return replace(update, figures=figures_allowed(update.figures, site.policy, self.secure))

    def _gradients(self, ask: UpdateRequest, site: Site) -> Gradients | NoisySum:
        """Return ordinary gradients; class sums over all records, with the site's share of the
        noise; or, for a step at the server, the sum of clipped gradients without noise: of all
        records at a real site, since the run's seed, the server's word, would choose a sample."""
        if ask.sums_noise is None and not self.at_server:
            return self.ordinary(ask)
        place = ask.client, ask.stage, ask.server_round
        rate, shares = 1.0, 1
        noise: NoiseSource = SecureNoise()
        if ask.sums_noise is not None:
            shares = shares_without_mechanism(ask.sites, self.privacy.colluding)
            if site.simulated:
                noise = SeededNoise(seeded(self.seed, "sums", *place))
        else:
            noise = SeededNoise(seeded(self.seed, "train", *place))  # of nothing but the draw
            if site.simulated:
                rate = self.privacy.sample_rate or 1.0
        return NoisySum(
            data=ask.data,
            record_ids=ask.record_ids,
            sample_rate=rate,
            noise_multiplier=ask.sums_noise or 0.0,
            max_grad_norm=self.privacy.max_grad_norm,
            shares=shares,
            noise=noise,
        )
