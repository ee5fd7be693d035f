"""Settings of a method that the rest of the experiment decides."""

from __future__ import annotations

from deal_core.config.experiment import Experiment
from deal_core.config.method import MethodConfig
from deal_core.models import embedding_size


def resolve_auto(experiment: Experiment) -> MethodConfig:
    """Return the method's settings without ``auto``: the analytic head of ``deal`` is on where
    nothing stands against sums."""
    method = experiment.method
    if method.prototype.enabled != "auto":
        return method
    fits = (
        experiment.privacy.mechanism == "none"
        and experiment.aggregation.robust == "none"
        and experiment.train.step == "client"
        and experiment.stream.schedule != "per-client"
        and embedding_size(experiment.model) > 0
    )
    prototype = method.prototype.model_copy(update={"enabled": "on" if fits else "off"})
    return method.model_copy(update={"prototype": prototype})
