"""Names that must be known, and a model that must be there: one look-up each."""

from __future__ import annotations

from deal_core.config.experiment import Experiment
from deal_core.lora.kinds import kind_of
from deal_core.methods import method_of
from deal_core.models import (
    adapter_shapes,
    check_bits,
    check_weights,
    has_label_logits,
    max_positions,
)
from deal_core.privacy.mechanisms.registry import check_counts, make_mechanism
from deal_core.wire.adapter_record import codec_named


def check_method(experiment: Experiment) -> None:
    """Look the method up.

    Raises:
        UserError: unknown name.
    """
    method_of(experiment)


def check_model_names(experiment: Experiment) -> None:
    """Look up family and kind of adapter, and read the model's description.

    Raises:
        UserError: unknown name, a model that is nowhere, or a package that is missing.
    """
    check_bits(experiment.model)
    has_label_logits(experiment.model)
    kind_of(experiment.adapter)
    max_positions(experiment.model)


def check_wire(experiment: Experiment) -> None:
    """Look up how adapters travel.

    Raises:
        UserError: unknown ``wire.dtype``.
    """
    codec_named(experiment.wire.dtype)


def check_mechanism(experiment: Experiment) -> None:
    """Build the mechanism, which checks what goes with it.

    Raises:
        UserError: unknown mechanism, or keys that do not go with it.
    """
    make_mechanism(experiment)
    check_counts(experiment)


def check_model(experiment: Experiment) -> None:
    """Build the model without weights, and see whether its checkpoint has them all.

    Raises:
        UserError: layers, or weights, that it lacks.
    """
    adapter_shapes(experiment.model, experiment.adapter)
    check_weights(experiment.model)
