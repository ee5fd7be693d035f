"""What cannot be done about one record stays that record's own matter."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
log = logging.getLogger(__name__)


def contained(work: Callable[[], Result], alone: bool) -> Result | None:
    """Return what the work gives.

    Where it is about one protected record ``alone``, a failure is None: the caller goes on as if
    the record were not there, so that the failure changes nothing about the others. The site's own
    log has it; nobody else learns that it occurred.

    Raises:
        Exception: that of the work, where it is about several records.
    """
    if not alone:
        return work()
    try:
        return work()
    except Exception:
        log.exception("a record cannot be computed with; it has no part in what is released")
        return None
