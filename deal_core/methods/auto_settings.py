"""Settings of a method that the rest of the experiment decides."""

from __future__ import annotations

from deal_core.config.experiment import AdapterConfig, Experiment
from deal_core.config.method import MethodConfig, RetentionConfig
from deal_core.lora.kinds import kind_of
from deal_core.models import embedding_size


def every_task_ends_a_stage(experiment: Experiment) -> bool:
    """Return whether each client works on each of its tasks when some stage ends, which is when
    phases after learning take its sums."""
    every = experiment.stream.consolidate_every
    return experiment.stream.schedule != "per-client" or every <= experiment.federation.rounds


def resolve_auto(experiment: Experiment) -> MethodConfig:
    """Return the method's settings without ``auto``: the analytic head of ``deal`` is on where
    nothing stands against sums, and an adapter is retained apart where that head is off or a
    setting needs it."""
    method = experiment.method
    prototype, retention = method.prototype.enabled, method.retention.enabled
    if prototype == "auto":
        prototype = "on" if _sums_can_leave(experiment) else "off"
    if retention == "auto":
        retention = "on" if prototype == "off" or _needs_retained(experiment) else "off"
    tables = {
        "prototype": method.prototype.model_copy(update={"enabled": prototype}),
        "retention": method.retention.model_copy(update={"enabled": retention}),
    }
    return method.model_copy(update=tables)


def _sums_can_leave(experiment: Experiment) -> bool:
    return (
        experiment.privacy.mechanism == "none"
        and experiment.aggregation.robust == "none"
        and experiment.train.step == "client"
        and every_task_ends_a_stage(experiment)
        and embedding_size(experiment.model) > 0
    )


def _needs_retained(experiment: Experiment) -> bool:
    """Return whether a setting that is not the default works on the retained adapter."""
    method, adapter = experiment.method, experiment.adapter
    return (
        method.retention != RetentionConfig()
        or method.update.enabled
        or method.consolidation.data != "none"
        or method.warm_start_rank > 0
        or not method.orthogonal_init
        or adapter.retained_rank != AdapterConfig().retained_rank
        or kind_of(adapter).begin_task is not None
    )
