"""``deal export``: PEFT and transformers alone give the numbers of the run's own model."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deal_core.data import Example
from deal_core.errors import UserError
from deal_core.inference.folder import find_adapter, read_inference
from deal_core.inference.predictor import Predictor, load_predictor
from deal_core.lora.attach import base_only
from deal_core.models.encoder import LOGIT_SCALE
from deal_core.training.evaluation import base_embeddings
from simulations.use.cards import asking_code, encoder_code, write_prompts
from simulations.use.export import ExportRequest, export
from tests.architectures import save
from tests.simulations.use.finished_runs import LEARNING, examples, finished

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/using.md").read_text(encoding="utf-8")
SITE_PACKAGES = sysconfig.get_paths()["purelib"]
ALONE = (sys.executable, "-I", "-S")
"""No folder of this project, none of a user, and no editable installation."""
TEXT = "spinal block"


@pytest.fixture(scope="module")
def exported(encoder, tmp_path_factory) -> Path:
    """The encoder's adapter, and merged."""
    folder = tmp_path_factory.mktemp("exported")
    export(ExportRequest(str(encoder), str(folder / "mine")))
    export(ExportRequest(str(encoder), str(folder / "merged"), merge=True))
    return folder


@pytest.fixture(scope="module")
def causal(tmp_path_factory, make_causal, make_experiment) -> dict[str, Path]:
    """Kind to a folder with the run of a causal model, its adapter (``mine``), and merged."""
    found = {}
    for kind in ("llama", "gpt2"):
        found[kind] = folder = tmp_path_factory.mktemp(kind)
        base = make_causal(folder / "base", kind)
        export_both(folder, make_experiment, base, "causal-lm")
    return found


def export_both(folder: Path, make_experiment, base: Path, family: str) -> None:
    """Run a model that answers in words, with class means; export its adapter, and merged."""
    means = ("method.name=deal", "method.prototype.enabled=on", "federation.clients=3")
    settings = (f"model.family={family}", f'model.name="{base}"', *LEARNING, *means)
    run = finished(folder / "run", make_experiment(*settings))
    export(ExportRequest(str(run), str(folder / "mine")))
    export(ExportRequest(str(run), str(folder / "merged"), merge=True))


@pytest.fixture(scope="module")
def seq2seq(tmp_path_factory, make_experiment) -> dict[str, Path]:
    """The same of encoder-decoders: output weights that are the input's (t5, bart), or are not."""
    found = {}
    for name in ("t5", "bart"):
        found[name] = folder = tmp_path_factory.mktemp(name)
        export_both(folder, make_experiment, save(folder / "base", name), "seq2seq-lm")
    return found


@pytest.fixture(scope="module")
def with_heads(tmp_path_factory, make_experiment) -> Path:
    """The same of a run of the default method, which answers by heads and names."""
    folder = tmp_path_factory.mktemp("heads")
    means = ("method.prototype.enabled=on", "federation.clients=3", "federation.rounds=1")
    settings = (*means, "train.precision=float32")
    run = finished(folder / "run", make_experiment(*settings))
    export(ExportRequest(str(run), str(folder / "mine")))
    return folder


def run_outside(folder: Path, *jobs: list[object]) -> list[str]:
    """What a process without this project says of each job; see ``outside.py``."""
    script = str(Path(__file__).with_name("outside.py"))
    done = subprocess.run(
        [*ALONE, script, SITE_PACKAGES, json.dumps(jobs)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == len(jobs)
    return lines


@dataclass(frozen=True)
class Outside:
    """Attributes: ``said``, the line of each job; ``numbers``, those of each folder."""

    said: dict[str, str]
    numbers: dict[str, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def outside(encoder, exported, causal, seq2seq, pooled, with_heads, tmp_path_factory) -> Outside:
    """All jobs in one process, which imports for seconds."""
    folder = tmp_path_factory.mktemp("outside")
    shutil.copytree(exported / "mine", folder / "moved")

    def out(kind: str) -> str:
        return str(folder / f"{kind}.safetensors")

    folders = [str(exported / "mine"), str(exported / "merged"), str(folder / "moved")]
    jobs: dict[str, list[object]] = {
        "page": ["page", str(exported), page_example("adapter")],
        "moved card": ["page", str(folder / "moved"), all_cosines(card_example(exported))],
        "merged card": ["page", str(exported / "merged"), all_cosines(merged_example(exported))],
        "card of heads": ["page", str(with_heads / "mine"), all_scores(card_example(with_heads))],
        "map of the page": ["page", str(pooled), all_cosines(page_example("map"))],
        "map of the card": ["page", str(pooled / "mine"), all_cosines(card_example(pooled))],
        "heads of the page": ["page", str(with_heads), all_scores(page_example("heads"))],
        "encoder": ["encoder", out("encoder"), ids_of(encoder), *folders],
    }
    for family, places in (("causal", causal), ("seq2seq", seq2seq)):
        for kind, place in places.items():
            folders = [str(place / "mine"), str(place / "merged"), ""]
            jobs[kind] = [family, out(kind), ids_of(place / "run"), *folders]
            for copy in ("mine", "merged"):
                jobs[f"{copy} card of {kind}"] = ["page", str(place / copy), words_of(place / copy)]
            jobs[f"writing of {kind}"] = ["page", *writing_page(place)]
    jobs["writing of the page"] = ["page", *written_by_the_page(causal["llama"])]
    words = page_example("words").replace("mine/base", "base")
    jobs["words of the page"] = ["page", str(causal["llama"]), words]
    said = dict(zip(jobs, run_outside(folder, *jobs.values()), strict=True))
    return Outside(said, {kind: load_file(out(kind)) for kind in ("encoder", *causal, *seq2seq)})


def page_example(of: str) -> str:
    names = ("adapter", "map", "heads", "writing", "words")
    return dict(zip(names, examples(PAGE), strict=True))[of]


def merged_example(folder: Path) -> str:
    return card_example(folder, "merged")


def card_example(folder: Path, export: str = "mine") -> str:
    """The lines of a card, with text and task of the page."""
    (code,) = examples((folder / export / "README.md").read_text(encoding="utf-8"))
    assert '"a text"' in code
    return code.replace("a text", TEXT).replace('"laboratory"', '"surgery"')


def words_of(folder: Path) -> str:
    """The lines of a card of a model that answers in words; they print the score of each label."""
    (code,) = examples((folder / "README.md").read_text(encoding="utf-8"))
    lines = code.replace("a text", TEXT).splitlines()
    assert lines[-1] == "print(max(scores, key=scores.get))"
    return "\n".join([*lines[:-1], "print(json.dumps(scores))"])


def writing_page(place: Path) -> tuple[str, str]:
    """Folder and lines of an export whose first task has texts for answers."""
    inference = read_inference(find_adapter(place / "run"))
    texts = inference.tasks[0].model_copy(update={"labels": ()})
    writing = inference.model_copy(update={"tasks": (texts,)})
    folder = Path(shutil.copytree(place / "mine", place / "writing"))
    write_prompts(writing, folder)
    code = asking_code(writing, str(place / "base"), merged=False)
    said = code.replace("print(", "print(json.dumps(").rstrip() + ")"  # in one line
    return str(folder), said.replace("a text", TEXT)


def written_by_the_page(place: Path) -> tuple[str, str]:
    """The export of :func:`writing_page`, and the lines of the page about it."""
    folder, task = place / "writing", read_inference(find_adapter(place / "run")).tasks[0].name
    code = page_example("writing").replace("print(", "print(json.dumps(").rstrip() + ")"
    for old, new in (("mine/base", str(place / "base")), ("mine", "."), ("summaries", task)):
        code = code.replace(f'"{old}', f'"{new}')
    return str(folder), code


def all_cosines(code: str) -> str:
    """The same lines; they print the cosine of each label, not which is the largest."""
    assert code.count(".argmax().item()") == 1
    return code.replace(".argmax().item()", ".tolist()")


def all_scores(code: str) -> str:
    """The same lines; they print how far each label is behind the best, in units of log odds."""
    assert code.count("scores.argmax().item()") == 1
    return code.replace("scores.argmax().item()", "scores.log_softmax(dim=1)[0].tolist()")


def ids_of(run: Path) -> list[int]:
    return token_ids(load_predictor(find_adapter(run)), "surgery")


def token_ids(predictor: Predictor, task: str) -> list[int]:
    labels = predictor.inference.all_tasks[task]
    return list(predictor.model.encode([Example(TEXT, labels[0])], labels)[0].tokens)


def own_numbers(predictor: Predictor, ids: list[int]) -> torch.Tensor:
    tokens = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
    if predictor.inference.model.family == "seq2seq-lm":
        tokens["decoder_input_ids"] = tokens["input_ids"]
    with torch.no_grad():
        output = predictor.model.module(**tokens)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def check_equal(numbers: dict[str, torch.Tensor], expected: torch.Tensor, names: set[str]) -> None:
    assert numbers.keys() == names
    for value in numbers.values():
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)


def test_an_encoder_without_this_project(encoder, outside):
    predictor = load_predictor(find_adapter(encoder))
    ids = token_ids(predictor, "surgery")
    assert json.loads(outside.said["encoder"]) == ids
    expected = own_numbers(predictor, ids)
    check_equal(outside.numbers["encoder"], expected, {"peft", "transformers", "merged", "moved"})
    with base_only(predictor.model.module):
        assert (own_numbers(predictor, ids) - expected).abs().max() > 1e-2  # the adapter is there


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_causal_model_without_this_project(kind, causal, outside):
    predictor = load_predictor(find_adapter(causal[kind] / "run"))
    expected = own_numbers(predictor, token_ids(predictor, "surgery"))
    check_equal(outside.numbers[kind], expected, {"peft", "transformers", "merged"})
    config = json.loads((causal[kind] / "mine" / "adapter_config.json").read_text())
    named = (config["base_model_name_or_path"], config["task_type"])
    assert named == (str(causal[kind] / "base"), "CAUSAL_LM")


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_decoder_without_this_project(kind, seq2seq, outside):
    predictor = load_predictor(find_adapter(seq2seq[kind] / "run"))
    ids = token_ids(predictor, "surgery")
    expected = own_numbers(predictor, ids)
    check_equal(outside.numbers[kind], expected, {"peft", "transformers", "merged"})
    with base_only(predictor.model.module):
        assert (own_numbers(predictor, ids) - expected).abs().max() > 1e-3  # the adapter is there
    config = json.loads((seq2seq[kind] / "mine" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bart"])
def test_the_lines_of_a_card_score_labels_and_write_as_deal_does(kind, causal, seq2seq, outside):
    place = {**causal, **seq2seq}[kind]
    predictor = load_predictor(find_adapter(place / "run"))
    task = predictor.inference.tasks[0]
    labels, model = task.labels, predictor.model
    batch = model.encode([Example(TEXT, labels[0])], labels, task.instruction)
    with torch.no_grad():
        expected = dict(zip(labels, model.scores(batch, labels)[0].tolist(), strict=True))
    assert json.loads(outside.said[f"merged card of {kind}"]) == pytest.approx(expected, abs=1e-4)
    both = json.loads(outside.said[f"mine card of {kind}"])
    embedding = base_embeddings(model, batch, predictor.inference.head_layers)[0]
    head = predictor.heads[task.name]
    means = dict(zip(labels, (head[:, :-1] @ embedding + head[:, -1]).tolist(), strict=True))
    weighed = {label: means[label] + expected[label] for label in labels}
    assert both == pytest.approx(weighed, abs=1e-4)
    answer = predictor.answer(TEXT, task.name)
    best, second = sorted(labels, key=lambda label: both[label])[:-3:-1]
    assert (best, second) == (answer.label, answer.runner_up)
    total = sum(math.exp(score - both[best]) for score in both.values())
    assert 1 / total == pytest.approx(answer.probability, rel=1e-3)
    assert means[best] != pytest.approx(means[second], abs=0.01)
    asked = model.encode([Example(TEXT, "", target="x")], (), task.instruction)
    assert json.loads(outside.said[f"writing of {kind}"]) == model.write(asked)[0]
    if kind == "llama":
        assert json.loads(outside.said["writing of the page"]) == model.write(asked)[0]
        assert len(page_example("writing").strip().splitlines()) <= 12


def test_the_lines_of_the_page_about_words_answer_as_deal_does(causal, outside):
    predictor = load_predictor(find_adapter(causal["llama"] / "run"))
    assert outside.said["words of the page"] == predictor.answer(TEXT, "surgery").label


def test_a_map_behind_the_pooling_without_this_project(pooled, outside):
    """The lines of the page, and of the card in the folder."""
    predictor = load_predictor(find_adapter(pooled / "run"))
    labels = predictor.inference.all_tasks["surgery"]
    batch = predictor.model.encode([Example(TEXT, labels[0])], labels)
    with torch.no_grad():
        expected = predictor.model.scores(batch, labels)[0] / LOGIT_SCALE
    with base_only(predictor.model.module):
        before = predictor.model.scores(batch, labels)[0] / LOGIT_SCALE
    assert (before - expected).abs().max() > 0.05  # it has learnt
    for source in ("page", "card"):
        said = torch.tensor(json.loads(outside.said[f"map of the {source}"]))
        torch.testing.assert_close(said, expected, rtol=0, atol=1e-5)
    answers = [load_predictor(find_adapter(pooled / place)) for place in ("run", "mine")]
    assert answers[0].answer(TEXT) == answers[1].answer(TEXT)


def test_a_map_is_merged_into_nothing(pooled, tmp_path, hub):
    asked = ExportRequest(str(pooled / "run"), str(tmp_path / "merged"), merge=True)
    with pytest.raises(UserError, match=r"map behind .* pooling.*; leave --merge out"):
        export(asked)
    assert not (tmp_path / "merged").exists()
    hub("hf_none")
    elsewhere = {"push": "me/mine", "base": str(tmp_path)}
    with pytest.raises(UserError, match="upload that, name it with --model"):
        export(ExportRequest(str(pooled / "run"), str(tmp_path / "mine"), **elsewhere))


@pytest.mark.slow
def test_a_gguf_becomes_ordinary_safetensors(tmp_path, make_experiment):
    settings = ("model.family=causal-lm", "model.name=embedded:smollm2", "train.max_length=8")
    sizes = ('data.tasks=["surgery"]', "data.max_train=4", "data.max_test=4", "adapter.rank=2")
    run = finished(tmp_path / "run", make_experiment(*settings, *sizes, *LEARNING))
    export(ExportRequest(str(run), str(tmp_path / "mine")))
    export(ExportRequest(str(run), str(tmp_path / "merged"), merge=True))
    predictor = load_predictor(find_adapter(run))
    ids = token_ids(predictor, "surgery")
    out, mine = str(tmp_path / "numbers.safetensors"), str(tmp_path / "mine")
    run_outside(tmp_path, ["causal", out, ids, mine, str(tmp_path / "merged"), mine])
    numbers = load_file(out)
    expected = own_numbers(predictor, ids)
    assert numbers.keys() == {"peft", "transformers", "merged", "moved"}
    for value in numbers.values():  # logits of up to 30: relative
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-4)


def test_the_example_of_the_page_answers_as_deal_does(encoder, outside):
    code = page_example("adapter")
    assert f'"{TEXT}"' in code
    assert len(code.strip().splitlines()) <= 11
    predictor = load_predictor(find_adapter(encoder))
    labels = predictor.inference.all_tasks["surgery"]
    assert labels[int(outside.said["page"])] == predictor.answer(TEXT, "surgery").label


@pytest.mark.parametrize("place", ["moved card", "merged card"])
def test_the_lines_of_an_encoders_card_compare_names_as_deal_does(encoder, outside, place):
    """Of a folder that has moved too."""
    predictor = load_predictor(find_adapter(encoder))
    labels, scale = predictor.inference.all_tasks["surgery"], LOGIT_SCALE
    with torch.no_grad():
        batch = predictor.model.encode([Example(TEXT, labels[0])], labels)
        expected = predictor.model.scores(batch, labels)[0] / scale
    said = torch.tensor(json.loads(outside.said[place]))
    torch.testing.assert_close(said, expected, rtol=0, atol=1e-5)


def test_a_base_model_of_the_hub_is_loaded_as_it_was_used(encoder):
    inference = read_inference(find_adapter(encoder))
    code = encoder_code(inference, "adapter", "org/base", "abc")
    assert 'AutoModel.from_pretrained("org/base", revision="abc"), ".")' in code
    assert 'AutoTokenizer.from_pretrained("org/base", revision="abc")("a text"' in code


def test_heads_and_names_of_the_page_score_as_deal_does(with_heads, outside):
    predictor = load_predictor(find_adapter(with_heads / "run"))
    labels = predictor.inference.all_tasks["surgery"]
    said = dict(zip(labels, json.loads(outside.said["heads of the page"]), strict=True))
    assert json.loads(outside.said["card of heads"]) == pytest.approx([*said.values()], abs=1e-5)
    answer = predictor.answer(TEXT, "surgery")
    assert answer.label == max(said, key=lambda label: said[label])
    assert math.exp(said[answer.label]) == pytest.approx(answer.probability, rel=1e-4)
    assert predictor.inference.names_weight == 0.5


def test_the_merged_model_meets_the_label_names(encoder, exported):
    """Their vectors are those of the base model, which is not in the folder any more."""
    predictor = load_predictor(find_adapter(encoder))
    model, scale = predictor.model, LOGIT_SCALE
    stored = load_file(exported / "merged" / "label_embeddings.safetensors")
    assert stored.keys() == predictor.inference.all_tasks.keys()
    for task, labels in predictor.inference.all_tasks.items():
        batch = model.encode([Example(TEXT, labels[0])], labels)
        with torch.no_grad():
            expected, vectors = model.scores(batch, labels), model.embed(batch)
        torch.testing.assert_close(scale * vectors @ stored[task].T, expected, rtol=0, atol=1e-4)


def test_an_export_says_what_it_is(encoder, exported):
    mine, merged = exported / "mine", exported / "merged"
    card = (mine / "README.md").read_text()
    assert "base_model: sentence-transformers/all-MiniLM-L6-v2" in card
    assert "**None.** No text left its client" in card
    assert "library_name: transformers" in (merged / "README.md").read_text()
    assert "deal predict" not in (merged / "README.md").read_text()
    config = json.loads((encoder / "adapter" / "adapter_config.json").read_text())
    named = (config["base_model_name_or_path"], config["task_type"])
    assert named == ("sentence-transformers/all-MiniLM-L6-v2", "FEATURE_EXTRACTION")
    assert load_predictor(find_adapter(mine)).answer(TEXT) == load_predictor(
        find_adapter(encoder)
    ).answer(TEXT)
    with pytest.raises(UserError, match="a merged export has none: name the run folder"):
        load_predictor(find_adapter(merged))


def test_a_folder_that_is_not_empty_is_left_alone(encoder, tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(UserError, match="is there already; choose another --to"):
        export(ExportRequest(str(encoder), str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "heads.safetensors"])
def test_a_damaged_file_is_not_handed_on(with_heads, tmp_path, file):
    run = shutil.copytree(with_heads / "run" / "adapter", tmp_path / "run")
    (run / file).write_bytes((run / file).read_bytes()[:-9])
    with pytest.raises(UserError, match=f"{file}: cannot be read"):
        export(ExportRequest(str(run), str(tmp_path / "to")))
    assert not (tmp_path / "to").exists()


def test_a_base_that_it_was_not_learnt_for_is_refused(encoder, tmp_path):
    other = save(tmp_path / "other", "bert")
    with pytest.raises(UserError, match="was learnt for another base model"):
        export(ExportRequest(str(encoder), str(tmp_path / "to"), base=str(other)))
    assert not (tmp_path / "to").exists()


def test_a_failed_export_leaves_nothing_that_blocks_the_next(encoder, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "there").mkdir()
    with monkeypatch.context() as later:
        later.setattr("simulations.use.export.write_labels", full)
        for to in ("there", "new"):
            with pytest.raises(UserError, match="No space left on device"):
                export(ExportRequest(str(encoder), str(tmp_path / to)))
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_whoever_may_read_the_card_may_read_the_weights(encoder, exported):
    for folder in (encoder / "adapter", exported / "mine", exported / "merged"):
        modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}
        assert modes == {(folder / "README.md").stat().st_mode & 0o777}
