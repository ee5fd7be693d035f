"""A linear probe is that of one machine however the data are divided; a sum that no data can have
is refused, and rounding is not."""

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from deal_core.baselines import frozen as probe
from deal_core.config.experiment import AdapterConfig
from deal_core.lora.payload import PayloadError
from tests.deal_core.deal.sums import (
    LABELS,
    SIZE,
    SPLITS,
    data,
    divided,
    embedded,
    method_with,
    one_round,
    start,
    statistics_in,
)


def objective(weights, x, y, ridge):
    logits = probe.with_one(x.double()) @ weights.T
    return cross_entropy(logits, y) + 0.5 * ridge * weights.square().sum()


def central_optimum(x, y, ridge):
    """Full-batch Newton steps on one machine."""
    weights = torch.zeros(LABELS, SIZE + 1, dtype=torch.float64)
    for _ in range(30):
        at = weights.clone().requires_grad_(True)
        gradient = torch.autograd.grad(objective(at, x, y, ridge), at)[0].flatten()
        hessian = torch.autograd.functional.hessian(lambda w: objective(w, x, y, ridge), weights)
        step = torch.linalg.solve(hessian.reshape(len(gradient), -1), gradient)
        weights = weights - step.view_as(weights)
    return weights


def probed(how, rounds, ridge):
    x, y = data(6)
    method = probe.linear_probe(AdapterConfig(), rounds, ridge)
    tasks = {"skin": divided(x, y, how)}
    state = one_round(start(), statistics_in(method, "learn"), tasks)
    for _ in range(rounds):
        state = one_round(state, statistics_in(method, "probe"), tasks)
    return method.end_task(state).heads["skin"]


def test_a_linear_probe_reaches_the_central_optimum():
    x, y = data(6)
    optimum = central_optimum(x, y, 1e-2)
    reached = probed("at random", 200, 1e-2).double()
    torch.testing.assert_close(reached, optimum, rtol=1e-5, atol=1e-5)
    few = probed("at random", 30, 1e-2).double()
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


def good(kind):
    x, y = data(7)
    collect = probe.collect_moment if kind == "moment" else probe.collect
    return collect(embedded(x, y))


def times(name, factor):
    return lambda sums: sums | {name: factor * sums[name]}


def negated(sums):
    """A moment of the right trace that no data have."""
    matrix = probe.symmetric(sums["moment"])
    identity = torch.eye(SIZE + 1, dtype=matrix.dtype)
    matrix -= 50.0 * (torch.ones_like(matrix) - identity)
    rows, columns = torch.triu_indices(SIZE + 1, SIZE + 1)
    return sums | {"moment": matrix[rows, columns]}


def one_more(name, amount):
    def change(sums):
        value = sums[name].clone()
        value.view(-1)[0] += amount
        return sums | {name: value}

    return change


HOSTILE = {
    "half an example": ("moment", one_more("count", 0.5)),
    "fewer than none": ("moment", one_more("count", -1000.0)),
    "no example": ("moment", lambda sums: {name: 0 * value for name, value in sums.items()}),
    "vast count": ("moment", times("count", 1e9)),
    "moment of more examples": ("moment", times("moment", 1.01)),
    "vast moment": ("moment", times("moment", 1e30)),
    "negative moment": ("moment", times("moment", -1.0)),
    "moment of no data": ("moment", negated),
    "an example that is not counted": ("moment", one_more("count", 1.0)),
    "gradient of nobody": ("gradient", times("count", 0.0)),
    "long gradient": ("gradient", times("gradient", 1e6)),
    "unbalanced gradient": ("gradient", one_more("gradient", 5.0)),
    "half a gradient's example": ("gradient", one_more("count", 0.25)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_sums_that_no_data_can_have_are_refused(kind):
    which, spoil = HOSTILE[kind]
    check = probe.check_moment if which == "moment" else probe.check
    check(good(which))
    with pytest.raises(PayloadError):
        check(spoil(good(which)))


def test_what_passes_the_check_makes_finite_heads():
    """All examples equal: there is no scatter at all."""
    x = normalize(torch.ones(9, SIZE), dim=1)
    tasks = {"skin": [(x, torch.zeros(9, dtype=torch.long))]}
    method = method_with(name="linear-probe")
    state = one_round(start(), statistics_in(method, "learn"), tasks)
    state = one_round(state, statistics_in(method, "probe"), tasks)
    assert state.heads["skin"].isfinite().all()
    assert float(state.heads["skin"].abs().max()) < 1e10
