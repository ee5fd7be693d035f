"""A site's ledger, checked and certified; and its page, which says what it holds, and no secret."""

import base64
import json
import os
import sqlite3
import stat
from contextlib import closing
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from client.egress import FIELDS
from deal_core.errors import UserError
from deal_core.privacy.certificate import KEY, _bytes, certificate
from deal_core.privacy.events import Budget, composed, unprotected_event
from deal_core.privacy.ledger import Ledger
from server.results import rounded_up
from simulations.cli import app
from simulations.report.ledger import in_chances
from tests.ledger_events import ledger_event
from tests.simulations.report.html_page import HtmlPage

EVENT = ledger_event(run="67a2bfa05a7dd3f4")
SITE = """
[site]
name = "north"
[server]
address = "federation.example.org:9443"
[data]
path = "secret-folder"
labels = { surgery = ["yes", "no"], skin = ["a", "b"] }
[policy]
mechanism = "record"
max_epsilon = 6.0
"""


@pytest.fixture
def ledger(tmp_path):
    """Two tasks of a run, three rounds."""
    ledger = Ledger(tmp_path / "state")
    for n, task in enumerate(["surgery", "surgery", "skin"]):
        event = replace(EVENT, task=task, server_round=n + 1)
        ledger.charge(event, Budget(100.0, 1e-4), f"r{n}", b"an answer")
    ledger.plan("67a2bfa05a7dd3f4", lambda past: '{"epsilon": 8.0, "delta": 1e-4, "units": 300}')
    return ledger


def deal(*words):
    """The output of ``deal WORDS``; a user's error is raised."""
    result = CliRunner().invoke(app, [*map(str, words)])
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def call(*words):
    return deal("ledger", *words)


def page(ledger):
    deal("report", "--privacy", ledger.folder)
    return HtmlPage((ledger.folder / "privacy.html").read_text(encoding="utf-8"))


def test_the_promise_is_that_of_the_ledger_with_all_that_it_means(ledger):
    epsilon = composed(ledger.events(), 1e-4)
    shown = page(ledger)
    for part in (
        f"have spent epsilon = {rounded_up(epsilon, 4)} at delta = 0.0001 "
        "(n delta = 0.03 of n = 300) per record",
        "composed over all protected releases of the ledger: all runs, tasks and rounds",
        "It holds against everybody but the keeper of this ledger",
        "one in 10,000",
        "Limit 8 of the runs' plans",
        "Releases 3",
        "Without protection 0",
        "chain verified",
    ):
        assert part in shown.text
    assert "imulation only" not in shown.text


@pytest.mark.parametrize(
    ("epsilon", "told"),
    [(1.0, "at most 2.8 times"), (3.0, "at most 21 times"), (25.0, "promises next to nothing")],
)
def test_chances_are_never_told_smaller_than_they_may_be(epsilon, told):
    assert told in in_chances(epsilon, 1e-5, "record")


HONEST = "all sites but 1, which may pool what they know with the server"


def test_noise_that_others_share_makes_the_promise_count_on_them(ledger):
    ledger.charge(replace(EVENT, assumes=HONEST), Budget(100.0, 1e-4), "shared", b"an answer")
    shown = page(ledger)
    assert f"Assumed honest: {HONEST}." in shown.text
    assert "None of them has to be honest" not in shown.text
    assert "1 × record, noise in a sum" in shown.text
    assert "3 × record" in shown.text


def test_every_charge_is_there_by_run_and_task(ledger):
    shown = page(ledger)
    rows = [dict(zip(r[0], row, strict=True)) for r in [shown.table("Charges")] for row in r[1:]]
    assert [(row["run"], row["task"], row["releases"], row["steps"]) for row in rows] == [
        ("67a2bfa0", "surgery", "2", "20"),
        ("67a2bfa0", "skin", "1", "10"),
    ]
    for row, events in zip(rows, (ledger.events()[:2], ledger.events()[2:]), strict=True):
        assert row["epsilon, alone"] == rounded_up(composed(events, 1e-4), 4)
        assert (row["noise multiplier"], row["clipping bound"]) == ("1.5", "1")
    assert ledger.entries()[-1].hash in shown.text


def test_what_may_leave_is_the_list_of_the_guard_itself(ledger):
    rows = page(ledger).table("May be sent, and why")
    sent = {row[0] for row in rows[1:]}
    fields = {name for record in FIELDS.values() for name in record}
    assert sent == fields | {"factors"}


def test_the_site_and_its_limit_are_named_and_no_path_of_it(ledger, tmp_path):
    (tmp_path / "site.toml").write_text(SITE)
    shown = page(ledger)
    assert shown.text.startswith("north – Record of private releases")
    assert "Limit 6 of the site's policy" in shown.text
    assert "surgery, skin" in shown.text
    for secret in ("secret-folder", str(tmp_path), "federation.example.org"):
        assert secret not in shown.text
    (tmp_path / "site.toml").write_text(SITE.replace('"north"', '"north"\nstate = "other"'))
    assert "north" not in page(ledger).text  # it is the file of another state directory


def test_a_site_file_that_cannot_be_used_hides_no_limit(ledger, tmp_path):
    for text in (SITE.replace("[policy]", "[policy"), SITE.replace("max_epsilon", "max_epsilom")):
        (tmp_path / "site.toml").write_text(text)
        with pytest.raises(UserError, match=r"site\.toml: ") as caught:
            page(ledger)
        assert "\n" not in str(caught.value)
    assert not (ledger.folder / "privacy.html").exists()


def test_what_left_unprotected_or_with_seeded_noise_cannot_be_missed(ledger):
    ledger.note(unprotected_event("another", "clear-counts", ("", "evaluate", 0, 0)))
    ledger.note(unprotected_event("another", "none", ("skin", "learn", 0, 1)))
    ledger.charge(replace(EVENT, simulation_only=True), Budget(100.0, 1e-4), "seeded", b"x")
    shown = page(ledger)
    assert "Simulation only" in shown.text
    assert "2 releases left without protection. For the records" in shown.text
    assert "Epsilon of the protected releases alone" in shown.text
    assert "Epsilon spent" not in shown.text
    assert "It is void for the records of 2 releases" in shown.text
    assert [row[-2] for row in shown.table("Charges")[3:5]] == ["no bound", "no bound"]
    assert "the counts left as they are" in shown.text


def test_tasks_in_parallel_only_where_they_were_compared(ledger, tmp_path):
    sequential = composed(ledger.events(), 1e-4)
    site = f"{SITE}disjoint_tasks = true\n".replace("[data]", '[data]\nid_column = "patient"')
    (tmp_path / "site.toml").write_text(site)
    assert f"epsilon = {rounded_up(sequential, 4)} at delta" in page(ledger).text
    for n, task in enumerate(("skin", "hand")):
        ledger.declare_members(task, [f"record of {task}"])
        event = replace(EVENT, task=task, compared=True)
        ledger.charge(event, Budget(100.0, 1e-4), f"compared {n}", b"an answer")
    epsilon = composed(ledger.events(), 1e-4, disjoint_tasks=True)
    assert sequential < epsilon < composed(ledger.events(), 1e-4)
    shown = page(ledger)
    assert f"have spent epsilon = {rounded_up(epsilon, 4)} at delta" in shown.text
    assert "as the site declares them disjoint" in shown.text
    assert "record of" not in " ".join(shown.words)


def test_a_ledger_that_was_changed_or_is_none_is_neither_shown_nor_certified(ledger, tmp_path):
    with pytest.raises(UserError, match="no ledger"):
        page(Ledger(tmp_path / "empty"))
    assert not (tmp_path / "empty").exists()
    with closing(sqlite3.connect(ledger.path)) as db, db:
        db.execute("DROP TRIGGER events_DELETE")
        db.execute("DELETE FROM events WHERE seq = 3")
    for words in (
        ("ledger", "verify", ledger.folder),
        ("ledger", "export", ledger.folder, "--out", tmp_path / "c.json"),
        ("report", "--privacy", ledger.folder),
    ):
        with pytest.raises(UserError, match="cannot be trusted"):
            deal(*words)
    assert not (tmp_path / "c.json").exists()
    assert not (ledger.folder / "privacy.html").exists()


def exported(ledger, tmp_path):
    call("export", ledger.folder, "--out", tmp_path / "c.json")
    return json.loads((tmp_path / "c.json").read_text())


def test_verify_says_what_was_spent_and_what_epsilon_means(ledger):
    spent = f"epsilon {rounded_up(composed(ledger.events(), 1e-4), 4)} at delta"
    text = call("verify", ledger.folder)
    assert all(part in text for part in ("chain holds", spent, "per record"))
    ledger.charge(replace(EVENT, simulation_only=True), Budget(100.0, 1e-4), "seeded", b"x")
    ledger.note(unprotected_event("another", "none", ("skin", "learn", 0, 1)))
    text = call("verify", ledger.folder)
    assert all(part in text for part in ("void for the records of 1", "simulation only"))


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
