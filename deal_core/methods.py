"""Continual-learning methods by name: DEAL and its baselines; a method is a file and a line in
``METHODS``."""

from collections.abc import Callable, Mapping

from deal_core.baselines.deal_reference import DealReference
from deal_core.baselines.frozen import linear_probe, prototype
from deal_core.baselines.memory import Ewc, Replay
from deal_core.baselines.sequential import Lwf, OLora, Sequential, Slao
from deal_core.config.experiment import AdapterConfig, Experiment, MethodConfig
from deal_core.deal.interface import Method, statistics_of
from deal_core.deal.method import make_deal
from deal_core.errors import choose
from deal_core.models import family_of

METHODS: Mapping[str, Callable[[MethodConfig, AdapterConfig], Method]] = {
    "deal": make_deal,
    "deal-reference": lambda method, adapter: DealReference(adapter),
    "ewc": lambda method, adapter: Ewc(adapter, method.ewc.weight),
    "linear-probe": lambda method, adapter: linear_probe(adapter),
    "lwf": lambda method, adapter: Lwf(adapter, method.distillation),
    "olora": lambda method, adapter: OLora(adapter),
    "prototype": lambda method, adapter: prototype(adapter, method.prototype),
    "replay": lambda method, adapter: Replay(adapter),
    "sequential": lambda method, adapter: Sequential(adapter),
    "slao": lambda method, adapter: Slao(adapter),
}
RULES: Mapping[str, frozenset[str]] = {
    "ewc": frozenset({"fedit", "ffa"}),
    "deal-reference": frozenset({"fedit"}),
    "slao": frozenset({"fedit", "ffa"}),
}
"""Aggregation rules that a method can work with, where it cannot with all: ewc compares factors
entry by entry and slao adds those of two tasks, and other rules change their coordinates;
deal-reference replaces both factors of a layer, so both must learn in every round, in their own
coordinates."""
KEEP_TEXTS = frozenset({"replay"})
"""Methods whose clients keep texts of earlier tasks, and train on them again: a reference."""
FEWEST_IN_SUM = 3
"""Clients in a sum: of two, each knows the other's part."""


def make_method(method: MethodConfig, adapter: AdapterConfig) -> Method:
    """Return the method that the experiment names; UserError where there is none."""
    return choose("method.name", method.name, METHODS, "methods")(method, adapter)


def method_of(experiment: Experiment) -> Method:
    """Return the method of an experiment.

    Raises:
        UserError: unknown ``method.name``, or settings that do not go together.
    """
    return make_method(resolve_auto(experiment), experiment.adapter)


def resolve_auto(experiment: Experiment) -> MethodConfig:
    """Return the method's settings with class means decided: ``deal`` has them where sums can leave
    under masks."""
    method = experiment.method
    if method.prototype.enabled != "auto":
        return method
    clients = len(experiment.federation.sites) or experiment.federation.clients
    mechanism, schedule = experiment.privacy.mechanism, experiment.stream.schedule
    hidden = mechanism == "none" or (mechanism == "record" and schedule == "synchronous")
    labelled = not texts_at_once(experiment) and not family_of(experiment.model).tags
    fits = clients >= FEWEST_IN_SUM and hidden and labelled
    decided = method.prototype.model_copy(update={"enabled": "on" if fits else "off"})
    return method.model_copy(update={"prototype": decided})


def is_class_incremental(experiment: Experiment) -> bool:
    """Return whether answers are counted with the task not told as well: where the model scores the
    labels of all tasks at once, or a router chooses the task."""
    statistics = statistics_of(method_of(experiment))
    routes = statistics is not None and statistics.routes
    family = family_of(experiment.model)
    return routes or (family.has_label_logits and not family.tags)


def texts_at_once(experiment: Experiment) -> str:
    """Return a task whose answers are texts, where all tasks are learnt at once; else nothing. Sums
    by label have no place for it."""
    data = experiment.data
    texts = [task for task in data.generation if task in (data.tasks or data.generation)]
    return texts[0] if texts and experiment.stream.at_once else ""
