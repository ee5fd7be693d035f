"""What the rest of the project needs of a language model, and no more: a family is a subclass of
:class:`LanguageModel`; and a text's embedding, made of mean states of a model's last layers: (M44)
of docs/method.md.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

import torch
from peft import PeftModel, TaskType
from torch import Tensor, nn
from torch.nn.functional import normalize

from deal_core.config.experiment import AdapterConfig
from deal_core.data import Example
from deal_core.errors import UserError
from deal_core.lora.attach import attach
from deal_core.models.fast.prompt_forest import Tokens
from deal_core.models.loading import best_device

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(frozen=True)
class Encoded:
    """One tokenised example."""

    tokens: Tokens
    """Of the text (encoder) or of the prompt (generating model)."""
    target: int
    """Index of the label in the task's labels; -1: the answer is a text."""
    shared: int = 0
    """So many tokens of a prompt, the first ones, are those of all prompts of the task."""
    text: Tokens = ()
    """Of the text alone, without the prompt around it."""
    answer: Tokens = ()
    """Of the answer, its end included, where it is a text."""
    right: tuple[str, ...] = ()
    """Texts that are right answers, where it is one."""

    @property
    def place(self) -> slice:
        """Where the text lies among the tokens of its prompt; of one without tokens, the place
        before the answer or the last one."""
        first = min(self.shared, len(self.tokens) - 1)
        return slice(first, first + max(1, len(self.text)))


@dataclass(frozen=True)
class ForwardOutput:
    """What one forward pass gives the local objective."""

    example_losses: Tensor
    """``(batch,)``, one loss per example, independent of its batch-mates."""
    distillation_logits: Tensor
    """``(batch, classes)``: over the labels of other tasks; of a generating model, whose words are
    distilled, no classes."""
    spaces: Sequence[int]
    """How many classes, from the left, are one choice: a softmax is over one space."""
    rows: Sequence[int] = ()
    """Rows of logits that each example has, one a word; none: each has one."""


class Memo(Generic[K, V]):
    """What is made of keys, each made once and kept in memory; where more than ``most`` would be
    kept, all are forgotten first."""

    def __init__(self, make: Callable[[list[K]], Iterable[V]], most: float = math.inf) -> None:
        self._make, self._most = make, most
        self._known: dict[K, V] = {}

    def __call__(self, keys: Sequence[K]) -> list[V]:
        """Return what is made of each key, in their order."""
        if len(self._known) + len(keys) > self._most:
            self._known.clear()
        if missing := [key for key in dict.fromkeys(keys) if key not in self._known]:
            self._known.update(zip(missing, self._make(missing), strict=True))
        return [self._known[key] for key in keys]


class LanguageModel(ABC):
    """A frozen base model with a current adapter (see ``deal_core.lora.attach``)."""

    has_label_logits: ClassVar[bool]
    """Whether losses and distillation are over the labels that are asked about; otherwise they
    are over one space, whatever is asked (a generating model's vocabulary)."""

    def __init__(self, base: Any, adapter: AdapterConfig, task_type: TaskType) -> None:
        self.device: torch.device = best_device()
        self.module: PeftModel = attach(base.to(self.device), adapter, task_type)
        self.module.eval()

    @abstractmethod
    def encode(
        self, examples: Sequence[Example], labels: Sequence[str], instruction: str = ""
    ) -> list[Encoded]:
        """Tokenise once; no ``labels``: answers are texts. ``instruction``: what the prompt of the
        task asks for; empty: the usual. Encoders have no prompt."""

    @abstractmethod
    def forward_train(
        self, batch: Sequence[Encoded], labels: Sequence[str], seen: Sequence[Sequence[str]]
    ) -> ForwardOutput:
        """Forward for training: losses over the ``labels`` of the task, with which the batch was
        encoded; distillation over each space of other tasks in ``seen``, a label in any number."""

    @abstractmethod
    def embed(self, batch: Sequence[Encoded], layers: int = 1) -> Tensor:
        """Return the texts' embeddings, unit vectors ``(batch, size)``, float32, made of so many of
        the last layers: (M44); see :func:`deal_core.models.embedding_size`."""

    @abstractmethod
    def scores(self, batch: Sequence[Encoded], labels: Sequence[str]) -> Tensor:
        """Return ``(batch, len(labels))``, float32; the largest score is the answer."""


def padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Return ids, and which of them are of a row, ``(rows, longest)`` each; ``left``: padding
    stands before them."""
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    gaps = [[pad] * (longest - len(row)) for row in rows]
    ids = [[*gap, *row] if left else [*row, *gap] for row, gap in zip(rows, gaps, strict=True)]
    place = torch.arange(longest)[None, :]
    real = place >= longest - lengths[:, None] if left else place < lengths[:, None]
    return torch.tensor(ids).to(device), real.to(device)


def embedding_of(pooled: Sequence[Tensor]) -> Tensor:
    """Return unit vectors, ``(texts, parts * hidden)``: of each pair of neighbouring layers the
    mean, side by side. ``pooled`` are mean states of the texts in each layer, the last layer first,
    ``(texts, hidden)``."""
    units = [normalize(layer, dim=1) for layer in pooled]
    if len(units) == 1:
        return units[0]
    pairs = [torch.stack(units[i : i + 2]).sum(0) for i in range(0, len(units), 2)]
    return torch.cat([normalize(pair, dim=1) for pair in pairs], dim=1) / math.sqrt(len(pairs))


def text_alone(item: Encoded) -> Encoded:
    """Return a text without the prompt around it, to embed it; an encoder's has none."""
    return replace(item, tokens=item.text, shared=0) if item.text else item


def last_layers(output: Any, layers: int) -> list[Tensor]:
    """Return the states of the last ``layers`` layers, the last one first; of fewer where the model
    has no more."""
    if layers == 1:
        return [output.last_hidden_state]
    after_each = output.hidden_states[1:]  # the first are the embedded tokens
    return list(after_each[: -layers - 1 : -1])


def require_stateless(model: LanguageModel, name: str, max_length: int) -> None:
    """Check on constant texts that reading one leaves nothing behind in the model: noise for one
    record would otherwise have to hide what that record does to the others.

    The longest text (``max_length`` tokens) is read first, as tables may grow with it; then a short
    one, and the longest again. Nothing is said of a model that cannot read it: no text of a run is
    read before one as long has been tried out.

    Raises:
        UserError: a number or a buffer of the model is another after a text.
    """
    labels = ("a",) if model.has_label_logits else ()
    examples = [Example(text, "a", target="a") for text in ("a " * max_length, "a")]
    long, short = model.encode(examples, labels)
    before: Mapping[str, Any] = {}
    for number, text in enumerate((long, short, long)):
        try:
            with torch.no_grad():
                model.forward_train([text], labels, ())
                model.embed([text])
        except Exception:
            return
        after = _memory(model.module)
        changed = [key for key in after if key not in before or not _equal(before[key], after[key])]
        if number and changed:
            raise UserError(
                f"model.name '{name}': keeps something of each text that it reads ({changed[0]}), "
                "so that an answer depends on other texts, which no noise hides; choose another "
                "model"
            )
        before = after


def _memory(module: nn.Module) -> Mapping[str, Any]:
    """Return name to value of whatever a layer holds that is no weight, no layer and no table."""
    held: dict[str, Any] = {}
    for path, layer in module.named_modules():
        values = {**vars(layer), **dict(layer.named_buffers(recurse=False))}
        for key, value in values.items():
            if isinstance(value, (int, float, str, Tensor)):
                held[f"{path}.{key}"] = value.clone() if isinstance(value, Tensor) else value
    return held


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    return type(first) is type(second) and bool(first == second)
