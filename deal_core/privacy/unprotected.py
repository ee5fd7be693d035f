"""Mechanism ``none``: ordinary gradients; what leaves carries no guarantee."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from deal_core.config.experiment import Experiment
from deal_core.privacy.counts import clear_counts, note_unprotected
from deal_core.privacy.distributed_noise import NoisySum, class_sum_noise
from deal_core.privacy.interface import Counts, LocalUpdate, Permit, Refusal, Site, UpdateRequest
from deal_core.privacy.noise import SecureNoise, SeededNoise
from deal_core.privacy.policy import figures_allowed, metrics_allowed
from deal_core.randomness import seeded
from deal_core.training.loop import NonPrivateGradients


@dataclass(frozen=True)
class NoMechanism:
    """Attributes: the ``experiment``, for epochs and batches."""

    experiment: Experiment
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
        make = UNPROTECTED[self.experiment.train.step]
        if ask.statistics is not None and ask.statistics.exact is None:
            make = class_sum
        return Permit(
            gradients=make(self.experiment, ask, site),
            release=lambda update: self._noted(update, ask, site),
        )

    def _noted(self, update: LocalUpdate, ask: UpdateRequest, site: Site) -> LocalUpdate:
        note_unprotected(self.experiment, ask, site, "none")
        return allowed(self.experiment, update, site)

    def count(self, ask: UpdateRequest, site: Site, make: Callable[[], Counts]) -> Counts:
        """In the clear, or not at all: there is no ledger that noise could be charged to."""
        if metrics_allowed(self.experiment.privacy.metrics, site.policy, ask.masked) != "clear":
            raise Refusal("withheld", "counts of right answers do not leave this site")
        return clear_counts(self.experiment, ask, site, make)


def allowed(experiment: Experiment, update: LocalUpdate, site: Site) -> LocalUpdate:
    """Return the update with those of its figures that the site's policy lets go."""
    masked = experiment.aggregation.secure
    return replace(update, figures=figures_allowed(update.figures, site.policy, masked))


def ordinary_gradients(experiment: Experiment, ask: UpdateRequest) -> NonPrivateGradients:
    """Gradients without protection, for the epochs of the experiment."""
    epochs = experiment.federation.local_epochs
    return NonPrivateGradients(ask.data, epochs, experiment.train, ask.generator)


def gradient_sum_alone(experiment: Experiment, ask: UpdateRequest, site: Site) -> NoisySum:
    """Return the sum of clipped gradients, for a step at the server, without noise: of all records
    at a real site, since the run's seed, the server's word, would choose a sample; of one in a
    simulation."""
    sample_rate = (experiment.privacy.sample_rate or 1.0) if site.simulated else 1.0
    noise = SeededNoise(ask.generator)  # of nothing but the draw
    return NoisySum(
        data=ask.data,
        record_ids=ask.record_ids,
        sample_rate=sample_rate,
        noise_multiplier=0.0,
        max_grad_norm=experiment.privacy.max_grad_norm,
        shares=1,
        noise=noise,
    )


def class_sum(experiment: Experiment, ask: UpdateRequest, site: Site) -> NoisySum:
    """Return the sum over all records that is made of vectors, with this site's share of the
    noise."""
    assert ask.statistics is not None
    multiplier, shares = class_sum_noise(experiment, ask.statistics, ask.sites, 1)
    generator = seeded(experiment.run.seed, "sums", ask.client, ask.stage, ask.server_round)
    return NoisySum(
        data=ask.data,
        record_ids=ask.record_ids,
        sample_rate=1.0,
        noise_multiplier=multiplier,
        max_grad_norm=experiment.privacy.max_grad_norm,
        shares=shares,
        noise=SeededNoise(generator) if site.simulated else SecureNoise(),
    )


MakeGradients = Callable[[Experiment, UpdateRequest, Site], NonPrivateGradients | NoisySum]
UNPROTECTED: Mapping[str, MakeGradients] = {
    "client": lambda experiment, ask, site: ordinary_gradients(experiment, ask),
    "server": gradient_sum_alone,
}
"""``train.step`` to what reads the records."""
