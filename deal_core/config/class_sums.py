"""Whether an experiment may have rounds of sums; torch is not loaded."""

from __future__ import annotations

from deal_core.config.experiment import Experiment


def may_take_sums(experiment: Experiment) -> bool:
    """Return False only where clients give no sums over records; torch is not loaded."""
    method = experiment.method
    if method.name == "deal":
        return method.prototype.enabled != "off"
    return method.name in {"prototype", "linear-probe"}
