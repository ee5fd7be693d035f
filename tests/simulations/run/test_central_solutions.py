"""Trivial baselines through the real apps, beside what one machine makes of all data at once.

The other side is plain numpy and scipy in float64, on the frozen model's embeddings of all records:
class means, and a softmax regression by L-BFGS. Sums, gradients and heads
travel in float32; a head is compared as a whole, by the norm of what is off over its own.
"""

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from deal_core.baselines.frozen import RIDGE, ROUNDS
from deal_core.config.experiment import PrototypeConfig
from deal_core.data import open_source
from deal_core.deal.class_means import SCALE
from deal_core.privacy.distributed_noise import COUNT_WEIGHT
from deal_core.training.evaluation import base_embeddings
from deal_core.training.public_subspace import power_of, principal, text_vectors
from tests.conftest import load_once
from tests.simulations.runs import learnt_adapter, simulated
from tests.slow import slow_but

pytestmark = pytest.mark.usefixtures("one_model")

Floats = NDArray[np.float64]
TASKS = ("laboratory", "surgery")
SIZES = ("federation.clients=4", "federation.rounds=1", "data.max_train=64", "data.max_test=4")
EXACT = (*SIZES, "train.precision=float32")
SPLITS = {
    "few labels": ("data.partition.kind=dirichlet", "data.partition.alpha=0.05"),
    "by size": ("data.partition.kind=quantity", "data.partition.alpha=0.3"),
}
PROTOTYPE = PrototypeConfig()


@dataclass(frozen=True)
class Records:
    """All records of a task, whosever they are: embeddings, labels, and how many labels."""

    x: Floats
    y: NDArray[np.int64]
    labels: int

    @property
    def means(self):
        return np.stack([self.x[self.y == label].mean(0) for label in range(self.labels)])

    @property
    def with_one(self):
        return np.hstack([self.x, np.ones((len(self.x), 1))])


@pytest.fixture(scope="module")
def everything(make_experiment):
    """All records of each task, by number of layers."""
    experiment = make_experiment(*EXACT)
    model = load_once()(experiment.model, experiment.adapter, experiment.train.max_length)
    source = open_source(experiment.data)
    found = {}

    def records(layers):
        if layers not in found:
            tasks = [source.load(task) for task in TASKS]
            encoded = [model.encode(task.train, task.labels) for task in tasks]
            found[layers] = [
                Records(
                    base_embeddings(model, own, layers).double().numpy(),
                    np.array([each.target for each in own]),
                    len(task.labels),
                )
                for task, own in zip(tasks, encoded, strict=True)
            ]
        return found[layers]

    return records


@pytest.fixture
def learnt(make_experiment, tmp_path):
    """The heads of both tasks that four clients give together."""

    def run(split, *overrides):
        experiment = make_experiment(*EXACT, *SPLITS[split], *overrides)
        simulated(experiment, tmp_path)
        heads = learnt_adapter(tmp_path)
        return [heads[task].astype(np.float64) for task in experiment.data.tasks]

    return run


def off(found, expected):
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def of_one_length(means):
    """Weights of class means, all of one length; biases are 0."""
    length = SCALE * np.sqrt(means.shape[1])
    rows = length * means / np.linalg.norm(means, axis=1, keepdims=True)
    return np.hstack([rows, np.zeros((len(means), 1))])


def in_directions(tasks, subspace):
    """The same for whole embeddings, where class means are compared in public directions. A record
    beyond the unit of length, with its count, is shortened to it, and so weighs less."""
    centre, scaled = subspace.centre.numpy(), subspace.scaled.numpy()
    heads = []
    for task in tasks:
        x = (task.x - centre) @ scaled
        weight = np.minimum(1.0, 1.0 / np.sqrt((x**2).sum(1) + COUNT_WEIGHT**2))
        labels = np.eye(task.labels)[task.y] * weight[:, None]
        rows = of_one_length(labels.T @ x / labels.sum(0)[:, None])[:, :-1] @ scaled.T
        heads.append(np.hstack([rows, -(rows @ centre)[:, None]]))
    return heads


WITHOUT_NOISE = ("method.name=prototype", "method.prototype.noise_multiplier=0")
ON_THE_GRID = 1e-3
"""Records are rounded to a grid of 2^-16; what is off is that, and how much it tightens the
bound."""


@pytest.mark.parametrize("split", slow_but(SPLITS, "by size"))
def test_class_means_in_public_directions_are_the_central_closed_form(
    learnt, everything, make_experiment, tmp_path, split
):
    """What is exported answers about whole embeddings."""
    path = tmp_path / "public.txt"
    path.write_text("".join(f"Sentence {n} is about {n % 7} things\n" for n in range(60)))
    own = (f'data.public_path="{path}"', "method.prototype.directions=12")
    heads = learnt(split, *WITHOUT_NOISE, *own)
    experiment = make_experiment(*EXACT)
    model = load_once()(experiment.model, experiment.adapter, experiment.train.max_length)
    labels = open_source(experiment.data).load(TASKS[0]).labels
    texts = path.read_text().splitlines()
    vectors = text_vectors(model, texts, PROTOTYPE.layers, labels)
    subspace = principal(vectors, 12, power_of(PROTOTYPE.layers))
    for head, expected in zip(
        heads, in_directions(everything(PROTOTYPE.layers), subspace), strict=True
    ):
        assert off(head, expected) < ON_THE_GRID


ONE_PROBE = ("method.name=linear-probe", f'data.tasks=["{TASKS[0]}"]')


def loss(weights, task):
    """(M41) and its gradient."""
    x, rows = task.with_one, np.arange(len(task.y))
    scores = x @ weights.T
    error = softmax(scores, axis=1)
    error[rows, task.y] -= 1.0
    entropy = (logsumexp(scores, axis=1) - scores[rows, task.y]).mean()
    value = entropy + RIDGE / 2 * (weights**2).sum()
    return float(value), error.T @ x / len(x) + RIDGE * weights


def minimiser(task):
    """The weights that L-BFGS finds, until no entry of the gradient is above 1e-9."""
    shape = (task.labels, task.x.shape[1] + 1)

    def flat(values):
        value, gradient = loss(values.reshape(shape), task)
        return value, gradient.ravel()

    options = {"maxiter": 5000, "maxfun": 5000, "ftol": 0, "gtol": 1e-10, "maxcor": 50}
    found = minimize(flat, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options=options)
    assert np.abs(found.jac).max() < 1e-9
    return found.x.reshape(shape)


def stepped(task, rounds):
    """The weights after so many steps of (M42), taken by one machine in float64."""
    x = task.with_one
    bound = 0.5 * x.T @ x / len(x) + RIDGE * np.eye(x.shape[1])
    weights = point = np.zeros((task.labels, x.shape[1]))
    momentum = 1.0
    for _ in range(rounds):
        gradient = loss(point, task)[1]
        after = point - np.linalg.solve(bound, gradient.T).T
        if (gradient * (after - weights)).sum() > 0:
            momentum = 1.0
        following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        point = after + (momentum - 1) / following * (after - weights)
        weights, momentum = after, following
    return weights


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_a_probe_takes_the_steps_of_one_machine_and_stops_short_of_the_minimum(
    learnt, everything, split
):
    """However the data are divided it is where one machine is after as many steps. By default
    these are 30, and the minimum is 0.6 % of its norm away, its loss 8e-6 lower."""
    [head] = learnt(split, *ONE_PROBE)
    task = everything(1)[0]
    assert off(head, stepped(task, ROUNDS)) < 1e-5
    best = minimiser(task)
    assert 1e-3 < off(head, best) < 1e-2
    assert 0 < loss(head, task)[0] - loss(best, task)[0] < 5e-5
    answers = [(task.with_one @ own.T).argmax(1) for own in (head, best)]
    assert np.array_equal(*answers)
