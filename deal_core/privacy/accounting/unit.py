"""The unit of privacy: what two neighbouring data sets differ by.

* ``record``: one record of a site, there or not.
* ``group``: all records of a site with one value of a column, such as those of a patient.
* ``client``: a whole client; only ledgers of earlier versions hold releases of it.

An epsilon of one unit says nothing of another. A group of many records loses more in releases that
hide single records. And one record, where its group stays, moves a clipped sum of groups by up to
twice the bound. So what was released for records and for groups, or for groups of two columns, is
never added up. A client that hides all of its data hides every record and group of it as well:
such releases may stand beside either.
"""

from __future__ import annotations

from collections.abc import Iterable

from deal_core.config.experiment import PrivacyConfig
from deal_core.errors import UserError

RECORD, GROUP, CLIENT = "record", "group", "client"

Unit = tuple[str, str]
"""A unit of privacy, and the column that makes it; no column: empty."""


class MixedUnits(UserError):
    """Releases of several units of privacy: no epsilon covers them together."""


def unit_of(privacy: PrivacyConfig) -> str:
    """Return what mechanism ``record`` protects under these settings."""
    return GROUP if privacy.unit_column else RECORD


def unit_text(unit: str, column: str) -> str:
    """Return a unit in words, as it follows 'per'."""
    return f"{unit} of '{column}'" if column else unit


def common_unit(units: Iterable[Unit]) -> Unit:
    """Return the one unit that an epsilon of all these releases is of: the smaller one, where whole
    clients are among them.

    Args:
        units: of protected releases; at least one.

    Raises:
        MixedUnits: releases of records and of groups, or of groups of two columns.
    """
    found = sorted(set(units))
    smaller = [each for each in found if each[0] != CLIENT]
    if len(smaller) > 1:
        first, second = (unit_text(*each) for each in smaller[:2])
        raise MixedUnits(
            f"the ledger holds releases per {first} and per {second}, which cannot be added up: "
            "keep to the unit that it began with (privacy.unit_column, at a site "
            "policy.unit_column)"
        )
    return (smaller or found)[0]
