"""Server and site as services: one of Flower's programs in the foreground, as a service manager
wants it, the systemd unit that keeps it running, and a backup of all that cannot be made again, as
it was at one moment, while it runs."""

import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from string import Template
from types import FrameType

from deal_core.atomic_write import rotated
from deal_core.errors import UserError
from deal_core.installed import ROOT
from server.folder import exclusive_lock, held, holder
from simulations.engines.flower import LOCAL, FlowerHome, dying_with, stop_all

COLOUR = re.compile(rb"\x1b\[[0-9;]*m")
UNTIMED = re.compile(rb"^([A-Z]+) *: +")
"""Begins a line of Flower's; those of its web server begin with time and level."""
STOP_SECONDS = 20.0
HUNG_SECONDS = 10.0
"""How long a program may live after it has said that it cannot go on."""
DATABASES = (".db", ".sqlite")
MADE_AGAIN = (".lock", ".pid", ".log", ".log.1", ".secret", "-wal", "-shm")
"""Ends of names: of what a process makes, and of parts of a database."""
SECRETS = "secure-sum"
NOT_KEPT = {"empty", "apps", "worker"}
"""Folders that Flower or a site's worker fills."""


def supervise(
    command: Sequence[str], home: FlowerHome, log: Path, pid: Path, fatal: str = ""
) -> int:
    """Start ``command``, pass on SIGINT and SIGTERM, and wait until it has ended.

    Args:
        command: the program.
        home: Flower's; gives environment and working directory.
        log: its output is appended, without colours.
        pid: holds the id of this process while it runs, and stays where it ends unasked.
        fatal: words in the log after which the program should end; where it hangs, it is ended.

    Returns:
        0 if it was asked to end, else its exit code, or 1 where that is 0 (a SuperNode that is
        refused says 0).

    Raises:
        UserError: another process does this already.
    """
    require_idle(pid)
    with exclusive_lock(pid.with_suffix(".lock")):
        rotated(log).touch()
        process = subprocess.Popen(
            list(command),
            cwd=home.empty,
            env=home.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=dying_with(os.getpid()),
        )
        writer = threading.Thread(
            target=_write_log, args=(process, log, fatal.encode()), daemon=True
        )
        writer.start()
        try:
            pid.write_text(f"{os.getpid()}\n")  # a full disk must leave no process behind
            with _forwarded(process) as asked:
                code = process.wait()
            if not asked.is_set():
                return code or 1
            pid.unlink(missing_ok=True)
            return 0
        finally:
            stop_all(home.path)
            process.wait()
            writer.join(STOP_SECONDS)


def require_idle(pid: Path, port: int = 0) -> None:
    """Check that no process does what is about to begin, or listens on its local port (0: none).

    Raises:
        UserError: one does; the message names it.
    """
    if held(lock := pid.with_suffix(".lock")):
        raise UserError(f"{pid.parent}: runs already{holder(lock)}; end that process first")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind((LOCAL, port))
        except OSError:
            raise UserError(
                f"port {port} is in use{holder(port=port)}; end that process, or set another "
                "superlink_port in server.toml"
            ) from None


def _write_log(process: subprocess.Popen[bytes], log: Path, fatal: bytes) -> None:
    """Write what the process says into its log, without colours and each line with its time, and
    end it where it hangs after ``fatal`` words. A disk that takes no more costs lines, and not the
    process."""
    assert process.stdout is not None
    hung = threading.Timer(HUNG_SECONDS, process.kill)
    hung.daemon = True
    with process.stdout as lines:
        for line in lines:
            if fatal and fatal in line and hung.ident is None:
                hung.start()
            with suppress(OSError), rotated(log).open("ab") as file:
                now = datetime.now(UTC).isoformat(timespec="milliseconds")[:-6]
                begin = rb"%sZ \1 [flwr] " % now.encode()
                file.write(UNTIMED.sub(begin, COLOUR.sub(b"", line)))
    hung.cancel()


@contextmanager
def _forwarded(process: subprocess.Popen[bytes]) -> Iterator[threading.Event]:
    """Within the block signals go to the process; the event tells that one has come."""
    asked = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        asked.set()
        process.terminate()
        signal.signal(signal.SIGALRM, lambda *_: process.kill())
        signal.alarm(int(STOP_SECONDS))

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


class _Placeholders(Template):
    """``@{name}``: neither nginx nor systemd nor TOML gives it another meaning."""

    delimiter = "@"


def filled(template: str, **words: object) -> str:
    """Return a file of the folder ``templates`` with ``words`` in the places of their names."""
    text = (Path(__file__).parent / "templates" / template).read_text(encoding="utf-8")
    return _Placeholders(text).substitute(words)


def quoted(value: Path | str) -> str:
    """Return one word of a configuration file, in quotes."""
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def unit(side: str, folder: Path, fixed: Sequence[Path], changed: Path) -> str:
    """Return the text of a systemd unit; what it runs can change nothing but its state.

    Args:
        side: ``server`` or ``site``.
        folder: of ``deal server init`` or ``deal site init``; its owner runs the service.
        fixed: what the service may read only.
        changed: the one folder that it may write.
    """
    # Below a home the strict setting would hide the folder itself.
    homes = {Path("/home"), Path("/root")}

    def word(value: Path | str) -> str:
        return quoted(value).replace("%", "%%")

    places = [folder, ROOT, Path(sys.executable), *fixed]
    hidden = any(homes & set(place.parents) for place in places)
    try:
        owner = folder.owner()
    except KeyError:
        owner = str(folder.stat().st_uid)
    return filled(
        "unit.service",
        side=side,
        user=owner,
        python=word(sys.executable).replace("$", "$$"),  # variables are put into a command
        folder=word(folder).replace("$", "$$"),
        fixed=" ".join(map(word, fixed)),
        changed=word(changed),
        plain_folder=str(folder).replace("%", "%%"),
        environment=word(f"PYTHONPATH={ROOT}"),
        home="read-only" if hidden else "yes",
    )


def backup(sources: Mapping[str, Path], to: Path) -> str:
    """Copy files and folders, by their names in a new folder (empty: what is in the folder), which
    is there whole or not at all.

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
    above = takewhile("runs".__ne__, path.parts[:-1])  # the server has named what is below
    made = not NOT_KEPT.isdisjoint(above)
    return made or path.name.endswith(MADE_AGAIN) or path.name.startswith(SECRETS)


def copy_database(source: Path, target: Path) -> None:
    """Copy a database as it is at one moment, with what its journal holds."""
    with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(target)) as new:
        old.backup(new)
        (said,) = new.execute("PRAGMA integrity_check").fetchone()
        if said != "ok":
            raise sqlite3.DatabaseError(f"{source}: {said}")
    shutil.copymode(source, target)
