"""``deal export``: PEFT, transformers and the program of an export give the answers of the run."""

import json
import math
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from deal_core.data import Example
from deal_core.errors import UserError
from deal_core.inference.folder import find_adapter, read_inference
from deal_core.inference.predictor import load_predictor
from deal_core.lora.attach import base_only
from deal_core.models.encoder import LOGIT_SCALE
from deal_core.training.evaluation import base_embeddings
from simulations.use import answer as program
from simulations.use.export import export, write_program, write_prompts
from tests.architectures import save
from tests.simulations.runs import simulated
from tests.simulations.use.conftest import LEARNING
from tests.sizes import QUIET, TWO_LAYERS

ROOT = Path(__file__).parents[3]
SITE_PACKAGES = sysconfig.get_paths()["purelib"]
ALONE = (sys.executable, "-I", "-S")
"""No folder of this project, none of a user, and no editable installation."""
TEXT, TASK = "spinal block", "surgery"


@pytest.fixture(scope="module")
def exported(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    export(str(encoder), str(folder / "mine"))
    return folder


def worded(name, folder, make_causal, make_experiment):
    """The folder with the run of such a model with class means, its adapter (``mine``), and with
    texts for the answers of its first task (``writing``)."""
    causal = name in ("llama", "gpt2")
    base = (make_causal if causal else save)(folder / "base", name)
    family = "causal-lm" if causal else "seq2seq-lm"
    means = ("method.name=deal", "method.prototype.enabled=on", "federation.clients=3", *QUIET)
    settings = (f"model.family={family}", f'model.name="{base}"', *LEARNING, *means)
    run = simulated(make_experiment(*settings), folder / "run")
    export(str(run), str(folder / "mine"))
    inference = read_inference(find_adapter(run))
    texts = inference.tasks[0].model_copy(update={"labels": ()})
    writing = inference.model_copy(update={"tasks": (texts,)})
    to = Path(shutil.copytree(folder / "mine", folder / "writing"))
    write_prompts(writing, to)
    (to / "inference.json").write_text(writing.model_dump_json())
    return folder


@pytest.fixture(scope="module")
def with_heads(tmp_path_factory, make_experiment):
    """A folder with the run of an encoder of the default method, which answers by heads and names,
    and its export (``mine``)."""
    folder = tmp_path_factory.mktemp("heads")
    means = ("method.prototype.enabled=on", "federation.clients=3", *QUIET)
    settings = (*means, "federation.rounds=1", "train.precision=float32", TWO_LAYERS)
    run = simulated(make_experiment(*settings), folder / "run")
    export(str(run), str(folder / "mine"))
    return folder


def run_outside(folder, jobs):
    """What a process without this project says of each job; see ``outside.py``."""
    script = str(Path(__file__).with_name("outside.py"))
    done = subprocess.run(
        [*ALONE, script, SITE_PACKAGES, json.dumps([*jobs.values()])],
        cwd=folder,
        capture_output=True,
        text=True,
        env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(jobs, map(json.loads, done.stdout.splitlines()), strict=True))


def token_ids(predictor, task):
    labels = predictor.inference.all_tasks[task]
    return list(predictor.model.encode([Example(TEXT, labels[0])], labels)[0].tokens)


def own_numbers(predictor, ids):
    tokens = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
    if predictor.inference.model.family == "seq2seq-lm":
        tokens["decoder_input_ids"] = tokens["input_ids"]
    with torch.no_grad():
        output = predictor.model.module(**tokens)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def check_numbers(predictor, out, ids, names):
    """Those of every folder are the run's, and not those of the base model."""
    numbers, expected = load_file(out), own_numbers(predictor, ids)
    assert numbers.keys() == names
    for value in numbers.values():
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)
    with base_only(predictor.model.module):
        assert (own_numbers(predictor, ids) - expected).abs().max() > 1e-3  # the adapter is there


def own_scores(predictor, task):
    """Of each label by its name, or its words."""
    labels, model = predictor.inference.all_tasks[task], predictor.model
    batch = model.encode([Example(TEXT, labels[0])], labels, predictor.inference.instruction(task))
    with torch.no_grad():
        return dict(zip(labels, model.scores(batch, labels)[0].tolist(), strict=True))


def check_answer(predictor, task, said):
    answer, scores = predictor.answer(TEXT, task), said["scores"]
    assert [said["label"], answer.runner_up] == sorted(scores, key=scores.get)[:-3:-1]
    assert answer.label == said["label"]
    total = sum(math.exp(score - scores[answer.label]) for score in scores.values())
    assert 1 / total == pytest.approx(answer.probability, rel=1e-3)


def test_exports_answer_without_this_project(
    encoder, exported, pooled, with_heads, make_causal, make_experiment, tmp_path
):
    """Also from a folder that has moved; a map behind the pooling; heads beside names; a model that
    answers in words."""
    llama = worded("llama", tmp_path / "llama", make_causal, make_experiment)
    moved = Path(shutil.copytree(exported / "mine", tmp_path / "moved"))
    predictor = load_predictor(find_adapter(encoder))
    ids, out = token_ids(predictor, TASK), tmp_path / "numbers.safetensors"
    folders = [exported / "mine", moved]
    programs = (moved, pooled / "mine", with_heads / "mine")
    page = (ROOT / "docs/using.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    said = run_outside(
        tmp_path,
        {
            "numbers": ["encoder", str(out), ids, *map(str, folders)],
            "page": ["page", str(exported), code],
            **{str(folder): ["answer", str(folder), TASK, TEXT] for folder in programs},
            **{
                f"pipeline {folder}": ["pipeline", str(folder / "classifier"), TEXT]
                for folder in programs
            },
            **word_jobs(llama),
        },
    )
    check_words(llama, said)
    assert said["numbers"] == ids
    labels = predictor.inference.all_tasks[TASK]
    assert labels[said["page"]] == predictor.answer(TEXT, TASK).label
    check_numbers(predictor, out, ids, {"moved"})
    expected = pytest.approx(own_scores(predictor, TASK), abs=2e-4)
    assert said[str(moved)]["scores"] == expected
    for folder in (pooled, with_heads):
        predictor = load_predictor(find_adapter(folder / "run"))
        check_answer(predictor, TASK, said[str(folder / "mine")])
        answer, found = predictor.answer(TEXT), said[f"pipeline {folder / 'mine'}"]
        expected = (answer.label, pytest.approx(answer.probability, rel=1e-3))
        assert (found["label"], found["score"]) == expected
    assert predictor.inference.names_weight == 0.5
    learnt = load_predictor(find_adapter(pooled / "run"))
    assert said[str(pooled / "mine")]["scores"] == pytest.approx(own_scores(learnt, TASK), abs=1e-3)
    with base_only(learnt.model.module):
        before = own_scores(learnt, TASK)
    assert max(abs(before[x] - y) for x, y in own_scores(learnt, TASK).items()) > 1


def word_jobs(place):
    predictor = load_predictor(find_adapter(place / "run"))
    kind = "causal" if predictor.inference.model.family == "causal-lm" else "seq2seq"
    ids, task = token_ids(predictor, TASK), predictor.inference.tasks[0].name
    numbers = [kind, str(place / "numbers.safetensors"), ids, str(place / "mine"), ""]
    answers = {
        f"word {name}": ["answer", str(place / name), task, TEXT] for name in ("mine", "writing")
    }
    cards = {"card": ["card", str(place / "writing"), TEXT]} if kind == "causal" else {}
    return {"word numbers": numbers, **answers, **cards}


def check_words(place, said):
    predictor = load_predictor(find_adapter(place / "run"))
    task, model = predictor.inference.tasks[0], predictor.model
    ids = token_ids(predictor, TASK)
    check_numbers(predictor, place / "numbers.safetensors", ids, {"peft", "transformers"})
    words, mine = own_scores(predictor, task.name), said["word mine"]
    check_answer(predictor, task.name, mine)
    batch = model.encode([Example(TEXT, task.labels[0])], task.labels, task.instruction)
    embedding = base_embeddings(model, batch, predictor.inference.head_layers)[0]
    head = predictor.heads[task.name]
    means = (head[:, :-1] @ embedding + head[:, -1]).tolist()
    weighed = {label: mean + words[label] for label, mean in zip(task.labels, means, strict=True)}
    assert mine["scores"] == pytest.approx(weighed, abs=1e-4)
    assert max(means) - min(means) > 0.01
    asked = model.encode([Example(TEXT, "", target="x")], (), task.instruction)
    assert said["word writing"]["answer"] == (written := model.write(asked)[0])
    assert said.get("card", written).strip() == written
    config = json.loads((place / "mine" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../base"
    causal = predictor.inference.model.family == "causal-lm"
    assert config["task_type"] == ("CAUSAL_LM" if causal else "SEQ_2_SEQ_LM")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "gpt2", "bart"])
def test_other_models_that_answer_in_words(name, make_causal, make_experiment, tmp_path):
    """With output weights that are the input's, or are not."""
    place = worded(name, tmp_path, make_causal, make_experiment)
    check_words(place, run_outside(tmp_path, word_jobs(place)))


def test_the_program_knows_the_scale_and_the_base_model(tmp_path):
    assert program.NAMES_SCALE == LOGIT_SCALE
    write_program(tmp_path, "org/base", "abc")
    text = (tmp_path / "answer.py").read_text()
    assert '\nBASE = "org/base"\n' in text
    assert "\nREVISION = 'abc'\n" in text


@pytest.mark.slow
def test_a_gguf_becomes_ordinary_safetensors(tmp_path, make_experiment):
    settings = ("model.family=causal-lm", "model.name=embedded:smollm2", "train.max_length=8")
    sizes = ('data.tasks=["surgery"]', "data.max_train=4", "data.max_test=4", "adapter.rank=2")
    run = simulated(make_experiment(*settings, *sizes, *LEARNING), tmp_path / "run")
    export(str(run), str(tmp_path / "mine"))
    predictor = load_predictor(find_adapter(run))
    ids = token_ids(predictor, "surgery")
    out, mine = str(tmp_path / "numbers.safetensors"), str(tmp_path / "mine")
    run_outside(tmp_path, {"it": ["causal", out, ids, mine, mine]})
    numbers = load_file(out)
    expected = own_numbers(predictor, ids)
    assert numbers.keys() == {"peft", "transformers", "moved"}
    for value in numbers.values():  # logits of up to 30: relative
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-4)


def test_an_export_says_what_it_is_and_who_reads_the_card_reads_the_weights(encoder, exported):
    mine = exported / "mine"
    card = (mine / "README.md").read_text()
    assert "base_model: sentence-transformers/all-MiniLM-L6-v2" in card
    assert "**None.** No text left its client" in card
    config = json.loads((encoder / "adapter" / "adapter_config.json").read_text())
    named = (config["base_model_name_or_path"], config["task_type"])
    assert named == ("sentence-transformers/all-MiniLM-L6-v2", "FEATURE_EXTRACTION")
    assert load_predictor(find_adapter(mine)).answer(TEXT) == load_predictor(
        find_adapter(encoder)
    ).answer(TEXT)
    for folder in (encoder / "adapter", mine):
        modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
        assert modes == {(folder / "README.md").stat().st_mode & 0o777}


def test_an_encoder_is_one_of_sentence_transformers_and_names_no_path(encoder, exported):
    """As that library puts it together: modules one after another, here without it."""
    mine, predictor = exported / "mine", load_predictor(find_adapter(encoder))
    whole = mine / "sentence"
    modules = json.loads((whole / "modules.json").read_text())
    assert [m["type"].rpartition(".")[2] for m in modules] == [
        "Transformer",
        "Pooling",
        "Normalize",
    ]
    assert all((whole / module["path"]).is_dir() for module in modules)
    assert json.loads((whole / "1_Pooling/config.json").read_text())["pooling_mode_mean_tokens"]
    folder = whole / modules[0]["path"]
    tokens = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder)(**tokens).last_hidden_state
        labels = predictor.inference.all_tasks[TASK]
        expected = predictor.model.embed(predictor.model.encode([Example(TEXT, labels[0])], labels))
    vector = torch.nn.functional.normalize(states.mean(dim=1))
    torch.testing.assert_close(vector, expected, rtol=0, atol=1e-5)
    config = json.loads((mine / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "sentence-transformers/all-MiniLM-L6-v2"
    texts = [p for p in mine.rglob("*") if p.suffix in (".json", ".md", ".py", ".jinja")]
    places = str(exported), str(Path(__file__).parents[3])
    assert [p for p in texts if any(place in p.read_text() for place in places)] == []


def test_a_folder_that_is_not_empty_is_left_alone(encoder, tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(UserError, match="is there already; choose another --to"):
        export(str(encoder), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "heads.safetensors"])
def test_a_damaged_file_is_not_handed_on(with_heads, tmp_path, file):
    run = shutil.copytree(with_heads / "run" / "adapter", tmp_path / "run")
    (run / file).write_bytes((run / file).read_bytes()[:-9])
    with pytest.raises(UserError, match=f"{file}: cannot be read"):
        export(str(run), str(tmp_path / "to"))
    assert not (tmp_path / "to").exists()


def test_a_base_that_it_was_not_learnt_for_is_refused(encoder, tmp_path):
    other = save(tmp_path / "other", "bert")
    with pytest.raises(UserError, match="was learnt for another base model"):
        export(str(encoder), str(tmp_path / "to"), base=str(other))
    assert not (tmp_path / "to").exists()


def test_a_failed_export_leaves_nothing_that_blocks_the_next(encoder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "there").mkdir()
    with monkeypatch.context() as later:
        later.setattr("simulations.use.export.write_labels", full)
        for to in ("there", "new"):
            with pytest.raises(UserError, match="No space left on device"):
                export(str(encoder), str(tmp_path / to))
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


@pytest.mark.slow
def test_a_process_that_imports_the_models_says_nothing():
    """Whether bitsandbytes is there or not: PEFT imports it, where no weight has 8 or 4 bits."""
    code = "import deal_core.models"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
