"""The site's book of every private release: what was spent, on what, for ever.

The ledger belongs to the site and lives in its state directory. It outlives processes, runs and
tasks, and holds mechanism events, not epsilons: what they cost together is composed anew from all
of them whenever it is asked.

* **Append-only.** Triggers refuse to change or delete an event; every event carries the hash of
  the one before, and the last hash stands in a second file, so an older copy of the ledger put in
  its place is noticed (as long as that file is not put back with it).
* **Before it leaves.** An event and the answer that it paid for are written in one transaction,
  flushed to the disk, before the answer is returned. A kill leaves both or neither.
* **Once.** A request that is answered already gets the same answer, and costs nothing.
* **Composition.** Sequential over everything, tasks included. Where the site declares that no
  record is in two tasks, a record's epsilon is the largest of one task, over the events before
  which the ids of the records were checked (:meth:`Ledger.declare_members`), and all others.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deal_core.atomic_write import atomic_write
from deal_core.errors import UserError
from deal_core.privacy.events import RECORD, Budget, LedgerEvent, require_standing, require_within

FILE = "ledger.sqlite"
LOOK = "see who may enter and write the folder, and that the disk has room"
KEPT_ANSWERS = 8
"""The latest answers of a site; an older request that comes again is charged again."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS events (seq INTEGER PRIMARY KEY, body TEXT NOT NULL, hash TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS answers (
    request TEXT PRIMARY KEY, seq INTEGER NOT NULL, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS plans (run TEXT PRIMARY KEY, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS members (id TEXT PRIMARY KEY, task TEXT NOT NULL);
CREATE TRIGGER IF NOT EXISTS events_in_order BEFORE INSERT ON events
WHEN NEW.seq <> (SELECT COALESCE(MAX(seq), 0) + 1 FROM events)
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS plans_once BEFORE INSERT ON plans
WHEN EXISTS (SELECT 1 FROM plans WHERE run = NEW.run)
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS members_once BEFORE INSERT ON members
WHEN EXISTS (SELECT 1 FROM members WHERE id = NEW.id)
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
"""
FROZEN = """
CREATE TRIGGER IF NOT EXISTS {table}_{verb} BEFORE {verb} ON {table}
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
"""


class LedgerError(RuntimeError):
    """The ledger cannot be trusted, or used; the site takes no part until somebody looks."""


class LedgerUnusable(LedgerError):
    """Disk or folder do not let it be read or written; it may well be whole."""


@dataclass(frozen=True)
class Entry:
    """An event as it stands in the ledger: its number (from 1), when (UTC), what, and the hash
    that seals it with all before."""

    seq: int
    time: str
    event: LedgerEvent
    hash: str


@dataclass(frozen=True)
class Ledger:
    """Attributes: ``folder``, the site's state directory; made when first written."""

    folder: Path

    @property
    def path(self) -> Path:
        """The database."""
        return self.folder / FILE

    @property
    def head(self) -> Path:
        """Number and hash of the last event, beside the database."""
        return self.folder / "ledger.head"

    def entries(self) -> list[Entry]:
        """Return all entries, after a check of the whole chain.

        Raises:
            LedgerError: an entry was changed, or is gone.
        """
        with self._open() as db:
            return self._entries(db)

    def events(self) -> list[LedgerEvent]:
        """As :meth:`entries`, without seals."""
        return [entry.event for entry in self.entries()]

    def answer(self, request: str) -> bytes | None:
        """Return what was answered to this request, if it is kept."""
        with self._open() as db:
            row = db.execute("SELECT body FROM answers WHERE request = ?", (request,)).fetchone()
        return None if row is None else bytes(row[0])

    def plan(self, run: str, make: Callable[[Sequence[LedgerEvent]], str]) -> str:
        """Return the plan of a run: made once, from the events before it, then the same for
        ever."""
        with self._transaction() as db:
            row = db.execute("SELECT body FROM plans WHERE run = ?", (run,)).fetchone()
            if row is not None:
                return str(row[0])
            body = make([entry.event for entry in self._entries(db)])
            db.execute("INSERT INTO plans VALUES (?, ?)", (run, body))
            return body

    def plans(self) -> dict[str, str]:
        """Return run to its plan, as it was made."""
        with self._open() as db:
            return {str(run): str(body) for run, body in db.execute("SELECT run, body FROM plans")}

    def require(self, event: LedgerEvent, budget: Budget) -> None:
        """Check, before anything is trained, that there is budget for one more event.

        Raises:
            BudgetSpent, MixedUnits: there is not, or the ledger holds releases of another unit.
        """
        require_within([*self.events(), event], budget)

    def answer_within(self, request: str, budget: Budget) -> bytes | None:
        """Return what was answered to this request, if it is kept, to be sent again: all that is
        charged must be within the budget of today.

        Raises:
            BudgetSpent, MixedUnits: it is not.
        """
        kept = self.answer(request)
        if kept is not None:
            require_standing(self.events(), budget)
        return kept

    def charge(self, event: LedgerEvent, budget: Budget, request: str, answer: bytes) -> bytes:
        """Return the answer that may now leave, after the event and the answer were written,
        durably; of a request that has been answered before the earlier one, and nothing written.

        Raises:
            BudgetSpent, MixedUnits: another process has used the budget meanwhile, or written
                releases of another unit; nothing is written.
        """
        with self._transaction() as db:
            row = db.execute("SELECT body FROM answers WHERE request = ?", (request,)).fetchone()
            if row is not None:
                return bytes(row[0])
            entries = self._entries(db)
            require_within([*(entry.event for entry in entries), event], budget)
            seq = self._append(db, entries, event)
            db.execute("INSERT INTO answers VALUES (?, ?, ?)", (request, seq, answer))
            old = "SELECT seq FROM answers ORDER BY seq DESC LIMIT -1 OFFSET ?"
            db.execute(f"DELETE FROM answers WHERE seq IN ({old})", (KEPT_ANSWERS,))
        self._write_head()
        return answer

    def note(self, event: LedgerEvent) -> None:
        """Write an unprotected release, durably; there is no budget that it could fit.

        Raises:
            ValueError: the event is one that a budget pays for.
        """
        if event.protected:
            raise ValueError("a protected release is charged, not noted")
        with self._transaction() as db:
            self._append(db, self._entries(db), event)
        self._write_head()

    def declare_members(self, task: str, ids: Collection[str], unit: str = RECORD) -> None:
        """Note which records (or groups) a task has, as hashes.

        Raises:
            UserError: one of them is in another task.
        """
        hashed = [hashlib.sha256(f"record {each}".encode()).hexdigest() for each in ids]
        with self._transaction() as db:
            for one in hashed:
                row = db.execute("SELECT task FROM members WHERE id = ?", (one,)).fetchone()
                if row is not None and row[0] != task:
                    raise UserError(
                        f"a {unit} of task '{task}' is in task '{row[0]}' as well, but "
                        "disjoint_tasks says that none is; set it to false in the site's policy "
                        f"(in a simulation: in [privacy]), or separate the {unit}s"
                    )
                if row is None:
                    db.execute("INSERT INTO members VALUES (?, ?)", (one, task))

    def _entries(self, db: sqlite3.Connection) -> list[Entry]:
        entries: list[Entry] = []
        head = self._read_head()  # first: somebody may write meanwhile, and a head may be behind
        for seq, body, sealed in db.execute("SELECT seq, body, hash FROM events ORDER BY seq"):
            before = entries[-1].hash if entries else ""
            if seq != len(entries) + 1 or _seal(before, body) != sealed:
                raise LedgerError(f"{self.path}: entry {len(entries) + 1} was changed or is gone")
            fields = json.loads(body)
            if fields.pop("seq") != seq:
                raise LedgerError(f"{self.path}: entry {seq} stands in another place")
            entries.append(Entry(seq, fields.pop("time"), LedgerEvent(**fields), sealed))
        self._check_head(head, entries)
        return entries

    def _read_head(self) -> tuple[int, str] | None:
        """Return number and hash that the second file says; None: there is none."""
        try:
            known = json.loads(self.head.read_text(encoding="utf-8"))
            return int(known["seq"]), str(known["hash"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            raise LedgerError(f"{self.head}: cannot be read") from None

    def _check_head(self, head: tuple[int, str] | None, entries: Sequence[Entry]) -> None:
        """Check the second file: it may be one entry behind (a kill between the two), never ahead,
        and missing after the first entry at most.

        Raises:
            LedgerError: it is not so.
        """
        if head is None:
            if len(entries) > 1:
                raise LedgerError(
                    f"{self.head}: is gone, and nothing else tells whether {self.path} was "
                    "put back to an older state; put both back from the latest backup"
                )
            return
        seq, sealed = head
        if seq > len(entries) or (seq and entries[seq - 1].hash != sealed):
            raise LedgerError(
                f"{self.path}: holds {len(entries)} entries, but {seq} were written; it was put "
                "back to an older state"
            )

    def _append(self, db: sqlite3.Connection, entries: Sequence[Entry], event: LedgerEvent) -> int:
        """Seal an event on to the chain; return its number. From the first on there is a head."""
        if not entries:
            atomic_write(self.head, json.dumps({"seq": 0, "hash": ""}))
        seq = len(entries) + 1
        body = _body(seq, event)
        sealed = _seal(entries[-1].hash if entries else "", body)
        db.execute("INSERT INTO events VALUES (?, ?, ?)", (seq, body, sealed))
        return seq

    def _write_head(self) -> None:
        """Under the ledger's lock, from what it holds: two processes that have both just written
        leave the head of the later one, in whatever order they come here."""
        with self._transaction() as db:
            last = "SELECT seq, hash FROM events ORDER BY seq DESC LIMIT 1"
            seq, sealed = db.execute(last).fetchone()
            atomic_write(self.head, json.dumps({"seq": seq, "hash": sealed}))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Alone with the ledger; all of the block is on the disk after it, or nothing."""
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=60, isolation_level=None)) as db:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = FULL")
                _prepare(db)
                yield db
        except sqlite3.OperationalError as error:
            raise LedgerUnusable(f"{self.path}: cannot be used ({error}); {LOOK}") from None
        except sqlite3.DatabaseError as error:
            raise LedgerError(f"{self.path}: {error}") from None
        except OSError as error:
            reason = error.strerror
            raise LedgerUnusable(f"{self.folder}: cannot be used ({reason}); {LOOK}") from None


def _prepare(db: sqlite3.Connection) -> None:
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'members_once'").fetchone():
        return
    frozen = [("events", v) for v in ("UPDATE", "DELETE")] + [("plans", "UPDATE")]
    frozen += [("plans", "DELETE"), ("members", "UPDATE"), ("members", "DELETE")]
    triggers = "".join(FROZEN.format(table=table, verb=verb) for table, verb in frozen)
    db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} {triggers} COMMIT;")


def _body(seq: int, event: LedgerEvent) -> str:
    fields: dict[str, Any] = asdict(event)
    fields |= {"seq": seq, "time": datetime.now(UTC).isoformat(timespec="seconds")}
    return json.dumps(fields, sort_keys=True)


def _seal(before: str, body: str) -> str:
    return hashlib.sha256(f"{before}\n{body}".encode()).hexdigest()
