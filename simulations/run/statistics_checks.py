"""A method whose clients send sums: what it goes with, and sums that may leave a site."""

from __future__ import annotations

from client.egress import LARGEST_SUM
from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from deal_core.methods import (
    Statistics,
    every_task_ends_a_stage,
    method_of,
    statistics_of,
    texts_at_once,
)
from deal_core.models import embedding_size, has_label_logits
from deal_core.privacy.policy import at_server
from deal_core.wire.instruction import LEARN
from deal_core.wire.sums import largest_array


def check_statistics(experiment: Experiment) -> None:
    """A method whose clients send sums needs embeddings, and sums of which each client is in once.

    Raises:
        UserError: a model, a robust step or a schedule that it does not go with.
    """
    method = method_of(experiment)
    statistics = statistics_of(method)
    if statistics is None:
        return
    name, robust = experiment.method.name, experiment.aggregation.robust
    if at_server(experiment) and not has_label_logits(experiment.model):
        raise UserError(
            f"train.step = \"server\" and method.name '{name}': sums with noise are for "
            f"encoders, and model.family is '{experiment.model.family}'; use encoder-labels"
        )
    _require_small_sums(experiment, statistics)
    if text := texts_at_once(experiment):
        raise UserError(
            f"method.name '{name}' adds up sums by label, all tasks at once in this schedule, and "
            f"answers of '{text}' are texts; choose another schedule or set "
            'method.prototype.enabled to "off"'
        )
    if robust != "none":
        raise UserError(
            f"aggregation.robust '{robust}' judges adapters, and method.name '{name}' adds up "
            "sums; set it to none"
        )
    sums = [each for each in method.phases if each.statistics is not None]
    gradients = any(not each.statistics.once for each in sums if each.statistics is not None)
    if gradients and experiment.stream.schedule == "per-client":
        raise UserError(
            f"method.name '{name}' needs all clients of a task in one stage; set stream.schedule "
            'to "synchronous", or choose another method'
        )
    if any(each.name != LEARN for each in sums) and not every_task_ends_a_stage(experiment):
        raise UserError(
            f"method.name '{name}' takes sums where a stage ends, and a client may begin and end a "
            "task within one; set stream.consolidate_every to federation.rounds or less, or "
            'method.prototype.enabled to "off"'
        )


def _require_small_sums(experiment: Experiment, statistics: Statistics) -> None:
    """Check that sites will let the sums of a task leave. In a secure sum they are masked numbers.

    Raises:
        UserError: embeddings of so many entries that the sums are too large.
    """
    size = embedding_size(experiment.model, statistics.layers)
    if experiment.aggregation.secure:
        return
    form = statistics.at(experiment.wire.dtype)
    largest = largest_array(form.shapes(1, size), form.codes)
    if largest > LARGEST_SUM:
        raise UserError(
            f"method.name '{experiment.method.name}' adds up embeddings of {size} entries, and an "
            f"array of {largest / 2**20:.0f} MiB is more than leaves a site at once "
            f"({LARGEST_SUM / 2**20:.0f}); lower method.prototype.layers, set wire.dtype to "
            '"int8", or method.prototype.enabled to "off"'
        )
