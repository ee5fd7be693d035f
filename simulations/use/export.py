"""``deal export``: what was learnt, for PEFT and transformers alone."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deal_core.errors import UserError, choose
from deal_core.inference.folder import AdapterFolder, Inference, find_adapter, read_inference
from deal_core.models.loading import EMBEDDED, TO_THE_BIT, quiet, with_revision
from server.model_card import hub_name
from simulations.use.encoder_code import LABELS, MAP, Exported, Kind, encoder_code
from simulations.use.export_card import BASE, write_card
from simulations.use.prompts import PROMPTS, asking_code, prompts_of, write_prompts
from simulations.use.push import check_token, upload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from deal_core.lora.adapter import Adapter


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

    source = find_adapter(Path(request.folder).expanduser())
    inference = read_inference(source)
    if request.base:
        model = inference.model.model_copy(update={"name": request.base})
        inference = inference.model_copy(update={"model": model, "upstream": ""})
    to = new_folder(Path(request.to).expanduser())
    if request.merge and _map_of(inference) is not None:
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
    if not request.merge and not _public_base(inference):
        cure = "add --merge" if _map_of(inference) is None else "upload that, name it with --model"
        raise UserError(
            f"--push: the base model '{inference.model.name}' is not on the hub as it was used, so "
            f"nobody else could load the adapter; {cure}"
        )


def write_adapter(source: AdapterFolder, inference: Inference, to: Path, push: bool) -> list[str]:
    """Write the adapter, and its base model where it is embedded.

    Args:
        source: the run's adapter folder.
        inference: what it says.
        to: an empty folder.
        push: the folder will be on a hub: name the base model as found there.

    Returns:
        What has been written.

    Raises:
        UserError: the base model cannot be loaded.
    """
    for file in (source.weights, source.heads, source.inference):
        if file.exists():
            to.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, to / file.name)
    base = _public_base(inference) if push else _local_base(inference, to)
    _write_labels(inference, to)
    if _map_of(inference) is not None:
        return write_map(source, inference, to, base)
    note = _write_prompts(inference, to)
    config = json.loads(source.config.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    config["revision"] = with_revision(inference.model.name)[1] or None
    AdapterFolder(to).config.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    auto = "AutoPeftModel" + _auto_class(inference).removeprefix("AutoModel")
    auto += "ForFeatureExtraction" if auto == "AutoPeftModel" else ""
    write_card(source, inference, to, _code(inference, "adapter", to, base))
    return [f"{to}: an adapter of {base}; load it with peft.{auto}.from_pretrained", *note]


def write_map(source: AdapterFolder, inference: Inference, to: Path, base: str) -> list[str]:
    """Write an adapter that PEFT cannot load as the map that it is.

    Args:
        source: the run's adapter folder.
        inference: what it says.
        to: the folder that all else is in.
        base: name of the base model, or the folder that it was written to.

    Returns:
        What has been written.
    """
    from safetensors.torch import save_file

    from deal_core.inference.predictor import read_adapter

    map_of = _map_of(inference)
    assert map_of is not None
    save_file({"weight": map_of(read_adapter(source))}, to / MAP)
    write_card(source, inference, to, _code(inference, "map", to, base))
    said = f"{MAP} is a map behind the pooling of {base}; docs/using.md has the lines to use it"
    return [f"{to}: {said}"]


def write_merged(source: AdapterFolder, inference: Inference, to: Path) -> list[str]:
    """Write base model and adapter as one ordinary checkpoint, and the tokeniser; in float32.

    Args:
        source: the run's adapter folder.
        inference: what it says.
        to: an empty folder.

    Returns:
        What has been written.

    Raises:
        UserError: the base model cannot be loaded.
    """
    from peft import PeftModel

    from deal_core.lora.attach import quiet_peft
    from deal_core.models.greedy import greedy

    base, tokenizer = load_base(inference)
    with quiet_peft():
        merged = PeftModel.from_pretrained(base, str(source.path)).merge_and_unload()
    prompts = prompts_of(inference)
    if prompts is not None:
        merged.generation_config = greedy(prompts)
    _save(merged, tokenizer, to)
    shutil.copyfile(source.inference, to / source.inference.name)
    _write_labels(inference, to)
    _write_prompts(inference, to)
    write_card(source, inference, to, _code(inference, "merged", to, "."))
    note = ["label heads are not in it: they score embeddings of the base model as it was"]
    note = note if source.heads.exists() else []
    loader = _auto_class(inference)
    return [f"{to}: one model; load it with transformers.{loader}.from_pretrained", *note]


def load_base(inference: Inference) -> tuple[Any, Any]:
    """Return base model, float32, and tokeniser, as transformers loads them.

    Raises:
        UserError: they cannot be loaded.
    """
    import torch
    from transformers import AutoTokenizer

    from deal_core.models import FAMILIES, auto_class
    from deal_core.models.loading import pretrained

    name = inference.model.name
    family = choose("model.family", inference.model.family, FAMILIES)
    loader = auto_class(family.task_type)
    base = pretrained(loader, name, dtype=torch.float32)
    if getattr(base, "hf_quantizer", None) is not None:
        base = unquantized(loader, base)
    return base, pretrained(AutoTokenizer, name)


def unquantized(loader: Any, model: Any) -> Any:
    """Return an ordinary model of the same float weights: transformers saves none that was read
    from a quantized file.

    Args:
        loader: class of transformers that makes it.
        model: its weights are decoded already (GGUF).
    """
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    plain = loader.from_config(type(model.config).from_dict(settings))
    plain.load_state_dict(model.state_dict())
    return plain.float().eval()


def label_embeddings(inference: Inference) -> dict[str, Tensor]:
    """Return task to the unit vectors of its label names by the frozen base model,
    ``(labels, hidden)``, float32: what a text's vector is compared with.

    Raises:
        UserError: the base model cannot be loaded.
    """
    from deal_core.config.experiment import AdapterConfig
    from deal_core.data import Example
    from deal_core.models import load_model
    from deal_core.training.embedding import base_embeddings

    whole = inference.model.model_copy(update={"bits": 0})  # as the folder's user loads it
    model = load_model(whole, AdapterConfig(rank=1), inference.max_length)
    found = {}
    for task in inference.tasks:
        words = [Example(label.replace("_", " "), task.labels[0]) for label in task.labels]
        found[task.name] = base_embeddings(model, model.encode(words, task.labels[:1]))
    return found


def _write_labels(inference: Inference, to: Path) -> None:
    """Where label names are compared with texts."""
    from safetensors.torch import save_file

    if inference.pooling != "none":
        save_file(label_embeddings(inference), to / LABELS)


def _write_prompts(inference: Inference, to: Path) -> list[str]:
    """Write what others ask a model with that answers in words.

    Returns:
        A note, where the tokeniser is not here, which makes them.
    """
    try:
        write_prompts(inference, to)
    except UserError as reason:
        return [f"{PROMPTS} is left out: {reason}"]
    return []


def _code(inference: Inference, kind: Kind, to: Path, base: str) -> str:
    """Return Python that answers a text of the first task, run in the export; empty where prompts
    are left out."""
    head = _first_head(inference, AdapterFolder(to))
    if inference.pooling != "none":
        revision = "" if (to / BASE).is_dir() else with_revision(inference.model.name)[1]
        exported = Exported(kind, _in_folder(to, base), "" if kind == "merged" else revision)
        return encoder_code(inference, exported, head)
    if not (to / PROMPTS).exists():
        return ""
    return asking_code(inference, _in_folder(to, base), kind == "merged", head)


def _first_head(inference: Inference, folder: AdapterFolder) -> Tensor | None:
    """Return the head of the first task; None where it has none."""
    from safetensors.torch import load_file

    heads = load_file(folder.heads) if folder.heads.exists() else {}
    return heads.get(inference.tasks[0].name)


def _in_folder(to: Path, base: str) -> str:
    """Return where the base model lies, seen from the export."""
    return BASE if base == str(to / BASE) else base


def _map_of(inference: Inference) -> Callable[[Adapter], Tensor] | None:
    """Return what makes a map of the adapter; None: PEFT alone loads it."""
    from deal_core.lora.kinds import KINDS

    return choose("adapter_kind", inference.adapter_kind, KINDS).map_behind


def _public_base(inference: Inference) -> str:
    """Return the hub name under which others find the very base model; empty: there is none."""
    name = inference.model.name
    return hub_name(inference) if not name.startswith(EMBEDDED) or name in TO_THE_BIT else ""


def _local_base(inference: Inference, to: Path) -> str:
    """Return where this machine finds the base model; an embedded one is written beside."""
    name = inference.model.name
    if name.startswith(EMBEDDED):
        base, tokenizer = load_base(inference)
        _save(base, tokenizer, to / BASE)
        return str(to / BASE)
    return str(Path(name).resolve()) if Path(name).is_dir() else with_revision(name)[0]


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _auto_class(inference: Inference) -> str:
    from deal_core.models import FAMILIES, auto_class

    family = choose("model.family", inference.model.family, FAMILIES)
    name: str = auto_class(family.task_type).__name__
    return name
