"""``deal audit --membership``: how well an attacker tells who is in the adapters that leave a site.

Adapters are attacked as one site hands them over, after training alone: what others add can only
hide it; the score is how far the loss on a record fell below the frozen base model's. Of class sums
:mod:`simulations.run.expected_membership` has the best attack in closed form.

Source: Carlini et al., "Membership inference attacks from first principles", S&P 2022 (why the true
positive rate at a small false positive rate counts).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from scipy.stats import bootstrap, rankdata
from torch.nn.functional import cross_entropy

from client.runtime import ClientRuntime
from deal_core.config.experiment import Experiment, at_server
from deal_core.data import Example
from deal_core.errors import UserError, at_home
from deal_core.lora.attach import base_only
from deal_core.models.interface import Encoded, LanguageModel
from deal_core.privacy.interface import LocalUpdate, Train, UpdateRequest
from deal_core.protection import make_mechanism
from deal_core.training.batching import evaluation_batches
from deal_core.wire.instruction import LEARN
from server.folder import Listener
from server.results import Strict
from simulations.audit.canaries import Scores
from simulations.audit.planted import Overseen
from simulations.audit.run import alone, run_here, share_of
from simulations.output.console import print_line, print_table, require_one_kind
from simulations.output.files import Table, write_texts
from simulations.run.check import preflight
from simulations.run.experiment import Request, load_experiment, with_budget
from simulations.run.progress import told_to

FILE = "membership.json"
EXPLANATION = (
    "AUC: probability that a member scores above a record that was away; 0.5 is chance; with a "
    "95 % bootstrap interval. TPR: share of members found where 0.1 % of the others are taken for "
    "members. The score is how far the loss on a record fell below the base model's, on the "
    "adapter that one site has trained alone; the others are the site's test records."
)
BUDGETS = (8.0, 2.0)
FALSE_POSITIVES = 1e-3
"""Rate at which true positives are told; of 1,000 others or more."""


class Told(Strict):
    """One attack."""

    seen: str
    noise: str
    """In words."""
    records: int
    """That the site trains on."""
    others: int
    auc: float
    """Area under the ROC curve."""
    interval: tuple[float, float]
    """Of the area, 95 %."""
    found: float | None
    """True positives at 0.1 % false ones; None of fewer than 1,000 ``others``."""


class MembershipAudit(Strict):
    """Schema of ``membership.json``."""

    schema_version: int = 3
    experiment: str
    told: list[Told]


def membership_folder(experiment: str, out: str) -> Path:
    """Return the folder of figures."""
    return at_home(out or f"runs/membership-{Path(experiment).stem}").resolve()


def run_membership(
    name: str, folder: Path, overrides: Sequence[str], seed: int, client: int, console: Console
) -> None:
    """Attack the adapters of one client; write what was found into a folder, and show it.

    Raises:
        UserError: bad input, or an experiment of which no adapter leaves.
    """
    require_one_kind(folder, FILE)
    experiment = load_experiment(Request(name, str(folder), tuple(overrides)))
    with console.status("checking the experiment and its data"):
        preflight(experiment)
    told = told_of_adapters(experiment, client, seed, told_to(console))
    if not told:
        raise UserError(
            "no adapter leaves a site here; deal audit attacks noise in sums of gradients, and "
            "deal check says how well members of class sums are told"
        )
    audit = MembershipAudit(experiment=Path(name).stem, told=told)
    write_texts(folder, {FILE: audit.model_dump_json(indent=1) + "\n"})
    print_table(console, told_table(told))
    print_line(console, f"figures in {folder / FILE}; report.html says how to read them")


def told_table(told: Sequence[Told]) -> Table:
    """Return a row for each attack."""
    rows = []
    for each in told:
        low, high = each.interval
        figures = (
            each.seen,
            each.noise,
            str(each.records),
            f"{each.auc:.2f} [{low:.2f}, {high:.2f}]",
            "n too small" if each.found is None else f"{100 * each.found:.1f} %",
        )
        rows.append(figures)
    columns = ("seen", "noise", "records", "AUC", "TPR at 0.1 % FPR")
    return Table("Attacks on adapters", columns, tuple(rows))


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
        for server_round, pairs in _handed_over(config, client, listener).items():
            members, others = map(np.concatenate, zip(*pairs, strict=True))
            if not (len(members) and len(others)):
                continue
            low, high = bootstrap(
                (members, others), area, method="percentile", n_resamples=1000, rng=seed
            ).confidence_interval
            found.append(
                Told(
                    seen=f"adapter of round {server_round}",
                    noise=noise,
                    records=len(members),
                    others=len(others),
                    auc=area(members, others),
                    interval=(float(low), float(high)),
                    found=true_positive_rate(members, others),
                )
            )
    return found


def _handed_over(
    config: Experiment, client: int, listener: Listener
) -> dict[int, list[tuple[Scores, Scores]]]:
    """Return round within a task to the scores of members and of others, task by task, on the
    adapters that one site hands over after training alone."""
    found: dict[int, list[tuple[Scores, Scores]]] = {}

    def scored(ask: UpdateRequest, train: Train) -> Train:
        def trained(gradients: Any) -> LocalUpdate:
            made = train(gradients)
            share = share_of(config, ask.task, client)
            learnt = {example.unit for example in share.train if example.unit}
            strangers = [example for example in share.test if example.unit not in learnt]
            members = _scores(runtime.model, share.train, share.labels)
            others = _scores(runtime.model, strangers, share.labels)
            found.setdefault(ask.server_round, []).append((members, others))
            return made

        return trained if ask.phase == LEARN else train

    with alone(config, client) as config:
        runtime = ClientRuntime(config, lambda same: Overseen(make_mechanism(same), scored))
        run_here(config, runtime, listener)
    return found


def _scores(model: LanguageModel, examples: Sequence[Example], labels: Sequence[str]) -> Scores:
    """Return the mean over what is protected together, each group, or each example, of how far the
    loss of an example is below that of the frozen base model, which is public, ``(units,)``: an
    example that is easy for it as well says nothing."""
    if not examples:
        return np.zeros(0)
    encoded = model.encode(examples, labels)
    learnt = -_losses(model, encoded, labels)
    with base_only(model.module):
        learnt += _losses(model, encoded, labels)
    units: dict[str | int, list[float]] = {}
    for position, example in enumerate(examples):
        units.setdefault(example.unit or position, []).append(learnt[position])
    return np.array([np.mean(each) for each in units.values()], np.float64)


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


def _losses(model: LanguageModel, encoded: Sequence[Encoded], labels: Sequence[str]) -> Scores:
    losses = np.zeros(len(encoded))
    for batch in evaluation_batches(encoded):
        with torch.no_grad():
            own = [encoded[i] for i in batch]
            logits = model.scores(own, labels).double().cpu()
            targets = torch.tensor([e.target for e in own])
            losses[list(batch)] = cross_entropy(logits, targets, reduction="none").numpy()
    return losses
