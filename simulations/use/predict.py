"""``deal predict``: labels of texts, or texts, by what a run has learnt."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from deal_core.config.data import DataConfig, TaskColumns
from deal_core.data.rows import Columns, EmptyRow, shaped, to_text, whole_characters
from deal_core.data.tables import READERS, read_lines, read_table
from deal_core.errors import UserError, at_home, nearest
from deal_core.inference.folder import AdapterFolder, Answer, Written, find_adapter, read_inference
from simulations.output import at_work
from simulations.output import print_line as print_note
from simulations.run.simulate import recorded

if TYPE_CHECKING:
    from deal_core.inference.predictor import Predictor

DIGITS = 6
"""Of a probability: what differs beyond them is rounding of the machine."""


UNSURE = "unsure"
FEW_ROWS = 20
"""Fewer say nothing of a temperature."""


@dataclass(frozen=True)
class PredictRequest:
    """What was typed."""

    folder: str
    """Of a run, or its adapter."""
    texts: tuple[str, ...] = ()
    file: str = ""
    """In the place of typed texts; empty: none."""
    column: str = ""
    """Of the file's text; empty: as the run's data have it, or ``text``."""
    pair_column: str = ""
    """Joined to it; empty: as the run's data have it, or none."""
    label_column: str = ""
    """Of the right answer, with which answers are compared; empty: none."""
    task: str = ""
    """Whose labels to choose from; empty: those of all tasks learnt."""
    base: str = ""
    """Folder or hub name of the base model; empty: as the run named it."""
    threshold: float = 0.0
    """Below this probability an answer is ``unsure``."""
    calibrate: bool = False
    """Find the temperature under which the right answers of the file are likeliest, and keep it."""
    as_json: bool = True
    """A JSON object a line; otherwise a line for people."""


def predict(request: PredictRequest, print_line: Callable[[str], None]) -> Score | None:
    """Return how many answers are right (None: nothing says which are); a line for each text is
    printed, in order, as soon as those around it are answered.

    Raises:
        UserError: no texts or two sources of them, a bad file or one without rows, no adapter, an
            unknown task, or right answers none of which is a label.
    """
    folder = find_adapter(at_home(request.folder))
    request = with_columns(request, folder)
    if request.calibrate and not request.label_column:
        raise UserError("--calibrate needs right answers; name their column with --label-column")
    empty: list[int] = []
    right = [text.expected for text in read_texts(request, empty.append)]
    if not (total := len(right)):
        raise UserError(f"{request.file}: has no row with a text; name a file with a text a row")
    check_expected({each for each in right if each is not None}, request, folder)
    let_threads_sleep()
    console = Console(stderr=True)
    if empty:
        rows = f"{len(empty)} rows have" if len(empty) > 1 else "1 row has"
        print_note(console, f"{request.file}: {rows} no text, from row {empty[0]} on; left out")
    with at_work(console, "loading the model"):
        from deal_core.inference.predictor import load_predictor  # with torch

        predictor = load_predictor(folder, request.base)
    predictor.check(request.task)
    if request.calibrate:
        predictor = replace(predictor, temperatures={})
    score, answered, texts = Score(request.threshold), 0, read_texts(request)
    count = portion(predictor)
    with progress(request, console, total) as advance:
        while chunk := list(islice(texts, count)):
            answers = predictor.answers([text.text for text in chunk], request.task)
            for text, answer in zip(chunk, answers, strict=True):
                print_line(line_of(text, answer, request))
                if text.expected is not None:
                    score.add(answer, text.expected)
            answered += len(chunk)
            advance(answered)
    if request.calibrate:
        if not (said := calibrated(folder, request.task, score)):
            raise UserError(
                f"--calibrate: {len(score.known)} rows have a label as right answer, and "
                f"{FEW_ROWS} are needed; name a file with more"
            )
        score.calibrated = f"{said}, which is kept in {folder.calibration}"
    return score if score.texts else None


def let_threads_sleep() -> None:
    """Tell the threads of torch, before it loads, not to wait for each other in a loop: that costs
    more than it saves."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def portion(predictor: Predictor) -> int:
    """Return how many texts are read, answered and printed together: few where a prompt is read for
    each. The more there are, the more equal are the lengths in a pass."""
    return 768 if predictor.model.has_label_logits else 96


def with_columns(request: PredictRequest, folder: AdapterFolder) -> PredictRequest:
    """Return the request with the columns that were not typed: those of the run's data, where the
    folder is a run's."""
    data = DataConfig()
    with suppress(UserError):  # not there, or of another version
        data = recorded(folder.path.parent).data
    own = data.files.get(request.task) or data.hub.get(request.task) or TaskColumns()
    text = request.column or own.text_column or data.text_column
    run_pair = "" if request.column else own.pair_column or data.pair_column
    return replace(request, column=text, pair_column=request.pair_column or run_pair)


@contextmanager
def progress(
    request: PredictRequest, console: Console, total: int
) -> Iterator[Callable[[int], None]]:
    """Yield what is told how many texts are answered, where the lines of a file go elsewhere than
    to a terminal: it moves a bar with the time left, or says so in lines."""
    if not request.file or sys.stdout.isatty():
        yield lambda answered: None
        return
    from rich.progress import Progress

    if not console.is_interactive:
        with at_work(console, what := f"answering {total} texts") as say:
            yield lambda answered: say(what, f"{answered} answered")
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("texts", total=total)
        yield lambda answered: bar.update(task, completed=answered)


def calibrated(folder: AdapterFolder, task: str, score: Score) -> str:
    """Return what the temperature that suits the answers best changes, and keep it in the folder;
    empty: fewer than ``FEW_ROWS`` rows have a label as right answer."""
    from deal_core.inference.predictor import calibrate, write_temperature

    known = score.known
    if len(known) < FEW_ROWS:
        return ""
    temperature, before, after = calibrate(
        [score.logits[place] for place in known], [score.targets[place] for place in known]
    )
    write_temperature(folder, task, temperature)
    return (
        f"calibration error (ECE) {100 * before:.1f} % before, {100 * after:.1f} % with the "
        f"temperature {temperature:.3g}"
    )


def read_texts(
    request: PredictRequest, on_empty: Callable[[int], None] = lambda row: None
) -> Iterator[Text]:
    """Return the texts that were typed, or those of the file; ``on_empty`` hears the number of each
    row that is left out, since it has none.

    Raises:
        UserError: neither, or both.
    """
    if bool(request.texts) == bool(request.file):
        raise UserError("deal predict: give texts, or --file FILE, and not both")
    if request.file:
        path = at_home(request.file)
        columns = Columns(request.column, request.label_column, request.pair_column)
        return file_texts(path, columns, on_empty)
    if request.label_column:
        raise UserError("--label-column is of a file; name it with --file")
    return iter(list(typed_texts(request.texts)))


def check_expected(found: set[str], request: PredictRequest, folder: AdapterFolder) -> None:
    """Check, before any text is answered, that some of the right answers ``found`` are labels.

    Raises:
        UserError: none of them is.
    """
    inference = read_inference(folder)
    known = set(inference.all_tasks.get(request.task, ()))
    if not request.task:
        known = set().union(*inference.learnt.values())
    if found and known and not found & known:
        whose = f"task '{request.task}'" if request.task else "the tasks learnt"
        first = min(found)
        raise UserError(
            f"--label-column {request.label_column}: '{first}' is no label of {whose}, nor is any "
            f"other value in the column{nearest(first, known)}; name the column that holds them"
        )


def line_of(text: Text, answer: Answer | Written, request: PredictRequest) -> str:
    """Return the line of a text: one JSON object (``text`` or ``row``, ``task``, ``label``,
    ``probability``, ``runner_up``, ``runner_up_probability``; or ``answer``, where it is a text;
    with ``expected`` where the file says it, and ``likeliest`` where the label is ``unsure``), or
    label, probability and text for people."""
    shown = " ".join(text.text.split()) if text.row is None else f"row {text.row}"
    what: dict[str, object] = {"text": text.text} if text.row is None else {"row": text.row}
    what |= {} if text.expected is None else {"expected": text.expected}
    if isinstance(answer, Written):
        if not request.as_json:
            return f"{' '.join(answer.answer.split())}  ({shown})"
        fields = {**what, "task": answer.task, "answer": answer.answer}
        return json.dumps(fields, ensure_ascii=False)
    share, second = 100 * answer.probability, answer.runner_up_probability
    unsure = answer.probability < request.threshold
    if not request.as_json:
        found = f"{UNSURE} ({answer.label}?)" if unsure else answer.label
        return f"{found}  {share:.1f} %  {shown}"
    fields = {
        **what,
        "task": answer.task,
        "label": UNSURE if unsure else answer.label,
        "probability": round(answer.probability, DIGITS),
        "runner_up": answer.runner_up,
        "runner_up_probability": None if second is None else round(second, DIGITS),
    }
    fields |= {"likeliest": answer.label} if unsure else {}
    return json.dumps(fields, ensure_ascii=False)


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


def file_texts(path: Path, columns: Columns, on_empty: Callable[[int], None]) -> Iterator[Text]:
    """Return the texts of a CSV, JSONL or Parquet file, or the lines of a TXT file, read one at a
    time.

    Args:
        path: the file.
        columns: of the text, of what is joined to it, as ``data.pair_column`` of an experiment
            (empty: nothing), and of the right answer (empty: it is not asked for).
        on_empty: hears the number of a row without text, which is left out.

    Raises:
        UserError: no such file, or of another kind; and, when it is reached, a row without such a
            column, or with what is no text: the message names file and row.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; name one with a text a row")
    suffix = path.suffix.lower()
    if suffix == ".txt" and columns.label:
        raise UserError(f"{path}: has no column '{columns.label}'; name a table, or leave it out")
    if suffix == ".txt":
        return (Text(line, number) for number, line in read_lines(path))
    if suffix not in READERS:
        known = ", ".join((*READERS, ".txt"))
        raise UserError(f"{path}: files may end in {known}; rename or convert it")
    return _rows(path, columns, on_empty)


def _rows(path: Path, columns: Columns, on_empty: Callable[[int], None]) -> Iterator[Text]:
    answer = Columns(text=columns.label, label="")
    for number, row in read_table(path):
        expected = None
        try:
            row = shaped(row, columns)
            text = to_text(row, columns)
            with suppress(EmptyRow):  # a text whose answer nobody knows
                expected = to_text(row, answer) if columns.label else None
        except EmptyRow:
            on_empty(number)
            continue
        except UserError as error:
            raise UserError(f"{path}, row {number}: {error}") from None
        yield Text(text, number, expected)


@dataclass
class Score:
    """How good the answers are, where the file says what is right."""

    threshold: float = 0.0
    texts: int = 0
    logits: list[list[float]] = field(default_factory=list)
    """Of those that were answered by a label: log probabilities of all labels."""
    targets: list[int] = field(default_factory=list)
    """Of the same: the place of the right one; -1: it is no label."""
    overlaps: list[float] = field(default_factory=list)
    """ROUGE-L of the others."""
    calibrated: str = ""
    """What a calibration found; empty: none was asked for."""

    def add(self, answer: Answer | Written, expected: str) -> None:
        """Count one more text, whose right answer is ``expected``."""
        self.texts += 1
        if isinstance(answer, Written):
            from deal_core.training.text_overlap import rouge_l

            self.overlaps.append(rouge_l(answer.answer, (expected,)))
        else:
            labels = [*answer.log_probabilities]
            self.logits.append([*answer.log_probabilities.values()])
            self.targets.append(labels.index(expected) if expected in labels else -1)

    @property
    def known(self) -> list[int]:
        """Places of the answers whose right one is a label."""
        return [place for place, target in enumerate(self.targets) if target >= 0]

    @property
    def line(self) -> str:
        """For people: the share of right labels, and how well probabilities fit it; ROUGE-L of what
        was written."""
        from deal_core.inference.predictor import confidences_and_hits, gap

        said = []
        if self.overlaps:
            mean = 100 * sum(self.overlaps) / len(self.overlaps)
            said.append(f"ROUGE-L {mean:.1f} % over {len(self.overlaps)} rows")
        if not self.logits:
            return "; ".join(said)
        confidences, hits = confidences_and_hits(self.logits, self.targets)
        sure = hits[confidences >= self.threshold]
        right, rows, unsure = int(sure.sum()), len(sure), len(hits) - len(sure)
        said.append(
            f"accuracy {100 * right / max(1, rows):.1f} % ({right} of {rows} rows)"
            f"{f', {unsure} unsure' if unsure else ''}"
        )
        error = 100 * gap(confidences, hits)
        said.append(self.calibrated or f"calibration error {error:.1f} % (ECE)")
        return "; ".join(said)
