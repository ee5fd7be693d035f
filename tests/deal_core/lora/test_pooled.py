"""The pooled adapter: what its basis is, and what a later task can disturb."""

import pytest
import torch
from torch.nn.functional import normalize

from deal_core.lora.adapter import LoraFactors, stack, zero_adapter
from deal_core.lora.kinds import POOLED, begin_pooled, label_basis


def vectors(count, seed, size=32):
    drawn = torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
    return normalize(drawn, dim=1)


def centred(labels):
    return labels - labels.mean(dim=0)


@pytest.mark.parametrize("rank", [2, 4, 9])
def test_the_basis_is_orthonormal_and_spans_centred_labels(rank):
    labels = vectors(5, 0)
    basis = label_basis(labels, labels[:0], rank)
    own = min(rank, 4)  # centred labels have one direction less than there are
    assert torch.allclose(basis.T @ basis, torch.eye(own), atol=1e-6)
    if rank >= 4:
        left = centred(labels) - centred(labels) @ basis @ basis.T
        assert left.norm() < 1e-5


def test_the_basis_leaves_out_what_earlier_labels_span():
    labels, earlier = vectors(5, 0), vectors(7, 1)
    basis = label_basis(labels, earlier, 8)
    assert (centred(earlier) @ basis).abs().max() < 1e-6
    assert (basis.norm(dim=0) > 0.5).sum() == 4


@pytest.mark.parametrize(("labels", "size"), [(3, 2), (7, 6), (12, 8)])
def test_an_adapter_has_the_rank_of_its_directions_and_counts_as_much_for_every_task(labels, size):
    names, alpha, rank = vectors(labels, 0), 16.0, 8
    start = zero_adapter({POOLED: (32, 32)}, rank, alpha / rank)
    begun = begin_pooled(start, names, names[:0])
    factors = begun.layers[POOLED]
    assert begun.rank == factors.A.shape[0] == factors.B.shape[1] == size
    assert begun.scaling == pytest.approx(alpha / size)  # as a client computes it
    basis = label_basis(names, names[:0], rank)
    assert torch.allclose(begun.scaling * factors.B, alpha / rank * basis, atol=1e-6)


def test_a_later_task_moves_no_order_of_earlier_labels():
    """Scores of the first task's labels, before normalisation, all move by one number."""
    first, second, texts = vectors(4, 0), vectors(4, 1), vectors(50, 2)
    start = zero_adapter({POOLED: (32, 32)}, 4)
    later = begin_pooled(start, second, first).layers[POOLED]
    A = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    moved = (texts @ A.T) @ later.B.T @ first.T
    assert torch.allclose(moved, moved[:, :1].expand_as(moved), atol=1e-5)


def test_tasks_add_up_in_one_adapter():
    first, second = vectors(3, 0), vectors(3, 1)
    start = zero_adapter({POOLED: (32, 32)}, 2)
    both = []
    for labels, earlier in ((first, first[:0]), (second, first)):
        begun = begin_pooled(start, labels, earlier)
        A = torch.randn(2, 32, generator=torch.Generator().manual_seed(len(both)))
        both.append(type(begun)({POOLED: LoraFactors(A, begun.layers[POOLED].B)}, 1.0))
    merged = stack(both).layers[POOLED]
    expected = sum(a.layers[POOLED].B @ a.layers[POOLED].A for a in both)
    assert torch.allclose(merged.B @ merged.A, expected, atol=1e-5)
