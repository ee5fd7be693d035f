"""What all sites of a sum must have been told alike, as a digest."""

from __future__ import annotations

import hashlib
import json

from deal_core.config.experiment import Experiment, may_take_sums
from deal_core.data.public import public_texts, texts_digest
from deal_core.data.source import named_tasks
from deal_core.lora.state import State
from deal_core.privacy.accounting.events import unit_of
from deal_core.wire.instruction import Instruction, transcript_hash

OF_ONE_SITE = frozenset({"data", "run", "description"})
"""Of an experiment what is each site's own (files and columns, folders and threads), or changes
nothing."""
OWN_ORDERS = "per-client"


def sum_terms(experiment: Experiment, model: str, instruction: Instruction, state: State) -> str:
    """Return a digest, hexadecimal, of all that what a site adds to a sum follows from, but its
    data.

    It is part of a layout, so sites that were told otherwise are in no sum together: else a server
    could tell all sites but one to add hardly any noise, or to learn nothing.

    Args:
        experiment: its settings; where a column, a model or public texts lie at a site is not among
            them.
        model: name of the base model, as the experiment was asked with.
        instruction: what is asked.
        state: what the request brings.
    """
    told = experiment.model_dump(mode="json", exclude=set(OF_ONE_SITE))
    told["privacy"]["unit_column"] = unit_of(experiment.privacy)
    told["model"]["name"] = model
    told["tasks"] = tasks = list(experiment.data.tasks or named_tasks(experiment.data))
    for name in ("instructions", "measures"):  # of the data's table the server's word alone
        of_tasks = getattr(experiment.data, name)
        told[name] = {task: of_tasks[task] for task in tasks if task in of_tasks}
    if may_take_sums(experiment):
        told["public_texts"] = texts_digest(public_texts(experiment.data, ()))
    told["request"] = transcript_hash(instruction, state, experiment.stream.schedule == OWN_ORDERS)
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
