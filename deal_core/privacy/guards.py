"""Failures that would otherwise be silent: a guarantee that is not one, or a model that did not
learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear
from scipy.special import bdtrc
from torch import Tensor, nn

from deal_core.adapted_linear import adapted_forward
from deal_core.attach import CURRENT, lora_layers, read, write
from deal_core.models.interface import Encoded, LanguageModel

IMPOSSIBLE = 1e-15
"""Probability below which something did not happen by chance."""
PROBES = 4
"""Examples on which two models are compared."""
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
        if not isinstance(layer, Linear) or forward is not adapted_forward:
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


def require_sampled(batch: Sequence[int], records: int, sample_rate: float) -> None:
    """Check that a batch can be a Poisson sample of the rate that is charged.

    Raises:
        UnsafeModel: an example is in it twice, and would count twice; or it is larger than such a
            sample ever is (in one of 1e15).
    """
    if len(set(batch)) != len(batch):
        raise UnsafeModel("an example is in a batch twice")
    if batch and bdtrc(len(batch) - 1, records, sample_rate) < IMPOSSIBLE:
        raise UnsafeModel(f"a batch of {len(batch)} is larger than the sample rate allows")


def require_moved(factors: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """Check that a step with noise has moved what it should.

    Raises:
        UnsafeModel: every factor is what it was.
    """
    if all(torch.equal(now, then) for now, then in zip(factors, before, strict=True)):
        raise UnsafeModel("a step with noise has changed nothing")


def require_same_answers(
    model: LanguageModel, examples: Sequence[Encoded], labels: Sequence[str]
) -> None:
    """Check that the adapter, read and put back, is the model that was trained.

    Raises:
        UnsafeModel: scores differ.
    """
    probes = examples[:PROBES]
    if not probes:
        return
    with torch.no_grad():
        trained = model.scores(probes, labels)
        write(model.module, read(model.module))
        again = model.scores(probes, labels)
    if not torch.allclose(trained, again, rtol=TOLERANCE, atol=TOLERANCE):
        raise UnsafeModel("the adapter that was read is not the model that was trained")
