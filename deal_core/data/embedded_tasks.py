"""Tasks made of the embedded data.

MedMCQA, the default: route a medical exam question to its specialty. 7,140 questions in 18
specialties, grouped into five tasks. Each task mixes frequent and rare specialties; a specialty is
capped at 600 questions, because Dental alone (2,500) would swamp its task. Left out: questions of
unknown specialty, the specialties below 60 questions (Psychiatry, Orthopaedics), and repeats.

Seven tasks that write, the first four what a group of hospitals may want of a small language model,
the others with texts of their own or of another task and a different question:

* ``medicines``: the medicines that a sentence names. MedQA (MIT), as RABBITS marks them: its second
  copy of a question has the trade names of the same medicines.
* ``passage-answer``: the answer to a question, in the words of a sentence. NarrativeQA
  (Apache-2.0): questions with an answer that the summary holds, with the sentence that has it.
* ``specialty``: the specialty of an exam question, in words. MedMCQA (Apache-2.0).
* ``research-question``: the question that a paper asks, from the abstract that answers it. PubMedQA
  (MIT); its answers yes, no and maybe are not used.
* ``passage-question``: the same sentences as ``passage-answer`` with the answer, and the question.
* ``times``: the ages and durations that a sentence names. MedQA (MIT).
* ``sex``: whether a patient is male or female, by the first word that tells; texts of ``times``.

``medicines`` and ``times`` tag words in the place of writing, where ``data.measures`` says so. (The
package's CoNLL file has texts of Reuters, under its terms.)

One example in five, of each specialty and of each task that writes, is for testing; the split is
the same on every machine.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import SequenceMatcher
from functools import lru_cache
from pathlib import Path
from typing import Any

from deal_core.config.data import DataConfig
from deal_core.data.embedded import asset_folder
from deal_core.data.source import Example, TaskData, limited, select_tasks
from deal_core.data.tags import OUTSIDE
from deal_core.errors import UserError, choose

CAP = 600
"""Most questions of a specialty: one alone has 2,500."""
SHORT = 45
"""Words of a sentence, at most: two of three fit in 64 tokens."""
MEDQA = "qa_generic_to_brand_v2.jsonl"
ASKED = "\nQuestion: "
"""Between a sentence and the question about it."""
SHARED = 3
"""Words that a sentence and a question have in common, at least: the sentence is about it."""


@lru_cache(maxsize=8)
def written_examples(task: str, folder: Path) -> tuple[Example, ...]:
    """Return the examples of a task of ``WRITTEN``, each text once, in an order that depends on the
    texts alone; of a package's data, read once a process.

    Raises:
        UserError: the files are not there.
    """
    found: dict[str, Example] = {}
    for example in WRITTEN[task](folder):
        found.setdefault(example.text, example)
    return tuple(found.values())


def _medicines(folder: Path) -> list[Example]:
    """Sentences, and the words in which the two copies of a question differ."""
    found = []
    for _, row in rows(folder / "DrugSwap", MEDQA):
        asked = (row[key] for key in ("original_question", "perturbed_question"))
        copies = map(_case, asked)
        for generic, trade in zip(*copies, strict=False):
            words = generic.split()
            changes = SequenceMatcher(None, words, trade.split(), autojunk=False).get_opcodes()
            names = [
                name.strip(",.;:()?")
                for kind, start, end, _, _ in changes
                if kind != "equal"
                for name in words[start:end]
            ]
            if names and len(words) <= SHORT:
                found.append(Example(generic, "", target=", ".join(names)))
    return _by_text(found)


def _passage_answers(folder: Path) -> list[Example]:
    """Sentences of a summary with a question, and an answer in their words."""
    found = []
    for _, row in rows(folder / "NarrativeQA", "test.jsonl"):
        asked, sentences = _words(row["question"]), _sentences(row["passage"])
        answers = tuple(spaced(each).strip(" .") for each in row["answer"])
        for answer in answers:
            whole = re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)", re.IGNORECASE)
            having = [each for each in sentences if whole.search(each)]
            best = max(having, key=lambda each: len(asked & _words(each)), default="")
            if len(asked & _words(best)) >= SHARED and len(best.split()) <= SHORT:
                text = f"{best}{ASKED}{spaced(row['question'])}"
                found.append(Example(text, "", target=answer, references=answers))
                break
    return _by_text(found)


def _specialties(folder: Path) -> list[Example]:
    """Exam questions, and the name of their specialty."""
    known = questions_by_specialty(folder / "MedMCQA")
    return _by_text(
        Example(text, "", target=specialty)
        for specialty, texts in known.items()
        for text in sorted(texts, key=by_hash)[:CAP]
    )


def _research_questions(folder: Path) -> list[Example]:
    """Abstracts and their questions, each question once."""
    found: dict[str, str] = {}
    for _, row in rows(folder / "PubMedQA", "pqal/test.jsonl", "pqaa/test.jsonl"):
        abstract = re.sub(r"Context \(\d+\):", " ", row["passage"])  # the numbers of its parts
        found.setdefault(spaced(row["question"]), spaced(abstract))
    return [Example(found[asked], "", target=asked) for asked in sorted(found, key=by_hash)]


def _passage_questions(folder: Path) -> list[Example]:
    """Sentences with an answer, and its question, in the order of ``passage-answer``."""
    parts = [(*each.text.split(ASKED), each.target) for each in _passage_answers(folder)]
    return [Example(f"{read}\nAnswer: {said}", "", target=asked) for read, asked, said in parts]


TIMES = re.compile(r"\b\d+(?:-(?:day|week|month|year)(?:-old)?| (?:day|week|month|year)s?)\b")


def _times(folder: Path) -> list[Example]:
    """Sentences, and the ages and durations that they name in figures."""
    asked = (row["original_question"] for _, row in rows(folder / "DrugSwap", MEDQA))
    texts = (text for each in asked for text in _case(each) if len(text.split()) <= SHORT)
    found = ((text, TIMES.findall(text)) for text in texts)
    return _by_text(Example(text, "", target=", ".join(times)) for text, times in found if times)


MALE, FEMALE = ("he", "him", "his", "man", "boy", "male"), ("she", "her", "woman", "girl", "female")


def _sexes(folder: Path) -> list[Example]:
    """The texts of ``times``, and what the first word of ``MALE`` or ``FEMALE`` in each says."""
    names = dict.fromkeys(MALE, "male") | dict.fromkeys(FEMALE, "female")
    found = []
    for each in _times(folder):
        words = re.findall(r"\w+", each.text.lower())
        found += [Example(each.text, "", target=names[word]) for word in words if word in names][:1]
    return found


WRITTEN: Mapping[str, Callable[[Path], list[Example]]] = {
    "medicines": _medicines,
    "passage-answer": _passage_answers,
    "specialty": _specialties,
    "research-question": _research_questions,
    "passage-question": _passage_questions,
    "times": _times,
    "sex": _sexes,
}
"""Task to its examples, from the folder of the package's data."""
TAGGED = {"medicines": ("medicine", _medicines), "times": ("time", _times)}
"""Task whose words have tags to its label, and what makes texts and what has the label in them."""


@lru_cache(maxsize=2)
def tagged_examples(task: str, folder: Path) -> tuple[Example, ...]:
    """Return the examples of a task of ``TAGGED``, as :func:`written_examples` does."""
    found: dict[str, Example] = {}
    label, make = TAGGED[task]
    for example in make(folder):
        tags = [OUTSIDE] * len(example.text.split())
        for part in set(example.target.split(", ")):
            for there in re.finditer(rf"(?<!\w){re.escape(part)}(?!\w)", example.text):
                first = example.text[: there.start()].count(" ")
                own = [f"{kind}-{label}" for kind in ("B", *"I" * part.count(" "))]
                tags[first : first + len(own)] = own
        found.setdefault(example.text, Example(example.text, "", tags=tuple(tags)))
    return tuple(found.values())


@lru_cache(maxsize=1)
def questions_by_specialty(folder: Path) -> Mapping[str, tuple[str, ...]]:
    """Return each specialty's texts without repeats; of a package's files, read once a process.

    Of one specialty's repeats one stays; a question filed under two specialties is
    ambiguous, and all its copies go.
    """
    labels: defaultdict[str, set[str]] = defaultdict(set)
    text_of: dict[str, str] = {}
    for path, row in rows(folder, "MedMCQA-Test/*.jsonl", "MedMCQA-Validation/*.jsonl"):
        text = f"{spaced(row['question'])}\n{spaced(row['options'])}"
        # The bag of words: repeats differ in case, punctuation or the order of the options.
        key = " ".join(sorted(re.findall(r"\w+", text.lower())))
        labels[key].add(path.stem.replace("_", " "))
        text_of.setdefault(key, text)
    questions: defaultdict[str, list[str]] = defaultdict(list)
    for key, found in labels.items():
        if len(found) == 1:
            questions[found.pop()].append(text_of[key])
    return {label: tuple(texts) for label, texts in questions.items()}


def rows(folder: Path, *patterns: str) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Yield the rows of a package's files, each with its file.

    Raises:
        UserError: there is none.
    """
    paths = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    if not paths:
        raise UserError(f"{folder}: holds no {patterns[0]}; install the embedded data again")
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                yield path, json.loads(line)


def spaced(text: str) -> str:
    """Return a text with one blank between words."""
    return " ".join(text.split())


def by_hash(text: str) -> str:
    """Return what texts are sorted by, so that their order tells nothing."""
    return hashlib.sha256(text.encode()).hexdigest()


def _by_text(examples: Iterable[Example]) -> list[Example]:
    return sorted(examples, key=lambda example: by_hash(example.text))


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.?!])\s+", spaced(text))


def _case(question: str) -> list[str]:
    return _sentences(question.partition(":\n")[2].partition("\nOptions:")[0])


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


TASKS: Mapping[str, tuple[str, ...]] = {
    "basic-science": ("Anatomy", "Biochemistry", "Physiology"),
    "laboratory": ("Forensic Medicine", "Microbiology", "Pathology", "Pharmacology"),
    "medicine": ("Medicine", "Pediatrics", "Skin", "Social Preventive Medicine"),
    "surgery": ("Anaesthesia", "Gynaecology Obstetrics", "Radiology", "Surgery"),
    "head-and-neck": ("Dental", "ENT", "Ophthalmology"),
}
"""Task to its labels, in the order the tasks are learnt."""
TEST_SHARE = 5
"""One example in this many is for testing."""


class EmbeddedTasks:
    """Sources ``medmcqa``, five tasks with labels, and ``embedded``, the same and seven tasks that
    write; ``data.path`` and the column keys do not matter."""

    def __init__(self, config: DataConfig, unit_column: str = "") -> None:
        if unit_column:
            raise UserError(
                f"privacy.unit_column = '{unit_column}' needs rows with columns, and data.source "
                f"'{config.source}' has none; use files or hub, or leave it empty"
            )
        self._config = config

    def task_names(self) -> tuple[str, ...]:
        """Return ``data.tasks``, or all."""
        more = WRITTEN if self._config.source == "embedded" else ()
        return select_tasks((*TASKS, *more), self._config.tasks, "task")

    def load(self, task: str) -> TaskData:
        """Return a task; at least 60 and at most 600 questions per label before limits.

        Raises:
            UserError: unknown task, the data package is missing or incomplete, or
                one that writes is not in ``data.generation``, or another is.
        """
        embedded = self._config.source == "embedded"
        tags = embedded and self._config.tagged(task) and task in TAGGED
        writes = embedded and task in WRITTEN and not tags
        if embedded and writes != (task in self._config.generation):
            cure = (
                f'its answers are texts; add it to data.generation = ["{task}"]'
                if writes
                else "its answers are labels; leave data.generation"
            )
            raise UserError(f"task '{task}': {cure}")
        if writes or tags:
            make = tagged_examples if tags else written_examples
            examples, own = make(task, asset_folder("public")), TAGGED[task][:1] if tags else ()
            cut = len(examples) // TEST_SHARE
            return limited(TaskData(task, own, examples[cut:], examples[:cut]), self._config)
        labels = choose("task", task, TASKS)
        questions = questions_by_specialty(asset_folder("medmcqa"))
        train: list[Example] = []
        test: list[Example] = []
        for label in labels:
            texts = sorted(questions[label], key=by_hash)[:CAP]
            cut = len(texts) // TEST_SHARE
            test += [Example(text, label) for text in texts[:cut]]
            train += [Example(text, label) for text in texts[cut:]]
        return limited(TaskData(task, labels, _mixed(train), _mixed(test)), self._config)


def _mixed(examples: list[Example]) -> tuple[Example, ...]:
    # A second hash: in the order of the first, the cap and the split would show.
    return tuple(sorted(examples, key=lambda example: by_hash(f"mixed {example.text}")))
