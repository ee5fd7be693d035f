from __future__ import annotations

import base64
import json
import os
import stat
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from deal_core.errors import UserError
from deal_core.privacy.certificate import KEY, _bytes, certificate
from deal_core.privacy.events import Budget, composed, unprotected_event
from deal_core.privacy.ledger import Ledger
from server.results import rounded_up
from simulations.cli import app
from tests.ledger_events import ledger_event

EVENT = ledger_event(run="a run", simulation_only=True)


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(tmp_path / "site")
    for n, task in enumerate(["surgery", "surgery", "skin"]):
        event = replace(EVENT, task=task, server_round=n)
        ledger.charge(event, Budget(100.0, 1e-4), f"r{n}", b"x")
    return ledger


def call(*words: object) -> str:
    """The output of ``deal ledger WORDS``; a user's error is raised."""
    result = CliRunner().invoke(app, ["ledger", *map(str, words)])
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def exported(ledger, tmp_path) -> dict:
    call("export", ledger.folder, "--out", tmp_path / "c.json")
    return json.loads((tmp_path / "c.json").read_text())


def test_verify_says_what_was_spent_and_what_epsilon_means(ledger):
    spent = f"epsilon {rounded_up(composed(ledger.events(), 1e-4), 4)} at delta"
    text = call("verify", ledger.folder)
    assert all(part in text for part in ("chain holds", spent, "per record", "simulation"))
    ledger.note(unprotected_event("another", "none", ("skin", "learn", 0, 1)))
    assert "void for the records of 1" in call("verify", ledger.folder)


def test_a_certificate_holds_the_ledger_and_its_signature_is_good(ledger, tmp_path):
    first = exported(ledger, tmp_path)
    statement = first["statement"]
    assert statement["epsilon"] == composed(ledger.events(), 1e-4)
    assert statement["unit"] == "record"
    assert [e["task"] for e in statement["events"]] == ["surgery", "surgery", "skin"]
    assert "signature good" in call("verify", "--certificate", tmp_path / "c.json")
    assert "chain holds" in call("verify", ledger.folder, "--certificate", tmp_path / "c.json")
    assert stat.S_IMODE((ledger.folder / KEY).stat().st_mode) == 0o600
    # and stays true as the ledger grows
    ledger.charge(EVENT, Budget(100.0, 1e-4), "later", b"x")
    assert "chain holds" in call("verify", ledger.folder, "--certificate", tmp_path / "c.json")
    assert exported(ledger, tmp_path)["public_key"] == first["public_key"]
    with pytest.raises(UserError, match="name a file"):
        call("export", ledger.folder, "--out", tmp_path)


@pytest.mark.parametrize("change", [("epsilon", 0.1), ("delta", 1e-9), ("events", [])])
def test_a_changed_statement_is_refused(ledger, tmp_path, change):
    signed = exported(ledger, tmp_path)
    signed["statement"][change[0]] = change[1]
    (tmp_path / "c.json").write_text(json.dumps(signed))
    with pytest.raises(UserError, match="signature"):
        call("verify", "--certificate", tmp_path / "c.json")


def test_a_site_that_signs_a_smaller_epsilon_is_found_out(ledger, tmp_path, monkeypatch):
    monkeypatch.setattr("deal_core.privacy.certificate.composed", lambda *a: 0.5)
    exported(ledger, tmp_path)
    monkeypatch.undo()
    with pytest.raises(UserError, match="is not what its events say"):
        call("verify", "--certificate", tmp_path / "c.json")


def test_a_certificate_of_another_ledger_is_refused(ledger, tmp_path):
    exported(ledger, tmp_path)
    other = Ledger(tmp_path / "other")
    for n in range(3):
        other.charge(EVENT, Budget(100.0, 1e-4), f"r{n}", b"x")
    with pytest.raises(UserError, match="not of the ledger"):
        call("verify", other.folder, "--certificate", tmp_path / "c.json")


def test_what_is_no_ledger_or_certificate_is_one_line(tmp_path):
    for words in (("export", tmp_path), ("verify", tmp_path), ("verify",)):
        with pytest.raises(UserError):
            call(*words)
    for written, told in (("[]", "no certificate"), ("[" * 200_000, "cannot be read")):
        (tmp_path / "c.json").write_text(written)
        with pytest.raises(UserError, match=told):
            call("verify", "--certificate", tmp_path / "c.json")
    assert not (tmp_path / "ledger.sqlite").exists()


def test_a_tampered_ledger_is_not_certified(ledger, tmp_path):
    import sqlite3

    with sqlite3.connect(ledger.path) as db:
        db.execute("DROP TRIGGER events_DELETE")
        db.execute("DELETE FROM events WHERE seq = 3")
    for words in (("verify",), ("export", "--out", tmp_path / "c.json")):
        with pytest.raises(UserError, match="cannot be trusted"):
            call(words[0], ledger.folder, *words[1:])
    assert not (tmp_path / "c.json").exists()


def test_a_key_that_is_none_is_one_line_and_stays(ledger, tmp_path):
    (ledger.folder / KEY).write_bytes(b"cut")
    with pytest.raises(UserError, match="is no signing key; put it back from a backup"):
        call("export", ledger.folder, "--out", tmp_path / "c.json")
    assert (ledger.folder / KEY).read_bytes() == b"cut"
    assert not (tmp_path / "c.json").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda statement: [],
        lambda statement: {**statement, "events": [1, 2, 3]},
        lambda statement: {**statement, "entries": 3.0},
    ],
)
def test_what_is_signed_and_is_no_statement_is_one_line(ledger, tmp_path, change):
    signed = exported(ledger, tmp_path)
    statement = change(signed["statement"])
    key = Ed25519PrivateKey.generate()
    signed |= {
        "statement": statement,
        "public_key": base64.b64encode(key.public_key().public_bytes_raw()).decode(),
        "signature": base64.b64encode(key.sign(_bytes(statement))).decode(),
    }
    (tmp_path / "c.json").write_text(json.dumps(signed))
    with pytest.raises(UserError, match="certificate: "):
        call("verify", ledger.folder, "--certificate", tmp_path / "c.json")


def test_of_two_first_certificates_at_once_both_have_one_key(ledger, monkeypatch):
    """The other process has written its key when this one wants to."""
    link, first = os.link, Ed25519PrivateKey.generate()

    def second(source, target):
        target.write_bytes(first.private_bytes_raw())
        link(source, target)

    monkeypatch.setattr(os, "link", second)
    keys = {certificate(ledger)["public_key"] for _ in range(2)}
    assert keys == {base64.b64encode(first.public_key().public_bytes_raw()).decode()}
    assert [path.name for path in ledger.folder.glob(f"{KEY}*")] == [KEY]


def test_a_ledger_that_cannot_be_opened_is_not_called_untrustworthy(ledger):
    ledger.path.unlink()
    ledger.path.mkdir()
    with pytest.raises(UserError, match=r"ledger\.sqlite: cannot be used"):
        call("verify", ledger.folder)
