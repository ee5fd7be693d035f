"""What all sites of a sum must have been told alike, where they make its noise together."""

from __future__ import annotations

import hashlib
import json

from deal_core.config.experiment import Experiment
from deal_core.privacy.accounting.unit import unit_of
from deal_core.privacy.policy import in_sum

TABLES = ("adapter", "aggregation", "federation", "privacy", "stream", "train", "wire")
"""Of an experiment: from these the noise of every site follows."""
SITES_OWN = "unit_column"
"""A key of ``[privacy]`` that each site has a name of its own for; what it protects is the same."""


def sum_terms(experiment: Experiment) -> str:
    """Return a digest, hexadecimal, of all settings that the noise of a sum follows from; empty
    where every site's noise is its own.

    It is part of a layout, so sites that were told otherwise are in no sum together: else a server
    could tell all sites but one to add hardly any noise.
    """
    if not in_sum(experiment.privacy):
        return ""
    told = experiment.model_dump(mode="json", include=set(TABLES))
    told["privacy"][SITES_OWN] = unit_of(experiment.privacy)
    told["tasks"] = list(experiment.data.tasks or experiment.data.labels)
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
