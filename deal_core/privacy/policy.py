"""What a site demands of every experiment: the ``[policy]`` table of its own file.

A policy only tightens. The server does not see it, and cannot switch it off: what the experiment
asks beyond it is refused, or narrowed to it, before anything is trained.
"""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from deal_core.config.data import Table
from deal_core.config.privacy import Delta, PrivacyConfig
from deal_core.errors import UserError

Metrics = Literal["none", "summed", "clear"]
STRICTEST_FIRST: tuple[Metrics, ...] = ("none", "summed", "clear")
NOMINAL = 100.0
"""An epsilon beyond it hides next to nothing."""


class BudgetSpent(Exception):
    """What is asked would take the site past its budget."""


class OutsidePlan(Exception):
    """A release is not what its run has planned, or goes with no plan; no record was read."""


class Policy(Table):
    """Limits of one site."""

    mechanism: Literal["", "none", "record"] = ""
    """The only mechanism under which the site trains (``record``); empty: any, but ``record`` where
    there is a largest epsilon, or a unit column."""
    unit_column: str = ""
    """Column of the site's own files that says whose a record is (a patient's number). The site
    then takes part in experiments alone that protect groups (``privacy.unit_column``, whatever name
    that has there): all records with one value of this column. Rows without a value are left out.
    Empty: in those alone that do not."""
    max_epsilon: float = Field(0.0, ge=0)
    """Largest epsilon of all that the site's ledger holds, for ever; 0: what the experiment
    asks."""
    max_delta: Delta = 0.0
    """Largest delta; 0: the power of ten at or below ``0.1 / n`` for the ``n`` records of the
    site."""
    metrics: Metrics = "none"
    """Counts of right answers on the site's test records: ``none`` leaves, they leave as part of a
    secure sum alone (``summed``), or in the ``clear``. The mean training loss, where no mechanism
    protects, leaves with the last, and in a secure sum with the last two."""
    spending: bool = True
    """Whether it may leave what the site's ledger composes to: epsilon and its delta, and what they
    mean."""
    share_num_examples: bool = False
    """Whether the number of training records may leave."""
    share_sums: bool = False
    """Whether class sums (of each label a count and a sum of vectors) may leave where no mechanism
    charges them: under masks, with noise (``method.prototype.noise_multiplier`` from 0.61) and once
    for each task; the class means of ``deal``, and ``prototype``, need them. What they tell, before
    and after, is in docs/privacy.md, "Class sums". One bit a stage goes with them, whatever
    ``metrics`` says: whether new class means make answers on held-back records worse."""
    disjoint_tasks: bool = False
    """The site declares that no record occurs in two tasks; it is checked on the records' ids.
    Then tasks compose in parallel: a record's epsilon is the largest of one task."""
    noise_share: Literal["site", "sum"] = "site"
    """Whether the noise that protects a record must all be the ``site``'s own, or may be shared by
    the sites of a secure ``sum``."""
    colluding: int = Field(1, ge=0)
    """Against so many other sites that pool what they know with the server noise in the sum must
    suffice."""
    secure_aggregation: Literal["allowed", "required"] = "allowed"
    """Whether updates may leave in the clear as well, or only masked, in a secure sum."""
    min_cohort: int = Field(3, ge=2)
    """Fewest sites in a secure sum."""
    server_vouches_for_peers: bool = False
    """Where no peer is pinned: take the keys of other sites from the server, which is then trusted
    not to pose as a site."""
    min_records: int = Field(32, ge=1)
    """Fewest training records of a task from which an unprotected update may leave; and fewest test
    records of each task whose counts may go into a secure sum."""
    max_rank: int = Field(32, ge=1)
    """Largest rank of an adapter that the site trains: what an update can carry grows with it."""
    target_modules: tuple[str, ...] = ()
    """Layers that an experiment may adapt by name; those of the model family's default may always
    be."""

    @model_validator(mode="after")
    def _groups_are_of_records(self) -> Self:
        if self.unit_column and self.demanded != "record":
            raise ValueError(
                f'unit_column makes groups of records, and mechanism is "{self.mechanism}"; set it '
                'to "record", or leave unit_column empty'
            )
        return self

    @model_validator(mode="after")
    def _a_budget_is_kept(self) -> Self:
        if self.max_epsilon and self.demanded == "none":
            raise ValueError(
                'max_epsilon is a budget, and under mechanism "none" nothing keeps it; set '
                'mechanism to "record", or leave max_epsilon out'
            )
        return self

    @property
    def demanded(self) -> str:
        """The mechanism that the site demands: an epsilon of its records is one of ``record``."""
        return self.mechanism or ("record" if self.max_epsilon or self.unit_column else "")


def default_delta(units: int) -> float:
    """Return the power of ten at or below ``0.1 / n``: a mechanism that gives each of ``n`` records
    (or groups) away whole with that probability gives one away in one run of ten at most; and
    delta is told, so it must not tell ``n``."""
    return float(f"1e-{len(str(10 * max(units, 2) - 1))}")


def require_delta(stated: float, units: int, unit: str) -> None:
    """Check a stated delta, 0 being none, against the number of units of privacy. As delta does,
    what is refused tells the power of ten of their number alone.

    Raises:
        UserError: it is above :func:`default_delta`.
    """
    largest = default_delta(units)
    if stated > largest:
        raise UserError(
            f"privacy.target_delta = {stated:g} is too large for {units} {unit}s: so likely may "
            f"each be told outright; set it to {largest:g} or less, or to 0"
        )


def terms(privacy: PrivacyConfig, policy: Policy | None, units: int) -> tuple[float, float]:
    """Return epsilon and delta: the experiment's wishes within the limits of a site with so many
    records, or groups, over all tasks.

    Raises:
        UserError: the delta that is asked is too large.
    """
    limits, epsilon, largest = policy or Policy(), privacy.target_epsilon, default_delta(units)
    if not limits.max_delta:
        require_delta(privacy.target_delta, units, "group" if privacy.unit_column else "record")
    delta = min(privacy.target_delta or largest, limits.max_delta or largest)
    return min(epsilon, limits.max_epsilon or epsilon), delta


def in_sum(privacy: PrivacyConfig) -> bool:
    """Return whether sites make the noise together, of the sum over all of them."""
    return privacy.mechanism == "record" and privacy.noise_share == "sum"


def protects(privacy: PrivacyConfig, policy: Policy | None) -> bool:
    """Return whether the experiment's mechanism, within a site's limits, hides anything from the
    server: an epsilon beyond ``NOMINAL`` is one in name alone."""
    if privacy.mechanism == "none":
        return False
    limit = policy.max_epsilon if policy is not None else 0.0
    return min(privacy.target_epsilon, limit or privacy.target_epsilon) <= NOMINAL


def counts_leave(asked: Metrics, policy: Policy | None, masked: bool = False) -> bool:
    """Return whether counts of right answers may leave, by the stricter of what the experiment asks
    and what the site allows; ``masked``: in a secure sum alone."""
    allowed = policy.metrics if policy is not None else "clear"
    stricter = min(asked, allowed, key=STRICTEST_FIRST.index)
    return stricter == "clear" or (masked and stricter == "summed")


SPENDING = frozenset({"epsilon", "delta", "n_delta", "disjoint_tasks", "void", "assumes_more"})
"""Figures that tell what a site's ledger composes to, and what that means."""


def figures_allowed(
    figures: Mapping[str, float], policy: Policy | None, masked: bool = False
) -> dict[str, float]:
    """Return what of an update's figures may leave. Without leave to send counts every client
    weighs the same, and keeps to itself its time and what tells how many records it has; the loss
    is a metric. ``masked``: the number of examples and the loss leave in a secure sum alone."""
    if policy is None:
        return dict(figures)
    withheld = set() if policy.share_num_examples else {"seconds", "n_delta"}
    withheld |= set() if policy.spending else SPENDING
    clear = policy.metrics == "clear" or (masked and policy.metrics == "summed")
    withheld |= set() if clear else {"loss"}
    weight = {} if masked or policy.share_num_examples else {"num_examples": 1.0}
    return {name: value for name, value in figures.items() if name not in withheld} | weight
