"""Membership inference: in class sums it finds members as well as the closed form expects, and in
adapters it finds those that a site has learnt by heart."""

import io
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import norm

from deal_core.data import open_source
from deal_core.deal.class_means import noised_head
from deal_core.models.interface import Encoded
from deal_core.privacy.distributed_noise import COUNT_WEIGHT, NoisySum, grid_step
from deal_core.privacy.interface import RecordId
from deal_core.privacy.noise import SeededNoise
from deal_core.protection import class_sum_noise
from deal_core.randomness import seeded
from deal_core.training.evaluation import base_embeddings
from deal_core.training.public_subspace import principal
from simulations.audit import membership
from simulations.audit.membership import (
    MembershipAudit,
    Told,
    area,
    as_added,
    noises,
    run_membership,
    sum_scores,
    told_of_adapters,
    told_of_sums,
    true_positive_rate,
)
from simulations.report.commands import write_report
from simulations.run.data_checks import check_membership, expected_auc
from simulations.run.experiment import Request, load_experiment
from tests.conftest import load_once
from tests.slow import slow_but

COUNTS = {"records": 9, "members": 9, "others": 9, "found": None}
ADAPTER = Told(seen="adapter of round 1", noise="none", auc=0.655, interval=(0.5, 0.8), **COUNTS)
SHORT = 24
"""Tokens of a text: few, since the test is of sums."""
EACH, DIRECTIONS, LABELS, SITES = 120, 64, 3, 4


@cache
def embedded():
    """Records of three labels, one label after the other."""
    config = load_experiment(Request("quickstart"))
    task = open_source(config.data).load("basic-science")
    model = load_once()(config.model, config.adapter, SHORT)
    chosen = [e for name in task.labels for e in [x for x in task.train if x.label == name][:EACH]]
    return base_embeddings(model, model.encode(chosen, task.labels), 4)


@cache
def projected():
    """The same in directions of their own."""
    return principal(embedded(), DIRECTIONS).project(embedded())


@cache
def texts():
    """What they add to the sums, by label."""
    return np.split(as_added(projected(), 1.0), LABELS)


@cache
def told():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(membership, "SIZES", (20, 40))
        patch.setattr(membership, "DRAWS", 17)
        patch.setattr(membership, "BUDGETS", (2.0,))
        found = told_of_sums(load_experiment(Request("quickstart")), texts(), 0, lambda line: None)
    return tuple(found)


def of(seen, noise):
    return [each for each in told() if each.seen.startswith(seen) and each.noise == noise]


def test_the_closed_form_expects_what_is_measured():
    assert {each.noise for each in told()} == {"none", "default", "ε = 2"}
    for each in told():  # who has the whole list tells more of a bare sum
        assert each.auc > each.expected - 0.04, each
        assert not each.deviation or each.auc < each.expected + 0.04, each
    assert {each.records for each in of("sum over sites (server)", "default")} == {20, 40}


def test_small_sums_without_noise_tell_and_noise_hides():
    bare, noised = of("a sum", "none"), of("sum over sites (server)", "default")
    assert bare[0].auc > 0.8
    assert bare[0].auc > noised[0].auc + 0.05
    assert of("sum over sites (server)", "ε = 2")[0].auc < 0.57


def test_noise_is_that_of_a_run():
    """Four sites, of which a sum needs three and one may collude: 0.61 is the noise of two."""
    config = load_experiment(Request("quickstart"))
    statistics = membership.class_sums_of(config)
    assert statistics is not None
    default = {seen: deviation for seen, name, deviation in noises(config) if name == "default"}
    multiplier = statistics.noise_multiplier
    assert default == pytest.approx(
        {
            "sum over sites (server and 1 colluding)": multiplier * (3 / 2) ** 0.5,
            "sum over sites (server)": multiplier * (4 / 2) ** 0.5,
        }
    )


def test_the_command_writes_figures_and_a_report(monkeypatch, tmp_path):
    monkeypatch.setattr(membership, "embedded", lambda experiment, seed: texts())
    monkeypatch.setattr(membership, "told_of_sums", lambda *given: list(told()))
    monkeypatch.setattr(membership, "told_of_adapters", lambda *given: [ADAPTER])
    monkeypatch.setattr(membership, "preflight", lambda experiment, say: None)
    screen = Console(file=io.StringIO(), width=120)
    run_membership("quickstart", tmp_path, (), 0, 0, screen)
    audit = MembershipAudit.model_validate_json((tmp_path / membership.FILE).read_text())
    assert audit.told == [*told(), ADAPTER]
    assert audit.directions == DIRECTIONS
    page = write_report(tmp_path).read_text()
    assert "sum over sites (server)" in page
    assert "0.66 [0.50, 0.80]" in page
    assert "n too small" in page
    assert audit.experiment == "quickstart"


ALONE = (
    'data.tasks=["laboratory"]',
    "method.name=sequential",
    "federation.clients=1",
    "federation.rounds=2",
    "data.max_train=16",
    "data.max_test=12",
    "train.max_length=16",
)


@pytest.mark.parametrize("budgets", slow_but([(), (8.0,)], ()))
def test_adapters_of_every_round_are_attacked(make_experiment, monkeypatch, budgets):
    monkeypatch.setattr(membership, "BUDGETS", budgets)
    found = told_of_adapters(make_experiment(*ALONE), 0, 0, lambda event: None)
    noises = ["none", *(f"ε = {epsilon:g}" for epsilon in budgets)]
    rounds = ("adapter of round 1", "adapter of round 2")
    told = [(each.seen, each.noise, each.members, each.others) for each in found]
    # under a budget, data.max_train takes about so many
    assert told == [(r, n, 16 if n == "none" else 9, 12) for n in noises for r in rounds]
    assert all(each.interval[0] <= each.auc <= each.interval[1] for each in found)
    assert all(each.found is None for each in found)


@pytest.mark.slow
def test_what_is_learnt_by_heart_is_found(make_experiment, monkeypatch):
    monkeypatch.setattr(membership, "BUDGETS", ())
    more = ("data.max_train=96", "data.max_test=100", "train.batch_size=8")
    hard = ("train.learning_rate=5e-3", "federation.local_epochs=12", "federation.rounds=1")
    [found] = told_of_adapters(make_experiment(*ALONE, *more, *hard), 0, 0, lambda event: None)
    assert found.interval[0] > 0.55


SIZE, SPREAD = 40, 0.5


def rows(rng, number):
    return rng.normal(0.3, np.sqrt(SPREAD / SIZE), (number, SIZE))


@pytest.mark.parametrize(("members", "deviation"), [(5, 0.0), (20, 0.6)])
def test_a_gaussian_sum_is_told_as_well_as_theory_says(members, deviation):
    rng = np.random.default_rng((members, int(10 * deviation)))
    known, within, areas = rows(rng, 200), np.eye(SIZE) * SPREAD / SIZE, []
    for _ in range(60):
        both = rows(rng, members + 200)
        total = both[:members].sum(axis=0) + deviation * rng.standard_normal(SIZE)
        scores = sum_scores(both, total, members, deviation, known, within)
        areas.append(area(scores[:members], scores[members:]))
    one = SPREAD / SIZE
    squared = SIZE * one / (members * one + deviation**2)
    assert np.mean(areas) == pytest.approx(norm.cdf(np.sqrt(squared / 2)), abs=0.03)


def test_more_noise_records_and_ignorance_tell_less():
    assert expected_auc(20, 256, 0.0) > expected_auc(80, 256, 0.0) > expected_auc(160, 256, 0.0)
    assert expected_auc(20, 256, 0.0) > expected_auc(20, 256, 0.6) > expected_auc(20, 256, 1.0)
    assert expected_auc(80, 256, 0.0) > expected_auc(80, 64, 0.0)
    assert expected_auc(20, 256, 1e4) == pytest.approx(0.5, abs=1e-3)
    assert expected_auc(1, 256, 0.0) > 0.999
    for wrong in ((0, 256), (20, 0)):
        with pytest.raises(ValueError, match="directions"):
            expected_auc(*wrong, 0.6)


def test_a_check_tells_what_is_expected_of_the_users_own_sizes():
    config = load_experiment(Request("quickstart", overrides=('data.tasks=["laboratory"]',)))
    task = open_source(config.data).load("laboratory")
    counts = sorted(Counter(each.label for each in task.train).values())
    (note,) = check_membership(config)
    least = f"{expected_auc(counts[0], 256, 0.61):.2f} for the smallest label ({counts[0]} records)"
    assert note.kind == "note"
    assert least in note.text
    plain = load_experiment(Request("quickstart", overrides=("method.name=sequential",)))
    assert list(check_membership(plain)) == []


def summed(members, seed):
    """Counts and sums by label of some records that four sites have, as the server decodes them by
    default, and the deviation of their noise."""
    config = load_experiment(Request("quickstart"))
    statistics = membership.class_sums_of(config)
    assert statistics is not None
    multiplier, shares = class_sum_noise(config, statistics, SITES, 1)
    total, targets = np.zeros((LABELS, DIRECTIONS + 1), np.int64), members // EACH
    for site in range(SITES):
        own = slice(site, None, SITES)
        ids = [RecordId("task", int(row)) for row in members[own]]
        made = NoisySum(
            [Encoded(tokens=(1,), target=0)] * len(ids),
            ids,
            shares,
            sample_rate=1.0,
            noise_multiplier=multiplier,
            max_grad_norm=1.0,
            noise=SeededNoise(seeded("noise", seed, site)),
        )
        total += made.class_sums(projected()[members[own]], torch.tensor(targets[own]), LABELS)
    values = grid_step(1.0) * torch.from_numpy(total).double()
    deviation = multiplier * (SITES / shares) ** 0.5
    return values[:, -1] / COUNT_WEIGHT, values[:, :-1], deviation


def within_span(shown, rows):
    """Share of each row's squared length in the span of the rows of what is shown."""
    _, strength, basis = np.linalg.svd(shown)
    basis = basis[: (strength > 1e-4 * strength[0]).sum()]
    return ((rows @ basis.T) ** 2).sum(axis=1) / (rows**2).sum(axis=1)


def margins(head, rows):
    """Score of each row's own label above the largest other one."""
    scores, own = rows @ head.T, torch.arange(len(rows)) // EACH
    others = scores.scatter(1, own[:, None], -torch.inf).amax(dim=1)
    return (scores.gather(1, own[:, None])[:, 0] - others).numpy()


def areas(attack, size, times=8):
    """Mean area of an attack on so many records, drawn so many times."""
    found = []
    for seed in range(times):
        members, others = np.split(np.random.default_rng(seed).permutation(EACH * LABELS), [size])
        scores = attack(members, seed)
        found.append(area(scores[members], scores[others]))
    return float(np.mean(found))


def test_a_gram_matrix_names_its_records_and_what_leaves_does_not():
    """64 records of 768 entries: only they lie in its span."""

    def of_gram(members, seed):
        own = embedded()[members]
        return within_span((own.T @ own).numpy(), embedded().numpy())

    def of_sums(members, seed):
        return within_span(summed(members, seed)[1].numpy(), projected().numpy())

    assert areas(of_gram, 64, times=2) > 0.999
    assert areas(of_sums, 64) < 0.65


def test_heads_of_noised_sums_hide_the_members_that_exact_ones_favour():
    """The exact ones: linear discriminants, of class means and one covariance within labels."""

    def exact(members, seed):
        own, targets = embedded()[members], members // EACH
        means = torch.stack([own[targets == label].mean(0) for label in range(LABELS)])
        within = torch.cov((own - means[targets]).T)
        ridge = 1e-3 * within.diagonal().mean() * torch.eye(len(within))
        weights = torch.linalg.solve(within + ridge, means.T).T
        scale = 0.5 * (weights * means).sum(dim=1, keepdim=True)
        whole = torch.cat([weights, -scale], dim=1)
        return margins(whole, torch.cat([embedded(), torch.ones(len(embedded()), 1)], dim=1))

    def noised(members, seed):
        names = torch.zeros(LABELS, DIRECTIONS)
        count, total, deviation = summed(members, seed)
        return margins(noised_head(count, total, names, deviation)[:, :-1], projected())

    assert areas(exact, 60, times=4) > 0.85
    assert areas(noised, 60) < 0.70


def test_by_default_the_expected_figure_has_a_ceiling():
    """As the server with one colluding site sees a sum, in the four sites of the quickstart."""
    deviation = 0.61 * (3 / 2) ** 0.5
    assert expected_auc(1, 256, deviation) < 0.77
    assert expected_auc(160, 256, deviation) < 0.70


def test_known_areas():
    assert area(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 1.0
    assert area(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 0.0
    assert area(np.ones(5), np.ones(7)) == 0.5
    assert area(np.array([1.0, 3.0]), np.array([2.0])) == 0.5


def test_at_most_one_in_a_thousand_others_passes():
    rng = np.random.default_rng(0)
    members, others = rng.normal(1, 1, 50_000), rng.normal(0, 1, 50_000)
    expected = norm.sf(norm.isf(1e-3) - 1)
    assert true_positive_rate(members, others) == pytest.approx(expected, abs=0.005)
    assert true_positive_rate(others, others) <= 1e-3
    assert true_positive_rate(np.ones(1000), np.ones(1000)) == 0.0
    assert true_positive_rate(members, others[:999]) is None
