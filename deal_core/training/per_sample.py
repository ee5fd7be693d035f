"""Gradients of every example by itself, clipped and summed: what private training adds noise to.

Each adapted layer gets its factors once for every example, as views of equal values that take
no memory; the gradient of such a copy is that of its example. All sensitive work ends here:
whatever an example is, what it adds to the sum has at most the norm ``max_grad_norm``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from deal_core.lora.attach import CURRENT, learning_factors, lora_layers
from deal_core.training.objective import Objective


def clipped_gradients(
    module: nn.Module,
    objective: Objective,
    microbatches: Sequence[Sequence[int]],
    max_grad_norm: float,
) -> Tensor:
    """Add ``sum_i g_i min(1, C / ||g_i||)`` to the gradient of every trainable factor.

    Whatever an example does to the arithmetic stays its own: a pass in which a gradient is not
    finite, or that fails, is taken again example by example, and an example that fails alone adds
    nothing. So what the others add does not depend on it.

    Args:
        module: holds the adapter; factors that do not require a gradient get none.
        objective: whose losses of single examples are differentiated; its penalty is not part
            of it (a penalty reads no data: its gradient is added after the noise).
        microbatches: the batch, cut up; an empty batch adds nothing.
        max_grad_norm: ``C``, over all factors of all layers together (flat clipping). A
            gradient that is not finite counts as zero.

    Returns:
        ``||g_i||`` before clipping, ``(examples,)``; private, for tests and tuning on public
        data alone.

    Raises:
        ValueError: a loss reaches a factor by another way than its example's copy, so that what
            comes that way would not be clipped.

    Source: Abadi et al., CCS 2016, algorithm 1.
    """
    norms = [
        _one_microbatch(module, objective, microbatch, max_grad_norm)
        for microbatch in microbatches
        if microbatch
    ]
    return torch.cat(norms) if norms else torch.empty(0)


class SharedFactor(ValueError):
    """A loss reads a factor itself, not its example's copy: there is no gradient per example."""


def _one_microbatch(
    module: nn.Module, objective: Objective, microbatch: Sequence[int], max_grad_norm: float
) -> Tensor:
    """Norms of a microbatch, ``(len(microbatch),)``; NaN for an example that failed alone."""
    try:
        pairs = example_gradients(module, objective, microbatch)
        norms = gradient_norms(pairs)
    except SharedFactor:
        raise
    except Exception:
        if len(microbatch) == 1:
            return torch.full((1,), torch.nan)
        norms = torch.full((len(microbatch),), torch.nan)
    if not norms.isfinite().all():
        if len(microbatch) == 1:
            return norms
        alone = [
            _one_microbatch(module, objective, [example], max_grad_norm) for example in microbatch
        ]
        return torch.cat(alone)
    factors = clip_factors(norms, max_grad_norm)
    for weight, copy in pairs:
        if copy.grad is not None:
            total = torch.einsum("n,nij->ij", factors, copy.grad)
            weight.grad = total if weight.grad is None else weight.grad.add_(total)
    return norms


def clip_factors(norms: Tensor, bound: float) -> Tensor:
    """Return what shortens gradients of these norms to the bound, as it is for those below. It is 0
    where float32 has no exact number that small: rounded, it would leave more than the bound."""
    factors = (bound / norms.clamp(min=1e-12)).clamp(max=1.0)
    return torch.where(factors < torch.finfo(factors.dtype).tiny, 0.0, factors)


ExampleGradients = list[tuple[nn.Parameter, Tensor]]
"""The trainable factors, each with its copies, ``(examples, *factor)``, whose ``grad`` is that of
their examples."""


def example_gradients(
    module: nn.Module, objective: Objective, microbatch: Sequence[int]
) -> ExampleGradients:
    """Return the gradients of every example of a pass by itself; those of the factors themselves
    stay as they are.

    Raises:
        SharedFactor: a loss reads a factor itself.
    """
    with _copies(module, len(microbatch)) as pairs:
        before = [weight.grad for weight, _ in pairs]
        for weight, _ in pairs:
            weight.grad = None
        try:
            objective.example_losses(microbatch).sum().backward()  # type: ignore[no-untyped-call]
            if any(weight.grad is not None for weight, _ in pairs):
                raise SharedFactor("a loss reads a factor itself: no gradient per example")
        finally:
            for (weight, _), gradient in zip(pairs, before, strict=True):
                weight.grad = gradient
    return pairs


def gradient_norms(pairs: ExampleGradients) -> Tensor:
    """Return ``||g_i||`` over all factors, ``(examples,)``."""
    gradients = [copy.grad for _, copy in pairs if copy.grad is not None]
    return torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)


def squared_gradients(
    module: nn.Module, objective: Objective, microbatches: Sequence[Sequence[int]]
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
