"""Checks of data that clients can read, divide and answer, and of what class sums of them may tell;
torch is imported here. Each raises a ``UserError`` with the place and the cure, or gives findings.

A class sum is expected to tell of who is in it, by its size and noise alone, this much: a sum of
``n`` records with covariance ``Sigma`` and noise of deviation ``tau`` is close to a Gaussian around
``n mu``; with a given record in it, around ``n mu + x - mu``. The likelihood ratio of the two
separates members from others by ``d'^2 = sum_j lambda_j / (n lambda_j + tau^2)`` over the
eigenvalues of ``Sigma``, and its area under the ROC curve is ``Phi(d' / sqrt 2)``. Records of real
texts are no Gaussians: measured ``d'`` is 5 to 13 % smaller.

Source: Homer et al., PLoS Genetics 2008; Sankararaman et al., Nature Genetics 2009 (members of a
published mean).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from statistics import median
from typing import Any

from deal_core.config.experiment import Experiment
from deal_core.data import Example, TaskData, load_for_clients, open_source
from deal_core.data.files import repeated_identifiers
from deal_core.data.partition import partition
from deal_core.deal.interface import statistics_of
from deal_core.errors import UserError
from deal_core.methods import method_of
from deal_core.models import check_label_tokens, decodes_apart, has_label_logits, max_positions
from deal_core.models.loading import pretrained
from deal_core.models.prompt import INSTRUCTION, read_template
from deal_core.privacy.events import unit_of
from deal_core.privacy.policy import require_delta
from deal_core.protection import class_sum_noise
from server.plan import Plan, make_plan
from server.secure_aggregation import fewest_clients
from simulations.run.quick_checks import Finding, group_warnings, identifier_warning, warning


def check_data(experiment: Experiment) -> Iterator[Finding]:
    """Plan who works on which task; read and divide every task as the clients do.

    Yields:
        Warnings of records of one person where mechanism ``record`` protects them.

    Raises:
        UserError: data that cannot be read, divided or answered, a delta that is too large, or
            tasks that share a record and are declared disjoint.
    """
    data, privacy, seed = experiment.data, experiment.privacy, experiment.run.seed
    protected = privacy.mechanism == "record"
    grouped = protected and bool(privacy.unit_column)
    if protected and not grouped:
        for found in repeated_identifiers(data):
            yield warning(identifier_warning(*found, "privacy.unit_column"))
    source, units = open_source(data, privacy.unit_column), Counter[int]()
    clients = [str(number) for number in range(experiment.federation.clients)]
    plan = make_plan(experiment, source.task_names(), clients)
    yield from map(warning, _too_few_for_a_sum(experiment, plan))
    clients_of, task_of = defaultdict[str, set[int]](set), dict[tuple[int, str], str]()
    disjoint = protected and privacy.disjoint_tasks
    for name in source.task_names():
        task = load_for_clients(experiment, name)
        check_label_tokens(experiment.model, task.labels)
        if grouped:
            yield from map(warning, group_warnings(task))
        for client, own in enumerate(partition(task, data.partition, len(clients), seed)):
            units[client] += own.units(grouped)
            for example in own.train:
                clients_of[example.unit].add(client)
                if (
                    disjoint
                    and (first := task_of.setdefault((client, example.whose), name)) != name
                ):
                    raise UserError(
                        f"privacy.disjoint_tasks: a {unit_of(privacy)} of client {client} is in "
                        f"tasks '{first}' and '{name}'; set it to false, or separate the tasks"
                    )
        if not task.test:
            problem = "no test row; add some, or leave the task out"
            if task.held_out:
                share = f"data.split = {data.split:g}"
                problem = f"{share} leaves no test row; raise it, or add a test file"
            raise UserError(f"task '{name}': {problem}")
    several = sum(len(each) > 1 for each in clients_of.values())
    if grouped and several:
        yield warning(
            f"{several} of {len(clients_of)} groups have records at more than one client: "
            'each epsilon is of what its client has; data.partition.kind = "iid" keeps a group at '
            "one client in all tasks"
        )
    if protected:
        require_delta(privacy.target_delta, max(units.values()), unit_of(privacy))


def _too_few_for_a_sum(experiment: Experiment, plan: Plan) -> Iterator[str]:
    """The first round in which fewer work than a masked sum needs, since others are through."""
    if not experiment.aggregation.secure:
        return
    least = fewest_clients(experiment)
    for stage, rounds in enumerate(plan.stages):
        few = [n for n in range(1, rounds + 1) if 0 < len(plan.working(stage, n)) < least]
        if few:
            working = plan.working(stage, few[0])
            yield (
                f"aggregation.secure: in round {few[0]} of stage {stage + 1} {len(working)} of "
                f"{len(plan.orders)} clients work ({', '.join(working)}), and a sum is of {least} "
                "or more: what they learn is lost; let orders be of equal length"
            )
            return


LOOKED_AT = 400
"""Examples of a task, at equal distances: to tokenise all would take too long."""
FEW = 8
"""Tokens of a text below which it says nothing."""
MANY = 0.1
"""Share of cut texts from which it is worth a line."""


def check_text_lengths(experiment: Experiment) -> Iterator[Finding]:
    """Yield a warning for tasks of which many texts are cut at ``train.max_length``, for those of
    which some answers are cut at ``model.max_new_tokens``, and for those whose prompt does not fit
    beside a text of ``train.max_length``; an error where it does not fit beside one that is there.
    """
    from transformers import AutoTokenizer

    model, longest = experiment.model, experiment.train.max_length
    tokenizer, generative = pretrained(AutoTokenizer, model.name), not has_label_logits(model)
    positions = max_positions(model) if generative else 0  # of a GGUF file that takes seconds
    source = open_source(experiment.data)
    for name in source.task_names():
        task = source.load(name)
        examples = looked_at(task)
        texts = token_counts(tokenizer, [example.text for example in examples])
        cut = sum(count > longest for count in texts)
        if cut > MANY * len(texts):
            yield warning(
                f"task '{name}': {cut} of {len(texts)} texts looked at have more than "
                f"train.max_length = {longest} tokens (up to {max(texts)}); the rest is cut off"
            )
        targets = [example.target for example in examples]
        answers = token_counts(tokenizer, targets if name in experiment.data.generation else ())
        cut = sum(count > model.max_new_tokens for count in answers)
        if cut:  # from the first on: nothing says that what is cut has ended
            yield warning(
                f"task '{name}': {cut} of {len(answers)} answers looked at have more than "
                f"model.max_new_tokens = {model.max_new_tokens} tokens (up to {max(answers)}); the "
                f"rest is neither learnt nor written; set model.max_new_tokens to {max(answers)}"
            )
        if generative:
            there = min(longest, max(texts, default=0))
            yield from _prompt(experiment, tokenizer, positions, task, there)


def looked_at(task: TaskData) -> Sequence[Example]:
    """Return at most ``LOOKED_AT`` training examples, at equal distances."""
    return task.train[:: max(1, -(-len(task.train) // LOOKED_AT))]


def token_counts(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Return the number of tokens of each text, marks of the tokeniser left out."""
    if not texts:
        return []
    ids = tokenizer(list(texts), add_special_tokens=False, truncation=False, verbose=False)
    return [len(each) for each in ids["input_ids"]]


def _prompt(
    experiment: Experiment, tokenizer: Any, positions: int, task: TaskData, there: int
) -> Iterator[Finding]:
    """``there``: tokens that are read of the longest text looked at."""
    model, text = experiment.model, experiment.train.max_length
    instruction = experiment.data.instructions.get(task.name, INSTRUCTION)
    around = read_template(model.template).around(instruction, task.labels)
    beside = sum(token_counts(tokenizer, around))
    answer = max(token_counts(tokenizer, task.labels), default=model.max_new_tokens)
    room = positions - beside - (0 if decodes_apart(model) else answer)
    if positions and text > room:
        cure = f"lower train.max_length to {room}"
        if room < FEW:
            cure = "shorten its instruction or its labels, or choose another model"
        yield Finding(
            f"task '{task.name}': its prompt has {beside} tokens, and with train.max_length = "
            f"{text} and an answer of {answer} that is more than the {positions} that the model "
            f"reads; {cure}",
            kind="error" if there > room else "warning",
        )


def check_membership(experiment: Experiment) -> Iterator[Finding]:
    """Yield a note for an experiment with class sums: what is expected to be told by them; and one
    where words have tags, which have none."""
    source, tagged = open_source(experiment.data), experiment.data.tagged
    if any(map(tagged, experiment.data.measures)):
        off = "class means and Class-IL accuracy are off: labels are of words, and not of texts"
        yield Finding(off, kind="note")
    names = source.task_names()
    if told := membership_text(experiment, label_counts(map(source.load, names)), len(names)):
        yield Finding(f"class sums, {told}; deal audit --membership measures it", kind="note")


def label_counts(tasks: Iterable[TaskData]) -> list[int]:
    """Return how many training records each label of each task has."""
    counts = (Counter(each.label for each in task.train if each.label) for task in tasks)
    return [number for count in counts for number in count.values()]


def membership_text(experiment: Experiment, records: Sequence[int], tasks: int) -> str:
    """Say what is expected to be told by class sums.

    Args:
        experiment: its method decides whether there are any.
        records: of each label in a sum.
        tasks: of the run.

    Returns:
        In words, the area under the curve of the best attack on the smallest label and on the
        median one; empty: there are no class sums.
    """
    statistics = statistics_of(method_of(experiment)) if records else None
    if statistics is None or statistics.exact is not None:
        return ""
    clients = len(experiment.federation.sites) or experiment.federation.clients
    multiplier, _ = class_sum_noise(experiment, statistics, clients, tasks)
    directions = statistics.directions or statistics.size(experiment.model)
    told = [
        f"{expected_auc(size, directions, multiplier):.2f} for the {which} label ({size} records)"
        for which, size in {"smallest": min(records), "median": int(median(records))}.items()
    ]
    return (
        "against the server and the sites that may collude: expected AUC of the best membership "
        f"attack {', '.join(told)}; 0.5 is chance"
    )


SPREAD = 0.63
"""Sum of the eigenvalues: mean squared length, in units of length, of a record about its label's
mean (MedMCQA, in 256 public directions)."""
KNEE, SLOPE = 58.3, 1.89
"""Eigenvalue ``j`` is proportional to ``(j + KNEE) ** -SLOPE`` (the same records)."""

REACHED = 0.95
"""Of the separation of Gaussians, what is reached on records of texts; the largest measured."""


def expected_auc(records: float, directions: int, deviation: float) -> float:
    """Return the area under the ROC curve of the best attack on one label's sum; 0.5: chance.

    Args:
        records: of the label in the sum.
        directions: in which records are added up.
        deviation: of the noise in each entry, in units of what a record adds at most; a noise
            multiplier, against a server with as many sites as may collude.

    Raises:
        ValueError: no record, or no direction.
    """
    if records <= 0 or directions <= 0:
        raise ValueError(f"{records} records in {directions} directions")
    weights = [(place + KNEE) ** -SLOPE for place in range(1, directions + 1)]
    scale = SPREAD / sum(weights)
    squared = sum(scale * weight / (records * scale * weight + deviation**2) for weight in weights)
    return 0.5 * (1 + math.erf(0.5 * REACHED * math.sqrt(squared)))
