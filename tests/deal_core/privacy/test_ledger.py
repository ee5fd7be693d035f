"""What the site's book guarantees: append-only, once, before it leaves, within the budget."""

import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest

from deal_core.errors import UserError
from deal_core.privacy.accountant import DpEvent, epsilon_of
from deal_core.privacy.events import SET_ASIDE, Budget, BudgetSpent, composed, unprotected_event
from deal_core.privacy.ledger import KEPT_ANSWERS, Ledger, LedgerError
from tests.ledger_events import ledger_event

EVENT = ledger_event()
ALWAYS = ledger_event(sample_rate=1.0)
"""Composed sooner."""
WIDE = Budget(100.0, 1e-4)


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "site")


def test_events_outlive_the_process_and_compose(ledger):
    for n in range(3):
        assert ledger.charge(replace(EVENT, server_round=n), WIDE, f"r{n}", b"a") == b"a"
    again = Ledger(ledger.folder)
    assert [e.server_round for e in again.events()] == [0, 1, 2]
    one_run = epsilon_of([DpEvent(0.1, 1.5, 30)], (1 - SET_ASIDE) * 1e-4)
    assert composed(again.events(), 1e-4) == one_run


def test_the_same_request_is_charged_once_and_answered_with_the_same(ledger):
    assert ledger.answer("r") is None
    ledger.charge(EVENT, WIDE, "r", b"first")
    assert ledger.answer("r") == b"first"
    assert ledger.charge(EVENT, WIDE, "r", b"second") == b"first"
    assert len(ledger.events()) == 1


def test_a_budget_cannot_be_passed(ledger):
    budget = Budget(composed([EVENT, EVENT], 1e-4), 1e-4)
    for n in range(2):
        ledger.require(EVENT, budget)
        ledger.charge(EVENT, budget, f"r{n}", b"")
    with pytest.raises(BudgetSpent, match="per record"):
        ledger.require(EVENT, budget)
    with pytest.raises(BudgetSpent):
        ledger.charge(EVENT, budget, "r2", b"")
    assert len(ledger.events()) == 2
    assert ledger.answer("r2") is None
    assert ledger.answer("r1") == b""  # what is paid for stays free


def test_tasks_add_up_unless_records_are_disjoint(ledger):
    one = replace(EVENT, compared=True)
    other = replace(one, task="skin", sample_rate=0.05)
    events = [one, other]
    alone = [composed([event], 1e-4) for event in events]
    assert composed(events, 1e-4) > max(alone)
    assert composed(events, 1e-4, disjoint_tasks=True) == max(alone)
    everybody = replace(one, task="")
    assert composed([*events, everybody], 1e-4, disjoint_tasks=True) > max(alone)
    # a record may have moved since what was never compared: that counts in every task
    assert composed([EVENT, other], 1e-4, True) == composed([EVENT, other], 1e-4)


def test_disjoint_tasks_are_checked_by_ids(ledger):
    ledger.declare_members("one", ["a", "b"])
    ledger.declare_members("one", ["b", "c"])
    ledger.declare_members("two", ["d"])
    with pytest.raises(UserError, match="disjoint_tasks"):
        ledger.declare_members("two", ["e", "a"])
    ledger.declare_members("one", ["patient-4711"])  # kept as hashes alone
    kept = b"".join(path.read_bytes() for path in ledger.folder.iterdir())
    assert b"one" in kept
    assert b"4711" not in kept


def test_a_plan_is_made_once(ledger):
    ledger.charge(EVENT, WIDE, "r", b"")
    assert ledger.plan("run", lambda past: f"after {len(past)}") == "after 1"
    assert ledger.plan("run", lambda past: "another") == "after 1"
    assert ledger.plan("other", lambda past: "fresh") == "fresh"


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE events SET body = '{}'",
        "DELETE FROM events",
        "INSERT OR REPLACE INTO events VALUES (1, '{}', '')",
        "INSERT INTO events VALUES (7, '{}', '')",
        "UPDATE plans SET body = '{}'",
        "DELETE FROM plans",
        "INSERT OR REPLACE INTO plans VALUES ('run', '{}')",
        "UPDATE members SET task = 'two'",
        "DELETE FROM members",
        "INSERT OR REPLACE INTO members SELECT id, 'two' FROM members",
    ],
)
def test_the_database_itself_refuses_changes(ledger, statement):
    ledger.charge(EVENT, WIDE, "r", b"")
    ledger.plan("run", lambda past: "plan")
    ledger.declare_members("one", ["a"])
    with (
        closing(sqlite3.connect(ledger.path)) as db,
        pytest.raises(sqlite3.Error, match="append-only"),
    ):
        db.execute(statement)


def tamper(path, *statements):
    with closing(sqlite3.connect(path)) as db, db:
        for name in ("events_UPDATE", "events_DELETE", "events_in_order"):
            db.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            db.execute(statement)


@pytest.mark.parametrize(
    "statement",
    [
        """UPDATE events SET body = replace(body, '"steps": 10', '"steps": 1') WHERE seq = 2""",
        "DELETE FROM events WHERE seq = 2",
        "DELETE FROM events WHERE seq = 3",
        "DELETE FROM events",
        "UPDATE events SET seq = 9 WHERE seq = 3",
    ],
)
def test_changes_behind_its_back_are_noticed(ledger, statement):
    for n in range(3):
        ledger.charge(EVENT, WIDE, f"r{n}", b"")
    tamper(ledger.path, statement)
    noticed = "was changed or is gone|older state"
    with pytest.raises(LedgerError, match=noticed) as error:
        ledger.entries()
    assert error.type is LedgerError  # and not a disk that cannot be used
    with pytest.raises(LedgerError, match=noticed):
        ledger.charge(EVENT, WIDE, "r4", b"")


def test_an_older_copy_in_its_place_is_noticed(ledger, tmp_path):
    ledger.charge(EVENT, WIDE, "r1", b"")
    shutil.copy(ledger.path, tmp_path / "backup")
    ledger.charge(EVENT, WIDE, "r2", b"")
    for beside in ledger.folder.glob("ledger.sqlite*"):
        beside.unlink()
    shutil.copy(tmp_path / "backup", ledger.path)
    with pytest.raises(LedgerError, match="older state"):
        ledger.events()
    ledger.path.unlink()
    with pytest.raises(LedgerError, match="older state"):
        ledger.events()


def test_a_kill_between_the_two_files_costs_one_entry_of_what_the_head_knows(
    ledger, tmp_path, monkeypatch
):
    """The head stays that of the entry before: an older copy is noticed all the same."""
    ledger.charge(EVENT, WIDE, "r1", b"")
    shutil.copy(ledger.path, tmp_path / "backup")
    ledger.charge(EVENT, WIDE, "r2", b"")
    monkeypatch.setattr(Ledger, "_write_head", lambda self: None)
    ledger.charge(EVENT, WIDE, "r3", b"")
    assert len(ledger.events()) == 3
    shutil.copy(tmp_path / "backup", ledger.path)
    with pytest.raises(LedgerError, match="older state"):
        ledger.events()


def test_a_file_that_is_no_ledger_is_an_error_not_an_empty_one(ledger):
    ledger.folder.mkdir()
    ledger.path.write_bytes(b"rubbish" * 1000)
    with pytest.raises(LedgerError, match="not a database") as error:
        ledger.events()
    assert error.type is LedgerError


def test_a_write_while_somebody_reads_does_not_look_like_an_older_state(ledger, monkeypatch):
    """The reader has the events before the write; a head that it read later would be ahead."""
    ledger.charge(EVENT, WIDE, "r0", b"x")
    check = Ledger._check_head

    def after_a_write(self, *arguments):
        monkeypatch.setattr(Ledger, "_check_head", check)
        ledger.charge(replace(EVENT, server_round=1), WIDE, "r1", b"x")
        return check(self, *arguments)

    monkeypatch.setattr(Ledger, "_check_head", after_a_write)
    assert len(ledger.events()) == 1
    assert len(ledger.events()) == 2


def test_only_the_latest_answers_are_kept_and_all_events(ledger):
    for n in range(KEPT_ANSWERS + 3):
        ledger.charge(EVENT, WIDE, f"r{n}", b"x")
    assert ledger.answer("r2") is None
    assert ledger.answer("r3") == b"x"
    assert len(ledger.events()) == KEPT_ANSWERS + 3


def _charge_many(folder, budget, name):
    ledger = Ledger(folder)
    for n in range(20):
        try:
            ledger.charge(ALWAYS, budget, f"{name}-{n}", b"x")
        except BudgetSpent:
            return


def test_processes_that_charge_at_the_same_time_keep_the_budget(ledger):
    budget = Budget(composed([replace(ALWAYS, steps=30)], 1e-4), 1e-4)
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_charge_many, args=(ledger.folder, budget, name)) for name in "ab"
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(ledger.events()) == 3


def test_of_two_that_write_at_once_the_later_head_stays(ledger, monkeypatch):
    """The first comes to the second file last; it must not say that the other entry is gone."""
    write = Ledger._write_head
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_write_head", lambda self, *given: late.append(given))
        late = []
        ledger.charge(EVENT, WIDE, "first", b"x")
    ledger.charge(EVENT, WIDE, "second", b"x")
    write(ledger, *late[0])
    assert json.loads(ledger.head.read_text())["seq"] == 2


def test_an_older_copy_is_noticed_though_the_second_file_is_gone(ledger):
    """Whoever puts one file back may delete the other."""
    ledger.charge(EVENT, WIDE, "first", b"x")
    ledger.head.unlink()
    assert len(ledger.events()) == 1  # a kill between the two files
    for request in ("second", "third"):
        ledger.charge(EVENT, WIDE, request, b"x")
    ledger.head.unlink()
    with pytest.raises(LedgerError, match=r"is gone, .*; put both back from the latest backup"):
        ledger.events()


def test_unprotected_releases_are_noted_and_cost_nothing(ledger):
    ledger.charge(EVENT, WIDE, "r", b"x")
    before = composed(ledger.events(), 1e-4)
    ledger.note(unprotected_event("run", "none", ("surgery", "learn", 0, 1)))
    assert composed(ledger.events(), 1e-4) == composed(ledger.events(), 1e-4, True) == before
    assert [event.protected for event in ledger.events()] == [True, False]
    with pytest.raises(ValueError, match="is charged"):
        ledger.note(EVENT)
    for n in range(KEPT_ANSWERS + 1):
        ledger.note(unprotected_event("run", "none", ("surgery", "learn", 0, n)))
    assert ledger.answer("r") == b"x"  # notes push no answer out


def _die_in_transaction(folder):
    ledger = Ledger(folder)
    with ledger._transaction() as db:
        db.execute("INSERT INTO plans VALUES ('x', 'y')")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_before_the_commit_leaves_nothing_and_locks_nobody(ledger):
    ledger.charge(EVENT, WIDE, "r", b"x")
    worker = multiprocessing.get_context("fork").Process(
        target=_die_in_transaction, args=(ledger.folder,)
    )
    worker.start()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
    assert ledger.plan("x", lambda past: "fresh") == "fresh"
    assert len(ledger.events()) == 1
