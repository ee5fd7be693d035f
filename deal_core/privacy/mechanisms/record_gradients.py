"""What a site's records are read through: steps with noise of the site's own, or one sum with its
share of the noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from deal_core.config.experiment import Experiment
from deal_core.privacy.accounting.ledger_event import LedgerEvent
from deal_core.privacy.interface import UpdateRequest
from deal_core.privacy.mechanisms.groups import Groups
from deal_core.privacy.mechanisms.noise import NoiseSource
from deal_core.privacy.mechanisms.noisy_sum import NoisySum
from deal_core.privacy.mechanisms.private_gradients import PrivateGradients
from deal_core.privacy.mechanisms.shares import shares_of

MakeGradients = Callable[
    [Experiment, UpdateRequest, LedgerEvent, NoiseSource, Groups | None],
    PrivateGradients | NoisySum,
]
"""Of the event that the ledger charges."""


def site_gradients(
    experiment: Experiment,
    ask: UpdateRequest,
    event: LedgerEvent,
    noise: NoiseSource,
    groups: Groups | None,
) -> PrivateGradients:
    """Return the steps of a round, each with the whole noise."""
    expected = experiment.train.batch_size
    if experiment.privacy.sample_rate:
        units = len(ask.data) if groups is None else len(groups)
        expected = max(1, round(experiment.privacy.sample_rate * units))
    return PrivateGradients(
        data=ask.data,
        record_ids=ask.record_ids,
        sample_rate=event.sample_rate,
        noise_multiplier=event.noise_multiplier,
        max_grad_norm=event.max_grad_norm,
        steps=event.steps,
        expected_batch=expected,
        noise=noise,
        groups=groups,
    )


def sum_gradients(
    experiment: Experiment,
    ask: UpdateRequest,
    event: LedgerEvent,
    noise: NoiseSource,
    groups: Groups | None,
) -> NoisySum:
    """Return the one sum of a round, with this site's share of the noise."""
    return NoisySum(
        data=ask.data,
        record_ids=ask.record_ids,
        sample_rate=event.sample_rate,
        noise_multiplier=event.noise_multiplier,
        max_grad_norm=event.max_grad_norm,
        shares=shares_of(experiment),
        noise=noise,
        groups=groups,
    )


GRADIENTS: Mapping[str, MakeGradients] = {"client": site_gradients, "server": sum_gradients}
"""``train.step`` to what reads the records."""
