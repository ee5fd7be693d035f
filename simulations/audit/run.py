"""One training with canaries, in this process, and what was seen of it.

Records are audited by the real apps, one site alone: what others add to a release can only hide it.
Where the noise is in a sum all sites take part, since each adds its share.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from client.app import make_app
from client.runtime import ClientRuntime
from deal_core.atomic_write import atomic_write
from deal_core.config.experiment import Experiment
from deal_core.config.run_config import to_run_config
from deal_core.data import TaskData, load_for_clients, open_source
from deal_core.data.partition import partition
from deal_core.errors import UserError
from deal_core.models.interface import LanguageModel
from deal_core.privacy.audit.audited import audited
from deal_core.privacy.audit.canaries import GradientCanaries
from deal_core.privacy.audit.guesses import guess
from deal_core.privacy.audit.membership import membership
from deal_core.privacy.audit.planted import plant
from deal_core.privacy.audit.planted_sum import counted_sites, plant_in_sum
from deal_core.privacy.audit.text_canaries import (
    Scores,
    TextCanaries,
    learnt_scores,
    mean_scores,
    members_of,
)
from deal_core.privacy.interface import UpdateRequest
from deal_core.privacy.ledger import Ledger
from deal_core.privacy.policy import in_sum
from deal_core.protection import make_mechanism
from deal_core.wire.instruction import LEARN
from server.folder import Listener, exclusive_lock
from server.results import Results
from server.run import run
from simulations.audit.found import Attack, Found, Kind, Training, outcomes_of, steps_of
from simulations.engines.inprocess import RUN_ID, SERVER_NODE, InProcessGrid
from simulations.engines.worker_pool import assume_identity
from simulations.output.stored import read_stored
from simulations.run.run_folder import check_same, record, recorded

FOUND = "audit.json"
"""What one training told, in its folder."""


def known(training: Training) -> Found | None:
    """Return what the folder already holds; None: the training has not ended.

    Raises:
        UserError: of other settings.
    """
    path = training.folder / FOUND
    if not path.exists():
        return None
    cure = "set it back, or choose another --out"
    check_same(training.experiment, recorded(training.folder), "audit", cure)
    found = read_stored(Found, path, "audit", "remove it to train again, or choose another --out")
    for name in ("client", "canaries", "records", "seed", "repeat"):
        if getattr(found, name) != getattr(training, name):
            raise UserError(
                f"audit: {name} is {getattr(training, name)}, but {path} has "
                f"{getattr(found, name)}; {cure}"
            )
    return found


def carry_out(training: Training, listener: Listener) -> Found:
    """Train, judge, and write what was found beside the results.

    One that was stopped starts again: what its witness saw is gone with it.

    Returns:
        What was found.

    Raises:
        UserError: as a run; the site has too little to plant canaries in; or another process is at
            this training.
    """
    folder = training.folder
    with exclusive_lock(folder.parent / f".{folder.name}.lock"):
        before = known(training)
        if before is not None:  # by another process, meanwhile
            return before
        if folder.exists():
            shutil.rmtree(folder)
        record(training.experiment)
        found = KINDS[training.kind](training, listener)
        atomic_write(folder / FOUND, found.model_dump_json(indent=1) + "\n")
        return found


@dataclass
class TextWitness:
    """Scores texts on the model that the site hands over in the last round of each task.

    Attributes:
        share_of: task to the site's share, before anything was planted.
        last: number of the last round of a task.
        scores, included: of the canaries of the tasks so far. members, others: scores of the
            site's other training records, and of its test records.
    """

    canaries: TextCanaries
    share_of: Callable[[str], TaskData]
    last: int
    scores: list[Scores] = field(default_factory=list)
    included: list[NDArray[np.bool_]] = field(default_factory=list)
    members: list[Scores] = field(default_factory=list)
    others: list[Scores] = field(default_factory=list)

    def model(self, ask: UpdateRequest, model: LanguageModel, labels: Sequence[str]) -> None:
        """Score, where the task is over."""
        if ask.phase != LEARN or ask.server_round != self.last:
            return
        share = self.share_of(ask.task)
        planted = self.canaries.planted(share)
        trained = {example.unit for example in share.train if example.unit}
        strangers = [example for example in share.test if example.unit not in trained]
        for examples, into in (
            (planted.canaries, self.scores),
            (planted.others, self.members),
            (strangers, self.others),
        ):
            scores = learnt_scores(model, examples, labels)
            into.append(mean_scores(scores, members_of(examples)))
        self.included.append(planted.included)


def _gradients(training: Training, listener: Listener) -> Found:
    """Gradient canaries, seen in every noised step, or, without a mechanism, in every update."""
    canaries = GradientCanaries(training.canaries, training.seed, training.repeat)
    config = beside_canaries(training)
    planted, seen = plant(
        "steps" if config.privacy.mechanism == "record" else "updates",
        make_mechanism(config),
        canaries,
        config.privacy.max_grad_norm,
    )
    prepare = partial(few, records=training.records)
    runtime = ClientRuntime(config, lambda same: planted, prepare)
    results = _run(config, runtime, listener)
    return _found(training, results, seen.total, canaries.included, None)


def _sums(training: Training, listener: Listener) -> Found:
    """Gradient canaries at one site, seen in the sum over the sites whose noise is counted on."""
    config, attacked = training.experiment, training.client
    canaries = GradientCanaries(training.canaries, training.seed, training.repeat)
    counted = counted_sites(config, attacked)
    planted, seen = plant_in_sum(make_mechanism(config), canaries, counted)

    def prepare(shares: list[TaskData]) -> list[TaskData]:
        own = few(shares, training.records)
        alone = few(shares, 1)
        return [own[k] if k == attacked else share for k, share in enumerate(alone)]

    runtime = ClientRuntime(config, lambda same: planted, prepare)
    results = _run(config, runtime, listener)
    if seen.open or not seen.scored:
        raise UserError(
            f"not every site took part in every round of {training.folder}, so the audit saw no "
            "whole sums; its metrics.jsonl says why"
        )
    return _found(training, results, seen.total, canaries.included, None)


def beside_canaries(training: Training) -> Experiment:
    """Return the experiment with the sampling rate that its site has without canaries: they are
    many, and would make a batch of a given size a small part of the records."""
    config = training.experiment
    if config.privacy.mechanism == "none" or config.privacy.sample_rate:
        return config
    tasks = open_source(config.data).task_names()
    shares = [share_of(config, task, training.client) for task in tasks]
    units = sum(len(members_of(share.train)) for share in shares)
    rate = min(1.0, config.train.batch_size * len(tasks) / max(1, units))
    privacy = config.privacy.model_copy(update={"sample_rate": rate})
    return config.model_copy(update={"privacy": privacy})


def few(shares: list[TaskData], records: int) -> list[TaskData]:
    """Return shares with so many records to train on at most (0: all), and one to test: nobody asks
    how good the model is."""
    cut = records or None
    return [replace(share, train=share.train[:cut], test=share.test[:1]) for share in shares]


def _texts(training: Training, listener: Listener) -> Found:
    """Text canaries, and the attack on all other records."""
    canaries = TextCanaries(training.client, training.canaries, training.seed)
    witness = TextWitness(
        canaries,
        lambda task: share_of(training.experiment, task, training.client),
        training.experiment.federation.rounds,
    )
    runtime = ClientRuntime(
        training.experiment,
        lambda config: audited(make_mechanism(config), witness),
        canaries.prepare,
    )
    results = _run(training.experiment, runtime, listener)
    scores = [np.concatenate(s) if s else np.zeros(0) for s in (witness.scores, witness.members)]
    others = np.concatenate(witness.others) if witness.others else np.zeros(0)
    if not (len(scores[0]) and len(scores[1]) and len(others)):
        raise UserError(
            f"client {training.client} has too few records to plant canaries among them (or no "
            "test records of groups that it does not train on); audit another --client, or give it "
            "more"
        )
    attack = membership(scores[1], others, training.seed)
    included = np.concatenate(witness.included)
    return _found(training, results, scores[0], included, Attack.model_validate(asdict(attack)))


KINDS: dict[Kind, Callable[[Training, Listener], Found]] = {
    "gradients": _gradients,
    "texts": _texts,
    "sums": _sums,
}
"""Kind of canaries to how a training with them is judged."""


def _run(config: Experiment, runtime: ClientRuntime, listener: Listener) -> Results:
    app = make_app(find_runtime=lambda client: runtime)
    grid = InProcessGrid(app, to_run_config(config), config.federation.clients)
    with assume_identity(RUN_ID, SERVER_NODE):
        return run(grid, config, listener)


def _found(
    training: Training,
    results: Results,
    scores: Scores,
    included: NDArray[np.bool_],
    attack: Attack | None,
) -> Found:
    privacy = results.privacy
    claimed = privacy.epsilon.get(str(training.client))
    # None: without a guarantee there is nothing to refute, and delta is the audit's own.
    delta = training.delta if privacy.delta is None else privacy.delta
    ledger = Ledger(training.folder / "sites" / str(training.client))
    return Found(
        kind=training.kind,
        client=training.client,
        canaries=training.canaries,
        records=training.records,
        seed=training.seed,
        repeat=training.repeat,
        mechanism=privacy.mechanism,
        unit=privacy.unit,
        unit_column=privacy.unit_column,
        simulation_only=privacy.simulation_only,
        claimed=claimed,
        delta=delta,
        spent=steps_of(ledger.events()) if claimed is not None else [],
        outcomes=outcomes_of(guess(scores, included)),
        assumes=privacy.assumes if in_sum(training.experiment.privacy) else "",
        membership=attack,
    )


def share_of(experiment: Experiment, task: str, client: int) -> TaskData:
    """Return a client's share of a task as it is."""
    data = load_for_clients(experiment, task)
    clients = experiment.federation.clients
    return partition(data, experiment.data.partition, clients, experiment.run.seed)[client]
