"""The gate of a client: may this be asked of it? Every request passes here before data are read.

A request is judged by what it says, the experiment, the site's policy and its installation; never
by a record. What the ledger can still pay is the mechanism's to say, before it trains.

| code | a request is answered with it where | by |
|---|---|---|
| ``version`` | another federated-deal runs at the server | :func:`require_same_package` |
| ``policy`` | the site's policy is against the experiment | :func:`require_policy` |
| ``policy`` | class sums would tell records | :func:`require_sums` |
| ``policy`` | a larger adapter is asked for than the policy allows | :func:`check_training` |
| ``refused`` | it names what is not of the run | :func:`check_tasks`, :func:`check_training` |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from deal_core.config.experiment import Experiment
from deal_core.config.run_config import PACKAGE
from deal_core.errors import UserError
from deal_core.installed import package_digest
from deal_core.lora.payload import PayloadError
from deal_core.privacy.policy import (
    Policy,
    Refusal,
    figures_allowed,
    protects,
    require_adapter,
    require_comparable,
    require_mechanism,
    require_secure,
    require_shares,
)

if TYPE_CHECKING:  # a process that answers for keys and masks loads no model
    from client.client_context import ClientContext
    from client.resources import Workbench
    from deal_core.methods import Statistics
    from deal_core.privacy.interface import LocalUpdate, Site
    from deal_core.wire.instruction import Instruction

LEAST_NOISE = 0.61
"""Of a class sum that leaves a site under no mechanism: ``method.prototype.noise_multiplier``."""


def require_same_package(run_config: Mapping[str, Any]) -> None:
    """Check that the run is of the federated-deal that is installed here.

    Raises:
        Refusal: it is of another.
    """
    theirs, ours = str(run_config.get(PACKAGE, ""))[:64], package_digest()
    if theirs != ours:
        raise Refusal(
            "version",
            f"the server runs federated-deal {theirs[:12] or 'without a digest'}, and this site "
            f"{ours[:12]}; install the same release at both",
        )


def require_policy(config: Experiment, policy: Policy | None) -> None:
    """Check that the site trains under the experiment's mechanism, such adapters and such noise,
    and sends its updates in such a way; into sums of what can be compared alone.

    Raises:
        Refusal: it does not.
    """
    try:
        require_mechanism(config.privacy.mechanism, policy)
        require_adapter(config.adapter, policy)
        require_secure(config.aggregation.secure, policy)
        require_shares(config.privacy, policy)
        require_comparable(config, policy)
    except UserError as error:
        raise Refusal("policy", str(error)) from None


def require_allowed(
    bench: Workbench, client_context: ClientContext, instruction: Instruction
) -> None:
    """Check that the site's policy allows such an update.

    Raises:
        Refusal: it does not.
        PayloadError: what is asked is not part of the experiment.
    """
    site = client_context.site
    require_policy(bench.experiment, site.policy)
    statistics = bench.phase(instruction.phase).statistics
    if statistics is not None:
        require_sums(bench.experiment, statistics, site)
    check_training(instruction, bench, site.policy)


def as_allowed(update: LocalUpdate, policy: Policy | None, masked: bool) -> LocalUpdate:
    """Return an update that was charged before with those of its figures that may leave today."""
    return replace(update, figures=figures_allowed(update.figures, policy, masked))


def check_tasks(instruction: Instruction, bench: Workbench) -> None:
    """Check the tasks that a request names.

    Raises:
        PayloadError: one is not of the run.
    """
    known = frozenset(bench.tasks)
    named = (
        *instruction.tasks,
        *instruction.seen,
        *instruction.future,
        *instruction.past,
        *instruction.piggybacked_evaluation,
        *instruction.learnt,
    )
    own = (instruction.task,) if instruction.task else ()
    for task in (*own, *named):
        if task not in known:
            raise PayloadError("instruction: a task that is not of this run")


def check_training(instruction: Instruction, bench: Workbench, policy: Policy | None) -> None:
    """Check what a training request asks for.

    Raises:
        PayloadError: a task that is not of the run; several to be learnt at once where the
            experiment learns them one by one, or has a mechanism.
        Refusal: a larger rank than the site's policy allows.
    """
    check_tasks(instruction, bench)
    if policy is not None and instruction.rank > policy.max_rank:
        raise Refusal("policy", "instruction: a larger rank than the site's policy allows")
    if not instruction.tasks:
        return
    schedule, phase = bench.experiment.stream.schedule, bench.phase(instruction.phase)
    several = schedule == "joint" or (schedule == "per-client" and phase.statistics is not None)
    if not several:
        raise PayloadError("instruction: tasks are learnt one by one in this run")
    if bench.experiment.privacy.mechanism != "none":
        raise PayloadError("instruction: under a mechanism tasks are learnt one by one")
    if phase.statistics is not None:
        if instruction.task not in instruction.tasks:
            raise PayloadError("instruction: not a task of those that are added up")
    elif set(instruction.tasks) != set(bench.tasks) or instruction.task != instruction.tasks[0]:
        raise PayloadError("instruction: not the tasks of this run")


def require_sums(config: Experiment, statistics: Statistics, site: Site) -> None:
    """Check that sums over records may leave: with a mechanism's noise, or, where the site lets
    them go without, in few public directions and with as much noise as hides a record. A mask alone
    is not enough: of a label that one site alone has, a sum over sites is that site's.

    Raises:
        Refusal: the sums are exact, or have less noise, or the site's policy keeps them.
    """
    if site.simulated:
        return
    if statistics.exact is not None:
        raise Refusal("policy", "exact sums tell who is in them; they are for simulations")
    if protects(config.privacy, site.policy):
        return
    if site.policy is not None and not site.policy.share_sums:
        raise Refusal("policy", "the site's policy keeps class sums (policy.share_sums)")
    if statistics.noise_multiplier < LEAST_NOISE:
        raise Refusal(
            "policy", f"class sums leave with a noise multiplier of {LEAST_NOISE} or more"
        )
