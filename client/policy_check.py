"""Whether a site takes part in an experiment at all, by its own policy; no model is loaded."""

from __future__ import annotations

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from deal_core.privacy.policy import (
    Policy,
    Refusal,
    require_adapter,
    require_comparable,
    require_mechanism,
    require_secure,
    require_shares,
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
