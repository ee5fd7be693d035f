"""What all sites of a sum must have been told alike: settings, model and request."""

from __future__ import annotations

import hashlib
import json

from deal_core.config.experiment import Experiment
from deal_core.lora.state import State
from deal_core.privacy.accounting.unit import unit_of
from deal_core.wire.instruction import Instruction
from deal_core.wire.told_alike import told_alike

OF_ONE_SITE = frozenset({"data", "run"})
"""Tables of an experiment that each site has its own of: files and columns, folders and threads."""


def sum_terms(experiment: Experiment, instruction: Instruction, state: State) -> str:
    """Return a digest, hexadecimal, of all that what a site adds to a sum follows from, but its
    data.

    It is part of a layout, so sites that were told otherwise are in no sum together: else a server
    could tell all sites but one to add hardly any noise, or to learn nothing.

    Args:
        experiment: its settings; a site's own names, of a column, a model's or a public file's
            place, are not among them.
        instruction: what is asked.
        state: what the request brings.
    """
    told = experiment.model_dump(mode="json", exclude=set(OF_ONE_SITE))
    told["privacy"]["unit_column"] = unit_of(experiment.privacy)
    told["model"].pop("name")
    consolidation = told["method"]["consolidation"]
    consolidation["public_path"] = bool(consolidation["public_path"])
    told["tasks"] = list(experiment.data.tasks or experiment.data.labels)
    own_tasks = experiment.stream.schedule == "per-client"
    told["request"] = told_alike(instruction, state, own_tasks)
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
