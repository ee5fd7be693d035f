"""The card of an export: what is in the folder, and how it is used without this project."""

from __future__ import annotations

from pathlib import Path

from deal_core.inference.folder import AdapterFolder, Inference
from server.model_card import merged_card, with_base, with_use
from simulations.use.encoder_code import HEADS, LABELS, MAP
from simulations.use.prompts import PROMPTS

BASE = "base"
"""Folder of an embedded base model beside the adapter: it is on no hub, or not as it was used."""
HOLDS = {
    "model*.safetensors": "base model and adapter in one, float32; tokeniser beside it",
    "adapter_model.safetensors": "what was learnt, as LoRA factors",
    "adapter_config.json": "settings of PEFT",
    MAP: "the same as one matrix behind the pooling, `weight`",
    BASE: "the base model, float32, and its tokeniser",
    HEADS: "class means, or softmax regression: a row of weights and a bias for each label",
    LABELS: "vectors of the names of labels by the base model, task by task",
    PROMPTS: "token ids around a text and of each label, task by task",
    "inference.json": "labels of all tasks in their order, and how texts are read",
}
"""File, or folder, of an export to what it holds."""
MOVED = (
    f"; it names `{BASE}` by its full path: where the folder has moved, write the new one to "
    "`base_model_name_or_path`"
)


def write_card(source: AdapterFolder, inference: Inference, to: Path, code: str) -> None:
    """Write the card of an export, where the run's folder has one.

    Args:
        source: the run's adapter folder.
        inference: what it says.
        to: the export, complete.
        code: Python that answers in that folder; empty: there is none.
    """
    if not source.card.exists():
        return
    card, use = source.card.read_text(encoding="utf-8"), f"{contents(to)}\n\n{_code_section(code)}"
    if AdapterFolder(to).weights.exists():
        task = "" if inference.pooling == "mean" else f" --task {inference.tasks[0].name}"
        use += f'With it: `deal predict . "a text"{task}`.'
        card = with_use(with_base(card, f"{BASE}/") if (to / BASE).is_dir() else card, use)
    else:
        card = merged_card(card, use.rstrip(), source.heads.exists())
    (to / source.card.name).write_text(card, encoding="utf-8")


def _code_section(code: str) -> str:
    if not code:
        return ""
    return f"Without this project, in this folder:\n\n```python\n{code}```\n\n"


def contents(to: Path) -> str:
    """Return a table of the files that are in the folder."""
    lines = ["| in this folder | |", "|---|---|"]
    for name, meaning in HOLDS.items():
        found = list(to.glob(name))
        if not found:
            continue
        more = MOVED if name == "adapter_config.json" and (to / BASE).is_dir() else ""
        shown = found[0].name if len(found) == 1 else name
        shown += "/" if (to / name).is_dir() else ""
        lines.append(f"| `{shown}` | {meaning}{more} |")
    return "\n".join(lines)
