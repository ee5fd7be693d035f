"""Right answers of a model with its adapters, on plain objects."""

from __future__ import annotations

from collections.abc import Sequence

from deal_core.data import Example
from deal_core.errors import UserError
from deal_core.lora.state import State
from deal_core.models import LanguageModel
from deal_core.training.evaluation import count_correct
from deal_core.training.loop import load_state
from simulations.api.training import require_labels


def evaluate(
    model: LanguageModel,
    state: State,
    examples: Sequence[Example],
    labels: Sequence[str],
    *,
    instruction: str = "",
) -> float:
    """Return the share of examples that are answered rightly among ``labels``, by their names.

    Args:
        model: of :func:`load_base`; its adapter is overwritten.
        state: the adapters, at any moment.
        examples: test examples of one task.
        labels: of that task; none: answers are texts, and the share is ROUGE-L.
        instruction: what a prompt asks for (generating models); empty: the usual.

    Raises:
        UserError: no examples, or one of another label.
    """
    if not examples:
        raise UserError("evaluate: no examples")
    require_labels(examples, labels)
    load_state(model, state)
    data = model.encode(examples, labels, instruction)
    return count_correct(model, data, labels) / len(examples)
