"""How long texts, answers and prompts are in the model's own tokens, and how much is cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from deal_core.config.experiment import Experiment
from deal_core.data import Example, open_source
from deal_core.models import decodes_apart, has_label_logits, max_positions
from deal_core.models.loading import pretrained
from deal_core.models.prompt import PromptTemplate
from deal_core.models.prompt_tokens import prompt_template
from simulations.check.finding import Finding

LOOKED_AT = 400
"""Examples of a task, at equal distances: tokenising all would take longer than the answer may."""
FEW = 8
"""Tokens of a text below which it says nothing."""
MANY = 0.1
"""Share of cut texts from which it is worth a line."""


def check_text_lengths(experiment: Experiment) -> Iterator[Finding]:
    """Yield a warning for tasks of which many texts are cut at ``train.max_length``, for those of
    which some answers are cut at ``model.max_new_tokens``, and for those whose prompt does not fit
    beside a text of ``train.max_length``; an error where it does not fit beside one that is there.

    Raises:
        UserError: the data, or the tokeniser, cannot be read, or it has no chat template for
            ``model.chat``.
    """
    from transformers import AutoTokenizer

    tokenizer = pretrained(AutoTokenizer, experiment.model.name)
    has_prompt = not has_label_logits(experiment.model)
    template = prompt_template(tokenizer, experiment.model) if has_prompt else None
    # Of a GGUF file even that takes seconds.
    positions = max_positions(experiment.model) if has_prompt else 0
    source = open_source(experiment.data)
    for name in source.task_names():
        task = source.load(name)
        longest = experiment.train.max_length
        looked_at = spread(task.train)
        lengths = token_counts(tokenizer, [example.text for example in looked_at])
        cut = sum(length > longest for length in lengths)
        if cut > MANY * len(lengths):
            yield Finding(
                f"task '{name}': {cut} of {len(lengths)} texts looked at have more than "
                f"train.max_length = {longest} tokens (up to {max(lengths)}); the rest is cut off",
                kind="warning",
            )
        if name in experiment.data.generation:
            yield from _answers(experiment, tokenizer, name, looked_at)
        if positions and template is not None:
            there = min(longest, max(lengths, default=0))
            yield from _prompt(experiment, tokenizer, template, positions, name, task.labels, there)


def spread(examples: Sequence[Example]) -> Sequence[Example]:
    """Return at most ``LOOKED_AT`` examples, at equal distances."""
    step = max(1, -(-len(examples) // LOOKED_AT))
    return examples[::step]


def token_counts(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Return the number of tokens of each text, marks of the tokeniser left out."""
    if not texts:
        return []
    ids = tokenizer(list(texts), add_special_tokens=False, truncation=False, verbose=False)
    return [len(each) for each in ids["input_ids"]]


def _answers(
    experiment: Experiment, tokenizer: Any, task: str, examples: Sequence[Example]
) -> Iterator[Finding]:
    # From the first on: nothing says that what is cut has ended.
    longest = experiment.model.max_new_tokens
    lengths = token_counts(tokenizer, [example.target for example in examples])
    cut = sum(length > longest for length in lengths)
    if cut:
        yield Finding(
            f"task '{task}': {cut} of {len(lengths)} answers looked at have more than "
            f"model.max_new_tokens = {longest} tokens (up to {max(lengths)}); the rest is neither "
            f"learnt nor written; set model.max_new_tokens to {max(lengths)}",
            kind="warning",
        )


def _prompt(
    experiment: Experiment,
    tokenizer: Any,
    template: PromptTemplate,
    positions: int,
    task: str,
    labels: Sequence[str],
    there: int,
) -> Iterator[Finding]:
    """``there``: tokens that are read of the longest text looked at."""
    model, text = experiment.model, experiment.train.max_length
    instruction = experiment.data.instructions.get(task, model.instruction)
    around = template.around(instruction, labels)
    beside = sum(token_counts(tokenizer, around))
    answers = token_counts(tokenizer, labels)
    answer = max(answers) if answers else model.max_new_tokens
    room = positions - beside - (0 if decodes_apart(model) else answer)
    if text > room:
        cure = f"lower train.max_length to {room}"
        if room < FEW:
            cure = "shorten its instruction or its labels, or choose another model"
        yield Finding(
            f"task '{task}': its prompt has {beside} tokens, and with train.max_length = {text} "
            f"and an answer of {answer} that is more than the {positions} that the model reads; "
            f"{cure}",
            kind="error" if there > room else "warning",
        )
