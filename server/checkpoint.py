"""Checkpoints: the state of a run as a file, of which the one before is kept, and the commit that
ran."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from deal_core.atomic_write import atomic_path
from deal_core.errors import UserError
from deal_core.lora.adapter import Adapter
from deal_core.lora.arrays import from_arrays, to_arrays
from deal_core.lora.payload import DISTILLED, HEADS, LORA, RESIDUAL, SUMS, Template
from deal_core.lora.state import State
from server.folder import previous_checkpoint
from server.results import Spending

ROOT = Path(__file__).resolve().parents[1]
"""The checkout, where the package was not installed from a wheel or sent by Flower."""


def commit(root: Path = ROOT) -> str:
    """Return the hash of the commit, with ``-dirty`` where files differ from it.

    Args:
        root: folder of the checkout. A folder that merely lies in another repository, as that of
            an installed package may, is none.

    Returns:
        Empty where there is no checkout, or no git.
    """
    if not (root / ".git").exists():
        return ""
    asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*asked, "--exclude=*"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


VERSION = 6
"""Of the file and of the schedule that ``position`` counts in."""
EVERYBODY = "sum"
"""In the place of a client: the counts are those of all of them together."""


class History(BaseModel):
    """What has been measured so far.

    Attributes:
        evaluations: one per evaluation, zero-shot first: client to ``[correct, examples]``
            per task, or ``[correct, examples, correct_all]`` (:mod:`deal_core.wire.records`);
            ``sum`` to those of all clients, where nobody sees more; empty: none are known.
        bytes_up, bytes_down, aggregation_error: one number a round; the last None where it is
            not known.
        evaluation_bytes_down: one number for each evaluation that no round has carried.
        seconds: per phase (``train``, ``evaluate``), over all starts of the run.
        peak_rss_bytes: largest over the starts.
        distrusted: clients that a robust rule left out when it last had an update of theirs.
        spent: client to what its privacy has cost, all rounds and tasks together.
    """

    model_config = ConfigDict(frozen=True)

    evaluations: tuple[dict[str, list[list[int | float]]], ...] = ()
    bytes_up: tuple[float, ...] = ()
    bytes_down: tuple[float, ...] = ()
    evaluation_bytes_down: tuple[float, ...] = ()
    aggregation_error: tuple[float | None, ...] = ()
    seconds: dict[str, float] = {}
    peak_rss_bytes: int = 0
    distrusted: tuple[str, ...] = ()
    spent: dict[str, Spending] = {}

    def charged(self, spent: Mapping[str, Spending]) -> History:
        """Replace what the clients of a round had spent before."""
        return self.model_copy(update={"spent": {**self.spent, **spent}})

    def judged(self, clients: Collection[str], excluded: Collection[str]) -> History:
        """Replace what is known of the clients of a round by its verdict."""
        distrusted = (set(self.distrusted) - set(clients)) | set(excluded)
        return self.model_copy(update={"distrusted": tuple(sorted(distrusted))})

    def after_round(self, figures: Mapping[str, float | None]) -> History:
        """Append one round's, or one evaluation's, figures: see the attributes of these names."""
        appended = {name: (*getattr(self, name), value) for name, value in figures.items()}
        return self.model_copy(update=appended)

    def with_peak(self, rss_bytes: int) -> History:
        """Take what memory this start holds."""
        peak = max(self.peak_rss_bytes, rss_bytes)
        return self.model_copy(update={"peak_rss_bytes": peak})

    def after(self, phase: str, seconds: float) -> History:
        """Add the duration of a part of a phase."""
        total = self.seconds.get(phase, 0.0) + seconds
        return self.model_copy(update={"seconds": {**self.seconds, phase: total}})


class Checkpoint(BaseModel):
    """State after ``position`` steps of the schedule."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    position: int
    state: State
    history: History


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write beside ``path``, flush to disk, then rename: a kill leaves the old or the new file.
    The old one is kept as well: a disk can spoil what was written whole.

    Raises:
        UserError: it cannot be written; the old one stands.
    """
    state = checkpoint.state
    parts = {LORA: state.current, DISTILLED: state.retained}
    if state.residual is not None:
        parts[RESIDUAL] = state.residual
    tensors = {
        f"{part}/{key}": np.ascontiguousarray(value)
        for part, adapter in parts.items()
        for key, value in to_arrays(adapter).items()
    }
    for part, extra in ((HEADS, state.heads), (SUMS, state.sums)):
        tensors |= {f"{part}/{key}": np.ascontiguousarray(t.numpy()) for key, t in extra.items()}
    meta = {
        "version": str(VERSION),
        "position": str(checkpoint.position),
        "history": checkpoint.history.model_dump_json(),
        "scaling": repr(state.current.scaling),
        "rank": str(state.current.rank),
        "retained_rank": str(state.retained.rank),
        "residual_rank": str(state.residual.rank if state.residual is not None else 0),
        "num_reference_directions": str(state.num_reference_directions),
    }
    meta["sha256"] = _digest(tensors, meta)
    try:
        with atomic_path(path) as beside:
            beside.write_bytes(save(tensors, meta))
            _keep(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); the checkpoint before it stands: make "
            "room, then continue with --resume"
        ) from None


def _keep(path: Path) -> None:
    """Give the file a second name, in one step; without it where the disk has no such names."""
    second = path.with_suffix(".keeping")
    second.unlink(missing_ok=True)
    with suppress(OSError):
        os.link(path, second)
        second.replace(previous_checkpoint(path))


def _digest(tensors: Mapping[str, np.ndarray], meta: Mapping[str, str]) -> str:
    """Return the SHA-256 of everything that the file says."""
    hashed = hashlib.sha256(json.dumps(dict(meta), sort_keys=True).encode())
    for key in sorted(tensors):
        hashed.update(f"{key} {tensors[key].dtype} {tensors[key].shape}".encode())
        hashed.update(np.ascontiguousarray(tensors[key]).tobytes())
    return hashed.hexdigest()


def load_latest(path: Path, shapes: Mapping[str, tuple[int, int]]) -> tuple[Checkpoint, str]:
    """Return the last checkpoint that is good, and why it is not the last one (empty: it is). It
    takes the place of a damaged one, which the next would otherwise keep as its predecessor.

    Raises:
        UserError: none is good; the message is about the last one.
    """
    try:
        return load_checkpoint(path, shapes), ""
    except UserError as error:
        previous = previous_checkpoint(path)
        if not previous.exists():
            raise
        try:
            found = load_checkpoint(previous, shapes)
        except UserError:
            raise error from None
        previous.replace(path)
        return found, str(error)


def load_checkpoint(path: Path, shapes: Mapping[str, tuple[int, int]]) -> Checkpoint:
    """Return a checkpoint, read and checked.

    Raises:
        UserError: missing, damaged, of another version, or made for another model.
    """  # noqa: DOC501 (a ValueError within becomes a UserError)
    try:
        with safe_open(str(path), framework="numpy") as file:
            meta = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if meta.get("version") != str(VERSION):
            raise UserError(
                f"{path}: checkpoint of version {meta.get('version')}, not {VERSION}: another "
                "release of this project made it; go on with that one, or begin the run anew"
            )
        written = meta.pop("sha256", "")  # empty: from before there were digests
        if written and written != _digest(tensors, meta):
            raise ValueError("its content is not what was written")
        current = _part(tensors, LORA, Template(shapes, int(meta["rank"])), float(meta["scaling"]))
        retained = _part(tensors, DISTILLED, Template(shapes, int(meta["retained_rank"])), 1.0)
        rank = int(meta["residual_rank"])
        residual = _part(tensors, RESIDUAL, Template(shapes, rank), 1.0) if rank else None
        history = History.model_validate_json(meta["history"])
        heads, sums = _named(tensors, HEADS), _named(tensors, SUMS)
        reference = int(meta["num_reference_directions"])
        state = State(current, retained, residual, reference, heads, sums)
        return Checkpoint(position=int(meta["position"]), state=state, history=history)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no checkpoint to resume from; start without --resume") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: damaged checkpoint ({error}); begin the run anew in another folder"
        ) from None


def _named(tensors: Mapping[str, np.ndarray], part: str) -> dict[str, Tensor]:
    prefix = part + "/"
    return {
        key.removeprefix(prefix): torch.from_numpy(value.copy())
        for key, value in tensors.items()
        if key.startswith(prefix)
    }


def _part(
    tensors: Mapping[str, np.ndarray], record: str, template: Template, scaling: float
) -> Adapter:
    prefix = record + "/"
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return from_arrays(own, template, scaling)
