"""The analytic head of deal: class means of the *frozen* base model, beside the adapted model's
scores of label names.

Nothing moves the features of the base model: sums over earlier tasks stay true whatever is learnt,
and tell tasks apart; the adapter, which learns within a task, tells its labels apart. Source:
docs/method.md, (M43), (M44).
"""

from __future__ import annotations

from deal_core.config.method import PrototypeConfig
from deal_core.methods.interface import Phase
from deal_core.methods.shared.frozen import statistics_phase
from deal_core.methods.shared.prototypes import class_statistics

PROTOTYPES = "prototypes"
"""Name of the phase."""


def prototype_phases(config: PrototypeConfig) -> tuple[Phase, ...]:
    """Return the phase in which sums are taken, where the experiment wants it."""
    if config.enabled != "on":
        return ()
    return (statistics_phase(PROTOTYPES, 1, class_statistics(config, float(config.names))),)
