"""Settings of a method that the rest of the experiment decides."""

from __future__ import annotations

from deal_core.config.experiment import Experiment
from deal_core.config.method import MethodConfig, PrototypeConfig
from deal_core.models import has_label_logits

AUTO = "auto"
FEWEST_IN_SUM = 3
"""Clients in a sum: of two, each knows the other's part."""


def resolve_auto(experiment: Experiment) -> MethodConfig:
    """Return the method's settings without ``auto``."""
    return experiment.method.model_copy(update={"prototype": _prototype(experiment)})


def _prototype(experiment: Experiment) -> PrototypeConfig:
    """Return those of class means: ``deal`` has them where sums can leave under masks."""
    asked, encoder = experiment.method.prototype, has_label_logits(experiment.model)
    clients = len(experiment.federation.sites) or experiment.federation.clients
    mechanism, schedule = experiment.privacy.mechanism, experiment.stream.schedule
    noised = mechanism == "record" and schedule == "synchronous"
    hidden = mechanism == "none" or noised
    fits = clients >= FEWEST_IN_SUM and hidden and not texts_at_once(experiment)
    decided = {
        "enabled": "on" if fits else "off",
        "names": 0.5 if encoder else 1.0,
    }
    left = {key: value for key, value in decided.items() if getattr(asked, key) == AUTO}
    return asked.model_copy(update=left)


def texts_at_once(experiment: Experiment) -> str:
    """Return a task whose answers are texts, where all tasks are learnt at once; else nothing. Sums
    by label have no place for it."""
    data = experiment.data
    texts = [task for task in data.generation if task in (data.tasks or data.generation)]
    return texts[0] if texts and experiment.stream.schedule == "joint" else ""
