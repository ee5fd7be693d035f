"""``deal predict``: labels of texts, or texts, by what a run has learnt."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from deal_core.errors import UserError, at_home
from deal_core.inference.answer import Answer, Written
from deal_core.inference.folder import AdapterFolder, find_adapter, read_inference
from simulations.use.expected import labels_to_choose_from
from simulations.use.score import Score
from simulations.use.texts import Text, file_texts, typed_texts

DIGITS = 6
"""Of a probability: what differs beyond them is rounding of the machine."""


@dataclass(frozen=True)
class PredictRequest:
    """What was typed.

    Attributes:
        folder: of a run, or its adapter.
        texts: typed ones.
        file: in their place; empty: none.
        column: of the file's text.
        pair_column: joined to it; empty: none.
        label_column: of the right answer, with which answers are compared; empty: none.
        task: whose labels to choose from; empty: those of all tasks learnt.
        base: folder or hub name of the base model; empty: as the run named it.
        as_json: a JSON object a line; otherwise a line for people.
    """

    folder: str
    texts: tuple[str, ...] = ()
    file: str = ""
    column: str = "text"
    pair_column: str = ""
    label_column: str = ""
    task: str = ""
    base: str = ""
    as_json: bool = True


def predict(
    request: PredictRequest,
    print_line: Callable[[str], None],
    warn: Callable[[str], None] = lambda line: None,
) -> Score | None:
    """Print a line for each text, in order, each as soon as it is known.

    Args:
        request: what was typed.
        print_line: takes a line.
        warn: takes a warning, before the first line.

    Returns:
        How many answers are right; None where nothing says which are.

    Raises:
        UserError: no texts or two sources of them, a bad file or one without rows, no adapter, an
            unknown task, or right answers none of which is a label.
    """
    texts = read_texts(request)
    folder = find_adapter(at_home(request.folder))
    warning = check_expected(request, folder)
    # Imports torch: after the quick checks.
    from deal_core.inference.predictor import load_predictor

    predictor = load_predictor(folder, request.base)
    predictor.check(request.task)
    if warning:
        warn(warning)
    score, answered = Score(), 0
    for text in texts:
        answered += 1
        answer = predictor.answer(text.text, request.task)
        print_line(json_line(text, answer) if request.as_json else plain_line(text, answer))
        if text.expected is not None:
            score = score.add(answer, text.expected)
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


def check_expected(request: PredictRequest, folder: AdapterFolder) -> str:
    """Return a warning of the file's right answers that are no labels; empty: all are, or there
    are none to compare. The file is read once for it, before any text is answered.

    Raises:
        UserError: none of them is a label, or a bad file.
    """
    labels = labels_to_choose_from(read_inference(folder), request.task)
    if not request.label_column or labels is None:
        return ""
    return labels.check(read_texts(request), request.label_column)


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
