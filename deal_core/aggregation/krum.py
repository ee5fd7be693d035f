"""Multi-Krum: keep the updates that have the closest neighbours, without a dense matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deal_core.aggregation.robust import RoundStart, Survivors
from deal_core.aggregation.rule import LORA_B, ClientUpdate, TooFewUpdates
from deal_core.lora.adapter import Adapter

BLOCK_ROWS = 512


def multi_krum(
    updates: Sequence[ClientUpdate], start: RoundStart, num_malicious: int, keep: int = 0
) -> Survivors:
    """Return the ``K - f`` updates of the lowest score, with their weights.

    Score of client ``i``: the sum of its squared distances to its ``K - f - 2`` nearest
    neighbours. Distances are between the trained factors when one factor is common to all,
    otherwise between the products ``s_i B_i A_i``, which do not depend on how a client
    happens to factor them. Ties are broken by client name, so arrival order is irrelevant.
    The guarantee needs ``K >= 2 f + 3``. Time is quadratic in the number of clients.
    Source: Blanchard et al., NeurIPS 2017, arXiv 1703.02757.

    Args:
        updates: all updates of the round.
        start: says which factors are trained in the round.
        num_malicious: ``f``, the number of bad clients to withstand.
        keep: how many to keep (1: Krum); 0: ``K - f``.

    Raises:
        TooFewUpdates: fewer than ``f + 3`` clients: no neighbour would be left to compare with.
    """
    count = len(updates)
    neighbours = count - num_malicious - 2
    if neighbours < 1:
        raise TooFewUpdates(
            f"multi-Krum: {num_malicious} bad of {count} clients; at least f + 3 needed"
        )
    distances = squared_distances([update.adapter for update in updates], start.trained)
    others = distances.masked_fill(torch.eye(count, dtype=torch.bool), torch.inf)
    scores = others.sort(dim=1).values[:, :neighbours].sum(dim=1).tolist()
    order = sorted(range(count), key=lambda i: (float(f"{scores[i]:.9e}"), updates[i].client))
    kept = set(order[: keep or count - num_malicious])
    return Survivors(
        tuple(update for i, update in enumerate(updates) if i in kept),
        tuple(update.client for i, update in enumerate(updates) if i not in kept),
    )


def squared_distances(adapters: Sequence[Adapter], trained: frozenset[str]) -> Tensor:
    """Return the ``(K, K)`` squared Frobenius distances over all layers, float64."""
    gram = factor_gram(adapters, trained) if len(trained) == 1 else product_gram(adapters)
    norms = gram.diagonal()
    return (norms[:, None] + norms[None, :] - 2 * gram).clamp(min=0)


def factor_gram(adapters: Sequence[Adapter], trained: frozenset[str]) -> Tensor:
    """Return inner products of the one trained factor, summed over layers, ``(K, K)``."""
    gram = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for name in adapters[0].layers:
        layers = [adapter.layers[name] for adapter in adapters]
        factors = [each.B if LORA_B in trained else each.A for each in layers]
        flat = torch.stack([factor.flatten() for factor in factors]).double()
        gram += flat @ flat.T
    return gram


def product_gram(adapters: Sequence[Adapter]) -> Tensor:
    """Return ``<s_i B_i A_i, s_j B_j A_j>`` summed over layers, ``(K, K)``.

    ``<B_i A_i, B_j A_j> = sum((B_i^T B_j) * (A_i A_j^T))``: two ``r_i x r_j`` Grams a pair.
    """
    count = len(adapters)
    ranks = torch.tensor([adapter.rank for adapter in adapters])
    owner = torch.repeat_interleave(torch.arange(count), ranks)
    gram = torch.zeros(count, count, dtype=torch.float64)
    for name in adapters[0].layers:
        a = torch.cat([adapter.layers[name].A for adapter in adapters]).double()
        b = torch.cat([each.scaling * each.layers[name].B.T for each in adapters]).double()
        for start in range(0, owner.numel(), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            products = (b[rows] @ b.T) * (a[rows] @ a.T)
            by_column = products.new_zeros(products.shape[0], count).index_add(1, owner, products)
            gram.index_add_(0, owner[rows], by_column)
    return gram
