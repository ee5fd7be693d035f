"""Methods made of sums: the same as on one machine however the data are divided, and a sum that no
data can have is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from deal_core.config.experiment import AdapterConfig
from deal_core.config.method import MethodConfig, PrototypeConfig
from deal_core.lora.adapter import zero_adapter
from deal_core.lora.payload import PayloadError
from deal_core.lora.state import State
from deal_core.methods import EmbeddedTask, Statistics, make_method, statistics_of
from deal_core.methods import linear_probe as probe
from deal_core.methods.shared import class_sums
from deal_core.methods.shared.class_sums import without_negative
from deal_core.methods.shared.prototypes import ABSENT
from deal_core.randomness import seeded
from deal_core.wire.sum_codes import ROWS, SUM_CODES

SIZE, LABELS = 12, 4
Data = tuple[Tensor, Tensor]


def data(seed: int, examples: int = 160) -> Data:
    """Unit vectors around a mean of each label, with noise that has a direction."""
    generator = seeded("statistics", seed)
    means = torch.randn(LABELS, SIZE, generator=generator)
    targets = torch.randint(LABELS, (examples,), generator=generator)
    stretch = torch.linspace(0.2, 2.0, SIZE)
    x = means[targets] + stretch * torch.randn(examples, SIZE, generator=generator)
    return normalize(x, dim=1), targets


def divided(x: Tensor, y: Tensor, how: str) -> list[Data]:
    """The same records at other clients."""
    if how == "one client":
        places = torch.zeros(len(x), dtype=torch.long)
    elif how == "a label each":
        places = y
    elif how == "one record and the rest":
        places = (torch.arange(len(x)) > 0).long()
    else:
        places = torch.randint(5, (len(x),), generator=seeded("divided"))
    return [(x[places == k], y[places == k]) for k in places.unique()]


SPLITS = ("one client", "a label each", "one record and the rest", "at random")


def embedded(x: Tensor, y: Tensor, head: Tensor | None = None) -> EmbeddedTask:
    return EmbeddedTask(x, y, LABELS, head)


def method_with(**keys: object):
    return make_method(MethodConfig.model_validate(keys), AdapterConfig())


def statistics_in(method, name: str) -> Statistics:
    return {phase.name: phase.statistics for phase in method.phases}[name]


def one_round(state: State, statistics: Statistics, tasks: dict[str, list[Data]]) -> State:
    """A round in which every client gives its sums, checked, in float64."""
    totals = {}
    for task, clients in tasks.items():
        for x, y in clients:
            sums = statistics.collect(embedded(x, y, state.heads.get(task)))
            expected = statistics.shapes(LABELS, SIZE)
            assert {name: tuple(value.shape) for name, value in sums.items()} == dict(expected)
            statistics.check(sums)
            total = totals.setdefault(task, {})
            for name, value in sums.items():
                total[name] = total.get(name, 0) + value
    return statistics.absorb(state, totals)


def start() -> State:
    shapes = {"layer": (SIZE, SIZE)}
    return State(zero_adapter(shapes, 2, 1.0), zero_adapter(shapes, 2))


def centred(x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The records less the mean of their label, and the means."""
    records, targets = x.double().numpy(), y.numpy()
    means = np.stack([records[targets == c].mean(0) for c in range(LABELS)])
    return records - means[targets], means


def covariance(residual: np.ndarray) -> np.ndarray:
    return residual.T @ residual / len(residual)


def in_metric(means: np.ndarray, within: np.ndarray, ridge: float) -> np.ndarray:
    """Weights and biases of linear discriminant analysis with equal priors."""
    within = within + ridge * np.trace(within) / SIZE * np.eye(SIZE)
    weights = means @ np.linalg.inv(within)
    return np.concatenate([weights, -0.5 * (weights * means).sum(1, keepdims=True)], axis=1)


def without_common(rows: np.ndarray) -> np.ndarray:
    """What all labels have in common says nothing about which label."""
    return rows - rows.mean(0)


@pytest.mark.parametrize("how", SPLITS)
def test_prototypes_with_a_shared_covariance_are_the_central_closed_form(how):
    x, y = data(0)
    method = method_with(name="prototype", prototype={"ridge": 0.2, "own_covariance": 0.0})
    state = one_round(start(), statistics_in(method, "learn"), {"skin": divided(x, y, how)})
    residual, means = centred(x, y)
    expected = without_common(in_metric(means, covariance(residual), 0.2))
    np.testing.assert_allclose(state.heads["skin"].numpy(), expected, rtol=1e-5, atol=1e-5)
    assert state.heads["skin"].dtype == torch.float32


@pytest.mark.parametrize("how", SPLITS)
def test_labels_of_a_task_are_told_apart_by_a_mean_of_its_own_covariance_and_the_shared_one(how):
    skin, eye = data(0), data(3, examples=90)
    method = method_with(name="prototype", prototype={"ridge": 0.2, "own_covariance": 0.3})
    statistics = statistics_in(method, "learn")
    state = one_round(start(), statistics, {"skin": divided(*skin, how)})
    state = one_round(state, statistics, {"eye": divided(*eye, how)})
    parts = {"skin": centred(*skin), "eye": centred(*eye)}
    shared = covariance(np.concatenate([residual for residual, _ in parts.values()]))
    means = np.concatenate([own for _, own in parts.values()])
    firsts = np.split(without_common(in_metric(means, shared, 0.2)), 2)
    for (task, (residual, own)), first in zip(parts.items(), firsts, strict=True):
        mixed = 0.3 * covariance(residual) + 0.7 * shared
        head = state.heads[task].numpy()
        assert head.shape == statistics.head_shape(LABELS, SIZE)
        rows = [first, without_common(in_metric(own, mixed, 0.2))]
        np.testing.assert_allclose(head, np.stack(rows, axis=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", SPLITS)
def test_prototypes_without_a_covariance_answer_with_the_nearest_class_mean(how):
    x, y = data(1)
    method = method_with(name="prototype", prototype={"covariance": "none"})
    state = one_round(start(), statistics_in(method, "learn"), {"skin": divided(x, y, how)})
    head = state.heads["skin"]
    means = torch.stack([x[y == c].mean(0) for c in range(LABELS)])
    centre = means.mean(0)
    torch.testing.assert_close(head[:, :SIZE], means - centre, rtol=1e-5, atol=1e-5)
    answers = (x @ head[:, :SIZE].T + head[:, SIZE]).argmax(1)
    assert torch.equal(answers, torch.cdist(x, means).argmin(1))


def test_the_covariance_is_that_of_all_tasks_whenever_and_from_whomever_they_come():
    first, second = data(2), data(3, examples=90)
    statistics = statistics_in(method_with(name="prototype"), "learn")
    late = one_round(start(), statistics, {"skin": divided(*first, "at random")})
    half = divided(*second, "at random")
    late = one_round(late, statistics, {"eye": half[:2]})
    late = one_round(late, statistics, {"eye": half[2:]})  # in a later round
    once = one_round(start(), statistics, {"skin": [first], "eye": [second]})
    for task in ("skin", "eye"):
        torch.testing.assert_close(late.heads[task], once.heads[task], rtol=1e-5, atol=1e-5)
    alone = one_round(start(), statistics, {"skin": [first]})
    assert not torch.allclose(alone.heads["skin"], once.heads["skin"], rtol=1e-3)


def test_rounded_heads_answer_as_exact_ones_do():
    """Embeddings point nearly one way, as those of real models do: what they have in common must
    not take the steps that tell labels apart."""
    x, y = data(8, examples=400)
    x = normalize(0.1 * x + x[:1], dim=1)
    statistics = statistics_in(method_with(name="prototype"), "learn")
    head = one_round(start(), statistics, {"skin": [(x, y)]}).heads["skin"]
    weights, bias, rows = head[:, 1, :SIZE], head[:, 1, SIZE], SUM_CODES[ROWS]
    rounded = rows.decode(rows.encode(weights.double())).float()
    exactly, coarsely = ((x @ own.T + bias).argmax(1) for own in (weights, rounded))
    assert (exactly == coarsely).float().mean() > 0.98


def test_a_label_that_nobody_has_shown_is_never_the_answer():
    x, y = data(4)
    x, y = x[y > 0], y[y > 0]
    statistics = statistics_in(method_with(name="prototype"), "learn")
    head = one_round(start(), statistics, {"skin": [(x, y)]}).heads["skin"]
    assert head[0, :, SIZE].tolist() == [ABSENT, ABSENT]
    for row in range(2):
        assert (x @ head[:, row, :SIZE].T + head[:, row, SIZE]).argmax(1).min() > 0
    assert head.isfinite().all()


def test_one_record_is_enough_for_a_head():
    x, y = data(5)
    statistics = statistics_in(method_with(name="prototype"), "learn")
    assert one_round(start(), statistics, {"skin": [(x[:1], y[:1])]}).heads["skin"].isfinite().all()


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
    method = method_with(name="linear-probe", linear_probe={"ridge": ridge, "rounds": rounds})
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


def test_nothing_that_is_zero_travels_at_a_larger_rank_than_one():
    method = method_with(name="prototype")
    state = method.begin_task(start(), seeded(0))
    assert (state.current.rank, state.retained.rank) == (1, 1)
    assert method.begin_task(state, seeded(1)) is state
    assert statistics_of(method) is not None
    assert statistics_of(method_with(name="lwf")) is None


def good(kind: str) -> dict[str, Tensor]:
    x, y = data(7)
    collect = class_sums.collect if kind == "sums" else probe.collect
    return collect(embedded(x, y))


def times(name: str, factor: float):
    return lambda sums: sums | {name: factor * sums[name]}


def negated(sums):
    """A Gram matrix of the right trace that no data have."""
    size = SIZE
    matrix = class_sums.symmetric(sums["gram"], size)
    matrix = matrix - 3.0 * matrix.trace() / size * torch.eye(size, dtype=matrix.dtype)
    matrix = -matrix / 2.0
    assert abs(float(matrix.trace()) - float(sums["count"].sum())) < 1e-6
    rows, columns = torch.triu_indices(size, size)
    vector = torch.ones(size, dtype=matrix.dtype)
    matrix -= 50.0 * (torch.outer(vector, vector) - torch.eye(size, dtype=matrix.dtype))
    return sums | {"gram": matrix[rows, columns]}


def one_more(name: str, amount: float):
    def change(sums):
        value = sums[name].clone()
        value.view(-1)[0] += amount
        return sums | {name: value}

    return change


HOSTILE = {
    "half an example": ("sums", one_more("count", 0.5)),
    "fewer than none": ("sums", one_more("count", -1000.0)),
    "no example": ("sums", lambda sums: {name: 0 * value for name, value in sums.items()}),
    "vast count": ("sums", times("count", 1e9)),
    "long sum": ("sums", times("sum", 3.0)),
    "vast sum": ("sums", times("sum", 1e30)),
    "Gram of more examples": ("sums", times("gram", 1.01)),
    "negative Gram": ("sums", times("gram", -1.0)),
    "Gram of no data": ("sums", negated),
    "too little scatter": (
        "sums",
        lambda sums: (
            sums
            | {
                "sum": sums["count"][:, None]
                * 0.99
                * torch.nn.functional.one_hot(torch.zeros(LABELS, dtype=torch.long), SIZE)
            }
        ),
    ),
    "gradient of nobody": ("gradient", times("count", 0.0)),
    "long gradient": ("gradient", times("gradient", 1e6)),
    "unbalanced gradient": ("gradient", one_more("gradient", 5.0)),
    "half a gradient's example": ("gradient", one_more("count", 0.25)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_sums_that_no_data_can_have_are_refused(kind):
    which, spoil = HOSTILE[kind]
    check = class_sums.check if which == "sums" else probe.check
    check(good(which))
    with pytest.raises(PayloadError):
        check(spoil(good(which)))


IMPOSSIBLE = [kind for kind, (which, _) in HOSTILE.items() if which == "sums"]


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_room_for_rounding_is_none_for_sums_that_no_data_can_have(kind):
    class_sums.check_rounded(class_sums.with_scatter(good("sums")))
    with pytest.raises(PayloadError):
        class_sums.check_rounded(class_sums.with_scatter(HOSTILE[kind][1](good("sums"))))


def with_scatter_below(amount: float) -> dict[str, Tensor]:
    """What travels, with the least eigenvalue of the scatter so far below 0, the trace right."""
    sent = class_sums.with_scatter(class_sums.collect(embedded(*data(7))))
    values, vectors = torch.linalg.eigh(class_sums.symmetric(sent["scatter"], SIZE))
    values[-1] += values[0] + amount
    values[0] = -amount
    return sent | {"scatter": class_sums.triangle((vectors * values) @ vectors.T)}


def test_room_for_negative_scatter_is_as_wide_as_stated_and_no_wider():
    trace = class_sums.symmetric(with_scatter_below(0.0)["scatter"], SIZE).trace()
    class_sums.check_rounded(with_scatter_below(0.99 * float(trace) / 254))
    with pytest.raises(PayloadError, match="less scatter"):
        class_sums.check_rounded(with_scatter_below(1.01 * float(trace) / 254))


def test_negative_scatter_takes_nothing_away_from_what_others_sent():
    trace = float(class_sums.symmetric(with_scatter_below(0.0)["scatter"], SIZE).trace())
    sent = with_scatter_below(0.99 * trace / 254)
    class_sums.check_rounded(sent)
    sums = class_sums.with_gram(sent)
    gram = class_sums.symmetric(sums["gram"], SIZE)
    within = class_sums.scatter(sums["count"], sums["sum"], gram)
    assert float(torch.linalg.eigvalsh(within).min()) > -1e-9


def test_room_for_the_trace_is_as_wide_as_stated_and_no_wider():
    sent = class_sums.with_scatter(class_sums.collect(embedded(*data(7))))
    count, total = sent["count"], sent["sum"]
    off = SIZE**0.5 * total.abs().amax(dim=1) / 254
    room = float((off * (2 * total.norm(dim=1) + off) / count).sum()) / float(count.sum())
    share = float(class_sums.symmetric(sent["scatter"], SIZE).trace()) / float(count.sum())
    assert 2e-3 < room < 0.05
    for factor in (1.0 + 0.9 * room / share, 1.0 - 0.9 * room / share):
        class_sums.check_rounded(sent | {"scatter": factor * sent["scatter"]})
    for factor in (1.0 + 1.2 * room / share, 1.0 - 1.2 * room / share):
        with pytest.raises(PayloadError, match="trace"):
            class_sums.check_rounded(sent | {"scatter": factor * sent["scatter"]})


def test_negative_scatter_counts_as_none_and_other_matrices_stay_the_same_objects():
    x = torch.randn(40, SIZE, generator=seeded("x"), dtype=torch.float64)
    positive = x.T @ x / 40
    assert without_negative(positive) is positive
    assert without_negative(torch.zeros(SIZE, SIZE).double()).abs().max() == 0
    values, vectors = torch.linalg.eigh(positive)
    spoilt = (vectors * (values - values[3])) @ vectors.T
    repaired = (vectors * (values - values[3]).clamp(min=0.0)) @ vectors.T
    torch.testing.assert_close(without_negative(spoilt), repaired)


def test_what_passes_the_check_makes_finite_heads():
    """All examples equal: there is no scatter at all."""
    x = normalize(torch.ones(9, SIZE), dim=1)
    sums = class_sums.collect(embedded(x, torch.zeros(9, dtype=torch.long)))
    class_sums.check(sums)
    statistics = statistics_in(method_with(name="prototype"), "learn")
    state = statistics.absorb(start(), {"skin": sums})
    assert state.heads["skin"].isfinite().all()
    assert float(state.heads["skin"].abs().max()) < 1e10
    assert PrototypeConfig().covariance == "shared"
