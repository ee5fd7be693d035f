"""One training in this process, and what an attacker sees of it: canaries in every release, or in
the adapters that one site hands over the losses of its records.

Records are audited by the real apps, one site alone: what others add to a release can only hide it.
Where the noise is in a sum all sites take part, since each adds its share.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from client.app import make_app
from client.runtime import ClientRuntime
from deal_core.config.experiment import Experiment, at_server
from deal_core.config.file import to_run_config
from deal_core.data import Example, TaskData, load_for_clients, open_source
from deal_core.data.partition import partition
from deal_core.errors import UserError
from deal_core.lora.attach import base_only
from deal_core.models.interface import Encoded, LanguageModel
from deal_core.privacy.accountant import with_steps_added
from deal_core.privacy.interface import LocalUpdate, Train, UpdateRequest
from deal_core.privacy.ledger import Ledger
from deal_core.privacy.policy import in_sum
from deal_core.protection import make_mechanism
from deal_core.training.loop import evaluation_batches
from deal_core.wire.instruction import LEARN
from server.folder import Listener
from server.results import Results
from server.run import run
from simulations.audit.canaries import GradientCanaries, Overseen, Scores, counted_sites, plant
from simulations.audit.claim import Repetition, guess
from simulations.engines.inprocess import RUN_ID, SERVER_NODE, InProcessGrid
from simulations.engines.worker_pool import assume_identity

DELTA = 1e-5
"""Where the experiment names none: canaries can refute nothing at a delta of 1 / canaries."""


class Found(Repetition):
    """One audited training."""

    client: int
    in_sum: bool
    """Whether the attacker sees nothing but sums over sites."""
    unit: str
    unit_column: str = ""
    simulation_only: bool
    claimed: float
    """Epsilon that the site's ledger holds, of all rounds and tasks, at ``delta``."""
    delta: float
    assumes: str = ""
    """Whom the claim takes to be honest; empty: as its unit of privacy says."""


def carry_out(
    experiment: Experiment,
    client: int,
    canaries: GradientCanaries,
    records: int,
    listener: Listener,
) -> Found:
    """Return what an attack has found after a training in a temporary folder: of one site alone, at
    every noised step; or, where the noise is in a sum, among all, at the sums over the sites whose
    noise is counted on. Beside the canaries train at most so many real ``records`` of each task (0:
    all); repetitions have coins and noise of their own.

    Raises:
        UserError: as a run; or a site took no part, and no sum was whole.
    """
    summed = at_server(experiment)

    def prepare(shares: list[TaskData]) -> list[TaskData]:
        # one record to test: how good the model is does not matter
        cuts = [1] * len(shares)
        cuts[client] = records or len(shares[client].train)
        return [
            replace(share, train=share.train[:cut], test=share.test[:1])
            for share, cut in zip(shares, cuts, strict=True)
        ]

    with alone(experiment, client, canaries.repeat) as config:
        config = config if summed else _beside_canaries(config, client)
        counted = counted_sites(config, client) if summed else ()
        planted, seen = plant(make_mechanism(config), canaries, counted)
        results = run_here(config, ClientRuntime(config, lambda same: planted, prepare), listener)
        if summed and (seen.open or not seen.scored):
            raise UserError(
                "not every site took part in every round, so the audit saw no whole sums; "
                "deal simulate says why"
            )
        ledger = Ledger(Path(config.run.out) / "sites" / str(client))
        spent = with_steps_added(event.spent for event in ledger.events())
    privacy = results.privacy
    assert privacy.delta is not None
    assert privacy.unit is not None
    return Found(
        client=client,
        in_sum=summed,
        unit=privacy.unit,
        unit_column=privacy.unit_column,
        simulation_only=privacy.simulation_only,
        claimed=privacy.epsilon[str(client)],
        delta=privacy.delta,
        spent=spent,
        outcomes=guess(seen.total, canaries.included),
        assumes=privacy.assumes if in_sum(config.privacy) else "",
    )


@contextmanager
def alone(config: Experiment, client: int, repeat: int = 0) -> Iterator[Experiment]:
    """Yield an experiment of one site alone, or, where the noise is in a sum, of all of them, in a
    temporary folder; in this process, and every update as it was made."""
    with tempfile.TemporaryDirectory() as folder:
        run: dict[str, Any] = {"out": folder, "resume": False, "workers": 1, "engine": "inprocess"}
        run |= {"seed": config.run.seed + repeat}  # of the noise
        # small passes: threads that wait for each other cost more than they save
        run |= {"threads": config.run.threads or 1}
        yield config.changed(
            privacy={"target_delta": config.privacy.target_delta or DELTA},
            federation={} if at_server(config) else {"participants": (client,)},
            aggregation={"robust": "none"},
            wire={"dtype": "float32"},
            run=run,
        )


def _beside_canaries(config: Experiment, client: int) -> Experiment:
    """Return the experiment with the sampling rate that its site has without canaries: they are
    many, and would make a batch of a given size a small part of the records."""
    if config.privacy.sample_rate:
        return config
    tasks = open_source(config.data).task_names()
    grouped = bool(config.privacy.unit_column)
    units = sum(share_of(config, task, client).units(grouped) for task in tasks)
    rate = min(1.0, config.train.batch_size * len(tasks) / max(1, units))
    return config.changed(privacy={"sample_rate": rate})


def share_of(experiment: Experiment, task: str, client: int) -> TaskData:
    """Return a client's share of a task as it is."""
    data = load_for_clients(experiment, task)
    clients = experiment.federation.clients
    return partition(data, experiment.data.partition, clients, experiment.run.seed)[client]


def run_here(config: Experiment, runtime: ClientRuntime, listener: Listener) -> Results:
    """Run an experiment in this process with clients of the audit's own."""
    app = make_app(find_runtime=lambda client: runtime)
    grid = InProcessGrid(app, to_run_config(config), config.federation.clients)
    with assume_identity(RUN_ID, SERVER_NODE):
        return run(grid, config, listener)


def adapter_scores(
    config: Experiment, client: int, listener: Listener
) -> dict[int, list[tuple[Scores, Scores]]]:
    """Return round within a task to the scores of members and of others, task by task, on the
    adapters that one site hands over after training alone: how far the losses of its records, and
    of its test records, fell. What others add can only hide it."""
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


def _losses(model: LanguageModel, encoded: Sequence[Encoded], labels: Sequence[str]) -> Scores:
    losses = np.zeros(len(encoded))
    for batch in evaluation_batches(encoded):
        with torch.no_grad():
            own = [encoded[i] for i in batch]
            if own[0].target < 0:  # tags of words, or texts
                told = model.forward_train(own, labels, ()).example_losses
                losses[list(batch)] = told.double().cpu().numpy()
                continue
            logits = model.scores(own, labels).double().cpu()
            targets = torch.tensor([e.target for e in own])
            losses[list(batch)] = cross_entropy(logits, targets, reduction="none").numpy()
    return losses
