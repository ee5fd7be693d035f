"""What a client keeps between requests, in its own folder, on disk: what methods carry on, the
answers and class sums that it has given, and what the server has sent for good.

Keyed by place in the run: a request that is repeated, after a crash or a resume, finds what it
found the first time, and gets the same answer: training again would cost time, and, with noise,
release a second look at the same data. Requests with other settings are of another run, and find
nothing: what was made without noise must not reach an update whose noise is for less.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message
from numpy.typing import NDArray

from deal_core.atomic_write import atomic_write
from deal_core.lora.payload import PayloadError
from deal_core.wire.records import DIGEST, LARGEST, RECORD, check_files, record_digest

if TYPE_CHECKING:
    from deal_core.deal.interface import Tensors
    from deal_core.privacy.interface import LocalUpdate
    from deal_core.wire.instruction import Instruction

OWNER_ALONE = 0o600
KEPT_ROUNDS = 2
"""Of answers: a checkpoint is never more than one round behind."""
RETAINED = "retained.safetensors"
ADAPTER, DIGEST_FILE = "adapter", "adapter.sha256"
"""Of a finished run, below its folder: that of the adapter's files, and the digest beside it."""


@contextmanager
def alone(folder: Path, lock: str) -> Iterator[None]:
    """Within the block no other process, or thread, is in one of the same folder and lock. It ends
    with the process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(folder / lock, os.O_CREAT | os.O_WRONLY, OWNER_ALONE)) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def folder_of(place: Path, run: str) -> Path:
    """Return where a site keeps what belongs to a run, of these very settings; of a simulated
    client, which protects nothing, the name of the run is empty."""
    return place / f"kept-{hashlib.sha256(run.encode()).hexdigest()[:32]}"


def forget(folder: Path) -> None:
    """Drop what earlier runs kept, in this folder and beside it; called after the first round of
    this one, whose own files stay."""
    for other in folder.parent.glob("kept-*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    for kind in ("task", "round", "feedback"):
        _drop(folder, kind, {folder / f"{kind}-0-1.safetensors"})


@dataclass(frozen=True)
class TaskStore:
    """What a method keeps from task to task (:class:`deal_core.deal.interface.TaskMemory`)."""

    folder: Path
    """The site's own; made when first needed."""

    def get_or_compute(
        self, tasks: int, basis: str, make: Callable[[int, Tensors], Tensors]
    ) -> Tensors:
        """Return what is kept of so many tasks; at first made from what fewer have left. That
        stays as well, so a request that is repeated finds it."""
        path = self._path(tasks)
        kept = _read_tensors(path, basis)
        if kept is not None:
            return kept
        before = next((n for n in range(tasks - 1, 0, -1) if self._path(n).exists()), 0)
        made = make(before, _read_tensors(self._path(before)) or {})
        _write_tensors(path, made, basis)
        _drop(self.folder, "task", {path, self._path(before)})
        return made

    def _path(self, tasks: int) -> Path:
        return self.folder / f"task-{tasks}.safetensors"


@dataclass(frozen=True)
class RoundStore:
    """What is carried from round to round of a task: by a method (see
    :class:`deal_core.deal.interface.RoundState`), or what a lossy format lost (``feedback``)."""

    folder: Path
    """The site's own; made when first needed."""
    stage: int
    server_round: int
    kind: str = "round"

    def load(self, basis: str) -> Tensors:
        """Return what the client's latest round of this task before this one left; empty where
        there was none, or another basis (in other coordinates it has no meaning)."""
        before = self._before()
        return (_read_tensors(before, basis) or {}) if before is not None else {}

    def save(self, basis: str, tensors: Tensors) -> None:
        """Keep this, and what :meth:`load` returns: a request that is repeated finds it."""
        path = self._path(self.server_round)
        _write_tensors(path, tensors, basis)
        _drop(self.folder, self.kind, {path, self._before()})

    def _before(self) -> Path | None:
        # Of those that are there: a server may count as far as it likes.
        start = f"{self.kind}-{self.stage}-"
        names = (path.stem for path in self.folder.glob(f"{start}*.safetensors"))
        numbers = (name.removeprefix(start) for name in names)
        earlier = [int(n) for n in numbers if n.isdecimal() and 0 < int(n) < self.server_round]
        return self._path(max(earlier)) if earlier else None

    def _path(self, server_round: int) -> Path:
        return self.folder / f"{self.kind}-{self.stage}-{server_round}.safetensors"


def _write(path: Path, arrays: Mapping[str, NDArray[Any]], **said: str) -> None:
    from safetensors.numpy import save

    whole = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
    atomic_write(path, save(whole, said))


def _read(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The arrays of a file, and what it says beside them; nothing of one that cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return arrays, dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}, {}


def _write_tensors(path: Path, tensors: Tensors, basis: str) -> None:
    _write(path, {key: value.numpy() for key, value in tensors.items()}, basis=basis)


def _read_tensors(path: Path, basis: str | None = None) -> Tensors | None:
    """The tensors of a file; None where there is none, or one with another basis than asked for."""
    import torch

    arrays, said = _read(path)
    if "basis" not in said or (basis is not None and said["basis"] != basis):
        return None
    return {key: torch.from_numpy(value) for key, value in arrays.items()}


def _drop(folder: Path, kind: str, kept: set[Path | None]) -> None:
    for old in folder.glob(f"{kind}-*.safetensors"):
        if old not in kept:
            old.unlink()


def update_once(
    folder: Path, request: str, instruction: Instruction, make: Callable[[], LocalUpdate]
) -> LocalUpdate:
    """Return a site's answer to a request: the one that is kept, or what ``make`` gives, which is
    on disk before it is returned. One at a time: of two that are asked the same at once, the
    second gets what the first has made. What ``make`` raises is not kept; ``request`` names all
    that is asked (``ClientRequest.name``)."""
    path = folder / f"update-{instruction.stage}-{instruction.server_round}.safetensors"
    with alone(folder, "updates.lock"):
        arrays, said = _read(path)
        if said.get("asked") == request:
            from deal_core.privacy.interface import LocalUpdate

            return LocalUpdate(arrays, json.loads(said["figures"]))
        update = make()
        write_update(path, request, update)
        files = sorted(folder.glob("update-*.safetensors"), key=os.path.getmtime)
        for old in files[:-KEPT_ROUNDS]:
            old.unlink()
    return update


def write_update(path: Path, request: str, update: LocalUpdate) -> None:
    """Keep an update with the name of all that was asked."""
    _write(path, update.arrays, asked=request, figures=json.dumps(dict(update.figures)))


def sums_once(
    folder: Path, task: str, form: tuple[str, int], make: Callable[[], NDArray[np.int64]]
) -> tuple[NDArray[np.int64], tuple[str, int]]:
    """Return what a site has given of a task's class sums, and in which form; where nothing was,
    what ``make`` returns, which is on the disk by then.

    Two sums of one site, of which the second has one record more, tell that record. So the site
    keeps what it gave first, noise included, and gives the same again in every later run, whatever
    has become of its data. Sums in other directions, or of another model, would be a second
    release: the gate lets none leave.
    ``form``: all that decides how records are added up, but the records; and of how many equal
    shares the noise is one."""
    path = folder / f"{hashlib.sha256(task.encode()).hexdigest()[:32]}.npz"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with alone(folder, "sums.lock"):  # two runs may ask at once, in two processes
        if path.exists():
            kept: dict[str, NDArray[Any]] = dict(np.load(path, allow_pickle=False))
            return kept["sums"], (str(kept["made_as"]), int(kept["shares"]))
        sums, buffer = make(), BytesIO()
        np.savez(buffer, sums=sums, made_as=np.array(form[0]), shares=np.array(form[1]))
        atomic_write(path, buffer.getvalue(), mode=OWNER_ALONE, for_good=True)
    return sums, form


class RetainedMissing(Exception):
    """The request names a retained adapter that this client lacks, because its folder is gone or
    was damaged: it asks to be sent it again."""

    code = "resend"


def load_retained(folder: Path, digest: str) -> ArrayRecord:
    """Return the adapter that was sent last, by its digest, or raise RetainedMissing."""
    raw, said = _read(folder / RETAINED)
    try:
        arrays = {
            key: Array(dtype, tuple(shape), stype, raw[key].tobytes())
            for key, (dtype, shape, stype) in json.loads(said["headers"]).items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RetainedMissing("no retained adapter is kept here") from None
    record = ArrayRecord(arrays)
    if record_digest(record) != digest:
        raise RetainedMissing("another retained adapter is kept here")
    return record


def save_retained(folder: Path, record: ArrayRecord) -> None:
    """Keep a record in the place of the one before. A disk that is full costs the bytes of
    another message, and no answer."""
    headers = {key: (a.dtype, list(a.shape), a.stype) for key, a in record.items()}
    raw = {key: np.frombuffer(a.data, np.uint8) for key, a in record.items()}
    with suppress(OSError):
        _write(folder / RETAINED, raw, headers=json.dumps(headers))


def store_adapter(run: Path, message: Message) -> None:
    """Keep the adapter of a finished run, in which the site has worked; it takes the place of an
    earlier one of the run. Written beside, then renamed; the digest comes last, so that half a
    folder has none.

    Raises:
        PayloadError: the site has not worked in the run, or the files are not what is expected.
    """
    if not run.is_dir():
        raise PayloadError("this site has not worked in the run")
    content = message.content
    if set(content) != {RECORD, DIGEST}:
        raise PayloadError(f"records other than {RECORD}, {DIGEST}")
    stated = str(content.config_records[DIGEST].get("sha256", ""))
    arrays = content.array_records[RECORD]
    if sum(len(array.data) for array in arrays.values()) > 2 * LARGEST:
        raise PayloadError(f"{RECORD}: more than {LARGEST} bytes")
    try:
        numbers = {name: array.numpy() for name, array in arrays.items()}
    except (TypeError, ValueError):
        raise PayloadError(f"{RECORD}: an array that is none") from None
    files = check_files(numbers, stated)
    folder, beside = run / ADAPTER, run / f"{ADAPTER}.writing"
    shutil.rmtree(beside, ignore_errors=True)
    for name, data in files.items():
        atomic_write(beside / name, data)
    (run / DIGEST_FILE).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
    beside.rename(folder)
    atomic_write(run / DIGEST_FILE, stated + "\n")
