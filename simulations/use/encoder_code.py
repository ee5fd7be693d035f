"""Python that answers a text by an exported encoder, without this project: of cards and of
docs/using.md."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from deal_core.inference.folder import Inference
from deal_core.models.encoder import LOGIT_SCALE

LABELS = "label_embeddings.safetensors"
MAP = "pooled_map.safetensors"
"""``weight``, ``(hidden, hidden)``: the map behind the pooling, where PEFT alone cannot load the
adapter."""
HEADS = "heads.safetensors"
NORMALIZE = "from torch.nn.functional import normalize"
LOAD = {
    "adapter": "model = PeftModel.from_pretrained(AutoModel.from_pretrained({base}), {folder})"
    ".eval()",
    "map": """\
model = AutoModel.from_pretrained({base}).eval()
weight = load_file({map})["weight"]  # (hidden, hidden)""",
    "merged": "model = AutoModel.from_pretrained({base}).eval()",
}
READ = """\
cut = {{"truncation": True, "max_length": {max_length}, "return_tensors": "pt"}}  # inference.json
tokens = AutoTokenizer.from_pretrained({base})({text}, **cut)"""
FROZEN = "layers = model(**tokens, output_hidden_states=True).hidden_states"
EMBEDDING = """\
layers = layers[1:][:-{layers}:-1]  # the last one first
units = [normalize(layer.float().mean(dim=1)) for layer in layers]
pairs = [normalize(sum(units[i : i + 2])) for i in range(0, len(units), 2)]
embedding = torch.cat(pairs, dim=1) / len(pairs) ** 0.5
head = load_file({heads})[{task}]  # (labels, size + 1)"""
VECTOR = """\
vector = model(**tokens).last_hidden_state.float().mean(dim=1){through}  # of one text: no padding
names = load_file({labels})[{task}]"""
BY_NAMES = "print(torch.cosine_similarity(vector, names).argmax().item())"
BY_BOTH = """\
by_names = {scale} * normalize(vector) @ names.T
scores = embedding @ head[:, :-1].T + head[:, -1] + {weight} * by_names
print(scores.argmax().item())"""
BY_HEAD = """\
scores = embedding @ head[:, :-1].T + head[:, -1]
print(scores.argmax().item())"""
Kind = Literal["adapter", "map", "merged"]
PLACE = "  # place in the task's labels"


@dataclass(frozen=True)
class Exported:
    """What the code is run on.

    Attributes:
        kind: the adapter, the map that it is, or one model with the base.
        base: where the base model lies; ``merged``: the folder itself.
        revision: of the base model on the hub; empty: the newest.
        folder: the export, seen from where the code runs.
    """

    kind: Kind
    base: str
    revision: str = ""
    folder: str = "."

    def file(self, name: str) -> str:
        """Return a file of the export as Python writes its path."""
        return json.dumps(name if self.folder == "." else f"{self.folder}/{name}")

    @property
    def base_arguments(self) -> str:
        """Arguments of ``from_pretrained``."""
        revision = f", revision={json.dumps(self.revision)}" if self.revision else ""
        return json.dumps(self.base) + revision


def encoder_code(
    inference: Inference,
    exported: Exported,
    head: bool = False,
    task: str = "",
    text: str = "a text",
) -> str:
    """Return Python that prints the place of a text's label among those of its task.

    Args:
        inference: of the run.
        exported: what it is run on.
        head: whether the task has one; else names of labels alone answer.
        task: empty: the first one.
        text: that is asked about.
    """
    by_names = not head or inference.names_weight > 0
    lines = [
        *_imports(exported, head),
        "",
        LOAD[exported.kind],
        READ,
        *([_frozen(exported), EMBEDDING] if head else []),
        *([VECTOR] if by_names else []),
        (BY_BOTH if head and by_names else BY_NAMES if by_names else BY_HEAD) + PLACE,
    ]
    return (
        "\n".join(lines).format(
            base=exported.base_arguments,
            folder=json.dumps(exported.folder),
            map=exported.file(MAP),
            labels=exported.file(LABELS),
            heads=exported.file(HEADS),
            max_length=inference.max_length,
            text=json.dumps(text),
            task=json.dumps(task or inference.tasks[0].name),
            layers=inference.head_layers + 1,
            through=" @ weight.T" if exported.kind == "map" else "",
            weight=inference.names_weight,
            scale=LOGIT_SCALE,
        )
        + "\n"
    )


def _imports(exported: Exported, heads: bool) -> list[str]:
    return [
        "import torch",
        *(["from peft import PeftModel"] if exported.kind == "adapter" else []),
        "from safetensors.torch import load_file",
        *([NORMALIZE] if heads else []),
        "from transformers import AutoModel, AutoTokenizer",
    ]


def _frozen(exported: Exported) -> str:
    """Return the lines that read the layers of the frozen model, which heads are of."""
    if exported.kind == "adapter":
        return f"with model.disable_adapter():  # heads are of the frozen model\n    {FROZEN}"
    return FROZEN
