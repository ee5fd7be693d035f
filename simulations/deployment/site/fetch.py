"""``deal site fetch``: the adapter of a finished run, out of the site's own state folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from client.adapter_store import ADAPTER, DIGEST_FILE
from client.site_file import read_site
from deal_core.errors import UserError, nearest
from deal_core.wire.records import digest_of, read_folder


def fetch_adapter(folder: Path, run: str, to: Path) -> list[str]:
    """Copy the adapter folder that the server has handed over, checked by its digest.

    Args:
        folder: of ``deal site init``.
        run: its name; empty: the run that ended last.
        to: a new folder.

    Returns:
        Where it is, its digest, and how to go on.

    Raises:
        UserError: no such run or no adapter of it, files that were changed since, or a folder
            that is there already.
    """
    runs = Path(read_site(folder / "site.toml").site.state) / "runs"
    source = _chosen(runs, run)
    digest = (source / DIGEST_FILE).read_text(encoding="utf-8").strip()
    files = read_folder(source / ADAPTER)
    if digest_of(files) != digest:
        raise UserError(
            f"{source / ADAPTER}: was changed since it came; ask the server's administrator for "
            f"{source.name}/{ADAPTER}"
        )
    if to.exists():
        raise UserError(f"{to}: is there already; choose another --to")
    try:
        shutil.copytree(source / ADAPTER, to)
    except OSError as error:
        raise UserError(f"{to}: cannot be written ({error})") from None
    return [
        f"adapter of {source.name}: {to}",
        f"sha256 {digest}; the server's metrics.jsonl has it as adapter_sent",
        f'next: deal predict {to} "a text"',
    ]


def _chosen(runs: Path, name: str) -> Path:
    """Return the folder of a run that has an adapter.

    Raises:
        UserError: there is none.
    """
    ended = {path.parent.name: path.stat().st_mtime for path in runs.glob(f"*/{DIGEST_FILE}")}
    if name and name not in ended:
        known = f"; those that have: {', '.join(sorted(ended))}" if ended else ""
        raise UserError(
            f"run '{name}': has left no adapter here: it has not finished, or this site was not "
            f"connected at its end{known}{nearest(name, ended)}"
        )
    if not ended:
        raise UserError(
            f"{runs}: no finished run has left an adapter here; a site gets it when a run ends "
            "while it is connected"
        )
    return runs / (name or max(ended, key=lambda each: ended[each]))
