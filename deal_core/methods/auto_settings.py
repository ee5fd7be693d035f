"""Settings of a method that the rest of the experiment decides."""

from __future__ import annotations

from deal_core.config.experiment import Experiment
from deal_core.config.method import MethodConfig
from deal_core.models import has_label_logits


def every_task_ends_a_stage(experiment: Experiment) -> bool:
    """Return whether each client works on each of its tasks when some stage ends, which is when
    phases after learning take its sums."""
    every = experiment.stream.consolidate_every
    return experiment.stream.schedule != "per-client" or every <= experiment.federation.rounds


def resolve_auto(experiment: Experiment) -> MethodConfig:
    """Return the method's settings without ``auto``: the analytic head of ``deal`` is on where the
    model chooses among labels and nothing stands against sums."""
    method = experiment.method
    if method.prototype.enabled != "auto":
        return method
    fits = (
        experiment.privacy.mechanism == "none"
        and experiment.aggregation.robust == "none"
        and experiment.train.step == "client"
        and every_task_ends_a_stage(experiment)
        and has_label_logits(experiment.model)
    )
    prototype = method.prototype.model_copy(update={"enabled": "on" if fits else "off"})
    return method.model_copy(update={"prototype": prototype})
