"""What a backup holds while a process writes, and what is refused when it is put back."""

import shutil
import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deal_core.errors import UserError
from deal_core.privacy.events import Budget
from deal_core.privacy.ledger import FILE, Ledger, LedgerError
from simulations.cli import app
from simulations.deployment.server.folder import (
    ServerFolder,
    ServerSettings,
    backup_server,
    init_server,
)
from simulations.deployment.site.folder import backup_site, init_site
from tests.ledger_events import ledger_event


def deal(*words):
    return CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False).output


def charge(ledger, server_round):
    event = ledger_event(server_round=server_round)
    ledger.charge(event, Budget(8.0, 1e-4), f"round {server_round}", b"answer")


def test_a_site_is_copied_while_it_is_written_and_an_older_ledger_is_refused(tmp_path):
    folder, to = tmp_path / "site", tmp_path / "copy"
    (tmp_path / "data").mkdir()
    init_site(folder, tmp_path / "data", "north")
    ledger = Ledger(folder / "state")
    with closing(sqlite3.connect(folder / "state" / FILE)):  # its journal is not folded in
        charge(ledger, 1)
        charge(ledger, 2)
        for name in ("site.lock", "runs/one/secure-sum.json", "worker/output"):
            (folder / "state" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "state" / name).touch()
        # The server names a run; one that is forgotten would be masked anew.
        announced = folder / "state" / "runs" / "worker" / "announced"
        announced.parent.mkdir()
        announced.touch()
        said = deal("site", "backup", to, folder)
    assert (to / "state" / "runs" / "worker" / "announced").exists()
    shutil.rmtree(to / "state" / "runs")
    assert "its ledger is whole, with 2 entries" in said
    assert {path.name for path in (to / "state").rglob("*")} == {"ledger.head", FILE}
    assert stat.S_IMODE((to / "site.key").stat().st_mode) == 0o600
    assert (to / "site.toml").read_bytes() == (folder / "site.toml").read_bytes()
    charge(ledger, 3)
    restored = Path(shutil.copytree(to, tmp_path / "restored"))
    assert [event.server_round for event in Ledger(restored / "state").events()] == [1, 2]
    assert Ledger(restored / "state").answer("round 2") == b"answer"  # is not charged again
    shutil.copyfile(to / "state" / FILE, folder / "state" / FILE)
    with pytest.raises(LedgerError, match="put back to an older state"):
        ledger.events()


def test_a_server_is_copied_with_what_its_database_has_not_folded_in(tmp_path):
    server = ServerFolder(tmp_path / "server")
    init_server(server, ServerSettings(hosts=("localhost",)))
    server.log.write_text("long")
    with closing(sqlite3.connect(server.database, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE nodes (name)")
        db.execute("INSERT INTO nodes VALUES ('north')")
        said = deal("server", "backup", tmp_path / "copy", "--dir", server.path)
        with pytest.raises(UserError, match="lies in what is copied; choose a folder elsewhere"):
            backup_server(server, str(server.path / "copy"))
    copy = ServerFolder(tmp_path / "copy")
    assert f"to restore: copy it to {server.path}" in said
    assert (copy.settings(), copy.sites.read_text()) == (server.settings(), "{}\n")
    assert stat.S_IMODE(copy.authority_key.stat().st_mode) == 0o600
    assert not copy.log.exists()
    with closing(sqlite3.connect(copy.database)) as db:
        assert db.execute("SELECT name FROM nodes").fetchall() == [("north",)]
    assert not (server.path / "copy").exists()


def test_what_lies_elsewhere_is_copied_or_named_and_a_broken_ledger_is_not_kept(tmp_path):
    folder, disk = tmp_path / "site", tmp_path / "disk"
    (tmp_path / "data").mkdir()
    init_site(folder, tmp_path / "data", "north")
    charge(Ledger(disk), 1)
    charge(Ledger(disk), 2)
    for name in (FILE, "ledger.head"):
        (folder / "state" / name).symlink_to(disk / name)
    (folder / "state" / "runs").symlink_to(disk)
    said = deal("site", "backup", tmp_path / "copy", folder)
    assert "its ledger is whole, with 2 entries" in said
    assert f"left out, as links to folders: {folder / 'state' / 'runs'}" in said
    assert len(Ledger(tmp_path / "copy" / "state").events()) == 2
    (disk / "ledger.head").write_text('{"seq": 3, "hash": "x"}')
    with pytest.raises(UserError, match="the ledger cannot be trusted"):
        backup_site(folder, str(tmp_path / "second"))
    assert not (tmp_path / "second").exists()
