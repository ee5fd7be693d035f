"""``deal predict``: labels of texts, or texts, by what a run has learnt."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deal_core.data.rows import Columns, to_text, whole_characters
from deal_core.data.tables import READERS, read_lines, read_table
from deal_core.errors import UserError, at_home, nearest
from deal_core.inference.folder import AdapterFolder, Answer, Written, find_adapter, read_inference

DIGITS = 6
"""Of a probability: what differs beyond them is rounding of the machine."""


@dataclass(frozen=True)
class PredictRequest:
    """What was typed."""

    folder: str
    """Of a run, or its adapter."""
    texts: tuple[str, ...] = ()
    file: str = ""
    """In the place of typed texts; empty: none."""
    column: str = "text"
    """Of the file's text."""
    pair_column: str = ""
    """Joined to it; empty: none."""
    label_column: str = ""
    """Of the right answer, with which answers are compared; empty: none."""
    task: str = ""
    """Whose labels to choose from; empty: those of all tasks learnt."""
    base: str = ""
    """Folder or hub name of the base model; empty: as the run named it."""
    as_json: bool = True
    """A JSON object a line; otherwise a line for people."""


def predict(request: PredictRequest, print_line: Callable[[str], None]) -> Score | None:
    """Return how many answers are right (None: nothing says which are); a line for each text is
    printed, in order, each as soon as it is known.

    Raises:
        UserError: no texts or two sources of them, a bad file or one without rows, no adapter, an
            unknown task, or right answers none of which is a label.
    """
    texts = read_texts(request)
    folder = find_adapter(at_home(request.folder))
    check_expected(request, folder)
    # Imports torch: after the quick checks.
    from deal_core.inference.predictor import load_predictor

    predictor = load_predictor(folder, request.base)
    predictor.check(request.task)
    score, answered = Score(), 0
    for text in texts:
        answered += 1
        answer = predictor.answer(text.text, request.task)
        print_line(json_line(text, answer) if request.as_json else plain_line(text, answer))
        if text.expected is not None:
            score.add(answer, text.expected)
    if not answered:
        raise UserError(f"{request.file}: has no row; name a file with a text a row")
    return score if score.texts else None


def read_texts(request: PredictRequest) -> Iterator[Text]:
    """Return the texts that were typed, or those of the file.

    Raises:
        UserError: neither, or both.
    """
    if bool(request.texts) == bool(request.file):
        raise UserError("deal predict: give texts, or --file FILE, and not both")
    if request.file:
        path = at_home(request.file)
        return file_texts(path, request.column, request.pair_column, request.label_column)
    if request.label_column:
        raise UserError("--label-column is of a file; name it with --file")
    return iter(list(typed_texts(request.texts)))


def check_expected(request: PredictRequest, folder: AdapterFolder) -> None:
    """Check, before any text is answered, that some of the file's right answers are labels.

    Raises:
        UserError: none of them is, or a bad file.
    """
    inference = read_inference(folder)
    known = set(inference.all_tasks.get(request.task, ()))
    if not request.task:
        known = set().union(*inference.learnt.values())
    if not request.label_column or not known:
        return
    found = {text.expected for text in read_texts(request) if text.expected is not None}
    if found and not found & known:
        whose = f"task '{request.task}'" if request.task else "the tasks learnt"
        first = min(found)
        raise UserError(
            f"--label-column {request.label_column}: '{first}' is no label of {whose}, nor is any "
            f"other value in the column{nearest(first, known)}; name the column that holds them"
        )


def json_line(text: Text, answer: Answer | Written) -> str:
    """Return one JSON object: ``text`` or ``row``, ``task``, ``label``, ``probability``,
    ``runner_up``, ``runner_up_probability``; or ``answer``, where it is a text. With ``expected``
    where the file says it."""
    what: dict[str, object] = {"text": text.text} if text.row is None else {"row": text.row}
    what |= {} if text.expected is None else {"expected": text.expected}
    if isinstance(answer, Written):
        fields = {**what, "task": answer.task, "answer": answer.answer}
        return json.dumps(fields, ensure_ascii=False)
    second = answer.runner_up_probability
    fields = {
        **what,
        "task": answer.task,
        "label": answer.label,
        "probability": round(answer.probability, DIGITS),
        "runner_up": answer.runner_up,
        "runner_up_probability": None if second is None else round(second, DIGITS),
    }
    return json.dumps(fields, ensure_ascii=False)


def plain_line(text: Text, answer: Answer | Written) -> str:
    """Return label and probability, or the answer, and text for people."""
    shown = " ".join(text.text.split()) if text.row is None else f"row {text.row}"
    if isinstance(answer, Written):
        return f"{' '.join(answer.answer.split())}  ({shown})"
    return f"{answer.label}  {100 * answer.probability:.1f} %  {shown}"


@dataclass(frozen=True)
class Text:
    """A text to answer."""

    text: str
    """As the model reads it."""
    row: int | None = None
    """Number in its file (:data:`deal_core.data.tables.Row`); None where it was typed."""
    expected: str | None = None
    """Its right answer, where the file says one and was asked for it."""


def typed_texts(texts: Sequence[str]) -> Iterator[Text]:
    """Yield texts as they are, without the white space around them.

    Raises:
        UserError: an empty one, or one that is no text.
    """
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise UserError(f"text {number} is a {type(text).__name__}; give a string")
        if not text.strip():
            raise UserError(f"text {number} is empty; leave it out")
        yield Text(whole_characters(text.strip(), f"text {number}"))


def file_texts(path: Path, column: str, pair_column: str, label_column: str = "") -> Iterator[Text]:
    """Return the texts of a CSV, JSONL or Parquet file, or the lines of a TXT file, read one at a
    time.

    Args:
        path: the file.
        column: of the text.
        pair_column: joined to it, as ``data.pair_column`` of an experiment; empty: none.
        label_column: of the right answer; empty: it is not asked for.

    Raises:
        UserError: no such file, or of another kind; and, when it is reached, a row without text:
            the message names file and row.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; name one with a text a row")
    suffix = path.suffix.lower()
    if suffix == ".txt" and label_column:
        raise UserError(f"{path}: has no column '{label_column}'; name a table, or leave it out")
    if suffix == ".txt":
        return (Text(line, number) for number, line in read_lines(path))
    if suffix not in READERS:
        known = ", ".join((*READERS, ".txt"))
        raise UserError(f"{path}: files may end in {known}; rename or convert it")
    return _rows(path, Columns(text=column, label=label_column, pair=pair_column))


def _rows(path: Path, columns: Columns) -> Iterator[Text]:
    for number, row in read_table(path):
        try:
            text = to_text(row, columns)
            answer = Columns(text=columns.label, label="")
            expected = to_text(row, answer) if columns.label else None
        except UserError as error:
            raise UserError(f"{path}, row {number}: {error}") from None
        yield Text(text, number, expected)


@dataclass
class Score:
    """How good the answers so far are."""

    texts: int = 0
    labels: int = 0
    """Texts that were answered by a label."""
    right: int = 0
    """Of these."""
    overlap: float = 0.0
    """ROUGE-L of the others, summed."""

    def add(self, answer: Answer | Written, expected: str) -> None:
        """Count one more text, whose right answer is ``expected``."""
        self.texts += 1
        if isinstance(answer, Written):
            from deal_core.training.text_overlap import rouge_l

            self.overlap += rouge_l(answer.answer, (expected,))
        else:
            self.labels += 1
            self.right += answer.label == expected

    @property
    def line(self) -> str:
        """For people: the share of right labels, or ROUGE-L."""
        written = self.texts - self.labels
        if written:
            return f"ROUGE-L {100 * self.overlap / written:.1f} % over {written} rows"
        share = 100 * self.right / self.labels if self.labels else 0.0
        return f"accuracy {share:.1f} % ({self.right} of {self.labels} rows)"
