"""A linear probe is that of one machine however the data are divided."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from deal_core.baselines import frozen as probe
from deal_core.config.experiment import AdapterConfig
from tests.deal_core.deal.sums import (
    LABELS,
    SIZE,
    SPLITS,
    data,
    divided,
    method_with,
    one_round,
    start,
    statistics_in,
)


def objective(weights: Tensor, x: Tensor, y: Tensor, ridge: float) -> Tensor:
    logits = probe.with_one(x.double()) @ weights.T
    return cross_entropy(logits, y) + 0.5 * ridge * weights.square().sum()


def central_optimum(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """Full-batch Newton steps on one machine."""
    weights = torch.zeros(LABELS, SIZE + 1, dtype=torch.float64)
    for _ in range(30):
        at = weights.clone().requires_grad_(True)
        gradient = torch.autograd.grad(objective(at, x, y, ridge), at)[0].flatten()
        hessian = torch.autograd.functional.hessian(lambda w: objective(w, x, y, ridge), weights)
        step = torch.linalg.solve(hessian.reshape(len(gradient), -1), gradient)
        weights = weights - step.view_as(weights)
    return weights


def probed(how: str, rounds: int, ridge: float) -> Tensor:
    x, y = data(6)
    method = probe.linear_probe(AdapterConfig(), rounds, ridge)
    tasks = {"skin": divided(x, y, how)}
    state = one_round(start(), statistics_in(method, "learn"), tasks)
    for _ in range(rounds):
        state = one_round(state, statistics_in(method, "probe"), tasks)
    return method.end_task(state).heads["skin"]


@pytest.mark.parametrize("how", SPLITS)
def test_a_linear_probe_reaches_the_central_optimum(how):
    x, y = data(6)
    optimum = central_optimum(x, y, 1e-2)
    reached = probed(how, 200, 1e-2).double()
    torch.testing.assert_close(reached, optimum, rtol=1e-5, atol=1e-5)
    few = probed(how, 30, 1e-2).double()
    assert objective(few, x, y, 1e-2) - objective(optimum, x, y, 1e-2) < 1e-4


@pytest.mark.parametrize("how", SPLITS[1:])
def test_every_step_of_a_linear_probe_is_that_of_one_client(how):
    torch.testing.assert_close(
        probed(how, 12, 1e-4), probed("one client", 12, 1e-4), rtol=1e-5, atol=1e-5
    )


def test_a_linear_probe_leaves_the_heads_of_earlier_tasks_alone():
    method = method_with(name="linear-probe")
    state, kept = start(), {}
    for seed, task in enumerate(("skin", "eye")):
        tasks = {task: [data(seed)]}
        state = one_round(state, statistics_in(method, "learn"), tasks)
        state = one_round(state, statistics_in(method, "probe"), tasks)
        state = method.end_task(state)
        kept = kept or dict(state.heads)
    assert state.heads.keys() == {"skin", "eye"}
    assert torch.equal(state.heads["skin"], kept["skin"])
