"""``deal audit --membership``: how well an attacker tells who is in what leaves the sites.

Class sums are attacked on an experiment's own model, data and sizes; the score is the likelihood
ratio of two Gaussians, with the record in the sum and without. A label's head is made of its sum
and of what is public, so it tells a reader no more. Adapters are attacked as one site hands them
over, after training alone: what others add can only hide it; the score is how far the loss on a
record fell below the frozen base model's.

Sources: Carlini et al., "Membership inference attacks from first principles", S&P 2022 (likelihood
ratios, and why the true positive rate at a small false positive rate counts); Sankararaman et al.,
Nature Genetics 2009 (sums).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from scipy.stats import bootstrap, rankdata
from torch import Tensor

from deal_core.config.experiment import Experiment, at_server
from deal_core.data import open_source
from deal_core.deal.interface import Statistics, statistics_of
from deal_core.errors import UserError
from deal_core.methods import method_of
from deal_core.models import load_model
from deal_core.privacy.distributed_noise import clipped_class_sums
from deal_core.privacy.dpsgd import Groups
from deal_core.protection import class_sum_noise
from deal_core.training.evaluation import base_embeddings
from server.folder import Listener
from server.results import Strict
from simulations import output
from simulations.audit.canaries import Scores
from simulations.audit.run import DELTA, adapter_scores
from simulations.run.check import preflight
from simulations.run.data_checks import expected_auc
from simulations.run.experiment import Request, load_experiment, with_budget
from simulations.run.run_log import told_to

FILE = "membership.json"
EXPLANATION = (
    "AUC: probability that a member scores above a record that was away; 0.5 is chance. TPR: share "
    "of members found where 0.1 % of the others are taken for members. Of a sum the attacker knows "
    "the label, the number of records, the noise, and all records of the label, members and others "
    "alike; the score is the likelihood ratio of the sum with and without the record. Expected: by "
    "the closed form, from size and noise alone, with no limit to the others. Noise: deviation in "
    "each entry, in units of what a record adds at most. Of an adapter, which one site has trained "
    "alone, the score is how far the loss on a record fell below the base model's, with a 95 % "
    "bootstrap interval; the others are the site's test records."
)
SIZES = (20, 80, 160)
"""Records of a label in a sum."""
BUDGETS = (8.0, 2.0)
MOST = 640
"""Records of a label that are embedded; a sum takes a third of a label's at most."""
DRAWS = 4
"""Sums of each size and label."""
GRID = 2.0**-30
"""Step to which a record's part is rounded, in units of the bound."""
Rows = NDArray[np.float64]
FALSE_POSITIVES = 1e-3
"""Rate at which true positives are told; of 1,000 others or more."""
TINY = 1e-6
"""Variance of a sum without noise at least, as a share of the mean variance."""


class Told(Strict):
    """One attack."""

    seen: str
    """What, by whom."""
    noise: str
    """In words."""
    deviation: float = 0.0
    """Of the noise in each entry of a sum; 0: none, or of adapters."""
    records: int
    """In a sum; of adapters, that the site trains on."""
    auc: float
    """Area under the ROC curve."""
    found: float | None
    """True positives at 0.1 % false ones; None of fewer than 1,000 ``others``."""
    members: int
    """Pairs of a record and a sum, or records."""
    others: int
    expected: float | None = None
    """Area by the closed form, of a sum."""
    interval: tuple[float, float] | None = None
    """Of the area, 95 %, of adapters."""


class MembershipAudit(Strict):
    """Schema of ``membership.json``; ``directions`` of a class sum, 0 where none leaves."""

    schema_version: int = 2
    experiment: str
    directions: int
    told: list[Told]


def run_membership(
    name: str, folder: Path, overrides: Sequence[str], seed: int, client: int, console: Console
) -> None:
    """Attack what the sites of an experiment send, and the adapters of one client; write what was
    found into a folder, and show it.

    Raises:
        UserError: bad input, or an experiment of which neither class sums nor adapters leave.
    """
    output.require_one_kind(folder, FILE)
    experiment = load_experiment(Request(name, str(folder), tuple(overrides)))
    with output.at_work(console, "checking the experiment") as say:
        preflight(experiment, say=say)
        say("embedding texts")
        data = embedded(experiment, seed)
        told = told_of_sums(experiment, data, seed, say)
        told += told_of_adapters(experiment, client, seed, told_to(console, say))
    if not told:
        raise UserError(
            "nothing leaves a site here that membership is told of: neither class sums of enough "
            "records nor adapters; deal audit attacks noise in sums of gradients"
        )
    directions = data[0].shape[1] if data else 0
    audit = MembershipAudit(experiment=Path(name).stem, directions=directions, told=told)
    output.write_texts(folder, {FILE: audit.model_dump_json(indent=1) + "\n"})
    output.print_table(console, told_table(told))
    output.print_line(console, f"figures in {folder / FILE}; report.html says how to read them")


def told_table(told: Sequence[Told]) -> output.Table:
    """Return a row for each attack."""
    rows = []
    for each in told:
        low, high = each.interval or (0.0, 0.0)
        figures = (
            each.seen,
            each.noise + (f" ({each.deviation:.2f})" if each.deviation else ""),
            str(each.records),
            f"{each.auc:.2f}" + (f" [{low:.2f}, {high:.2f}]" if each.interval else ""),
            output.DASH if each.expected is None else f"{each.expected:.2f}",
            "n too small" if each.found is None else f"{100 * each.found:.1f} %",
        )
        rows.append(figures)
    columns = ("seen", "noise", "records", "AUC", "expected", "TPR at 0.1 % FPR")
    return output.Table("Attacks on sums, heads and adapters", columns, tuple(rows))


def class_sums_of(experiment: Experiment) -> Statistics | None:
    """Return what an experiment's sites add up by label; None: nothing."""
    found = statistics_of(method_of(experiment))
    return None if found is None or found.exact is not None else found


def embedded(experiment: Experiment, seed: int) -> list[Rows]:
    """Return what each record of an experiment, training and test ones, adds to its label's sum, a
    matrix for each label; none where nothing is added up by label.

    Raises:
        UserError: the data cannot be read.
    """
    statistics = class_sums_of(experiment)
    if statistics is None:
        return []
    source = open_source(experiment.data)
    tasks = [task for task in map(source.load, source.task_names()) if task.labels]
    model = load_model(experiment.model, experiment.adapter, experiment.train.max_length)
    subspace = statistics.subspace(experiment.data, model, [task.labels for task in tasks])
    found = []
    for task in tasks:
        examples, taken = [], Counter[str]()
        every = [*task.train, *task.test]
        for place in np.random.default_rng(seed).permutation(len(every)):
            taken[every[place].label] += 1
            if taken[every[place].label] <= MOST:
                examples.append(every[place])
        vectors = base_embeddings(model, model.encode(examples, task.labels), statistics.layers)
        rows = as_added(subspace.project(vectors), experiment.privacy.max_grad_norm)
        found += [rows[[each.label == label for each in examples]] for label in task.labels]
    return [rows for rows in found if len(rows)]


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
        config = experiment.changed(privacy=change)
        multiplier, shares = class_sum_noise(config, statistics, clients, tasks)
        for apart in sorted({0, privacy.colluding}):
            who = f"server and {apart} colluding" if apart else "server"
            added = math.sqrt(max(1, clients - apart) / shares)
            yield f"sum over sites ({who})", name, multiplier * privacy.max_grad_norm * added


def told_of_sums(
    experiment: Experiment, data: Sequence[Rows], seed: int, progress: Callable[[str], None]
) -> list[Told]:
    """Return what is told by sums of every size that the data have: of each label a matrix of what
    its records add. The seed decides who is in a sum, and its noise."""
    found: list[Told] = []
    for seen, noise, deviation in noises(experiment) if data else ():
        for size in SIZES:
            progress(f"{seen}, noise {noise}, {size} records")
            each = list(_attacked(data, size, deviation, seed))
            if not each:
                continue
            inside, outside, expected = zip(*each, strict=True)
            auc = np.mean([area(members, others) for members, others, _ in each])
            figures = {"auc": float(auc), "expected": float(np.mean(expected))}
            figures |= {"deviation": deviation, "records": size}
            found.append(
                _told(seen, noise, np.concatenate(inside), np.concatenate(outside), **figures)
            )
    return found


def _told(seen: str, noise: str, members: Scores, others: Scores, **figures: Any) -> Told:
    return Told(
        seen=seen,
        noise=noise,
        found=true_positive_rate(members, others),
        members=len(members),
        others=len(others),
        **figures,
    )


def _attacked(
    data: Sequence[Rows], size: int, deviation: float, seed: int
) -> Iterator[tuple[Scores, Scores, float]]:
    """Yield scores of members and others of several sums of each label that has three times the
    records, and the area that is expected."""
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
            inside, outside = rows[:size], rows[size : size + others]
            total = inside.sum(axis=0) + deviation * rng.standard_normal(rows.shape[1])
            both = np.concatenate([inside, outside])
            scores = sum_scores(both, total, size, deviation, rows, beside)
            expected = expected_auc(size, rows.shape[1], deviation)
            yield scores[:size], scores[size:], expected


def told_of_adapters(
    experiment: Experiment, client: int, seed: int, listener: Listener
) -> list[Told]:
    """Return what is told by the adapters that one site hands over, one attack for each round of
    the tasks: without a mechanism, and under budgets. None of a site that hands over no adapter."""
    if at_server(experiment):
        return []
    found: list[Told] = []
    for epsilon in (math.inf, *BUDGETS):
        config = with_budget(experiment, epsilon)
        noise = f"ε = {epsilon:g}" if math.isfinite(epsilon) else "none"
        for server_round, pairs in adapter_scores(config, client, listener).items():
            members, others = (np.concatenate(each) for each in zip(*pairs, strict=True))
            if not (len(members) and len(others)):
                continue
            both = members, others
            bounds = bootstrap(both, area, method="percentile", n_resamples=1000, rng=seed)
            low, high = map(float, bounds.confidence_interval)
            figures: dict[str, Any] = {"auc": area(*both), "interval": (low, high)}
            figures |= {"records": len(members)}
            found.append(_told(f"adapter of round {server_round}", noise, *both, **figures))
    return found


def area(members: Scores, others: Scores) -> float:
    """Area under the ROC curve: probability that a member scores above another (ties half)."""
    n, k = len(members), len(others)
    ranks = rankdata(np.concatenate([members, others]))
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * k))


def true_positive_rate(members: Scores, others: Scores) -> float | None:
    """Return the share of members above a threshold that at most 0.1 % of the others pass; None of
    fewer than a thousand others, whose 0.1 % is unknown."""
    if len(others) < 1 / FALSE_POSITIVES:
        return None
    allowed = int(FALSE_POSITIVES * len(others))
    threshold = np.sort(others)[len(others) - allowed - 1]
    return float((members > threshold).mean())


def as_added(vectors: Tensor, bound: float) -> Rows:
    """Return what each record adds to a class sum, its count left out: clipped with that."""
    count = len(vectors)
    places, step = range(count), bound * GRID
    alone = torch.arange(count)  # a label of its own for each
    sums = clipped_class_sums(vectors, alone, count, places, Groups(places), bound, step)
    return step * sums[:, :-1].double().cpu().numpy()


def sum_scores(
    records: Rows, total: Rows, members: int, deviation: float, known: Rows, within: Rows
) -> Scores:
    """Score records by the likelihood ratio of a class sum.

    Args:
        records: as they are added, ``(records, size)``.
        total: the sum, ``(size,)``.
        members: records in it.
        deviation: of its noise in each entry.
        known: two or more records of the label: the more of them for each direction, the more
            their own covariance counts; their mean is uncertain, too.
        within: covariance within other labels, ``(size, size)``.

    Returns:
        For each record the logarithm of how much likelier the sum is with it than without, but for
        a constant.
    """
    weight, mean = len(known) / (len(known) + known.shape[1]), known.mean(axis=0)
    covariance = weight * np.cov(known, rowvar=False) + (1 - weight) * within
    spread = (members + members**2 / len(known)) * covariance
    noise = max(deviation**2, TINY * np.trace(spread) / len(spread))
    away = records - mean
    weighted = np.linalg.solve(spread + noise * np.eye(len(spread)), away.T).T
    own = (weighted * away).sum(axis=1)
    scores: Scores = weighted @ (total - members * mean) - 0.5 * own
    return scores
