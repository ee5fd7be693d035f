"""Prompts and answers of a generating model: instruction, options and text, and their token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from deal_core.config.experiment import ModelConfig
from deal_core.data import Example
from deal_core.errors import UserError
from deal_core.models.fast.prompt_forest import Tokens
from deal_core.models.fast.text_cache import TokenCache, tokeniser_name
from deal_core.models.interface import Encoded

Halves = tuple[str, str]
"""What stands before and after the text."""


@dataclass(frozen=True)
class PromptTemplate:
    """Attributes: ``choosing``, the form for a task with labels; ``writing``, without the lines
    that name the options."""

    choosing: Halves
    writing: Halves

    def around(self, instruction: str, labels: Sequence[str]) -> Halves:
        """Return what stands before and after the text of a task.

        Args:
            instruction: of the task.
            labels: answers among which is chosen; none: free text.
        """
        before, after = self.choosing if labels else self.writing
        options = ", ".join(map(words, labels))
        return before.replace("{instruction}", instruction).replace("{options}", options), after


def read_template(
    template: str, wrap: Callable[[str], str] = lambda message: message
) -> PromptTemplate:
    """Return the template, cut at the text.

    Args:
        template: ``model.template``.
        wrap: what is put around it (a chat template).

    Raises:
        ValueError: ``{text}`` does not occur exactly once, what a task decides comes after it, or
            options are on its line.
    """
    choosing = _halves(wrap(template))
    lines = template.splitlines(keepends=True)
    if any("{options}" in line and "{text}" in line for line in lines):
        raise ValueError(
            "needs {options} on another line than {text}: it is left out where answers are texts"
        )
    writing = "".join(line for line in lines if "{options}" not in line)
    return PromptTemplate(choosing, _halves(wrap(writing)))


def _halves(prompt: str) -> Halves:
    parts = prompt.split("{text}")
    if len(parts) != 2 or "{options}" in parts[1] or "{instruction}" in parts[1]:
        raise ValueError("needs {text} once, and what is the same for all texts before it")
    return parts[0], parts[1]


def words(label: str) -> str:
    """Return a label as it stands in a prompt."""
    return label.replace("_", " ")


INSTRUCTION = "Classify the text. Answer with one of the options."
"""What the prompt of a task asks for, where ``data.instructions`` does not say."""
CHAT_DATE = "01 Jan 2025"
"""What a chat template that names the date is told."""


@dataclass(frozen=True)
class PromptTokens:
    """Makes prompts and answers; what is asked for often is tokenised once.

    Attributes:
        tokenizer: that of the model.
        template: of the prompt.
        longest_answer: tokens of an answer that is a text, at most, without its end; one that is
            cut there has none.
        texts: ids of texts alone, cut.
        opening: ids before every prompt.
        closing: ids after every prompt.
        gap: what stands before an answer, where it continues the prompt.
        start: ids that a decoder of its own begins with; none: an answer follows the prompt.
        turn_end: the id that ends an answer in a chat; None: the tokeniser's end.
        dummy: the id that the tokeniser puts before whatever it reads; None: nothing.
    """

    tokenizer: Any
    template: PromptTemplate
    longest_answer: int
    texts: TokenCache
    opening: Tokens = ()
    closing: Tokens = ()
    gap: str = ""
    start: Tokens = ()
    turn_end: int | None = None
    dummy: int | None = None
    _known: dict[str, Tokens] = field(default_factory=dict)

    def encode(
        self, examples: Sequence[Example], labels: Sequence[str], instruction: str
    ) -> list[Encoded]:
        """Return tokenised prompts; only the text is cut, so that the prompt with its options,
        whatever the length of the text, ends as the template does."""
        index = {label: position for position, label in enumerate(labels)}
        texts = self.texts([example.text for example in examples])
        encoded = []
        for ids, example in zip(texts, examples, strict=True):
            prompt = self.prompt(tuple(ids), labels, instruction)
            if labels:
                encoded.append(replace(prompt, target=index[example.label]))
                continue
            right = (example.target, *example.references)
            encoded.append(replace(prompt, answer=self._written(example.target), right=right))
        return encoded

    def _written(self, target: str) -> Tokens:
        """The tokens of an answer that is a text. What is cut has no end: it is not over."""
        whole = self.ids(f"{self.gap}{target}")
        kept = whole[: self.longest_answer]
        return kept + self.end if kept == whole else kept

    def prompt(self, text: Tokens, labels: Sequence[str], instruction: str) -> Encoded:
        """Return the prompt around a text; the answer is not known."""
        before, after = self.template.around(instruction or INSTRUCTION, labels)
        # Where a text brings its own space along, a space before it would be one too many.
        head = self.opening + self._once(before if self.dummy is None else before.rstrip(" "))
        tail = self._going_on(after) + self.closing
        return Encoded((*head, *text, *tail), -1, shared=len(head), text=text)

    def answered(
        self,
        batch: Sequence[Encoded],
        labels: Sequence[str],
        instruction: str,
        scores: Callable[[Sequence[Encoded], Sequence[str]], Tensor],
        written: Callable[[Sequence[Encoded]], list[Tokens]],
    ) -> list[Encoded]:
        """Return the same texts under the prompt of another task, each with the answer that a model
        gives.

        Args:
            batch: texts, under any prompt.
            labels: of that task; none: its answers are texts.
            instruction: of that task.
            scores: of labels, by the model.
            written: answers by the model, the ends included.
        """
        asked = [self.prompt(item.text, labels, instruction) for item in batch]
        if labels:
            with torch.no_grad():
                best = scores(asked, labels).argmax(dim=1).tolist()
            answers = [self.label(labels[n]) + self.end for n in best]
        else:
            answers = written(asked)
        return [replace(each, answer=answer) for each, answer in zip(asked, answers, strict=True)]

    def answer(self, item: Encoded, labels: Sequence[str]) -> Tokens:
        """Return the tokens that an example's answer should have, the end included."""
        if item.target < 0:
            return item.answer
        return self.label(labels[item.target]) + self.end

    def label(self, label: str) -> Tokens:
        """Return the tokens of a label as an answer, without an end."""
        return self._once(f"{self.gap}{words(label)}")

    def scored(self, labels: Sequence[str]) -> list[Tokens]:
        """Return the tokens of each label by which it is scored: those of the label; with the end,
        where one begins as another does, for else the shorter had all that the longer begins with.
        """
        answers = [self.label(label) for label in labels]
        return [answer + self.end for answer in answers] if beginnings(answers) else answers

    @property
    def end(self) -> Tokens:
        """The token that ends an answer, where the tokeniser has one."""
        end = self.tokenizer.eos_token_id if self.turn_end is None else self.turn_end
        return () if end is None else (end,)

    @property
    def padding(self) -> int:
        """An id for cells that nobody reads."""
        pad: int | None = self.tokenizer.pad_token_id
        return pad if pad is not None else (*self.end, 0)[0]

    def until_end(self, row: Sequence[int]) -> Tokens:
        """Cut what follows the end."""
        end = self.end[0] if self.end else None
        length = row.index(end) + 1 if end in row else len(row)
        return tuple(row[:length])

    def text(self, ids: Tokens) -> str:
        """Return what an answer says."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()

    def ids(self, text: str) -> Tokens:
        """Return the ids of a text alone."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _going_on(self, text: str) -> Tokens:
        """The ids of what follows other words."""
        ids = self._once(text)
        return ids[1:] if ids[:1] == (self.dummy,) else ids

    def _once(self, text: str) -> Tokens:
        if text not in self._known:
            self._known[text] = self.ids(text)
        return self._known[text]


def prompt_tokens(
    tokenizer: Any, model: ModelConfig, max_length: int, around: tuple[Tokens, Tokens], gap: str
) -> PromptTokens:
    """Return what makes the prompts of ``model``.

    Args:
        tokenizer: that of the model.
        model: template, length of an answer.
        max_length: tokens of a text, at most.
        around: ids before and after every prompt.
        gap: what stands before an answer.

    Raises:
        UserError: ``model.chat``, and the tokeniser has no chat template, or one that leaves out
            or repeats the text.
    """
    texts = TokenCache(
        lambda texts: [
            tokenizer(text, add_special_tokens=False)["input_ids"][:max_length] for text in texts
        ],
        tokeniser_name(tokenizer, "text alone", max_length),
    )
    dummy = dummy_prefix(tokenizer)
    if model.chat:  # which has marks and gaps of its own
        around, gap = ((), ()), ""
    if dummy is not None:  # an answer brings its own space along
        gap = ""
    template = prompt_template(tokenizer, model)
    return PromptTokens(
        *(tokenizer, template, model.max_new_tokens, texts, *around, gap),
        turn_end=turn_end(tokenizer) if model.chat else None,
        dummy=dummy,
    )


def dummy_prefix(tokenizer: Any) -> int | None:
    """Return the id that a tokeniser such as Llama 2's puts before whatever it reads alone, where a
    space of one's own makes it two; None: it does not."""
    alone, after_space = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", " a")
    )
    if not alone or after_space[1:] != alone:
        return None
    word = str(tokenizer.convert_ids_to_tokens(alone[0]))
    return after_space[0] if word.startswith("▁") else None  # else a space is a token by itself


def turn_end(tokenizer: Any) -> int | None:
    """Return the mark that a chat template puts after an answer; None: none of its own."""
    from jinja2 import TemplateError

    answer = "ANSWER"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
    try:
        shown = tokenizer.apply_chat_template(turns, tokenize=False, date_string=CHAT_DATE)
    except (ValueError, TemplateError):  # of questions alone
        return None
    if answer not in shown:
        return None
    after = tokenizer(shown.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
    marks = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return next((token for token in after if token in marks), None)


def prompt_template(tokenizer: Any, model: ModelConfig) -> PromptTemplate:
    """Return the template of the prompts of ``model``.

    Raises:
        UserError: see :func:`chat_template`; or ``model.template`` is none.
    """
    if model.chat:
        return chat_template(tokenizer, model)
    try:
        return read_template(model.template)
    except ValueError as error:
        raise UserError(f"model.template: {error}") from None


def chat_template(tokenizer: Any, model: ModelConfig) -> PromptTemplate:
    """Return ``model.template`` as a user's message, up to where the answer begins.

    Raises:
        UserError: the tokeniser has no chat template, or one that leaves out or repeats the text.
    """
    from jinja2 import TemplateError

    def wrap(message: str) -> str:
        # Some templates name today's date, which would make other prompts tomorrow.
        shown: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}],
            tokenize=False,
            add_generation_prompt=True,
            date_string=CHAT_DATE,
            enable_thinking=False,  # where a template knows it: an answer is the label alone
        )
        return shown

    try:
        return read_template(model.template, wrap)
    except (ValueError, TemplateError) as error:
        raise UserError(
            f"model.chat: '{model.name}' has no chat template for it "
            f"({str(error).splitlines()[0]}); set model.chat to false"
        ) from None


def require_distinct(tokenizer: Any, labels: Sequence[str]) -> None:
    """Check that every label has tokens, and others than the rest: else the first would always be
    the answer.

    Raises:
        UserError: two labels are the same to the tokeniser, or one is nothing; or one begins as
            another does, and no end tells them apart.
    """
    known: dict[Tokens, str] = {}
    for label in labels:
        ids = tuple(tokenizer(f" {words(label)}", add_special_tokens=False)["input_ids"])
        if not ids:
            raise UserError(f"label '{label}': the model's tokeniser has no token for it")
        if known.setdefault(ids, label) != label:
            raise UserError(
                f"labels '{known[ids]}' and '{label}' are the same to the model's tokeniser; "
                "rename one, or choose another model"
            )
    if tokenizer.eos_token_id is not None:
        return
    for short, long in beginnings(known):
        raise UserError(
            f"label '{known[long]}' begins as '{known[short]}' does, and the model's tokeniser "
            "has no token for an end; rename one, or choose another model"
        )


def beginnings(answers: Iterable[Tokens]) -> list[tuple[Tokens, Tokens]]:
    """Return answers that others begin with, each with the next of these; empty: there are none."""
    neighbours = pairwise(sorted(set(answers)))
    return [(short, long) for short, long in neighbours if long[: len(short)] == short]
