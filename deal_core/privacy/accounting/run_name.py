"""A name for an experiment: what a ledger files its releases under."""

from __future__ import annotations

import hashlib
import json

from deal_core.config.experiment import Experiment
from deal_core.config.run_config import WHERE, flatten


def run_name(experiment: Experiment) -> str:
    """Equal for runs that release the same: of equal settings, wherever their files lie."""
    settings = flatten(experiment)
    for key in WHERE:
        settings.pop(key)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
