"""The forms of an export: an adapter for PEFT, a map behind the pooling, one merged checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from deal_core.errors import UserError, choose
from deal_core.inference.folder import AdapterFolder, Inference
from deal_core.models.loading import with_revision
from simulations.use.encoder_code import LABELS, MAP, Exported, Kind, encoder_code
from simulations.use.export_base import (
    auto_class_name,
    base_from,
    load_base,
    local_base,
    public_base,
    save_model,
)
from simulations.use.export_card import BASE, write_card
from simulations.use.prompts import PROMPTS, asking_code, prompts_of, write_prompts

if TYPE_CHECKING:
    from torch import Tensor

    from deal_core.lora.adapter import Adapter


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
    base = public_base(inference) if push else local_base(inference, to)
    write_labels(inference, to)
    if map_of_adapter(inference) is not None:
        return write_map(source, inference, to, base)
    note = _write_prompts(inference, to)
    config = json.loads(source.config.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    config["revision"] = with_revision(inference.model.name)[1] or None
    AdapterFolder(to).config.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    auto = "AutoPeftModel" + auto_class_name(inference).removeprefix("AutoModel")
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

    map_of = map_of_adapter(inference)
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
    from deal_core.models.generating import greedy

    base, tokenizer = load_base(inference)
    with quiet_peft():
        merged = PeftModel.from_pretrained(base, str(source.path)).merge_and_unload()
    prompts = prompts_of(inference)
    if prompts is not None:
        merged.generation_config = greedy(prompts)
    save_model(merged, tokenizer, to)
    shutil.copyfile(source.inference, to / source.inference.name)
    write_labels(inference, to)
    _write_prompts(inference, to)
    write_card(source, inference, to, _code(inference, "merged", to, "."))
    note = ["label heads are not in it: they score embeddings of the base model as it was"]
    note = note if source.heads.exists() else []
    loader = auto_class_name(inference)
    return [f"{to}: one model; load it with transformers.{loader}.from_pretrained", *note]


def label_embeddings(inference: Inference) -> dict[str, Tensor]:
    """Return task to the unit vectors of its label names by the frozen base model,
    ``(labels, hidden)``, float32: what a text's vector is compared with.

    Raises:
        UserError: the base model cannot be loaded.
    """
    from deal_core.config.experiment import AdapterConfig
    from deal_core.data import Example
    from deal_core.models import load_model
    from deal_core.training.evaluation import base_embeddings

    whole = inference.model.model_copy(update={"bits": 0})  # as the folder's user loads it
    model = load_model(whole, AdapterConfig(rank=1), inference.max_length)
    found = {}
    for task in inference.tasks:
        words = [Example(label.replace("_", " "), task.labels[0]) for label in task.labels]
        found[task.name] = base_embeddings(model, model.encode(words, task.labels[:1]))
    return found


def map_of_adapter(inference: Inference) -> Callable[[Adapter], Tensor] | None:
    """Return what makes a map of the adapter; None: PEFT alone loads it."""
    from deal_core.lora.kinds import KINDS

    return choose("adapter_kind", inference.adapter_kind, KINDS).map_behind


def write_labels(inference: Inference, to: Path) -> None:
    """Write the vectors of label names, where texts are compared with them."""
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
    head = _has_head(inference.tasks[0].name, AdapterFolder(to))
    if inference.pooling != "none":
        revision = "" if (to / BASE).is_dir() else with_revision(inference.model.name)[1]
        exported = Exported(kind, base_from(to, base), "" if kind == "merged" else revision)
        return encoder_code(inference, exported, head)
    if not (to / PROMPTS).exists():
        return ""
    return asking_code(inference, base_from(to, base), kind == "merged", head)


def _has_head(task: str, folder: AdapterFolder) -> bool:
    from deal_core.inference.predictor import read_heads

    return task in read_heads(folder)
