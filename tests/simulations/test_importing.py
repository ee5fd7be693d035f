"""Small folders of the shapes of O-LoRA, SAPT and TRACE, imported and read back."""

import json

import pytest
from rich.console import Console

from deal_core.config.file import parse_experiment, read_toml
from deal_core.data.files import FilesSource
from deal_core.errors import UserError
from simulations.importing import LAYOUTS, import_benchmark
from simulations.run.model_checks import check_answers


def save(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture
def olora(tmp_path):
    """A list of sentences with labels, and a file of labels beside it."""
    folder = tmp_path / "CL_Benchmark"
    rows = [
        {"label": "Science or Technology", "sentence": "Title: A rocket\nText: It flew.\n"},
        {"label": "World", "sentence": "Title: Élections\nText: They voted. \U0001f600\n"},
    ]
    for split in ("train", "dev", "test"):
        save(folder / "TC/agnews" / f"{split}.json", rows)
    save(folder / "TC/agnews/labels.json", ["World", "Sports", "Science or Technology"])
    copa = {"label": "B", "sentence": "Which sentence is the effect?\nA: x\nB: y"}
    save(folder / "COPA/COPA/train.json", [copa, {"label": "A", "sentence": " "}])
    save(folder / "COPA/COPA/dev.json", [copa])
    save(folder / "COPA/COPA/labels.json", ["A", "B"])
    return folder


@pytest.fixture
def sapt(tmp_path):
    """An object with a definition and instances, whose answers are one text or several."""
    folder = tmp_path / "SAPT"

    def task(*pairs):
        instances = [{"input": text, "output": answer} for text, answer in pairs]
        return {
            "Definition": ["Answer the\nquestion."],
            "Positive Examples": [{"input": "never", "output": "read"}],
            "Instances": instances,
        }

    choice = task(("a", "True"), ("b", "False"), ("c", "True"), ("d", "False"))
    texts = task(("a?", ["a long answer", "another"]), ("b?", ["yes"]))
    for split in ("train", "test"):
        save(folder / "Long_Sequence/boolq" / f"{split}.json", choice)
        save(folder / "SuperNI/task591_sciq" / f"{split}.json", texts)
    return folder


@pytest.fixture
def trace(tmp_path):
    """Lists of prompts with answers; the first lines of a task's prompts are the same."""
    folder = tmp_path / "TRACE-Benchmark/LLM-CL-Benchmark_500"

    def rows(first, last, *pairs):
        return [{"prompt": f"{first}{text}{last}", "answer": answer} for text, answer in pairs]

    stance = [("rates rise", "hawkish"), ("rates fall", "dovish")] * 2
    summary = [("we met twice", "Met.\nTwice."), ("they voted", "Voted.")]
    for split in ("train", "eval", "test"):
        save(folder / "FOMC" / f"{split}.json", rows("Stance?\nText:\n", "\nStance:", *stance))
        save(folder / "AMine" / f"{split}.json", rows("", "", ("q", "r"), ("s", "t")))
        save(folder / "MeetingBank" / f"{split}.json", rows("Sum it up.\n", "", *summary))
    return folder


@pytest.fixture
def imported(deal):
    """Call the command; returns the experiment that it wrote, and what it printed."""

    def call(folder, name="cl-benchmark"):
        out = folder.parent / "out"
        words = ("data", "import-cl-benchmark", str(folder), "--out", str(out), "--format", name)
        code, said, err = deal(*words)
        assert code == 0, err
        return parse_experiment(read_toml(out / f"{name}.toml"), name), said

    return call


def refused(folder, name="cl-benchmark"):
    """Return the one line of a refusal. Nothing has been written."""
    out = folder.parent / "out"
    with pytest.raises(UserError) as refusal:
        import_benchmark(folder, out, name, Console(quiet=True))
    assert not out.exists()
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_sentences_with_labels_read_back_as_a_stream(olora, imported):
    experiment, printed = imported(olora)
    assert experiment.data.tasks == ("ag_news", "copa")
    assert experiment.data.generation == ()
    assert "topic of the following paragraph" in experiment.data.instructions["ag_news"]
    source = FilesSource(experiment.data)
    news = source.load("ag_news")
    assert news.labels == ("World", "Sports", "Science or Technology")
    assert [example.label for example in news.train] == ["Science or Technology", "World"]
    assert news.test[1].text == "Title: Élections\nText: They voted. \U0001f600"
    copa = source.load("copa")
    assert len(copa.train) == len(copa.test) == 1
    assert "ag_news: 2 train and 2 test rows, 0 left out, 3 labels" in printed
    assert "copa: 1 train and 1 test rows, 1 left out, 2 labels" in printed


def test_definitions_are_instructions_and_several_answers_references(sapt, imported):
    experiment, _ = imported(sapt)
    assert experiment.data.tasks == ("boolq", "task591_sciq")
    assert experiment.data.generation == ("task591_sciq",)
    assert set(experiment.data.instructions.values()) == {"Answer the question."}
    source = FilesSource(experiment.data)
    assert source.load("boolq").labels == ("False", "True")
    first, second = source.load("task591_sciq").test
    assert (first.target, first.references) == ("a long answer", ("another",))
    assert (second.target, second.references) == ("yes", ())
    check_answers(experiment)


def test_the_first_lines_of_prompts_are_the_instruction(trace, imported):
    experiment, _ = imported(trace, "trace")
    assert experiment.data.tasks == ("FOMC", "MeetingBank", "AMine")
    assert experiment.data.generation == ("MeetingBank", "AMine")
    assert experiment.data.instructions == {
        "FOMC": "Stance?\nText:",
        "MeetingBank": "Sum it up.",
        "AMine": "Read the text and answer.",
    }
    source = FilesSource(experiment.data)
    assert source.load("FOMC").labels == ("dovish", "hawkish")
    assert source.load("FOMC").train[0].text == "rates rise\nStance:"
    assert source.load("MeetingBank").train[0].target == "Met.\nTwice."


def test_a_folder_of_another_shape_is_one_line(olora, trace):
    assert "no such folder" in refused(olora / "TC" / "yahoo")
    assert "holds no KIND/DATASET/train.json; give the folder" in refused(trace)
    assert "'sentence' and 'label' or 'input' and 'output'; name the benchmark" in refused(
        trace.parent
    )
    assert "unknown --format 'o-lora'; known: cl-benchmark, trace" in refused(olora, "o-lora")
    (olora.parent / "nothing").mkdir()
    assert "holds no TASK/train.json" in refused(olora.parent / "nothing", "trace")


def test_missing_doubled_and_broken_files_are_one_line(olora):
    labels, train = olora / "TC/agnews/labels.json", olora / "TC/agnews/train.json"
    labels.write_text('["[/x]", "World", "Science or Technologie"]')
    assert "'Science or Technology' is not in labels.json; did you mean" in refused(olora)
    labels.write_text('{"World": 1}')
    assert "should be a list of labels" in refused(olora)
    labels.unlink()
    train.write_text(train.read_text()[:-3])
    assert f"{train}: not valid JSON (" in refused(olora)
    train.write_text('[{"sentence": "a", "label": {}}]')
    assert "example 1: text or answer is no text" in refused(olora)
    train.write_text("[]")
    assert "a split has no example" in refused(olora)
    train.unlink()
    assert f"{train}: cannot be read (No such file" in refused(olora)
    train.write_text('[{"sentence": "a", "label": "World"}]')
    for split in ("train", "test"):
        save(olora / f"SC/agnews/{split}.json", [{"sentence": "a", "label": "World"}])
    assert "two tasks are called 'ag_news'" in refused(olora)


def test_nothing_is_written_over(olora):
    out = olora.parent / "out"
    save(out / "mine.json", 1)
    with pytest.raises(UserError, match="is there already; choose another --out"):
        import_benchmark(olora, out, "cl-benchmark", Console(quiet=True))
    assert [path.name for path in out.iterdir()] == ["mine.json"]


def test_every_format_has_a_template_that_a_model_can_read():
    from deal_core.models.prompt import read_template

    with pytest.raises(ValueError, match=r"needs {options} on another line than {text}"):
        read_template("{instruction} Options: {options} Text: {text} Answer:")
    for layout in LAYOUTS.values():
        read_template(layout.template)
