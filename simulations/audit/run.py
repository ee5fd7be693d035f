"""One training with canaries, in this process, and what was seen of it.

Records are audited by the real apps, one site alone: what others add to a release can only hide it.
Where the noise is in a sum all sites take part, since each adds its share.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from client.app import make_app
from client.runtime import ClientRuntime
from deal_core.config.experiment import Experiment, at_server
from deal_core.config.file import to_run_config
from deal_core.data import TaskData, load_for_clients, open_source
from deal_core.data.partition import partition
from deal_core.errors import UserError
from deal_core.privacy.accountant import DpEvent, with_steps_added
from deal_core.privacy.ledger import Ledger
from deal_core.privacy.policy import in_sum
from deal_core.protection import make_mechanism
from server.folder import Listener
from server.results import Results, Strict
from server.run import run
from simulations.audit.canaries import GradientCanaries, Scores
from simulations.audit.claim import Guesses, Repetition, guess
from simulations.audit.planted import counted_sites, plant
from simulations.engines.inprocess import RUN_ID, SERVER_NODE, InProcessGrid
from simulations.engines.worker_pool import assume_identity

DELTA = 1e-5
"""Where the experiment names none: canaries can refute nothing at a delta of 1 / canaries."""


@dataclass(frozen=True)
class Training:
    """One training of an experiment with canaries at a client."""

    experiment: Experiment
    client: int
    canaries: int
    records: int = 0
    """Real ones of each task, at most, beside the canaries; 0: all."""
    seed: int = 0
    """Of the canaries."""
    repeat: int = 0
    """Number of the repetition; its coins and its noise are its own."""


class Found(Strict):
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
    spent: tuple[DpEvent, ...]
    """What the ledger holds, equal steps together."""
    outcomes: tuple[Guesses, ...]
    """Of the guesses, one for every choice of how many."""
    assumes: str = ""
    """Whom the claim takes to be honest; empty: as its unit of privacy says."""

    @property
    def repetition(self) -> Repetition:
        """For the test of the claim."""
        return Repetition(self.spent, self.outcomes)


def carry_out(training: Training, listener: Listener) -> Found:
    """Return what an attack has found after a training in a temporary folder.

    Raises:
        UserError: as a run; or a site took no part.
    """
    config = training.experiment
    canaries = GradientCanaries(training.canaries, training.seed, training.repeat)
    with alone(config, training.client, training.repeat) as placed:
        results, scores = _attacked(placed, training, canaries, listener)
        ledger = Ledger(Path(placed.run.out) / "sites" / str(training.client))
        spent = with_steps_added(event.spent for event in ledger.events())
    privacy = results.privacy
    assert privacy.delta is not None
    assert privacy.unit is not None
    return Found(
        client=training.client,
        in_sum=at_server(config),
        unit=privacy.unit,
        unit_column=privacy.unit_column,
        simulation_only=privacy.simulation_only,
        claimed=privacy.epsilon[str(training.client)],
        delta=privacy.delta,
        spent=spent,
        outcomes=guess(scores, canaries.included),
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
        privacy = {"target_delta": config.privacy.target_delta or DELTA}
        federation = {} if at_server(config) else {"participants": (client,)}
        yield config.model_copy(
            update={
                "privacy": config.privacy.model_copy(update=privacy),
                "federation": config.federation.model_copy(update=federation),
                "aggregation": config.aggregation.model_copy(update={"robust": "none"}),
                "wire": config.wire.model_copy(update={"dtype": "float32"}),
                "run": config.run.model_copy(update=run),
            }
        )


def _attacked(
    config: Experiment, training: Training, canaries: GradientCanaries, listener: Listener
) -> tuple[Results, Scores]:
    """Return what is seen of one site: alone, every noised step; or, where the noise is in a sum,
    among all, the sums over the sites whose noise is counted on.

    Raises:
        UserError: no sum was whole.
    """
    counted = counted_sites(config, training.client) if at_server(config) else ()
    if not counted:
        config = _beside_canaries(config, training.client)
    planted, seen = plant(make_mechanism(config), canaries, counted)

    def prepare(shares: list[TaskData]) -> list[TaskData]:
        # one record to test: how good the model is does not matter
        cuts = [1] * len(shares)
        cuts[training.client] = training.records or len(shares[training.client].train)
        return [
            replace(share, train=share.train[:cut], test=share.test[:1])
            for share, cut in zip(shares, cuts, strict=True)
        ]

    results = run_here(config, ClientRuntime(config, lambda same: planted, prepare), listener)
    if counted and (seen.open or not seen.scored):
        raise UserError(
            "not every site took part in every round, so the audit saw no whole sums; "
            "deal simulate says why"
        )
    return results, seen.total


def _beside_canaries(config: Experiment, client: int) -> Experiment:
    """Return the experiment with the sampling rate that its site has without canaries: they are
    many, and would make a batch of a given size a small part of the records."""
    if config.privacy.sample_rate:
        return config
    tasks = open_source(config.data).task_names()
    grouped = bool(config.privacy.unit_column)
    units = sum(share_of(config, task, client).units(grouped) for task in tasks)
    rate = min(1.0, config.train.batch_size * len(tasks) / max(1, units))
    privacy = config.privacy.model_copy(update={"sample_rate": rate})
    return config.model_copy(update={"privacy": privacy})


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
