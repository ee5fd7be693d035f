"""``deal server backup``, ``deal site backup``: all that cannot be made again, as it was at one
moment, while server or site go on."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from itertools import takewhile
from pathlib import Path

from client.site_file import read_site
from deal_core.errors import UserError, at_home
from deal_core.privacy.ledger import FILE, Ledger, LedgerError
from simulations.deployment.server.folder import ServerFolder

DATABASES = (".db", ".sqlite")
MADE_AGAIN = (".lock", ".pid", ".log", ".log.1", ".secret", "-wal", "-shm")
"""Ends of names: of what a process makes, and of parts of a database."""
SECRETS = "secure-sum"
NOT_KEPT = ("empty", "apps", "worker")
"""Folders that Flower or a site's worker fills."""
RUNS = "runs"


def backup_server(folder: ServerFolder, to: str) -> list[str]:
    """Copy a server; return the lines to print. UserError: it cannot be."""
    folder.settings()
    done = backup({"": folder.path}, at_home(to).absolute())
    return [done, f"to restore: copy it to {folder.path}, and deal server start {folder.path}"]


def backup_site(folder: Path, to: str) -> list[str]:
    """Copy a site, without its data.

    Returns:
        The lines to print.

    Raises:
        UserError: it cannot be, or its ledger is not whole.
    """
    state = Path(read_site(folder / "site.toml").site.state)
    own = {path.name: path for path in folder.iterdir() if path.is_file()}
    target = at_home(to).absolute()
    done = backup({**own, "state": state}, target)
    entries = 0
    if (state / FILE).exists():
        try:
            entries = len(Ledger(target / "state").entries())
        except LedgerError as error:
            shutil.rmtree(target, ignore_errors=True)
            raise UserError(f"the ledger cannot be trusted: {error}") from None
    return [
        f"{done}; its ledger is whole, with {entries} entries",
        f"to restore: copy it to {folder} (state: {state}); never put back a ledger older than the "
        "last release: what it has spent since would be spent again",
    ]


def backup(sources: Mapping[str, Path], to: Path) -> str:
    """Copy files and folders into a new folder, which is there whole or not at all.

    Args:
        sources: name in the new folder to file or folder; empty: what is in the folder.
        to: the new folder.

    Returns:
        What was done.

    Raises:
        UserError: it is there already, lies in what is copied, or cannot be written.
    """
    part = to.with_name(f"{to.name}.part")
    if to.exists():
        raise UserError(f"{to}: is there already; choose a new folder")
    if any(source.resolve() in to.resolve().parents for source in sources.values()):
        raise UserError(f"{to}: lies in what is copied; choose a folder elsewhere")
    shutil.rmtree(part, ignore_errors=True)
    count = size = 0
    elsewhere: list[str] = []
    try:
        part.mkdir(mode=0o700, parents=True)
        for name, source in sources.items():
            # In the order of names: the head of a ledger, which may be behind it, comes first.
            for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
                inside = path.relative_to(source)
                if path.is_symlink() and path.is_dir() and not left_out(inside / "file"):
                    elsewhere.append(str(path))
                if not path.is_file() or left_out(inside):
                    continue
                target = part / name / inside
                target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                (copy_database if path.suffix in DATABASES else shutil.copy2)(path, target)
                count, size = count + 1, size + target.stat().st_size
        os.rename(part, to)
    except (OSError, sqlite3.Error) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"{to}: cannot be written ({error})") from None
    missing = f"; left out, as links to folders: {', '.join(elsewhere)}" if elsewhere else ""
    done = f"copied {count} files, {size / 1e6:.1f} MB, to {to}; private keys are among them"
    return done + missing


def left_out(path: Path) -> bool:
    """Return whether a file is made anew by whoever needs it, or holds secrets of secure sums, with
    which a stolen copy could open what is masked."""
    above = takewhile(RUNS.__ne__, path.parts[:-1])  # the server has named what is below
    folders = {*above} & {*NOT_KEPT}
    return bool(folders) or path.name.endswith(MADE_AGAIN) or path.name.startswith(SECRETS)


def copy_database(source: Path, target: Path) -> None:
    """Copy a database as it is at one moment, with what its journal holds."""
    with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(target)) as new:
        old.backup(new)
        (said,) = new.execute("PRAGMA integrity_check").fetchone()
        if said != "ok":
            raise sqlite3.DatabaseError(f"{source}: {said}")
    shutil.copymode(source, target)
