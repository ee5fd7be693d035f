from __future__ import annotations

import torch

from deal_core.distillation import distillation_losses


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_equals_the_plain_formula_for_every_example():
    student, teacher = draw(0, 5, 3), draw(1, 5, 3)
    p = (teacher / 2.0).softmax(1)
    q = (student / 2.0).softmax(1)
    rows = 4.0 * (p * (p / q).log()).sum(1)
    torch.testing.assert_close(distillation_losses(student, teacher, 2.0, [1] * 5), rows)
    expected = torch.stack([rows[:2].mean(), rows[2], rows[3:].mean()])
    torch.testing.assert_close(distillation_losses(student, teacher, 2.0, [2, 1, 2]), expected)


def test_zero_when_both_agree_up_to_a_constant():
    logits = draw(1, 4, 6)
    assert distillation_losses(logits + 3.0, logits, 2.0, [1] * 4).max() < 1e-6


def test_the_teacher_gets_no_gradient_and_the_student_does():
    student = torch.zeros(2, 3, requires_grad=True)
    teacher = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]], requires_grad=True)
    distillation_losses(student, teacher, 1.0, [1, 1]).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


def test_nothing_to_distil_is_zero_and_still_differentiable():
    student = torch.zeros(4, 3, requires_grad=True)
    losses = distillation_losses(student[:, :0], torch.zeros(4, 0), 2.0, [1] * 4)
    losses.sum().backward()
    assert not losses.any()
