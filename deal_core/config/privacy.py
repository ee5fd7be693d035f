"""The table ``privacy``: what ``deal_core.privacy`` reads of an experiment."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from deal_core.config.data import Table

LEAST_DELTA = 1e-9
"""Below it rounding is all that the accounting would see."""


def _large_enough(delta: float) -> float:
    if 0 < delta < LEAST_DELTA:
        raise ValueError(f"should be 0, or at least {LEAST_DELTA:g}")
    return delta


Delta = Annotated[float, Field(ge=0, lt=1), AfterValidator(_large_enough)]
"""Probability that an epsilon says nothing."""


class PrivacyConfig(Table):
    """What an update may tell of the records behind it. A site's own policy can only tighten it."""

    mechanism: str = "none"
    """``none`` (no guarantee) or ``record`` (differential privacy for every record of a site, or
    for every group of them, by the site itself: nobody else need be trusted)."""
    target_epsilon: float = Field(8.0, gt=0, le=1000)
    """Budget of a record, or group: of everything that its site's ledger holds, this whole run
    included."""
    target_delta: Delta = 0.0
    """Probability that the budget says nothing; 0: the power of ten at or below ``0.1 / n`` for the
    ``n`` records, or groups, of a site. More is refused, unless a site's own ``policy.max_delta``
    allows it."""
    unit_column: str = ""
    """Column that says whose a record is (a patient's number): what is protected is then a group,
    all records of a client with one value of it (record; files, hub, sites). At a site the column
    is that of its own ``policy.unit_column``. Empty: the record by itself."""
    max_grad_norm: float = Field(1.0, ge=1e-6, le=1e6)
    """Clipping bound of an example's gradient, or of the mean gradient of a group: public, not
    taken from data."""
    disjoint_tasks: bool = False
    """Whether simulated clients declare that no record, or group, is in two tasks, so that tasks
    compose in parallel: it is checked (record). A real site declares it in its own policy; where
    ``noise_share`` is ``sum`` both are needed, this one for the noise."""
    sample_rate: float = Field(0.0, ge=0, le=1)
    """Probability that a record, or group, is in a step's batch; 0: ``train.batch_size / n``."""
    noise: Literal["auto", "seeded", "secure"] = "auto"
    """Where noise comes from. ``auto``: a seed in simulations, so that runs repeat, and a
    cryptographic stream at a real site. A real site never seeds, whatever is asked."""
    noise_share: Literal["site", "sum"] = "site"
    """Whose noise protects a record: all of it from its own ``site``, or a share from each, so that
    it is whole in the secure ``sum`` over sites, which is all that anybody sees (record, with
    ``train.step = "server"``)."""
    colluding: int = Field(1, ge=0)
    """So many other sites may pool what they know with the server: the noise suffices without
    theirs (noise in the sum)."""
    dropouts: int = Field(0, ge=0)
    """So many sites may fail in a round: the noise suffices without theirs; a round that more fail
    in is lost (noise in the sum)."""
    metrics: Literal["none", "summed", "clear"] = "clear"
    """Counts of right answers on test records, which are no part of the training's guarantee:
    they leave in the ``clear``, as a sum over all sites alone (``summed``, with
    ``aggregation.secure``: then nobody knows the accuracy at one client), or not at all."""
