"""Losses of parts of the words are those of all words, with their gradients, in less memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from deal_core.models.generating import WORDS, word_losses
from deal_core.randomness import seeded

HIDDEN, VOCABULARY = 8, 500


def rows(words: int) -> tuple[Tensor, Tensor, Tensor]:
    """A head, states with a gradient, and the right words."""
    generator = seeded("word losses", words)
    head = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    states = torch.randn(words, HIDDEN, generator=generator, requires_grad=True)
    return head, states, torch.randint(VOCABULARY, (words,), generator=generator)


def with_gradient(words: int, parts: bool) -> tuple[Tensor, Tensor, list[int], int]:
    """Losses, the states' gradient, how many words each call had, and the floats kept for it."""
    head, states, wanted = rows(words)
    calls: list[int] = []
    kept: dict[int, int] = {}

    def losses(some: Tensor, targets: Tensor) -> Tensor:
        calls.append(len(some))
        return cross_entropy(some @ head.T, targets, reduction="none")

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        found = word_losses(losses, states, wanted) if parts else losses(states, wanted)
    held = sum(kept.values())
    (found * torch.arange(1.0, words + 1)).sum().backward()
    assert states.grad is not None
    return found.detach(), states.grad, calls, held


def test_losses_and_gradients_are_those_of_all_words_at_once():
    for words in (1, WORDS, WORDS + 1, 3 * WORDS + 5):
        found, gradient, calls, _ = with_gradient(words, parts=True)
        expected, wanted, _, _ = with_gradient(words, parts=False)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradient, wanted)
        assert max(calls) <= WORDS


def test_nothing_of_the_size_of_a_vocabulary_is_kept_for_backward():
    words = 4 * WORDS
    assert with_gradient(words, parts=False)[3] > words * VOCABULARY
    assert with_gradient(words, parts=True)[3] < words * VOCABULARY / 10
