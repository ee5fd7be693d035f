"""The learned filter of one layer against dense formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deal_core.config.method import ConsolidationConfig, RetentionConfig
from deal_core.lora.adapter import Adapter, LoraFactors, relative_difference, spectrum
from deal_core.methods.deal.filter_learning import FilterLearning, LayerFilter, diagonal_student
from deal_core.methods.deal.retention import retain

ROUNDING = 1e-12
SHAPES = {"only": (30, 40)}
RANK, SCALING = 5, 2.0


def learned(noise: float = 0.0, **keys: object) -> RetentionConfig:
    return RetentionConfig.model_validate({"filter": "learned", "noise": noise, **keys})


@pytest.fixture
def stack_of(random_adapter):
    """Eight directions whose strengths differ."""

    def draw(seed: int) -> Adapter:
        f = random_adapter(SHAPES, 8, 1.0, seed).layers["only"]
        return Adapter({"only": LoraFactors(f.A, f.B * torch.linspace(1.0, 0.2, 8))})

    return draw


def filter_of(stack: Adapter, student: Adapter, config: RetentionConfig) -> LayerFilter:
    return LayerFilter(stack.layers["only"], student.layers["only"], SCALING, config)


def started(stack: Adapter, config: RetentionConfig) -> LayerFilter:
    return filter_of(stack, diagonal_student(stack, RANK, SCALING, config), config)


def sent(stack: Adapter, each: LayerFilter) -> LoraFactors:
    A = diagonal_student(stack, RANK, SCALING, learned()).layers["only"].A
    return LoraFactors(A, each.lora_B())


def moved(each: LayerFilter, seed: int) -> LayerFilter:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in (each.gains, each.centres):
            value += 0.3 * torch.randn(value.shape, generator=generator)
    each.bound()
    return each


@pytest.mark.parametrize("noise", [0.0, 6.0])
def test_the_student_is_what_retention_keeps_without_learning(stack_of, noise):
    """The Wiener start, as factors of the form that learns."""
    config = learned(noise)
    student = diagonal_student(stack_of(0), RANK, SCALING, config)
    kept = retain(stack_of(0), RANK, config)
    assert relative_difference(student, kept) < 1e-6
    A = student.layers["only"].A
    torch.testing.assert_close(A @ A.T, torch.eye(RANK), rtol=0, atol=1e-6)


def test_a_client_begins_where_the_server_does(stack_of):
    config, stack = learned(6.0), stack_of(1)
    student = diagonal_student(stack, RANK, SCALING, config)
    each = filter_of(stack, student, config)
    S = spectrum(stack.layers["only"]).S[:RANK]
    torch.testing.assert_close(each.x, S / S[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(each.lora_B(), student.layers["only"].B, rtol=1e-4, atol=1e-5)
    assert float(each.retention_change().detach().abs().max()) < 1e-4
    assert 0.01 < float(each.rho().detach()[-1]) < float(each.rho().detach()[0]) < 1.0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.floats(0.0, 8.0), st.floats(0.05, 3.0))
def test_large_directions_survive_whatever_was_learnt(random_adapter, seed, noise, width):
    f = random_adapter(SHAPES, 8, 1.0, seed).layers["only"]
    stack = Adapter({"only": f})
    rho = moved(started(stack, learned(noise, width=width)), seed).rho().detach()
    assert float(rho.diff().max()) <= ROUNDING  # strongest first
    assert -ROUNDING <= float(rho.min()) <= float(rho.max()) <= 1.0 + ROUNDING


def test_the_mean_of_what_clients_send_has_the_mean_filter(stack_of):
    """Though their centres differ, so that no kernels could say it."""
    stack, config = stack_of(2), learned(4.0)
    clients = [moved(started(stack, config), seed) for seed in (1, 2)]
    B = (clients[0].lora_B() + clients[1].lora_B()) / 2
    mean = (clients[0].rho() + clients[1].rho()).detach() / 2
    student = Adapter({"only": LoraFactors(sent(stack, clients[0]).A, B)}, SCALING)
    found = filter_of(stack, student, config)
    torch.testing.assert_close(found.rho().detach(), mean, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mean, clients[0].rho().detach(), atol=1e-2)


def test_the_gradient_is_that_of_the_dense_formula(stack_of):
    """Pulled back from ``lora_B`` by hand; the formula word for word by autograd."""
    stack, config = stack_of(3), learned(6.0)
    each = started(stack, config)
    generator = torch.Generator().manual_seed(0)
    of_B = torch.randn(30, RANK, generator=generator)
    each.pull_back(of_B)

    U, S, _ = torch.linalg.svd(stack.layers["only"].B.double() @ stack.layers["only"].A.double())
    U, S = U[:, :RANK], S[:RANK]
    g = each.gains.detach().clone().requires_grad_()
    c = each.centres.detach().clone().requires_grad_()
    phi = torch.exp(-(((S / S[0])[:, None] - c) ** 2) / (2 * each.start.tau**2))
    rho = (phi * g).sum(1) / phi.sum(1)
    sign = (U * each.columns).sum(0).sign()
    (U * sign * (rho * S / SCALING) * of_B.double()).sum().backward()
    torch.testing.assert_close(each.gains.grad, g.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(each.centres.grad, c.grad, rtol=1e-4, atol=1e-5)
    assert float(c.grad.abs().max()) > 1e-3


def test_the_penalty_and_its_gradient_are_the_formula(stack_of):
    stack, config = stack_of(4), learned(6.0)
    each = moved(started(stack, config), 5)
    weights = ConsolidationConfig(lambda1=0.5, lambda2=0.25, a=3.0, b=2.0)
    penalty = FilterLearning(None, {}, {"only": each}, weights).penalty()
    penalty.backward()
    g, c = (v.detach().clone().requires_grad_() for v in (each.gains, each.centres))
    theta1 = torch.cat([g - each.start.gains, c - each.start.centres])
    phi = torch.exp(-((each.x[:, None] - c) ** 2) / (2 * each.start.tau**2))
    phi0 = torch.exp(-((each.x[:, None] - each.start.centres) ** 2) / (2 * each.start.tau**2))
    free = (phi * g).sum(1) / phi.sum(1)
    bounded = free.detach().clamp(0, 1).flip(0).cummax(0).values.flip(0)
    rho = free + (bounded - free).detach()
    theta2 = (rho - (phi0 * each.start.gains).sum(1) / phi0.sum(1)) * each.x
    expected = 0.5 * theta1.abs().pow(3.0).mean() + 0.25 * theta2.square().mean()
    torch.testing.assert_close(penalty.detach(), expected.detach(), rtol=1e-4, atol=1e-7)
    expected.backward()
    torch.testing.assert_close(each.gains.grad, g.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(each.centres.grad, c.grad, rtol=1e-3, atol=1e-5)
    assert float(g.grad.abs().max()) > 1e-3


def test_a_bound_does_not_hold_a_gain_for_good(stack_of):
    """At gains of one, and of zero, the gradient still says where to go."""
    each = started(stack_of(5), learned(1e-9))
    assert float(each.rho().detach().min()) == pytest.approx(1.0)
    each.pull_back(each.columns.float())
    assert float(each.gains.grad.max()) > 0.0
    with torch.no_grad():
        each.gains -= 10.0
    each.bound()
    each.gains.grad = None
    assert float(each.lora_B().abs().max()) < 1e-6
    each.pull_back(-each.columns.float())
    assert float(each.gains.grad.min()) < 0.0


def test_directions_that_are_not_there_stay_zero(random_adapter):
    """Three directions in a student of five."""
    stack, config = random_adapter(SHAPES, 3, 1.0, 6), learned(8.0)
    student = diagonal_student(stack, RANK, SCALING, config)
    each = moved(filter_of(stack, student, config), 3)
    B = each.lora_B()
    assert B.shape == (30, RANK)
    assert not B[:, 3:].any()
    assert B[:, :3].any()
    each.pull_back(torch.ones(30, RANK))
    assert each.gains.grad.isfinite().all()
