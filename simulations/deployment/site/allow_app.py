"""``deal site allow-app``: put an app on the list of ``site.toml``, change nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from client.site_file import SiteFile, read_site
from deal_core.config.file import parse_tables, read_toml
from deal_core.errors import UserError
from deal_core.whole_file import written_beside
from simulations.deployment.site.own_app import own_digest

DIGEST = re.compile(r"[0-9a-f]{64}")
HEADER = re.compile(r"^[ \t]*\[[ \t]*apps[ \t]*\][^\n]*\n?", re.MULTILINE)
ALLOWED = re.compile(r"^([ \t]*allowed[ \t]*=[ \t]*)\[[^\]]*\]", re.MULTILINE)
NEXT = re.compile(r"^[ \t]*\[", re.MULTILINE)


def allow_app(folder: Path, digest: str = "") -> list[str]:
    """Add an app to ``[apps] allowed``.

    Args:
        folder: of ``deal site init``.
        digest: SHA-256 of the app; empty: that of this checkout.

    Returns:
        The lines to print.

    Raises:
        UserError: no such site, no SHA-256, or a file that cannot be changed without a doubt.
    """
    path = folder / "site.toml"
    wanted = (digest or own_digest()).lower()
    if not DIGEST.fullmatch(wanted):
        raise UserError(f"'{digest}': not a SHA-256; it has 64 of the characters 0-9 and a-f")
    site = read_site(path)
    known = site.apps.allowed if site.apps is not None else ()
    whose = "given by you" if digest else "of this checkout"
    if wanted in known:
        return [f"app {wanted} ({whose}) is allowed already"]
    _replace(path, (*known, wanted))
    return [
        f"allowed app {wanted} ({whose}); {len(known) + 1} in all, in [apps] of {path}",
        "next: take out of the list what should not run any more, and restart the site",
    ]


def with_apps(text: str, digests: tuple[str, ...]) -> str:
    """Return the text of a ``site.toml`` with another list of apps."""
    entry = "[" + "".join(f'\n    "{digest}",' for digest in digests) + "\n]"
    header = HEADER.search(text)
    if header is None:
        return f"{text.rstrip()}\n\n[apps]\nallowed = {entry}\n"
    after = NEXT.search(text, header.end())
    end = after.start() if after else len(text)
    table, found = ALLOWED.subn(rf"\g<1>{entry}", text[header.end() : end], count=1)
    if not found:
        table = f"allowed = {entry}\n{table}"
    head = text[: header.end()]
    return (head if head.endswith("\n") else head + "\n") + table + text[end:]


def _replace(path: Path, digests: tuple[str, ...]) -> None:
    """Write the list, after a check that the file then says this, and all else as before."""
    with written_beside(path) as beside:
        beside.write_text(with_apps(path.read_text(encoding="utf-8"), digests), encoding="utf-8")
        if not _same_but_apps(path, beside, digests):
            raise UserError(
                f"{path}: [apps] is written in a way that this command does not change; put "
                f'"{digests[-1]}" into allowed = [...] by hand'
            )
        beside.chmod(path.stat().st_mode & 0o777)


def _same_but_apps(path: Path, beside: Path, digests: tuple[str, ...]) -> bool:
    before = parse_tables(SiteFile, read_toml(path), str(path))
    try:
        after = parse_tables(SiteFile, read_toml(beside), str(beside))
    except UserError:
        return False
    apps = after.apps.allowed if after.apps is not None else ()
    return apps == digests and after.model_copy(update={"apps": before.apps}) == before
