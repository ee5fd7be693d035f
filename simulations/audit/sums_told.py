"""What class sums tell of who is in them: measured on an experiment's own model, data and sizes. A
label's head is made of its sum and of what is public, so it tells a reader no more."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from deal_core.config.experiment import Experiment
from deal_core.data import Example, open_source
from deal_core.errors import UserError
from deal_core.methods import Statistics, method_of, statistics_of
from deal_core.models import load_model
from deal_core.privacy.audit.expected_membership import expected_auc
from deal_core.privacy.audit.membership import Scores, area, true_positive_rate
from deal_core.privacy.audit.sums_membership import Rows, as_added, known_of, sum_scores
from deal_core.privacy.distributed_noise import COUNT_WEIGHT
from deal_core.protection import class_sum_noise
from deal_core.training.evaluation import base_embeddings
from server.results import Strict

SIZES = (20, 80, 160)
"""Records of a label in a sum."""
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
    expected: float


def class_sums_of(experiment: Experiment) -> Statistics | None:
    """Return what an experiment's sites add up by label; None: nothing."""
    found = statistics_of(method_of(experiment))
    return None if found is None or found.exact is not None else found


def embedded(experiment: Experiment, seed: int) -> list[Rows]:
    """Return what each record of an experiment, training and test ones, adds to its label's sum, a
    matrix for each label.

    Raises:
        UserError: nothing is added up by label, or the data cannot be read.
    """
    statistics = class_sums_of(experiment)
    if statistics is None:
        raise UserError("no class sums leave a site here; leave method.prototype as it is")
    source = open_source(experiment.data)
    tasks = [task for task in map(source.load, source.task_names()) if task.labels]
    model = load_model(experiment.model, experiment.adapter, experiment.train.max_length)
    subspace = statistics.subspace(experiment.data, model, [task.labels for task in tasks])
    found = []
    for task in tasks:
        examples = list(_few([*task.train, *task.test], seed))
        vectors = base_embeddings(model, model.encode(examples, task.labels), statistics.layers)
        coordinates = subspace.project(vectors).double().numpy()
        rows = as_added(coordinates, experiment.privacy.max_grad_norm, COUNT_WEIGHT)
        found += [rows[[each.label == label for each in examples]] for label in task.labels]
    return [rows for rows in found if len(rows)]


def _few(examples: Sequence[Example], seed: int) -> Iterator[Example]:
    taken: dict[str, int] = {}
    for place in np.random.default_rng(seed).permutation(len(examples)):
        example = examples[place]
        taken[example.label] = taken.get(example.label, 0) + 1
        if taken[example.label] <= MOST:
            yield example


def noises(experiment: Experiment) -> Iterator[tuple[str, str, float]]:
    """Yield who sees a sum, the name of its noise, and the deviation of that: none, that of the
    experiment without a mechanism, and those of budgets.

    Raises:
        UserError: no noise fits a budget.
    """
    statistics, privacy = class_sums_of(experiment), experiment.privacy
    assert statistics is not None
    clients = len(experiment.federation.sites) or experiment.federation.clients
    tasks = len(open_source(experiment.data).task_names())
    changes: dict[str, dict[str, object]] = {"default": {"mechanism": "none"}}
    for epsilon in BUDGETS:
        changes[f"ε = {epsilon:g}"] = {
            "mechanism": "record",
            "noise_share": "sum",
            "target_delta": privacy.target_delta or DELTA,
            "target_epsilon": epsilon,
        }
    yield "a sum", "none", 0.0
    for name, change in changes.items():
        config = experiment.model_copy(update={"privacy": privacy.model_copy(update=change)})
        multiplier, shares = class_sum_noise(config, statistics, clients, tasks)
        for apart in sorted({0, privacy.colluding}):
            who = f"server and {apart} colluding" if apart else "server"
            added = math.sqrt(max(1, clients - apart) / shares)
            yield f"sum over sites ({who})", name, multiplier * privacy.max_grad_norm * added


def told_of_sums(
    experiment: Experiment, data: Sequence[Rows], seed: int, progress: Callable[[str], None]
) -> list[Told]:
    """Return what is told by sums of every size that the data have.

    Args:
        experiment: how much noise is in a sum.
        data: what each record adds, a matrix for each label.
        seed: of who is in a sum, and of noise.
        progress: hears what is attacked.
    """
    found: list[Told] = []
    for seen, noise, deviation in noises(experiment):
        for size in SIZES:
            progress(f"{seen}, noise {noise}, {size} records")
            each = list(_attacked(data, size, deviation, seed))
            if not each:
                continue
            members, others = (np.concatenate([attack[k] for attack in each]) for k in (0, 1))
            enough = len(others) >= FEWEST
            found.append(
                Told(
                    seen=seen,
                    noise=noise,
                    deviation=deviation,
                    records=size,
                    auc=float(np.mean([area(inside, outside) for inside, outside, _ in each])),
                    found=true_positive_rate(members, others, FALSE_POSITIVES) if enough else None,
                    members=len(members),
                    others=len(others),
                    expected=float(np.mean([expected for _, _, expected in each])),
                )
            )
    return found


def _attacked(
    data: Sequence[Rows], size: int, deviation: float, seed: int
) -> Iterator[tuple[Scores, Scores, float]]:
    """Yield the scores of members and others of several sums of each label that has three times
    the records, and the area that is expected."""
    rng = np.random.default_rng((seed, size))
    scatters = [(len(rows) - 1) * np.cov(rows, rowvar=False) for rows in data if len(rows) > 1]
    within, freedom = sum(scatters), sum(len(rows) - 1 for rows in data)
    for label in data:
        others = max(20, min(size, len(label) // 6))
        if len(label) < max(3 * size, size + others + 2):
            continue
        own = (len(label) - 1) * np.cov(label, rowvar=False)
        beside = (within - own) / max(1, freedom - len(label) + 1)
        for _ in range(DRAWS):
            rows = label[rng.permutation(len(label))]
            inside, outside, rest = np.split(rows, [size, size + others])
            known = known_of(rest, beside)
            total = inside.sum(axis=0) + deviation * rng.standard_normal(rows.shape[1])
            members, strangers = (
                sum_scores(x, total, size, deviation, known) for x in (inside, outside)
            )
            expected = expected_auc(size, rows.shape[1], deviation, len(rest))
            yield members, strangers, expected
