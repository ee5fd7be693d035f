"""The gate of a client: may this be asked of a site?

:data:`REFUSALS` has every reason to say no to an experiment or a request in one table: the code
that leaves, the reason for the site's log, and the test. They are judged before data are read. What
follows from what a site has given before is said where that is kept: the ledger refuses what it
cannot pay (``budget-spent``), a store class sums in a second form (``policy``), and the protocol of
secure sums a step out of its order (``protocol``, ``unpinned``, ``masked``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from client.site_file import SiteData, SiteFile, site_files
from deal_core.config.data import DataConfig
from deal_core.config.experiment import Experiment, ModelConfig
from deal_core.config.method import OWN_MEMORY
from deal_core.config.run_config import PACKAGE
from deal_core.data.source import named_tasks
from deal_core.installed import package_digest
from deal_core.lora.payload import PayloadError
from deal_core.privacy.policy import OutsidePolicy, Policy, Refusal, in_sum, protects

if TYPE_CHECKING:  # a process that answers for keys and masks loads no model
    from client.runtime import ClientRuntime
    from deal_core.methods import Statistics
    from deal_core.privacy.interface import Site
    from deal_core.wire.instruction import Instruction

LEAST_NOISE = 0.61
"""Of a class sum that leaves a site under no mechanism: ``method.prototype.noise_multiplier``."""
NO_LIMITS = Policy(max_rank=2**31, share_sums=True, noise_share="sum", colluding=0, min_records=1)
"""Of a client without a policy."""


@dataclass(frozen=True)
class Authorization:
    """Leave to answer one request, granted before data are read.

    Attributes:
        request: what is asked.
        site: who answers: its policy, and the ledger that what leaves is charged to.
    """

    request: Instruction
    site: Site


@dataclass(frozen=True)
class Asked:
    """What is judged.

    Attributes:
        experiment: of the run.
        policy: of the site; None: it has none.
        data, models: of ``site.toml``.
        package: digest of the federated-deal at the server.
        simulated: whether the client is.
        request: of the server.
        tasks: of the run.
        statistics: what is added up in the request's phase; None: something is learnt.
        fewest: test records of the task that has fewest of them.
    """

    experiment: Experiment
    policy: Policy | None = None
    data: SiteData = field(default_factory=lambda: SiteData(path=""))
    models: Mapping[str, str] = field(default_factory=dict)
    package: str = ""
    simulated: bool = False
    request: Any = None
    tasks: tuple[str, ...] = ()
    statistics: Statistics | None = None
    fewest: int = 0

    @property
    def limits(self) -> Policy:
        """The site's policy, or none."""
        return self.policy or NO_LIMITS

    @property
    def comparable(self) -> bool:
        """Whether a sum hides a site only if all sites are told alike: no noise protects it."""
        protected = protects(self.experiment.privacy, self.policy)
        return self.experiment.aggregation.secure and not protected

    @property
    def open_sums(self) -> Statistics | None:
        """Class sums that would leave a real site without a mechanism's noise."""
        protected = protects(self.experiment.privacy, self.policy)
        return None if self.simulated or protected else self.statistics

    def task_where(self, test: Callable[[DataConfig, SiteData, str], Any]) -> set[str]:
        """Return the first task of the experiment to which something applies; empty: none."""
        config = self.experiment.data
        tasks = config.tasks or named_tasks(config)
        return set(next(((task,) for task in tasks if test(config, self.data, task)), ()))


class Rule(NamedTuple):
    """One reason to say no.

    Attributes:
        code: that leaves.
        reason: for the site's log; ``{found}`` is what the test returns.
        test: something, where the rule applies.
    """

    code: str
    reason: str
    test: Callable[[Asked], Any]


def _other_package(asked: Asked) -> str:
    theirs, ours = asked.package, package_digest()
    shown = f"{theirs[:12] or 'without a digest'}, and this site {ours[:12]}"
    return "" if theirs == ours else shown


def _other_instruction(config: DataConfig, own: SiteData, task: str) -> bool:
    words = config.instructions.get(task, "")
    return own.instructions.get(task, words) != words


def _too_large_rank(asked: Asked) -> int:
    adapter = asked.experiment.adapter
    largest = max((adapter.rank, *adapter.client_ranks))
    return largest if largest > asked.limits.max_rank else 0


def _foreign_module(asked: Asked) -> str:
    if asked.policy is None:
        return ""
    named = set(asked.experiment.adapter.target_modules)
    return min(named - set(asked.policy.target_modules), default="")


def _unknown_task(asked: Asked) -> bool:
    request: Instruction = asked.request
    named = (
        *((request.task,) if request.task else ()),
        *request.tasks,
        *request.seen,
        *request.future,
        *request.past,
        *request.piggybacked_evaluation,
        *request.learnt,
    )
    return not set(named) <= set(asked.tasks)


def _one_by_one(asked: Asked) -> bool:
    schedule, sums = asked.experiment.stream.schedule, asked.statistics is not None
    return not schedule.startswith("joint") and not (schedule == "per-client" and sums)


def _other_tasks(asked: Asked) -> bool:
    named = asked.request.tasks
    return set(named) != set(asked.tasks) or asked.request.task != named[0]


REFUSALS: Mapping[str, tuple[Rule, ...]] = {
    "package": (
        Rule(
            "version",
            "the server runs federated-deal {found}; install the same release at both",
            _other_package,
        ),
    ),
    "unit": (
        Rule(
            "policy",
            "the experiment protects groups of records (privacy.unit_column), and the site's "
            "policy names no column that makes them; set policy.unit_column in site.toml, or take "
            "no part",
            lambda a: a.experiment.privacy.unit_column and not a.limits.unit_column,
        ),
        Rule(
            "policy",
            "the experiment protects single records, and the site's policy demands groups of "
            "'{found}'; set privacy.unit_column in the experiment",
            lambda a: "" if a.experiment.privacy.unit_column else a.limits.unit_column,
        ),
    ),
    "model": (
        Rule(
            "policy",
            "[models] of site.toml does not name '{found}'; add it to accept it",
            lambda a: {a.experiment.model.name} - a.models.keys(),
        ),
    ),
    "data": (
        Rule(
            "policy",
            "task '{found:.80}' is not in [data.labels] of site.toml; if the consortium has agreed "
            "on it, add the lines that deal site check --experiment FILE prints",
            lambda a: a.task_where(lambda asked, own, task: task not in own.labels),
        ),
        Rule(
            "policy",
            "task '{found:.80}' has other labels than in [data.labels] of site.toml; if the "
            "consortium has agreed on it, add the lines that deal site check --experiment FILE "
            "prints",
            lambda a: a.task_where(
                lambda asked, own, task: (
                    asked.labels.get(task, own.labels[task]) != own.labels[task]
                )
            ),
        ),
        Rule(
            "policy",
            "task '{found:.80}': its answers are texts by [data.labels] of site.toml and labels by "
            "data.generation of the experiment, or the reverse",
            lambda a: a.task_where(
                lambda asked, own, task: (task in asked.generation) != (not own.labels[task])
            ),
        ),
        Rule(
            "policy",
            "task '{found:.80}' has another instruction than in [data.instructions] of site.toml",
            lambda a: a.task_where(_other_instruction),
        ),
        Rule(
            "policy",
            "the experiment needs public texts; set data.public_path in site.toml",
            lambda a: a.experiment.data.public_path and not a.data.public_path,
        ),
    ),
    "policy": (
        Rule(
            "policy",
            "privacy.mechanism is '{experiment.privacy.mechanism}', but the site's policy demands "
            "'{found}'; change the experiment, or the policy",
            lambda a: {a.limits.demanded} - {"", a.experiment.privacy.mechanism},
        ),
        Rule(
            "policy",
            "adapter.rank is {found}, but the site's policy allows "
            "{limits.max_rank}; lower it, or raise policy.max_rank",
            _too_large_rank,
        ),
        Rule(
            "policy",
            "adapter.target_modules names '{found}', which is not in policy.target_modules of "
            "site.toml; add it there to accept it",
            _foreign_module,
        ),
        Rule(
            "policy",
            "privacy.noise_share is 'sum', but the site's policy wants all noise from the site; "
            'set policy.noise_share to "sum" to accept it',
            lambda a: in_sum(a.experiment.privacy) and a.limits.noise_share != "sum",
        ),
        Rule(
            "policy",
            "privacy.colluding is {experiment.privacy.colluding}, but the site's policy wants "
            "noise that suffices against {limits.colluding} other sites and the server together; "
            "raise it",
            lambda a: (
                in_sum(a.experiment.privacy) and a.experiment.privacy.colluding < a.limits.colluding
            ),
        ),
    ),
    "sum": (
        Rule(
            "policy",
            "aggregation.secure: what a client of method.name '{experiment.method.name}' learns "
            "also follows from what it keeps of earlier tasks or rounds, which no other can "
            "compare; take another method, or let privacy.mechanism protect it",
            lambda a: a.comparable and a.experiment.method.name in OWN_MEMORY,
        ),
        Rule(
            "policy",
            "aggregation.secure: clients that work on different tasks, or give sums of several, "
            'are not told alike, so a sum might be of one; set stream.schedule to "synchronous", '
            "or let privacy.mechanism protect it",
            lambda a: a.comparable and a.experiment.stream.schedule != "synchronous",
        ),
    ),
    "masks": (
        Rule(
            "policy",
            "the site's policy demands secure aggregation; set aggregation.secure to true in the "
            "experiment",
            lambda a: (
                a.limits.secure_aggregation == "required" and not a.experiment.aggregation.secure
            ),
        ),
    ),
    "names": (Rule("refused", "instruction: a task that is not of this run", _unknown_task),),
    "rank": (
        Rule(
            "policy",
            "instruction: a larger rank than the site's policy allows",
            lambda a: a.request.rank > a.limits.max_rank,
        ),
    ),
    "several tasks": (
        Rule("refused", "instruction: tasks are learnt one by one in this run", _one_by_one),
        Rule(
            "refused",
            "instruction: under a mechanism tasks are learnt one by one",
            lambda a: a.experiment.privacy.mechanism != "none",
        ),
        Rule(
            "refused",
            "instruction: not a task of those that are added up",
            lambda a: a.statistics is not None and a.request.task not in a.request.tasks,
        ),
        Rule(
            "refused",
            "instruction: not the tasks of this run",
            lambda a: a.statistics is None and _other_tasks(a),
        ),
    ),
    "class sums": (
        Rule(
            "policy",
            "exact sums tell who is in them; they are for simulations",
            lambda a: not a.simulated and a.statistics is not None and a.statistics.exact,
        ),
        Rule(
            "policy",
            "the site's policy keeps class sums (policy.share_sums)",
            lambda a: a.open_sums and not a.limits.share_sums,
        ),
        Rule(  # a mask is not enough: of a label that one site alone has, a sum is that site's
            "policy",
            f"class sums leave with a noise multiplier of {LEAST_NOISE} or more",
            lambda a: a.open_sums and a.open_sums.noise_multiplier < LEAST_NOISE,
        ),
    ),
    "verdict": (
        Rule(
            "withheld",
            "what this site thinks of class means stays here",
            lambda a: a.experiment.privacy.mechanism != "none" or not a.limits.share_sums,
        ),
    ),
    "counts in a sum": (
        Rule(
            "no-data",
            "fewer than {limits.min_records} test records of a task",
            lambda a: a.policy is not None and a.fewest < a.policy.min_records,
        ),
    ),
}
"""What is judged to the reasons against it."""


def require(asked: Asked, *judged: str) -> None:
    """Check that nothing speaks against something.

    Args:
        asked: all that is known of it.
        judged: parts of :data:`REFUSALS`.

    Raises:
        OutsidePolicy: the first reason against it, of code ``policy``.
        PayloadError: of code ``refused``.
        Refusal: of another code.
    """
    for rule in (rule for part in judged for rule in REFUSALS[part]):
        found = rule.test(asked)
        if not found:
            continue
        shown = ", ".join(found) if isinstance(found, set) else found
        reason = rule.reason.format(found=shown, experiment=asked.experiment, limits=asked.limits)
        if rule.code == "policy":
            raise OutsidePolicy(reason)
        raise PayloadError(reason) if rule.code == "refused" else Refusal(rule.code, reason)


def authorize(request: Instruction, runtime: ClientRuntime, site: Site) -> Authorization:
    """Return leave to answer a request for an update.

    Args:
        request: of the server.
        runtime: of its experiment.
        site: that is asked.

    Raises:
        OutsidePolicy: the site's policy does not allow the experiment, or this request.
        PayloadError: what is asked is not part of the experiment.
    """
    asked = _of(request, runtime, site)
    sums = [] if asked.statistics is None else ["class sums"]
    several = ["several tasks"] if request.tasks else []
    require(asked, *EXPERIMENT, *sums, "names", "rank", *several)
    return Authorization(request, site)


def authorize_evaluation(
    request: Instruction, runtime: ClientRuntime, site: Site, *judged: str
) -> Authorization:
    """Return leave to answer a request for counts, which go as the mechanism lets them, or for a
    verdict.

    Args:
        request: of the server.
        runtime: of its experiment.
        site: that is asked.
        judged: further parts of :data:`REFUSALS`.

    Raises:
        PayloadError: a task that is not of the run.
        Refusal: the site keeps its verdict.
    """
    require(_of(request, runtime, site), "names", *judged)
    return Authorization(request, site)


EXPERIMENT = ("policy", "sum", "masks")
"""What is judged of an experiment at every step of it."""


def _of(request: Instruction, runtime: ClientRuntime, site: Site) -> Asked:
    return Asked(
        runtime.experiment,
        site.policy,
        simulated=site.simulated,
        request=request,
        tasks=runtime.tasks,
        statistics=runtime.phase(request.phase).statistics,
    )


def require_policy(experiment: Experiment, policy: Policy | None) -> None:
    """Check that the site trains under the experiment's mechanism, such adapters and such noise,
    and sends its updates in such a way; into sums of what can be compared alone.

    Raises:
        OutsidePolicy: it does not.
    """
    require(Asked(experiment, policy), *EXPERIMENT)


def require_same_package(run_config: Mapping[str, Any]) -> None:
    """Check that the run is of the federated-deal that is installed here.

    Raises:
        Refusal: it is of another.
    """
    theirs = str(run_config.get(PACKAGE, ""))[:64]
    require(Asked(Experiment(), package=theirs), "package")


def as_the_site_decides(experiment: Experiment, site: SiteFile) -> Experiment:
    """Return the experiment with everything that is the site's to say taken from ``site``.

    Raises:
        OutsidePolicy: the experiment needs a base model, or public texts, that the site has not
            agreed to; names a task, or labels, that it has not declared; or has another unit of
            privacy than the site's.
    """
    unit = agreed_unit(experiment, site.policy)
    threads = site.compute.threads or experiment.run.threads
    return experiment.model_copy(
        update={
            "data": own_data(experiment, site.data),
            "model": agreed_model(experiment, site),
            "privacy": experiment.privacy.model_copy(update={"unit_column": unit}),
            "run": experiment.run.model_copy(update={"threads": threads}),
        }
    )


def agreed_unit(experiment: Experiment, policy: Policy | None) -> str:
    """Return the column that makes the groups which the site protects, by its own name; empty:
    single records.

    Raises:
        OutsidePolicy: the experiment is about groups and the site about records, or the reverse.
    """
    require(Asked(experiment, policy), "unit")
    return policy.unit_column if policy is not None else ""


def agreed_model(experiment: Experiment, site: SiteFile) -> ModelConfig:
    """Return the base model, where it lies at the site.

    Raises:
        OutsidePolicy: the site has not agreed to it.
    """
    require(Asked(experiment, models=site.models), "model")
    model = experiment.model
    return model.model_copy(update={"name": site.models[model.name] or model.name})


def own_data(experiment: Experiment, site: SiteData) -> DataConfig:
    """Return the site's files, tasks and labels; of what was asked only which of the tasks are in
    the run is left.

    Raises:
        OutsidePolicy: a task that the site has not declared, or with other labels, another kind of
            answer, or another instruction; or public texts that it has not.
    """
    require(Asked(experiment, data=site), "data")
    asked = experiment.data
    tasks = asked.tasks or named_tasks(asked)
    return site_files(site).model_copy(
        update={
            "tasks": tasks,
            "instructions": {t: asked.instructions[t] for t in tasks if t in asked.instructions},
            "measures": asked.measures,
            "public_path": site.public_path if asked.public_path else "",
        }
    )
