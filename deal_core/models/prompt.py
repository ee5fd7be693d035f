"""Prompts and answers of a generating model: instruction, options and text, and their token ids."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from deal_core.config.experiment import ModelConfig
from deal_core.data import Example
from deal_core.errors import UserError
from deal_core.models.fast.prompt_forest import Tokens
from deal_core.models.interface import Encoded, Memo

Halves = tuple[str, str]
"""What stands before and after the text."""
INSTRUCTION = "Classify the text. Answer with one of the options."
"""What the prompt of a task asks for, where ``data.instructions`` does not say."""


def words(label: str) -> str:
    """Return a label as it stands in a prompt."""
    return label.replace("_", " ")


@dataclass(frozen=True)
class PromptTemplate:
    """What stands around a text."""

    choosing: Halves
    """For a task with labels."""
    writing: Halves
    """For answers that are texts: without the lines that name the options."""

    def around(self, instruction: str, labels: Sequence[str]) -> Halves:
        """Return what stands before and after the text of a task; no ``labels``: its answers are
        texts. An ``instruction`` with ``{text}`` in it is the whole prompt of its task.

        Raises:
            ValueError: such an instruction is none: :func:`read_template`.
        """
        if "{text}" in instruction:
            if "{instruction}" in instruction:
                raise ValueError("needs its own words in the place of {instruction}")
            return read_template(instruction).around("", labels)
        before, after = self.choosing if labels else self.writing
        options = ", ".join(map(words, labels))
        return before.replace("{instruction}", instruction).replace("{options}", options), after


def read_template(template: str) -> PromptTemplate:
    """Return ``model.template``, cut at the text.

    Raises:
        ValueError: ``{text}`` does not occur exactly once, what a task decides comes after it, or
            options are on its line.
    """
    choosing = _halves(template)
    lines = template.splitlines(keepends=True)
    if any("{options}" in line and "{text}" in line for line in lines):
        raise ValueError(
            "needs {options} on another line than {text}: it is left out where answers are texts"
        )
    writing = "".join(line for line in lines if "{options}" not in line)
    return PromptTemplate(choosing, _halves(writing))


def _halves(prompt: str) -> Halves:
    parts = prompt.split("{text}")
    if len(parts) != 2 or "{options}" in parts[1] or "{instruction}" in parts[1]:
        raise ValueError("needs {text} once, and what is the same for all texts before it")
    return parts[0], parts[1]


@dataclass(frozen=True)
class PromptTokens:
    """Makes prompts and answers; what is asked for often is tokenised once."""

    tokenizer: Any
    template: PromptTemplate
    longest_answer: int
    """Tokens of an answer that is a text, at most, without its end; one that is cut there has
    none."""
    texts: Memo[str, list[int]]
    """Ids of texts alone, cut."""
    opening: Tokens = ()
    """Before every prompt."""
    closing: Tokens = ()
    """After every prompt."""
    gap: str = ""
    """Before an answer, where it continues the prompt."""
    start: Tokens = ()
    """What a decoder of its own begins with; none: an answer follows the prompt."""
    dummy: int | None = None
    """What the tokeniser puts before whatever it reads; None: nothing."""

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
        whole = self._ids(f"{self.gap}{target}")
        kept = whole[: self.longest_answer]
        return kept + self.end if kept == whole else kept

    def prompt(self, text: Tokens, labels: Sequence[str], instruction: str) -> Encoded:
        """Return the prompt around a text; the answer is not known."""
        before, after = self.template.around(instruction or INSTRUCTION, labels)
        # Where a text brings its own space along, a space before it would be one too many.
        if self.dummy is not None:
            before = before.rstrip(" ")
        before_ids, after_ids = self._once([before, after])
        if after_ids[:1] == (self.dummy,):  # it goes on after other words
            after_ids = after_ids[1:]
        head = self.opening + before_ids
        whole = (*head, *text, *after_ids, *self.closing)
        return Encoded(whole, -1, shared=len(head), text=text)

    def answer(self, item: Encoded, labels: Sequence[str]) -> Tokens:
        """Return the tokens that an example's answer should have, the end included."""
        return item.answer if item.target < 0 else self.label(labels[item.target]) + self.end

    def label(self, label: str) -> Tokens:
        """Return the tokens of a label as an answer, without an end."""
        return self._once([f"{self.gap}{words(label)}"])[0]

    def scored(self, labels: Sequence[str]) -> list[Tokens]:
        """Return the tokens of each label by which it is scored: those of the label; with the end,
        where one begins as another does, for else the shorter had all that the longer begins with.
        """
        answers = [self.label(label) for label in labels]
        return [answer + self.end for answer in answers] if beginnings(answers) else answers

    @property
    def end(self) -> Tokens:
        """The token that ends an answer, where the tokeniser has one."""
        end = self.tokenizer.eos_token_id
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

    def _ids(self, text: str) -> Tokens:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @cached_property
    def _once(self) -> Memo[str, Tokens]:
        return Memo(lambda texts: map(self._ids, texts))


def prompt_tokens(
    tokenizer: Any, model: ModelConfig, max_length: int, around: tuple[Tokens, Tokens], gap: str
) -> PromptTokens:
    """Return what makes the prompts of ``model``, with ids ``around`` every prompt, and a ``gap``
    before an answer; texts are cut at ``max_length`` tokens.

    Raises:
        UserError: ``model.template`` is none.
    """
    try:
        template = read_template(model.template)
    except ValueError as error:
        raise UserError(f"model.template: {error}") from None
    texts: Memo[str, list[int]] = Memo(
        lambda texts: [
            tokenizer(text, add_special_tokens=False)["input_ids"][:max_length] for text in texts
        ]
    )
    dummy = dummy_prefix(tokenizer)
    if dummy is not None:  # an answer brings its own space along
        gap = ""
    longest = model.max_new_tokens
    return PromptTokens(tokenizer, template, longest, texts, *around, gap, dummy=dummy)


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
