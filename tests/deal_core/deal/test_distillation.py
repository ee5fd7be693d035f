from __future__ import annotations

import pytest
import torch

from deal_core.deal.distillation import distillation_losses
from deal_core.models import ForwardOutput


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def student_of(
    logits: torch.Tensor, rows: list[int], spaces: list[int] | None = None
) -> ForwardOutput:
    return ForwardOutput(torch.zeros(len(rows)), logits, rows, spaces or [logits.shape[1]])


def plain(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """At temperature 2."""
    p = (teacher / 2.0).softmax(1)
    q = (student / 2.0).softmax(1)
    return 4.0 * (p * (p / q).log()).sum(1)


def test_equals_the_plain_formula_for_every_example():
    student, teacher = draw(0, 5, 3), draw(1, 5, 3)
    rows = plain(student, teacher)
    found = distillation_losses(student_of(student, [1] * 5), teacher, 2.0)
    torch.testing.assert_close(found, rows)
    expected = torch.stack([rows[:2].mean(), rows[2], rows[3:].mean()])
    found = distillation_losses(student_of(student, [2, 1, 2]), teacher, 2.0)
    torch.testing.assert_close(found, expected)


def test_every_space_has_the_weight_it_is_given():
    student, teacher = draw(0, 4, 7), draw(1, 4, 7)
    parts = [plain(student[:, part], teacher[:, part]) for part in (slice(0, 2), slice(2, 7))]
    found = distillation_losses(student_of(student, [1] * 4, [2, 5]), teacher, 2.0, [0.5, 3.0])
    torch.testing.assert_close(found, 0.5 * parts[0] + 3.0 * parts[1])
    with pytest.raises(ValueError, match="zip"):
        distillation_losses(student_of(student, [1] * 4, [2, 5]), teacher, 2.0, [0.5])


def test_what_a_space_has_in_common_is_free_but_not_between_spaces_that_are_merged():
    teacher = draw(1, 4, 5)
    shifted = teacher + torch.tensor([3.0, 3.0, -1.0, -1.0, -1.0])
    apart = distillation_losses(student_of(shifted, [1] * 4, [2, 3]), teacher, 2.0)
    together = distillation_losses(student_of(shifted, [1] * 4, [5]), teacher, 2.0)
    assert apart.max() < 1e-6
    assert together.min() > 0.1


def test_the_teacher_gets_no_gradient_and_the_student_does():
    student = torch.zeros(2, 3, requires_grad=True)
    teacher = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]], requires_grad=True)
    distillation_losses(student_of(student, [1, 1]), teacher, 1.0).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


def test_nothing_to_distil_is_zero_and_still_differentiable():
    student = torch.zeros(4, 3, requires_grad=True)
    nothing = student_of(student[:, :0], [1] * 4, [0])
    losses = distillation_losses(nothing, torch.zeros(4, 0), 2.0)
    losses.sum().backward()
    assert not losses.any()
