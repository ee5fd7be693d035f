"""``deal data import-cl-benchmark``: the folder of a public benchmark becomes folders of tasks and
an experiment."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from deal_core.data.files import task_folders
from deal_core.errors import UserError, choose, nearest
from simulations.output import print_line, toml_lines, toml_value, write_texts

INSTRUCTIONS: Mapping[str, str] = {
    "NLI": 'What is the logical relationship between the "sentence 1" and the "sentence 2"? '
    "Choose one from the option.",
    "QQP": 'Whether the "first sentence" and the "second sentence" have the same meaning? '
    "Choose one from the option.",
    "SC": "What is the sentiment of the following paragraph? Choose one from the option.",
    "TC": "What is the topic of the following paragraph? Choose one from the option.",
    "BoolQA": "According to the following passage, is the question true or false? Choose one "
    "from the option.",
    "MultiRC": "According to the following passage and question, is the candidate answer true "
    "or false? Choose one from the option.",
    "WiC": "Given a word and two sentences, whether the word is used with the same sense in "
    "both sentence? Choose one from the option.",
    "COPA": "Choose one from the option.",
}
"""Kind of a task to its instruction. Source: O-LoRA, ``configs/instruction_config.json``; the texts
of COPA ask by themselves, so theirs is the part that all have."""
INSTRUCTION = "Read the text and answer."
"""Of a task that has none of its own."""
NAMES: Mapping[str, str] = {"agnews": "ag_news", "sst-2": "sst2", "boolqa": "boolq"}
"""Spellings of a task's name in small letters, to the one that the shipped orders use."""
TRACE_ORDER = (
    *("C-STANCE", "FOMC", "MeetingBank", "Py150"),
    *("ScienceQA", "NumGLUE-cm", "NumGLUE-ds", "20Minuten"),
)
"""As published. Source: TRACE, ``scripts/train_lora.sh``."""
MOST_LABELS, EACH = 20, 2
"""Without a file of labels, answers are labels where the training examples have at most so many,
each so often on average, and the test examples no others."""
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "adapter": {"retained_rank": 24, "first_layer": 20},
    "federation": {"clients": 4, "rounds": 2},
    "train": {"learning_rate": 3e-3, "batch_size": 8},
}
"""A start for the embedded language model on two cores; not tuned on any of these tasks."""


class Row(NamedTuple):
    """An example: its text, and its answers, the first of which is learnt."""

    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class BenchmarkTask:
    """A task and what it holds."""

    name: str
    labels: tuple[str, ...]
    """Answers among which is chosen, in their order; none: answers are texts."""
    instruction: str
    rows: Mapping[str, Sequence[Row]]
    """Split (``train``, ``test``) to its examples with a text and an answer."""
    left_out: int
    """Examples that have none."""
    references: bool
    """Whether answers are texts, and an example has several right ones."""


@dataclass(frozen=True)
class Layout:
    """How a benchmark lays out its folder."""

    shape: str
    """Where a training file lies, in words."""
    folders: Callable[[Path], list[tuple[Path, str, str]]]
    """The benchmark's folder to those of its tasks, in order, with name and instruction."""
    development: str
    """Stem of the file that stands in for a missing test file."""
    fields: tuple[tuple[str, str], ...]
    """Pairs of names that an example may have for text and answer."""
    template: str
    """``model.template`` for it."""
    shared_lines: bool
    """Whether the lines that all texts of a task begin with are its instruction."""


def import_benchmark(folder: Path, out: Path, name: str, console: Console) -> Path:
    """Write a folder per task and an experiment file beside them; show what there is.

    Args:
        folder: the benchmark's.
        out: to make.
        name: of ``LAYOUTS``.
        console: for the table.

    Returns:
        The experiment file.

    Raises:
        UserError: unknown format, a folder of another shape, a bad example, or a folder to write
            that is not empty; nothing has been written.
    """
    layout = choose("--format", name, LAYOUTS)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already; choose another --out")
    tasks = read_benchmark(folder, layout)
    texts = {f"{name}.toml": experiment_text(tasks, layout, folder, out)}
    for task in tasks:
        key = "label" if task.labels else "target"
        for split, rows in task.rows.items():
            lines = []
            for text, (answer, *others) in rows:
                further = {"references": others} if task.references else {}
                row = {"text": text, key: answer, **further}
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
            # Half a character, which JSON may hold, is none in UTF-8.
            text = "".join(lines).encode(errors="replace").decode()
            texts[f"{task.name}/{split}.jsonl"] = text
    write_texts(out, texts)
    for task in tasks:
        answers = f"{len(task.labels)} labels" if task.labels else "texts"
        counts = f"{len(task.rows['train'])} train and {len(task.rows['test'])} test rows"
        print_line(console, f"{task.name}: {counts}, {task.left_out} left out, {answers}")
    path = out / f"{name}.toml"
    print_line(console, f"deal simulate {path}")
    return path


def experiment_text(tasks: Sequence[BenchmarkTask], layout: Layout, folder: Path, out: Path) -> str:
    """Return the experiment on all tasks as TOML."""
    data: dict[str, Any] = {
        "source": "files",
        "path": str(out.resolve()),
        "tasks": [task.name for task in tasks],
        "generation": [task.name for task in tasks if not task.labels],
    }
    tables: dict[str, Mapping[str, Any]] = {
        "model": {"family": "causal-lm", "name": "embedded:smollm2", "template": layout.template},
        "data": data,
        # By names of tasks, which are no bare keys.
        **{
            f"data.files.{toml_value(task.name)}": {"references_column": "references"}
            for task in tasks
            if task.references
        },
        "data.labels": {toml_value(task.name): task.labels for task in tasks if task.labels},
        "data.instructions": {
            toml_value(task.name): task.instruction or INSTRUCTION for task in tasks
        },
        **SETTINGS,
    }
    made = f"# Made from {folder} by deal data import-cl-benchmark.\n"
    described = toml_lines({"description": f"{len(tasks)} tasks of {folder.name}"})
    sections = [f"\n[{name}]\n{toml_lines(values)}" for name, values in tables.items() if values]
    return made + described + "".join(sections)


def read_benchmark(folder: Path, layout: Layout) -> list[BenchmarkTask]:
    """Return the tasks below a benchmark's folder.

    Raises:
        UserError: no such folder, no task in it, a task without one of its files, two tasks of one
            name, or a file or an example that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the benchmark's own")
    found = layout.folders(folder)
    if not found:
        raise UserError(
            f"{folder}: holds no {layout.shape}; give the folder that holds them, or name the "
            f"benchmark with --format ({', '.join(LAYOUTS)})"
        )
    names = [name for _, name, _ in found]
    for place, name, _ in found:
        if names.count(name) > 1:
            raise UserError(f"{place}: two tasks are called '{name}'; keep one")
    return [_task(place, name, asked, layout) for place, name, asked in found]


def _task(place: Path, name: str, asked: str, layout: Layout) -> BenchmarkTask:
    test = "test" if (place / "test.json").is_file() else layout.development
    rows: dict[str, list[Row]] = {}
    left_out = 0
    for split, path in (("train", place / "train.json"), ("test", place / f"{test}.json")):
        content = _json(path)
        if isinstance(content, dict):
            defined = content.get("Definition", asked)
            asked = " ".join(map(str, defined)) if isinstance(defined, list) else str(defined)
            content = content.get("Instances", [])
        every = list(_rows(content, layout.fields, path))
        rows[split] = [row for row in every if row.text and row.answers[0]]
        left_out += len(every) - len(rows[split])
    if not all(rows.values()):
        raise UserError(f"{place}: a split has no example; remove the folder")
    several = any(len(row.answers) > 1 for own in rows.values() for row in own)
    labels = _labels(place, rows["train"], rows["test"], several)
    asked = " ".join(asked.split())
    if layout.shared_lines:
        texts = [row.text for own in rows.values() for row in own]
        # Lines that the first and the last of them begin with, all do.
        first, last = (text.split("\n")[:-1] for text in (min(texts), max(texts)))
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
        opening = "".join(f"{line}\n" for line, _ in shared)
        asked = opening.rstrip() or asked
        rows = {
            split: [row._replace(text=row.text.removeprefix(opening).strip()) for row in own]
            for split, own in rows.items()
        }
    return BenchmarkTask(name, labels, asked, rows, left_out, several and not labels)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); download it, or remove the folder "
            f"{path.parent}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); download it again") from None


def _rows(content: Any, fields: tuple[tuple[str, str], ...], path: Path) -> Iterator[Row]:
    for number, value in enumerate(content if isinstance(content, list) else [content], start=1):
        where = f"{path}, example {number}"
        pairs = [pair for pair in fields if isinstance(value, dict) and set(pair) <= set(value)]
        if not pairs:
            wanted = " or ".join(f"'{text}' and '{answer}'" for text, answer in fields)
            raise UserError(
                f"{where}: has no {wanted}; name the benchmark with --format "
                f"({', '.join(LAYOUTS)}), or download the file again"
            )
        text, answer = (value[name] for name in pairs[0])
        answers = (answer if isinstance(answer, list) else [answer]) or [""]
        if not all(isinstance(each, (str, int, float)) for each in (text, *answers)):
            raise UserError(f"{where}: text or answer is no text; download the file again")
        yield Row(str(text).strip(), tuple(str(each).strip() for each in answers))


def _labels(
    place: Path, train: Sequence[Row], test: Sequence[Row], several: bool
) -> tuple[str, ...]:
    """Return the labels of the file of them; without it the answers where they are few, used again,
    and the same in both splits.

    Raises:
        UserError: the file is no list of labels, or an answer is none of them.
    """
    path = place / "labels.json"
    learnt, asked = ({row.answers[0] for row in rows} for rows in (train, test))
    if path.is_file():
        labels = _json(path)
        if not labels or not isinstance(labels, list) or {type(each) for each in labels} != {str}:
            raise UserError(f"{path}: should be a list of labels; download it again")
        known = tuple(label.strip() for label in labels)
        for answer in sorted((learnt | asked) - set(known)):
            raise UserError(
                f"{place}: the answer '{answer}' is not in labels.json"
                f"{nearest(answer, known)}; add it there, or correct the example"
            )
        return known
    few = len(learnt) <= MOST_LABELS and EACH * len(learnt) <= len(train)
    lines = any("\n" in answer for answer in learnt)
    return () if several or lines or not few or not asked <= learnt else tuple(sorted(learnt))


def _cl_benchmark(folder: Path) -> list[tuple[Path, str, str]]:
    """``KIND/DATASET/{train,dev,test,labels}.json`` (O-LoRA, SAPT)."""
    found = [
        (place, NAMES.get(dataset.lower(), dataset.lower()), INSTRUCTIONS.get(kind, ""))
        for kind in task_folders(folder)
        for dataset in task_folders(folder / kind)
        if (place := folder / kind / dataset) and any(place.glob("*.json"))
    ]
    return sorted(found, key=lambda each: each[1])


def _trace(folder: Path) -> list[tuple[Path, str, str]]:
    """``TASK/{train,eval,test}.json`` (TRACE), those that were published in that order."""
    names = [name for name in task_folders(folder) if any((folder / name).glob("*.json"))]
    known = {name: place for place, name in enumerate(TRACE_ORDER)}
    names.sort(key=lambda name: (known.get(name, len(known)), name))
    return [(folder / name, name, "") for name in names]


LAYOUTS: Mapping[str, Layout] = {
    "cl-benchmark": Layout(
        "KIND/DATASET/train.json",
        _cl_benchmark,
        "dev",
        (("sentence", "label"), ("input", "output")),
        "{instruction}\nOption: {options}\n{text}\nAnswer:",
        shared_lines=False,
    ),
    "trace": Layout(
        "TASK/train.json",
        _trace,
        "eval",
        (("prompt", "answer"),),
        "{instruction}\n{text}\nAnswer:",
        shared_lines=True,
    ),
}
"""``--format`` to what it means."""
