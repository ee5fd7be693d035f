"""``deal export``: what was learnt, for PEFT alone; beside the weights prompts as token ids, the
program that answers without this project, and the card that says what is in the folder."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

from deal_core.config.experiment import AdapterConfig
from deal_core.data import Example
from deal_core.errors import UserError, at_home, choose
from deal_core.inference.folder import AdapterFolder, Inference, find_adapter, read_inference
from deal_core.inference.predictor import as_evaluated, checked_adapter, read_adapter, read_heads
from deal_core.lora.attach import quiet_peft
from deal_core.lora.kinds import KINDS
from deal_core.lora.state import to_arrays
from deal_core.models import auto_class, family_of, load_model
from deal_core.models.generating import greedy_settings
from deal_core.models.loading import (
    EMBEDDED,
    TO_THE_BIT,
    pretrained,
    quiet,
    upstream_of,
    with_revision,
)
from deal_core.models.prompt import INSTRUCTION
from deal_core.training.evaluation import base_embeddings
from server.export import with_base, with_use

BASE = "base"
"""Folder of an embedded base model beside the adapter: it is on no hub, or not as it was used."""
LABELS = "label_embeddings.safetensors"
MAP = "pooled_map.safetensors"
"""``weight``, ``(hidden, hidden)``: the map behind the pooling, where PEFT alone cannot load the
adapter."""
HEADS = "heads.safetensors"
PROMPTS = "prompts.json"
"""Task to its prompt, as a text and as token ids before and after a text, and its answers."""
TEXT = "{text}"
"""In a prompt, where the text stands."""
PIPELINE = """
In this folder as a pipeline of transformers, which loads the adapter with its base model:

```python
import json
from pathlib import Path
from transformers import pipeline

asked = json.loads(Path("prompts.json").read_text(encoding="utf-8"))[TASK]
prompt = asked["prompt"].replace("{text}", "a text")
writer = pipeline("text-generation", FOLDER, add_special_tokens=False, return_full_text=False)
print(writer(prompt, **asked["writing"]))
```
"""
"""Of a card of a decoder."""
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
    PROMPTS: "prompts, token ids around a text and of each label, task by task",
    "inference.json": "labels of all tasks in their order, and how texts are read",
    PROGRAM: "answers texts with this folder",
    CLASSIFIER: 'for `pipeline("text-classification", ..., trust_remote_code=True)`',
    ENCODER: "base model and adapter as one, for `SentenceTransformer`",
}
"""File, or folder, of an export to what it holds."""
MODULES = "sentence_transformers.models"


def export(folder: str, to: str, base: str = "") -> list[str]:
    """Return what has been written into the folder, and how to go on.

    Args:
        folder: of a run, or its adapter.
        to: a new or empty folder.
        base: folder or hub name of the base model; empty: as the run named it.

    Raises:
        UserError: no adapter, a damaged one, a folder that is not empty, or a base model that is
            another or cannot be loaded. Nothing is left in the folder.
    """
    source = find_adapter(at_home(folder))
    inference = read_inference(source)
    if base:
        model = inference.model.model_copy(update={"name": base})
        inference = inference.model_copy(update={"model": model, "upstream": ""})
    if family_of(inference.model).tags:
        raise UserError(f"{source.path}: tags words; peft loads it as it is, or use deal predict")
    target = at_home(to)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: is there already; choose another --to")
    target, there = target.resolve(), target.exists()
    adapted = checked_adapter(source, inference, inference.model)[1]
    read_heads(source)
    target.mkdir(parents=True, exist_ok=True)
    try:
        with quiet_peft():
            return _write(source, inference, adapted, target)
    except BaseException as error:  # nothing is left, so that the same command can be tried again
        shutil.rmtree(target, ignore_errors=True)
        if there:
            target.mkdir()
        if not isinstance(error, OSError):
            raise
        why = f"cannot be written ({error.strerror or error})"
        raise UserError(
            f"{target}: {why}; see that the disk has room, or choose another --to"
        ) from None


def _write(
    source: AdapterFolder, inference: Inference, adapted: AdapterConfig, to: Path
) -> list[str]:
    for file in (source.inference, source.weights, source.heads):
        if file.exists():
            shutil.copyfile(file, to / file.name)
    base, revision = local_base(inference, to), with_revision(inference.model.name)[1]
    write_labels(inference, adapted, to)
    notes = []
    try:
        write_prompts(inference, to)
    except UserError as reason:  # the tokeniser is not here, which makes them
        notes = [f"{PROMPTS} is left out: {reason}"]
    map_of = choose("adapter_kind", inference.adapter_kind, KINDS).map_behind
    if map_of is not None:  # of which PEFT knows nothing
        save_file({"weight": map_of(read_adapter(source))}, to / MAP)
        said = f"{MAP} is a map behind the pooling of {base}; {PROGRAM} answers with it"
    elif inference.components:
        _write_components(source, inference, to, base)
        said = (
            f"adapters of {base}, one a component; load each with "
            f"peft's load_adapter; {source.heads.name} holds the router"
        )
    else:
        config = json.loads(source.config.read_text(encoding="utf-8"))
        config |= {"base_model_name_or_path": base, "revision": revision or None}
        AdapterFolder(to).config.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        auto = family_of(inference.model).auto_class
        peft = "AutoPeftModel" + (auto.removeprefix("AutoModel") or "ForFeatureExtraction")
        said = f"an adapter of {base}; load it with peft.{peft}.from_pretrained"
    if not inference.components:
        embedded = (to / BASE).is_dir()
        write_program(to, BASE if embedded else base, "" if embedded else revision)
    if inference.pooling == "mean":
        write_classifier(inference, to)
        if map_of is None:
            write_sentence_encoder(inference, to)
    write_card(source, inference, to)
    mode = (to / source.inference.name).stat().st_mode & 0o777
    for written in filter(Path.is_file, to.rglob("*")):
        written.chmod(mode)  # the library of weights lets its owner alone read them
    return [f"{to}: {said}", *notes]


def _write_components(source: AdapterFolder, inference: Inference, to: Path, base: str) -> None:
    state = as_evaluated(read_adapter(source), inference)
    (to / source.weights.name).unlink()
    for place in range(len(state.components)):
        own, folder = state.view(place).retained, to / f"component-{place + 1}"
        LoraConfig(
            r=own.rank,
            lora_alpha=own.rank,
            target_modules=sorted(own.layers),
            base_model_name_or_path=base,
            revision=with_revision(inference.model.name)[1] or None,
            task_type=inference.task_type,
            inference_mode=True,
        ).save_pretrained(str(folder))
        tensors = {key: torch.from_numpy(value.copy()) for key, value in to_arrays(own).items()}
        save_file(tensors, AdapterFolder(folder).weights, {"format": "pt"})


def local_base(inference: Inference, to: Path) -> str:
    """Return where the base model is found from the export: a name on the hub, or a path from the
    folder; an embedded one is written into it, as transformers does, in float32."""
    name = inference.model.name
    if name.startswith(EMBEDDED):
        save_base(inference, to / BASE, plain_base(inference))
        return upstream_of(name) if name in TO_THE_BIT else BASE
    return os.path.relpath(name, to) if Path(name).is_dir() else with_revision(name)[0]


def plain_base(inference: Inference) -> Any:
    """Return the base model in float32, as transformers has it."""
    return pretrained(auto_class(inference.model), inference.model.name, dtype=torch.float32)


def save_base(inference: Inference, to: Path, model: Any) -> None:
    """Write a model, and the tokeniser of the base model."""
    tokenizer = pretrained(AutoTokenizer, inference.model.name)
    with quiet():
        model.save_pretrained(to)
        tokenizer.save_pretrained(to)


def write_sentence_encoder(inference: Inference, to: Path) -> None:
    """Write an encoder with its adapter merged, and how sentence-transformers puts a vector
    together: the mean over tokens, as a unit vector."""
    merged = PeftModel.from_pretrained(plain_base(inference), str(to)).merge_and_unload()
    folder = to / ENCODER  # beside an adapter's settings the library would load the base model
    save_base(inference, folder / "0_Transformer", merged)
    kinds = {"0_Transformer": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"{MODULES}.{kind}"}
        for place, (path, kind) in enumerate(kinds.items())
    ]
    size = merged.config.hidden_size
    pooling = {"word_embedding_dimension": size, "pooling_mode_mean_tokens": True}
    read = {"max_seq_length": inference.max_length, "do_lower_case": False}
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": pooling,
        "0_Transformer/sentence_bert_config.json": read,
    }
    (folder / "2_Normalize").mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_classifier(inference: Inference, to: Path) -> None:
    """Write what a pipeline of transformers loads: labels of all tasks learnt, the tokeniser and
    a class that answers with the program of the export."""
    folder, learnt = to / CLASSIFIER, inference.learnt or inference.all_tasks
    labels = [label for own in learnt.values() for label in own]
    folder.mkdir()
    tokenizer = pretrained(AutoTokenizer, inference.model.name)
    tokenizer.model_max_length = inference.max_length
    with quiet():
        tokenizer.save_pretrained(folder)
    config = {
        "model_type": "deal-export",
        "architectures": ["ExportClassifier"],
        "auto_map": {
            "AutoConfig": "classifier.ExportConfig",
            "AutoModelForSequenceClassification": "classifier.ExportClassifier",
        },
        "tasks": list(learnt),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: place for place, label in enumerate(labels)},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name("classifier.py"), folder / "classifier.py")


def write_labels(inference: Inference, adapted: AdapterConfig, to: Path) -> None:
    """Write task to the unit vectors of its label names by the frozen base model, ``(labels,
    hidden)``, float32, where a text's vector is compared with them."""
    if inference.pooling == "none":
        return
    whole = inference.model.model_copy(update={"bits": 0})  # as the folder's user loads it
    model = load_model(whole, adapted, inference.max_length)
    found = {}
    for task in inference.tasks:
        words = [Example(label.replace("_", " "), task.labels[0]) for label in task.labels]
        found[task.name] = base_embeddings(model, model.encode(words, task.labels[:1]))
    save_file(found, to / LABELS)


def write_prompts(inference: Inference, to: Path) -> None:
    """Write ``prompts.json``, unless the model is asked with the text alone.

    Raises:
        UserError: the tokeniser cannot be loaded.
    """
    model = inference.model
    make = family_of(model).prompts
    if make is None:
        return
    tokenizer, config = pretrained(AutoTokenizer, model.name), pretrained(AutoConfig, model.name)
    prompts = make(tokenizer, config, model, inference.max_length)
    entries = {}
    for task in inference.tasks:
        around = prompts.prompt((), task.labels, task.instruction)
        words = TEXT.join(prompts.template.around(task.instruction or INSTRUCTION, task.labels))
        entries[task.name] = {
            "prompt": words.join(map(tokenizer.decode, (prompts.opening, prompts.closing))),
            "before": list(around.tokens[: around.shared]),
            "after": list(around.tokens[around.shared :]),
            "max_length": inference.max_length,
            "labels": dict(zip(task.labels, map(list, prompts.scored(task.labels)), strict=True)),
            "start": list(prompts.start),
            "writing": greedy_settings(prompts),
        }
    (to / PROMPTS).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


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
    """Write the card of a complete export ``to``, with a table of its files, where the run's folder
    has one."""
    if not source.card.exists():
        return
    use, task = "| in this folder | |\n|---|---|\n", inference.tasks[0].name
    for name, meaning in HOLDS.items():
        if (to / name).exists():
            use += f"| `{name}{'/' if (to / name).is_dir() else ''}` | {meaning} |\n"
    card, use = source.card.read_text(encoding="utf-8"), f"{use}\n"
    use += f'Without this project: `python {PROGRAM} {task} "a text"`.'
    told = "" if inference.pooling == "mean" else f" --task {task}"
    use += f' With it: `deal predict . "a text"{told}`.'
    if inference.task_type == "CAUSAL_LM" and (to / PROMPTS).exists():
        folder = "."
        if inference.components:
            folder, task = "component-1", inference.components[0].tasks[0]
        use += "\n" + PIPELINE.replace("TASK", repr(task)).replace("FOLDER", repr(folder))
    card = with_use(with_base(card, f"{BASE}/") if (to / BASE).is_dir() else card, use)
    (to / source.card.name).write_text(card, encoding="utf-8")
