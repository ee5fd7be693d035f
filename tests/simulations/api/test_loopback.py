"""A program of one's own in Flower's runtimes: the numbers of the simulation in one process."""

import itertools
import os
import subprocess
import sys

import pytest

from deal_core.installed import import_path
from server.results import read_results
from tests.architectures import save
from tests.simulations.runs import assert_same_run, learnt_adapter

PROGRAM = """
import sys
from peft import LoraConfig, get_peft_model
from transformers import {loader} as Auto, AutoTokenizer, Trainer, TrainingArguments
from simulations.api import Deal, DealClient, DealStrategy, RecordDP, patch, simulate

model = get_peft_model(Auto.from_pretrained("{name}"), LoraConfig(r=2, lora_alpha=4))
tokenizer = AutoTokenizer.from_pretrained("{name}")
tasks = {tasks!r}
texts = ("a b", "c d c", "a a d", "b c", "d d", "c a", "b b d", "a c d")
rows = {{t: [(text, tasks[t][k % 2]) for k, text in enumerate(texts)] for t in tasks}}
arguments = TrainingArguments("trainer", num_train_epochs=1, learning_rate=0.01, use_cpu=True,
                              report_to=[], save_strategy="no")


def client(number):
    own = {{t: {{"train": rows[t][number::2] * 2, "test": rows[t][:4]}} for t in tasks}}
    if kind == "trainer":
        return patch(Trainer(model, arguments, processing_class=tokenizer), own)
    privacy = RecordDP(epsilon=8, delta=1e-3) if kind == "private" else None
    return DealClient(model, tokenizer, own, method=Deal(), privacy=privacy)


kind, *engines = sys.argv[1:]
for engine in engines:
    strategy = DealStrategy(clients=2, rounds=1, overrides={{"run.threads": 1}})
    done = simulate(client, strategy, tasks, engine=engine, out=engine)
    print(done.results.average_accuracy)
"""
TASKS = {"colours": ("red", "blue"), "words": ("green", "options")}
LOADERS = {"bert": "AutoModel", "llama": "AutoModelForCausalLM", "t5": "AutoModelForSeq2SeqLM"}
KINDS = ("plain", "private", "trainer")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "engine"),
    [
        *itertools.product(LOADERS, KINDS, ["loopback"]),
        ("llama", "private", "flower"),
    ],
)
def test_ten_lines_give_equal_numbers_in_flowers_runtimes(tmp_path, name, kind, engine):
    """The program, in a file of its own, runs here and then there."""
    tasks = TASKS if (name, kind) == ("bert", "private") else {"words": TASKS["words"]}
    save(tmp_path / name, name)
    program = PROGRAM.format(name=name, loader=LOADERS[name], tasks=tasks)
    (tmp_path / "mine.py").write_text(program)
    ran = subprocess.run(
        [sys.executable, "mine.py", kind, "inprocess", engine],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": import_path()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    learnt = learnt_adapter(tmp_path / "inprocess")
    assert any(value.any() for key, value in learnt.items() if "lora_B" in key)
    assert_same_run(tmp_path / "inprocess", tmp_path / engine)
    assert bool(read_results(tmp_path / engine).privacy.epsilon) == (kind == "private")
    assert (tmp_path / engine / "flower.log").exists()
