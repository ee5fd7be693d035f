"""What audits of groups begin with, and a mechanism that hides single records alone."""

from __future__ import annotations

import torch

from deal_core.config.experiment import Experiment
from deal_core.models import load_model
from deal_core.models.interface import Encoded
from deal_core.privacy.dpsgd import clipped_gradients
from tests.deal_core.privacy.audit.harness import Records


def three_patients(experiment: Experiment) -> Records:
    """Six texts of three patients."""
    model = load_model(experiment.model, experiment.adapter, 32, torch.float32)
    data = [Encoded((101, 2540 + i, 102), i % 2) for i in range(6)]
    return Records(model, data, ("heart", "skin"), [0, 1, 0, 2, 1, 0])


def by_record(module, objective, examples, groups, *rest, **named):
    """Clip each record by itself, whosever it is."""
    return clipped_gradients(module, objective, examples, *rest, **named)
