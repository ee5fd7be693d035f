"""The card of an export: what is in the folder, and Python that answers by it without this
project."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deal_core.inference.folder import AdapterFolder, Inference, TaskSpace
from deal_core.models.encoder import LOGIT_SCALE
from server.export import merged_card, with_base, with_use

if TYPE_CHECKING:
    from deal_core.models.prompt import PromptTokens

PROMPTS = "prompts.json"
"""Task to the token ids of its prompt before and after a text, and of its answers."""
ASK = """\
import json
import torch
from {package} import {loader}
{tensors}from transformers import AutoTokenizer{also}

model = {loader}.from_pretrained(".").eval()
tokenizer = AutoTokenizer.from_pretrained({tokenizer})
task = json.load(open("{prompts}"))[{task}]
text = tokenizer("a text", add_special_tokens=False)["input_ids"][: task["max_length"]]
prompt = torch.tensor([task["before"] + text + task["after"]])
"""
TENSORS = "from safetensors.torch import load_file\nfrom torch.nn.functional import normalize\n"
SCORE = """\

def score(answer):  # the mean log-likelihood of a label's tokens
    logits = model({inputs}).logits[0, -len(answer) :].float()
    return logits.log_softmax(dim=1).gather(1, torch.tensor(answer)[:, None]).mean().item()

scores = {{label: score(ids) for label, ids in task["labels"].items()}}
"""
MEANS = """\

with model.disable_adapter():  # class means are of the frozen model
    read = model({inputs}, output_hidden_states=True)
layers = read.{states}[1:][: -{layers} - 1 : -1]  # the last one first
first = len(task["before"])
own = slice(first, first + max(1, len(text)))
units = [normalize(layer[0, own].float().mean(dim=0), dim=0) for layer in layers]
pairs = [normalize(sum(units[i : i + 2]), dim=0) for i in range(0, len(units), 2)]
embedding = torch.cat(pairs) / len(pairs) ** 0.5
head = load_file("{heads}")[{task}]  # (labels, size + 1)
means = embedding @ head[:, :-1].T + head[:, -1]
for label, mean in zip(scores, means.tolist()):
    scores[label] = mean + {weight} * scores[label]
"""
BEST = """\

print(max(scores, key=scores.get))
"""
BEHIND = "torch.cat([prompt, torch.tensor([answer[:-1]], dtype=int)], dim=1)"
WRITE = """\
greedy = GenerationConfig(**task["writing"])
words = model.generate(input_ids=prompt, generation_config=greedy)[0]
print(tokenizer.decode(words{after}, skip_special_tokens=True).strip())
"""


def write_prompts(inference: Inference, to: Path) -> PromptTokens | None:
    """Write ``prompts.json``, where the model is asked with prompts.

    Returns:
        What makes them; None: the model is asked with the text alone.

    Raises:
        UserError: the tokeniser cannot be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer

    from deal_core.models import family_of
    from deal_core.models.loading import pretrained

    model = inference.model
    make = family_of(model).prompts
    if make is None:
        return None
    tokenizer, config = pretrained(AutoTokenizer, model.name), pretrained(AutoConfig, model.name)
    prompts = make(tokenizer, config, model, inference.max_length)
    entries = {task.name: task_entry(task, prompts, inference) for task in inference.tasks}
    (to / PROMPTS).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    return prompts


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


def asking_code(inference: Inference, base: str, merged: bool, head: bool = False) -> str:
    """Return Python that asks about a text of the first task, run in the folder.

    Args:
        inference: of the run.
        base: where the tokeniser lies.
        merged: the folder holds one model, and its tokeniser.
        head: whether the folder has class means of the first task, beside words: (M43).
    """
    from deal_core.models import decodes_apart, family_of

    name = family_of(inference.model).auto_class
    task, apart = inference.tasks[0], decodes_apart(inference.model)
    before = ASK.format(
        package="transformers" if merged else "peft",
        loader=name if merged else f"AutoPeft{name.removeprefix('Auto')}",
        tokenizer=json.dumps("." if merged else base),
        prompts=PROMPTS,
        task=json.dumps(task.name),
        also="" if task.labels else ", GenerationConfig",
        tensors=TENSORS if head else "",
    )
    if not task.labels:
        start = '[len(task["start"]) :]' if apart else "[prompt.shape[1] :]"
        return before + WRITE.format(after=start)
    forced = 'prompt, decoder_input_ids=torch.tensor([task["start"] + answer[:-1]])'
    words = SCORE.format(inputs=forced if apart else BEHIND)
    if not head:
        return before + words + BEST
    means = MEANS.format(
        inputs='prompt, decoder_input_ids=torch.tensor([task["start"]])' if apart else "prompt",
        states="encoder_hidden_states" if apart else "hidden_states",
        layers=inference.head_layers,
        heads=HEADS,
        task=json.dumps(task.name),
        weight=inference.names_weight,
    )
    return before + words + means + BEST


LABELS = "label_embeddings.safetensors"
MAP = "pooled_map.safetensors"
"""``weight``, ``(hidden, hidden)``: the map behind the pooling, where PEFT alone cannot load the
adapter."""
HEADS = "heads.safetensors"
LOAD = {
    "adapter": 'model = PeftModel.from_pretrained(AutoModel.from_pretrained({base}), ".").eval()',
    "map": """\
model = AutoModel.from_pretrained({base}).eval()
weight = load_file("{map}")["weight"]  # (hidden, hidden)""",
    "merged": "model = AutoModel.from_pretrained({base}).eval()",
}
READ = """\
cut = {{"truncation": True, "max_length": {max_length}, "return_tensors": "pt"}}  # inference.json
tokens = AutoTokenizer.from_pretrained({base})("a text", **cut)"""
FROZEN = "layers = model(**tokens, output_hidden_states=True).hidden_states"
EMBEDDING = """\
layers = layers[1:][:-{layers}:-1]  # the last one first
units = [normalize(layer.float().mean(dim=1)) for layer in layers]
pairs = [normalize(sum(units[i : i + 2])) for i in range(0, len(units), 2)]
embedding = torch.cat(pairs, dim=1) / len(pairs) ** 0.5
head = load_file("{heads}")[{task}]  # (labels, size + 1)"""
VECTOR = """\
vector = model(**tokens).last_hidden_state.float().mean(dim=1){through}  # of one text: no padding
names = load_file("{labels}")[{task}]"""
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


def encoder_code(
    inference: Inference, kind: Kind, base: str, revision: str = "", head: bool = False
) -> str:
    """Return Python that prints the place of a text's label among those of the first task, run in
    the export.

    Args:
        inference: of the run.
        kind: the adapter, the map that it is, or one model with the base.
        base: where the base model lies; of one model ``.``.
        revision: of the base model on the hub; empty: the newest.
        head: whether the task has one; else names of labels alone answer.
    """
    by_names = not head or inference.names_weight > 0
    adapter = kind == "adapter"
    frozen = f"with model.disable_adapter():  # heads are of the frozen model\n    {FROZEN}"
    lines = [
        "import torch",
        *(["from peft import PeftModel"] if adapter else []),
        "from safetensors.torch import load_file",
        *(["from torch.nn.functional import normalize"] if head else []),
        "from transformers import AutoModel, AutoTokenizer",
        "",
        LOAD[kind],
        READ,
        *([frozen if adapter else FROZEN, EMBEDDING] if head else []),
        *([VECTOR] if by_names else []),
        (BY_BOTH if head and by_names else BY_NAMES if by_names else BY_HEAD) + PLACE,
    ]
    return (
        "\n".join(lines).format(
            base=json.dumps(base) + (f", revision={json.dumps(revision)}" if revision else ""),
            map=MAP,
            labels=LABELS,
            heads=HEADS,
            max_length=inference.max_length,
            task=json.dumps(inference.tasks[0].name),
            layers=inference.head_layers + 1,
            through=" @ weight.T" if kind == "map" else "",
            weight=inference.names_weight,
            scale=LOGIT_SCALE,
        )
        + "\n"
    )


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
    card, use = source.card.read_text(encoding="utf-8"), f"{contents(to)}\n\n"
    if code:
        use += f"Without this project, in this folder:\n\n```python\n{code}```\n\n"
    if AdapterFolder(to).weights.exists():
        task = "" if inference.pooling == "mean" else f" --task {inference.tasks[0].name}"
        use += f'With it: `deal predict . "a text"{task}`.'
        card = with_use(with_base(card, f"{BASE}/") if (to / BASE).is_dir() else card, use)
    else:
        card = merged_card(card, use.rstrip(), source.heads.exists())
    (to / source.card.name).write_text(card, encoding="utf-8")


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
