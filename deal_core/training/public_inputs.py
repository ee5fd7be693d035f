"""What the layers of a model take in on texts that everybody knows: the names of labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deal_core.data import Example
from deal_core.lora.attach import lora_layers
from deal_core.lora.state import State
from deal_core.models import LanguageModel
from deal_core.training.loop import load_state


def public_inputs(
    model: LanguageModel, state: State, tasks: Mapping[str, tuple[Sequence[str], str]]
) -> dict[str, Tensor]:
    """Return layer name to ``sum x x^T`` over its inputs, ``(d_in, d_in)``, float64, when the names
    of labels are asked about as texts.

    Args:
        model: of any family; holds the state afterwards.
        state: the model as it is.
        tasks: name to labels, and to what the prompt asks for. A task without labels gives
            nothing.
    """
    load_state(model, state)
    sums: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(_watching(name, sums))
        for name, layer in lora_layers(model.module).items()
    ]
    try:
        with torch.no_grad():
            for labels, instruction in tasks.values():
                texts = [Example(label.replace("_", " "), label) for label in labels]
                for item in model.encode(texts, labels, instruction):
                    model.forward_train([item], labels, ())
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def _watching(name: str, sums: dict[str, Tensor]) -> Any:
    """A hook that adds the outer products of what comes in."""

    def hook(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
        product = (rows.T @ rows).cpu()
        sums[name] = sums[name] + product if name in sums else product

    return hook
