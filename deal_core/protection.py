"""What an experiment asks of :mod:`deal_core.privacy`: its mechanism with plain values, and what it
must be for it; and what all sites of a secure sum are told alike."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from functools import partial

from deal_core.config.experiment import Experiment, at_server, may_take_sums
from deal_core.config.file import run_name
from deal_core.data import public_texts, texts_digest
from deal_core.data.source import named_tasks
from deal_core.deal.interface import Statistics, phases_of, statistics_of, sums_beside_learning
from deal_core.errors import UserError, choose
from deal_core.lora.state import State
from deal_core.methods import method_of
from deal_core.privacy.accountant import DpEvent
from deal_core.privacy.distributed_noise import shares_without_mechanism
from deal_core.privacy.events import unit_of
from deal_core.privacy.interface import Mechanism
from deal_core.privacy.plan import ReleaseSchedule, RunSchedule, noise_of_steps
from deal_core.privacy.policy import in_sum
from deal_core.privacy.record import NoMechanism, RecordMechanism
from deal_core.wire.instruction import LEARN, Instruction, transcript_hash

SUMS_SHARE = 0.5
"""Of the target epsilon that class sums beside learning may cost, taken by themselves."""

NOMINAL_DELTA = 1e-5
"""Where an experiment names no delta; it decides how much noise there is, not what it costs."""

ROOM = 1e-3
"""Share of the target that is left for the slack of noise in a sum."""

READ_BATCHES_ALONE: Mapping[str, str] = {
    "deal": "penalties of adapters; distillation and class sums on the records of the batch",
    "linear-probe": "sums over records, which are checked by themselves",
    "lwf": "distillation on the records of the batch",
    "olora": "a penalty on factors",
    "prototype": "sums over records, which are checked by themselves",
    "sequential": "cross-entropy alone",
    "slao": "merges adapters",
}
"""Methods of whose updates nothing tells of a record but its clipped gradient, or its part of a
noised sum; and of what the rest is made. A penalty is added after the noise: it must read no
record. One that is not named here runs under no such mechanism."""
UNPROTECTED: Mapping[str, str] = {
    "deal-reference": "it trains both factors in every round, and a mechanism lets one learn",
    "ewc": "Fisher information of earlier records goes into every update unclipped",
    "replay": "earlier texts are trained on beside the batch",
}
"""Methods that go with no mechanism, and why."""


def check_records_protected(experiment: Experiment) -> None:
    """Check that nothing but the records of a batch reaches an update.

    Raises:
        UserError: the experiment has a part that reads others.
    """
    where, method = f'privacy.mechanism = "{experiment.privacy.mechanism}"', experiment.method.name
    if method not in READ_BATCHES_ALONE:
        unknown = "nothing says that its penalty reads no record (READ_BATCHES_ALONE)"
        raise UserError(
            f"{where} does not go with method.name '{method}': {UNPROTECTED.get(method, unknown)}; "
            "use deal, lwf, olora, sequential or slao"
        )
    if experiment.privacy.unit_column and experiment.data.max_train:
        raise UserError(
            f"{where} with privacy.unit_column protects groups, and which records "
            "data.max_train takes depends on how many a group has; set it to 0"
        )
    if experiment.stream.at_once:  # a charge names the task that was read
        raise UserError(
            f'{where} does not go with stream.schedule = "{experiment.stream.schedule}": set it to '
            '"synchronous" or "per-client"'
        )
    if in_sum(experiment.privacy) and not at_server(experiment):
        raise UserError(
            'privacy.noise_share = "sum": only one sum has the whole noise; set train.step to '
            '"server"'
        )


def _none(experiment: Experiment) -> Mechanism:
    return NoMechanism(
        privacy=experiment.privacy,
        run=run_name(experiment),
        seed=experiment.run.seed,
        at_server=at_server(experiment),
    )


def _record(experiment: Experiment) -> Mechanism:
    return RecordMechanism(
        privacy=experiment.privacy,
        run=run_name(experiment),
        seed=experiment.run.seed,
        batch_size=experiment.train.batch_size,
        at_server=at_server(experiment),
        shares=shares_of(experiment),
        schedule=partial(run_schedule, experiment),
    )


MECHANISMS: Mapping[str, Callable[[Experiment], Mechanism]] = {"none": _none, "record": _record}
"""``privacy.mechanism`` to what it is."""


def make_mechanism(experiment: Experiment) -> Mechanism:
    """Return the mechanism that the experiment names.

    Raises:
        UserError: unknown ``privacy.mechanism``, or one that cannot protect the experiment.
    """
    mechanism = choose("privacy.mechanism", experiment.privacy.mechanism, MECHANISMS)(experiment)
    if mechanism.unit is not None:
        check_sums_protected(experiment)
        check_records_protected(experiment)
    check_steps_at_server(experiment)
    return mechanism


def check_sums_protected(experiment: Experiment) -> None:
    """Check that the method takes no sums over single records that leave without noise.

    Raises:
        UserError: it does; or its sums are over several tasks, or are planned for more rounds than
            they are given in.
    """
    method = method_of(experiment)
    if statistics_of(method) is None:
        return
    if experiment.privacy.mechanism == "record" and sums_beside_learning(method):
        if experiment.stream.schedule != "synchronous":
            raise UserError(
                'privacy.mechanism = "record" charges class sums of one task at a time; set '
                'stream.schedule to "synchronous", or method.prototype.enabled to "off"'
            )
        return
    noised = sums_in_place_of_steps(experiment)
    if noised is None or experiment.privacy.mechanism != "record":
        raise UserError(
            f'privacy.mechanism = "{experiment.privacy.mechanism}" does not go with method.name '
            f"'{experiment.method.name}': its sums of embeddings leave without noise; use deal, "
            "lwf, olora, sequential or slao; or prototype with noise in a secure sum "
            '(train.step = "server")'
        )
    if experiment.federation.rounds != 1:
        raise UserError(
            "class sums with noise are given once in a task, and every round is charged; set "
            "federation.rounds to 1"
        )


def sums_in_place_of_steps(experiment: Experiment) -> Statistics | None:
    """Return what clients add up in the place of learning, with noise where a mechanism wants it;
    None: they train, or the method has no use for sums with noise."""
    learn = phases_of(method_of(experiment))[LEARN].statistics
    usable = learn is not None and learn.exact is None
    return learn if usable and at_server(experiment) else None


def check_steps_at_server(experiment: Experiment) -> None:
    """Check that every site takes part in every round with one gradient sum.

    Raises:
        UserError: it does not, or something else of a site would be seen.
    """
    if not at_server(experiment):
        return
    shares_of(experiment)
    method, federation = experiment.method, experiment.federation
    sums = sums_in_place_of_steps(experiment) is not None
    cures = [
        (
            not experiment.aggregation.secure,
            "gradients are added up before anybody sees them; set aggregation.secure to true",
        ),
        (
            experiment.privacy.mechanism == "record" and not experiment.privacy.target_delta,
            "all sites need one delta; set privacy.target_delta",
        ),
        (
            not sums and experiment.adapter.kind == "lora" and experiment.aggregation.rule != "ffa",
            "steps are taken on one factor that keeps its coordinates; set aggregation.rule to "
            "ffa, or adapter.kind to pooled",
        ),
        (
            bool(federation.clients_per_round or federation.participants),
            "every site's share is counted on; leave out federation.clients_per_round and "
            "participants",
        ),
        (
            experiment.stream.schedule != "synchronous",
            'all sites work on one task; set stream.schedule to "synchronous"',
        ),
        (
            any(experiment.stream.joins.values()),
            "every site's share is counted on from the start; leave out stream.joins",
        ),
        (
            not sums
            and (
                method.name not in {"deal", "sequential"}
                or method.update.lambda1 > 0
                or method.update.lambda2 > 0
            ),
            "the server takes the steps, and has no penalty; set method.name to deal or "
            "sequential, and method.update.lambda1 and lambda2 to 0; or method.name to prototype",
        ),
    ]
    wrong = [f'train.step = "server": {cure}' for bad, cure in cures if bad]
    if wrong:
        raise UserError(*wrong)


def run_schedule(experiment: Experiment, records: Mapping[str, int]) -> RunSchedule:
    """Return what a run asks of a client with so many records, or groups, of each task of the
    stream, at most. One that is not sampled, or has fewer tasks, will spend less.

    Raises:
        UserError: all sites need one delta, and there is none.
        NoFeasibleNoise: no multiplier that is of use fits.
    """
    stream, federation, work = experiment.stream, experiment.federation, list[ReleaseSchedule]()
    in_server, told, tasks = at_server(experiment), experiment.privacy.sample_rate, len(records)
    sums = sum(phase.rounds for phase in method_of(experiment).phases if phase.name != LEARN)
    mean = sum(records.values()) / max(1, tasks)
    for task, number in records.items():
        # A task without records is sampled like an average one: that there are none must not show.
        rate = min(1.0, experiment.train.batch_size / max(number or mean, 1))
        if told or in_server:  # all sites have one
            rate = told or 1.0
        # A record is seen ``local_epochs`` times on average, at least.
        steps = 1 if in_server else federation.local_epochs * math.ceil(1 / rate - 1e-9)
        rounds = federation.rounds * stream.times(task)
        work.append(
            ReleaseSchedule(
                task=task, records=number, rounds=rounds, sample_rate=rate, steps=steps, sums=sums
            )
        )
    return RunSchedule(
        work=tuple(work),
        sums_noise=sums_noise_multiplier(experiment, tasks),
        common_noise=common_noise_multiplier(experiment, tasks) if in_server else 0.0,
    )


def common_noise_multiplier(experiment: Experiment, tasks: int) -> float:
    """Return the multiplier of every round of a run of so many tasks, of the sum over all sites.

    What rounding and the shape of the noise cost beside it (the slack of an event) is not in it;
    the budget is met without it to 1e-3.

    Raises:
        UserError: no target delta, which sites could each choose otherwise.
        NoFeasibleNoise: no multiplier that is of use fits.
    """
    privacy = experiment.privacy
    if not privacy.target_delta:
        raise UserError(
            'privacy.noise_share = "sum" needs one delta for all sites; set privacy.target_delta'
        )
    times = 1 if privacy.disjoint_tasks else tasks
    sums_noise = sums_noise_multiplier(experiment, tasks)
    beside = [DpEvent(1.0, sums_noise, times)] if sums_noise else []
    return noise_of_steps(
        privacy.sample_rate or 1.0,
        experiment.federation.rounds * times,
        privacy.target_epsilon * (1 - ROOM),
        privacy.target_delta,
        tuple(beside),
    )


def sums_noise_multiplier(experiment: Experiment, tasks: int) -> float:
    """Return the multiplier of class sums that are taken beside learning, in a run of so many
    tasks: it follows from the experiment alone. 0: there are none.

    Raises:
        NoFeasibleNoise: no multiplier that is of use fits.
    """
    privacy = experiment.privacy
    if not sums_beside_learning(method_of(experiment)):
        return 0.0
    sums = 1 if privacy.disjoint_tasks else tasks
    budget = SUMS_SHARE * privacy.target_epsilon
    return noise_of_steps(1.0, sums, budget, privacy.target_delta or NOMINAL_DELTA)


def shares_of(experiment: Experiment) -> int:
    """Return of how many sites the noise must suffice: of all but those that may collude or fail;
    of one where each adds the whole.

    Raises:
        UserError: of none.
    """
    clients, privacy = experiment.federation.clients, experiment.privacy
    if not in_sum(privacy):
        return 1
    shares = clients - privacy.colluding - privacy.dropouts
    if shares < 1:
        raise UserError(
            f"privacy.colluding = {privacy.colluding} and privacy.dropouts = {privacy.dropouts} "
            f"leave nobody's noise among {clients} clients; lower them, or let more take part"
        )
    return shares


def sum_deviation(experiment: Experiment, tasks: int) -> float:
    """Return the standard deviation of the noise of all sites together, in each entry of a sum and
    in clipping bounds, in a run of so many tasks; 0 without a mechanism."""
    if experiment.privacy.mechanism == "none":
        return 0.0
    added = math.sqrt(experiment.federation.clients / shares_of(experiment))
    return common_noise_multiplier(experiment, tasks) * added


def class_sum_noise(
    experiment: Experiment, statistics: Statistics, members: int, tasks: int
) -> tuple[float, int]:
    """Return the noise multiplier of a class sum, and of how many sites it is counted on.

    Args:
        experiment: its mechanism decides; without one ``statistics`` does.
        statistics: what is added up.
        members: sites that are asked for their part of the sum.
        tasks: of the run.
    """
    if experiment.privacy.mechanism == "none":
        shares = shares_without_mechanism(members, experiment.privacy.colluding)
        return statistics.noise_multiplier, shares
    beside = sums_noise_multiplier(experiment, tasks)
    return beside or common_noise_multiplier(experiment, tasks), shares_of(experiment)


OF_ONE_SITE = frozenset({"data", "run", "description"})
"""Of an experiment what is each site's own (files and columns, folders and threads), or changes
nothing."""
OWN_ORDERS = "per-client"


def sum_terms(experiment: Experiment, model: str, instruction: Instruction, state: State) -> str:
    """Return a digest, hexadecimal, of all that what a site adds to a sum follows from, but its
    data.

    It is part of a layout, so sites that were told otherwise are in no sum together: else a server
    could tell all sites but one to add hardly any noise, or to learn nothing.

    Args:
        experiment: its settings; where a column, a model or public texts lie at a site is not among
            them.
        model: name of the base model, as the experiment was asked with.
        instruction: what is asked.
        state: what the request brings.
    """
    told = experiment.model_dump(mode="json", exclude=set(OF_ONE_SITE))
    told["privacy"]["unit_column"] = unit_of(experiment.privacy)
    told["model"]["name"] = model
    told["tasks"] = tasks = list(experiment.data.tasks or named_tasks(experiment.data))
    for name in ("instructions", "measures"):  # of the data's table the server's word alone
        of_tasks = getattr(experiment.data, name)
        told[name] = {task: of_tasks[task] for task in tasks if task in of_tasks}
    if may_take_sums(experiment):
        told["public_texts"] = texts_digest(public_texts(experiment.data, ()))
    told["request"] = transcript_hash(instruction, state, experiment.stream.schedule == OWN_ORDERS)
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
