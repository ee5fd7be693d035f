"""What a check finds, and checks that need no torch: of rows, and of odd settings."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from deal_core.config.experiment import Experiment
from deal_core.config.privacy import PrivacyConfig
from deal_core.data import TaskData, open_source
from deal_core.data.files import FilesSource
from deal_core.data.rows import folded
from deal_core.errors import UserError, choose, nearest
from simulations.engines import ENGINES


@dataclass(frozen=True)
class Finding:
    """A line for people: what is wrong, where, and the cure."""

    text: str
    kind: Literal["error", "warning", "note"] = "error"
    """An ``error`` stops a run, a ``warning`` does not, a ``note`` is what was read."""


Check = Callable[[Experiment], Iterable[Finding] | None]
"""Raises a ``UserError`` of what is wrong, or gives findings."""


def warning(text: str) -> Finding:
    """Return what is odd."""
    return Finding(text, kind="warning")


def check_engine(experiment: Experiment) -> None:
    """Look the engine up.

    Raises:
        UserError: unknown name, or one whose processes read no plugin.
    """
    choose("run.engine", experiment.run.engine, ENGINES)
    if experiment.plugins and experiment.run.engine != "inprocess":
        raise UserError('plugins are read with run.engine = "inprocess"; leave them out, or set it')


BY_TASK = ("labels", "generation", "measures", "instructions", "files")


def check_task_names(experiment: Experiment) -> Iterator[Finding]:
    """Yield a warning for each name that the source has no task of: what is set for it is not used.

    Raises:
        UserError: the source cannot be opened.
    """
    data = experiment.data
    known = open_source(data.model_copy(update={"tasks": ()})).task_names()
    for table in BY_TASK:
        for name in getattr(data, table):
            if name not in known:
                text = f"data.{table}: there is no task '{name}'{nearest(name, known)}"
                yield warning(f"{text}; what is set for it is not used")


LARGEST_RATE = 0.1
"""Of AdamW: above, training diverges."""
LEAST_REACH = 1.0
"""Of steps at the server on sums of clipped gradients: rate, rounds, bound and scale together."""
TRAINED_AT_SERVER = ("deal", "sequential")


def check_training(experiment: Experiment) -> Iterator[Finding]:
    """Yield warnings of learning rates out of any sense."""
    train, adapter = experiment.train, experiment.adapter
    if train.step == "client" and train.learning_rate > LARGEST_RATE:
        yield warning(
            f"train.learning_rate = {train.learning_rate:g} is large for AdamW, and diverges; "
            "usual are 0.0001 to 0.01"
        )
    bound, rounds = experiment.privacy.max_grad_norm, experiment.federation.rounds
    reach = train.learning_rate * rounds * bound * adapter.lora_alpha / adapter.rank
    steps = train.step == "server" and experiment.method.name in TRAINED_AT_SERVER
    if steps and reach < LEAST_REACH:
        yield warning(
            f"train.learning_rate = {train.learning_rate:g} is of AdamW; the server takes plain "
            f"steps, which together move the adapter by {reach:.2g} at most, and hardly anything "
            "is learnt; usual are 0.5 to 8"
        )


BUDGET = ("target_epsilon", "target_delta", "unit_column")
"""Keys of ``privacy`` that say nothing without a mechanism."""
LARGEST_EPSILON = 20.0
CLEAR_COUNTS = (
    'metrics = "clear": a crafted head or adapter can name test records by their counts (4 of 4 by '
    'two requests); set it to "summed" or "none" to hide them'
)


def check_privacy(experiment: Experiment) -> Iterator[Finding]:
    """Yield warnings of counts in the clear at sites, and of a budget that says nothing."""
    privacy = experiment.privacy
    said = "metrics" in privacy.model_fields_set and privacy.metrics == "clear"
    if said and experiment.data.source == "sites":
        yield warning(f"privacy.{CLEAR_COUNTS}")
    default = PrivacyConfig()
    unused = [key for key in BUDGET if getattr(privacy, key) != getattr(default, key)]
    if privacy.mechanism == "none" and unused:
        yield warning(
            f'privacy.{unused[0]} is set, and privacy.mechanism = "none" protects nothing; set '
            'privacy.mechanism to "record", or leave it out'
        )
    if privacy.mechanism != "none" and privacy.target_epsilon > LARGEST_EPSILON:
        yield warning(
            f"privacy.target_epsilon = {privacy.target_epsilon:g} is above {LARGEST_EPSILON:g}: it "
            "promises next to nothing; usual are 1 to 8"
        )


def check_rows(experiment: Experiment) -> Iterator[Finding]:
    """Yield how many rows every task has, their problems, and what is odd about those that can be
    read.

    Raises:
        UserError: the source itself cannot be opened.
    """
    source = open_source(experiment.data, experiment.privacy.unit_column)
    for name in source.task_names():
        problems: list[UserError] = []
        try:
            if isinstance(source, FilesSource):
                task, problems = source.examine(name)
            else:
                task = source.load(name)
        except UserError as error:
            problems, task = [error], TaskData(name, (), (), ())
        where = f"task '{name}'"
        if task.train:
            answers = f"{len(task.labels)} labels" if task.labels else "answers are texts"
            counts = f"{len(task.train)} train and {len(task.test)} test rows, {answers}"
            yield Finding(f"{where}: {counts}", kind="note")
        yield from map(Finding, grouped(map(str, problems)))
        odd = (*odd_rows(task), *_number_labels(task, experiment))
        yield from (warning(f"{where}: {line}") for line in odd)


ROW = re.compile(r", row (\d+): ")
NAMED = 5
"""Further rows with the same problem that a line names."""


def grouped(problems: Iterable[str]) -> list[str]:
    """Return each problem once, with the first row that has it, and how many more have."""
    rows: dict[str, list[str]] = {}
    first: dict[str, str] = {}
    for problem in problems:
        place = ROW.search(problem)
        key = ROW.sub(": ", problem, count=1) if place else problem
        first.setdefault(key, problem)
        rows.setdefault(key, []).extend([place[1]] if place else [])
    return [text + _more(rows[key][1:]) for key, text in first.items()]


def _more(rows: list[str]) -> str:
    if not rows:
        return ""
    named = ", ".join(rows[:NAMED]) + (", ..." if len(rows) > NAMED else "")
    return f" (and {len(rows)} more {'row' if len(rows) == 1 else 'rows'}: {named})"


ROWS_PER_LABEL = 2
"""Training rows of a label, at least."""


LONG_TEXT = 1_000_000
NO_WORD = re.compile(
    r"nan|none|null|n/?a|nat|true|false|\d{4}-\d\d?-\d\d?.*|\d\d?[./]\d\d?[./]\d{2,4}.*", re.I
)
"""A label that is a missing value, a truth value or a date."""


def odd_rows(task: TaskData) -> Iterator[str]:
    """Yield a line for every kind of oddity: rows left out, NUL bytes, a text too long to be one,
    labels that are no words, test rows that are in training, texts of several
    labels, labels that may be one, a single label, labels with one row."""
    if task.left_out:
        yield f"{task.left_out} rows have no text or no answer, and are left out"
    both = (*task.train, *task.test)
    if count := sum("\0" in example.text for example in both):
        yield f"{count} texts have NUL bytes, as of a damaged or binary file; write it again"
    longest = max((len(example.text) for example in both), default=0)
    if longest > LONG_TEXT:
        yield f"a text has {longest} characters, of which the model reads the beginning; split it"
    if odd := [label for label in task.labels if NO_WORD.fullmatch(label)]:
        yield (
            f"labels {', '.join(map(ascii, odd[:NAMED]))}: a missing value, a date or a truth "
            "value is read as a word; leave such rows empty, or give it a name in label_text"
        )
    known = {example.text for example in task.train}
    count = sum(example.text in known for example in task.test)
    if count:
        # data.split keeps those of one text and one answer, or of one group, on one side.
        cure = "add a test file without them" if task.held_out else "take them out of one side"
        yield (
            f"{count} of {len(task.test)} test rows have a text that is in training too; {cure}: "
            "accuracy is partly of what was seen"
        )
    answers: defaultdict[str, set[str]] = defaultdict(set)
    for example in task.train:
        answers[example.text].add(" ".join(example.tags) or example.label)
    count = sum(len(labels) > 1 for labels in answers.values())
    if count:
        yield f"{count} training texts have several labels; a model can learn one at most"
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for label in task.labels:
        alike[folded(label)].append(label)
    for labels in alike.values():
        if len(labels) > 1:
            named = ", ".join(map(ascii, labels))
            yield f"labels {named} look alike, and are different ones; write them alike"
    if len(task.labels) == 1 and task.train and not task.train[0].tags:
        yield f"one label ('{task.labels[0]}'): there is nothing to tell apart; check label_column"
    counts = Counter(label for example in task.train for label in example.labels)
    few = sorted(label for label in task.labels if counts[label] < ROWS_PER_LABEL)
    if task.train and few:
        more = ", ..." if len(few) > NAMED else ""
        yield f"fewer than {ROWS_PER_LABEL} training rows of: {', '.join(few[:NAMED])}{more}"


OWN_DATA = ("files", "hub")
"""Sources whose labels are somebody's own, and have a table ``label_text``."""
READS_NO_NAMES = ("prototype", "linear-probe")
"""Methods that answer by heads alone."""
NUMBER = re.compile(r"[-+]?\d+([.,]\d+)?")
SHOWN = 3


def _number_labels(task: TaskData, experiment: Experiment) -> Iterator[str]:
    """Yield a line where all labels of a task are numbers, such as ids of classes: encoders compare
    texts with the names of labels, and generative models write them."""
    source, method = experiment.data.source, experiment.method.name
    if source not in OWN_DATA or method in READS_NO_NAMES or not task.labels:
        return
    if all(NUMBER.fullmatch(label) for label in task.labels):
        shown = ", ".join(f"'{label}'" for label in task.labels[:SHOWN])
        more = ", ..." if len(task.labels) > SHOWN else ""
        yield (
            f"its labels are numbers ({shown}{more}), and the model reads labels as words; set "
            f"data.{source}.{task.name}.label_text to their names"
        )


def identifier_warning(column: str, found: str, key: str) -> str:
    """Return what a repeated identifier means where single records are protected; ``key`` would
    make it the unit."""
    return (
        f"{found}: epsilon is of one record, and says nothing of somebody with several; "
        f"if that is who the column names, set {key} = '{column}'"
    )


ALIKE = 3
"""Pairs of values that look alike and are named."""


def group_warnings(task: TaskData) -> Iterator[str]:
    """Yield a line where groups of a task are among its training and its test records, and one
    where two people, or groups, differ in other characters than letters and digits alone."""
    both = {e.unit for e in task.train if e.unit} & {e.unit for e in task.test}
    if both:
        yield (
            f"task '{task.name}': {len(both)} groups have training and test records: its "
            "accuracy is partly of people that the model has seen"
        )
    alike: defaultdict[str, set[str]] = defaultdict(set)
    for value in {e.unit or e.id for e in (*task.train, *task.test)}:
        alike["".join(filter(str.isalnum, value)) or value].add(value)
    if found := sorted(sorted(values) for values in alike.values() if len(values) > 1):
        named = "; ".join(" and ".join(map(ascii, values[:2])) for values in found[:ALIKE])
        more = f" (and {len(found) - ALIKE} more)" if len(found) > ALIKE else ""
        yield (
            f"task '{task.name}': {named}{more} look alike, and count as different people; write "
            "them alike where they are one"
        )


def check_worth(experiment: Experiment) -> Iterator[Finding]:
    """Yield a note: what training is worth, by the kind of the answers (simulations/RESULTS.md)."""
    if experiment.method.name == "deal":
        yield Finding(
            "answers are texts: class means cannot give them, training pays"
            if experiment.data.generation
            else "answers are labels: on topics class means without training were within a point "
            'of deal; compare method.name = "prototype"',
            kind="note",
        )


QUICK: tuple[Check, ...] = (
    *(check_training, check_privacy, check_task_names, check_engine),
    check_worth,
)
"""Besides that of rows."""
