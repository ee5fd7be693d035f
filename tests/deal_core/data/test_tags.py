"""Tasks whose words have tags: how rows are read, and F1 of the entities that tags mark."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deal_core.config.data import DataConfig, PartitionConfig
from deal_core.data import open_source
from deal_core.data.given import GivenTasks, keep_rows, usable
from deal_core.data.partition import partition
from deal_core.data.source import Example
from deal_core.data.tags import entities, entity_f1, marked, tags_of
from deal_core.errors import UserError

TAGS = tags_of(("person", "date"))
TEXTS = st.lists(st.lists(st.sampled_from(TAGS), min_size=1, max_size=8), min_size=1, max_size=5)
ANN = Example("Ann Lee came .", "", tags=("B-person", "I-person", "O", "O"))
BEN = Example("On 3 May Ben slept", "", tags=("O", "B-date", "I-date", "B-person", "O"))
CONLL = """\
-DOCSTART- -X- O

Ann NNP B-PER
Lee NNP I-PER
came VBD O
. . O

On IN O
3 CD B-date
May NNP I-date
Ben NNP B-PER
slept VBD O
"""


@pytest.mark.parametrize(
    ("predicted", "true", "f1"),
    [
        ("O O", "O O", 1.0),
        ("B-a O", "O O", 0.0),
        ("B-a I-a O B-b", "B-a I-a O B-b", 1.0),
        ("B-a O O B-b", "B-a I-a O B-b", 0.5),  # one end is another: neither found nor there
        ("B-b I-b O B-b", "B-a I-a O B-b", 0.5),
        ("B-a I-a", "B-a B-a", 0.0),
        ("O I-a I-a", "O B-a I-a", 1.0),  # what continues nothing begins
        ("B-a I-b", "B-a B-b", 1.0),
        ("B-a O B-a", "B-a O O", 2 / 3),
    ],
)
def test_f1_by_hand(predicted, true, f1):
    assert entity_f1([(predicted.split(), true.split())]) == pytest.approx(f1)


@given(predicted=TEXTS, true=TEXTS)
def test_f1_is_that_of_seqeval(predicted, true):
    metrics = pytest.importorskip("seqeval.metrics")
    pairs = [
        (p[: len(t)] + ["O"] * (len(t) - len(p)), t) for p, t in zip(predicted, true, strict=False)
    ]
    for own, _ in pairs:
        spans = {(label, a, b + 1) for label, a, b in metrics.sequence_labeling.get_entities(own)}
        assert entities(own) == spans
    wanted = metrics.f1_score([t for _, t in pairs], [p for p, _ in pairs], zero_division=1)
    assert entity_f1(pairs) == pytest.approx(wanted)


def test_entities_are_marked_in_the_text():
    assert marked(ANN.text, ANN.tags) == "[Ann Lee](person) came ."
    assert marked(BEN.text, BEN.tags) == "On [3 May](date) [Ben](person) slept"


def config(folder, **more):
    tables = {"source": "files", "path": str(folder), "measures": {"names": "entity-f1"}}
    return DataConfig.model_validate({**tables, **more})


def save(folder, *lines):
    (folder / "names").mkdir(exist_ok=True)
    for split in ("train", "test"):
        (folder / "names" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))


def line(example):
    return {"tokens": example.text.split(), "tags": list(example.tags)}


def test_rows_of_words_are_read(tmp_path):
    save(tmp_path, line(ANN), line(BEN))
    task = open_source(config(tmp_path)).load("names")
    assert (task.labels, task.train) == (("date", "person"), (ANN, BEN))


def test_conll_files_are_read_and_labels_named(tmp_path):
    (tmp_path / "names").mkdir()
    for split in ("train", "test"):
        (tmp_path / "names" / f"{split}.conll").write_text(CONLL)
    files = {"names": {"label_text": {"PER": "person"}}}
    task = open_source(config(tmp_path, files=files)).load("names")
    assert task.train == (ANN, BEN)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"tokens": ["Ann"], "tags": ["PER"]}, "'PER' is no tag"),
        ({"tokens": ["Ann"], "tags": ["E-person"]}, "'E-person' is no tag"),
        ({"tokens": ["Ann", "Lee"], "tags": ["O"]}, "2 words and 1 tags"),
        ({"tokens": ["Ann Lee"], "tags": ["O"]}, "no blank"),
        ({"text": "Ann", "label": "person"}, "two lists"),
        ({"tokens": ["Ann"], "tags": ["B-place"]}, "'place' is no label of the task"),
    ],
)
def test_a_row_that_is_none_is_one_line_and_left_out_by_a_site(tmp_path, row, said):
    save(tmp_path, line(ANN), row)
    labels = {"names": ["person", "date"]}
    with pytest.raises(UserError, match=said) as told:
        open_source(config(tmp_path, labels=labels)).load("names")
    assert "row 2" in str(told.value)
    task = open_source(config(tmp_path, labels=labels, source="site")).load("names")
    assert (task.train, task.left_out) == ((ANN,), 2)


def test_clients_of_any_partition_get_all_rows(tmp_path):
    many = [Example(f"{ANN.text} {n}", "", tags=(*ANN.tags, "O")) for n in range(20)]
    save(tmp_path, *map(line, many))
    task = open_source(config(tmp_path, split=0.2)).load("names")
    for kind in ("iid", "dirichlet", "quantity"):
        shares = partition(task, PartitionConfig(kind=kind), 3, 0)
        assert sorted(e.text for share in shares for e in share.train) == sorted(
            e.text for e in task.train
        )
        assert sum(len(share.test) for share in shares) == len(task.test)


@pytest.mark.parametrize("tags", [("B-a",), ("B-a", "O", "O"), ("X-a", "O"), ("B-a", 3)])
def test_an_example_whose_tags_are_none_harms_itself_alone(tags):
    """At a site; a simulation names it."""
    good, bad = (Example("Ann came", "", tags=each) for each in (("B-a", "O"), tags))
    config = DataConfig(labels={"t": ("a",)}, measures={"t": "entity-f1"}, tasks=("t",))
    kept, left_out = usable({"t": ((good, bad), (good,))}, config)
    assert kept == {"t": ((good,), (good,))}
    assert left_out == {"t": 1}
    source = keep_rows({"t": ((good, bad), ())})
    with pytest.raises(UserError, match="task 't', training row 1: "):
        GivenTasks(config.model_copy(update={"source": source})).load("t")


@pytest.mark.parametrize("measures", [{}, {"t": "entity-f1"}])
def test_rows_with_tags_are_of_tasks_whose_words_have_some(measures):
    row = Example("Ann came", "", tags=("B-a", "O")) if not measures else Example("Ann came", "a")
    config = DataConfig(labels={"t": ("a",)}, measures=measures, tasks=("t",))
    source = keep_rows({"t": ((row,), ())})
    with pytest.raises(UserError, match="task 't', training row 0: "):
        GivenTasks(config.model_copy(update={"source": source})).load("t")


def test_embedded_tasks_whose_words_have_tags():
    measures = {"medicines": "entity-f1", "times": "entity-f1"}
    source = open_source(DataConfig.model_validate({"source": "embedded", "measures": measures}))
    for name, label, rows in (("medicines", "medicine", 475), ("times", "time", 1453)):
        task = source.load(name)
        assert (task.labels, len(task.train) + len(task.test)) == ((label,), rows)
        assert not {e.text for e in task.train} & {e.text for e in task.test}
        for example in (*task.train, *task.test):
            assert entities(example.tags)
            assert len(example.tags) == len(example.text.split())
