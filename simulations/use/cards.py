"""What stands beside the weights of an export: prompts as token ids, the program that answers
without this project, and the card that says what is in the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deal_core.inference.folder import AdapterFolder, Inference, TaskSpace
from server.export import with_base, with_use

if TYPE_CHECKING:
    from deal_core.models.prompt import PromptTokens

BASE = "base"
"""Folder of an embedded base model beside the adapter: it is on no hub, or not as it was used."""
LABELS = "label_embeddings.safetensors"
MAP = "pooled_map.safetensors"
"""``weight``, ``(hidden, hidden)``: the map behind the pooling, where PEFT alone cannot load the
adapter."""
HEADS = "heads.safetensors"
PROMPTS = "prompts.json"
"""Task to the token ids of its prompt before and after a text, and of its answers."""
PROGRAM = "answer.py"
CLASSIFIER = "classifier"
ENCODER = "sentence"
HOLDS = {
    "adapter_model.safetensors": "what was learnt, as LoRA factors",
    "adapter_config.json": "settings of PEFT",
    MAP: "the same as one matrix behind the pooling, `weight`",
    BASE: "the base model, float32, and its tokeniser",
    HEADS: "class means, or softmax regression: a row of weights and a bias for each label",
    LABELS: "vectors of the names of labels by the base model, task by task",
    PROMPTS: "token ids around a text and of each label, task by task",
    "inference.json": "labels of all tasks in their order, and how texts are read",
    PROGRAM: "answers texts with this folder",
    CLASSIFIER: 'for `pipeline("text-classification", ..., trust_remote_code=True)`',
    ENCODER: "base model and adapter as one, for `SentenceTransformer`",
}
"""File, or folder, of an export to what it holds."""


def write_prompts(inference: Inference, to: Path) -> None:
    """Write ``prompts.json``, unless the model is asked with the text alone.

    Raises:
        UserError: the tokeniser cannot be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer

    from deal_core.models import family_of
    from deal_core.models.loading import pretrained

    model = inference.model
    make = family_of(model).prompts
    if make is None:
        return
    tokenizer, config = pretrained(AutoTokenizer, model.name), pretrained(AutoConfig, model.name)
    prompts = make(tokenizer, config, model, inference.max_length)
    entries = {task.name: task_entry(task, prompts, inference) for task in inference.tasks}
    (to / PROMPTS).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def task_entry(task: TaskSpace, prompts: PromptTokens, inference: Inference) -> dict[str, Any]:
    """Return what a task's entry says: ids around a text, those of each label, how to write."""
    from deal_core.models.generating import greedy_settings

    around = prompts.prompt((), task.labels, task.instruction)
    return {
        "before": list(around.tokens[: around.shared]),
        "after": list(around.tokens[around.shared :]),
        "max_length": inference.max_length,
        "labels": dict(zip(task.labels, map(list, prompts.scored(task.labels)), strict=True)),
        "start": list(prompts.start),
        "writing": greedy_settings(prompts),
    }


def write_program(to: Path, base: str, revision: str) -> None:
    """Write the program of an export.

    Args:
        to: the export.
        base: where the base model lies, as seen from the export.
        revision: of the base model on the hub; empty: the newest.
    """
    text = Path(__file__).with_name(PROGRAM).read_text(encoding="utf-8")
    text = text.replace('\nBASE = "base"\n', f"\nBASE = {json.dumps(base)}\n", 1)
    text = text.replace("\nREVISION = None\n", f"\nREVISION = {(revision or None)!r}\n", 1)
    (to / PROGRAM).write_text(text, encoding="utf-8")


def write_card(source: AdapterFolder, inference: Inference, to: Path) -> None:
    """Write the card of a complete export ``to``, where the run's folder has one."""
    if not source.card.exists():
        return
    task = inference.tasks[0].name
    card, use = source.card.read_text(encoding="utf-8"), f"{contents(to)}\n\n"
    use += f'Without this project: `python {PROGRAM} {task} "a text"`.'
    told = "" if inference.pooling == "mean" else f" --task {task}"
    use += f' With it: `deal predict . "a text"{told}`.'
    card = with_use(with_base(card, f"{BASE}/") if (to / BASE).is_dir() else card, use)
    (to / source.card.name).write_text(card, encoding="utf-8")


def contents(to: Path) -> str:
    """Return a table of the files that are in the folder."""
    lines = ["| in this folder | |", "|---|---|"]
    for name, meaning in HOLDS.items():
        if (to / name).exists():
            lines.append(f"| `{name}{'/' if (to / name).is_dir() else ''}` | {meaning} |")
    return "\n".join(lines)
