"""What the folders of the public benchmarks hold: tasks, their rows, and what a prompt asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from deal_core.data.files import task_folders
from deal_core.errors import UserError
from simulations.importing.json_values import json_values

INSTRUCTIONS: Mapping[str, str] = MappingProxyType(
    {
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
)
"""Kind of a task to its instruction. Source: O-LoRA, ``configs/instruction_config.json``; the texts
of COPA ask by themselves, so theirs is the part that all have."""
NAMES: Mapping[str, str] = MappingProxyType(
    {"agnews": "ag_news", "sst-2": "sst2", "boolqa": "boolq"}
)
"""Spellings of a task's name in small letters, to the one that the shipped orders use."""
TRACE_ORDER = (
    "C-STANCE",
    "FOMC",
    "MeetingBank",
    "Py150",
    "ScienceQA",
    "NumGLUE-cm",
    "NumGLUE-ds",
    "20Minuten",
)
"""As published. Source: TRACE, ``scripts/train_lora.sh``."""
PARTS = frozenset({"train.json", "dev.json", "eval.json", "test.json", "labels.json"})
"""Files that make a folder a task."""
INSTANCES = ("", "Instances")
"""Where in a file the examples stand: outermost, or under this name."""


@dataclass(frozen=True)
class SourceTask:
    """A task as a benchmark has it.

    Attributes:
        name: as we call it.
        folder: where it lies.
        instruction: what its prompt asks for; empty: it is said in the texts.
        labels: of ``labels.json``, in its order; none: there is no such file.
        files: split (``train``, ``test``) to file.
    """

    name: str
    folder: Path
    instruction: str
    labels: tuple[str, ...]
    files: Mapping[str, Path]


@dataclass(frozen=True)
class SourceRow:
    """Attributes: ``text``, and ``answers``, the first of which is learnt; either may be empty."""

    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """How a benchmark lays out its folder.

    Attributes:
        tasks: folder to its tasks.
        fields: pairs of names that an example may have for text and answer.
        template: ``model.template`` for it.
        shared_lines: whether the lines that all texts of a task begin with are its instruction.
    """

    tasks: Callable[[Path], list[SourceTask]]
    fields: tuple[tuple[str, str], ...]
    template: str
    shared_lines: bool


def read_rows(path: Path, fields: tuple[tuple[str, str], ...]) -> Iterator[SourceRow]:
    """Yield the examples of a file, one at a time.

    Raises:
        UserError: no JSON, or an example without these fields; the message names file and example.
    """
    number = 0
    for name, value in json_values(path):
        if name not in INSTANCES:
            continue
        number += 1
        yield _row(value, fields, f"{path}, example {number}")


def _row(value: Any, fields: tuple[tuple[str, str], ...], where: str) -> SourceRow:
    found = [pair for pair in fields if isinstance(value, dict) and set(pair) <= set(value)]
    if not found:
        wanted = " or ".join(f"'{text}' and '{answer}'" for text, answer in fields)
        raise UserError(
            f"{where}: has no {wanted}; name the benchmark with --format "
            f"({', '.join(LAYOUTS)}), or download the file again"
        )
    text, answer = (value[name] for name in found[0])
    answers = answer if isinstance(answer, list) else [answer]
    if not all(isinstance(each, (str, int, float)) for each in (text, *answers)):
        raise UserError(f"{where}: text or answer is no text; download the file again")
    return SourceRow(str(text).strip(), tuple(str(each).strip() for each in answers))


def _cl_benchmark(folder: Path) -> list[SourceTask]:
    """``KIND/DATASET/{train,dev,test,labels}.json`` (O-LoRA, SAPT)."""
    tasks = []
    for kind in task_folders(folder):
        for dataset in task_folders(folder / kind):
            place = folder / kind / dataset
            if not _is_task(place):
                continue
            files = _split_files(place, "dev")
            instruction = _definition(files["train"]) or INSTRUCTIONS.get(kind, "")
            name = NAMES.get(dataset.lower(), dataset.lower())
            tasks.append(SourceTask(name, place, instruction, _labels(place), files))
    return sorted(tasks, key=lambda task: task.name)


def _trace(folder: Path) -> list[SourceTask]:
    """``TASK/{train,eval,test}.json`` (TRACE), those that were published in that order."""
    names = [name for name in task_folders(folder) if _is_task(folder / name)]
    known = {name: place for place, name in enumerate(TRACE_ORDER)}
    ordered = sorted(names, key=lambda name: (known.get(name, len(known)), name))
    return [
        SourceTask(name, folder / name, "", (), _split_files(folder / name, "eval"))
        for name in ordered
    ]


def _is_task(folder: Path) -> bool:
    return any((folder / part).is_file() for part in PARTS)


def _split_files(folder: Path, development: str) -> dict[str, Path]:
    """Return the files of both splits; a missing test file is replaced by that for development."""
    train, test = folder / "train.json", folder / "test.json"
    if not test.is_file() and (folder / f"{development}.json").is_file():
        test = folder / f"{development}.json"
    for path in (train, test):
        if not path.is_file():
            raise UserError(f"{path}: no such file; download it, or remove the folder {folder}")
    return {"train": train, "test": test}


def _labels(folder: Path) -> tuple[str, ...]:
    path = folder / "labels.json"
    if not path.is_file():
        return ()
    labels = [value for _, value in json_values(path)]
    if not labels or not all(isinstance(label, str) for label in labels):
        raise UserError(f"{path}: should be a list of labels; download it again")
    return tuple(label.strip() for label in labels)


def _definition(path: Path) -> str:
    """Return the definition that a file says before its examples, on one line."""
    for name, value in json_values(path):
        if name in INSTANCES:
            break
        if name == "Definition":
            return " ".join(str(value).split())
    return ""


def find_tasks(folder: Path, layout: str) -> list[SourceTask]:
    """Return the tasks below a benchmark's folder.

    Raises:
        UserError: no such folder, no task in it, a task without one of its files, or two tasks of
            one name.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the benchmark's own")
    tasks = LAYOUTS[layout].tasks(folder)
    if not tasks:
        raise UserError(f"{folder}: holds no {SHAPES[layout]}; {_cure(folder, layout)}")
    folders: dict[str, Path] = {}
    for task in tasks:
        if task.name in folders:
            raise UserError(
                f"{task.folder} and {folders[task.name]}: two tasks called '{task.name}'; keep one"
            )
        folders[task.name] = task.folder
    return tasks


def _cure(folder: Path, layout: str) -> str:
    """Say where the tasks may be instead: one folder below, or in another shape."""
    places = [folder, *(folder / name for name in task_folders(folder))]
    names = sorted(LAYOUTS, key=lambda name: name != layout)
    for name, place in ((name, place) for name in names for place in places):
        try:
            found = LAYOUTS[name].tasks(place)
        except UserError:
            continue
        if found:
            return f"did you mean {place} --format {name}?"
    return "give the folder that holds them"


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "cl-benchmark": Layout(
            _cl_benchmark,
            (("sentence", "label"), ("input", "output")),
            "{instruction}\nOption: {options}\n{text}\nAnswer:",
            shared_lines=False,
        ),
        "trace": Layout(
            _trace,
            (("prompt", "answer"),),
            "{instruction}\n{text}\nAnswer:",
            shared_lines=True,
        ),
    }
)
"""``--format`` to what it means."""
SHAPES: Mapping[str, str] = MappingProxyType(
    {"cl-benchmark": "KIND/DATASET/train.json", "trace": "TASK/train.json"}
)
"""``--format`` to where a training file lies."""
