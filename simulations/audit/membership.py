"""``deal audit --membership``: how well an attacker tells who is in what leaves the sites.

Class sums are attacked on an experiment's own model, data and sizes. A label's head is made of its
sum and of what is public, so it tells a reader no more. Adapters are attacked as one site hands
them over, after training alone: what others add can only hide it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import wrap

import numpy as np
from rich.console import Console
from scipy.stats import bootstrap

from client.runtime import ClientRuntime
from deal_core.config.experiment import Experiment, at_server
from deal_core.data import Example, open_source
from deal_core.errors import UserError, at_home
from deal_core.methods import Statistics, method_of, statistics_of
from deal_core.models import load_model
from deal_core.models.interface import LanguageModel
from deal_core.privacy.audit.canaries import Scores
from deal_core.privacy.audit.expected_membership import expected_auc
from deal_core.privacy.audit.membership import (
    Rows,
    area,
    as_added,
    known_of,
    learnt_scores,
    sum_scores,
    true_positive_rate,
)
from deal_core.privacy.audit.planted import Witnessed, overseen
from deal_core.privacy.distributed_noise import COUNT_WEIGHT
from deal_core.privacy.interface import Gradients, UpdateRequest
from deal_core.protection import class_sum_noise, make_mechanism
from deal_core.training.evaluation import base_embeddings
from deal_core.wire.instruction import LEARN
from server.folder import Listener
from server.results import Strict
from simulations.audit.run import DELTA, alone, members_of, run_here, share_of
from simulations.output.console import print_line, print_page, require_one_kind
from simulations.output.files import DASH, head, row, write_texts
from simulations.run.experiment import Request, load_experiment, with_budget
from simulations.run.live_view import progress_view
from simulations.run.preflight import preflight

FILE = "membership.json"
EXPLANATION = (
    "AUC: probability that a member scores above a record that was away; 0.5 is chance. TPR: share "
    "of members found where 0.1 % of the others are taken for members. Of a sum the attacker knows "
    "the label, the number of records, the noise, and other records of the label that are in no "
    "sum; the score is the likelihood ratio of the sum with and without the record. Expected: by "
    "the closed form, from size and noise alone. Noise: deviation in each entry, in units of what "
    "a record adds at most. Of an adapter, which one site has trained alone, the score is how far "
    "the loss on a record fell below the base model's, with a 95 % bootstrap interval; the others "
    "are the site's test records."
)
SIZES = (20, 80, 160)
"""Records of a label in a sum."""
BUDGETS = (8.0, 2.0)
MOST = 640
"""Records of a label that are embedded; a sum takes a third of a label's at most."""
DRAWS = 4
"""Sums of each size and label."""


class Told(Strict):
    """One attack.

    Attributes:
        seen: what, by whom.
        noise: in words.
        deviation: of the noise in each entry of a sum; 0: none, or of adapters.
        records: in a sum; of adapters, that the site trains on.
        auc: area under the ROC curve.
        found: true positives at 0.1 % false ones; None of fewer than 1,000 ``others``.
        members, others: pairs of a record and a sum, or records.
        expected: area by the closed form, of a sum.
        interval: of the area, 95 %, of adapters.
    """

    seen: str
    noise: str
    deviation: float = 0.0
    records: int
    auc: float
    found: float | None
    members: int
    others: int
    expected: float | None = None
    interval: tuple[float, float] | None = None


class MembershipAudit(Strict):
    """Schema of ``membership.json``; ``directions`` of a class sum, 0 where none leaves."""

    schema_version: int = 2
    experiment: str
    directions: int
    told: list[Told]


@dataclass(frozen=True)
class MembershipRequest:
    """Attributes: as of :class:`~simulations.audit.command.AuditRequest`."""

    experiment: str = "quickstart"
    out: str = ""
    overrides: tuple[str, ...] = ()
    seed: int = 0
    client: int = 0


def membership_folder(request: MembershipRequest) -> Path:
    """Return the folder of figures."""
    return at_home(request.out or f"runs/membership-{Path(request.experiment).stem}").resolve()


def run_membership(request: MembershipRequest, console: Console) -> int:
    """Attack, and write what was found.

    Returns:
        The exit code, 0.

    Raises:
        UserError: bad input, or an experiment of which neither class sums nor adapters leave.
    """
    out = membership_folder(request)
    require_one_kind(out, FILE)
    experiment = load_experiment(Request(request.experiment, str(out), request.overrides))
    with console.status("checking the experiment and its data"):
        preflight(experiment)
    with console.status("embedding texts") as status:
        data = embedded(experiment, request.seed)
        told = told_of_sums(experiment, data, request.seed, status.update)
    with progress_view(console, "adapters") as listener:
        told += told_of_adapters(experiment, request.client, request.seed, listener)
    if not told:
        raise UserError(
            "nothing leaves a site here that membership is told of: neither class sums of enough "
            "records nor adapters; deal audit attacks noise in sums of gradients"
        )
    directions = data[0].shape[1] if data else 0
    name = Path(request.experiment).stem
    audit = MembershipAudit(experiment=name, directions=directions, told=told)
    lines = [f"# Membership in {name}", "", *wrap(EXPLANATION, 100), "", *told_table(told)]
    page = "\n".join(lines) + "\n"
    write_texts(out, {FILE: audit.model_dump_json(indent=1) + "\n", "membership.md": page})
    print_page(console, page)
    print_line(console, f"figures in {out / FILE}, table in {out / 'membership.md'}")
    return 0


def told_table(told: Sequence[Told]) -> Iterator[str]:
    """Yield a row for each attack."""
    yield from head("seen", "noise", "records", "AUC", "expected", "TPR at 0.1 % FPR")
    for each in told:
        low, high = each.interval or (0.0, 0.0)
        yield row(
            each.seen,
            each.noise + (f" ({each.deviation:.2f})" if each.deviation else ""),
            str(each.records),
            f"{each.auc:.2f}" + (f" [{low:.2f}, {high:.2f}]" if each.interval else ""),
            DASH if each.expected is None else f"{each.expected:.2f}",
            "n too small" if each.found is None else f"{100 * each.found:.1f} %",
        )


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
    for seen, noise, deviation in noises(experiment) if data else ():
        for size in SIZES:
            progress(f"{seen}, noise {noise}, {size} records")
            each = list(_attacked(data, size, deviation, seed))
            if not each:
                continue
            members, others = (np.concatenate([attack[k] for attack in each]) for k in (0, 1))
            found.append(
                Told(
                    seen=seen,
                    noise=noise,
                    deviation=deviation,
                    records=size,
                    auc=float(np.mean([area(inside, outside) for inside, outside, _ in each])),
                    found=true_positive_rate(members, others),
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


def told_of_adapters(
    experiment: Experiment, client: int, seed: int, listener: Listener
) -> list[Told]:
    """Return what is told by the adapters that one site hands over, one attack for each round of
    the tasks: without a mechanism, and under budgets. None of a site that hands over no adapter.

    Args:
        experiment: what is trained.
        client: the site.
        seed: of the intervals.
        listener: hears the trainings.
    """
    if at_server(experiment):
        return []
    found: list[Told] = []
    for epsilon in (math.inf, *BUDGETS):
        config = with_budget(experiment, epsilon)
        noise = f"ε = {epsilon:g}" if math.isfinite(epsilon) else "none"
        for server_round, pairs in _handed_over(config, client, listener).items():
            members, others = (np.concatenate([pair[k] for pair in pairs]) for k in (0, 1))
            if not len(members) or not len(others):
                continue
            interval = bootstrap(
                (members, others), area, method="percentile", n_resamples=1000, rng=seed
            ).confidence_interval
            found.append(
                Told(
                    seen=f"adapter of round {server_round}",
                    noise=noise,
                    records=len(members),
                    auc=area(members, others),
                    found=true_positive_rate(members, others),
                    members=len(members),
                    others=len(others),
                    interval=(float(interval.low), float(interval.high)),
                )
            )
    return found


Pairs = dict[int, list[tuple[Scores, Scores]]]
"""Round within a task to the scores of members and of others, task by task."""


def _handed_over(config: Experiment, client: int, listener: Listener) -> Pairs:
    """Train one site alone, and score its records on every adapter that it hands over."""
    found: Pairs = {}

    def look(ask: UpdateRequest, model: LanguageModel, labels: Sequence[str]) -> None:
        if ask.phase != LEARN:
            return
        share = share_of(config, ask.task, client)
        trained = {example.unit for example in share.train if example.unit}
        strangers = [example for example in share.test if example.unit not in trained]
        pair = tuple(_scores(model, each, labels) for each in (share.train, strangers))
        found.setdefault(ask.server_round, []).append((pair[0], pair[1]))

    def change(ask: UpdateRequest, own: Gradients) -> Witnessed:
        return Witnessed(own, partial(look, ask))

    with alone(config, client) as config:
        runtime = ClientRuntime(config, lambda same: overseen(make_mechanism(same), change))
        run_here(config, runtime, listener)
    return found


def _scores(model: LanguageModel, examples: Sequence[Example], labels: Sequence[str]) -> Scores:
    """Return the mean of each unit's examples, ``(units,)``."""
    scores = learnt_scores(model, examples, labels) if examples else np.zeros(0)
    return np.array([scores[positions].mean() for positions in members_of(examples)], np.float64)
