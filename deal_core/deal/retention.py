"""What is retained: a function of the singular values of all that was learnt.

At the end of a task the adapters of a layer are stacked and decomposed, ``M = U S V^T``. A
retention answers with a gain for each singular value; the best part of fixed rank of ``U (rho S)
V^T`` is retained. Source: docs/method.md (M8), (M9).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from deal_core.config.method import RetentionConfig
from deal_core.deal.wavelet import NEGLIGIBLE, wavelet
from deal_core.errors import choose
from deal_core.lora.adapter import Adapter, Spectrum, refactor, spectrum, strong_part

Retention = Callable[[Tensor, int], Tensor]
"""Singular values of a layer, descending, the first one positive; how many directions are kept at
most -> gains, of the same shape. Gains that do not decrease with the singular values keep
the leading part the best one."""


def svd(S: Tensor, rank: int) -> Tensor:
    """Return gains of 1: the best part of a matrix is its truncated SVD (Eckart-Young)."""
    return torch.ones_like(S)


RETENTIONS: Mapping[str, Retention] = {"svd": svd, "wavelet": wavelet}
"""``method.retention.filter`` to the gains of singular values."""


def retain(adapter: Adapter, rank: int, config: RetentionConfig) -> Adapter:
    """Return the best rank-``rank`` part of what a retention leaves of every layer, scaling 1.

    Cost per layer that of one thin SVD through the factors; the size of the result depends on
    ``rank`` alone. Directions that are numerically zero are dropped; an adapter of zeros stays
    zero.

    Args:
        adapter: the stack of everything learnt.
        rank: of the result; smaller spectra are padded with zeros.
        config: names the retention.

    Raises:
        UserError: unknown retention.
    """
    gains = choose("method.retention.filter", config.filter, RETENTIONS)
    layers = {}
    for name, factors in adapter.layers.items():
        parts = spectrum(factors, adapter.scaling)
        kept = strong_part(parts, NEGLIGIBLE)
        if number := kept.S.numel():
            rho = gains(parts.S, rank)[:number]
            kept = Spectrum(kept.U, rho * kept.S, kept.Vh)
        layers[name] = refactor(kept, rank)
    return Adapter(layers)
