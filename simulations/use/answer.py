"""Answer texts with what lies beside this file: ``python answer.py TASK "a text" ...``.

It needs torch, transformers and safetensors, and peft where the folder holds an adapter. It prints
a JSON object a text: the best label and the score of each, or what the model writes.
"""

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

BASE = "base"
"""Where the base model lies: in this folder, in another, or on the Hugging Face hub."""
REVISION = None
"""Of a base model on the hub; None: the newest."""
HERE = Path(__file__).resolve().parent
AUTO = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}
NAMES_SCALE = 20.0
"""Of the cosine between a text and the name of a label."""
NO_ANSWER = -1e12
"""Score of a label whose task has no class means, beside others that have some."""


@cache
def settings(name: str = "inference.json") -> Any:
    """Return a JSON file of the folder."""
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def load() -> tuple[Any, Any]:
    """Return model and tokeniser."""
    where = str(HERE / BASE) if (HERE / BASE).is_dir() else BASE
    loader = getattr(transformers, AUTO.get(settings()["task_type"], "AutoModel"))
    model = loader.from_pretrained(where, revision=REVISION, dtype=torch.float32)
    if (HERE / "adapter_config.json").exists():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(HERE))
    return model.eval(), transformers.AutoTokenizer.from_pretrained(where, revision=REVISION)


def tensors(name: str) -> dict[str, Tensor]:
    """Return the tensors of a file, none where there is none."""
    return load_file(HERE / name) if (HERE / name).exists() else {}


def by_means(model: Any, inputs: dict[str, Any], head: Tensor, own: slice) -> Tensor:
    """Return the scores of class means, which are of the frozen model: on the vectors of its last
    layers, two by two, each the mean over the tokens of the text (``own``)."""
    frozen = model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()
    with frozen:
        read = model(**inputs, output_hidden_states=True)
    states = read.get("encoder_hidden_states") or read.hidden_states
    layers = states[1:][: -settings()["head_layers"] - 1 : -1]  # the last one first
    units = [normalize(layer[0, own].float().mean(dim=0), dim=0) for layer in layers]
    pairs = [
        normalize(torch.stack(units[i : i + 2]).sum(0), dim=0) for i in range(0, len(units), 2)
    ]
    embedding = torch.cat(pairs) / len(pairs) ** 0.5
    scores: Tensor = head[:, :-1] @ embedding + head[:, -1]
    return scores


def by_vectors(model: Any, tokens: dict[str, Any], tasks: Sequence[str]) -> Tensor:
    """Return the scores of an encoder for the labels of some tasks: of their names, and of class
    means where there are some."""
    vector = model(**tokens).last_hidden_state.float().mean(dim=1)  # of one text: no padding
    if map_behind := tensors("pooled_map.safetensors"):
        vector = vector @ map_behind["weight"].T
    names = [tensors("label_embeddings.safetensors")[task] for task in tasks]
    scores: Tensor = NAMES_SCALE * (normalize(vector) @ torch.cat(names).T)[0]
    heads = tensors("heads.safetensors")
    known = next((heads[task] for task in tasks if task in heads), None)
    if known is None:
        return scores
    none = torch.zeros(1, known.shape[1])
    none[0, -1] = NO_ANSWER
    rows = [heads.get(t, none.expand(len(own), -1)) for t, own in zip(tasks, names, strict=True)]
    weight: float = settings()["names_weight"]
    return by_means(model, tokens, torch.cat(rows), slice(None)) + weight * scores


def by_words(model: Any, tokenizer: Any, task: str, text: str, head: Tensor | None) -> Any:
    """Return the scores of a model that answers in words, or what it writes where the task has no
    labels."""
    asked = settings("prompts.json")[task]
    words = tokenizer(text, add_special_tokens=False)["input_ids"][: asked["max_length"]]
    prompt = torch.tensor([asked["before"] + words + asked["after"]])
    start, apart = asked["start"], settings()["task_type"] == "SEQ_2_SEQ_LM"
    if not asked["labels"]:
        greedy = transformers.GenerationConfig(**asked["writing"])  # type: ignore[no-untyped-call]
        written = model.generate(input_ids=prompt, generation_config=greedy)[0]
        answer = written[len(start) if apart else prompt.shape[1] :]
        return tokenizer.decode(answer, skip_special_tokens=True).strip()

    def inputs(answer: list[int]) -> dict[str, Tensor]:
        if apart:
            return {"input_ids": prompt, "decoder_input_ids": torch.tensor([start + answer])}
        return {"input_ids": torch.cat([prompt, torch.tensor([answer], dtype=torch.long)], dim=1)}

    def score(answer: list[int]) -> float:
        logits = model(**inputs(answer[:-1])).logits[0, -len(answer) :].float()
        likelihoods = logits.log_softmax(dim=1).gather(1, torch.tensor(answer)[:, None])
        return float(likelihoods.mean())

    likely = torch.tensor([score(ids) for ids in asked["labels"].values()])
    if head is None:
        return likely
    first = len(asked["before"])
    own = slice(first, first + max(1, len(words)))
    return by_means(model, inputs([]), head, own) + settings()["names_weight"] * likely


@torch.no_grad()
def main(task: str, *texts: str) -> None:
    """Print a line for each text."""
    model, tokenizer = load()
    labels = next(each["labels"] for each in settings()["tasks"] if each["name"] == task)
    head, vectors = tensors("heads.safetensors").get(task), settings()["pooling"] == "mean"
    cut = {"truncation": True, "max_length": settings()["max_length"], "return_tensors": "pt"}
    for text in texts:
        if vectors:
            found: Any = by_vectors(model, tokenizer(text, **cut), [task])
        else:
            found = by_words(model, tokenizer, task, text, head)
        if isinstance(found, str):
            print(json.dumps({"answer": found}, ensure_ascii=False))
        else:
            scores = dict(zip(labels, found.tolist(), strict=True))
            best = max(scores, key=lambda label: scores[label])
            print(json.dumps({"label": best, "scores": scores}, ensure_ascii=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
