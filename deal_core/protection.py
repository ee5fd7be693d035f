"""Privacy mechanisms, and what an experiment must be for each. A mechanism is a file and a line of
:data:`MECHANISMS`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from deal_core.config.experiment import Experiment, may_take_sums
from deal_core.data.public import public_texts, texts_digest
from deal_core.data.source import named_tasks
from deal_core.errors import UserError, choose
from deal_core.lora.state import State
from deal_core.methods import Statistics, method_of, phases_of, statistics_of, sums_beside_learning
from deal_core.privacy.distributed_noise import shares_of, whom_to_trust
from deal_core.privacy.events import unit_of
from deal_core.privacy.interface import Mechanism, MechanismDefinition, nobody
from deal_core.privacy.policy import at_server, in_sum
from deal_core.privacy.record import RecordMechanism
from deal_core.privacy.unprotected import NoMechanism
from deal_core.wire.instruction import LEARN, Instruction, transcript_hash

READ_BATCHES_ALONE: Mapping[str, str] = {
    "deal": "penalties of adapters; distillation and class sums on the records of the batch",
    "deal-reference": "gates on the spectrum of adapters",
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
    "ewc": "Fisher information of earlier records goes into every update unclipped",
    "replay": "earlier texts are trained on beside the batch",
}
"""Methods whose updates tell of records that are not in the batch, and how."""


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
    if method == "deal-reference" and experiment.privacy.factors == "one":
        raise UserError(
            f"{where} trains one factor a round, method.name '{method}' needs both; set "
            'privacy.factors to "both", or choose another method'
        )
    if experiment.train.precision == "bfloat16":
        raise UserError(
            f'{where} does not go with train.precision = "bfloat16", in which the rounding of a '
            'record\'s gradient depends on other records; set it to "auto" or "float32"'
        )
    if experiment.privacy.unit_column and experiment.data.max_train:
        raise UserError(
            f"{where} with privacy.unit_column protects groups, and which records "
            "data.max_train takes depends on how many a group has; set it to 0"
        )
    noised = experiment.privacy.metrics == "noised"
    if experiment.privacy.unit_column and noised and experiment.data.max_test:
        raise UserError(
            f"{where} with privacy.unit_column protects groups, and which test records "
            "data.max_test takes depends on how many a group has; set it to 0"
        )
    if experiment.stream.schedule == "joint":  # a charge names the task that was read
        raise UserError(
            f'{where} does not go with stream.schedule = "joint": set it to "synchronous" or '
            '"per-client"'
        )
    if in_sum(experiment.privacy) and not at_server(experiment):
        raise UserError(
            'privacy.noise_share = "sum": only one sum has the whole noise; set train.step to '
            '"server"'
        )


MECHANISMS: Mapping[str, MechanismDefinition] = {
    "none": MechanismDefinition(client=NoMechanism, attacked="updates", assumes=nobody),
    "record": MechanismDefinition(
        client=RecordMechanism,
        attacked="steps",
        check=check_records_protected,
        assumes=whom_to_trust,
        needs_float32=True,
        noises_counts=True,
    ),
}
"""``privacy.mechanism`` to what it is."""


def mechanism_of(experiment: Experiment) -> MechanismDefinition:
    """Return what the mechanism is that the experiment names.

    Raises:
        UserError: unknown ``privacy.mechanism``.
    """
    return choose("privacy.mechanism", experiment.privacy.mechanism, MECHANISMS)


def make_mechanism(experiment: Experiment) -> Mechanism:
    """Return the mechanism that the experiment names.

    Raises:
        UserError: unknown ``privacy.mechanism``, or one that cannot protect the experiment.
    """
    definition = mechanism_of(experiment)
    mechanism = definition.client(experiment)
    if mechanism.unit is not None:
        check_sums_protected(experiment)
    definition.check(experiment)
    check_steps_at_server(experiment)
    return mechanism


def check_counts(experiment: Experiment) -> None:
    """Check that counts of right answers can leave as ``privacy.metrics`` says.

    Raises:
        UserError: they cannot.
    """
    definition = mechanism_of(experiment)
    if experiment.privacy.metrics == "noised" and not definition.noises_counts:
        raise UserError(
            f'privacy.metrics = "noised" is charged to a budget of records, which mechanism '
            f"'{experiment.privacy.mechanism}' has not; set privacy.mechanism to \"record\", or "
            'privacy.metrics to "clear"'
        )


def check_sums_protected(experiment: Experiment) -> None:
    """Check that the method takes no sums over single records that leave without noise.

    Raises:
        UserError: it does; or its sums are planned for more rounds than they are given in.
    """
    method = method_of(experiment)
    hidden = experiment.privacy.mechanism == "record" and sums_beside_learning(method)
    if statistics_of(method) is None or hidden:
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
    wrong = [f'train.step = "server": {cure}' for bad, cure in _step_conditions(experiment) if bad]
    if wrong:
        raise UserError(*wrong)


def _step_conditions(experiment: Experiment) -> list[tuple[bool, str]]:
    """Whether something is wrong, and what to do about it."""
    method, federation = experiment.method, experiment.federation
    sums = sums_in_place_of_steps(experiment) is not None
    return [
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
            not sums and (method.name not in {"deal", "sequential"} or method.update.enabled),
            "the server takes the steps, and has no penalty; set method.name to deal or "
            "sequential, and method.update.enabled to false; or method.name to prototype",
        ),
    ]


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
