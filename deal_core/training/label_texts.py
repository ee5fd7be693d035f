"""The names of labels as texts: what everybody may ask a model."""

from __future__ import annotations

from collections.abc import Sequence

from deal_core.data import Example
from deal_core.models import Encoded, LanguageModel
from deal_core.models.prompt import words


def label_texts(
    model: LanguageModel, labels: Sequence[str], instruction: str = ""
) -> list[Encoded]:
    """Return each name as a text that is answered by its label.

    Args:
        model: encodes them.
        labels: of a task.
        instruction: what its prompt asks for.
    """
    texts = [Example(words(label), label) for label in labels]
    return model.encode(texts, labels, instruction)
