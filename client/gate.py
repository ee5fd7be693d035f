"""The gate of a client: may this be asked of a site?

:data:`REFUSALS` has every reason to say no to an experiment or a request in one table: the reason
for the site's log, the test, and the code that leaves. What needs no data is judged before they are
read; what follows from a number of records, or from what the site has given before, when it is
known. The ledger is asked, and stays the last line of defence: what it cannot pay is not charged,
whoever asks. Only the protocol of secure sums says itself that a step is out of its order, or that
a sum has too few sites (``protocol``, ``unpinned``, ``masked``); a reader, that a message is none
(:class:`~deal_core.lora.payload.PayloadError`: ``refused``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from client.site_file import NAME
from deal_core.config.data import ENTITY_F1
from deal_core.config.experiment import OWN_MEMORY
from deal_core.config.file import leaves
from deal_core.data.source import named_tasks
from deal_core.errors import UserError
from deal_core.installed import package_digest
from deal_core.privacy.policy import (
    BudgetSpent,
    OutsidePlan,
    Policy,
    counts_leave,
    in_sum,
    protects,
)

if TYPE_CHECKING:  # a process that answers for keys and masks loads no model
    from client.site_file import SiteData, SiteFile
    from deal_core.config.data import DataConfig
    from deal_core.config.experiment import Experiment
    from deal_core.deal.interface import Statistics
    from deal_core.privacy.interface import Mechanism
    from deal_core.wire.instruction import Instruction

T = TypeVar("T")
LEAST_NOISE = 0.61
"""Of a class sum that leaves a site under no mechanism: ``method.prototype.noise_multiplier``."""
NO_LIMITS = Policy(max_rank=2**31, share_sums=True, noise_share="sum", colluding=0, min_records=1)
"""Of a client without a policy."""


class Refusal(UserError):
    """A client says no, by its own rules. Its ``code``, a fixed word, leaves; the reason stays in
    the site's log."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class Asked:
    """What is judged, as far as a judgement needs it."""

    experiment: Experiment
    policy: Policy | None = None
    """Of the site; None: it has none."""
    file: SiteFile | None = None
    package: str = ""
    """Digest of the federated-deal at the server."""
    simulated: bool = False
    request: Any = None
    tasks: tuple[str, ...] = ()
    """Of the run."""
    statistics: Statistics | None = None
    """What is added up in the request's phase; None: something is learnt."""
    records: int = 0
    """That an update is made of; or test records of the task that has fewest of them."""
    fault: Exception | None = None
    """Why the ledger, or the plan of the run, does not pay for a release, or why an experiment is
    none that can be run, or protected; None: all is well."""
    task: str = ""
    """Whose class sums leave."""
    given: tuple[str, int] = ("", 0)
    """How class sums that the site has given were made, and with the noise of so many sites."""
    wanted: tuple[str, int] = ("", 0)
    """The same of those that are asked for."""
    insists: Mapping[str, object] = field(default_factory=dict)
    """Key of the experiment to the value that the site's own program insists on."""
    own_loop: bool = False
    """Whether that program trains with a loop of its own."""
    own_noise: bool = False
    """Whether it makes all noise itself."""

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

    def task_where(self, test: Callable[[DataConfig, SiteData, str], Any]) -> str:
        """Return the first task of the experiment to which something applies; empty: none."""
        assert self.file is not None
        config, own = self.experiment.data, self.file.data
        tasks = config.tasks or named_tasks(config)
        return next((f"'{task:.80}'" for task in tasks if test(config, own, task)), "")


class Rule(NamedTuple):
    """One reason to say no."""

    reason: str
    """For the site's log; ``{found}`` is what the test returns."""
    test: Callable[[Asked], Any]
    """Returns something where the rule applies."""
    code: str = "policy"
    """That leaves."""


def _other_package(asked: Asked) -> str:
    theirs, ours = asked.package, package_digest()
    shown = f"{theirs[:12] or 'without a digest'}, and this site {ours[:12]}"
    return "" if theirs == ours else shown


def _foreign_run(asked: Asked) -> str:
    assert asked.file is not None
    sites = asked.experiment.federation.sites
    return "" if asked.file.site.name in sites else ", ".join(sites) or "no named site"


def _no_folder(asked: Asked) -> str:
    """A name from outside is about to become a folder."""
    run = Path(asked.experiment.run.out).name
    return "" if NAME.fullmatch(run) else repr(run[:80])


def _other_instruction(config: DataConfig, own: SiteData, task: str) -> bool:
    words = config.instructions.get(task, "")
    return own.instructions.get(task, words) != words


def _unknown_model(asked: Asked) -> str:
    assert asked.file is not None
    name = asked.experiment.model.name
    return "" if name in asked.file.models else f"'{name}'"


def _too_large_rank(asked: Asked) -> int:
    adapter = asked.experiment.adapter
    largest = max((adapter.rank, *adapter.client_ranks))
    return largest if largest > asked.limits.max_rank else 0


def _foreign_module(asked: Asked) -> str:
    if asked.policy is None:
        return ""
    named = set(asked.experiment.adapter.target_modules)
    return min(named - set(asked.policy.target_modules), default="")


def _too_few_collude(asked: Asked) -> bool:
    return asked.experiment.privacy.colluding < asked.limits.colluding


_TOO_FEW_COLLUDE = (
    "privacy.colluding is {experiment.privacy.colluding}, but the site's policy wants noise that "
    "suffices against {limits.colluding} other sites and the server together; raise it"
)


def _unknown_task(asked: Asked) -> bool:
    request: Instruction = asked.request
    lists = (request.tasks, request.seen, request.future, request.past, request.learnt)
    named = {task for tasks in lists for task in tasks}
    if request.task:
        named.add(request.task)
    return not named <= set(asked.tasks)


def _one_by_one(asked: Asked) -> bool:
    schedule, sums = asked.experiment.stream.schedule, asked.statistics is not None
    return not schedule.startswith("joint") and not (schedule == "per-client" and sums)


def _other_tasks(asked: Asked) -> bool:
    named = asked.request.tasks
    return set(named) != set(asked.tasks) or asked.request.task != named[0]


def _unlike_own(asked: Asked) -> str:
    """A program takes part in what it was written for: its model, its method, its privacy."""
    theirs = leaves(asked.experiment)
    unlike = ((key, theirs[key], own) for key, own in asked.insists.items() if theirs[key] != own)
    return next((f"{key} is '{said}', and this client's '{own}'" for key, said, own in unlike), "")


ON_A_TRAINER = (
    "RecordDP: a Trainer's own loop clips no single record's gradient; leave trainer= out, and "
    "DealClient's loop trains with it"
)
KEPT_COUNTS = "counts of right answers do not leave this site"
REFUSALS: Mapping[str, tuple[Rule, ...]] = {
    "package": (
        Rule(
            "the server runs federated-deal {found}; install the same release at both",
            _other_package,
            "version",
        ),
    ),
    "run": (
        Rule("the run is for {found}, and this site is '{file.site.name}'", _foreign_run),
        Rule("the name of the run, {found}, is none", _no_folder),
    ),
    "unit": (
        Rule(
            "the experiment protects groups of records (privacy.unit_column), and the site's "
            "policy names no column that makes them; set policy.unit_column in site.toml, or take "
            "no part",
            lambda a: a.experiment.privacy.unit_column and not a.limits.unit_column,
        ),
        Rule(
            "the experiment protects single records, and the site's policy demands groups of "
            "'{found}'; set privacy.unit_column in the experiment",
            lambda a: "" if a.experiment.privacy.unit_column else a.limits.unit_column,
        ),
    ),
    "model": (
        Rule("[models] of site.toml does not name {found}; add it to accept it", _unknown_model),
    ),
    "data": (
        Rule(
            "task {found} is not in [data.labels] of site.toml; if the consortium has agreed on "
            "it, add the lines that deal site check --experiment FILE prints",
            lambda a: a.task_where(lambda asked, own, task: task not in own.labels),
        ),
        Rule(
            "task {found} has other labels than in [data.labels] of site.toml; if the consortium "
            "has agreed on it, add the lines that deal site check --experiment FILE prints",
            lambda a: a.task_where(
                lambda asked, own, task: (
                    asked.labels.get(task, own.labels[task]) != own.labels[task]
                )
            ),
        ),
        Rule(
            "task {found}: its answers are texts by [data.labels] of site.toml and labels by "
            "data.generation of the experiment, or the reverse",
            lambda a: a.task_where(
                lambda asked, own, task: (task in asked.generation) != (not own.labels[task])
            ),
        ),
        Rule(
            'task {found}: [data.measures] has "entity-f1" for it in the experiment and not in '
            "site.toml, or the reverse; write it there if the consortium has agreed on it",
            lambda a: a.task_where(
                lambda asked, own, task: asked.tagged(task) != (own.measures.get(task) == ENTITY_F1)
            ),
        ),
        Rule(
            "task {found} has another instruction than in [data.instructions] of site.toml",
            lambda a: a.task_where(_other_instruction),
        ),
        Rule(
            "the experiment needs public texts; set data.public_path in site.toml",
            lambda a: a.experiment.data.public_path and not (a.file and a.file.data.public_path),
        ),
    ),
    "policy": (
        Rule(
            "privacy.mechanism is '{experiment.privacy.mechanism}', but the site's policy demands "
            "'{limits.demanded}'; change the experiment, or the policy",
            lambda a: a.limits.demanded not in ("", a.experiment.privacy.mechanism),
        ),
        Rule(
            "adapter.rank is {found}, but the site's policy allows {limits.max_rank}; lower it, or "
            "raise policy.max_rank",
            _too_large_rank,
        ),
        Rule(
            "adapter.target_modules names '{found}', which is not in policy.target_modules of "
            "site.toml; add it there to accept it",
            _foreign_module,
        ),
        Rule(
            "privacy.noise_share is 'sum', but the site's policy wants all noise from the site; "
            'set policy.noise_share to "sum" to accept it',
            lambda a: in_sum(a.experiment.privacy) and a.limits.noise_share != "sum",
        ),
        Rule(_TOO_FEW_COLLUDE, lambda a: in_sum(a.experiment.privacy) and _too_few_collude(a)),
    ),
    "sum": (
        Rule(
            "aggregation.secure: what a client of method.name '{experiment.method.name}' learns "
            "also follows from what it keeps of earlier tasks or rounds, which no other can "
            "compare; take another method, or let privacy.mechanism protect it",
            lambda a: a.comparable and a.experiment.method.name in OWN_MEMORY,
        ),
        Rule(
            "aggregation.secure: clients that work on different tasks, or give sums of several, "
            'are not told alike, so a sum might be of one; set stream.schedule to "synchronous", '
            "or let privacy.mechanism protect it",
            lambda a: a.comparable and a.experiment.stream.schedule != "synchronous",
        ),
    ),
    "masks": (
        Rule(
            "the site's policy demands secure aggregation; set aggregation.secure to true in the "
            "experiment",
            lambda a: (
                a.limits.secure_aggregation == "required" and not a.experiment.aggregation.secure
            ),
        ),
    ),
    "possible": (Rule("experiment: {fault}", lambda a: isinstance(a.fault, UserError)),),
    "program": (
        Rule("client: {found}; make them equal", _unlike_own),
        Rule(ON_A_TRAINER, lambda a: a.own_loop and a.experiment.privacy.mechanism != "none"),
        Rule(
            "RecordDP: privacy.noise_share is 'sum', and this client makes all noise itself; share "
            'it by noise_share = "sum" in [policy] of a site.toml',
            lambda a: a.own_noise and in_sum(a.experiment.privacy),
        ),
    ),
    "names": (Rule("instruction: a task that is not of this run", _unknown_task, "refused"),),
    "rank": (
        Rule(
            "instruction: a larger rank than the site's policy allows",
            lambda a: a.request.rank > a.limits.max_rank,
        ),
    ),
    "several tasks": (
        Rule("instruction: tasks are learnt one by one in this run", _one_by_one, "refused"),
        Rule(
            "instruction: under a mechanism tasks are learnt one by one",
            lambda a: a.experiment.privacy.mechanism != "none",
            "refused",
        ),
        Rule(
            "instruction: not a task of those that are added up",
            lambda a: a.statistics is not None and a.request.task not in a.request.tasks,
            "refused",
        ),
        Rule(
            "instruction: not the tasks of this run",
            lambda a: a.statistics is None and _other_tasks(a),
            "refused",
        ),
    ),
    "class sums": (
        Rule(
            "exact sums tell who is in them; they are for simulations",
            lambda a: not a.simulated and a.statistics is not None and a.statistics.exact,
        ),
        Rule(
            "the site's policy keeps class sums (policy.share_sums)",
            lambda a: a.open_sums and not a.limits.share_sums,
        ),
        Rule(  # a mask is not enough: of a label that one site alone has, a sum is that site's
            f"class sums leave with a noise multiplier of {LEAST_NOISE} or more",
            lambda a: a.open_sums and a.open_sums.noise_multiplier < LEAST_NOISE,
        ),
        Rule(_TOO_FEW_COLLUDE, lambda a: a.open_sums and _too_few_collude(a)),
    ),
    "verdict": (
        Rule(
            "what this site thinks of class means stays here",
            lambda a: a.experiment.privacy.mechanism != "none" or not a.limits.share_sums,
            "withheld",
        ),
    ),
    "counts": (
        Rule(
            KEPT_COUNTS,
            lambda a: not counts_leave(a.experiment.privacy.metrics, a.policy),
            "withheld",
        ),
    ),
    "counts in a sum": (
        Rule(
            KEPT_COUNTS,
            lambda a: not counts_leave(a.experiment.privacy.metrics, a.policy, masked=True),
            "withheld",
        ),
    ),
    "test records": (
        Rule(
            "fewer than {limits.min_records} test records of a task",
            lambda a: a.policy is not None and a.records < a.policy.min_records,
            "no-data",
        ),
    ),
    "records": (
        Rule(
            "no records of task '{request.task}'",
            lambda a: a.experiment.privacy.mechanism == "none" and not a.records,
            "no-data",
        ),
        Rule(
            "fewer than {limits.min_records} records, and nothing that protects them",
            lambda a: (
                a.policy is not None
                and not protects(a.experiment.privacy, a.policy)
                and a.records < a.policy.min_records
            ),
            "no-data",
        ),
    ),
    "release": (
        Rule("ledger: {fault}", lambda a: isinstance(a.fault, BudgetSpent), "budget-spent"),
        Rule("plan of the run: {fault}", lambda a: isinstance(a.fault, OutsidePlan)),
    ),
    "given sums": (
        Rule(
            "class sums of '{task}' were given before in another form",
            lambda a: a.given[0] != a.wanted[0],
        ),
        Rule(
            "class sums of '{task}' were given with less noise", lambda a: a.given[1] > a.wanted[1]
        ),
    ),
}
"""What is judged to the reasons against it."""
EXPERIMENT = ("policy", "sum", "masks")
"""What is judged of an experiment at every step of it."""


def require(asked: Asked, *judged: str) -> None:
    """Check that nothing speaks against what is ``judged``, parts of :data:`REFUSALS`.

    Raises:
        Refusal: the first reason against it.
    """
    for rule in (rule for part in judged for rule in REFUSALS[part]):
        found = rule.test(asked)
        if found:
            said = {**vars(asked), "found": found, "limits": asked.limits}
            raise Refusal(rule.code, rule.reason.format(**said))


@dataclass(frozen=True)
class Authorization:
    """A request for an update that nothing speaks against: records may be read."""

    asked: Asked
    mechanism: Mechanism
    """Under which the update leaves."""

    def require(self, *judged: str, **known: Any) -> None:
        """Check the same with what is ``known`` by now; as :func:`require`."""
        require(replace(self.asked, **known), *judged)


def authorize(asked: Asked, make_mechanism: Callable[[], Mechanism]) -> Authorization:
    """Return that a request for an update may be answered, before data are read.

    Args:
        asked: what is judged.
        make_mechanism: of the experiment; a UserError where nothing could protect it.

    Raises:
        Refusal: something speaks against it.
    """
    sums = [] if asked.statistics is None else ["class sums"]
    several = ["several tasks"] if asked.request.tasks else []
    require(asked, *EXPERIMENT, *sums, "names", "rank", *several)
    return Authorization(asked, possible(asked, make_mechanism))


def possible(asked: Asked, make: Callable[[], T]) -> T:
    """Return what is made of an experiment.

    Raises:
        Refusal: the experiment is none of which it can be made.
    """  # noqa: DOC501 (a UserError becomes the Refusal)
    try:
        return make()
    except UserError as fault:
        require(replace(asked, fault=fault), "possible")
        raise
