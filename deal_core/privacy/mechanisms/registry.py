"""Privacy mechanisms. A mechanism is a file and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError, choose
from deal_core.privacy.interface import Mechanism
from deal_core.privacy.mechanisms.definition import MechanismDefinition
from deal_core.privacy.mechanisms.none import NONE
from deal_core.privacy.mechanisms.record import RECORD
from deal_core.privacy.mechanisms.server_steps import check_steps_at_server
from deal_core.privacy.mechanisms.sums_protected import check_sums_protected

MECHANISMS: Mapping[str, MechanismDefinition] = {"none": NONE, "record": RECORD}
"""``privacy.mechanism`` to what it is."""


def mechanism_of(experiment: Experiment) -> MechanismDefinition:
    """Return what the mechanism is that the experiment names.

    Raises:
        UserError: unknown ``privacy.mechanism``.
    """
    return choose("privacy.mechanism", experiment.privacy.mechanism, MECHANISMS)


def make_mechanism(experiment: Experiment) -> Mechanism:
    """Return the mechanism that the experiment names.

    Raises:
        UserError: unknown ``privacy.mechanism``, or one that cannot protect the experiment.
    """
    definition = mechanism_of(experiment)
    mechanism = definition.client(experiment)
    if mechanism.unit is not None:
        check_sums_protected(experiment)
    definition.check(experiment)
    check_steps_at_server(experiment)
    return mechanism


def check_counts(experiment: Experiment) -> None:
    """Check that counts of right answers can leave as ``privacy.metrics`` says.

    Raises:
        UserError: they cannot.
    """
    definition = mechanism_of(experiment)
    if experiment.privacy.metrics == "noised" and not definition.noises_counts:
        raise UserError(
            f'privacy.metrics = "noised" is charged to a budget of records, which mechanism '
            f"'{experiment.privacy.mechanism}' has not; set privacy.mechanism to \"record\", or "
            'privacy.metrics to "clear"'
        )
