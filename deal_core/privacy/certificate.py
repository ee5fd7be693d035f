"""A site's signed statement of what its ledger holds: what was spent, on what, by which mechanism.

The statement says nothing of any record: it repeats the ledger's events, which hold rates, noise
and places in runs. It is signed (Ed25519) with a key of the site, made when first needed and kept
in its state directory; whoever knows the site's public key can check it without the ledger.
"""

import base64
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from deal_core.atomic_write import atomic_write
from deal_core.errors import UserError
from deal_core.privacy.events import LedgerEvent, assumed_honest, common_unit, composed
from deal_core.privacy.ledger import Entry, Ledger

KEY = "ledger.key"
VERSION = 7
"""Of statements."""
PLACE = ("seq", "time")
ROUNDING = 1e-6


def certificate(ledger: Ledger, disjoint_tasks: bool = False) -> dict[str, Any]:
    """Return the signed statement; its ``n_delta`` is delta times the most records (or groups) that
    a run was planned for, None where no plan says.

    Args:
        ledger: whose releases are stated.
        disjoint_tasks: compose tasks in parallel, as the site's policy declares.

    Raises:
        UserError: the ledger holds nothing, or releases of several units of privacy.
        LedgerError: it cannot be trusted.
    """
    entries = ledger.entries()
    if not entries:
        raise UserError(f"{ledger.path}: holds no release; there is nothing to certify")
    key = _site_key(ledger.folder)
    units = most_units(ledger)
    meaning = meaning_of([entry.event for entry in entries], disjoint_tasks)
    statement = {
        "version": VERSION,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        **meaning,
        "n_delta": units * meaning["delta"] if units and meaning["delta"] else None,
        "disjoint_tasks": disjoint_tasks,
        "head": entries[-1].hash,
        "events": told_events(entries),
    }
    return {
        "statement": statement,
        "public_key": _text(key.public_key().public_bytes_raw()),
        "signature": _text(key.sign(_bytes(statement))),
    }


def most_units(ledger: Ledger) -> int:
    """Return the most records (or groups) that a run was planned for; 0: no plan says."""
    return max((json.loads(plan).get("units", 0) for plan in ledger.plans().values()), default=0)


def check_certificate(signed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the statement, if its signature is that of the key beside it, and its epsilon what
    its events cost.

    Whose key that is, the reader must know.

    Raises:
        UserError: one of these is not so.
    """
    try:
        statement: dict[str, Any] = signed["statement"]
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(signed["public_key"]))
        key.verify(base64.b64decode(signed["signature"]), _bytes(statement))
        listed = [dict(event) for event in statement["events"]]
    except InvalidSignature:
        raise UserError("certificate: the signature is not that of its statement") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"certificate: not one ({type(error).__name__}: {error})") from None
    if statement.get("version") != VERSION:
        raise UserError(
            f"certificate: of version {statement.get('version')}, and this is version {VERSION}, "
            "which says more of what an epsilon means; export it anew"
        )
    _check_figures(statement, listed)
    return statement


def _check_figures(statement: Mapping[str, Any], listed: Sequence[Mapping[str, Any]]) -> None:
    try:
        placed = [{k: v for k, v in e.items() if k not in PLACE} for e in listed]
        events = [LedgerEvent(**fields) for fields in placed]
        meant = meaning_of(events, statement["disjoint_tasks"])
        said = {name: statement[name] for name in meant}
        both = said["epsilon"], meant["epsilon"]
        if None not in both and abs(both[0] - both[1]) <= ROUNDING:
            said["epsilon"] = meant["epsilon"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"certificate: not one ({type(error).__name__}: {error})") from None
    for name, value in meant.items():
        if said[name] != value or type(said[name]) is not type(value):
            raise UserError(f"certificate: its '{name}' is not what its events say")


def told_events(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return entries of a ledger as a statement tells them: number, time, and all of the event."""
    return [{"seq": entry.seq, "time": entry.time, **asdict(entry.event)} for entry in entries]


def meaning_of(events: Sequence[LedgerEvent], disjoint_tasks: bool) -> dict[str, Any]:
    """Return what follows from the events: epsilon and delta of those that are protected (None:
    none is), how many there are and are not; unit, extent, trust, and if it is nothing."""
    protected = [event for event in events if event.protected]
    unprotected, (unit, column) = len(events) - len(protected), ("", "")
    epsilon = delta = None
    if protected:
        unit, column = common_unit((event.unit, event.unit_column) for event in protected)
        delta = min(event.delta for event in protected)
        epsilon = composed(protected, delta, disjoint_tasks)
    return {
        "epsilon": epsilon,
        "delta": delta,
        "unprotected": unprotected,
        "entries": len(events),
        "unit": unit,
        "unit_column": column,
        "composed_over": composed_over(disjoint_tasks, unprotected),
        "assumes": assumed_honest(events),
        "simulation_only": any(event.simulation_only for event in events),
    }


def composed_over(disjoint_tasks: bool, unprotected: int) -> str:
    """Return what an epsilon of a ledger is of, in words; and of what it is not."""
    over = "all protected releases of the ledger: all runs, tasks and rounds"
    if disjoint_tasks:
        over = (
            "all protected releases of the ledger; tasks in parallel where their records were "
            "compared before, as the site declares them disjoint"
        )
    void = f"It is void for the records of {unprotected} releases that left without protection"
    return f"{over}. {void}" if unprotected else over


def _site_key(folder: Path) -> Ed25519PrivateKey:
    """Return the site's key; made, readable by its owner alone, when there is none."""
    path = folder / KEY
    try:
        if not path.exists():
            _make_key(path)
        return Ed25519PrivateKey.from_private_bytes(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be made or read ({error.strerror})") from None
    except ValueError:
        raise UserError(
            f"{path}: is no signing key; put it back from a backup, or remove it for a new one, "
            "which readers of earlier certificates do not know"
        ) from None


def _make_key(path: Path) -> None:
    """Write a new key, whole; where another process has written one meanwhile, that stays."""
    beside = path.with_name(f"{KEY}.{os.getpid()}.new")
    atomic_write(beside, Ed25519PrivateKey.generate().private_bytes_raw(), 0o600, for_good=True)
    try:
        with suppress(FileExistsError):
            os.link(beside, path)
    finally:
        beside.unlink()


def _bytes(statement: Mapping[str, Any]) -> bytes:
    return json.dumps(statement, sort_keys=True).encode()


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
