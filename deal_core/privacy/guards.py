"""Failures that would otherwise be silent: a guarantee that is not one, or a model that did not
learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deal_core.lora.attach import CURRENT, lora_layers, read, write
from deal_core.lora.linear import adapted_forward
from deal_core.models.interface import LanguageModel
from deal_core.privacy.interface import Probes, RecordId

TOLERANCE = 1e-5
"""Relative difference of scores that rounding may make."""


class UnsafeModel(RuntimeError):
    """A model whose gradients per example cannot be had, or that does not learn."""


def require_plain_lora(module: nn.Module) -> list[Tensor]:
    """Return the trainable factors, if nothing else learns and each is known by example.

    Raises:
        UnsafeModel: something learns that is no ordinary LoRA factor of a linear layer in our own
            operation: its gradient would escape the clipping.
    """
    known: dict[int, Any] = {}
    for name, layer in lora_layers(module).items():
        forward = getattr(layer.forward, "func", None)
        linear = all(
            isinstance(factor[CURRENT], nn.Linear) for factor in (layer.lora_A, layer.lora_B)
        )
        if not linear or forward is not adapted_forward:
            raise UnsafeModel(f"layer {name} is no plain LoRA layer")
        for factor in (layer.lora_A[CURRENT].weight, layer.lora_B[CURRENT].weight):
            known[id(factor)] = factor
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            raise UnsafeModel(f"{name} learns, but is no plain LoRA factor")
    learning: list[Tensor] = [factor for factor in known.values() if factor.requires_grad]
    if not learning:
        raise UnsafeModel("nothing learns")
    return learning


def require_moved(factors: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """Check that a step with noise has moved what it should.

    Raises:
        UnsafeModel: every factor is what it was.
    """
    if all(torch.equal(now, then) for now, then in zip(factors, before, strict=True)):
        raise UnsafeModel("a step with noise has changed nothing")


def require_planned(
    record_ids: Sequence[RecordId],
    examples: int,
    task: str,
    planned: int,
    groups: Sequence[int] | None = None,
) -> None:
    """Check, before any step, that what is about to be read is what was planned and is charged.

    Args:
        record_ids: which record each example is.
        examples: that are about to be read.
        task: that the charge names.
        planned: records, or groups, of the task.
        groups: of every example, where groups are protected.

    Raises:
        UnsafeModel: a record twice, one of another task than the charge names, or another number
            of records, or groups, than the plan's.
    """
    if len(record_ids) != examples or (groups is not None and len(groups) != examples):
        raise UnsafeModel("examples of which it is not known whose record they are")
    if len(set(record_ids)) != len(record_ids):
        raise UnsafeModel("a record is in the data twice")
    if any(each.task != task for each in record_ids):
        raise UnsafeModel("a record of another task than the one that is charged")
    found = len(record_ids) if groups is None else len(set(groups))
    if found != planned:
        unit = "records" if groups is None else "groups"
        raise UnsafeModel(f"{found} {unit}, but {planned} are planned")


def require_same_answers(model: LanguageModel, probes: Probes, labels: Sequence[str]) -> None:
    """Check that the adapter, read and put back, is the model that was trained.

    Args:
        model: holds the adapter.
        probes: constant texts: what is found on them tells nothing of a record that the noised
            update does not.
        labels: that are scored; none: the answers are texts, and their losses are compared.

    Raises:
        UnsafeModel: they differ.
    """

    def answers() -> Tensor:
        if labels:
            return model.scores(probes, labels)
        return model.forward_train(probes, labels, ()).example_losses

    with torch.no_grad():
        trained = answers()
        write(model.module, read(model.module))
        again = answers()
    if not torch.allclose(trained, again, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
        raise UnsafeModel("the adapter that was read is not the model that was trained")
