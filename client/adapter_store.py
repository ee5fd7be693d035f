"""The adapter of a finished run at a site: taken from the server's last message, checked, kept in
the run's own folder. Nothing here reads data, and nothing leaves but a code."""

from __future__ import annotations

import shutil
from pathlib import Path

from flwr.app import Message

from client.context import RequestContext
from deal_core.atomic_write import atomic_write
from deal_core.lora.payload import PayloadError
from deal_core.wire.records import DIGEST, LARGEST, RECORD, check_files

ADAPTER = "adapter"
"""Folder of the files, below that of the run."""
DIGEST_FILE = "adapter.sha256"
"""Beside it: the digest under which they came."""


def store_adapter(place: RequestContext, message: Message) -> None:
    """Keep the files of a message, of a run in which the site has worked; they take the place of
    earlier ones of the run.

    Raises:
        PayloadError: the client is no site, has not worked in the run, or the files are not what
            is expected.
    """
    if place.site is None:
        raise PayloadError("only a site keeps an adapter")
    if not place.folder.is_dir():
        raise PayloadError("this site has not worked in the run")
    content = message.content
    if set(content) != {RECORD, DIGEST}:
        raise PayloadError(f"records other than {RECORD}, {DIGEST}")
    digest = str(content.config_records[DIGEST].get("sha256", ""))
    arrays = content.array_records[RECORD]
    if sum(len(array.data) for array in arrays.values()) > 2 * LARGEST:
        raise PayloadError(f"{RECORD}: more than {LARGEST} bytes")
    try:
        numbers = {name: array.numpy() for name, array in arrays.items()}
    except (TypeError, ValueError):
        raise PayloadError(f"{RECORD}: an array that is none") from None
    _write(place.folder, check_files(numbers, digest), digest)


def _write(run: Path, files: dict[str, bytes], digest: str) -> None:
    """Write beside, then rename; the digest comes last, so that half a folder has none."""
    folder, beside = run / ADAPTER, run / f"{ADAPTER}.writing"
    shutil.rmtree(beside, ignore_errors=True)
    for name, data in files.items():
        atomic_write(beside / name, data)
    (run / DIGEST_FILE).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
    beside.rename(folder)
    atomic_write(run / DIGEST_FILE, digest + "\n")
