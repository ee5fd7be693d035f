"""``deal export``: what was learnt, for PEFT and transformers alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deal_core.errors import UserError, at_home
from deal_core.inference.folder import Inference, find_adapter, read_inference
from simulations.use.export_base import public_base
from simulations.use.export_forms import map_of_adapter, write_adapter, write_merged
from simulations.use.push import check_token, upload


@dataclass(frozen=True)
class ExportRequest:
    """What was typed.

    Attributes:
        folder: of a run, or its adapter.
        to: a new or empty folder.
        merge: add the adapter to the base model's weights.
        push: name of a hub repository to upload to; empty: none.
        base: folder or hub name of the base model; empty: as the run named it.
    """

    folder: str
    to: str
    merge: bool = False
    push: str = ""
    base: str = ""


def export(request: ExportRequest) -> list[str]:
    """Write the folder, and upload it where asked.

    Returns:
        What has been written, and how to go on.

    Raises:
        UserError: no adapter, a damaged one, one that cannot be merged, a folder that is not empty,
            a base model that is another, cannot be loaded or could not be by a hub's readers, or no
            access to the hub. Nothing is left in the folder.
    """
    from deal_core.inference.predictor import checked_adapter, read_heads

    source = find_adapter(at_home(request.folder))
    inference = read_inference(source)
    if request.base:
        model = inference.model.model_copy(update={"name": request.base})
        inference = inference.model_copy(update={"model": model, "upstream": ""})
    to = new_folder(at_home(request.to))
    if request.merge and map_of_adapter(inference) is not None:
        raise UserError(
            f"--merge: adapter.kind '{inference.adapter_kind}' is a map behind the encoder's "
            "pooling, for which its checkpoint has no place; leave --merge out"
        )
    if request.push:
        check_push(inference, request)
        check_token()
    checked_adapter(source, inference, inference.model)
    read_heads(source)
    with emptied_on_failure(to):
        if request.merge:
            lines = write_merged(source, inference, to)
        else:
            lines = write_adapter(source, inference, to, bool(request.push))
        for written in filter(Path.is_file, to.rglob("*")):
            readable_as(written, to / source.inference.name)
    return [*lines, *([upload(to, request.push)] if request.push else [])]


@contextmanager
def emptied_on_failure(to: Path) -> Iterator[None]:
    """Leave nothing in a new folder where the block fails: the same command can then be tried
    again.

    Yields:
        Nothing.

    Raises:
        UserError: in the place of an ``OSError``.
    """
    there = to.exists()
    try:
        yield
    except BaseException as error:
        for each in to.iterdir() if to.exists() else ():
            shutil.rmtree(each) if each.is_dir() else each.unlink()
        if to.exists() and not there:
            to.rmdir()
        if isinstance(error, OSError):
            why = f"cannot be written ({error.strerror or error})"
            raise UserError(
                f"{to}: {why}; see that the disk has room, or choose another --to"
            ) from None
        raise


def readable_as(written: Path, other: Path) -> None:
    """Let those read a file who may read another: the library of weights lets its owner alone."""
    written.chmod(other.stat().st_mode & 0o777)


def new_folder(path: Path) -> Path:
    """Return a folder's full path.

    Raises:
        UserError: there is something in it already.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: is there already; choose another --to")
    return path.resolve()


def check_push(inference: Inference, request: ExportRequest) -> None:
    """Check that others can load what is uploaded.

    Raises:
        UserError: its base model is on no hub as it was used.
    """
    if not request.merge and not public_base(inference):
        cure = (
            "add --merge"
            if map_of_adapter(inference) is None
            else "upload that, name it with --model"
        )
        raise UserError(
            f"--push: the base model '{inference.model.name}' is not on the hub as it was used, so "
            f"nobody else could load the adapter; {cure}"
        )
