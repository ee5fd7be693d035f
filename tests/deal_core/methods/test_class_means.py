"""Class means are those of one machine however the data are divided."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor
from torch.nn.functional import normalize

from deal_core.config.method import PrototypeConfig
from deal_core.methods import COUNT, SUM, statistics_of, whole_heads
from deal_core.methods.shared.class_sums import collect
from deal_core.methods.shared.prototypes import ABSENT, SCALE, heads
from deal_core.randomness import seeded
from deal_core.training.public_subspace import principal
from deal_core.wire.heads import pack_heads, read_heads
from tests.deal_core.methods.sums import (
    LABELS,
    SIZE,
    SPLITS,
    class_totals,
    data,
    divided,
    embedded,
    known_of,
    method_with,
    name_vectors,
    one_round,
    start,
    statistics_in,
)

SHARED = {"covariance": "shared"}


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
    settings = {"covariance": "shared", "ridge": 0.2, "own_covariance": 0.0, "few_records": 0.7}
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
    settings = {"covariance": "shared", "ridge": 0.2, "own_covariance": 0.3, "few_records": 0.7}
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


def test_the_covariance_is_that_of_all_tasks_whenever_and_from_whomever_they_come():
    first, second = data(2), data(3, examples=90)
    statistics = statistics_in(method_with(name="prototype", prototype=SHARED), "learn")
    late = one_round(start(), statistics, {"skin": divided(*first, "at random")})
    late = one_round(late, statistics, {"eye": divided(*second, "at random")})
    once = one_round(start(), statistics, {"skin": [first], "eye": [second]})
    for task in ("skin", "eye"):
        torch.testing.assert_close(late.heads[task], once.heads[task], rtol=1e-5, atol=1e-5)
    alone = one_round(start(), statistics, {"skin": [first]})
    assert not torch.allclose(alone.heads["skin"], once.heads["skin"], rtol=1e-3)


def mean_score(share: float, records: int) -> float:
    """Score of the first label, of so many records, less that of the second, of 300, where
    both lie equally far from what is asked: the mean of 300 draws."""
    settings = {"few_records": share, "own_covariance": 0.0}
    statistics = statistics_in(method_with(name="prototype", prototype=SHARED | settings), "learn")
    generator = seeded("few records", records)
    means = torch.zeros(LABELS, SIZE, dtype=torch.float64)
    means[0, 0], means[1, 1], means[2:, 2] = 0.7, 0.7, 0.7
    y = torch.tensor([0] * records + [1, 2, 3] * 300)
    found = []
    for _ in range(300):
        noise = 0.1 * torch.randn(len(y), SIZE, generator=generator, dtype=torch.float64)
        totals = collect(embedded(means[y] + noise, y))
        head = statistics.absorb(start(), {"skin": totals}, known_of([])).heads["skin"].double()
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
    statistics = statistics_in(method_with(name="prototype", prototype=SHARED), "learn")
    head = one_round(start(), statistics, {"skin": [(x, y)]}).heads["skin"]
    rounded = at_int8(head)
    exactly, coarsely = (
        (x @ own[:, 1, :SIZE].T + own[:, 1, SIZE]).argmax(1) for own in (head, rounded)
    )
    assert not torch.equal(head, rounded)
    assert (exactly == coarsely).float().mean() > 0.98


def at_int8(head: Tensor) -> Tensor:
    """As it arrives at a client."""
    packed = {key: Array(part) for key, part in pack_heads({"skin": head}, True).items()}
    return read_heads(ArrayRecord(packed), {"skin": tuple(head.shape)}, True)["skin"]


def test_beside_names_a_label_that_nobody_has_shown_has_the_mean_of_its_task():
    """So a name can answer with it; other labels keep the rows that they have without it."""
    x, y = data(4)
    x, y = x[y > 0], y[y > 0]
    settings = {"ridge": 0.2, "own_covariance": 0.5, "few_records": 0.5, "enabled": "on"}
    settings |= SHARED
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
    statistics = statistics_in(method_with(name="prototype", prototype=SHARED), "learn")
    head = one_round(start(), statistics, {"skin": [(x, y)]}).heads["skin"]
    assert head[0, :, SIZE].tolist() == [ABSENT, ABSENT]
    for row in range(2):
        assert (x @ head[:, row, :SIZE].T + head[:, row, SIZE]).argmax(1).min() > 0
    assert head.isfinite().all()


def test_one_record_is_enough_for_a_head():
    x, y = data(5)
    statistics = statistics_in(method_with(name="prototype", prototype=SHARED), "learn")
    assert one_round(start(), statistics, {"skin": [(x[:1], y[:1])]}).heads["skin"].isfinite().all()


def noised(totals: dict, known, **settings: object):
    """The state after a round of class sums of the task "skin"."""
    method = method_with(name="prototype", prototype=settings)
    statistics = statistics_in(method, "learn")
    assert statistics.exact is None
    return statistics.absorb(start(), {"skin": totals}, known)


def test_without_a_covariance_the_class_mean_in_the_nearest_direction_is_the_answer():
    x, y = data(1)
    head = noised(class_totals(x, y), known_of(["skin"]), covariance="none", directions=0)
    found = head.heads["skin"]
    means = normalize(torch.stack([x[y == c].mean(0) for c in range(LABELS)]), dim=1)
    torch.testing.assert_close(found[:, :SIZE], SCALE * means, rtol=1e-5, atol=1e-5)
    assert not found[:, SIZE].any()


def test_a_label_of_a_class_sum_that_nobody_has_a_record_of_has_the_vector_of_its_name():
    x, y = data(4)
    x, y = x[y > 0], y[y > 0]
    totals = class_totals(x, y)
    found = noised(totals, known_of(["skin"]), covariance="none", directions=0).heads["skin"]
    torch.testing.assert_close(found[0, :SIZE], SCALE * name_vectors("skin")[0])
    means = normalize(totals[SUM][1:], dim=1)
    torch.testing.assert_close(found[1:, :SIZE], SCALE * means.float())


WIDE = 2 * SIZE
"""Entries of whole embeddings."""


def in_directions(seed: int = 9):
    """Public directions of embeddings, whole vectors, and labels."""
    spread = torch.linspace(2.0, 0.1, WIDE)
    public = spread * torch.randn(500, WIDE, generator=seeded("public")) + 0.3
    x, y = data(seed, examples=400)
    return principal(public, SIZE), 0.4 * torch.cat([x, x.flip(1)], dim=1) + 0.3, y


@pytest.mark.parametrize("deviation", [0.0, 0.5, 4.0])
def test_in_public_directions_class_means_have_one_length_in_the_metric_of_public_texts(deviation):
    """A name counts as records for each deviation of the noise."""
    subspace, vectors, y = in_directions()
    totals = class_totals(subspace.project(vectors), y)
    known = known_of(["skin"], deviation, subspace)
    head = noised(totals, known, ridge=0.2, names_noise=3.0).heads["skin"].numpy()
    count, spread, prior = counts(y)[:, None], subspace.spread.numpy(), 3.0 * deviation
    names = name_vectors("skin").double().numpy()
    means = (totals[SUM].numpy() + prior * names) / (count + prior)
    inverse = np.linalg.inv(np.diag(spread) + 0.2 * spread.mean() * np.eye(SIZE))
    lengths = np.sqrt(np.einsum("li,ij,lj->l", means, inverse, means))
    expected = SCALE * means @ inverse / lengths[:, None]
    np.testing.assert_allclose(head[:, :SIZE], expected, rtol=1e-5, atol=1e-4)
    assert not head[:, SIZE].any()


def test_heads_of_coordinates_score_whole_embeddings_alike_once_they_are_exported():
    subspace, vectors, y = in_directions()
    coordinates = subspace.project(vectors)
    state = noised(class_totals(coordinates, y), known_of(["skin"], 0.0, subspace))
    narrow, wide = state.heads["skin"].double(), whole_heads(state)["skin"].double()
    assert (narrow.shape[-1], wide.shape[-1]) == (SIZE + 1, WIDE + 1)
    scores = coordinates.double() @ narrow[:, :-1].T + narrow[:, -1]
    whole = vectors.double() @ wide[:, :-1].T + wide[:, -1]
    torch.testing.assert_close(whole, scores, rtol=0, atol=1e-3 * float(scores.std()))
    assert float((scores.argmax(1) == y).double().mean()) > 0.6


def test_heads_of_whole_vectors_are_exported_as_they_are():
    x, y = data(1)
    state = noised(class_totals(x, y), known_of(["skin"]), directions=0)
    assert torch.equal(whole_heads(state)["skin"], state.heads["skin"])


def test_heads_of_earlier_tasks_stay_when_class_sums_of_another_come():
    method = method_with(name="prototype")
    statistics = statistics_in(method, "learn")
    subspace, vectors, y = in_directions()
    state = start()
    for task, seed in (("skin", 9), ("eye", 10)):
        subspace, vectors, y = in_directions(seed)
        totals = {task: class_totals(subspace.project(vectors), y)}
        before, state = state, statistics.absorb(state, totals, known_of([task], 0.5, subspace))
        for other in before.heads:
            assert torch.equal(state.heads[other], before.heads[other])
    assert list(state.heads) == ["skin", "eye"]


@pytest.mark.parametrize("covariance", ["none", "public"])
def test_sums_that_noise_has_left_nothing_of_make_heads_of_ordinary_size(covariance):
    """With counts below 0 as well."""
    for seed in range(20):
        generator = seeded("noise", seed)
        totals = {
            COUNT: 20 * torch.randn(LABELS, generator=generator).double(),
            SUM: 5 * torch.randn(LABELS, SIZE, generator=generator).double(),
        }
        subspace, _, _ = in_directions()
        known = known_of(["skin"], 5.0, subspace)
        head = noised(totals, known, covariance=covariance).heads["skin"]
        assert head.isfinite().all()
        assert float(head.abs().max()) < 1e3


def test_rounded_heads_of_class_sums_answer_as_exact_ones_do():
    subspace, vectors, y = in_directions()
    coordinates = subspace.project(vectors)
    known = known_of(["skin"], 0.5, subspace)
    head = noised(class_totals(coordinates, y), known).heads["skin"]
    answers = [
        (coordinates @ own[:, :SIZE].T + own[:, SIZE]).argmax(1) for own in (head, at_int8(head))
    ]
    assert (answers[0] == answers[1]).float().mean() > 0.98


def test_sums_of_the_first_task_are_part_of_a_state_that_can_be_resumed():
    """Exact sums alone are needed again: with noisy ones the heads of a task are made once."""
    x, y = data(0)
    exact = statistics_in(method_with(name="prototype", prototype=SHARED), "learn")
    kept = one_round(start(), exact, {"skin": [(x, y)]}).sums
    assert {"count/skin", "sum/skin", "gram/skin"} <= kept.keys()
    subspace, vectors, y = in_directions()
    known = known_of(["skin"], 0.5, subspace)
    noisy = noised(class_totals(subspace.project(vectors), y), known)
    assert noisy.sums.keys() == {"centre", "directions"}


def test_nothing_that_is_zero_travels_at_a_larger_rank_than_one():
    method = method_with(name="prototype")
    state = method.begin_task(start(), seeded(0))
    assert (state.current.rank, state.retained.rank) == (1, 1)
    assert method.begin_task(state, seeded(1)) is state
    assert statistics_of(method) is not None
    assert statistics_of(method_with(name="lwf")) is None
