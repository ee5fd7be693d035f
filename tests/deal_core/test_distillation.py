from __future__ import annotations

import torch

from deal_core.distillation import distillation_loss


def test_equals_the_plain_formula():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(5, 3, generator=generator),
        torch.randn(5, 3, generator=generator),
    )
    p = (teacher / 2.0).softmax(1)
    q = (student / 2.0).softmax(1)
    expected = 4.0 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, 2.0), expected)


def test_zero_when_both_agree_up_to_a_constant():
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    assert distillation_loss(logits + 3.0, logits, 2.0) < 1e-6


def test_the_teacher_gets_no_gradient_and_the_student_does():
    student = torch.zeros(2, 3, requires_grad=True)
    teacher = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]], requires_grad=True)
    distillation_loss(student, teacher, 1.0).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


def test_nothing_to_distil_is_zero_and_still_differentiable():
    student = torch.zeros(4, 3, requires_grad=True)
    loss = distillation_loss(student[:, :0], torch.zeros(4, 0), 2.0)
    loss.backward()
    assert loss == 0
