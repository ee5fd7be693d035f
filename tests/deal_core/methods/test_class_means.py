"""Class means are those of one machine however the data are divided."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from deal_core.config.method import PrototypeConfig
from deal_core.methods import statistics_of
from deal_core.methods.shared.class_sums import COUNT, SUM, collect, scatter
from deal_core.methods.shared.prototypes import ABSENT, heads
from deal_core.randomness import seeded
from deal_core.wire.sum_codes import ROWS, SUM_CODES
from tests.deal_core.methods.sums import (
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


def centred(x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The records less the mean of their label, and the means."""
    records, targets = x.double().numpy(), y.numpy()
    means = np.stack([records[targets == c].mean(0) for c in range(LABELS)])
    return records - means[targets], means


def covariance(residual: np.ndarray) -> np.ndarray:
    return residual.T @ residual / len(residual)


def counts(y: Tensor) -> np.ndarray:
    return np.bincount(y.numpy(), minlength=LABELS)


def in_metric(
    means: np.ndarray, within: np.ndarray, ridge: float, count: np.ndarray, share: float
) -> np.ndarray:
    """Weights and biases of linear discriminant analysis with equal priors, and a share of what
    the error of a mean of so many records takes from its score."""
    inverse = np.linalg.inv(within + ridge * np.trace(within) / SIZE * np.eye(SIZE))
    weights = means @ inverse
    bias = share * np.trace(inverse @ within) / (2 * count) - 0.5 * (weights * means).sum(1)
    return np.concatenate([weights, bias[:, None]], axis=1)


def without_common(rows: np.ndarray) -> np.ndarray:
    """What all labels have in common says nothing about which label."""
    return rows - rows.mean(0)


@pytest.mark.parametrize("how", SPLITS)
def test_prototypes_with_a_shared_covariance_are_the_central_closed_form(how):
    x, y = data(0)
    settings = {"ridge": 0.2, "own_covariance": 0.0, "few_records": 0.7}
    method = method_with(name="prototype", prototype=settings)
    state = one_round(start(), statistics_in(method, "learn"), {"skin": divided(x, y, how)})
    residual, means = centred(x, y)
    expected = without_common(in_metric(means, covariance(residual), 0.2, counts(y), 0.7))
    np.testing.assert_allclose(state.heads["skin"].numpy(), expected, rtol=1e-5, atol=1e-5)
    assert state.heads["skin"].dtype == torch.float32


@pytest.mark.parametrize("records", [8, 20, 32, 64])
def test_the_ridge_grows_where_records_are_few_for_so_many_entries(records):
    """By the square of a fifth of the entries per record, in units of the mean eigenvalue."""
    x, y = data(0, examples=records)[0], torch.arange(records) % LABELS
    sums = {f"{name}/skin": value for name, value in collect(embedded(x, y)).items()}
    config = PrototypeConfig(ridge=0.01, own_covariance=0.0, few_records=0.0)
    ridge = max(0.01, (0.2 * SIZE / records) ** 2)
    assert (ridge > 0.01) == (records < 24)
    residual, means = centred(x, y)
    expected = without_common(in_metric(means, covariance(residual), ridge, counts(y), 0.0))
    made = heads(sums, config)["skin"].numpy()
    np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", SPLITS)
def test_labels_of_a_task_are_told_apart_by_a_mean_of_its_own_covariance_and_the_shared_one(how):
    skin, eye = data(0), data(3, examples=90)
    settings = {"ridge": 0.2, "own_covariance": 0.3, "few_records": 0.7}
    method = method_with(name="prototype", prototype=settings)
    statistics = statistics_in(method, "learn")
    state = one_round(start(), statistics, {"skin": divided(*skin, how)})
    state = one_round(state, statistics, {"eye": divided(*eye, how)})
    parts = {"skin": centred(*skin), "eye": centred(*eye)}
    shared = covariance(np.concatenate([residual for residual, _ in parts.values()]))
    means = np.concatenate([own for _, own in parts.values()])
    records = {"skin": counts(skin[1]), "eye": counts(eye[1])}
    all_records = np.concatenate(list(records.values()))
    firsts = np.split(without_common(in_metric(means, shared, 0.2, all_records, 0.7)), 2)
    for (task, (residual, own)), first in zip(parts.items(), firsts, strict=True):
        mixed = 0.3 * covariance(residual) + 0.7 * shared
        head = state.heads[task].numpy()
        assert head.shape == statistics.head_shape(LABELS, SIZE)
        rows = [first, without_common(in_metric(own, mixed, 0.2, records[task], 0.7))]
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


def mean_score(share: float, records: int) -> float:
    """Score of the first label, of so many records, less that of the second, of 300, where
    both lie equally far from what is asked: the mean of 300 draws."""
    statistics = statistics_in(
        method_with(name="prototype", prototype={"few_records": share, "own_covariance": 0.0}),
        "learn",
    )
    generator = seeded("few records", records)
    means = torch.zeros(LABELS, SIZE, dtype=torch.float64)
    means[0, 0], means[1, 1], means[2:, 2] = 0.7, 0.7, 0.7
    y = torch.tensor([0] * records + [1, 2, 3] * 300)
    found = []
    for _ in range(300):
        noise = 0.1 * torch.randn(len(y), SIZE, generator=generator, dtype=torch.float64)
        totals = statistics.collect(embedded(means[y] + noise, y))
        head = statistics.absorb(start(), {"skin": totals}).heads["skin"].double()
        found.append(head[0] @ _between() - head[1] @ _between())
    return float(torch.stack(found).mean())


def _between() -> Tensor:
    """As near to the first label as to the second; a 1 for the bias."""
    return torch.tensor([0.35, 0.35] + [0.0] * (SIZE - 2) + [1.0], dtype=torch.float64)


def test_labels_of_few_records_lose_a_score_that_is_given_back_whole_or_in_part():
    lost = mean_score(0.0, records=4)
    assert lost < -0.8  # tr(Sigma^-1 S) / 2n is 12 / 1.3 / 8 = 1.15
    assert mean_score(1.0, records=4) == pytest.approx(0.0, abs=0.25)
    assert mean_score(0.5, records=4) == pytest.approx(lost / 2, abs=0.15)


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


def test_a_client_whose_weight_is_capped_moves_no_mean_of_a_label_that_it_alone_has():
    """Its sums and counts are shortened alike, so that a count may be below 1."""
    x, _ = data(4)
    alone = x[:1]
    count, total = torch.tensor([1.0, 20.0]).double(), torch.stack([alone[0], 20 * x[1]]).double()
    few = count * torch.tensor([0.1, 1.0]), total * torch.tensor([[0.1], [1.0]])
    config = PrototypeConfig(covariance="none", names=0.0)
    heads_of = [
        heads({f"{COUNT}/t": c, f"{SUM}/t": s}, config)["t"] for c, s in ((count, total), few)
    ]
    torch.testing.assert_close(*heads_of)
    own = alone.double()
    left = scatter(torch.tensor([0.1]).double(), 0.1 * own, 0.1 * own.T @ own)
    assert float(left.abs().max()) < 1e-8  # and not 0.09


def test_beside_names_a_label_that_nobody_has_shown_has_the_mean_of_its_task():
    """So a name can answer with it; other labels keep the rows that they have without it."""
    x, y = data(4)
    x, y = x[y > 0], y[y > 0]
    settings = {"ridge": 0.2, "own_covariance": 0.5, "few_records": 0.5, "enabled": "on"}
    deal = statistics_in(method_with(name="deal", prototype=settings), "prototypes")
    alone = statistics_in(method_with(name="prototype", prototype=settings), "learn")
    other = data(5)
    given = {"skin": [(x, y)], "heart": [other]}
    head, strict = (
        one_round(start(), statistics, given).heads["skin"].double().numpy()
        for statistics in (deal, alone)
    )
    mean = x.double().numpy().mean(0)
    records = np.concatenate([centred(*other)[0], *of_each(x, y)])
    shared, own = covariance(records), covariance(np.concatenate(of_each(x, y)))
    for step, within in enumerate((shared, 0.5 * own + 0.5 * shared)):
        inverse = np.linalg.inv(within + 0.2 * np.trace(within) / SIZE * np.eye(SIZE))
        neutral = np.append(inverse @ mean, -0.5 * mean @ inverse @ mean)
        apart = head[0, step] - head[1, step]  # what all rows have in common is taken out
        shown = head[2, step] - head[1, step]
        np.testing.assert_allclose(shown, strict[2, step] - strict[1, step], atol=1e-4)
        first = x.double().numpy()[y.numpy() == 1].mean(0)
        lost = np.trace(inverse @ within) / (2 * int((y == 1).sum()))
        expected = np.append(inverse @ first, 0.5 * lost - 0.5 * first @ inverse @ first)
        np.testing.assert_allclose(apart, neutral - expected, rtol=1e-4, atol=1e-4)


def of_each(x: Tensor, y: Tensor) -> list[np.ndarray]:
    """The records of each label less their mean."""
    groups = [x.double().numpy()[y.numpy() == c] for c in sorted(set(y.tolist()))]
    return [group - group.mean(0) for group in groups]


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


def test_nothing_that_is_zero_travels_at_a_larger_rank_than_one():
    method = method_with(name="prototype")
    state = method.begin_task(start(), seeded(0))
    assert (state.current.rank, state.retained.rank) == (1, 1)
    assert method.begin_task(state, seeded(1)) is state
    assert statistics_of(method) is not None
    assert statistics_of(method_with(name="lwf")) is None
