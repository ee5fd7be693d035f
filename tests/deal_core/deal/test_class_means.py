"""Label heads from class sums, against formulas; where sums are taken, and where they are not."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from torch.nn.functional import normalize

from deal_core.config.file import apply_overrides, parse_experiment
from deal_core.deal.class_means import COUNT, PROTOTYPES, SCALE, SUM, whole_heads
from deal_core.deal.interface import phases_of, statistics_of
from deal_core.methods import method_of, resolve_auto
from deal_core.randomness import seeded
from deal_core.training.public_subspace import principal
from deal_core.wire.tensors import pack_heads, read_heads
from tests.deal_core.deal.sums import (
    LABELS,
    SIZE,
    class_totals,
    data,
    known_of,
    method_with,
    name_vectors,
    start,
    statistics_in,
)


def at_int8(head):
    """As it arrives at a client."""
    packed = {key: Array(part) for key, part in pack_heads({"skin": head}, True).items()}
    return read_heads(ArrayRecord(packed), {"skin": (head.shape[0], head.shape[1])}, True)["skin"]


def noised(totals, known, **settings):
    """The state after a round of class sums of the task "skin"."""
    method = method_with(name="prototype", prototype=settings)
    statistics = statistics_in(method, "learn")
    assert statistics.exact is None
    return statistics.absorb(start(), {"skin": totals}, known)


LENGTH = SCALE * SIZE**0.5
"""Of a row."""


def test_in_all_directions_the_class_mean_in_the_nearest_one_is_the_answer():
    x, y = data(1)
    found = noised(class_totals(x, y), known_of(["skin"]), directions=0).heads["skin"]
    means = normalize(torch.stack([x[y == c].mean(0) for c in range(LABELS)]), dim=1)
    torch.testing.assert_close(found[:, :SIZE], LENGTH * means, rtol=1e-5, atol=1e-5)
    assert not found[:, SIZE].any()


def test_a_label_of_a_class_sum_that_nobody_has_a_record_of_has_the_vector_of_its_name():
    x, y = data(4)
    x, y = x[y > 0], y[y > 0]
    totals = class_totals(x, y)
    found = noised(totals, known_of(["skin"]), directions=0).heads["skin"]
    torch.testing.assert_close(found[0, :SIZE], LENGTH * name_vectors("skin")[0])
    means = normalize(totals[SUM][1:], dim=1)
    torch.testing.assert_close(found[1:, :SIZE], LENGTH * means.float())


WIDE = 2 * SIZE
"""Entries of whole embeddings."""


def in_directions(seed=9):
    """Public directions of embeddings, whole vectors, and labels."""
    spread = torch.linspace(2.0, 0.1, WIDE)
    public = spread * torch.randn(500, WIDE, generator=seeded("public")) + 0.3
    x, y = data(seed, examples=400)
    return principal(public, SIZE), 0.4 * torch.cat([x, x.flip(1)], dim=1) + 0.3, y


@pytest.mark.parametrize("deviation", [0.0, 0.5, 4.0])
def test_in_public_directions_class_means_have_one_length(deviation):
    """A name counts as records: with the variance of the noise more, with their number less."""
    subspace, vectors, y = in_directions()
    totals = class_totals(subspace.project(vectors), y)
    head = noised(totals, known_of(["skin"], deviation, subspace)).heads["skin"].numpy()
    count = np.bincount(y.numpy(), minlength=LABELS)[:, None]
    prior = 200.0 * deviation**2 / count.mean()
    names = name_vectors("skin").double().numpy()
    means = (totals[SUM].numpy() + prior * names) / (count + prior)
    expected = LENGTH * means / np.linalg.norm(means, axis=1, keepdims=True)
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


def test_sums_that_noise_has_left_nothing_of_make_heads_of_ordinary_size():
    """With counts below 0 as well."""
    for seed in range(20):
        generator = seeded("noise", seed)
        totals = {
            COUNT: 20 * torch.randn(LABELS, generator=generator).double(),
            SUM: 5 * torch.randn(LABELS, SIZE, generator=generator).double(),
        }
        subspace, _, _ = in_directions()
        known = known_of(["skin"], 5.0, subspace)
        head = noised(totals, known).heads["skin"]
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


def test_nothing_that_is_zero_travels_at_a_larger_rank_than_one():
    method = method_with(name="prototype")
    state = method.begin_task(start(), seeded(0))
    assert (state.current.rank, state.retained.rank) == (1, 1)
    assert method.begin_task(state, seeded(1)) is state
    assert statistics_of(method) is not None
    assert statistics_of(method_with(name="lwf")) is None


def experiment(*overrides):
    return parse_experiment(apply_overrides({}, overrides), "test")


@pytest.mark.parametrize(
    "setting",
    [
        "",
        "aggregation.secure=true",
        "aggregation.robust=cosine-norm",
        "stream.schedule=per-client stream.consolidate_every=9",
        "stream.schedule=joint",
        "train.step=server",
        "privacy.mechanism=record",
    ],
)
def test_by_default_it_is_one_round_after_learning(setting):
    phases = phases_of(method_of(experiment("federation.clients=3", *setting.split())), 3)
    assert list(phases) == ["learn", PROTOTYPES]
    assert phases[PROTOTYPES].rounds == 1
    statistics = phases[PROTOTYPES].statistics
    assert statistics is not None
    assert (statistics.layers, statistics.names, statistics.once) == (4, True, True)
    assert [statistics.names_weight(logits) for logits in (True, False)] == [0.5, 1.0]
    assert (statistics.directions, statistics.noise_multiplier, statistics.exact) == (
        256,
        0.61,
        None,
    )


@pytest.mark.parametrize(
    "setting",
    [
        "federation.clients=2",
        "privacy.mechanism=record stream.schedule=per-client",
        "privacy.mechanism=record stream.schedule=joint",
        'model.family=causal-lm data.generation=["task"] stream.schedule=joint',
        "method.prototype.enabled=off",
    ],
)
def test_where_no_sums_can_leave_it_is_off(setting):
    config = experiment("federation.clients=3", *setting.split())
    assert resolve_auto(config).prototype.enabled == "off"
    assert statistics_of(method_of(config)) is None
