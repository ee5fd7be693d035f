"""Run by another interpreter, in which this project is not: what an export is to others.

``outside.py SITE_PACKAGES JOBS``: a list of jobs in JSON, one after the other. A job
``["answer", FOLDER, TASK, TEXT]`` runs the program of an export, ``["pipeline", FOLDER, TEXT]`` a
pipeline of transformers, ``["page", FOLDER, CODE]`` the code of a page in a folder, ``["card",
FOLDER, TEXT]`` that of the export's own; of any other, ``[KIND, OUT, IDS, ADAPTER, MOVED]``, the
numbers of each folder go to OUT. Each prints one line.
"""

import importlib.util
import json
import os
import runpy
import sys
from functools import partial

sys.path.append(sys.argv[1])
for name in ("deal_core", "client", "server", "simulations"):
    if importlib.util.find_spec(name) is not None:
        sys.exit(f"{name} is here")


def run_program(folder, *words):
    program = f"{folder}/answer.py"
    sys.argv = [program, *words]
    runpy.run_path(program, run_name="__main__")


def run_page(folder, code):
    """As in a process of its own: all that the code uses, it imports."""
    os.chdir(folder)
    exec(compile(code, "docs/using.md", "exec"), {"__name__": "__main__"})


def run_card(folder, text):
    """The code of an export's own page."""
    with open(f"{folder}/README.md") as file:
        code = file.read().partition("```python\n")[2].partition("```")[0]
    code = code.replace("a text", text)
    names = {"print": lambda found: print(json.dumps(found[0]["generated_text"]))}
    os.chdir(folder)
    exec(compile(code, "README.md", "exec"), names)
    assert any("lora_B" in name for name, _ in names["writer"].model.named_parameters())


def run_pipeline(folder, text):
    """As sites of models do it; the labels are those of all tasks learnt."""
    import transformers

    found = transformers.pipeline("text-classification", folder, trust_remote_code=True)
    alone, (beside, _) = found(text), found([text, f"{text} and a longer text beside it"])
    assert alone[0]["label"] == beside["label"]
    print(json.dumps(alone[0]))


def compute(kind, out, ids, adapter, moved):
    import peft
    import torch
    import transformers
    from safetensors.torch import save_file

    suffix = {"causal": "ForCausalLM", "seq2seq": "ForSeq2SeqLM", "encoder": ""}[kind]
    plain = getattr(transformers, "AutoModel" + suffix)
    auto_peft = getattr(peft, "AutoPeftModel" + (suffix or "ForFeatureExtraction"))
    os.chdir(adapter)  # where the base model lies is said from there, or on the hub
    with open("adapter_config.json") as file:
        base = json.load(file)["base_model_name_or_path"]
    models = {}
    if os.path.isdir(base):
        models["peft"] = lambda: auto_peft.from_pretrained(adapter)
        models["transformers"] = lambda: plain.from_pretrained(adapter)
    if moved:
        models["moved"] = lambda: peft.PeftModel.from_pretrained(
            plain.from_pretrained(f"{moved}/base"), moved
        )
    tokens = {"input_ids": torch.tensor([ids])}
    if kind == "seq2seq":
        tokens["decoder_input_ids"] = tokens["input_ids"]
    numbers = {}
    for name, load in models.items():
        model = load().eval()
        assert next(model.parameters()).dtype == torch.float32
        with torch.no_grad():
            output = model(**tokens)
        numbers[name] = output.logits if suffix else output.last_hidden_state
    save_file({name: value.contiguous().clone() for name, value in numbers.items()}, out)
    where = base if os.path.isdir(base) else f"{moved}/base"
    tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    print(json.dumps(tokenizer("spinal block")["input_ids"]))


JOBS = {"answer": run_program, "pipeline": run_pipeline, "card": run_card, "page": run_page}
for kind, *words in json.loads(sys.argv[2]):
    JOBS.get(kind, partial(compute, kind))(*words)
