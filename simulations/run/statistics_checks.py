"""A method whose clients add up their records: what it goes with."""

from __future__ import annotations

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from deal_core.methods import FEWEST_IN_SUM, method_of, statistics_of, texts_at_once


def check_statistics(experiment: Experiment) -> None:
    """Check that sums over records can leave under masks, and that each client is in one once.

    Raises:
        UserError: too few clients, or a schedule that it does not go with.
    """
    method, name = method_of(experiment), experiment.method.name
    statistics = statistics_of(method)
    if statistics is None:
        return
    federation = experiment.federation
    clients = len(federation.sites) or federation.clients
    known = experiment.data.source != "sites" or "clients" in federation.model_fields_set
    if clients < FEWEST_IN_SUM and (known or federation.sites):
        raise UserError(
            f"method.name '{name}' adds up records under masks, and of a sum over {clients} "
            f"clients each knows too much; let {FEWEST_IN_SUM} or more take part "
            '(federation.clients), or set method.prototype.enabled to "off" (deal)'
        )
    if text := texts_at_once(experiment):
        raise UserError(
            f"method.name '{name}' adds up sums by label, all tasks at once in this schedule, and "
            f"answers of '{text}' are texts; choose another schedule or set "
            'method.prototype.enabled to "off"'
        )
    sums = [each.statistics for each in method.phases if each.statistics is not None]
    if experiment.stream.schedule == "per-client" and not all(each.once for each in sums):
        raise UserError(
            f"method.name '{name}' needs all clients of a task in one stage; set stream.schedule "
            'to "synchronous", or choose another method'
        )
