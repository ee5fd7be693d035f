"""What an export says of prompts: how others ask a model that answers in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deal_core.errors import choose
from deal_core.inference.folder import AdapterFolder, Inference, TaskSpace

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


def write_prompts(inference: Inference, to: Path) -> None:
    """Write ``prompts.json``, where the model is asked with prompts.

    Raises:
        UserError: the tokeniser cannot be loaded.
    """
    prompts = prompts_of(inference)
    if prompts is not None:
        entries = {task.name: task_entry(task, prompts, inference) for task in inference.tasks}
        (to / PROMPTS).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def prompts_of(inference: Inference) -> PromptTokens | None:
    """Return what makes the prompts of a run's model; None: it is asked with the text alone.

    Raises:
        UserError: the tokeniser cannot be loaded.
    """
    from transformers import AutoConfig, AutoTokenizer

    from deal_core.models import FAMILIES
    from deal_core.models.loading import pretrained

    model = inference.model
    make = choose("model.family", model.family, FAMILIES).prompts
    if make is None:
        return None
    tokenizer, config = pretrained(AutoTokenizer, model.name), pretrained(AutoConfig, model.name)
    return make(tokenizer, config, model, inference.max_length)


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
    """Return Python that asks about a text of the first task, run in the folder; empty where the
    model is asked with the text alone.

    Args:
        inference: of the run.
        base: where the tokeniser lies.
        merged: the folder holds one model, and its tokeniser.
        head: whether the folder has class means of the first task, beside words: (M43).
    """
    from deal_core.models import FAMILIES, auto_class

    family = choose("model.family", inference.model.family, FAMILIES)
    if family.prompts is None:
        return ""
    name: str = auto_class(family.task_type).__name__
    task, decodes_apart = inference.tasks[0], family.decodes_apart
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
        start = '[len(task["start"]) :]' if decodes_apart else "[prompt.shape[1] :]"
        return before + WRITE.format(after=start)
    forced = 'prompt, decoder_input_ids=torch.tensor([task["start"] + answer[:-1]])'
    words = SCORE.format(inputs=forced if decodes_apart else BEHIND)
    if not head:
        return before + words + BEST
    means = MEANS.format(
        inputs='prompt, decoder_input_ids=torch.tensor([task["start"]])'
        if decodes_apart
        else "prompt",
        states="encoder_hidden_states" if decodes_apart else "hidden_states",
        layers=inference.head_layers,
        heads=AdapterFolder(Path()).heads.name,
        task=json.dumps(task.name),
        weight=inference.names_weight,
    )
    return before + words + means + BEST
