"""What class sums, and heads made of them, tell of who is in them: measured on an experiment's own
model, data and sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from deal_core.config.experiment import Experiment
from deal_core.data import Example, open_source
from deal_core.data.public import public_texts
from deal_core.data.tokens import cache_folder
from deal_core.errors import UserError
from deal_core.methods import Statistics, method_of, resolve_auto, statistics_of
from deal_core.methods.shared.prototypes import noised_head
from deal_core.models import load_model
from deal_core.privacy.audit.expected_membership import expected_auc
from deal_core.privacy.audit.membership import Scores, area, true_positive_rate
from deal_core.privacy.audit.sums_membership import (
    Known,
    Rows,
    as_added,
    gram_scores,
    known_of,
    sum_scores,
)
from deal_core.privacy.mechanisms.noisy_class_sums import COUNT_WEIGHT
from deal_core.privacy.mechanisms.shares import class_sum_noise
from deal_core.training.embedding import base_embeddings
from deal_core.training.public_subspace import Subspace, public_subspace, text_vectors
from server.results import Strict

SIZES = (20, 80, 160)
"""Records of a label in a sum."""
EXACT_SIZES = (64, 256, 1000)
"""Records of a task in exact sums."""
BUDGETS = (8.0, 2.0)
DELTA = 1e-5
"""Where the experiment names none."""
MOST = 640
"""Records of a label that are embedded; a sum takes a third of a label's at most."""
DRAWS = 4
"""Sums of each size and label."""
FALSE_POSITIVES, FEWEST = 1e-3, 1000
"""True positives are told at this rate, of so many non-members or more."""


class Told(Strict):
    """One attack: ``seen`` by whom, ``noise`` in words with its ``deviation`` in each entry,
    ``records`` in a sum; ``found``: true positives at 0.1 % false ones, None of fewer than 1,000
    ``others``; ``expected``: area by the closed form. Pairs of a record and a sum are counted."""

    seen: str
    noise: str
    deviation: float
    records: int
    auc: float
    found: float | None
    members: int
    others: int
    expected: float | None = None


@dataclass(frozen=True)
class Label:
    """A label's records: ``rows``, as they are added; ``name``, its vector; ``scatter``, the sum of
    outer products about its mean."""

    rows: Rows
    name: Rows
    scatter: Rows


@dataclass(frozen=True)
class Embedded:
    """What is attacked: ``labels``; ``tasks``, each its records' whole vectors; and the
    ``subspace`` of the sums."""

    labels: Sequence[Label]
    tasks: Sequence[Rows]
    subspace: Subspace


@dataclass(frozen=True)
class Noise:
    """A ``name``, and the deviations of who sees what: ``seen``."""

    name: str
    seen: Mapping[str, float]


def class_sums_of(experiment: Experiment) -> Statistics | None:
    """Return what an experiment's sites add up by label; None: nothing."""
    found = statistics_of(method_of(experiment))
    return None if found is None or found.exact is not None else found


def embedded(experiment: Experiment, seed: int) -> Embedded:
    """Return an experiment's records, training and test ones, as the frozen model sees them.

    Raises:
        UserError: nothing is added up by label, or the data cannot be read.
    """
    statistics = class_sums_of(experiment)
    if statistics is None:
        raise UserError("no class sums leave a site here; leave method.prototype as it is")
    source = open_source(experiment.data)
    tasks = [task for task in map(source.load, source.task_names()) if task.labels]
    model = load_model(experiment.model, experiment.adapter, experiment.train.max_length)
    folder = cache_folder() if experiment.data.cache_tokens else None
    texts, layers = public_texts(experiment.data, [t.labels for t in tasks]), statistics.layers
    number = statistics.directions
    subspace = public_subspace(model, texts, layers, number, tasks[0].labels, folder)
    labels, whole = [], []
    bound = experiment.privacy.max_grad_norm
    for task in tasks:
        examples = list(_few([*task.train, *task.test], seed))
        vectors = base_embeddings(model, model.encode(examples, task.labels), layers)
        names = subspace.project(text_vectors(model, task.labels, layers, task.labels))
        rows = as_added(_numbers(subspace.project(vectors)), bound, COUNT_WEIGHT)
        whole.append(_numbers(vectors))
        for label, name in zip(task.labels, _numbers(names), strict=True):
            own = rows[[example.label == label for example in examples]]
            if len(own):
                away = own - own.mean(axis=0)
                labels.append(Label(own, name, away.T @ away))
    return Embedded(labels, whole, subspace)


def _few(examples: Sequence[Example], seed: int) -> Iterator[Example]:
    taken: dict[str, int] = {}
    for place in np.random.default_rng(seed).permutation(len(examples)):
        example = examples[place]
        taken[example.label] = taken.get(example.label, 0) + 1
        if taken[example.label] <= MOST:
            yield example


def _numbers(tensor: torch.Tensor) -> Rows:
    return tensor.double().numpy()


def noises(experiment: Experiment, statistics: Statistics) -> Iterator[Noise]:
    """Yield no noise, that of the experiment without a mechanism, and those of budgets."""
    federation, privacy = experiment.federation, experiment.privacy
    clients = len(federation.sites) or federation.clients
    tasks = len(open_source(experiment.data).task_names())

    def noise(name: str, multiplier: float, shares: int) -> Noise:
        one = multiplier * privacy.max_grad_norm / math.sqrt(shares)
        apart = privacy.colluding
        every, some = one * math.sqrt(clients), one * math.sqrt(max(1, clients - apart))
        seen = {"one site's sum (nobody)": one}
        seen |= {f"sum over sites (server and {apart} colluding)": some} if apart else {}
        return Noise(name, seen | {"sum over sites (server)": every, "heads (readers)": every})

    def with_mechanism(**changes: object) -> tuple[float, int]:
        config = experiment.model_copy(update={"privacy": privacy.model_copy(update=changes)})
        return class_sum_noise(config, statistics, clients, tasks)

    yield Noise("none", {"a sum": 0.0, "heads (readers)": 0.0})
    yield noise("default", *with_mechanism(mechanism="none"))
    delta = privacy.target_delta or DELTA
    for epsilon in BUDGETS:
        keys = {"mechanism": "record", "noise_share": "sum", "target_delta": delta}
        found = with_mechanism(target_epsilon=epsilon, **keys)
        yield noise(f"ε = {epsilon:g}", *found)


def told_of_sums(
    experiment: Experiment, data: Embedded, seed: int, progress: Callable[[str], None]
) -> list[Told]:
    """Return what is told by sums of every size that the data have, and by exact sums.

    Args:
        experiment: noise, and how heads are made.
        data: its records.
        seed: of who is in a sum, and of noise.
        progress: hears what is attacked.
    """
    statistics = class_sums_of(experiment)
    assert statistics is not None
    found: list[Told] = []
    for noise in noises(experiment, statistics):
        for seen, deviation in noise.seen.items():
            for size in SIZES:
                progress(f"{seen}, noise {noise.name}, {size} records")
                attack = partial(_attacked, experiment, data, size, deviation, "heads" in seen)
                found += _told(seen, noise.name, deviation, size, attack(seed))
    for size in EXACT_SIZES:
        progress(f"exact sums, {size} records")
        exact = _exact(data, size, np.random.default_rng((seed, size)))
        found += _told("exact sums (simulations alone)", "none", 0.0, size, exact)
    return found


Attack = tuple[Scores, Scores, float | None]
"""Scores of members and others, and the area that is expected."""


def _told(
    seen: str, noise: str, deviation: float, size: int, attacks: Iterator[Attack]
) -> Iterator[Told]:
    """Yield what attacks on sums of a size have shown together: a mean over sums; nothing where
    there was none."""
    each = list(attacks)
    if not each:
        return
    areas = [area(members, others) for members, others, _ in each]
    expected = [value for _, _, value in each if value is not None]
    members, others = (np.concatenate([attack[k] for attack in each]) for k in (0, 1))
    enough = len(others) >= FEWEST
    yield Told(
        seen=seen,
        noise=noise,
        deviation=deviation,
        records=size,
        auc=float(np.mean(areas)),
        found=true_positive_rate(members, others, FALSE_POSITIVES) if enough else None,
        members=len(members),
        others=len(others),
        expected=float(np.mean(expected)) if expected else None,
    )


def _attacked(
    experiment: Experiment, data: Embedded, size: int, deviation: float, head: bool, seed: int
) -> Iterator[Attack]:
    """Yield the scores of several sums of each label that has three times the records."""
    rng = np.random.default_rng((seed, size))
    within = sum(label.scatter for label in data.labels)
    freedom = sum(len(label.rows) - 1 for label in data.labels)
    for label in data.labels:
        others = max(20, min(size, len(label.rows) // 6))
        if len(label.rows) < max(3 * size, size + others + 2):
            continue
        beside = (within - label.scatter) / max(1, freedom - len(label.rows) + 1)
        for _ in range(DRAWS):
            rows = label.rows[rng.permutation(len(label.rows))]
            inside, outside, rest = np.split(rows, [size, size + others])
            known = known_of(rest, beside)
            total = inside.sum(axis=0) + deviation * rng.standard_normal(rows.shape[1])
            if head:
                count = size + deviation / COUNT_WEIGHT * rng.standard_normal()
                given = label, known, total, count, size, deviation
                total = _read(experiment, data.subspace, *given)
            score = partial(sum_scores, total=total, members=size, deviation=deviation, known=known)
            yield score(inside), score(outside), _expected(known, rows, size, deviation)


def _expected(known: Known, rows: Rows, size: int, deviation: float) -> float:
    return expected_auc(size, rows.shape[1], deviation, known.records)


def _read(
    experiment: Experiment,
    subspace: Subspace,
    label: Label,
    known: Known,
    total: Rows,
    count: float,
    size: int,
    deviation: float,
) -> Rows:
    """Return the sum that a reader works out from a label's head: weights are a mean in a metric
    that is public, with the label's name, which is public, as further records. Its length is taken
    to be the expected one, whatever a head keeps of it."""
    config = resolve_auto(experiment).prototype
    spread = subspace.spread if config.covariance == "public" else None
    given = torch.tensor([count]), torch.from_numpy(total)[None], torch.from_numpy(label.name)[None]
    weights = _numbers(noised_head(*given, deviation, spread, config))[0, :-1]
    metric = np.ones(len(total))
    if spread is not None:
        metric = _numbers(spread + float(config.ridge) * spread.mean())
    prior = config.names_noise * deviation * label.name
    varied = size * np.diag(known.covariance) + deviation**2
    expected = (np.square(size * known.mean + prior) + varied) / metric
    length = math.sqrt(expected.sum() / (np.square(weights) * metric).sum())
    read: Rows = length * weights * metric - prior
    return read


def _exact(data: Embedded, size: int, rng: np.random.Generator) -> Iterator[Attack]:
    """Yield the scores by the Gram matrix of some records of each task."""
    for rows in data.tasks:
        if len(rows) >= 1.25 * size:
            inside, outside = np.split(rows[rng.permutation(len(rows))], [size])
            gram = inside.T @ inside
            yield gram_scores(inside, gram), gram_scores(outside, gram), None
