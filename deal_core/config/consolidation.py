"""Whether an experiment may have rounds of consolidation, or of sums; torch is not loaded."""

from __future__ import annotations

from deal_core.config.experiment import Experiment


def may_consolidate(experiment: Experiment) -> bool:
    """Return False only where no task ends with rounds of consolidation; torch is not loaded."""
    method = experiment.method
    return method.name == "deal" and method.consolidation.data == "private"


def may_take_sums(experiment: Experiment) -> bool:
    """Return False only where clients give no sums over records; torch is not loaded."""
    method = experiment.method
    if method.name == "deal":
        return method.prototype.enabled != "off"
    return method.name in {"prototype", "linear-probe"}
