"""What a model makes of a text must not depend on the texts that it has read before: noise for one
record would otherwise have to hide what that record does to the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deal_core.data.source import Example
from deal_core.errors import UserError
from deal_core.models.interface import LanguageModel

DYNAMIC = "dynamic"
"""In the name of a kind of rotary places whose frequencies follow the longest text so far."""


def require_fixed_places(base: nn.Module, name: str) -> None:
    """Check that the places of words do not follow from the longest text that was read.

    Args:
        base: a model of transformers, whose layers of rotary places have a ``rope_type``.
        name: ``model.name``.

    Raises:
        UserError: they do.
    """
    for module in base.modules():
        found = getattr(module, "rope_type", "")
        kinds = found.values() if isinstance(found, Mapping) else [found]
        if any(DYNAMIC in str(kind) for kind in kinds):
            raise UserError(
                f"model.name '{name}': its rotary places are of the kind '{DYNAMIC}', which follow "
                "the longest text read so far, so that an answer depends on other texts; choose "
                "another kind (rope_type in its config.json), or another model"
            )


def require_stateless(model: LanguageModel, name: str, max_length: int) -> None:
    """Check on constant texts that reading one leaves nothing behind in the model.

    The longest text is read first, as tables may grow with it; then a short one, and the longest
    again. Nothing is said of a model that cannot read it: no text of a run is read before one as
    long has been tried out.

    Args:
        model: ready.
        name: ``model.name``.
        max_length: ``train.max_length``, tokens.

    Raises:
        UserError: a number or a buffer of the model is another after a text.
    """
    labels = ("a",) if model.has_label_logits else ()
    examples = [Example(text, "a", target="a") for text in ("a " * max_length, "a")]
    long, short = model.encode(examples, labels)
    before: dict[str, Any] = {}
    for number, text in enumerate((long, short, long)):
        try:
            with torch.no_grad():
                model.forward_train([text], labels, ())
                model.embed([text])
        except Exception:
            return
        after = _memory(model.module)
        if number:
            _require_equal(before, after, name)
        before = after


def _require_equal(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> None:
    changed = [key for key in after if key not in before or not _equal(before[key], after[key])]
    if changed:
        raise UserError(
            f"model.name '{name}': keeps something of each text that it reads ({changed[0]}), so "
            "that an answer depends on other texts, which no noise hides; choose another model"
        )


def _memory(module: nn.Module) -> dict[str, Any]:
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
