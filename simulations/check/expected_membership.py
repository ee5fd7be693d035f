"""What class sums of the user's own sizes are expected to tell of who is in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from statistics import median

from deal_core.config.experiment import Experiment
from deal_core.data import open_source
from deal_core.methods import method_of, statistics_of
from deal_core.privacy.audit.expected_membership import expected_auc
from deal_core.protection import class_sum_noise
from simulations.check.findings import Finding


def check_membership(experiment: Experiment) -> Iterator[Finding]:
    """Yield one line for an experiment with class sums: the area under the curve of the best
    attack on the sum over sites, for the smallest label and the median one.

    Yields:
        The line, a note.

    Raises:
        UserError: the data cannot be read, or no noise fits the budget.
    """
    statistics = statistics_of(method_of(experiment))
    if statistics is None or statistics.exact is not None:
        return
    source, counts = open_source(experiment.data), Counter[tuple[str, str]]()
    names = source.task_names()
    for task in map(source.load, names):
        counts.update((task.name, each.label) for each in task.train if each.label)
    if not counts:
        return
    clients = len(experiment.federation.sites) or experiment.federation.clients
    multiplier, _ = class_sum_noise(experiment, statistics, clients, len(names))
    directions = statistics.size(experiment.model)
    told = [
        f"{expected_auc(size, directions, multiplier):.2f} for the {which} label ({size} records)"
        for which, size in (
            ("smallest", min(counts.values())),
            ("median", int(median(counts.values()))),
        )
    ]
    yield Finding(
        "class sums, against the server and the sites that may collude: expected AUC of the best "
        f"membership attack {', '.join(told)}; 0.5 is chance; deal audit --membership measures it",
        kind="note",
    )
