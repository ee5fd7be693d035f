"""A sum over sites that does not come about costs what it was for, and not the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from deal_core.aggregation import NUMERICAL
from deal_core.errors import UserError
from deal_core.secure_sum.messages import ProtocolError
from server.exchange import Exchange
from server.plan import Step
from server.round import reason_of


@contextmanager
def may_be_lost(exchange: Exchange, event: str, step: Step) -> Iterator[None]:
    """Within it a fault of the protocol, or of numbers, is logged as ``event``; the rest of the
    block is left out.

    Raises:
        UserError: too few sites, or a site twice: the run stops here, and can go on.
    """
    try:
        yield
    except ProtocolError as fault:
        exchange.event(event, step, reason=reason_of(fault))
    except UserError:
        raise
    except NUMERICAL as fault:
        exchange.event(event, step, reason=reason_of(fault))
