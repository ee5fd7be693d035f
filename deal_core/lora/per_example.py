"""Gradients of every example by itself, or squared.

Each is computed in a pass of its own: who else is in a pass decides how its numbers are rounded,
and a model can be made so that this is what it answers with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from deal_core.lora.attach import CURRENT, learning_factors, lora_layers, of_what_learns

Gradient = Mapping[str, Tensor]
"""Name of what learns to its gradient; a name may be missing: zero."""


class ExampleLosses(Protocol):
    """What is differentiated: an objective, as far as it reads data."""

    def example_losses(self, batch: Sequence[int]) -> Tensor:
        """Return losses of these examples (positions in the client's data), ``(batch,)``, each
        independent of its batch-mates."""


def gradient_alone(module: nn.Module, objective: ExampleLosses, example: int) -> Gradient:
    """Return the gradient of one example, computed by itself; empty where it cannot be, so that
    what an example does to the arithmetic stays its own. Gradients of the factors stay as they are.

    Raises:
        SharedFactor: a loss reads a factor itself.
    """
    try:
        pairs = _gradients(module, objective, example)
    except SharedFactor:
        raise
    except Exception:
        return {}
    own = {factor: copy.grad[0] for factor, copy in pairs if copy.grad is not None}
    return of_what_learns(module, own)


class SharedFactor(ValueError):
    """A loss reads a factor itself, not its example's copy: there is no gradient per example."""


def _gradients(
    module: nn.Module, objective: ExampleLosses, example: int
) -> list[tuple[nn.Parameter, Tensor]]:
    """The trainable factors, each with a copy, ``(1, *factor)``, that has the gradient."""
    with _copies(module, 1) as pairs:
        before = [weight.grad for weight, _ in pairs]
        for weight, _ in pairs:
            weight.grad = None
        try:
            objective.example_losses([example]).sum().backward()  # type: ignore[no-untyped-call]
            if any(weight.grad is not None for weight, _ in pairs):
                raise SharedFactor("a loss reads a factor itself: no gradient per example")
        finally:
            for (weight, _), gradient in zip(pairs, before, strict=True):
                weight.grad = gradient
    return pairs


def squared_gradients(
    module: nn.Module, objective: ExampleLosses, microbatches: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Return ``sum_i g_i^2``, entry by entry, for every trainable factor in the order of
    :func:`~deal_core.lora.attach.set_trainable`; nothing is clipped, and no gradient is left
    behind.

    Args:
        module: holds the adapter.
        objective: whose losses of single examples are differentiated.
        microbatches: the examples, cut up.
    """
    sums = [torch.zeros_like(factor) for factor in learning_factors(module).values()]
    for microbatch in microbatches:
        with _copies(module, len(microbatch)) as pairs:
            objective.example_losses(microbatch).sum().backward()  # type: ignore[no-untyped-call]
        for total, (_, copy) in zip(sums, pairs, strict=True):
            if copy.grad is not None:
                total += copy.grad.square().sum(dim=0)
    return sums


@contextmanager
def _copies(module: nn.Module, examples: int) -> Iterator[list[tuple[nn.Parameter, Tensor]]]:
    """Yield the trainable factors with their copies, while every layer works with a copy of its
    factors for each example."""
    pairs: list[tuple[nn.Parameter, Tensor]] = []
    layers = list(lora_layers(module).values())
    for layer in layers:
        both = []
        for factor in (layer.lora_A[CURRENT].weight, layer.lora_B[CURRENT].weight):
            copy = factor.detach().expand(examples, *factor.shape)
            if factor.requires_grad:
                pairs.append((factor, copy.requires_grad_()))
            both.append(copy)
        layer.copies = tuple(both)
    try:
        yield pairs
    finally:
        for layer in layers:
            layer.copies = None
